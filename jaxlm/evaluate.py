"""The mean of a loss over batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxlm.types import Aux, Batch, LossFn, Params


def make_eval(loss_fn: LossFn) -> Callable[[Params, Batch], tuple[jax.Array, Aux]]:
    """The loss function without randomness, to be jitted, or compiled for each shape of batch."""
    return lambda params, batch: loss_fn(params, batch, jax.random.key(0))


def evaluate(
    eval_fn: Callable[[Params, Batch], tuple[jax.Array, Aux]], params: Params, batches: Iterable[Batch]
) -> dict[str, float]:
    """Averages a loss and its metrics over all batches together: each token counts the same, whatever batch it is in.

    Args:
        eval_fn: what `make_eval` returns, jitted or compiled.
        params: the parameters.
        batches: batches of any shapes.

    Returns:
        `loss`, the loss function's metrics, and `weight`, the number of tokens that they are averages over.

    Raises:
        ValueError: no batch, or none with a predicted token.
    """
    sums: Any = None
    for batch in batches:
        found = eval_fn(params, batch)
        sums = found if sums is None else jax.tree.map(lambda a, b: a + b, sums, found)
    if sums is None or sums[1].weight_sum == 0:
        raise ValueError("evaluate: no token to predict in any batch")
    loss_sum, (weight_sum, metrics) = jax.device_get(sums)
    return {name: float(x / weight_sum) for name, x in {"loss": loss_sum, **metrics}.items()} | {
        "weight": float(weight_sum)
    }
