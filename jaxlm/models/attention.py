"""Causal attention with grouped queries."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    first: Int[Array, ""] | int = 0,
    segments: Integer[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention, each query over the keys up to its own position; query heads share key heads in groups.

    Products are in the dtype of `q`, the softmax in float32.

    Args:
        q: queries at positions `first, first + 1, ...`; query head n reads key head `n // (N / K)`.
        k: keys at positions 0 to S - 1.
        v: values.
        first: the position of the first query; more than 0 when generating.
        segments: the document number of each position (needs S = T): queries see only keys of their own document.
    """
    batch, length, heads, width = q.shape
    keys, key_heads = k.shape[1:3]
    mask = jnp.arange(keys)[None, :] <= first + jnp.arange(length)[:, None]
    mask = mask[None, None, None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])[:, None, None]
    # Heads before positions, so that both products are batches of plain matrix products, forward and backward.
    grouped = jnp.moveaxis(q.reshape(batch, length, key_heads, heads // key_heads, width), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # The softmax's division comes after the product, where there is less to divide.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    y = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = y / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.moveaxis(y, 3, 1).reshape(q.shape).astype(q.dtype)
