"""Several processes take the same checkpoint, also when only one of them sees that the newest is damaged."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import saving
from ports import clean_environment, free_port

from jaxlm import checkpoint
from jaxlm.checkpoint import _folder

ROOT = Path(__file__).parents[2]


def end_of_two(folder: Path, *what: str, **variables: str) -> tuple[list[int], list[tuple[str, str]]]:
    """The exit codes of both, and what they said on stdout and stderr."""
    environment = clean_environment(**{"JAX_NUM_CPU_DEVICES": "2"} | variables)
    where, script = f"127.0.0.1:{free_port()}", str(ROOT / "tests/faults/several.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, where, "2", str(process), str(folder), *what],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return [process.returncode for process in running], ended


def said(out: str) -> list[Any]:
    """Gloo says things too."""
    return [json.loads(line) for line in out.splitlines() if line.startswith("[") and "peer" not in line]


@pytest.mark.slow
def test_two_processes_agree_on_the_older_one(tmp_path: Path) -> None:
    codes, ended = end_of_two(tmp_path / "checkpoints", "damaged")
    assert codes == [0, 0], ended
    for out, _ in ended:
        assert said(out) == [[1, True], [".lock", "1", "2", "2.damaged-1"]]
    first, second = (err for _, err in ended)
    assert first.count("checkpoint 2 is damaged and not used") == first.count("checkpoint 2 is now 2.damaged-1") == 1
    assert "damaged" not in second


@pytest.mark.parametrize(
    ("times", "step", "left", "what"),
    [
        (1, 2, [".lock", "1", "2"], "is whole at the second reading; at the first"),
        (2, 1, [".lock", "1", "2.damaged-1"], "is damaged and not used"),
    ],
)
def test_what_one_process_reads_wrong_all_read_again_or_leave(
    times: int, step: int, left: list[str], what: str, tmp_path: Path
) -> None:
    codes, ended = end_of_two(tmp_path / "checkpoints", "misread", str(times))
    assert codes == [0, 0], ended
    assert [said(out) for out, _ in ended] == [[[step, left]]] * 2
    assert f"checkpoint 2 {what}: params/w has the fingerprint" in ended[0][1]


@pytest.mark.slow
def test_two_processes_go_on_where_there_is_no_room(tmp_path: Path) -> None:
    codes, ended = end_of_two(tmp_path / "checkpoints", "full")
    assert codes == [0, 0], ended
    for out, _ in ended:
        assert said(out) == [[".lock", "1", "3"]]
    first, second = (err for _, err in ended)
    assert first.count("checkpoint 2 was not saved: No space left on device; the older ones are intact") == 1
    assert "not saved" not in second


@pytest.mark.slow
def test_what_comes_right_after_a_save_does_not_meet_it(tmp_path: Path) -> None:
    codes, ended = end_of_two(tmp_path / "checkpoints", "often", JAX_NUM_CPU_DEVICES="1")
    assert codes == [0, 0], ended
    assert _folder.whole(tmp_path / "checkpoints") == [59, 60]


@pytest.mark.parametrize(
    ("error", "code", "why"),
    [
        (errno.ENOSPC, 75, "checkpoint 2 was not saved: No space left on device"),
        pytest.param(errno.EACCES, 1, "checkpoint 2 was not saved: Permission denied", marks=pytest.mark.slow),
    ],
    ids=["ENOSPC", "EACCES"],
)
def test_a_process_that_cannot_write_ends_the_others_which_wait_for_it(
    error: int, code: int, why: str, tmp_path: Path
) -> None:
    codes, ended = end_of_two(tmp_path / "checkpoints", "fails", str(error))
    assert codes == [code, code], ended
    first, second = (err for _, err in ended)
    assert f"process 0: process 1 failed: {why}; leaving with exit code {code}" in first
    assert f"checkpoint 2 was not saved: {os.strerror(error)}; the older ones are intact" in second
    assert "2" not in {file.name for file in (tmp_path / "checkpoints").iterdir()}


def test_a_copy_that_one_process_has_wrong_ends_both(tmp_path: Path) -> None:
    codes, ended = end_of_two(tmp_path / "checkpoints", "differs")
    assert codes == [1, 1], ended
    for _, err in ended:
        assert re.search(
            r"save: at step 1 params/w\[:, :\] on \S+ of process 1 isn't what it is on 3 other devices", err
        )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux and a C compiler")
    return str(saving.compile_shim(tmp_path_factory.mktemp("shim")))


@pytest.mark.slow
def test_an_error_in_the_background_that_would_come_again_ends_both(shim: str, tmp_path: Path) -> None:
    codes, ended = end_of_two(tmp_path / "checkpoints", "call", "1", "3", str(errno.EACCES), LD_PRELOAD=shim)
    assert codes == [1, 1], ended
    assert _folder.whole(tmp_path / "checkpoints") == [1]


@pytest.mark.slow
@pytest.mark.parametrize("error", [0, errno.EIO], ids=["SIGKILL", "EIO"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [1, 6, 11, 17, 24, 33, 42])
def test_at_whatever_call_the_system_fails_one_of_two_what_counts_is_whole(
    number: int, victim: int, error: int, shim: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    codes, ended = end_of_two(folder, "call", str(victim), str(number), str(error), LD_PRELOAD=shim)
    whole = _folder.whole(folder)
    for step in whole:
        checkpoint.load_params(folder, step)
    if codes == [0, 0]:  # trained over, or it has fewer calls
        assert whole[-1] == 3
        assert error or all(said(out)[0][1] < number for out, _ in ended[victim : victim + 1])
    else:  # SIGABRT, where JAX tells of a killed process first
        assert codes[victim] == (75 if error else -signal.SIGKILL), ended
        assert codes[1 - victim] in ((75,) if error else (75, -signal.SIGABRT)), ended
        assert whole in ([1], [1, 2])
