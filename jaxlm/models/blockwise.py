"""Attention that computes only the blocks that its mask leaves, and keeps no scores for the backward pass."""

import functools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jaxlm import tree
from jaxlm.models import masks
from jaxlm.models.masks import Mask
from jaxlm.numbers import check_whole

BLOCK: Final = 128
"""Positions in a block. On CPUs 64 to 256 are equally fast."""
PARTS: Final = 4
"""A row's queries are divided into so many parts, each a loop over lists of blocks as long as its longest: with more,
less is computed in vain and more compiled."""

Groups = Float[Array, "B K G T H"]
Keys = Float[Array, "B K S H"]


class _Part(NamedTuple):
    """Consecutive blocks of queries: which, and the blocks of keys that each sees."""

    queries: np.ndarray
    """`[n]`."""
    keys: np.ndarray
    """`[n M]`; where it sees fewer than M, the rest is 0."""
    real: np.ndarray
    """`[n M]`: not such a rest."""


class _Static(NamedTuple):
    """All that isn't an array."""

    mask: Mask
    softcap: int | float | None
    block: int


@functools.lru_cache(maxsize=64)
def _parts(mask: Mask, length: int, block: int) -> tuple[_Part, ...]:
    seen = masks.blocks(mask, length, block) != masks.EMPTY
    counts, n = seen.sum(1), len(seen)
    ends = sorted({-(-n * (i + 1) // PARTS) for i in range(PARTS)})
    widths = [int(counts[begin:end].max()) for begin, end in zip([0, *ends], ends, strict=False)]
    parts: list[_Part] = []
    begin = 0
    for i, (end, width) in enumerate(zip(ends, widths, strict=True)):
        if i + 1 < len(widths) and widths[i + 1] == width:
            continue
        # A stable sort brings the seen ones to the front, in their order.
        keys = np.argsort(~seen[begin:end], axis=1, kind="stable")[:, :width]
        real = np.arange(width)[None] < counts[begin:end, None]
        parts.append(_Part(np.arange(begin, end), np.where(real, keys, 0), real))
        begin = end
    return tuple(parts)


def share(mask: Mask, length: int, *, block: int = BLOCK) -> float:
    """The share of all T x T scores that `blockwise` computes: 1 for all of them, of which a causal mask needs half."""
    n = -(-length // block)
    return sum(part.keys.size for part in _parts(mask, length, block)) / n**2


def whole_rows(q: Array, k: Array, first: Array | int) -> bool:
    """Whether queries and keys are at the same positions: not so with a cache."""
    return isinstance(first, int) and first == 0 and q.shape[1] == k.shape[1]


def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask = masks.causal,
    first: Int[Array, ""] | int = 0,
    segments: Integer[Array, "B T"] | None = None,
    softcap: int | float | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Attention over whole rows in O(T * keys seen) time, and memory for one block of queries' scores.

    Which blocks of keys a block of queries sees is worked out before compiling. The backward pass computes the scores
    again from the logarithms of the softmax's sums (FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1),
    and adds up gradients of keys and values in float32.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: which keys a query sees.
        first: 0.
        segments: the document number of each position: queries see only keys of their own document.
        softcap: as in `attention`.
        block: positions in a block; rows are padded to a multiple of it.

    Raises:
        ValueError: `first` isn't the number 0, there are not as many keys as queries, or `block` isn't 1 or more.
    """
    if not whole_rows(q, k, first):
        raise ValueError("blockwise: computes whole rows, with no cache before them; use dense")
    check_whole("blockwise", block=block)
    batch, length, heads, width = q.shape
    key_heads, whole = k.shape[2], -(-length // block) * block
    grouped = jnp.moveaxis(q.reshape(batch, length, key_heads, heads // key_heads, width), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    # No query before the padding sees it.
    grouped, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, whole - length), (0, 0)]) for x in (grouped, k, v))
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, whole - length)))
    y: Any = _attend(_Static(mask, softcap, block), *tree.vary_alike(grouped, k, v, segments))
    return jnp.moveaxis(y[..., :length, :], 3, 1).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q: Groups, k: Keys, v: Keys, segments: Integer[Array, "B T"] | None) -> Groups:
    return _forward(static, q, k, v, segments)[0]


def _forward(static: _Static, q: Groups, k: Keys, v: Keys, segments: Integer[Array, "B T"] | None) -> Any:
    def step(_: None, given: Any) -> tuple[None, Any]:
        q_block, q_at, keys, real = given
        k_blocks, v_blocks = _pick(k, keys, static), _pick(v, keys, static)
        scores, _ = _scores(static, q_block, k_blocks, q_at, keys, real, segments)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        y = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v_blocks, preferred_element_type=jnp.float32)
        return None, ((y / total).astype(q.dtype), largest + jnp.log(total))

    found = [
        jax.lax.scan(step, None, (_divide(q, part, static), *part))[1]
        for part in _parts(static.mask, q.shape[3], static.block)
    ]
    y, log_sums = (_join(list(parts)) for parts in zip(*found, strict=True))
    return y, (q, k, v, segments, y, log_sums)


def _backward(static: _Static, kept: Any, dy: Groups) -> Any:
    q, k, v, segments, y, log_sums = kept
    scale = q.shape[-1] ** -0.5
    inner = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)

    def step(sums: Any, given: Any) -> tuple[Any, Any]:
        q_block, dy_block, inner_block, log_sum, q_at, keys, real = given
        k_blocks, v_blocks = _pick(k, keys, static), _pick(v, keys, static)
        scores, capped = _scores(static, q_block, k_blocks, q_at, keys, real, segments)
        weights = jnp.exp(scores - log_sum)
        d_weights = jnp.einsum("bkgth,bksh->bkgts", dy_block, v_blocks, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - inner_block) * scale
        if static.softcap is not None:
            d_scores = d_scores * (1 - jnp.square(capped / static.softcap))
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        dq = jnp.einsum("bkgts,bksh->bkgth", d_scores, k_blocks, preferred_element_type=jnp.float32)
        dk = jnp.einsum("bkgts,bkgth->bksh", d_scores, q_block, preferred_element_type=jnp.float32)
        dv = jnp.einsum("bkgts,bkgth->bksh", weights, dy_block, preferred_element_type=jnp.float32)
        # Blocks in a list differ but for its rest, to which zeros are added: so the order of additions doesn't matter.
        added = [
            total.at[:, :, keys].add(new.reshape(*new.shape[:2], len(keys), static.block, -1))
            for total, new in zip(sums, (dk, dv), strict=True)
        ]
        return tuple(added), dq.astype(q.dtype)

    sums: Any = (tree.vary_alike(k, jnp.zeros(_blocks(k, static).shape, jnp.float32))[1],) * 2
    dqs: list[Any] = []
    for part in _parts(static.mask, q.shape[3], static.block):
        divided = [_divide(x, part, static) for x in (q, dy, inner, log_sums)]
        sums, dq = jax.lax.scan(step, sums, (*divided, *part))
        dqs.append(dq)
    dk, dv = (x.reshape(k.shape).astype(k.dtype) for x in sums)
    return _join(dqs), dk, dv, None


_attend.defvjp(_forward, _backward)


def _scores(
    static: _Static, q: Groups, k: Keys, q_at: Any, keys: Any, real: Any, segments: Integer[Array, "B _"] | None
) -> tuple[Any, Any]:
    """One block of queries' scores, masked, and as they are before."""
    within = jnp.arange(static.block)
    q_positions, k_positions = q_at * static.block + within, (keys[:, None] * static.block + within[None]).reshape(-1)
    seen = static.mask.allowed(q_positions[:, None], k_positions[None]) & jnp.repeat(real, static.block)[None]
    seen = seen[None, None, None]
    if segments is not None:
        own = jax.lax.dynamic_slice_in_dim(segments, q_at * static.block, static.block, axis=1)
        seen = seen & (own[:, :, None] == jnp.take(segments, k_positions, axis=1)[:, None])[:, None, None]
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if static.softcap is not None:
        scores = static.softcap * jnp.tanh(scores / static.softcap)
    return jnp.where(seen, scores, jnp.finfo(jnp.float32).min), scores


def _blocks(x: Array, static: _Static) -> Array:
    return x.reshape(*x.shape[:-2], -1, static.block, x.shape[-1])


def _pick(x: Array, keys: Array, static: _Static) -> Array:
    picked = _blocks(x, static)[:, :, keys]
    return picked.reshape(*x.shape[:2], -1, x.shape[-1])


def _divide(x: Array, part: _Part, static: _Static) -> Array:
    """A part's blocks of queries, one after another."""
    return jnp.moveaxis(_blocks(x, static)[..., part.queries[0] : part.queries[-1] + 1, :, :], -3, 0)


def _join(parts: list[Array]) -> Array:
    """The other way."""
    x = jnp.moveaxis(jnp.concatenate(parts), 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])
