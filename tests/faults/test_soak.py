"""Runs of two processes to which everything happens end as if nothing had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_filling import why_not

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_under_all_faults() -> None:
    if reason := why_not():
        pytest.skip(reason)
    command = [sys.executable, str(ROOT / "tests/faults/soak.py"), "--minutes=2", "--seed=0"]
    environment = os.environ | {"JAXLM_CACHE": str(ROOT / ".cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # it holds what is left against an undisturbed run
    *faults, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(faults) == last["faults"] > 1
    assert last["steps_kept"] > 0.8
