from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import grads, hlo, models, sharding
from jaxlm.evaluate import make_eval
from jaxlm.losses import cross_entropy, next_token, next_tokens
from jaxlm.models import TransformerConfig, transformer
from jaxlm.types import Aux, GradFn, Params

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


def test_lengths_of_documents_that_were_cut_off_are_those_of_their_rows():
    found, expected = (next_tokens({"tokens": TOKENS, "lengths": np.array(x)})[1] for x in ([9, 6, 2, 0], [6, 6, 2, 0]))
    np.testing.assert_array_equal(found, expected)


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


WIDTH = 3
TERMS = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "both": {"z_loss": 0.1, "label_smoothing": 0.2},
}
HIDDEN = {
    "hidden": np.random.default_rng(3).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
    "matrix": np.random.default_rng(4).normal(size=(WIDTH, VOCAB)).astype(np.float32),
}


def last_layer(params: Params, tokens: jax.Array, *, head: Any = jnp.matmul, **context: jax.Array) -> Any:
    """A model that is nothing but its output matrix."""
    del tokens, context
    return head(jnp.asarray(params["hidden"]), jnp.asarray(params["matrix"]))


def by_hand(weights: Any, *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> tuple[dict[str, float], Params]:
    """The sums, and the gradients of their loss, one position after another in float64."""
    hidden, matrix = (HIDDEN[name].astype(np.float64) for name in ("hidden", "matrix"))
    sums = {"loss": 0.0, "accuracy": 0.0, "z_loss": 0.0}
    gradients = {"hidden": np.zeros_like(hidden), "matrix": np.zeros_like(matrix)}
    for b, t in zip(*np.nonzero(weights), strict=True):
        z = hidden[b, t] @ matrix
        log_z = np.log(np.sum(np.exp(z)))
        wanted = (1 - label_smoothing) * np.eye(VOCAB)[TOKENS[b, t + 1]] + label_smoothing / VOCAB
        sums["loss"] += -wanted @ (z - log_z) + z_loss * log_z**2
        sums["z_loss"] += z_loss * log_z**2
        sums["accuracy"] += np.argmax(z) == TOKENS[b, t + 1]
        dz = (1 + 2 * z_loss * log_z) * np.exp(z - log_z) - wanted
        gradients["hidden"][b, t] = matrix @ dz
        gradients["matrix"] += np.outer(hidden[b, t], dz)
    return sums, gradients


@pytest.mark.sampled(4)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("chunk", [None, 1, 5, 6, 23, 24])
def test_loss_and_gradients_in_chunks_are_their_formulas(chunk: int | None, kind: str, terms: str):
    sums, gradients = by_hand(WEIGHTS[kind], **TERMS[terms])
    loss_fn = next_token(last_layer, chunk=chunk, **TERMS[terms])

    @jax.jit
    def thrice(params: Params) -> Any:
        (loss_sum, aux), pull = jax.vjp(lambda params: loss_fn(params, BATCHES[kind], KEY), params)
        return (loss_sum, aux), pull((jnp.float32(3), jax.tree.map(jnp.zeros_like, aux)))[0]

    (loss_sum, aux), found = thrice(HIDDEN)
    alone = jax.jit(make_eval(loss_fn))(HIDDEN, BATCHES[kind])
    assert set(aux.metrics) == {"accuracy"} | ({"z_loss"} if "z_loss" in TERMS[terms] else set())
    for name, x in {"loss": loss_sum, **aux.metrics}.items():
        assert float(x) == pytest.approx(sums[name], rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone, (loss_sum, aux))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3 * b, rtol=1e-5, atol=1e-6), found, gradients)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_gradient_of_a_half_precision_matrix_adds_up_in_float32(dtype: Any):
    """Each token's share is 2**-10 of the sum: a half precision sum of them would stop early."""
    tokens = 1024
    params = {"hidden": jnp.ones((1, tokens + 1, 1), dtype), "matrix": jnp.zeros((1, 2), dtype)}
    batch = {"tokens": jnp.zeros((1, tokens + 1), jnp.int32)}
    found = jax.jit(jax.grad(lambda params: next_token(last_layer, chunk=1)(params, batch, KEY)[0]))(params)
    assert found["matrix"].dtype == dtype
    np.testing.assert_array_equal(found["matrix"].astype(jnp.float32), [[-tokens / 2, tokens / 2]])


def test_in_float16_improbable_tokens_have_gradients():
    """Of 2**-23, which is rounded to a quarter of itself there."""
    params = {"hidden": jnp.ones((1, 2, 1), jnp.float16), "matrix": jnp.array([[0.0, -16.0]], jnp.float16)}
    loss_fn = next_token(last_layer, chunk=2)
    batch = {"tokens": jnp.zeros((1, 2), jnp.int32)}
    found = jax.grad(lambda params: 2.0**20 * loss_fn(params, batch, KEY)[0])(params)["matrix"]
    expected = 2.0**20 / (1 + np.exp(16.0))
    np.testing.assert_allclose(found.astype(jnp.float32)[0, 1], expected, rtol=2**-10)


