import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compiled import compile_for
from jaxlm.evaluate import evaluate, make_eval
from jaxlm.losses import next_token
from jaxlm.types import Aux, Batch, Params

VOCAB = 5
RNG = np.random.default_rng(0)
PARAMS = RNG.normal(size=(VOCAB, VOCAB)).astype(np.float32)
# Batches of 3 and 2 rows, with 7, 0, 1 and 8 predicted tokens.
BATCHES = [
    {"tokens": RNG.integers(0, VOCAB, (len(lengths), length)), "lengths": np.array(lengths, np.int32)}
    for length, lengths in ((6, (6, 3, 1)), (6, (0, 1, 0)), (9, (2, 1)), (9, (0, 9)))
]

eval_fn = make_eval(next_token(lambda params, tokens: params[tokens]))


def pooled() -> dict[str, float]:
    """The average over all predicted tokens, one at a time."""
    losses, correct = [], []
    for batch in BATCHES:
        for row, length in zip(batch["tokens"], batch["lengths"], strict=True):
            for t in range(length - 1):
                z = PARAMS[row[t]].astype(np.float64)
                losses.append(np.log(np.exp(z).sum()) - z[row[t + 1]])
                correct.append(np.argmax(z) == row[t + 1])
    return {"loss": np.mean(losses), "accuracy": np.mean(correct), "weight": len(losses)}


@pytest.mark.parametrize("ahead", [False, True], ids=["jitted", "compiled"])
def test_each_token_counts_the_same(ahead: bool):
    function = compile_for(eval_fn, PARAMS, [BATCHES[0], BATCHES[2]]) if ahead else jax.jit(eval_fn)
    found = evaluate(function, PARAMS, iter(BATCHES))
    assert found == pytest.approx(pooled(), rel=1e-6)
    assert {type(x) for x in found.values()} == {float}


@pytest.mark.parametrize("batches", [[], [BATCHES[1]]], ids=["no batch", "no token"])
def test_nothing_to_average_is_refused(batches: list[dict[str, np.ndarray]]):
    with pytest.raises(ValueError, match="no token to predict in any batch"):
        evaluate(jax.jit(eval_fn), PARAMS, batches)


def test_ids_that_jax_would_cut_off_are_refused():
    with pytest.raises(ValueError, match="tokens has 8589934594, of which JAX would make 2"):
        evaluate(jax.jit(eval_fn), PARAMS, [BATCHES[0], {"tokens": np.array([[1, 2**33 + 2, 3]])}])


def test_evaluation_draws_the_same_every_time():
    def noise(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        del params, batch
        return jax.random.normal(key), Aux(jnp.ones(()), {})

    assert evaluate(make_eval(noise), PARAMS, BATCHES[:1]) == evaluate(make_eval(noise), PARAMS, BATCHES[2:3])
