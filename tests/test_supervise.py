"""A run is started again when that can help, and only then."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "launch" / "supervise.py"
# Ends as its arguments say, one after another; `N:saves` with a new checkpoint.
JOB = """
import os, pathlib, signal, sys, time
run, *ends = sys.argv[1:]
run = pathlib.Path(run)
starts = len(list(run.glob("start-*")))
(run / f"start-{starts}").touch()
end, _, saves = ends[min(starts, len(ends) - 1)].partition(":")
if saves:
    (run / "checkpoints" / str(100 * (starts + 1))).mkdir(parents=True)
if end == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    while True:
        time.sleep(0.01)
if end.startswith("-"):
    os.kill(os.getpid(), -int(end))
sys.exit(int(end))
"""


# What waits for seconds waits for hundredths.
IN_HASTE = """
import runpy, sys, time
time.sleep = lambda seconds, sleep=time.sleep: sleep(seconds / 100)
time.monotonic = lambda monotonic=time.monotonic: 100 * monotonic()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def supervise(run: Path, *ends: str, in_haste: bool = False, stderr: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    job = [str(run), "--", sys.executable, "-c", JOB, str(run), *ends]
    program = ["-c", IN_HASTE] if in_haste else []
    return subprocess.Popen([sys.executable, *program, str(SCRIPT), *job], stderr=stderr, text=True)


def test_a_signal_while_the_run_is_being_started_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(subprocess.Popen[bytes]):
        def __init__(self, *given: Any, **options: Any):
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*given, **options)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        code = runpy.run_path(str(SCRIPT))["supervise"](tmp_path, ["sleep", "100"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("ends", "code", "waits"),
    [
        (["0"], 0, []),
        (["1"], 1, []),
        (["75:saves", "-9:saves", "-6:saves", "137:saves", "0"], 0, [1, 1, 1, 1]),
        (["75:saves", "2"], 2, [1]),
        (["75"], 75, [10, 60]),
        (["-9:saves", "-9"], 137, [1, 10, 60]),
    ],
    ids=["done", "failed", "killed four times", "failed later", "never saves", "no longer saves"],
)
def test_a_run_is_started_again_as_long_as_it_gets_on(
    ends: list[str], code: int, waits: list[int], tmp_path: Path
) -> None:
    process = supervise(tmp_path, *ends, in_haste=True)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert [int(seconds) for seconds in re.findall(r"started again in (\d+) s", stderr)] == waits
    assert len(list(tmp_path.glob("start-*"))) == len(waits) + 1, stderr
    assert ("without a new checkpoint" in stderr) == (code in (75, 137))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_nothing_is_started_again(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and would be in the supervisor too
    process = supervise(tmp_path, "waits")
    signal.signal(number, before)
    deadline = time.monotonic() + 30
    while not (tmp_path / "start-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # for its handler
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75, stderr
    assert len(list(tmp_path.glob("start-*"))) == 1


def test_a_signal_while_it_waits_is_heard_at_once(tmp_path: Path) -> None:
    process = supervise(tmp_path, "75")
    assert process.stderr is not None
    while "started again in 10 s" not in process.stderr.readline():
        assert process.poll() is None
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - begun < 2
    assert process.returncode == 75


def test_without_a_command_it_says_how_it_is_used() -> None:
    process = subprocess.run([sys.executable, SCRIPT, "run"], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "usage: supervise.py RUN_FOLDER -- COMMAND" in process.stderr
