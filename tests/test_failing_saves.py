"""A save that fails is said and loses nothing; the third in a row ends the run; so does an error of another kind."""

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from states import ABOUT, names, same, save, state_at

from jaxlm import checkpoint, files, train
from jaxlm.checkpoint import _folder, _writing


@contextmanager
def a_full_disk(error: Exception) -> Generator[None]:
    """Lets saves fail in the background, once the arrays are written; tests/faults lets the system do it, anywhere."""

    def fail(*_: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_folder, "commit", fail)
        yield


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.EFBIG, "File too large", "some file"), errno.EFBIG, "File too large"),
        (
            ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"),
            errno.ENOSPC,
            "No space left on device",
        ),
        (ValueError("UNKNOWN: Failed to write [OS error 5: EIO Input/output error]"), errno.EIO, "Input/output error"),
    ],
    ids=["EFBIG", "ENOSPC", "EIO"],
)
def test_a_save_that_finds_no_space_is_said_and_the_next_one_succeeds(
    error: Exception, code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state_at(1))
        checkpoints.wait()
        with a_full_disk(error):
            checkpoints.save(state_at(2))
            assert checkpoints.latest == 1
            assert names(tmp_path) == ["1"]
            assert capsys.readouterr().err == f"checkpoint 2 was not saved: {text}; the older ones are intact\n"
            with pytest.raises(OSError, match="checkpoint 2 was not saved") as raised:
                checkpoints.wait()
            assert raised.value.errno == code
            assert same(checkpoints.restore(state_at(0)), state_at(1))
        checkpoints.save(state_at(3))
        assert same(checkpoints.restore(state_at(0)), state_at(3))
    assert names(tmp_path) == ["1", "3"]


def test_the_third_failure_in_a_row_is_raised_and_so_is_that_of_the_last_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with a_full_disk(OSError(errno.ENOSPC, "")):
        with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
            for step in (2, 3, 4):
                checkpoints.save(state_at(step))
            with pytest.raises(OSError, match="checkpoint 4 was not saved"):
                checkpoints.save(state_at(5))
            checkpoints._failed = None
        with (
            pytest.raises(OSError, match="checkpoint 6 was not saved"),
            checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints,
        ):
            checkpoints.save(state_at(6))
    assert names(tmp_path) == ["1"]


def test_a_checkpoint_that_counts_though_its_save_failed_is_not_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_last(path: Path, sync: Callable[[Path], None] = files.sync) -> None:
        sync(path)
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
    checkpoints.save(state_at(1))
    checkpoints.wait()
    monkeypatch.setattr(files, "sync", fail_last)
    checkpoints.save(state_at(2))
    assert checkpoints.latest == 2
    checkpoints.save(state_at(2))
    with pytest.raises(OSError, match="checkpoint 2 was not saved: Input/output error"):
        checkpoints.close()
    assert names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "float32"), (math.inf, "float32"), (math.nan, "bfloat16")])
@pytest.mark.parametrize("copied", [True, False])
def test_parameters_that_are_not_finite_are_never_saved(
    copied: bool, value: float, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not copied:  # as on accelerators and of several processes
        monkeypatch.setattr(_writing, "_host_devices", lambda _: set[Any]())
    params = {"b": jnp.ones((3, 5), dtype).at[2, 4].set(value), "c": jnp.ones(3, bool)}
    good, bad = (train.start({**params, "b": b}, optax.sgd(0.1)) for b in (jnp.ones((3, 5), dtype), params["b"]))
    checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
    checkpoints.save(good)
    checkpoints.save(bad._replace(step=jnp.asarray(1)))
    with pytest.raises(FloatingPointError, match=r"1 of the parameters aren't finite, b first"):
        checkpoints.save(bad._replace(step=jnp.asarray(2)))
    checkpoints.close()
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        assert same(checkpoints.restore(good), good)
    assert names(tmp_path) == ["0"]


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec()])
def test_nor_are_those_of_which_one_device_of_several_has_such_a_part(spec: PartitionSpec, tmp_path: Path) -> None:
    mesh = jax.make_mesh((4,), ("data",))
    for value in (math.nan, -math.nan, math.inf):
        w = jax.device_put(jnp.ones(8).at[5].set(value), NamedSharding(mesh, spec))
        checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
        checkpoints.save(train.start({"w": w}, optax.sgd(0.1)))
        with pytest.raises(FloatingPointError, match="w first"):
            checkpoints.close()
    assert names(tmp_path) == ["0.unfinished"]


