"""No damage to a checkpoint is loaded: each is named by leaf or file, and the checkpoint before it is used."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
