"""Several real processes on this machine, as one run: each runs a job of this file."""

import ctypes
import errno
import importlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from ports import clean_environment, free_port

if __name__ == "__main__":  # the processes import what they need: all of jaxlm would take each two seconds more
    sys.modules["jaxlm"] = package = ModuleType("jaxlm")
    package.__path__ = [str(Path(__file__).parents[1] / "jaxlm")]
from jaxlm import distributed

PATIENCE = 150  # seconds for anything at all
HANGING = 3  # seconds until a watchdog ends its process


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

    def end(self, within: float = PATIENCE) -> Ended:
        code = self.process.wait(within)
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
    clean = clean_environment(**{"JAX_NUM_CPU_DEVICES": "2"} | dict(also or {}))
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


def call_together(count: int, devices: int, function: Callable[[str], None], folder: Path) -> None:
    """Calls a function of a test's module, with a folder, in processes of one run with so many devices each."""
    also = {"CALL": f"{function.__module__} {function.__name__} {folder}", "JAX_NUM_CPU_DEVICES": str(devices)}
    with several(count, "calling", folder, also=also) as running:
        ended = [one.end(900) for one in running]
    assert [one.code for one in ended] == [0] * count, ended


def own_rows(batch: Any, rows: jax.NamedSharding) -> Any:
    """What this process gives to `sharding.place` of a whole batch."""
    from jaxlm import sharding

    parts, of = sharding.share(rows)
    return jax.tree.map(lambda x: np.concatenate([np.split(x, of)[part] for part in parts]), batch)


# What the processes do.


def job_calling(coordinator: str, processes: str, process: str) -> None:
    """What the environment names."""
    distributed.start((coordinator, int(processes), int(process)))
    module, function, folder = os.environ["CALL"].split(" ", 2)
    with distributed.leaving_together():
        getattr(importlib.import_module(module), function)(folder)


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
        print("listens on", sorted(listening(os.getpid())), flush=True)
        distributed.by_first(fail)


def fail() -> None:
    raise OSError(errno.ENOSPC, "the disk is full")


def job_failing() -> None:
    distributed.start(heartbeat_seconds=100)
    with distributed.leaving_together():
        sum_of_devices()
        if distributed.first():
            FAILURES[os.environ.get("HOW", "")]()
        sum_of_devices()  # waits for process 0


def err() -> None:
    raise ValueError("it is wrong")


def interrupt() -> None:
    raise KeyboardInterrupt  # as Ctrl-C does, but where a shell has started the tests in the background


FAILURES = {"": err, "disk": fail, "interrupt": interrupt}


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


def listening(process: int) -> Iterator[str]:
    """The addresses, as Linux writes them, on which a process listens."""
    own = set[str]()
    for file in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            own.add(os.readlink(file))
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in own and fields[3] == "0A":
                yield fields[1].partition(":")[0]


if __name__ == "__main__":
    globals()[f"job_{sys.argv[1]}"](*sys.argv[2:])
