"""The main job as several processes: the curve of one device, also after a loss; none waits for one that disagrees."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from ports import clean_environment, free_port

from jaxlm import data

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds for a whole run
HEARTBEAT = 30  # seconds, as in pretrain.py, which keeps the default of `distributed.start`
STEPS = 20
SMALL = [
    "--layers=1",
    "--width=16",
    "--row-lengths=64",
    "--tokens-per-batch=512",
    "--microbatches=1",
    "--save-every=10",
    f"--steps={STEPS}",
]
ENVIRONMENT = clean_environment(JAXLM_CACHE=str(ROOT / ".cache"), COLUMNS="200")


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def end(self, code: int | None = 0, *, within: float = PATIENCE) -> tuple[str, str]:
        """What it has said on stdout and stderr; code None: any but 0."""
        ended = self.process.wait(within)
        assert ended == code if code is not None else ended, (ended, self.out.read_text(), self.err.read_text())
        return self.out.read_text(), self.err.read_text()


@contextmanager
def started(
    folders: Sequence[Path], text: str | Path, *options: str, devices: int, last: Sequence[str] = ()
) -> Generator[list[Running]]:
    """One run of a process in each of the folders, the last one with options of its own too."""
    where = f"127.0.0.1:{free_port()}"
    running: list[Running] = []
    try:
        for i, folder in enumerate(folders):
            own = last if i == len(folders) - 1 else ()
            join = ["--join", where, str(len(folders)), str(i)]
            script = [sys.executable, str(ROOT / "experiments" / "pretrain.py"), "--text", str(text)]
            out, err = folder / f"{i}.out", folder / f"{i}.err"
            with out.open("wb") as stdout, err.open("wb") as stderr:
                process = subprocess.Popen(
                    [*script, *SMALL, *options, *own, *join],
                    cwd=folder,
                    env=ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)},
                    stdout=stdout,
                    stderr=stderr,
                )
            running.append(Running(process, out, err))
        yield running
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()


def write_text(folder: Path, period: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(80):
        (folder / f"{i}.txt").write_text("".join(f"{i * j % period} times {j} " for j in range(i % 30 + 5)))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("pods") / "text", 17)


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of one process with one device, never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    with started([folder], text, devices=1) as (one,):
        one.end()
    return folder / "runs" / "pretrain"


def check_same_run(ours: Path, theirs: Path) -> None:
    """That a run's folder holds what the other's does, each step once."""
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert [line["step"] for line in lines(ours / name)] == list(range(1, STEPS + 1))
    # float32 gives 3e-7: what differs is the order of sums alone, over rows and over devices.
    for one, other in zip(lines(ours / "metrics.jsonl"), lines(theirs / "metrics.jsonl"), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    one, other = (json.loads((run / "results.json").read_text()) for run in (ours, theirs))
    assert one["held-out bits per byte"] == other["held-out bits per byte"]
    for folder in (".", "checkpoints"):  # stacks are of those that JAX or the watchdog has ended
        there, expected = (
            sorted(
                path.name
                for path in (run / folder).iterdir()
                if not re.fullmatch(r"stacks-\d\.txt(\.previous)?", path.name)
            )
            for run in (ours, theirs)
        )
        assert there == expected


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(out: str) -> list[str]:
    """The lines of a process but for Gloo's, which its threads tear into these pieces."""
    pieces = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+"
    return [line for line in out.splitlines() if re.sub(pieces, "", line)]


