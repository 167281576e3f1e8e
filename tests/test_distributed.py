"""Several real processes on this machine, which run this file: they agree, and none waits for one that is lost."""

import ctypes
import itertools
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from ports import free_port

if __name__ == "__main__":  # the processes import what they need: all of jaxlm would take each two seconds more
    sys.modules["jaxlm"] = package = ModuleType("jaxlm")
    package.__path__ = [str(Path(__file__).parents[1] / "jaxlm")]
from jaxlm import distributed

PATIENCE = 60  # seconds for anything at all
HANGING = 3  # seconds until a watchdog ends its process
LEAVING = 10  # seconds from the end of a process to that of the others; 0.2 where two cores do nothing else
LAUNCHERS = ("OMPI_", "SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_", "JAX_")
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


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    folder: Path

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while line not in (self.folder / "stdout").read_text():
            assert self.process.poll() is None, (self.folder / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> Ended:
        code = self.process.wait(PATIENCE)
        return Ended(code, (self.folder / "stdout").read_text(), (self.folder / "stderr").read_text())


@contextmanager
def several(
    count: int,
    job: str,
    folder: Path,
    *environments: Mapping[str, str],
    within: Sequence[str] = (),
    also: Mapping[str, str] | None = None,
) -> Generator[list[Running]]:
    """Starts processes that run `job` of this file, as processes of one run or as their environments say."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    clean |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", **(also or {})}
    where = [] if environments else [f"127.0.0.1:{free_port()}", str(count)]
    running: list[Running] = []
    try:
        for i in range(count):
            own = folder / str(i)
            own.mkdir()
            command = [*within, sys.executable, __file__, job, *where, *([str(i)] if where else [])]
            environment = clean | dict(environments[i] if environments else {})
            with (own / "stdout").open("wb") as out, (own / "stderr").open("wb") as err:
                running.append(
                    Running(subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err), own)
                )
        yield running
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()


# What the processes do.


def job_agreeing(coordinator: str, processes: str, process: str) -> None:
    distributed.start((coordinator, int(processes), int(process)))
    with distributed.leaving_together():
        print("devices", jax.device_count(), "first", distributed.first())
        print("sum", sum_of_devices())
        distributed.agree(steps=10, data="ab")
        for values in ({"same": 1, "data": f"{process} of many " * 10}, {"lr": 0.1} if process == "0" else {}):
            try:
                distributed.agree(**values)
            except ValueError as error:
                print(error)
        print(distributed.by_first(lambda: f"made by {process}"))
        print("listens on", sorted(listening()), flush=True)
        distributed.by_first(fail)


def fail() -> None:
    raise OSError("the disk is full")


def job_failing() -> None:
    distributed.start(heartbeat_seconds=100)
    with distributed.leaving_together():
        sum_of_devices()
        if distributed.first():
            fail()
        sum_of_devices()  # waits for process 0


def job_endless(coordinator: str, processes: str, process: str) -> None:
    distributed.start((coordinator, int(processes), int(process)), heartbeat_seconds=10)
    with distributed.leaving_together():
        while True:
            sum_of_devices()
            print("a step", flush=True)
            time.sleep(0.05)


def job_hanging(coordinator: str, processes: str, process: str) -> None:
    """The one that the environment names hangs after some steps, as it says."""
    from jaxlm.watchdog import watching

    number, how = os.environ["HANG"].split(" ", 1)

    def batches() -> Iterator[dict[str, Any]]:
        for step in itertools.count():
            if step == 5 and process == number and how == "a batch":
                print("hangs", flush=True)
                wait_for_nobody()
            yield {}

    distributed.start((coordinator, int(processes), int(process)))
    seconds = HANGING if process == number else PATIENCE
    with distributed.leaving_together():
        sum_of_devices()  # the first time connects them
        with watching(f"stacks-{process}.txt", seconds=seconds) as watch:
            for step, _ in enumerate(watch.batches(batches())):
                if step == 5 and process == number and how != "a batch":
                    print("hangs", flush=True)
                    HANGS[how]()
                sum_of_devices()


def wait_for_nobody() -> None:
    queue.Queue[int]().get()


HANGS = {
    "a batch": wait_for_nobody,
    "sleep": lambda: time.sleep(1000),
    "Python's lock": lambda: ctypes.PyDLL(None).sleep(1000),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def job_stopping(coordinator: str, processes: str, process: str) -> None:
    """Steps of very different pace, so that without agreement they would stop at different ones."""
    distributed.start((coordinator, int(processes), int(process)))
    with distributed.leaving_together(), distributed.stop_signals() as stop:
        taken = 0
        while not stop():
            if taken % 2 == 0:
                sum_of_devices()
            time.sleep(0.02 * int(process))
            taken += 1
            print("a step", flush=True)
        print("stopped after", taken)


def job_found() -> None:
    distributed.start()
    with distributed.leaving_together():
        print(f"process {jax.process_index()} of {jax.process_count()}: {sum_of_devices()}")


def sum_of_devices() -> float:
    """Of the numbers of all devices, from 0."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    numbers = np.arange(jax.device_count(), dtype=np.float32)
    sharded = jax.make_array_from_callback(
        numbers.shape, jax.NamedSharding(mesh, jax.P("data")), lambda index: numbers[index]
    )
    total = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x.sum(), "data"), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    )
    return float(total(sharded))


def listening() -> Iterator[str]:
    """The addresses, as Linux writes them, on which this process listens."""
    own = set[str]()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            own.add(os.readlink(file))
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in own and fields[3] == "0A":
                yield fields[1].partition(":")[0]


# The tests.


# A command in a machine of another name, which leads nowhere.
NOWHERE = ["unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]


def test_processes_join_and_agree_and_the_first_goes_first(tmp_path: Path) -> None:
    can = sys.platform == "linux" and subprocess.run([*NOWHERE, "true"], capture_output=True).returncode == 0
    with several(2, "agreeing", tmp_path, within=NOWHERE if can else ()) as running:
        ended = [one.end() for one in running]
    for i, one in enumerate(ended):
        assert one.code == 1, one
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
    assert "OSError: the disk is full" in ended[0].stderr
    assert "RuntimeError: process 0 failed: OSError: the disk is full" in ended[1].stderr


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
    assert "process 1: process 0 failed: OSError: the disk is full; leaving with exit code 1" in second.stderr


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
    monkeypatch.setattr(distributed, "_let_gloo_listen_on", lambda address: calls.append({"gloo": address}))
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
    with pytest.raises(OSError, match="the disk is full"), distributed.leaving_together():
        fail()


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


if __name__ == "__main__":
    globals()[f"job_{sys.argv[1]}"](*sys.argv[2:])
