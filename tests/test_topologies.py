"""A run goes on with any number of devices and stage of ZeRO: the same state to the bit, and the same losses."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import checkpoint, grads, losses, models, optim, sharding, train
from jaxlm.fingerprint import fingerprints
from jaxlm.types import Batch, TrainState

MODEL = models.TransformerConfig(vocab=64, layers=2, width=16, heads=2)
BEFORE, AFTER = 10, 100
OPTIMIZER = optim.adamw(3e-3, weight_decay=0.1)


def batches(begin: int, end: int) -> list[Batch]:
    """Rows of different lengths, of words of which each says what follows."""
    found: list[Batch] = []
    for i in range(begin, end):
        rng = np.random.default_rng(i)
        tokens = (rng.integers(64, size=(16, 1)) + 5 * np.arange(24)) % 64
        found.append({"tokens": tokens.astype(np.uint16), "lengths": rng.integers(1, 25, 16).astype(np.int32)})
    return found


def run(devices: int, zero: int) -> tuple[Any, Any, Any]:
    """A new state, a step and what places batches."""
    mesh = sharding.mesh(devices=jax.devices()[:devices])
    init, apply = models.transformer(MODEL)
    layout = sharding.lay_out(jax.eval_shape(init, jax.random.key(0)), mesh, zero=zero, stacked=models.stacked)
    if zero == 3:
        _, apply = models.transformer(MODEL, wrap_layer=grads.gather_layers(layout, "blocks"))
    grad_fn = grads.data_parallel(jax.value_and_grad(losses.next_token(apply), has_aux=True), layout)
    start = jax.jit(lambda: train.start(init(jax.random.key(0)), OPTIMIZER), out_shardings=layout.state(OPTIMIZER))
    step = train.make_step(grad_fn, OPTIMIZER, jax.random.key(1))
    return start(), step, partial(sharding.place, rows=sharding.by_rows(mesh))


def go_on(state: TrainState, step: Any, place: Any, end: int) -> tuple[TrainState, list[float]]:
    taken = [(s, float(m["loss"])) for s, m in train.fit(step, state, map(place, batches(int(state.step), end)))]
    return taken[-1][0], [loss for _, loss in taken]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict[str, str]]:
    """A checkpoint of a run on one device, the losses after it, and the state's fingerprints at it."""
    folder = tmp_path_factory.mktemp("straight")
    state, step, place = run(1, 0)
    with checkpoint.Checkpoints(folder, {}) as checkpoints:
        state, _ = go_on(state, step, place, BEFORE)
        checkpoints.save(state)
        prints = fingerprints(state)
        _, after = go_on(state, step, place, BEFORE + AFTER)
    assert after[-1] < 0.6 * after[0]
    return folder, after, prints


@pytest.mark.sampled(5)
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_hundred_steps_after_a_restore_are_those_of_one_device(
    devices: int, zero: int, straight: tuple[Path, list[float], dict[str, str]], tmp_path: Path
) -> None:
    folder, after, prints = straight
    state, step, place = run(devices, zero)
    with checkpoint.Checkpoints(folder, {}) as checkpoints:
        state = checkpoints.restore(state)
    assert state is not None
    assert fingerprints(state) == prints
    state, found = go_on(state, step, place, BEFORE + AFTER)
    np.testing.assert_allclose(found, after, rtol=1e-5)
    with checkpoint.Checkpoints(tmp_path, {}) as checkpoints:  # and from there to one device
        checkpoints.save(state)
        alone = checkpoints.restore(run(1, 0)[0])
    assert alone is not None
    assert fingerprints(alone) == fingerprints(state)
