from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import cross_entropy, next_token, next_tokens
from jaxlm.models import TransformerConfig, transformer
from jaxlm.types import Aux

ROWS, LENGTH, VOCAB = 4, 6, 5
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.uint16)
LENGTHS = np.array([6, 4, 1, 0], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32)
BATCHES = {
    "neither": {"tokens": TOKENS},
    "lengths": {"tokens": TOKENS, "lengths": LENGTHS},
    "segments": {"tokens": TOKENS, "segments": SEGMENTS},
}
WEIGHTS = {
    "neither": [[1, 1, 1, 1, 1, 0]] * 4,
    "lengths": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0] * 6, [0] * 6],
    "segments": [[1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0] * 6, [1, 1, 1, 1, 1, 0]],
}


def logits_are_params(params: jax.Array, tokens: jax.Array, **context: jax.Array) -> jax.Array:
    """A model of which the gradient is the gradient of its logits."""
    del tokens, context
    return params


sums_and_gradient = jax.jit(jax.value_and_grad(next_token(logits_are_params), has_aux=True))


def normal_logits(scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(1).normal(size=(ROWS, LENGTH, VOCAB))).astype(np.float32)


def one_position_at_a_time(logits: np.ndarray, weights: Any) -> tuple[float, float, np.ndarray]:
    """The sum of losses, the number of positions where the target is most probable, and the gradient."""
    loss, correct, gradient = 0.0, 0, np.zeros(logits.shape)
    for b, t in zip(*np.nonzero(weights), strict=True):
        z, y = logits[b, t].astype(np.float64), TOKENS[b, t + 1]
        p = np.exp(z - z.max()) / np.sum(np.exp(z - z.max()))
        loss += np.log(np.sum(np.exp(z - z.max()))) + z.max() - z[y]
        correct += int(np.argmax(z) == y)
        gradient[b, t] = p - np.eye(VOCAB)[y]
    return loss, correct, gradient


@pytest.mark.parametrize("kind", BATCHES)
def test_loss_and_gradient_are_their_formula(kind: str):
    loss, correct, gradient = one_position_at_a_time(normal_logits(), WEIGHTS[kind])
    (loss_sum, aux), grads = sums_and_gradient(normal_logits(), BATCHES[kind], KEY)
    assert float(loss_sum) == pytest.approx(loss, rel=1e-6)
    assert aux.weight_sum == np.sum(WEIGHTS[kind])
    assert aux.metrics["accuracy"] == correct
    np.testing.assert_allclose(grads, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", BATCHES)
def test_targets_are_the_next_tokens_where_weights_are_one(kind: str):
    targets, weights = next_tokens(BATCHES[kind])
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, WEIGHTS[kind])
    real = np.asarray(weights) > 0
    np.testing.assert_array_equal(np.asarray(targets)[real], np.roll(TOKENS, -1, axis=1)[real])


@pytest.mark.parametrize(
    "padding",
    [{"lengths": np.zeros(ROWS, np.int32)}, {"segments": np.zeros_like(SEGMENTS)}],
    ids=lambda p: next(iter(p)),
)
def test_padding_alone_has_no_loss_and_no_gradient(padding: dict[str, np.ndarray]):
    (loss_sum, aux), grads = sums_and_gradient(normal_logits(), {"tokens": TOKENS} | padding, KEY)
    assert (loss_sum, aux.weight_sum, aux.metrics["accuracy"]) == (0, 0, 0)
    np.testing.assert_array_equal(grads, np.zeros_like(grads))


def test_rows_of_one_token_have_no_loss():
    (loss_sum, aux), _ = sums_and_gradient(np.zeros((ROWS, 1, VOCAB), np.float32), {"tokens": TOKENS[:, :1]}, KEY)
    assert (loss_sum, aux.weight_sum) == (0, 0)


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_large_logits_do_not_overflow(scale: float):
    loss, _, gradient = one_position_at_a_time(normal_logits(scale), WEIGHTS["lengths"])
    (loss_sum, _), grads = sums_and_gradient(normal_logits(scale), BATCHES["lengths"], KEY)
    assert float(loss_sum) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(grads, gradient, atol=1e-3)  # logits of 1e3 are rounded to 1e-4


