"""One process writes to a folder: the second is refused at once, whatever ended the first lets go of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm import files, metrics

HOLD = "import pathlib, runpy, sys, time; lock = runpy.run_path(sys.argv[1])['lock'](pathlib.Path(sys.argv[2])); "
HOLD += "print('held', flush=True); time.sleep(100)"


def holder(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, files.__file__, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_in_a_second_and_told_who_holds_it(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        begun = time.perf_counter()
        with pytest.raises(RuntimeError, match=f"in use by process {process.pid} on .*; wait until that ends"):
            files.lock(tmp_path)
        with pytest.raises(RuntimeError, match="in use by"):
            files.lock(tmp_path)
        assert time.perf_counter() - begun < 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    files.lock(tmp_path)()


def test_a_run_in_progress_loses_nothing_to_a_second_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"heads": 3}')
    (tmp_path / "corpus").mkdir()
    process = holder(tmp_path)
    try:
        with pytest.raises(RuntimeError, match="in use by"):
            metrics.open_run(tmp_path, {"heads": 2}, __file__)
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "corpus").exists()
    assert (tmp_path / "config.json").read_text() == '{"heads": 3}'


def test_the_same_process_may_hold_it_again_and_lets_go_as_often(tmp_path: Path) -> None:
    first, second = files.lock(tmp_path), files.lock(tmp_path / "." / "")
    first()
    child = subprocess.run([sys.executable, "-c", HOLD, files.__file__, str(tmp_path)], capture_output=True, text=True)
    assert f"in use by process {os.getpid()}" in child.stderr
    second()
    process = holder(tmp_path)
    process.kill()
    process.communicate()


def test_a_place_without_a_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        files.lock(tmp_path / "none")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(path, "\ud800")
    assert path.read_text() == "before"
    files.write_whole(path, "after")
    assert path.read_text() == "after"
