"""State in fewer bytes: encoded between updates, float32 within."""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm import tree
from jaxlm.optim._adafactor import adafactor
from jaxlm.optim._adam import adamw
from jaxlm.optim._leaves import Scalar, has_masked, need, next_count, transformation
from jaxlm.optim._lion import lion

BLOCK: Final = 256
"""Elements along the last axis that share a scale."""
SMALLEST: Final = 4096
"""Leaves with fewer elements stay as they are: there is nothing to gain."""


class Codec(NamedTuple):
    """How an array is stored."""

    encode: Callable[[jax.Array, Callable[[], jax.Array]], Any]
    """Of an array and a function that returns uniform random bits, uint32, of its shape: what is stored."""
    decode: Callable[[Any], jax.Array]
    """Of what is stored: the array in float32."""


class Blocks(NamedTuple):
    """An array in blocks along its last axis."""

    codes: jax.Array
    """int8 or uint8, in the array's shape."""
    scales: jax.Array
    """float32: the greatest magnitude in each block, `[... ceil(n / 256)]`."""


class LeanState(NamedTuple):
    """The state of `lean`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: Any
    """The state of what is wrapped, encoded in part."""


def lean(tx: optax.GradientTransformation, codecs: Mapping[str, Codec]) -> optax.GradientTransformationExtraArgs:
    """Keeps state in fewer bytes, for any transformation: it is decoded, updated in float32 and encoded again.

    Rounding is random where a codec says so: else an average stops moving as soon as its steps are smaller than its
    precision. The random bits come from the update's number, the leaf's name and the element's index, so they don't
    depend on how arrays lie on devices.

    Args:
        tx: any transformation with float32 state.
        codecs: for state leaves whose whole name matches the regular expression, the first that does. Names are as
            `tree.named_leaves(tx.init(params))` gives them: `0/mu/blocks/kernel`. Leaves of fewer than 4096 elements
            and those that match none stay as they are.

    Raises:
        ValueError: at init: a pattern that no leaf's name matches, or a leaf to encode that isn't float32.

    >>> tx = lean(optax.trace(0.9), {"trace/.*": bfloat16_stochastic})
    >>> tx.init({"kernel": jnp.zeros((64, 64))}).inner.trace["kernel"].dtype
    dtype(bfloat16)
    """
    tx = optax.with_extra_args_support(tx)

    def chosen(params: Any) -> tuple[Any, list[tuple[str, Codec | None]]]:
        """The structure of the decoded state, and for each leaf its name and codec."""
        state = jax.eval_shape(tx.init, params)
        unused = set() if has_masked(params) or not jax.tree.leaves(params) else set(codecs)
        leaves: list[tuple[str, Codec | None]] = []
        for name, leaf in tree.named_leaves(state).items():
            pattern = next((p for p in codecs if re.fullmatch(p, name)), None)
            unused.discard(pattern or "")
            codec = codecs[pattern] if pattern is not None and leaf.size >= SMALLEST else None
            if codec is not None and leaf.dtype != jnp.float32:
                raise ValueError(f"lean: the state leaf {name!r} is {leaf.dtype}; only float32 is encoded")
            leaves.append((name, codec))
        if unused:
            raise ValueError(f"lean: no state leaf matches {sorted(unused)}; the leaves are {[n for n, _ in leaves]}")
        return jax.tree.structure(state), leaves

    def encode(state: Any, leaves: list[tuple[str, Codec | None]], count: jax.Array) -> Any:
        def one(x: jax.Array, name: str, codec: Codec | None) -> Any:
            return x if codec is None else codec.encode(x, lambda: random_bits(x.shape, name, count))

        flat, structure = jax.tree.flatten(state)
        return structure.unflatten([one(x, *leaf) for x, leaf in zip(flat, leaves, strict=True)])

    def init(params: Any) -> LeanState:
        # Behind a barrier, lest XLA take a minute to compute what zeros are encoded as while it compiles.
        state, count = jax.lax.optimization_barrier((tx.init(params), jnp.zeros((), jnp.int32)))
        return LeanState(count, encode(state, chosen(params)[1], count))

    def update(updates: Any, state: LeanState, params: Any = None, **extra: Any) -> tuple[Any, LeanState]:
        structure, leaves = chosen(need(params, "lean"))
        stored = structure.flatten_up_to(state.inner)
        decoded = [x if codec is None else codec.decode(x) for x, (_, codec) in zip(stored, leaves, strict=True)]
        updates, inner = tx.update(updates, structure.unflatten(decoded), params, **extra)
        count = next_count(state.count)
        return updates, LeanState(count, encode(inner, leaves, count))

    return transformation(init, update)


bfloat16: Final = Codec(lambda x, _: x.astype(jnp.bfloat16), lambda x: x.astype(jnp.float32))
"""Rounded to the nearest: an average with decay 0.99 stops a fifth short of a constant."""


def _stochastic(x: jax.Array, bits: Callable[[], jax.Array]) -> jax.Array:
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits() >> 16)
    rounded = jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


bfloat16_stochastic: Final = Codec(_stochastic, bfloat16.decode)
"""Rounded up or down at random, so that the mean is right."""


def _blocks(dtype: Any) -> Codec:
    least, most = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max

    def value(code: jax.Array) -> jax.Array:
        """Of a code's magnitude, in units of the block's scale."""
        return jnp.square(jnp.square(code / most))

    def encode(x: jax.Array, bits: Callable[[], jax.Array]) -> Blocks:
        pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)]
        scales = jnp.max(jnp.abs(jnp.pad(x, pad)).reshape(*x.shape[:-1], -1, BLOCK), axis=-1)
        # A block of nothing but numbers too small to be told from 0 counts as 0; NaN and infinity stay to be seen.
        share = jnp.abs(x) * _spread(jnp.where(scales < jnp.finfo(x.dtype).tiny, 0, 1 / scales), x.shape)
        low = jnp.floor(most * jnp.sqrt(jnp.sqrt(share)))
        below, above = value(low), value(low + 1)
        up = (above - below) * ((bits() >> 8).astype(jnp.float32) * 2.0**-24) < share - below
        code = jnp.minimum(low + up, most)
        if least == 0:
            code = jnp.where(share > 0, jnp.maximum(code, 1), 0)
        return Blocks(jnp.where(x < 0, -code, code).astype(dtype), scales)

    def decode(stored: Blocks) -> jax.Array:
        code = stored.codes.astype(jnp.float32)
        return jnp.sign(code) * value(code) * _spread(stored.scales, code.shape)

    return Codec(encode, decode)


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each block's scale for each of its elements."""
    blocks = jnp.broadcast_to(scales[..., None], (*scales.shape, BLOCK))
    return blocks.reshape(*scales.shape[:-1], -1)[..., : shape[-1]]


