"""Makers of `LossFn`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from jaxlm.types import Aux, Batch, LossFn, Params


def next_token(apply: Callable[..., jax.Array]) -> LossFn:
    r"""Cross-entropy of each token given those before it in its document, in nats.

    $$\sum_{b,t} w_{bt} \left(\log\sum_v e^{z_{btv}} - z_{bt,y_{bt}}\right), \qquad y_{bt} = x_{b,t+1}$$

    with $w_{bt} = 1$ where position t and the next hold tokens of one document, else 0.

    Args:
        apply: `apply(params, tokens [B T]) -> logits [B T V]`; for batches with `segments` it is called as
            `apply(params, tokens, segments=segments)` and must keep documents from seeing each other. Rows with
            `lengths` need no such thing: a causal model sees the padding at a row's end from no real position. For
            batches with `window` it gets `window=`, an int.

    Returns:
        A loss function; its metrics hold `accuracy`.
    """

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        del key
        inputs = batch.get("inputs", batch["tokens"]).astype(jnp.int32)
        context = {"segments": batch["segments"]} if "segments" in batch else {}
        context |= {"window": batch["window"].value} if "window" in batch else {}
        logits = apply(params, inputs, **context).astype(jnp.float32)
        targets, weights = next_tokens(batch)
        losses = cross_entropy(logits, targets)
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        # Where nothing is predicted, not 0 times the loss: padding may hold any number, and its loss be NaN.
        loss_sum = jnp.sum(jnp.where(weights > 0, losses, 0))
        return loss_sum, Aux(jnp.sum(weights), {"accuracy": jnp.sum(weights * correct)})

    return loss_fn


def next_tokens(batch: Batch) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The targets of a batch and their weights: 0 where there is no next token of the same document, else 1.

    Raises:
        ValueError: the batch has both `segments` and `lengths`.
    """
    if "segments" in batch and "lengths" in batch:
        raise ValueError("next_tokens: the batch has both segments and lengths; give one of them")
    tokens = batch["tokens"].astype(jnp.int32)
    last = tokens.shape[1] - 1
    position = jnp.arange(tokens.shape[1])[None]
    if "segments" in batch:
        segments = batch["segments"]
        weights = (segments == jnp.roll(segments, -1, axis=1)) & (segments > 0) & (position < last)
    else:
        lengths = batch["lengths"][:, None] if "lengths" in batch else jnp.full((tokens.shape[0], 1), last + 1)
        weights = position + 1 < lengths
    return jnp.roll(tokens, -1, axis=1), weights.astype(jnp.float32)


def cross_entropy(logits: Float[Array, "B T V"], targets: Integer[Array, "B T"]) -> Float[Array, "B T"]:
    """Minus the log-probability of each target, in nats."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