def test_a_run_goes_back_from_parameters_that_are_not_finite(tmp_path: Path) -> None:
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        for step, value in ((3, 1.0), (6, math.nan)):
            state = train.start({"w": jnp.full(2, value)}, optax.sgd(0.1))
            checkpoints.save(state._replace(step=jnp.asarray(step)))
        assert checkpoints.rewind(5) == 3


def test_a_leaf_without_elements_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    state = train.start({"a": jnp.ones(1), "b": jnp.zeros((2, 0))}, optax.sgd(0.1))
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        for call in (checkpoints.restore, checkpoints.save):
            with pytest.raises(ValueError, match="params/b has no elements"):
                call(state)


def test_an_error_in_the_run_is_not_hidden_by_one_of_the_last_save(tmp_path: Path) -> None:
    def run() -> None:
        with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
            checkpoints.save(state_at(1))
            raise ZeroDivisionError

    with a_full_disk(OSError(errno.ENOSPC, "")), pytest.raises(ZeroDivisionError):
        run()
    save(tmp_path, 2)


@pytest.mark.parametrize("error", [KeyError("a mistake"), TimeoutError("a mistake")])
def test_an_error_of_another_kind_is_raised_at_the_next_call(error: Exception, tmp_path: Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
    with a_full_disk(error):
        checkpoints.save(state_at(1))
        with pytest.raises(type(error), match="a mistake"):
            checkpoints.wait()
    checkpoints.save(state_at(2))
    checkpoints.close()
    assert names(tmp_path)[-1] == "2"


@pytest.mark.parametrize("copied", [True, False])
def test_an_error_of_another_kind_before_arrays_are_written_is_raised_too(
    copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not copied:  # as on accelerators and of several processes
        monkeypatch.setattr(_writing, "_host_devices", lambda _: set[Any]())

    def save(checkpoints: checkpoint.Checkpoints, step: int) -> None:
        checkpoints.save(state_at(step))
        if copied:  # else it has waited for Orbax to begin
            checkpoints.wait()

    def fail(*_: Any) -> None:
        raise KeyError("a mistake")

    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(_writing.ocp, "Context", fail)
            with pytest.raises(KeyError, match="a mistake"):
                save(checkpoints, 1)
        assert "checkpoint 1 was not saved: KeyError('a mistake'); the older ones are intact" in capsys.readouterr().err
        save(checkpoints, 2)
        assert checkpoints.latest == 2


def test_what_the_system_does_not_list_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    save(tmp_path, 1)
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(PermissionError):
        checkpoint.Checkpoints(tmp_path, ABOUT)
    with pytest.raises(PermissionError):
        checkpoint.load_params(tmp_path)


def test_what_cannot_be_removed_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def remove(folder: Path, step: int, remove: Callable[[Path, int], None] = _folder.remove) -> None:
        (busy if step == 1 else remove)(folder, step)

    monkeypatch.setattr(_folder, "remove", remove)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(state_at(step))
        checkpoints.wait()
        monkeypatch.setattr(_folder, "sweep", busy)
        checkpoints.save(state_at(5))
    assert names(tmp_path) == ["1", "3", "4", "5"]
    said = capsys.readouterr().err
    assert "checkpoint 1 could not be removed: [Errno 16] Device or resource busy" in said
    assert said.endswith("not all removed: [Errno 16] Device or resource busy\n")


def test_nothing_counts_whose_files_were_not_all_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last look at its folders, of which files are to be on the disk, fails."""

    def walk(_: Path, onerror: Callable[[OSError], None] | None = None, **__: Any) -> list[Any]:
        if onerror:
            onerror(OSError(errno.EIO, os.strerror(errno.EIO)))
        return []

    monkeypatch.setattr(os, "walk", walk)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state_at(1))
        assert checkpoints.latest is None
        checkpoints._failed = None


def test_a_save_that_the_end_of_the_program_cuts_off_is_said(tmp_path: Path) -> None:
    program = f"""
import jax.numpy as jnp
from jaxlm import checkpoint
from jaxlm.types import TrainState
state = TrainState(jnp.ones((), jnp.int32), {{"w": jnp.ones(3)}}, (jnp.zeros(3),))
checkpoint.Checkpoints({str(tmp_path)!r}, {{}}).save(state)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (tmp_path / "1").exists() or "checkpoint 1 was not saved: " in ended.stderr
