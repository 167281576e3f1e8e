"""Several real processes on this machine: they agree, and none waits for one that is lost."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest
from ports import LAUNCHERS, free_port
from processes import HANGING, HANGS, fail, several

from jaxlm import distributed

LEAVING = 10  # seconds from the end of a process to that of the others; 0.2 where two cores do nothing else
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,192.0.2.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


# A command in a machine of another name, which leads nowhere.
NOWHERE = ["unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]


def test_processes_join_and_agree_and_the_first_goes_first(tmp_path: Path) -> None:
    can = sys.platform == "linux" and subprocess.run([*NOWHERE, "true"], capture_output=True).returncode == 0
    with several(2, "agreeing", tmp_path, within=NOWHERE if can else ()) as running:
        ended = [one.end() for one in running]
    for i, one in enumerate(ended):
        assert one.code == 75, one
        assert f"devices 4 first {i == 0}\n" in one.stdout
        assert "sum 6.0\n" in one.stdout
        assert "\nmade by 0\n" in one.stdout
        differ = [line for line in one.stdout.splitlines() if line.startswith("agree: ")]
        assert 'process 1 has data="1 of many ' in differ[0]
        assert 'process 0 has data="0 of many ' in differ[0]
        assert differ[0].endswith("; start all with the same command and data")
        assert len(differ[0]) < 300
        assert differ[1].startswith("agree: process 1 has no lr, process 0 has lr=0.1; ")
        if sys.platform == "linux":
            assert re.search(r"listens on \['(\w*0100007F(', ')?)+'\]", one.stdout)  # 127.0.0.1
    assert "OSError: [Errno 28] the disk is full" in ended[0].stderr
    assert "OSError: [Errno 28] process 0 failed: OSError: [Errno 28] the disk is full" in ended[1].stderr


def test_slurm_is_found_and_the_job_ends(tmp_path: Path) -> None:
    with several(2, "found", tmp_path, *launched(SLURM, "SLURM_PROCID", "SLURM_LOCALID")) as running:
        ended = [one.end() for one in running]
    for i, one in enumerate(ended):
        assert one.code == 0, one
        assert f"process {i} of 2: 6.0" in one.stdout


def test_open_mpi_is_found_and_an_error_in_one_ends_all_also_those_inside_a_collective(tmp_path: Path) -> None:
    environments = launched(OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    with several(2, "failing", tmp_path, *environments) as running:
        first, second = (one.end() for one in running)
    assert (first.code, second.code) == (1, 1), (first, second)
    assert "Traceback" in first.stderr
    assert "process 1: process 0 failed: ValueError: it is wrong; leaving with exit code 1" in second.stderr


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("how", "said"), [("disk", r"OSError: \[Errno 28\] the disk is full"), ("interrupt", "KeyboardInterrupt: ")]
)
def test_what_may_go_well_the_next_time_is_started_again(how: str, said: str, tmp_path: Path) -> None:
    environments = launched(SLURM, "SLURM_PROCID", "SLURM_LOCALID")
    with several(2, "failing", tmp_path, *environments, also={"HOW": how}) as running:
        first, second = (one.end() for one in running)
    assert (first.code, second.code) == (75, 75), (first, second)
    assert re.search(f"process 1: process 0 failed: {said}; leaving with exit code 75", second.stderr)


def launched(launcher: dict[str, str], *numbers: str) -> list[dict[str, str]]:
    """What a launcher tells two processes, on a port of this machine alone."""
    port = str(free_port())
    local = {"JAX_COORDINATOR_PORT": port, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    return [launcher | local | dict.fromkeys(numbers, str(i)) for i in range(2)]


@pytest.mark.parametrize(("count", "victim"), [(4, 2), (2, 0)], ids=["one of four", "the first"])
def test_when_a_process_is_killed_the_others_leave_and_name_it(count: int, victim: int, tmp_path: Path) -> None:
    with several(count, "endless", tmp_path) as running:
        for one in running:
            one.wait_for("a step")
        running[victim].process.kill()
        since = time.monotonic()
        others = [one.end() for one in running if one is not running[victim]]
        assert time.monotonic() - since < LEAVING
    for one in others:
        # JAX ends a process by SIGABRT when its heartbeats or the coordinator's connection tell it first.
        if one.code == 75:
            assert f"lost process {victim}" in one.stderr
        else:
            assert one.code == -6, one
            assert ("leader task" if victim == 0 else f"stopped sending heartbeats):\n{victim}\n") in one.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(4, 2), (2, 0)], ids=["one of four", "the first"])
def test_when_a_process_is_stopped_the_others_leave_in_time_and_name_it(
    count: int, victim: int, tmp_path: Path
) -> None:
    with several(count, "endless", tmp_path) as running:
        for one in running:
            one.wait_for("a step")
        running[victim].process.send_signal(signal.SIGSTOP)
        since = time.monotonic()
        others = [one.end() for one in running if one is not running[victim]]
        # It is after 10 s of silence that JAX ends them; a heartbeat may have been sent just before, and to start and
        # end four processes takes two cores a while.
        assert time.monotonic() - since < 10 + 10
        running[victim].process.send_signal(signal.SIGCONT)  # as when a machine wakes up
        assert running[victim].end().code in (75, -6)
    for one in others:
        assert one.code == -6, one
        if victim == 0:
            assert "process 1: process 0 has not answered for 5 s: is it stopped?" in one.stderr
        else:
            assert f"stopped sending heartbeats):\n{victim}\n" in one.stderr


@pytest.mark.parametrize("how", [pytest.param(how, marks=() if "lock" in how else pytest.mark.slow) for how in HANGS])
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_a_process_hangs_all_are_gone_in_time_and_it_is_known_where(how: str, victim: int, tmp_path: Path) -> None:
    with several(2, "hanging", tmp_path, also={"HANG": f"{victim} {how}"}) as running:
        running[victim].wait_for("hangs")
        since = time.monotonic()
        ended = [one.end() for one in running]
        assert time.monotonic() - since < HANGING + LEAVING
    one, other = ended[victim], ended[1 - victim]
    assert one.code in ((-6, -9) if how == "SIGSTOP" else (-6,)), one
    assert other.code in (-6, 75), other
    was = "waiting for batch 5" if how == "a batch" else "taking step 6 .*on batch 5"
    assert re.search(rf"process \d+ made no progress for {HANGING} s, since it was {was}", one.stderr), one
    if how != "SIGSTOP":
        stacks = (tmp_path / f"stacks-{victim}.txt").read_text()
        assert {"a batch": "in wait_for_nobody", "sleep": "in <lambda>", "Python's lock": "in <lambda>"}[how] in stacks


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What JAX was asked to join, in an environment without launchers."""
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    calls: list[dict[str, Any]] = []

    def initialize(*arguments: object, **options: object) -> None:
        calls.append({"arguments": arguments, **options})

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "let_collectives_listen_on", lambda address, _: calls.append({"gloo": address}))
    return calls


