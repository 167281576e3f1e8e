import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.attention import attention

attend = jax.jit(attention)
ROWS, LENGTH, HEADS, WIDTH = 2, 6, 4, 8


@pytest.fixture(params=[False, True], ids=["one document a row", "segments"])
def segments(request: pytest.FixtureRequest) -> jax.Array | None:
    return jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]]) if request.param else None


def inputs(key_heads: int, *, scale: float = 1.0, dtype: jax.typing.DTypeLike = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(key_heads)
    q, k, v = (rng.normal(size=(ROWS, LENGTH, n, WIDTH)) for n in (HEADS, key_heads, key_heads))
    return [jnp.asarray(x, dtype) for x in (scale * q, k, v)]


def one_query_at_a_time(*arrays: jax.Array, first: int = 0, segments: jax.Array | None = None) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        seen = [s for s in range(first + t + 1) if segments is None or segments[b, s] == segments[b, t]]
        scores = k[b, seen, head] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


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
