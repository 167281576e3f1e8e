"""What is said goes into a file on a full disk: it is lost, and nothing else, not the run, nor its exit code."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from ports import clean_environment
from processes import several
from states import ABOUT, names, state_at
from test_distributed import OPEN_MPI, launched
from test_supervise import supervise
from test_watchdog import HANGS, PROGRAM, SECONDS

from jaxlm import checkpoint, metrics

FULL = Path("/dev/full")
STOPS = """
import sys
from jaxlm import distributed
from jaxlm.output import say, warn
with distributed.leaving_together():
    say("said")
    warn("warned")
    if sys.stdout:
        print("printed")
    if sys.argv[1] == "1":
        raise ValueError("an error")
    sys.exit(int(sys.argv[1]))
"""

on_linux = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


class Disk(io.RawIOBase):
    full = True

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)


@contextlib.contextmanager
def output_on_a_full_disk() -> Generator[None]:
    disk = Disk()
    file = io.TextIOWrapper(io.BufferedWriter(disk))
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
    disk.full = False


def test_a_save_that_fails_is_no_error(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "")

    with output_on_a_full_disk(), checkpoint.Checkpoints(tmp_path, ABOUT) as checkpoints:
        checkpoints.save(state_at(1), after=fail)
        assert checkpoints.latest is None
        checkpoints.save(state_at(2))
    assert names(tmp_path) == ["2"]


def test_lines_of_metrics_are_written(tmp_path: Path) -> None:
    with output_on_a_full_disk(), metrics.Log(tmp_path, 0, steps=9) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0, "heldout": 1.0})
    assert [line["step"] for line in metrics.read_log(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@on_linux
@pytest.mark.parametrize("code", [0, 1, 75])
@pytest.mark.parametrize("where", [">/dev/full 2>&1", ">&- 2>&-"], ids=["full", "closed"])
def test_a_process_ends_with_its_exit_code(where: str, code: int) -> None:
    command = ["sh", "-c", f'exec "$@" {where}', "sh", sys.executable, "-c", STOPS, str(code)]
    assert subprocess.run(command, env=clean_environment(PYTHONUNBUFFERED=""), check=False).returncode == code


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("where", [">/dev/full 2>&1", ">&- 2>&-"], ids=["full", "closed"])
def test_an_error_in_one_process_ends_all(where: str, tmp_path: Path) -> None:
    environments = launched(OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    with several(2, "failing", tmp_path, *environments, within=["sh", "-c", f'exec "$@" {where}', "sh"]) as running:
        assert [one.end().code for one in running] == [1, 1]


def hanging(folder: Path, stderr: Any) -> int:
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1] / "jaxlm"), str(folder), str(SECONDS)]
    code, _ = HANGS["waiting for a lock"]
    ended = subprocess.run([*command, code], stdout=subprocess.DEVNULL, stderr=stderr, timeout=60, check=False)
    return ended.returncode


@on_linux
def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        assert hanging(tmp_path, full) == -signal.SIGABRT


def test_a_process_that_hangs_is_ended_though_nobody_reads_what_is_said(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writes, bytes(2**12)):
            pass
    os.set_blocking(writes, True)
    try:
        assert hanging(tmp_path, writes) == -signal.SIGABRT
    finally:
        os.close(reads)
        os.close(writes)


@on_linux
def test_a_run_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with FULL.open("w") as full:
        process = supervise(tmp_path, "75:saves", "0", in_haste=True, stderr=full)
        assert process.wait(60) == 0
    assert len(list(tmp_path.glob("start-*"))) == 2
