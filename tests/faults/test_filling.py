"""A real disk of a few MB that is full for a while: training goes on, older checkpoints are whole, nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filling import UNSHARE

ROOT = Path(__file__).parents[2]


def why_not() -> str | None:
    """Why no disk can be mounted here."""
    if sys.platform != "linux":
        return "needs namespaces of Linux"
    try:
        command = [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return f"can't mount a disk: {done.stderr.strip()}" if done.returncode else None


@pytest.mark.parametrize("trials", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_a_while_changes_nothing(trials: int) -> None:
    if reason := why_not():
        pytest.skip(reason)
    command = [sys.executable, str(ROOT / "tests/faults/filling.py"), f"--trials={trials}"]
    environment = os.environ | {"JAXLM_CACHE": str(ROOT / ".cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == trials
    assert all(trial["failed"] and trial["same"] and not trial["left"] for trial in found), found
