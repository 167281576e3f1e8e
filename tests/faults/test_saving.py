"""Killed or refused by the system at any call of a save, a run goes on bit for bit, and no checkpoint is half there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SEED = 0
pytestmark = pytest.mark.skipif(
    not shutil.which("cc") or sys.platform != "linux", reason="needs a C compiler, on Linux"
)


def run(kind: str, trials: int) -> list[dict[str, Any]]:
    """What the script has printed; 0 trials: all."""
    command = [sys.executable, str(ROOT / "tests/faults/saving.py"), kind, f"--trials={trials}", f"--seed={SEED}"]
    environment = os.environ | {"JAXLM_CACHE": str(ROOT / ".cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kind: str, trials: int) -> None:
    calls, *found = run(kind, trials)
    assert len(calls["calls"]) > 140
    assert len(found) >= (trials or 40)
    assert not [trial for trial in found if trial["wrong"]], f"seed {SEED}"
    if kind == "kill" and not trials:
        assert {trial["step"] for trial in found} == {2, 3}
        assert len(found) == len(calls["calls"])


def test_a_sample_of_kills() -> None:
    check("kill", 2)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["full", "EIO"])
def test_a_sample_of_errors(kind: str) -> None:
    check(kind, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "EIO", "full"])
def test_every_call(kind: str) -> None:
    check(kind, 0)


def test_all_is_on_the_disk_before_it_counts() -> None:
    """Each file and folder is synchronized after it was last changed, before the name that makes it count.

    So is that name, before an older checkpoint gives way.
    """
    (calls,) = run("kill", -1)
    dirty: dict[str, str] = {}
    rest = iter(calls["calls"])
    for line in rest:
        _, call, path = line.split(" ", 2)
        if call == "rename" and path.endswith("/3.unfinished"):
            break
        if call in ("open", "write", "truncate") and "/3.unfinished/" in path:
            dirty[path] = line
        if call in ("open", "mkdir", "rename", "remove") and "/3.unfinished" in path:
            dirty[str(Path(path).parent)] = line
        if call in ("remove", "fsync"):
            dirty.pop(path, None)
    else:
        pytest.fail("it never counted")
    assert not {path: line for path, line in dirty.items() if "/3.unfinished" in path}
    folder, later = str(Path(path).parent), [line.split(" ", 1)[1] for line in rest]
    assert later.index(f"fsync {folder}") < later.index(f"rename {folder}/1")
