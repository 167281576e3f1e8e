"""Ends a process that makes no progress any more, and says where it was.

A second process watches: in the one that hangs no thread can be relied on, since one that keeps Python's lock stops all
others.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TypeVar, final

from jaxlm.compiled import signature
from jaxlm.files import create
from jaxlm.output import warn
from jaxlm.types import Batch

T = TypeVar("T")

# Runs alone, in a Python that imports nothing else, and looks at what was said once a second, since to be woken by each
# word would cost the process that it watches a core for a moment; what doesn't fit into the pipe meanwhile, words of
# some 350 steps, is lost. It ends with that process, whose end of the pipe closes then. A pause that was far too long
# was itself stopped (Ctrl-Z, a machine asleep): time begins anew.
WATCH = """
import os, select, signal, sys, time
for number in signal.SIGINT, signal.SIGTERM:  # which reach the whole group, and are for the process that it watches
    signal.signal(number, signal.SIG_IGN)
process, limit, stacks, last, since = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], "", time.monotonic()
pause = min(1.0, limit / 20)
while True:
    began = time.monotonic()
    time.sleep(pause)
    now = time.monotonic()
    if select.select([0], [], [], 0)[0]:
        said = os.read(0, 1 << 20)
        if not said:
            if os.path.exists(stacks) and not os.path.getsize(stacks):
                os.unlink(stacks)
            break
        last, since = said.decode(errors="replace").splitlines()[-1], now
    elif now - began > pause + 5:
        since = now
    elif now - since > limit:
        said = (f"watchdog: process {process} made no progress for {limit:g} s, since it was {last}. It is ended by "
                f"SIGABRT (exit code 134: start it again); where its threads were is in {stacks}, which is then named "
                "*.previous\\n")
        try:
            if select.select([], [2], [], 1)[1]:  # else it is a full pipe that nobody reads
                os.write(2, said.encode()[:4096])
        except OSError:
            pass
        os.kill(process, signal.SIGABRT)
        if not select.select([0], [], [], 4)[0]:
            os.kill(process, signal.SIGKILL)
        break
"""


@final
class Watchdog:
    """What a process says its progress to."""

    def __init__(self, pipe: int):
        self._pipe = pipe

    def __call__(self, doing: str) -> None:
        """Says what the process is doing from now on, as in "saving step 100"; takes microseconds."""
        with contextlib.suppress(OSError):  # the watching process was killed, or is stopped
            os.write(self._pipe, doing.replace("\n", " ").encode()[:4000] + b"\n")

    def each(self, doing: str, items: Iterable[T]) -> Iterator[T]:
        """Yields items, such as numbers of batches, and says before each what is done with it: `doing` and the item."""
        for item in items:
            self(f"{doing} {item}")
            yield item

    def batches(self, batches: Iterable[Batch], start: int = 0) -> Iterator[Batch]:
        """Yields batches for `train.fit`, and tells the waiting for one from the step that takes it.

        Args:
            batches: what to yield.
            start: the index of the first of them.
        """
        iterator, index = iter(batches), start
        while True:
            # `fit` has looked at the step's metrics before the last one's before it asks for a batch.
            finished = f" (step {index - 1} has finished)" if index > start + 1 else ""
            self(f"waiting for batch {index}{finished}")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self(f"taking step {index + 1}{finished} on batch {index}, {signature(batch)}")
            yield batch
            index += 1


@contextlib.contextmanager
def watching(stacks: str | os.PathLike[str], *, seconds: float | int) -> Generator[Watchdog]:
    """Ends this process by SIGABRT, and if that fails by SIGKILL, when it says nothing for so long.

    It then names the last thing said, on stderr, and writes the stacks of all threads into a file, as it does for a
    SIGSEGV or an abort of JAX's (faulthandler). Of a run of several processes the others then leave: see
    `distributed.leaving_together`.

    Args:
        stacks: the file, which is left only if the process was ended so, and renamed to `*.previous` when it is started
            again; each process needs its own.
        seconds: longer than anything that happens between two things said.

    Raises:
        ValueError: `seconds` isn't above 0.
    """
    if not seconds > 0:
        raise ValueError(f"watching: seconds is {seconds}; use a number above 0")
    path = Path(stacks)
    if os.getpid() == 1:
        warn(
            "watchdog: this is process 1 of a container, which nothing in it can end; give that an init (docker run "
            "--init, or Kubernetes' shareProcessNamespace)"
        )
    if path.exists() and path.stat().st_size:
        path.replace(f"{path}.previous")
    before = faulthandler.is_enabled()
    with create(path) as file:
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WATCH, str(os.getpid()), str(seconds), str(path)], stdin=subprocess.PIPE
        )
        assert watcher.stdin is not None
        try:
            faulthandler.enable(file)
            os.set_blocking(watcher.stdin.fileno(), False)
            watchdog = Watchdog(watcher.stdin.fileno())
            watchdog("starting")
            yield watchdog
        finally:
            watcher.stdin.close()
            watcher.kill()
            watcher.wait()
            faulthandler.disable()
            if before:
                faulthandler.enable()
            path.unlink(missing_ok=True)
