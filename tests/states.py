"""Small states of a training run, saved and compared."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm import checkpoint, models, train
from jaxlm.types import TrainState

MODEL = models.TransformerConfig(vocab=20, layers=2, width=8, heads=2)
ABOUT = {"model": {"width": 8}, "data": "words"}


@functools.cache
def init_of(config: models.TransformerConfig) -> Any:
    return jax.jit(models.transformer(config)[0])


def state_at(step: int, config: models.TransformerConfig = MODEL, optimizer: Any = None) -> TrainState:
    state = train.start(init_of(config)(jax.random.key(step)), optimizer or optax.adamw(1e-3))
    return state._replace(step=jnp.asarray(step, jnp.int32))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    with checkpoint.Checkpoints(folder, ABOUT, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step))


def same(a: Any, b: Any) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        x.dtype == y.dtype and bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