KUBERNETES = {"KUBERNETES_SERVICE_HOST": "192.0.2.1"}
TPU = {"TPU_ML_PLATFORM": "JAX"}


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        (SLURM, True),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NUM_TASKS"}, True),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # salloc's shell, in a job of two tasks
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, False),
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, False),  # sbatch's script, without srun
        (OPEN_MPI, True),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, False),
        (KUBERNETES, False),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "0"}, True),
        (TPU, True),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, False),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
)
def test_jax_is_asked_to_find_the_others_only_where_a_launcher_started_some(
    environment: dict[str, str], joins: bool, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.start(heartbeat_seconds=7)
    assert [call["arguments"] for call in started] == [()] * joins
    assert all(call["heartbeat_timeout_seconds"] == 7 for call in started)


def test_an_open_mpi_that_jax_does_not_know_is_refused(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give join"):
        distributed.start()
    assert not started


@pytest.mark.parametrize(
    ("coordinator", "bind"), [("127.0.0.1:1234", "127.0.0.1:1234"), ("localhost:1234", "localhost:1234"), ("a:1", None)]
)
def test_a_local_run_listens_on_this_machine_alone(
    coordinator: str, bind: str | None, started: list[dict[str, Any]]
) -> None:
    distributed.start((coordinator, 2, 0))
    assert started[0]["arguments"] == (coordinator, 2, 0)
    assert started[0]["coordinator_bind_address"] == bind
    assert started[1:] == ([{"gloo": "127.0.0.1"}] if bind else [])


@pytest.mark.parametrize(
    ("join", "message"),
    [
        (("a", 2, 0), "coordinator is 'a'; it must be HOST:PORT"),
        (("a:1", 2, 2), "process 2 of 2"),
        (("a:1", 2, -1), "process -1 of 2"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(
    join: tuple[str, int, int], message: str, started: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=message):
        distributed.start(join)
    assert not started


def test_alone_nothing_changes(started: list[dict[str, Any]]) -> None:
    distributed.start(("a:1", 1, 0))
    assert not started
    assert distributed.first()
    distributed.agree(anything=object())
    assert distributed.by_first(lambda: "made") == "made"
    with pytest.raises(OSError, match="another error"), distributed.leaving_together():
        raise OSError("another error")
    with pytest.raises(SystemExit, match="75"), distributed.leaving_together():
        fail()


def test_it_listens_on_after_process_0_was_unreachable_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    found, left, done = iter([jax.errors.JaxRuntimeError("UNAVAILABLE"), [], [("1", "failed")]]), [], threading.Event()

    def look(_: str) -> Any:
        if isinstance(answer := next(found), Exception):
            raise answer
        return answer

    def leave(failure: str) -> None:
        left.append(failure)
        done.set()

    state = mock.Mock()
    state.client.key_value_dir_get = look
    monkeypatch.setattr(distributed, "_coordination", lambda: state)
    monkeypatch.setattr(distributed, "leave", leave)
    monkeypatch.setattr(distributed, "LISTEN_EVERY", 0.001)
    distributed._listen(done)
    assert left == [""]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_process_stops_all_before_the_same_step(
    number: signal.Signals, victim: int, tmp_path: Path
) -> None:
    with several(3, "stopping", tmp_path) as running:
        for one in running:
            one.wait_for("a step\n" * 3)
        running[victim].process.send_signal(number)
        ended = [one.end() for one in running]
    assert [one.code for one in ended] == [0, 0, 0], ended
    stops = {one.stdout.splitlines()[-1] for one in ended}
    assert len(stops) == 1
    assert "stopped after" in stops.pop()
