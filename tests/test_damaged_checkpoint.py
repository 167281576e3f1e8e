"""A checkpoint that is damaged, or comes from elsewhere, is named and nothing in it is used."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from states import ABOUT, names, same, save, state_at

from jaxlm import checkpoint, files
from jaxlm.checkpoint import _folder, _reading


def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    shutil.rmtree(tmp_path / "3" / "params")
    (tmp_path / "2" / "rest" / "_METADATA").write_text("")  # as after a power failure
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        assert same(checkpoints.restore(state_at(0)), state_at(1))
        said = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[0] for line in said[:2]] == [f"checkpoint {i} is damaged and not used" for i in (3, 2)]
        assert "params/" in said[0]
        assert "rest/_METADATA doesn't have its" in said[1]
        assert said[2:] == [f"checkpoint {i} is now {i}.damaged-1" for i in (3, 2)]
        assert names(tmp_path) == ["1", "2.damaged-1", "3.damaged-1"]
        checkpoints.save(state_at(2))
        checkpoints.save(state_at(3))
    assert names(tmp_path) == ["2", "2.damaged-1", "3", "3.damaged-1"]
    (tmp_path / "3" / _folder.MANIFEST).unlink()
    params, _ = checkpoint.load_params(tmp_path)
    assert same(params, state_at(2).params)
    assert "3" in names(tmp_path)  # who only reads renames nothing


@pytest.mark.parametrize("form", [1, 99, None, "x" * 3000])
def test_another_format_is_refused_and_not_taken_for_damage(form: Any, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "1" / _folder.MANIFEST).write_text(files.signed({"format": form}))
    message = re.escape(f"{tmp_path / '1'} is of format {form!r:.100}; this version reads 2")
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(state_at(0))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_params(tmp_path)
    assert names(tmp_path) == ["1"]


def test_where_none_is_whole_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        (tmp_path / step / "params" / "manifest.ocdbt").unlink()
    message = "has no checkpoint that is whole, but 2, 1; bring one back from a copy"
    for _ in range(2):
        with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints, pytest.raises(RuntimeError, match=message):
            checkpoints.restore(state_at(0))
    with pytest.raises(RuntimeError, match=message):
        checkpoint.load_params(tmp_path)
    for step in (1, 2):
        _folder.set_aside(tmp_path, step)
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints, pytest.raises(RuntimeError, match=r"but 1\.damaged-1"):
        checkpoints.restore(state_at(0))


@pytest.mark.parametrize("link", ["2", "2/params/_METADATA", "2/params/d"])
def test_what_is_a_symbolic_link_is_not_followed(link: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "c", 1, 2)
    path = tmp_path / "c" / link
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with checkpoint.Checkpoints(tmp_path / "c", ABOUT) as checkpoints:
        assert same(checkpoints.restore(state_at(0)), state_at(1))
    assert "link" in capsys.readouterr().err
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["params/../../w", "params//etc/w", "params/./w"])
def test_a_leaf_cannot_name_a_file_elsewhere(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    path = tmp_path / "1" / _folder.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["leaves"] = {name: ["float32", [2], "0" * 16]}
    del manifest["checksum"]
    path.write_text(files.signed(manifest))
    with pytest.raises(RuntimeError, match="no checkpoint that is whole"):
        checkpoint.load_params(tmp_path)
    assert "is no name of a leaf" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [[2**44], [2**31, 2**31, 2**31], [1000, 2**34], [2**61] * 32])
def test_parameters_that_no_machine_has_memory_for_are_refused_before_there_is_any(
    shape: list[int], tmp_path: Path
) -> None:
    save(tmp_path, 1)
    path = tmp_path / "1" / _folder.MANIFEST
    manifest = files.read_signed(path)
    name = next(name for name in manifest["leaves"] if name.startswith("params/"))
    manifest["leaves"][name][1] = shape
    path.write_text(files.signed(manifest))
    with pytest.raises(RuntimeError, match=r"its parameters have \d+ bytes, and this machine's memory has \d+"):
        checkpoint.load_params(tmp_path)


@pytest.mark.parametrize("limit", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_has_the_memory_that_it_is_given(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "checkpoints", 1)
    monkeypatch.setattr(_reading, "_CONTROL_GROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("max\n")
    checkpoint.load_params(tmp_path / "checkpoints")
    (tmp_path / limit).write_text("10\n")
    with pytest.raises(RuntimeError, match="this machine's memory has 10"):
        checkpoint.load_params(tmp_path / "checkpoints")


def test_an_error_that_is_no_damage_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)

    def full(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes")

    monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", full)
    with (
        checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints,
        pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"),
    ):
        checkpoints.restore(state_at(0))
    assert names(tmp_path) == ["1", "2"]
