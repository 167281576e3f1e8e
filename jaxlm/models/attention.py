"""Causal attention with grouped queries: one function, and several implementations of it, as values."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Integer

from jaxlm import tree
from jaxlm.models.blockwise import blockwise as blockwise
from jaxlm.models.blockwise import share, whole_rows
from jaxlm.models.masks import Mask, Window, causal

Implementation = Callable[..., Array]
"""`implementation(q, k, v, mask=, first=, segments=, softcap=)`, as `attention` takes them; it raises a ValueError at
what it can't do. Ours are `dense`, `blockwise`, `cudnn` and `splash`."""

LONG: Final = 1024
LONG_ON_GPU: Final = 4096
"""From here on `blockwise` may be chosen. On an H100 `dense` is twice as fast at 1,024 positions."""
WORTH: Final = 0.7
"""If it computes at most this share of the scores: of a causal mask it is 0.625."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask = causal,
    first: Int[Array, ""] | int = 0,
    segments: Integer[Array, "B _"] | None = None,
    softcap: int | float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention, each query over keys up to its own position; query heads share key heads in groups.

    Products are in the dtype of `q`, the softmax in float32. Rows that end with padding need no lengths: no query
    before it sees it.

    Args:
        q: queries at positions `first, first + 1, ...`; query head n reads key head `n // (N / K)`.
        k: keys at positions 0 to S - 1.
        v: values.
        mask: which of the keys up to its own position a query sees.
        first: the position of the first query; more than 0 when generating.
        segments: the document number of each position (needs S = T): queries see only keys of their own document.
        softcap: scores x become `softcap * tanh(x / softcap)` (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
        implementation: None: the fastest that can do this on the default backend.

    Raises:
        ValueError: shapes that don't go together, key heads that don't divide query heads, segments with S != T, a soft
            cap that isn't above 0, or something that the given implementation can't do.
    """
    if k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"attention: queries {q.shape}, keys {k.shape} and values {v.shape}; keys and values must be alike, and "
            "have as many rows, and heads as wide, as queries"
        )
    heads, key_heads = q.shape[2], k.shape[2]
    if heads % key_heads:
        raise ValueError(f"attention: {heads} query heads are not divisible by {key_heads} key heads")
    if segments is not None and not segments.shape == q.shape[:2] == k.shape[:2]:
        raise ValueError(
            f"attention: segment numbers {segments.shape} for queries {q.shape[:2]} and keys {k.shape[:2]}; there must "
            "be as many of each"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"attention: softcap is {softcap}; use a number above 0, or None")
    asked: dict[str, Any] = {"mask": mask, "first": first, "segments": segments, "softcap": softcap}
    return (implementation or _fastest(q, k, **asked))(q, k, v, **asked)


def _fastest(q: Array, k: Array, **asked: Any) -> Implementation:
    backend = jax.default_backend()
    if backend == "gpu" and _has_flash_attention() and not _why_not_cudnn(q, k, **asked):
        return cudnn
    if backend == "tpu" and not _why_not_splash(q, k, **asked):
        return splash
    long = whole_rows(q, k, asked["first"]) and q.shape[1] >= (LONG_ON_GPU if backend == "gpu" else LONG)
    return blockwise if long and share(asked["mask"], q.shape[1]) <= WORTH else dense


def dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask = causal,
    first: Int[Array, ""] | int = 0,
    segments: Integer[Array, "B T"] | None = None,
    softcap: int | float | None = None,
) -> Float[Array, "B T N H"]:
    """All T x S scores, those that the mask leaves out too. Anywhere, and for everything."""
    batch, length, heads, width = q.shape
    keys, key_heads = k.shape[1:3]
    seen = mask.allowed(first + jnp.arange(length)[:, None], jnp.arange(keys)[None, :])
    seen = seen[None, None, None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])[:, None, None]
    # Heads before positions, so that both products are batches of plain matrix products, forward and backward.
    grouped = jnp.moveaxis(q.reshape(batch, length, key_heads, heads // key_heads, width), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    # The softmax's division comes after the product, where there is less to divide.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    y = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = y / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.moveaxis(y, 3, 1).reshape(q.shape).astype(q.dtype)


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask = causal,
    first: Int[Array, ""] | int = 0,
    segments: Integer[Array, "B T"] | None = None,
    softcap: int | float | None = None,
) -> Float[Array, "B T N H"]:
    """FlashAttention of cuDNN, on NVIDIA's GPUs from Ampere on: causal masks and windows, in 16 bits.

    Raises:
        ValueError: anything else; with `segments` it would let documents see each other.
    """
    _refuse("cudnn", _why_not_cudnn(q, k, mask=mask, first=first, segments=segments, softcap=softcap))
    assert isinstance(mask, Window)
    window = None if mask.width is None else (mask.width - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, implementation="cudnn")


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask = causal,
    first: Int[Array, ""] | int = 0,
    segments: Integer[Array, "B T"] | None = None,
    softcap: int | float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """JAX's Pallas kernel for TPUs, which skips empty blocks: causal masks and windows, segments, soft caps.

    With `interpret` XLA runs the kernel's steps, anywhere and slowly.

    Raises:
        ValueError: anything else.
    """
    _refuse("splash", _why_not_splash(q, k, mask=mask, first=first, segments=segments, softcap=softcap))
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # takes a while, and only here it is needed

    assert isinstance(mask, Window)
    length, heads = q.shape[1:3]
    shape = (length, length)
    width = None if mask.width is None else mask.width - 1
    one = pallas.CausalMask(shape) if width is None else pallas.LocalMask(shape, (width, 0), 0)
    side = next(size for size in (512, 256, 128) if length % size == 0)
    sides = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = pallas.BlockSizes(**{f"block_{name}": side for name in sides})  # pyright: ignore[reportArgumentType]

    def run(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        kernel: Any = pallas.make_splash_mha_single_device(
            pallas.MultiHeadMask([one] * heads),
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        numbers = None if segments is None else pallas.SegmentIds(segments, segments)
        return jax.vmap(kernel)(q, k, v, numbers)

    if jax.typeof(q).manual_axis_type.varying:
        run = _unchecked(run)
    q = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    y = run(q, k, v, None if segments is None else segments.astype(jnp.int32))
    return jnp.swapaxes(y, 1, 2).astype(q.dtype)


def _unchecked(run: Callable[..., Array]) -> Callable[..., Array]:
    """For kernels inside `jax.shard_map`: they don't say over which axes their results vary, so let nobody ask.

    Not in their backward rules either, which is why these are traced with types that vary over none.
    """

    def local(f: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            leaves, structure = jax.tree.flatten(arguments)
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
            program, result = jax.make_jaxpr(lambda *x: f(*structure.unflatten(x)), return_shape=True)(*shapes)
            return jax.tree.unflatten(jax.tree.structure(result), jaxpr_as_fun(program)(*leaves))

        whole = PartitionSpec()
        unchecked = jax.shard_map(traced, in_specs=whole, out_specs=whole, axis_names=set(), check_vma=False)
        return lambda *arguments: tree.vary_alike(arguments, unchecked(*arguments))[1]

    @jax.custom_vjp
    def called(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        return local(run)(q, k, v, segments)

    def forward(q: Array, k: Array, v: Array, segments: Array | None) -> Any:
        return local(lambda q, k, v, segments: jax.vjp(lambda *x: run(*x, segments), q, k, v))(q, k, v, segments)

    def backward(pull: Any, dy: Array) -> Any:
        return *local(lambda pull, dy: pull(dy))(pull, dy), None

    called.defvjp(forward, backward)
    return called


def _why_not_cudnn(q: Array, k: Array, *, mask: Mask, first: Any, segments: Any, softcap: Any) -> str | None:
    if not isinstance(mask, Window):
        return f"can't do {mask}, only causal masks and windows; use blockwise"
    if segments is not None:
        return "can't keep documents of a row apart; use blockwise or dense, or one document a row"
    if softcap is not None:
        return "has no soft cap; use blockwise or dense"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"computes in bfloat16 or float16, not {q.dtype}; use blockwise or dense"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"can't do a head width of {q.shape[3]}, only multiples of 8 up to 128; use blockwise or dense"
    if not whole_rows(q, k, first):
        return "computes whole rows, with no cache before them; use dense"
    return None


def _why_not_splash(q: Array, k: Array, *, mask: Mask, first: Any, segments: Any, softcap: Any) -> str | None:
    del segments, softcap
    if not isinstance(mask, Window):
        return f"can't do {mask}, only causal masks and windows; use blockwise"
    if not whole_rows(q, k, first):
        return "computes whole rows, with no cache before them; use dense"
    if q.shape[1] % 128:
        return f"needs a multiple of 128 positions, not {q.shape[1]}; use blockwise or dense"
    return None


def _refuse(name: str, why: str | None) -> None:
    if why:
        raise ValueError(f"{name}: {why}")


@functools.cache
def _has_flash_attention() -> bool:
    capability = re.match(r"(\d+)\.\d+$", getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability is not None and int(capability[1]) >= 8
