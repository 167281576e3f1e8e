"""What is saved comes back bit for bit; what doesn't fit is refused by name; a failed save loses nothing."""

import errno
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxlm import checkpoint, models, sharding, train
from jaxlm.types import TrainState

MODEL = models.TransformerConfig(vocab=20, layers=2, width=8, heads=2)
ABOUT = {"model": {"width": 8}, "data": "words"}


def state_at(step: int, config: models.TransformerConfig = MODEL, optimizer: Any = None) -> TrainState:
    init, _ = models.transformer(config)
    state = train.start(jax.jit(init)(jax.random.key(step)), optimizer or optax.adamw(1e-3))
    return state._replace(step=jnp.asarray(step, jnp.int32))


def same(a: Any, b: Any) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        x.dtype == y.dtype and bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_restores_the_newest_bit_for_bit_and_keeps_as_many_as_asked(tmp_path: Path) -> None:
    with checkpoint.Checkpoints(tmp_path / "c", ABOUT, keep=2) as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.restore(state_at(0)) is None
        for step in (1, 2, 3):
            checkpoints.save(state_at(step))
        checkpoints.save(state_at(3))
        assert checkpoints.latest == 3
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "3"]
    with checkpoint.Checkpoints(tmp_path / "c", ABOUT) as checkpoints:
        restored = checkpoints.restore(state_at(0))
    assert restored is not None
    assert same(restored, state_at(3))


def test_a_donated_state_is_saved_as_it_was(tmp_path: Path) -> None:
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, expected = state_at(5), state_at(5)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
        for _ in range(3):
            state = step(state)
        restored = checkpoints.restore(expected)
    assert same(restored, expected)


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1), optax.adafactor(0.1), optax.chain(optax.clip(1.0), optax.lion(0.1))]
)
def test_any_optimizer_state(optimizer: optax.GradientTransformation, tmp_path: Path) -> None:
    state = state_at(1, optimizer=optimizer)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
        assert same(checkpoints.restore(state), state)


def test_restores_onto_other_devices(tmp_path: Path) -> None:
    state = state_at(1)
    everywhere = sharding.replicated(sharding.mesh())
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(jax.device_put(state, everywhere))
        assert restored is not None
        assert restored.params["embed"].sharding.is_equivalent_to(everywhere, 2)
        assert same(restored, state)


@pytest.mark.parametrize(
    ("about", "change", "message"),
    [
        (
            ABOUT,
            {"width": 16},
            r"params/blocks/attention/k/kernel \['float32', \[2, 8, 8\]\], but .* \['float32', \[2, 16, 16\]\]",
        ),
        (ABOUT, {"tied": True}, "head/kernel .* but this run has None"),
        ({"model": {"width": 16}, "data": "words"}, {}, "model/width 8, but this run has 16"),
        ({"model": {"width": 8}, "data": "numbers"}, {}, "data words, but this run has numbers"),
    ],
)
def test_another_shape_or_another_matter_is_refused_by_name(
    about: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state_at(1))
    other = models.TransformerConfig(**{"vocab": 20, "layers": 2, "width": 8, "heads": 2, **change})
    with checkpoint.Checkpoints(tmp_path, about) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(state_at(1, other))


def test_another_dtype_and_another_optimizer_are_refused(tmp_path: Path) -> None:
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state_at(1))
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state_at(1))
        with pytest.raises(ValueError, match=r"float32.*bfloat16"):
            checkpoints.restore(half)
        with pytest.raises(ValueError, match="opt_state"):
            checkpoints.restore(state_at(1, optimizer=optax.lion(0.1)))


def test_parameters_alone_by_path(tmp_path: Path) -> None:
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state_at(1))
        checkpoints.save(state_at(2))
    params, about = checkpoint.load_params(tmp_path)
    assert about == ABOUT
    assert same(params, state_at(2).params)


def test_an_unfinished_checkpoint_counts_for_nothing(tmp_path: Path) -> None:
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state_at(1))
    shutil.copytree(tmp_path / "1", tmp_path / "7")
    (tmp_path / "7" / "commit_success.txt").unlink()
    (tmp_path / "9").mkdir()
    params, _ = checkpoint.load_params(tmp_path)
    assert same(params, state_at(1).params)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        assert checkpoints.latest == 1


def test_no_checkpoint_and_none_to_keep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.load_params(tmp_path)
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.Checkpoints(tmp_path, ABOUT, keep=0)


def test_a_full_disk_is_named_and_older_checkpoints_are_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state_at(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:

            def full(*_: Any, **__: Any) -> None:
                raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

            patch.setattr(checkpoints._checkpointer, "save_checkpointables_async", full)
            with pytest.raises(OSError, match="the disk is full") as raised:
                checkpoints.save(state_at(2))
        assert raised.value.errno == errno.ENOSPC
        assert same(checkpoints.restore(state_at(0)), state_at(1))
        checkpoints.save(state_at(3))
        assert same(checkpoints.restore(state_at(0)), state_at(3))
