"""A real run that is ended at random moments, again and again, is in the end as if it had never been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEED = 0


@pytest.mark.parametrize("number", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again(number: int) -> None:
    command = [sys.executable, str(ROOT / "tests/faults/kills.py"), f"--kills={number}", f"--seed={SEED}"]
    environment = os.environ | {"JAXLM_CACHE": str(ROOT / ".cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # it holds what is left against an undisturbed run
    *kills, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kill["signal"] for kill in kills} == {"SIGKILL", "SIGTERM"}
    assert len(kills) == last["kills"] == number
    assert last["runs"] >= 1
    assert max(kill["seconds"] for kill in kills) < 10  # until all was saved and the process gone