int8: Final = _blocks(jnp.int8)
r"""One byte and a share of a block's scale, rounded at random: $x = s \, (c / 127)^4$.

Codes lie close where numbers are small: relative steps are 3 % at the block's greatest, 10 % at a hundredth of it, 32 %
at a ten-thousandth. A map with even steps would lose all but the greatest.
"""
uint8: Final = _blocks(jnp.uint8)
"""As `int8` for numbers that aren't negative, with twice the codes; what isn't 0 doesn't become 0.

For a second moment: the root of a moment lost would be divided by.
"""


def random_bits(shape: tuple[int, ...], name: str, count: jax.Array) -> jax.Array:
    """Uniform bits, uint32, from a leaf's name, a count and each element's index: a hash, so the same on any mesh."""
    bits = _hash(count.astype(jnp.uint32) ^ jnp.uint32(zlib.crc32(name.encode())))
    for axis, length in enumerate(shape):
        index = jnp.arange(length, dtype=jnp.uint32)
        bits = _hash(jnp.expand_dims(bits, axis) + jnp.expand_dims(index, range(axis)))
    return bits


def _hash(x: jax.Array) -> jax.Array:
    """The 32-bit integer hash with the least bias known of its form (C. Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def lion_int8(learning_rate: Scalar, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Lion with its momentum in `int8`: 1.02 bytes of state a parameter.

    Args:
        learning_rate: a number or a schedule.
        options: those of `lion`.
    """
    return lean(lion(learning_rate, **options), {"0/mu(/.*)?": int8})


def adamw_int8(learning_rate: Scalar, **options: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW with its moments in `int8` and `uint8`: 2.03 bytes of state a parameter.

    Where gradients within a block differ a million times in size, the smallest ones' steps may be several times
    AdamW's.

    Args:
        learning_rate: a number or a schedule.
        options: those of `adamw`.
    """
    return lean(adamw(learning_rate, **options), {"0/mu(/.*)?": int8, "0/nu(/.*)?": uint8})


def adafactor_bf16(
    learning_rate: Scalar | None = None, *, momentum: Scalar = 0.9, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Adafactor with a momentum in bfloat16, rounded at random: 2 bytes of state a parameter.

    Args:
        learning_rate: a number, a schedule, or None for the relative step.
        momentum: its decay.
        options: those of `adafactor`.
    """
    return lean(adafactor(learning_rate, momentum=momentum, **options), {"0/mu(/.*)?": bfloat16_stochastic})
