import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import hlo
from jaxlm.grads import accumulate, data_parallel
from jaxlm.losses import next_token
from jaxlm.models import TransformerConfig, transformer
from jaxlm.sharding import lay_out, mesh
from jaxlm.types import Aux, Batch, GradFn, Params

ROWS, LENGTH, VOCAB = 16, 6, 5
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
PARAMS = {
    "embed": RNG.normal(size=(VOCAB, 4)).astype(np.float32),
    "head": RNG.normal(size=(4, VOCAB)).astype(np.float32),
}
WHOLE = lay_out(PARAMS, mesh())
BATCH = {
    "tokens": RNG.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.uint16),
    # Four rows of padding, which are a microbatch for k = 4 and two devices out of eight; elsewhere 1 to 6 tokens.
    "lengths": np.array([6, 1, 2, 6, 3, 1, 1, 2, 0, 0, 0, 0, 5, 6, 1, 1], np.int32),
}


def bigrams(params: Params, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(params["embed"])[tokens] @ params["head"]


whole: GradFn = jax.value_and_grad(next_token(bigrams), has_aux=True)


def wrapped(how: str, grad_fn: GradFn, params: Params = PARAMS) -> GradFn:
    layout = lay_out(params, mesh())
    if how.startswith("accumulate "):
        return (
            accumulate(grad_fn, int(how.split()[1]))
            if how[-1].isdigit()
            else accumulate(data_parallel(grad_fn, layout), 2)
        )
    return data_parallel(
        accumulate(grad_fn, 2) if "of" in how else grad_fn, layout, microbatches=2 if "in" in how else 1
    )


WRAPPED = [
    "accumulate 1",
    "accumulate 2",
    "accumulate 4",
    "accumulate 16",
    "accumulate of data_parallel",
    "data_parallel",
    "data_parallel of accumulate",
    "data_parallel in microbatches",
]


def assert_close(found: Any, expected: Any):
    """The same numbers, added in another order: float32 rounds by 6e-8 of what the sums come to on the way."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.max(abs(b))), found, expected)


@pytest.fixture(scope="module")
def expected() -> Any:
    (loss_sum, aux), grads = jax.jit(whole)(PARAMS, BATCH, KEY)
    per_row = np.maximum(BATCH["lengths"] - 1, 0)
    assert aux.weight_sum == per_row.sum()
    assert len(set(per_row.reshape(4, -1).sum(axis=1))) == 4  # else a mean of means would be right
    return (loss_sum, aux), grads


@pytest.mark.sampled(2)
@pytest.mark.parametrize("wrap", WRAPPED)
def test_sums_are_those_of_the_whole_batch(wrap: str, expected: Any):
    found = jax.jit(wrapped(wrap, whole))(PARAMS, BATCH, KEY)
    assert_close(found, expected)


@pytest.mark.parametrize("wrap", ["accumulate 4", "accumulate 16", "data_parallel in microbatches"])
def test_auxiliary_losses_are_sums_as_the_loss_is(wrap: str):
    """Not means of microbatches' means, which would weigh them by 1/k or by how many tokens a microbatch has."""
    terms = {"z_loss": 0.5, "label_smoothing": 0.1}
    grad_fn: GradFn = jax.value_and_grad(next_token(bigrams, **terms), has_aux=True)
    expected = jax.jit(grad_fn)(PARAMS, BATCH, KEY)
    assert expected[0][1].metrics["z_loss"] > 0.1 * expected[0][0]
    assert_close(jax.jit(wrapped(wrap, grad_fn))(PARAMS, BATCH, KEY), expected)


def test_memory_is_that_of_one_microbatch_however_many_there_are():
    init, apply = transformer(TransformerConfig(vocab=64, layers=2, width=32, heads=2))
    params, grad_fn = jax.eval_shape(init, KEY), jax.value_and_grad(next_token(apply), has_aux=True)

    def temporaries(microbatches: int) -> int:
        batch = {"tokens": jax.ShapeDtypeStruct((4 * microbatches, 64), jnp.int32)}
        program = jax.jit(accumulate(grad_fn, microbatches)).lower(params, batch, KEY).compile()
        return program.memory_analysis().temp_size_in_bytes

    sizes = [temporaries(k) for k in (2, 4, 16)]
    assert max(sizes) < 1.05 * min(sizes)


def test_a_transformer_on_devices_in_microbatches_has_the_sums_of_the_whole_batch():
    config = TransformerConfig(vocab=VOCAB, layers=2, width=8, heads=2)
    init, apply = transformer(config)
    shapes = jax.eval_shape(init, KEY)
    params = jax.tree.map(lambda s: np.random.default_rng(1).normal(size=s.shape).astype(np.float32) / 2, shapes)
    ends = np.minimum(BATCH["lengths"], 3)[:, None]
    segments = np.where(np.arange(LENGTH) < ends, 1, 2) * (np.arange(LENGTH) < BATCH["lengths"][:, None])
    batch = {"tokens": BATCH["tokens"], "segments": segments}
    grad_fn: GradFn = jax.value_and_grad(next_token(apply), has_aux=True)
    found = jax.jit(data_parallel(accumulate(grad_fn, 2), lay_out(params, mesh())))(params, batch, KEY)
    assert_close(found, jax.jit(grad_fn)(params, batch, KEY))


@pytest.mark.parametrize("wrap", WRAPPED)
def test_dtypes_are_those_of_the_wrapped_function(wrap: str):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    shapes = jax.eval_shape(wrapped(wrap, whole), params, BATCH, KEY)
    assert shapes == jax.eval_shape(whole, params, BATCH, KEY)
    assert {s.dtype for s in jax.tree.leaves(shapes[1])} == {jnp.dtype(jnp.bfloat16)}


def test_accumulate_adds_bfloat16_gradients_in_float32():
    def ones(params: Params, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, Aux], Params]:
        del batch, key
        return (jnp.ones(()), Aux(jnp.ones(()), {})), jnp.ones_like(params)

    _, grads = accumulate(ones, 512)(jnp.zeros(1, jnp.bfloat16), {"tokens": np.zeros((512, 1), int)}, KEY)
    assert grads.dtype == jnp.bfloat16
    assert grads[0] == 512  # a bfloat16 sum of ones stays at 256


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [({}, 8), ({"replica": 2}, 8), ({"model": 2}, 4), ({"data": 1, "model": 8}, 1), ({"data": (2, 4)}, 8)],
)
def test_data_parallel_divides_rows_over_all_axes_but_the_model_s(sizes: dict[str, Any], devices: int):
    def rows(params: Params, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, Aux], Params]:
        del key
        return (jnp.zeros(()), Aux(jnp.zeros(()), {})), params.at[batch["tokens"].shape[0]].set(1.0)

    layout = lay_out(jnp.zeros(9), mesh(**sizes))
    _, grads = jax.jit(data_parallel(rows, layout))(jnp.zeros(9), {"tokens": np.zeros((8, 1), int)}, KEY)
    np.testing.assert_array_equal(grads, devices * np.eye(9)[8 // devices])


@pytest.mark.parametrize(
    ("wrap", "draws"),
    [
        ("accumulate 4", 4),
        ("data_parallel", 8),
        ("data_parallel of accumulate", 16),
        ("data_parallel in microbatches", 16),
        ("accumulate of data_parallel", 16),
    ],
)
def test_keys_are_distinct_and_follow_from_the_key(wrap: str, draws: int):
    def draw(params: Params, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, Aux], Params]:
        slot = batch["tokens"][0, 0] * draws // ROWS
        return (jnp.zeros(()), Aux(jnp.zeros(()), {})), params.at[slot].set(jax.random.uniform(key))

    grad_fn = jax.jit(wrapped(wrap, draw, jnp.zeros(draws)))
    batch = {"tokens": np.arange(ROWS)[:, None]}
    drawn, again, other = (np.asarray(grad_fn(jnp.zeros(draws), batch, jax.random.key(i))[1]) for i in (0, 0, 1))
    assert len(set(drawn) | set(other) | {0.0}) == 2 * draws + 1
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize(
    ("wrap", "in_loop"), [("data_parallel of accumulate", False), ("accumulate of data_parallel", True)]
)
def test_devices_add_up_after_the_last_microbatch(wrap: str, in_loop: bool):
    """The second case shows that an all-reduce in a loop would be found."""
    program = jax.jit(wrapped(wrap, whole)).lower(PARAMS, BATCH, KEY).compile().as_text()
    assert " while(" in program
    where = {c.in_loop for c in hlo.collectives(program) if c.kind == "all-reduce"}
    assert (False in where, True in where) == (not in_loop, in_loop)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("microbatches", [0, -2, 2.5, math.nan])
def test_accumulate_refuses_less_than_one_microbatch(microbatches: Any):
    with pytest.raises(ValueError, match=f"microbatches is {microbatches}; use a whole number, 1 or more"):
        accumulate(whole, microbatches)


def test_accumulate_refuses_rows_that_it_cannot_divide():
    with pytest.raises(ValueError, match="16 rows is not divisible into 3 microbatches"):
        accumulate(whole, 3)(PARAMS, BATCH, KEY)


def test_data_parallel_refuses_rows_that_it_cannot_divide():
    batch = {name: x[:12] for name, x in BATCH.items()}
    with pytest.raises(ValueError, match="12 rows is not divisible over 8 devices"):
        data_parallel(whole, WHOLE)(PARAMS, batch, KEY)
