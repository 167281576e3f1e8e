"""Attention against its formula in float64, one query at a time: every implementation, the TPU's interpreted."""

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.models import masks
from jaxlm.models.attention import attention, blockwise, cudnn, dense, splash
from jaxlm.models.blockwise import share

attend = jax.jit(attention)
ROWS, LENGTH, HEADS, WIDTH = 2, 6, 4, 8


@pytest.fixture(params=[False, True], ids=["one document a row", "segments"])
def segments(request: pytest.FixtureRequest) -> jax.Array | None:
    return jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]]) if request.param else None


def inputs(
    key_heads: int,
    *,
    scale: float = 1.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    length: int = LENGTH,
    width: int = WIDTH,
    heads: int = HEADS,
) -> list[jax.Array]:
    rng = np.random.default_rng(key_heads)
    q, k, v = (rng.normal(size=(ROWS, length, n, width)) for n in (heads, key_heads, key_heads))
    return [jnp.asarray(x, dtype) for x in (scale * q, k, v)]


def one_query_at_a_time(
    *arrays: jax.Array,
    mask: Any = masks.causal,
    first: int = 0,
    segments: Any = None,
    softcap: float | None = None,
    dy: Any = None,
) -> Any:
    """Outputs; with their cotangent `dy`, the gradients of the three arrays."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t, n in np.ndindex(*q.shape[:3]):
        head, at = n // (q.shape[2] // k.shape[2]), first + t
        seen = [
            s
            for s in range(at + 1)
            if (segments is None or segments[b, s] == segments[b, t]) and bool(mask.allowed(at, s))
        ]
        raw = k[b, seen, head] @ q[b, t, n] / np.sqrt(q.shape[3])
        scores = raw if softcap is None else softcap * np.tanh(raw / softcap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, n] = weights @ v[b, seen, head]
        if dy is not None:
            d_scores = weights * ((v[b, seen, head] - out[b, t, n]) @ dy[b, t, n])
            if softcap is not None:
                d_scores *= 1 - np.tanh(raw / softcap) ** 2
            d_scores /= np.sqrt(q.shape[3])
            dq[b, t, n] = d_scores @ k[b, seen, head]
            dk[b, seen, head] += d_scores[:, None] * q[b, t, n]
            dv[b, seen, head] += weights[:, None] * dy[b, t, n]
    return out if dy is None else (dq, dk, dv)


LONGER = 37
DOCUMENTS = np.sort(np.random.default_rng(0).integers(1, 4, (ROWS, LONGER)), axis=1)
DOCUMENTS[1, 30:] = 0  # padding
HERE: dict[str, Callable[..., Any]] = {"dense": dense, "blockwise": functools.partial(blockwise, block=8)}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "causal": (4, {}),
    "causal, segments, soft cap": (2, {"segments": DOCUMENTS, "softcap": 0.7}),
    "window": (1, {"mask": masks.window(5)}),
    "window, segments": (2, {"mask": masks.window(5), "segments": DOCUMENTS}),
    "window, soft cap": (4, {"mask": masks.window(20), "softcap": 2}),
    "strided": (2, {"mask": masks.strided(3, 2)}),
    "fixed, segments": (1, {"mask": masks.fixed(4, 2), "segments": DOCUMENTS}),
    "bigbird": (2, {"mask": masks.bigbird(4, window=1)}),
    "bigbird, segments": (4, {"mask": masks.bigbird(8), "segments": DOCUMENTS}),
    "both, soft cap": (2, {"mask": masks.bigbird(4) & masks.window(11), "softcap": 0.7}),
    "either": (2, {"mask": masks.window(3) | masks.fixed(2, 4)}),
}
SIZES = {f"blocks of {size}": functools.partial(blockwise, block=size) for size in (5, 37, 64)}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("case", "implementation"),
    [*itertools.product(CASES, HERE.values()), *itertools.product(["window, segments"], SIZES.values())],
    ids=[*map("-".join, itertools.product(CASES, HERE)), *SIZES],
)
def test_outputs_and_gradients_are_their_formulas(case: str, implementation: Any):
    key_heads, options = CASES[case]
    q, k, v = inputs(key_heads, length=LONGER)
    dy = np.random.default_rng(9).normal(size=q.shape)
    expected = one_query_at_a_time(q, k, v, **options), *one_query_at_a_time(q, k, v, **options, dy=dy)

    traced = {name: jnp.asarray(value) if name == "segments" else value for name, value in options.items()}

    @jax.jit
    def run(*arrays: jax.Array) -> Any:
        y, pull = jax.vjp(lambda *x: attention(*x, **traced, implementation=implementation), *arrays)
        return y, *pull(jnp.asarray(dy, jnp.float32))

    for found, right in zip(run(q, k, v), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_is_its_formula(key_heads: int, segments: jax.Array | None):
    q, k, v = inputs(key_heads)
    expected = one_query_at_a_time(q, k, v, segments=segments)
    np.testing.assert_allclose(attend(q, k, v, segments=segments), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [0, 3, 5])
def test_queries_may_begin_at_a_later_position(first: int):
    q, k, v = inputs(2)
    q = q[:, : LENGTH - first]
    expected = one_query_at_a_time(q, k, v, first=first)
    np.testing.assert_allclose(attend(q, k, v, first=first), expected, rtol=1e-5, atol=1e-6)


def test_keys_and_values_that_a_query_may_not_see_change_nothing(segments: jax.Array | None):
    q, k, v = inputs(2)
    before = attend(q, k, v, segments=segments)
    for s in range(LENGTH):
        after = attend(q, k.at[:, s].set(9.0), v.at[:, s].set(-1e4), segments=segments)
        seen = np.broadcast_to(np.arange(LENGTH) >= s, (ROWS, LENGTH))
        if segments is not None:
            seen = seen & np.asarray(segments == segments[:, s : s + 1])
        np.testing.assert_array_equal(np.any(after != before, axis=(2, 3)), seen)


def test_large_scores_do_not_overflow(segments: jax.Array | None):
    q, k, v = inputs(2, scale=1e4)  # exp overflows at 89
    expected = one_query_at_a_time(q, k, v, segments=segments)
    np.testing.assert_allclose(attend(q, k, v, segments=segments), expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_one_key_returns_its_value_and_has_no_gradient():
    alone = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    q, k, v = inputs(HEADS)
    np.testing.assert_array_equal(attend(q, k, v, segments=alone), v)
    gradient = jax.grad(lambda q: jnp.sum(attend(q, k, v, segments=alone) ** 2))(q)
    # Two terms cancel: what is left is float32's rounding of one of them, which is up to 2 v . v.
    rounding = 2 * float(jnp.max(jnp.sum(v**2, axis=-1))) * np.finfo(np.float32).eps
    assert float(jnp.max(jnp.abs(gradient))) <= 2 * rounding


def test_bfloat16_rounds_weights_and_output_only():
    q, k, v = inputs(2, scale=10, dtype=jnp.bfloat16)
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    # A convex combination of values, its weights and then itself rounded by at most 2**-8 each. Were the scores (up to
    # 30 or so) rounded too, the weights would be wrong by some 10 %.
    error = np.max(np.abs(np.asarray(out, np.float64) - one_query_at_a_time(q, k, v)))
    assert error < 2 * 2**-8 * float(jnp.max(jnp.abs(v)))


@pytest.mark.sampled(7)
@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_half_precision_little_is_rounded(dtype: Any, case: str, implementation: str):
    """Weights, their gradient and what comes out, each by some 0.2 eps on the whole; scores would add more than 1."""
    key_heads, options = CASES[case]
    arrays = inputs(key_heads, dtype=dtype, length=LONGER)
    dy = np.random.default_rng(9).normal(size=arrays[0].shape).astype(dtype)
    exact = one_query_at_a_time(*arrays, **options), *one_query_at_a_time(*arrays, **options, dy=dy.astype(np.float64))
    traced = {name: jnp.asarray(value) if name == "segments" else value for name, value in options.items()}

    @jax.jit
    def run(*arrays: jax.Array) -> Any:
        y, pull = jax.vjp(lambda *x: attention(*x, **traced, implementation=HERE[implementation]), *arrays)
        return y, *pull(jnp.asarray(dy))

    for found, right in zip(run(*arrays), exact, strict=True):
        assert found.dtype == dtype
        error = np.linalg.norm(np.asarray(found, np.float64) - right) / np.linalg.norm(right)
        assert 0 < error < 0.6 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_a_packed_document_is_attended_to_as_alone_in_a_row(implementation: str):
    run = jax.jit(functools.partial(attention, mask=masks.window(6), implementation=HERE[implementation]))
    q, k, v = inputs(2, length=LONGER)
    packed = run(q, k, v, segments=jnp.asarray(DOCUMENTS))
    for row, number in ((0, 1), (0, 2), (1, 3)):
        at = DOCUMENTS[row] == number
        alone = [jnp.zeros_like(x).at[0, : at.sum()].set(x[row, at]) for x in (q, k, v)]
        np.testing.assert_allclose(packed[row, at], run(*alone)[0, : at.sum()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_padding_at_the_end_changes_nothing_before_it(implementation: str):
    run = jax.jit(
        jax.grad(lambda *x: jnp.sum(attention(*x, implementation=HERE[implementation])[:, :20] ** 2), (0, 1, 2))
    )
    arrays = inputs(2, length=LONGER)
    for one, other in zip(run(*arrays), run(*(x.at[:, 20:].set(1e3) for x in arrays)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_blocks_keep_no_scores_and_skip_what_is_masked():
    length, window = 4096, masks.window(256)
    q = jax.ShapeDtypeStruct((1, length, 1, 32), jnp.float32)

    def temporaries(implementation: Any) -> int:
        gradient = jax.grad(lambda *x: jnp.sum(attention(*x, mask=window, implementation=implementation)), (0, 1, 2))
        return jax.jit(gradient).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(dense) >= 4 * length**2
    assert temporaries(blockwise) < 4 * length**2 / 8
    assert share(window, length) == 3 * 128 / length
    assert share(masks.causal, length) == (1 + 2 + 3 + 4) / 4**2


def kernel_inputs(key_heads: int = 2, **options: Any) -> list[jax.Array]:
    return inputs(key_heads, length=256, width=64, **options)


def across_devices(implementation: Any, **options: Any) -> Any:
    """Outputs and gradients with a row on each of two devices, as a model in `grads.data_parallel` computes them."""
    mesh = jax.make_mesh((ROWS,), ("data",), devices=jax.devices()[:ROWS])
    rows = PartitionSpec("data")

    def local(*arrays: jax.Array) -> Any:
        qkv, numbers = arrays[:3], dict(zip(("segments",), arrays[3:], strict=False))
        y, pull = jax.vjp(lambda *x: attention(*x, **options, **numbers, implementation=implementation), *qkv)
        return y, pull(jnp.cos(y))

    def run(*arrays: jax.Array) -> Any:
        placed = [jax.device_put(x, NamedSharding(mesh, rows)) for x in arrays]
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows))(*placed)

    return run


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_inside_shard_map_are_those_outside(packed: bool):
    arrays = inputs(2, length=LONGER) + [jnp.asarray(DOCUMENTS)] * packed
    small = functools.partial(blockwise, block=8)
    found, expected = (across_devices(x, mask=masks.window(9))(*arrays) for x in (small, dense))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-6), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key_heads", "options"),
    [
        (1, {}),
        (4, {"mask": masks.window(100)}),
        (2, {"mask": masks.window(100), "softcap": 1.5}),
        (2, {"segments": True}),
        (1, {"mask": masks.window(40), "segments": True, "softcap": 0.7}),
    ],
    ids=str,
)
def test_the_tpu_kernel_interpreted_is_its_formula(key_heads: int, options: dict[str, Any]):
    options, arrays = dict(options), kernel_inputs(key_heads)
    numbers = [np.sort(np.random.default_rng(0).integers(1, 4, (ROWS, 256)), axis=1)] * options.pop("segments", False)
    y, gradients = across_devices(functools.partial(splash, interpret=True), **options)(
        *arrays, *map(jnp.asarray, numbers)
    )
    options |= dict(zip(("segments",), numbers, strict=False))
    np.testing.assert_allclose(y, one_query_at_a_time(*arrays, **options), rtol=1e-4, atol=3e-5)
    exact = one_query_at_a_time(*arrays, **options, dy=np.cos(np.asarray(y, np.float64)))
    for found, right in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=3e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [masks.causal, masks.window(100)])
def test_cudnn_is_its_formula(mask: Any, key_heads: int, dtype: Any):
    arrays = kernel_inputs(key_heads, dtype=dtype)
    dy = np.random.default_rng(9).normal(size=arrays[0].shape).astype(dtype)

    @jax.jit
    def run(*arrays: jax.Array) -> Any:
        y, pull = jax.vjp(lambda *x: attention(*x, mask=mask, implementation=cudnn), *arrays)
        return y, *pull(jnp.asarray(dy))

    exact = one_query_at_a_time(*arrays, mask=mask), *one_query_at_a_time(*arrays, mask=mask, dy=np.float64(dy))
    for found, right in zip(run(*arrays), exact, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - right) / np.linalg.norm(right)
        assert 0 < error < 2 * float(jnp.finfo(dtype).eps)  # some six roundings, of 0.2 eps each


@pytest.mark.parametrize(
    ("implementation", "options", "message"),
    [
        (cudnn, {"segments": jnp.ones((ROWS, 256), int)}, "cudnn: can't keep documents .* blockwise or dense"),
        (cudnn, {"mask": masks.bigbird(64)}, "cudnn: can't do Blocks.*use blockwise"),
        (cudnn, {"softcap": 3.0}, "cudnn: has no soft cap; use blockwise or dense"),
        (cudnn, {"first": jnp.zeros((), int)}, "cudnn: computes whole rows, with no cache before them; use dense"),
        (splash, {"mask": masks.window(3) & masks.fixed(2, 2)}, "splash: can't do _Both.*use blockwise"),
        (splash, {"first": 3}, "splash: computes whole rows"),
        (blockwise, {"first": jnp.zeros((), int)}, "blockwise: computes whole rows, .* use dense"),
        (functools.partial(blockwise, block=0), {}, "blockwise: block is 0; use a whole number"),
        (functools.partial(blockwise, block=1.5), {}, "blockwise: block is 1.5; use a whole number"),
        (None, {"segments": jnp.ones((1, 256), int)}, r"segment numbers \(1, 256\)"),
        (None, {"softcap": float("inf")}, "softcap is inf"),
        (None, {"softcap": 0.0}, "attention: softcap is 0.0; use a number above 0"),
        (None, {"segments": jnp.ones((ROWS, 9), int)}, r"segment numbers \(\d, 9\) for queries \(\d, 256\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_cannot_be_done_is_refused(implementation: Any, options: dict[str, Any], message: str):
    arrays = kernel_inputs(dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: attention(*x, implementation=implementation, **options), *arrays)


@pytest.mark.usefixtures("unchecked_types")
def test_shapes_and_dtypes_that_cannot_be_done_are_refused():
    def run(implementation: Any, heads: tuple[int, int], length: int, width: int, dtype: Any = jnp.bfloat16) -> None:
        shapes = (jax.ShapeDtypeStruct((1, length, n, width), dtype) for n in (*heads, heads[1]))
        jax.eval_shape(lambda *x: attention(*x, implementation=implementation), *shapes)

    q, k = (jax.ShapeDtypeStruct((2, 8, heads, 16), jnp.float32) for heads in (4, 2))
    for value in ((2, 8, 1, 16), (1, 8, 2, 16), (2, 7, 2, 16)):  # the first two would be broadcast
        with pytest.raises(ValueError, match="keys and values must be alike"):
            jax.eval_shape(attention, q, k, jax.ShapeDtypeStruct(value, jnp.float32))
    one_row = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
    with pytest.raises(ValueError, match="as many rows, and heads as wide, as queries"):
        jax.eval_shape(attention, q, one_row, one_row)
    with pytest.raises(ValueError, match="4 query heads are not divisible by 3 key heads"):
        run(None, (4, 3), 8, 8)
    with pytest.raises(ValueError, match="cudnn: computes in bfloat16 or float16, not float32"):
        run(cudnn, (4, 4), 256, 64, jnp.float32)
    for width in (12, 256):
        with pytest.raises(ValueError, match=f"cudnn: can't do a head width of {width}"):
            run(cudnn, (4, 4), 256, width)
    with pytest.raises(ValueError, match="splash: needs a multiple of 128 positions, not 100"):
        run(splash, (4, 4), 100, 128)


@pytest.mark.parametrize(
    ("backend", "length", "dtype", "options", "expected"),
    [
        ("cpu", 256, jnp.float32, {}, "dense"),
        ("cpu", 1024, jnp.float32, {}, "blockwise"),
        ("cpu", 4096, jnp.float32, {"mask": masks.window(256)}, "blockwise"),
        ("cpu", 256, jnp.float32, {"mask": masks.window(16)}, "dense"),
        ("cpu", 4096, jnp.float32, {"mask": masks.window(256), "first": 1}, "dense"),
        ("gpu", 256, jnp.bfloat16, {}, "cudnn"),
        ("gpu", 4096, jnp.bfloat16, {"mask": masks.window(256)}, "cudnn"),
        ("gpu", 4096, jnp.bfloat16, {"mask": masks.bigbird(64)}, "blockwise"),
        ("gpu", 256, jnp.float32, {}, "dense"),
        ("gpu", 2048, jnp.bfloat16, {"segments": True}, "dense"),
        ("gpu", 4096, jnp.bfloat16, {"segments": True}, "blockwise"),
        ("gpu", 256, jnp.bfloat16, {"softcap": 9.0}, "dense"),
        ("tpu", 256, jnp.bfloat16, {"softcap": 9.0}, "splash"),
        ("tpu", 200, jnp.bfloat16, {}, "dense"),
        ("tpu", 4096, jnp.bfloat16, {"mask": masks.fixed(64, 4)}, "blockwise"),
    ],
)
def test_the_fastest_that_can_do_it_is_chosen(
    backend: str, length: int, dtype: Any, options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
):
    module = sys.modules["jaxlm.models.attention"]
    chosen: list[str] = []
    for name in ("dense", "blockwise", "cudnn", "splash"):
        monkeypatch.setattr(module, name, lambda q, *_, name=name, **__: (chosen.append(name), q)[1])
    monkeypatch.setattr(module, "_has_flash_attention", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    shapes = (jax.ShapeDtypeStruct((1, length, n, 64), dtype) for n in (4, 2, 2))
    options = {name: jnp.ones((1, length), int) if name == "segments" else x for name, x in options.items()}
    jax.eval_shape(lambda *x: attention(*x, **options), *shapes)
    assert chosen == [expected]
