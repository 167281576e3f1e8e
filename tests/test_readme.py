"""The programs in README and docs run as they are printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(page: str, capsys: pytest.CaptureFixture[str], **instead: str) -> list[list[str]]:
    """What the page's first program prints, in words."""
    program = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)[0]
    assert len(program.strip().splitlines()) <= 32
    for printed, value in instead.items():
        assert printed in program
        program = program.replace(printed, value)
    exec(compile(program, page, "exec"), {})
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_first_program_runs_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    losses = [float(line[1]) for line in run("README.md", capsys, **{"count=100": "count=21"})]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 1


def test_a_chain_of_our_parts_and_optax_s_learns(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [float(line[1]) for line in run("docs/optimizers.md", capsys)]
    assert len(losses) == 95
    assert losses[-1] < 0.1 * losses[0]
