"""No damage to a checkpoint is loaded: each is named by leaf or file, and the checkpoint before it is used."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from states import ABOUT, names, same, save, state_at

from jaxlm import checkpoint
from jaxlm.checkpoint import _folder
from jaxlm.checkpoint._folder import DamagedError

ROOT = Path(__file__).parents[2]
SEED = 0


def outcomes(*options: str) -> dict[bool, collections.Counter[str]]:
    """How often what became of damaged checkpoints, with and without checksums of their files."""
    command = [sys.executable, str(ROOT / "tests/faults/corrupting.py"), f"--seed={SEED}", *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[bool, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in map(json.loads, done.stdout.splitlines()):
        assert "wrong" not in line, f"seed {SEED}: {line}"
        found[line["checksums"]].update(
            {name: n for name, n in line.items() if isinstance(n, int) and name != "checksums"}
        )
    return found


def test_a_sample_of_damage() -> None:
    found = outcomes("--trials=20")
    assert all(counts.total() == 20 for counts in found.values())
    assert all(counts["older"] >= 10 for counts in found.values())


@pytest.mark.slow
def test_a_thousand_kinds_of_damage_and_each_kind_to_each_file() -> None:
    found = outcomes("--trials=1000", "--each")
    assert sum(counts.total() for counts in found.values()) > 2000
    assert all(counts["older"] > 800 for counts in found.values())


def test_a_key_that_is_read_as_its_bits_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Orbax does where a bit of its `array_metadatas` has flipped."""
    monkeypatch.setattr(_folder, "SMALL", -1)  # that file has no checksum
    states = [state_at(step)._replace(opt_state={"key": jax.random.key(step)}) for step in (1, 2)]
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        for state in states:
            checkpoints.save(state)
    path = tmp_path / "2" / "rest" / "array_metadatas" / "process_0"
    path.write_text(path.read_text().replace("random_key_impl", "random_kay_impl"))
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        restored = checkpoints.restore(states[1])
    assert restored is not None
    assert restored.step == 1
    assert jax.random.key_data(restored.opt_state["key"]).tolist() == [0, 1]


def test_an_error_of_reading_that_passes_is_said_and_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    read, errors = _folder.read, [DamagedError("a file can't be read: Input/output error")]

    def now_and_then(folder: Path, step: int) -> Any:
        if errors:
            raise errors.pop()
        return read(folder, step)

    monkeypatch.setattr(_folder, "read", now_and_then)
    told: list[str] = []
    with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        restored = checkpoints.restore(state_at(0), watch=told.append)
    assert restored is not None
    assert same(restored, state_at(2))
    said = "checkpoint 2 is whole at the second reading; at the first: a file can't be read: Input/output error\n"
    assert capsys.readouterr().err == said
    assert told == ["reading checkpoint 2", "reading checkpoint 2 again"]
    assert names(tmp_path) == ["1", "2"]


def test_folders_within_folders_without_end_are_damage(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    here = os.open(tmp_path / "2", os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    try:
        with checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
            restored = checkpoints.restore(state_at(0))
        assert restored is not None
        assert same(restored, state_at(1))
    finally:  # which is more than pytest can
        subprocess.run(["rm", "-rf", tmp_path], check=True)
