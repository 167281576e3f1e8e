"""The mean of a loss over batches."""

import math
from collections.abc import Callable, Iterable

import jax

from jaxlm import tree
from jaxlm.compiled import Compiled, compile_for
from jaxlm.types import Aux, Batch, LossFn, Params


def make_eval(loss_fn: LossFn) -> Callable[[Params, Batch], tuple[jax.Array, Aux]]:
    """The loss function without randomness, to be jitted, or compiled for each shape of batch."""
    return lambda params, batch: loss_fn(params, batch, jax.random.key(0))


def compile_eval(loss_fn: LossFn, params: Params, batches: Iterable[Batch]) -> Compiled:
    """`make_eval` compiled for every shape of batch.

    Args:
        loss_fn: any loss function.
        params: the parameters, or their shapes and shardings.
        batches: one batch of each shape, or its shapes and shardings.
    """
    return compile_for(make_eval(loss_fn), params, batches)


def evaluate(
    eval_fn: Callable[[Params, Batch], tuple[jax.Array, Aux]], params: Params, batches: Iterable[Batch]
) -> dict[str, float]:
    """Averages a loss and its metrics over all batches together: each token counts the same, whatever batch it is in.

    Args:
        eval_fn: what `make_eval` returns, jitted, or `compile_eval`.
        params: the parameters.
        batches: batches of any shapes.

    Returns:
        `loss`, the loss function's metrics, and `weight`, the number of tokens that they are averages over.

    Raises:
        ValueError: no batch, or none with a predicted token; or one of NumPy's has integers beyond 32 bits, which JAX
            would cut off.
    """

    def loss_of(batch: Batch) -> tuple[jax.Array, Aux]:
        tree.check_integers(batch)
        return eval_fn(params, batch)

    found: list[tuple[jax.Array, Aux]] = jax.device_get([*map(loss_of, batches)])
    weight = math.fsum(aux.weight_sum for _, aux in found)
    if not weight:
        raise ValueError("evaluate: no token to predict in any batch")
    sums = [{"loss": loss_sum, **aux.metrics} for loss_sum, aux in found]
    return {name: math.fsum(one[name] for one in sums) / weight for name in sums[0]} | {"weight": weight}
