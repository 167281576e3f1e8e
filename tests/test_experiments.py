"""Every experiment and benchmark runs, as a user would start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "--smoke" in path.read_text())


def run(script: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAXLM_CACHE": str(ROOT / ".cache"), "TMPDIR": str(folder)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("script", [*EXPERIMENTS, *BENCHMARKS], ids=lambda script: script.stem)
def test_runs_two_steps(script: Path, tmp_path: Path) -> None:
    done = run(script, "--smoke", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    found = [*tmp_path.glob("*/results.json")]
    assert len(found) == (script.stem in ("attention", "lengths", "optimizers") and script in EXPERIMENTS)
    for results in found:
        assert {"command", "sources", "data", "config", "jax"} <= json.loads(results.read_text()).keys()


def test_help_is_a_page(tmp_path: Path) -> None:
    done = run(ROOT / "experiments" / "pretrain.py", "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "Ctrl-C saves" in done.stdout
    assert len(done.stdout.splitlines()) < 70