def test_bfloat16_logits_have_a_float32_loss():
    logits = normal_logits().astype(jnp.bfloat16)
    loss, _, gradient = one_position_at_a_time(logits, WEIGHTS["lengths"])
    (loss_sum, aux), grads = sums_and_gradient(logits, BATCHES["lengths"], KEY)
    assert (loss_sum.dtype, aux.weight_sum.dtype, grads.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert float(loss_sum) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(grads.astype(jnp.float32), gradient, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("kind", ["lengths", "segments"])
def test_padding_may_hold_any_number(kind: str):
    """Also what is no token, as -100, which marks padding in other libraries."""
    real = {"lengths": np.arange(LENGTH) < LENGTHS[:, None], "segments": SEGMENTS > 0}[kind]
    batch = BATCHES[kind] | {"tokens": np.where(real, TOKENS.astype(np.int32), -100)}
    loss, _, gradient = one_position_at_a_time(normal_logits(), WEIGHTS[kind])
    (loss_sum, _), grads = sums_and_gradient(normal_logits(), batch, KEY)
    assert float(loss_sum) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(grads, gradient, rtol=1e-5, atol=1e-7)
    # XLA makes a select of a product with a mask, which hides 0 * NaN.
    with jax.disable_jit():
        loss_sum, _ = next_token(logits_are_params)(jnp.asarray(normal_logits()), batch, KEY)
    assert float(loss_sum) == pytest.approx(loss, rel=1e-6)


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    init, apply = transformer(TransformerConfig(vocab=VOCAB, layers=2, width=8, heads=2))
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(init, KEY)
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) / 2).astype(np.float32), shapes), jax.jit(apply)


def test_a_token_changes_no_loss_of_another_document(model: tuple[Any, Any]):
    params, apply = model

    def losses(tokens: np.ndarray) -> np.ndarray:
        targets, weights = next_tokens({"tokens": tokens, "segments": SEGMENTS})
        return np.asarray(weights * cross_entropy(apply(params, tokens, segments=SEGMENTS), targets))

    before = losses(TOKENS)
    for t in range(LENGTH):
        changed = TOKENS.copy()
        changed[:, t] = (TOKENS[:, t] + 1) % VOCAB
        other = SEGMENTS[:, t : t + 1] != SEGMENTS
        after = losses(changed)
        np.testing.assert_array_equal(after[other], before[other])
        assert np.any(after != before)


def test_a_packed_row_has_the_loss_of_its_documents_alone(model: tuple[Any, Any]):
    loss_fn = jax.jit(next_token(model[1]))
    packed, _ = loss_fn(model[0], BATCHES["segments"], KEY)
    alone = np.zeros((5, LENGTH), np.uint16)
    lengths = np.array([3, 3, 1, 3, 6], np.int32)
    for i, (row, begin) in enumerate([(0, 0), (0, 3), (1, 0), (1, 1), (3, 0)]):
        alone[i, : lengths[i]] = TOKENS[row, begin : begin + lengths[i]]
    expected: tuple[jax.Array, Aux] = loss_fn(model[0], {"tokens": alone, "lengths": lengths}, KEY)
    assert expected[1].weight_sum == np.sum(WEIGHTS["segments"])
    assert float(packed) == pytest.approx(float(expected[0]), rel=1e-5)


def test_targets_outside_the_vocabulary_are_seen():
    """They would pass for another token's loss otherwise."""
    assert jnp.isnan(cross_entropy(jnp.zeros((1, 1, VOCAB)), jnp.array([[VOCAB]])))[0, 0]
