"""Whatever type numbers have, wherever they come from: they are taken as they are, or refused."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jaxtyping import Integer

from jaxlm import checkpoint, data, losses, models, sharding, train
from jaxlm.types import TrainState

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
OTHERS = ["bool", "float16", "float32", "float64", "bfloat16", "complex64", "object", "str"]
LARGEST = [5, 127, 200, 40_000, 2**31 + 5, 2**33 + 5]


def array(values: list[int], dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array(values, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@dataclasses.dataclass(frozen=True)
class Given:
    """A tokenizer whose ids are what it is told."""

    ids: Any
    vocab: int
    name: str = "given"
    end: int = 0

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
        del text
        return self.ids

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes:
        return bytes(len(ids))


@pytest.mark.parametrize("vocab", [258, 2**16, 2**20])
@pytest.mark.parametrize("dtype", INTEGERS + OTHERS)
def test_ids_of_a_tokenizer(dtype: str, vocab: int, tmp_path: Path) -> None:
    for largest in LARGEST:
        try:
            ids = array([1, largest, 3], dtype)
        except OverflowError:
            continue  # the type has no such number
        path = tmp_path / f"{largest}"
        fits = dtype in INTEGERS and largest < vocab
        try:
            data.write_corpus(path, [data.Document("one", b"text")], Given(ids, vocab), heldout=0.0)
        except (ValueError, TypeError):  # of jaxtyping's, which this suite has check what is annotated
            assert not fits
        else:
            assert fits
            assert data.open_corpus(path)[0].tolist() == [1, largest, 3]


def test_ids_of_other_types_are_refused_without_a_checker_of_types() -> None:
    for dtype in ("float32", "bool", "complex64"):
        with pytest.raises(ValueError, match=f"gave ids of {dtype} for 'one'"):
            data.ingest._checked.__wrapped__(array([1, 3], dtype), Given(None, 258), "one")


CONFIG = models.TransformerConfig(vocab=300, layers=1, width=8, heads=2)
INIT, APPLY = models.transformer(CONFIG)
OPTIMIZER, KEY = optax.sgd(0.1), jax.random.key(0)
START = jax.jit(lambda: train.start(INIT(KEY), OPTIMIZER))
STEP = train.make_step(jax.value_and_grad(losses.next_token(APPLY), has_aux=True), OPTIMIZER, jax.random.key(1))


@functools.cache
def compiled() -> Any:
    return train.compile_step(STEP, START(), [{"tokens": jax.ShapeDtypeStruct((1, 4), np.int32)}])


def losses_after(tokens: np.ndarray, how: str) -> float:
    """The loss of the second of two steps on a batch."""
    batch: Any = {"tokens": tokens}
    if how == "placed":
        batch = sharding.place(batch, sharding.by_rows(sharding.mesh(devices=jax.devices()[:1])))
    step = compiled() if how == "compiled" else STEP
    (_, _), (_, metrics) = [(s.step, m) for s, m in train.fit(step, START(), [batch, batch])]
    return float(metrics["loss"])


@pytest.mark.parametrize("name", ["tokens", "inputs"])
@pytest.mark.parametrize("dtype", ["bool", "float16", "float32", "bfloat16", "complex64"])
def test_tokens_of_other_types_are_refused_when_a_step_is_traced(dtype: str, name: str) -> None:
    shape = jax.ShapeDtypeStruct((1, 4), np.int32)
    batch = {"tokens": shape, "inputs": shape, name: jax.ShapeDtypeStruct((1, 4), jnp.dtype(dtype))}
    with pytest.raises(ValueError, match=f"next_token: {name} are of .*, and token ids of an integer type"):
        jax.eval_shape(losses.next_token(APPLY), jax.eval_shape(INIT, KEY), batch, KEY)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", ["on the host", "placed", "compiled"])
@pytest.mark.parametrize("dtype", INTEGERS + OTHERS)
def test_tokens_of_a_batch(dtype: str, how: str) -> None:
    for largest in LARGEST:
        try:
            tokens = array([[1, largest, 3, 4]], dtype)
        except OverflowError:
            continue
        if largest in (40_000, 2**31 + 5) and dtype in INTEGERS:
            continue  # exact, but beyond the vocabulary: for `Batches` to find, which knows the corpus
        fits = dtype in INTEGERS and largest < CONFIG.vocab and (how != "compiled" or dtype == "int32")
        try:
            found = losses_after(tokens, how)
        except (ValueError, TypeError):
            assert not fits, (dtype, largest)
        else:
            assert fits, (dtype, largest)
            assert found == losses_after(tokens.astype(np.int32), how)


FLOATS = ["float32", "bfloat16", "float16"]
LEAVES = [*FLOATS, "int32", "uint32", "int8", "uint16", "bool"]


@pytest.mark.parametrize("saved", LEAVES)
def test_leaves_of_a_checkpoint(saved: str, tmp_path: Path) -> None:
    def state(dtype: str) -> TrainState:
        w = jnp.array([1, 0, 3], dtype)
        return TrainState(jnp.zeros((), jnp.int32), {"w": w}, (w,))

    with checkpoint.Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(state(saved))
        for dtype in LEAVES:
            if dtype == saved:
                restored = checkpoints.restore(state(dtype))
                assert restored is not None
                assert restored.params["w"].dtype == dtype
                assert (restored.params["w"] == state(dtype).params["w"]).all()
            else:
                with pytest.raises(ValueError, match=rf"has params/w \['{saved}', \[3\]\], but this run .*'{dtype}'"):
                    checkpoints.restore(state(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters(dtype: str) -> None:
    """In float16 they are refused, whose gradients would vanish; in the others they stay what they are."""
    step = train.make_step(jax.value_and_grad(losses.next_token(APPLY), has_aux=True), OPTIMIZER, jax.random.key(1))
    params = jax.tree.map(lambda x: x.astype(dtype), INIT(jax.random.key(0)))
    batches = [{"tokens": np.ones((2, 8), np.uint16)}]
    if dtype == "float16":
        with pytest.raises(ValueError, match=r"gradients in float16, .* keep parameters in float32"):
            list(train.fit(step, train.start(params, OPTIMIZER), batches))
    else:
        ((state, _),) = train.fit(step, train.start(params, OPTIMIZER), batches)
        assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {dtype}
