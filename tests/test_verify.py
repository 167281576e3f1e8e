"""The contract holds of a small model, and each defect that is planted is caught where it is."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxlm import checkpoint, data, losses, models, optim, sharding, verify
from jaxlm.types import Aux, Batch, LossFn, Params, TrainState
from jaxlm.verify import _check, _contract, _ways

CONFIG = models.TransformerConfig(vocab=258, layers=2, width=16, heads=2, kv_heads=1)


def model(**options: Any) -> Any:
    return models.transformer(CONFIG, **options)


def loss(apply: Any, **options: Any) -> LossFn:
    return losses.next_token(apply, z_loss=1e-3, **options)


@pytest.fixture(scope="module")
def make(corpus_path: Path) -> Callable[..., verify.Contract]:
    """A contract of two steps, two batches of 8 x 64 packed tokens, of which some parts are replaced."""
    corpus = data.open_corpus(corpus_path)
    plan = data.pack(corpus.lengths, [64], 8 * 64)

    def made(**parts: Any) -> verify.Contract:
        given: dict[str, Any] = {
            "model": model,
            "loss": loss,
            "optimizer": optax.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-3)),
            "batches": data.Batches(corpus, plan, count=2),
            "key": jax.random.key(0),
            "microbatches": 2,
            "mesh": sharding.mesh(devices=jax.devices()[:4]),
        }
        return verify.Contract(**{**given, **parts})

    return made


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Leaves these of the promises."""
    every = _ways.promises
    monkeypatch.setattr(_check, "promises", lambda contract: (p for p in every(contract) if p.name in names))


def failures(contract: verify.Contract) -> dict[str, str | None]:
    """What fails, and the first leaf of each."""
    return {result.name: result.first for result in verify.check(contract) if not result.passed}


def test_the_contract_holds(make: Callable[..., verify.Contract]) -> None:
    results = list(verify.check(make()))
    assert [r.name for r in results if not r.passed] == []
    assert len(results) == 14
    assert {r.within for r in results} == {"rounding", "float16", "exact"}
    for r in results:
        assert set(r.found) == set(r.allowed) == {"loss", "gradient", "parameters"}
        assert str(r).endswith("pass")
        assert max(map(len, str(r).splitlines())) <= 120
