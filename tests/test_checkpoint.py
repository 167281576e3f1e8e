"""What is saved comes back bit for bit; what doesn't fit is named."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from states import ABOUT, MODEL, names, same, save, state_at

from jaxlm import checkpoint, fingerprint, models, sharding
from jaxlm.checkpoint import _checkpoints, _folder, _reading
from jaxlm.types import TrainState


def test_restores_the_newest_bit_for_bit_and_keeps_as_many_as_asked(tmp_path: Path) -> None:
    with checkpoint.Checkpoints(tmp_path / "c", ABOUT, keep=2) as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.restore(state_at(0)) is None
        for step in (1, 2, 3):
            checkpoints.save(state_at(step))
        checkpoints.save(state_at(3))
        assert checkpoints.latest == 3
    assert names(tmp_path / "c") == ["2", "3"]
    with checkpoint.Checkpoints(tmp_path / "c", ABOUT) as checkpoints:
        restored = checkpoints.restore(state_at(0))
    assert restored is not None
    assert same(restored, state_at(3))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_donated_state_is_saved_as_it_was(devices: int, tmp_path: Path) -> None:
    def draw(state: TrainState) -> TrainState:
        key, _ = jax.random.split(state.opt_state)
        return TrainState(state.step + 1, jax.tree.map(lambda x: x + 1, state.params), key)

    def begin() -> TrainState:
        mesh = sharding.mesh(devices=jax.devices()[:devices])
        return jax.device_put(state_at(5)._replace(opt_state=jax.random.key(5)), sharding.replicated(mesh))

    state = begin()
    step = jax.jit(draw, donate_argnums=0).lower(state).compile()
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
        for _ in range(3):
            state = step(state)
        restored = checkpoints.restore(state)
    assert restored is not None
    assert same(restored, begin())


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    for name in ("a#b%20c", "a?b", "a|b", "a%zz", "a b"):
        save(tmp_path / name, 1)
        with checkpoint.Checkpoints(tmp_path / name, ABOUT) as checkpoints:
            assert same(checkpoints.restore(state_at(0)), state_at(1))


def test_a_state_on_the_host_or_on_several_devices_is_saved_as_it_is(tmp_path: Path) -> None:
    numbers = np.arange(3, dtype=np.int16)
    params = {"host": numbers, "first": jnp.asarray(numbers), "last": jax.device_put(numbers, jax.devices()[-1])}
    state = TrainState(jnp.ones((), jnp.int32), params, jnp.zeros(1))
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
    loaded, _ = checkpoint.load_params(tmp_path)
    for found in loaded.values():
        np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize("begun", [False, True])
def test_a_save_compiles_nothing(begun: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mesh = sharding.mesh()
    divided, whole = NamedSharding(mesh, PartitionSpec("data")), sharding.replicated(mesh)
    start = jax.jit(
        lambda: TrainState(jnp.ones((), jnp.int32), {"w": jnp.ones((8, 3))}, jnp.zeros(1)),
        out_shardings=TrainState(whole, {"w": divided}, whole),
    )
    if begun:
        with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
            checkpoints.save(start()._replace(step=jax.device_put(jnp.zeros((), jnp.int32), whole)))
    jax.clear_caches()
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        assert (checkpoints.restore(start.eval_shape()) is not None) == begun
        state = start()
        with jax.log_compiles(True):
            checkpoints.save(state)
            checkpoints.wait()
    assert not [record.message for record in caplog.records if "Compiling" in record.message]
    assert same(checkpoint.load_params(tmp_path)[0], {"w": np.ones((8, 3), np.float32)})


def test_what_has_no_sharding_is_restored_to_the_first_device(tmp_path: Path) -> None:
    state = TrainState(np.ones((), np.int32), {"w": np.arange(3, dtype=np.int16)}, jnp.zeros(1))
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
        for like in (state, jax.eval_shape(lambda: state)):
            restored = checkpoints.restore(like)
            assert restored is not None
            assert same(restored, state)
            assert restored.params["w"].devices() == {jax.devices()[0]}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1), optax.adafactor(0.1), optax.chain(optax.clip(1.0), optax.lion(0.1))]
)
def test_any_optimizer_state(optimizer: optax.GradientTransformation, tmp_path: Path) -> None:
    state = state_at(1, optimizer=optimizer)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
        assert same(checkpoints.restore(state), state)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("devices", [1, 4, 8])
def test_restores_onto_any_mesh_and_stage_of_zero(zero: int, devices: int, tmp_path: Path) -> None:
    init, _ = models.transformer(MODEL)
    optimizer, shapes = optax.adamw(1e-3), jax.eval_shape(init, jax.random.key(0))
    saved, here = (
        sharding.lay_out(shapes, sharding.mesh(devices=some), zero=stage, stacked=models.stacked).state(optimizer)
        for some, stage in ((jax.devices(), {0: 3, 1: 0, 3: 1}[zero]), (jax.devices()[:devices], zero))
    )
    state = jax.device_put(state_at(1), saved)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(jax.device_put(state, here))
    assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), restored, here))
    assert same(jax.device_get(restored), jax.device_get(state))


def test_copies_that_differ_but_for_a_moment_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reading, "copies_agree", lambda _: False)
    errs = pytest.raises(RuntimeError, match=r"a moment later did not: one errs now and then. Nothing was saved")
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints, errs:
        checkpoints.save(jax.device_put(state_at(1), sharding.replicated(sharding.mesh())))
    assert not names(tmp_path)


def other_copy(params: Any) -> Any:
    """The same parameters, but that one of eight devices has another embedding."""
    embed = params["embed"]
    arrays = [shard.data + (shard.device.id == 5) for shard in embed.addressable_shards]
    return params | {"embed": jax.make_array_from_single_device_arrays(embed.shape, embed.sharding, arrays)}


OTHER_COPY = r"(?i)step %s params/embed\[:, :\] on .*cpu.*5 of process 0 isn't what .* 7 other .* Nothing was %s"


def test_a_state_of_which_one_device_has_another_copy_is_not_saved(tmp_path: Path) -> None:
    state = jax.device_put(state_at(2), sharding.replicated(sharding.mesh()))
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(jax.device_put(state_at(1), sharding.replicated(sharding.mesh())))
        with pytest.raises(RuntimeError, match=OTHER_COPY % (2, "saved")):
            checkpoints.save(state._replace(params=other_copy(state.params)))
    assert names(tmp_path) == ["1"]


def test_a_state_of_which_one_device_gets_another_copy_is_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = jax.device_put(state_at(1), sharding.replicated(sharding.mesh()))
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        load = _checkpoints.load

        def load_wrongly(*given: Any) -> Any:
            loaded = load(*given)
            return {**loaded, "params": other_copy(loaded["params"])}

        monkeypatch.setattr(_checkpoints, "load", load_wrongly)
        with pytest.raises(RuntimeError, match=OTHER_COPY % (1, "restored")):
            checkpoints.restore(state)
    assert names(tmp_path) == ["1"]


@pytest.mark.sampled(2)
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


def test_an_unfinished_checkpoint_counts_for_nothing_and_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "7.unfinished")
    params, _ = checkpoint.load_params(tmp_path)
    assert same(params, state_at(1).params)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(state_at(7))
    assert names(tmp_path) == ["1", "7"]


@pytest.mark.usefixtures("unchecked_types")
def test_no_checkpoint_and_too_few_to_keep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.load_params(tmp_path)
    save(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of step 3"):
        checkpoint.load_params(tmp_path, 3)
    for keep in 1, 2.5, math.nan:
        with pytest.raises(ValueError, match=f"keep is {keep}; use 2 or more"):
            checkpoint.Checkpoints(tmp_path, ABOUT, keep=cast(Any, keep))
    for every in 0, 0.5, math.nan:
        with pytest.raises(ValueError, match=f"keep_every is {every}; use a whole number, 1 or more"):
            checkpoint.Checkpoints(tmp_path, ABOUT, keep_every=cast(Any, every))


def test_a_state_older_than_the_newest_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 9)
    with (
        checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints,
        pytest.raises(ValueError, match=r"the state is of step 3, and .* has a checkpoint of step 9; restore that"),
    ):
        checkpoints.save(state_at(3))
    assert names(tmp_path) == ["9"]


def test_the_best_and_every_so_many_are_kept_also_by_a_run_that_goes_on(tmp_path: Path) -> None:
    scores = {10: 3.0, 15: 1.0, 20: 2.0, 25: math.nan, 30: 1.5, 35: 1.7}
    for part in ((10, 15), (20, 25), (30, 35)):
        with checkpoint.Checkpoints(tmp_path, ABOUT, keep_every=20) as checkpoints:
            for step in part:
                checkpoints.save(state_at(step))
                checkpoints.score(step, scores[step])
    assert names(tmp_path) == ["15", "20", "30", "35", "scores.json"]
    params, _ = checkpoint.load_params(tmp_path, 15)
    assert same(params, state_at(15).params)


@pytest.mark.parametrize("content", ['{"1": 3.0', "[]", '{"1": []}'])
def test_where_scores_are_damaged_the_best_is_not_lost(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "scores.json").write_text(content)
    for step in (4, 5):
        with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
            checkpoints.save(state_at(step))
            checkpoints.score(step, float(step))
    assert names(tmp_path) == ["1", "2", "3", "4", "5", "scores.json"]
    assert capsys.readouterr().err.count("since one of [1, 2, 3] may be the best, all are kept\n") == 1
    save(tmp_path, 6, 7)
    assert names(tmp_path) == ["1", "2", "3", "4", "6", "7", "scores.json"]


def test_a_run_goes_back_and_an_earlier_step_can_be_restored(tmp_path: Path) -> None:
    like = state_at(0)
    with checkpoint.Checkpoints(tmp_path, ABOUT, keep=4) as checkpoints:
        for step in (10, 20, 30, 40):
            checkpoints.save(state_at(step))
        for until, expected in ((None, 40), (39, 30), (30, 30), (10, 10)):
            restored = checkpoints.restore(like, until=until)
            assert restored is not None
            assert same(restored, state_at(expected))
        assert checkpoints.restore(like, until=9) is None
        for step, loss in ((20, 2.0), (30, 1.0)):
            checkpoints.score(step, loss)
        (tmp_path / "40.rewound" / "rest").mkdir(parents=True)  # from when the run was killed as it removed that
        assert checkpoints.rewind(25) == checkpoints.latest == 20
        assert names(tmp_path) == ["10", "20", "30.rewound", "40.rewound", "scores.json"]
        assert checkpoints._scores == _folder.read_scores(tmp_path) == {20: 2.0}
        checkpoints.save(state_at(21))
        checkpoints.wait()
        assert names(tmp_path) == ["10", "20", "21", "scores.json"]
        assert checkpoints.rewind(5) == 10  # the oldest, rather than none
    assert names(tmp_path) == ["10", "20.rewound", "21.rewound", "scores.json"]
    shutil.rmtree(tmp_path / "10" / "params")  # as bad luck will have it
    with (
        checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints,
        pytest.raises(
            RuntimeError, match=r"no checkpoint that is whole, but 10, 20.rewound, 21.rewound; bring one back"
        ),
    ):
        checkpoints.restore(like)
    (tmp_path / "20.rewound").rename(tmp_path / "20")
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        restored = checkpoints.restore(like)
        assert restored is not None
        assert same(restored, state_at(20))
    with checkpoint.Checkpoints(tmp_path / "empty", ABOUT) as checkpoints:
        assert checkpoints.rewind(5) == 0
        checkpoints.close()  # which may be done twice


@given(st.sets(st.integers(0, 50), min_size=1), st.dictionaries(st.integers(0, 50), st.floats()), st.integers(2, 5))
def test_what_is_kept_has_the_newest_and_the_best(steps: set[int], scores: dict[int, float], keep: int) -> None:
    kept = _folder.kept(steps, scores, keep=keep, keep_every=None)
    assert set(sorted(steps)[-keep:]) <= kept <= steps
    assert len(kept) <= keep + 1
    scored = [scores[step] for step in steps if step in scores and not math.isnan(scores[step])]
    assert not scored or min(scored) in {scores.get(step) for step in kept}
    assert _folder.kept(steps, scores, keep=keep, keep_every=7) == kept | {step for step in steps if step % 7 == 0}


def test_the_manifest_has_the_fingerprint_of_each_leaf(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leaves = json.loads((tmp_path / "1" / _folder.MANIFEST).read_text())["leaves"]
    state = state_at(1)
    expected = fingerprint.fingerprints(
        {"params": state.params, "rest": {"step": state.step, "opt_state": state.opt_state}}
    )
    assert {name: leaf[2] for name, leaf in leaves.items()} == expected