BEYOND = [np.int32(VOCAB), np.int8(-1), np.int32(-100), np.uint32(2**32 - 1)]


@pytest.mark.parametrize("beyond", BEYOND, ids=repr)
@pytest.mark.parametrize("chunk", [None, 7])
def test_of_targets_and_inputs_that_are_no_tokens_the_loss_is_undefined(chunk: int | None, beyond: Any):
    tokens = np.where(np.arange(LENGTH) == 2, beyond, TOKENS.astype(beyond.dtype))
    for batch in ({"tokens": tokens}, {"tokens": TOKENS, "inputs": tokens}):
        assert jnp.isnan(next_token(last_layer, chunk=chunk)(HIDDEN, batch, KEY)[0])
    assert np.isnan(cross_entropy(jnp.asarray(normal_logits()), jnp.asarray(np.roll(tokens, -1, axis=1)))[0, 1])


def test_in_chunks_logits_never_exist_all_at_once():
    tokens, vocab, chunk = 512, 2048, 32
    params = {"hidden": np.zeros((1, tokens, 8), np.float32), "matrix": np.zeros((8, vocab), np.float32)}
    batch = {"tokens": np.zeros((1, tokens), np.int32)}

    def temporaries(function: Any, chunk: int | None) -> int:
        program = jax.jit(function(next_token(last_layer, chunk=chunk))).lower(params, batch, KEY).compile()
        return program.memory_analysis().temp_size_in_bytes

    def gradient(loss_fn: Any) -> GradFn:
        return jax.value_and_grad(loss_fn, has_aux=True)

    assert temporaries(gradient, None) >= 4 * tokens * vocab
    assert temporaries(gradient, chunk) < 4 * (3 * chunk * vocab + 2 * 8 * vocab)
    assert temporaries(lambda loss_fn: loss_fn, chunk) < 4 * 2 * chunk * vocab


MODEL = TransformerConfig(vocab=64, layers=2, width=16, heads=2)
LONG = {
    "tokens": np.random.default_rng(5).integers(0, 64, (16, 10)).astype(np.uint16),
    "lengths": np.array([10, 1, 2, 7, 3, 1, 1, 2, 0, 0, 0, 0, 9, 10, 1, 1], np.int32),
}


def on_devices(mesh: dict[str, int], zero: int, config: TransformerConfig, params: Params) -> tuple[Any, Any]:
    """A gradient function in chunks over eight devices, and its parameters."""
    rules, mesh_ = models.tensor_parallel(config), sharding.mesh(**mesh)
    layout = sharding.lay_out(params, mesh_, zero=zero, rules=rules, stacked=models.stacked, tolerance=0.2)
    wrap_layer = grads.gather_layers(layout, "blocks") if zero == 3 else None
    _, apply = transformer(config, wrap_layer=wrap_layer)
    grad_fn = jax.value_and_grad(next_token(apply, chunk=7, z_loss=0.01), has_aux=True)
    return jax.jit(grads.data_parallel(grad_fn, layout, microbatches=2)), jax.device_put(params, layout.params)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("mesh", "zero"),
    [({}, 0), ({"replica": 2}, 1), ({}, 3), ({"data": 4, "model": 2}, 0), ({"data": 4, "model": 2}, 3)],
)
def test_in_chunks_on_devices_is_all_at_once_on_one(mesh: dict[str, int], zero: int, tied: bool):
    config = TransformerConfig(vocab=64, layers=2, width=16, heads=2, tied=tied)
    init, apply = transformer(config)
    params = init(KEY)
    expected = jax.jit(jax.value_and_grad(next_token(apply, z_loss=0.01), has_aux=True))(params, LONG, KEY)
    grad_fn, placed = on_devices(mesh, zero, config, params)
    found = grad_fn(placed, LONG, KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.max(np.abs(b))), found, expected
    )


@pytest.mark.sampled(2)
def test_a_vocabulary_divided_over_the_model_axis_stays_divided():
    config, vocab = TransformerConfig(vocab=1024, layers=1, width=16, heads=2), 1024
    grad_fn, placed = on_devices({"data": 4, "model": 2}, 0, config, transformer(config)[0](KEY))
    program = grad_fn.lower(placed, LONG, KEY).compile().as_text()
    over_model = [c for c in hlo.collectives(program) if c.devices == 2]
    assert over_model
    assert all(vocab not in c.shape and vocab // 2 not in c.shape for c in over_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk is 0; use a whole number"),
        ({"chunk": 2.5}, "chunk is 2.5"),
        ({"chunk": True}, "chunk is True"),
        ({"z_loss": -1e-4}, "z_loss is -0.0001; use 0 or more"),
        ({"z_loss": float("nan")}, "z_loss is nan"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; use 0 <= label_smoothing < 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_is_out_of_range_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        next_token(last_layer, **options)


def test_a_chunk_larger_than_the_batch_is_refused():
    with pytest.raises(ValueError, match="chunk is 25, but a device has 24 tokens at a time"):
        next_token(last_layer, chunk=25)(HIDDEN, BATCHES["neither"], KEY)
