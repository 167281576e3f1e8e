"""Documents packed into rows give the loss and the gradient that each gives alone."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import data, losses, models

CONFIG = models.TransformerConfig(vocab=258, layers=2, width=32, heads=4, kv_heads=2, qk_norm=True)


def sums(batches: data.Batches) -> tuple[Any, Any]:
    """Loss, weight and gradient, added up over batches."""
    init, apply = models.transformer(CONFIG)
    grad_fn = jax.jit(jax.value_and_grad(losses.next_token(apply), has_aux=True))
    params = init(jax.random.key(0))
    found = [grad_fn(params, batch, jax.random.key(0)) for batch in batches]
    ((loss, aux), grads) = jax.tree.map(lambda *xs: np.sum([np.asarray(x, np.float64) for x in xs], axis=0), *found)
    return (loss, aux), grads


@pytest.mark.parametrize("row_lengths", [[32, 128], pytest.param([256], marks=pytest.mark.slow)])
def test_packed_rows_are_one_document_a_row(corpus_path: Path, row_lengths: list[int]) -> None:
    corpus = data.open_corpus(corpus_path)
    alone = data.Batches(corpus, data.pad(corpus.lengths, row_lengths[-1], 2048, passes=1))
    packed = data.Batches(corpus, data.pack(corpus.lengths, row_lengths, 512, passes=1))
    assert max(int(batch["segments"].max()) for batch in packed) > 2
    (sums_alone, grads_alone), (sums_packed, grads_packed) = sums(alone), sums(packed)
    assert sums_packed[1].weight_sum == sums_alone[1].weight_sum
    np.testing.assert_allclose(sums_packed[0], sums_alone[0], rtol=1e-6)

    def close(one: Any, other: Any) -> None:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())

    jax.tree.map(close, grads_packed, grads_alone)


def test_concatenated_rows_are_not() -> None:
    init, apply = models.transformer(CONFIG)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 258, (1, 16)))
    params = init(jax.random.key(0))
    whole, apart = (apply(params, tokens, segments=s) for s in (jnp.ones((1, 16), int), jnp.arange(16)[None] // 8 + 1))
    assert jnp.abs(whole - apart)[:, 8:].max() > 0.01
    np.testing.assert_allclose(whole[:, :8], apart[:, :8], rtol=1e-5, atol=1e-6)