@pytest.mark.parametrize(
    "options",
    [
        "--zero 1",
        pytest.param("--zero 1 --mesh 2 -1 2", marks=pytest.mark.slow),
        pytest.param("--zero 3 --mesh 2 -1 2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_with_four_devices_each_have_the_curve_of_one_device(
    options: str, straight: Path, text: Path, tmp_path: Path
) -> None:
    with started([tmp_path] * 2, text, *options.split(), devices=4) as (first, second):
        out, _ = first.end()
        others, _ = second.end()
    assert " 8 devices" in out
    assert out.count(f"{STEPS}/{STEPS}") == out.count("Look at ") == 1
    assert not said(others)
    check_same_run(tmp_path / "runs" / "pretrain", straight)


def wait_for_step_12(run: Path, running: Sequence[Running]) -> None:
    """Until it is written, and the checkpoint of step 10 whole."""
    deadline = time.monotonic() + PATIENCE
    while not ((run / "checkpoints/10").exists() and len(lines(run / "metrics.jsonl")) > 12):
        assert all(one.process.poll() is None for one in running), [one.err.read_text() for one in running]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_the_same_step_in_all_and_none_is_lost(text: Path, tmp_path: Path) -> None:
    steps = "--steps=1000"  # of which few are taken before the signal
    run = tmp_path / "runs" / "pretrain"
    with started([tmp_path] * 2, text, steps, devices=2) as running:
        wait_for_step_12(run, running)
        running[1].process.terminate()
        said = [one.end(75)[0] for one in running]
    stopped = {re.findall(r"Stopped after step (\d+) and saved", out)[0] for out in said}
    assert len(stopped) == 1
    saved = int(stopped.pop())
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, saved + 1))
    assert (run / "checkpoints" / str(saved)).exists()
    with started([tmp_path], text, steps, devices=2) as (alone,):
        deadline = time.monotonic() + PATIENCE
        while len(lines(run / "metrics.jsonl")) < saved + 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        alone.process.terminate()
        alone.end(75)
    assert [line["step"] for line in lines(run / "metrics.jsonl")][: saved + 5] == list(range(1, saved + 6))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_when_one_of_four_is_lost_the_others_leave_and_any_number_of_devices_goes_on(
    number: signal.Signals, straight: Path, text: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    run = killed / "runs" / "pretrain"
    with started([killed] * 4, text, devices=2) as running:
        wait_for_step_12(run, running)
        running[2].process.send_signal(number)
        deadline = time.monotonic() + (HEARTBEAT + 15 if number == signal.SIGSTOP else 15)
        for one in (running[0], running[1], running[3]):
            _, err = one.end(None, within=deadline - time.monotonic())
            # 75, or JAX's SIGABRT, if its heartbeats tell first
            assert "lost process 2;" in err or "stopped sending heartbeats):\n2\n" in err, err
            assert one.process.returncode in (75, -signal.SIGABRT)
    assert 12 < len(lines(run / "metrics.jsonl")) < STEPS
    check_goes_on(killed, [(4, 0), (2, 3), (1, 2)], straight, text)


def check_goes_on(ended: Path, layouts: Sequence[tuple[int, int]], straight: Path, text: Path) -> None:
    """That a run which was ended goes on as so many processes, of eight devices in all, in a stage of ZeRO."""
    begun = lines(ended / "runs/pretrain/timing.jsonl")[:10]
    for processes, zero in layouts:
        folder = ended.with_name(str(processes))
        shutil.copytree(ended, folder)
        with started([folder] * processes, text, f"--zero={zero}", devices=8 // processes) as again:
            for one in again:
                one.end()
        assert lines(folder / "runs/pretrain/timing.jsonl")[:10] == begun  # it went on, and didn't begin anew
        check_same_run(folder / "runs" / "pretrain", straight)


@pytest.mark.slow
def test_several_processes_go_on_from_one(straight: Path, text: Path, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    shutil.copytree(straight.parents[1], ended)
    shutil.rmtree(ended / "runs/pretrain/checkpoints" / str(STEPS))
    check_goes_on(ended, [(2, 3), (4, 2)], straight, text)


@pytest.mark.slow
def test_four_processes_go_on_from_two(straight: Path, text: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    with started([killed] * 2, text, devices=4) as running:
        wait_for_step_12(killed / "runs" / "pretrain", running)
        for one in running:
            one.process.kill()
    assert 12 < len(lines(killed / "runs/pretrain/metrics.jsonl")) < STEPS
    check_goes_on(killed, [(4, 2)], straight, text)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_another_option_in_one_process_is_refused_in_all(processes: int, text: Path, tmp_path: Path) -> None:
    others = {2: "process 0 has", 4: "processes 0, 1, 2 have"}[processes]
    with started([tmp_path] * processes, text, devices=1, last=["--steps=25"]) as running:
        for one in running:
            _, err = one.end(1, within=60)
            assert f"agree: process {processes - 1} has steps=25, {others} steps=20; start all with the same" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("has", "message"),
    [
        pytest.param("another corpus", "agree: process {last} has data=", id="another corpus"),
        pytest.param("no corpus", "runs/pretrain/corpus is not a corpus", id="folder not shared"),
    ],
)
@pytest.mark.parametrize("processes", [2, 4])
def test_another_folder_in_one_process_ends_all(has: str, message: str, processes: int, tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder, period in zip(folders, (17, 13), strict=True):
        texts = data.text_files(write_text(folder / "text", period))
    if has == "another corpus":
        data.write_corpus(folders[1] / "runs" / "pretrain" / "corpus", texts, data.ByteTokenizer())
    here, there = folders
    with started([here] * (processes - 1) + [there], "text", devices=1) as running:
        for one in running:
            _, err = one.end(1, within=60)
            assert message.format(last=processes - 1) in err
            assert f"process {processes - 1}" in err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_local_launcher_runs_two_steps(processes: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [ROOT / "experiments" / "launch" / "local.sh", str(processes), "--smoke"],
        env=ENVIRONMENT | {"PYTHON": sys.executable, "JAX_NUM_CPU_DEVICES": "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert f" {processes} devices" in output
    assert output.count("2/2") == output.count("Look at ") == 1
