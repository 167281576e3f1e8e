"""A process that hangs, however it does, is ended in time, with a line that says where it was."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.watchdog import Watchdog, watching

SECONDS = 1.5
HANGS = {
    "in Python": ("while True: pass", "<module>"),
    "in a call that keeps Python's lock": ("ctypes.PyDLL(None).sleep(100)", "<module>"),
    "waiting for a lock": ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "<module>"),
    "in another thread's batch": ("list(watchdog.batches(forever()))", "forever"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", None),
}
SAMPLE = "in a call that keeps Python's lock", "stopped"
PROGRAM = """
import ctypes, os, signal, sys, threading, time, types
sys.modules["jaxlm"] = package = types.ModuleType("jaxlm")
package.__path__ = [sys.argv[1]]
from jaxlm.watchdog import watching
def forever():
    yield {}
    time.sleep(100)
with watching(sys.argv[2] + "/stacks.txt", seconds=float(sys.argv[3])) as watchdog:
    for i in range(5):
        time.sleep(0.3)
        watchdog(f"at {i}")
    print("here", flush=True)
    exec(sys.argv[4])
"""


@pytest.mark.parametrize("how", [how if how in SAMPLE else pytest.param(how, marks=pytest.mark.slow) for how in HANGS])
def test_a_process_that_hangs_is_ended_and_says_where_it_was(how: str, tmp_path: Path) -> None:
    code, function = HANGS[how]
    package = str(Path(__file__).parents[1] / "jaxlm")
    command = [sys.executable, "-c", PROGRAM, package, str(tmp_path), str(SECONDS), code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    begun = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - begun < SECONDS + 10
    assert process.returncode == -(signal.SIGKILL if function is None else signal.SIGABRT)
    was = "waiting for batch 1" if function == "forever" else "at 4"
    assert f"process {process.pid} made no progress for 1.5 s, since it was {was}. " in stderr
    if function is not None:
        assert f"in {function}" in (tmp_path / "stacks.txt").read_text()


def test_a_process_that_goes_on_is_left_alone_and_nothing_remains(tmp_path: Path) -> None:
    with watching(tmp_path / "stacks.txt", seconds=1) as watchdog:
        for i in range(7):
            time.sleep(0.3)
            watchdog(f"at {i}")
    assert not any(tmp_path.iterdir())
    assert faulthandler.is_enabled()  # as it was before, by pytest
    (tmp_path / "stacks.txt").write_text("of a run that was ended")
    with watching(tmp_path / "stacks.txt", seconds=1):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of a run that was ended"]
    with pytest.raises(ValueError, match="seconds is 0"), watching(tmp_path / "stacks.txt", seconds=0):
        pass


def test_nothing_remains_of_a_process_that_was_killed(tmp_path: Path) -> None:
    package, code = str(Path(__file__).parents[1] / "jaxlm"), "os.kill(os.getpid(), signal.SIGKILL)"
    command = [sys.executable, "-c", PROGRAM, package, str(tmp_path), "60", code]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_watching_process_ends_with_what_it_watches_and_may_itself_be_killed(tmp_path: Path) -> None:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    before = set(children.read_text().split())
    with watching(tmp_path / "stacks.txt", seconds=60) as watchdog:
        (watcher,) = set(children.read_text().split()) - before
        os.kill(int(watcher), signal.SIGKILL)
        for _ in range(100_000):
            watchdog("going on")
    assert watcher not in children.read_text().split()


def test_batches_pass_unchanged_and_what_is_said_names_step_shape_and_what_has_finished() -> None:
    read, write = os.pipe()

    given = [{"tokens": np.zeros((2, 3 + i), np.uint16)} for i in range(3)]
    assert list(Watchdog(write).batches(given, 7)) == given
    os.close(write)
    with os.fdopen(read) as said:
        assert said.read().splitlines() == [
            "waiting for batch 7",
            "taking step 8 on batch 7, tokens uint16[2, 3]",
            "waiting for batch 8",
            "taking step 9 on batch 8, tokens uint16[2, 4]",
            "waiting for batch 9 (step 8 has finished)",
            "taking step 10 (step 8 has finished) on batch 9, tokens uint16[2, 5]",
            "waiting for batch 10 (step 9 has finished)",
        ]
