"""One run of several processes: they join, agree on what to do, stop at the same step, leave together if one is lost.

JAX asks nobody who connects for a password: keep the ports of a run inside a network that you trust.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.files import disk_error, redacted
from jaxlm.launchers import let_collectives_listen_on, started_with_others
from jaxlm.output import drop_unsaid, warn
from jaxlm.peers import Peers

T = TypeVar("T")

RESTART = 75  # EX_TEMPFAIL of sysexits.h
LISTEN_EVERY = 1.0  # seconds
PATIENCE = 5.0  # seconds; who hasn't answered or ended by then is lost
JOINING = 600  # seconds between the first process that joins the run and the last
LEAVING, GONE, PEERS = "jaxlm/leaving", "jaxlm/gone", "jaxlm/peers"
LOCAL = ("127.0.0.1", "localhost", "::1")
OWN = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED")  # JAX's errors that no other process causes
# The service in process 0 doesn't answer; or the version of JAX isn't one that `_coordination` knows.
UNREACHABLE = (jax.errors.JaxRuntimeError, ImportError, AttributeError)
_LEAVING_ONCE = threading.Lock()

_PEERS = Peers(lambda process: _gone(process))


def start(join: tuple[str, int, int] | None = None, *, heartbeat_seconds: int = 30) -> None:
    """Joins this process to the others of its run; to be called before anything else of JAX.

    Without `join` JAX finds the others if several were started by SLURM or Open MPI 4 (one process for each GPU), on
    Cloud TPU, or by Kubernetes (an indexed Job or a JobSet; needs the package `kubernetes`). Otherwise the process is
    alone, and nothing happens. On CPUs all talk through Gloo, which listens where the machine's name leads, but on
    127.0.0.1 alone if `join` is there.

    Args:
        join: HOST:PORT where process 0 is to listen, how many processes there are, and the number of this one, from 0.
            On 127.0.0.1 or localhost nobody else reaches them. One process is alone, whatever the launcher. Of several
            on one machine with GPUs each is told its own by `JAX_LOCAL_DEVICE_IDS`.
        heartbeat_seconds: JAX ends all processes (SIGABRT) when one is silent for so long.

    Raises:
        ValueError: `join` doesn't fit together, or the launcher needs it.

    >>> start(("localhost:1234", 2, 2))
    Traceback (most recent call last):
    ValueError: start: process 2 of 2; processes are numbered from 0 to processes - 1
    """
    config: Any = jax.config
    if config.jax_num_cpu_devices > 1:
        # XLA runs them in as many threads as there are cores, and one that waits for the others in a collective keeps
        # its thread: with too few they wait for ever.
        os.environ.setdefault("NPROC", str(8 * config.jax_num_cpu_devices))
    # JAX would catch SIGTERM, for programs that ask it at each step; one that doesn't would not end.
    config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat_seconds,
        "shutdown_timeout_seconds": 600,  # for process 0 to write results when the others are done
    }
    if join is None:
        if started_with_others():
            jax.distributed.initialize(**options)
        return
    coordinator, processes, process = join
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"start: coordinator is {coordinator!r}; it must be HOST:PORT")
    if not 0 <= process < processes:
        raise ValueError(f"start: process {process} of {processes}; processes are numbered from 0 to processes - 1")
    if processes > 1:
        local = host.strip("[]") in LOCAL
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate",
            coordinator_bind_address=coordinator if local else None,
            **options,
        )
        if local:
            let_collectives_listen_on("::1" if host == "[::1]" else "127.0.0.1", _coordination().client)


def first() -> bool:
    """Whether this is process 0, which alone prints and writes what all have in common."""
    return jax.process_index() == 0


def agree(**values: object) -> None:
    """Makes sure that all processes are about to do the same. All must call it; alone it does nothing.

    Args:
        values: by name, whatever JSON can say: options, the fingerprint of the data, versions.

    Raises:
        ValueError: in every process, about the first value that isn't the same in all.

    >>> agree(steps=1000, data="ab12")
    """
    if jax.process_count() == 1:
        return
    said = exchange({name: _short(redacted(json.dumps(value, sort_keys=True))) for name, value in values.items()})
    for name in dict.fromkeys(name for one in said for name in one):
        having: dict[str, list[int]] = {}
        for process, one in enumerate(said):
            having.setdefault(f"{name}={one[name]}" if name in one else f"no {name}", []).append(process)
        if len(having) > 1:
            few_first = sorted(having.items(), key=lambda item: (len(item[1]), -item[1][0]))
            who = ", ".join(
                f"{_named(processes)} {'has' if len(processes) == 1 else 'have'} {what}"
                for what, processes in few_first[:4]
            )
            raise ValueError(f"agree: {who}; start all with the same command and data")


def by_first(make: Callable[[], T]) -> T:
    """Lets process 0 alone make something in a shared folder, and tells all where it is. All must call it.

    Args:
        make: returns what JSON can say, such as a path. On CPUs JAX lets the others wait for 30 minutes.

    Returns:
        What `make` returned in process 0.

    Raises:
        RuntimeError: in the others, if it failed in process 0, where its own error is raised; OSError, if its disk is
            full or fails.

    >>> by_first(lambda: "made")
    'made'
    """
    if jax.process_count() == 1:
        return make()
    made: T | None = None
    error: Exception | None = None
    if first():
        try:
            made = make()
        except Exception as raised:
            error = raised
    failure, code, told = exchange([error and f"{type(error).__name__}: {error}", disk_error(error), made])[0]
    if error is not None:
        raise error
    if failure is not None:
        failure = f"process 0 failed: {failure}"
        raise OSError(code, failure) if code else RuntimeError(failure)
    return told


def exchange(said: Any) -> list[Any]:
    """What each process says, in their order. All must call it.

    Args:
        said: whatever JSON can say.

    >>> exchange("ready")
    ['ready']
    """
    if jax.process_count() == 1:
        return [said]
    text = np.frombuffer(json.dumps([jax.process_index(), said]).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(text.size, np.int32))
    texts = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - text.size)))
    # The rows are in the order of the devices, which needn't be that of the processes.
    parts = sorted(json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True))
    return [part for _, part in parts]


@contextlib.contextmanager
def leaving_together() -> Generator[None]:
    """Stands around the job, after `start`, so that no process waits for one that is gone, and its exit code is right.

    A process that an error leaves prints it and tells the others, also those inside a collective. Each then prints who
    failed or is lost, and ends at once, where an ordinary end would wait for the lost one. The exit code is for the
    scheduler:

    - 1: a process failed with an error of its own, which it would meet again.
    - 75: a process was lost (killed, out of memory, its machine gone), one of several interrupted by Ctrl-C, or a disk
      is full or fails: start all again, to go on from a checkpoint.
    - 134 (SIGABRT): JAX ended the process, which nothing can catch: process 0 is gone ("the leader task") or doesn't
      answer (as is said after 5 s), or the tasks that it names "stopped sending heartbeats", for `heartbeat_seconds`; a
      task is a process. So it shows if a process is stopped (SIGSTOP) or its machine lost. If that process printed no
      error, start all again, once it has ended too.

    Process 0 listens on one more port, which it tells the others, to hear of the end of each at once.

    `SystemExit` passes: leave by it in all processes or in none.
    """
    atexit.register(drop_unsaid)
    if not jax.distributed.is_initialized():
        try:
            yield
        except OSError as error:
            if not disk_error(error):
                raise
            warn(traceback.format_exc().rstrip())
            sys.exit(RESTART)
        return
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(done,), daemon=True)
    listener.start()
    try:
        _connect_peers()
        yield
    except (Exception, KeyboardInterrupt) as error:
        warn(traceback.format_exc().rstrip())
        # Gloo's errors come as ValueError from where a program is run at once.
        of_all = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(OWN)
        of_all = of_all or (isinstance(error, ValueError) and ": Gloo " in str(error))
        again = isinstance(error, KeyboardInterrupt) or disk_error(error)
        leave("" if of_all else f"{type(error).__name__}: {error}", RESTART if again else 1)
    finally:
        done.set()
        _PEERS.bye()
        listener.join()


def _connect_peers() -> None:
    """So that the end of one is noticed at once, be it in a collective, which may wait for ever, or on GPUs.

    Where a firewall prevents it, JAX's heartbeats tell later.
    """
    state = _coordination()
    host = str(state.coordinator_address).rpartition(":")[0].strip("[]")
    try:
        if state.process_id == 0:
            port, token = 0, secrets.token_hex()
            try:
                port = _PEERS.listen(host if host in LOCAL else "", token)
            finally:
                state.client.key_value_set(PEERS, f"{port} {token}")
        else:
            port, _, token = state.client.blocking_key_value_get(PEERS, 1000 * JOINING).partition(" ")
            _PEERS.connect(host, int(port), token, state.process_id)
    except (OSError, *UNREACHABLE):
        _warn(f"no connection through {host}: that a process is gone will be noticed by its heartbeats alone")


def _gone(process: int) -> None:
    """Leaves because another process has ended; process 0 tells the others which."""
    state = _coordination()
    if state.process_id == 0:
        with contextlib.suppress(*UNREACHABLE):
            state.client.key_value_set(f"{GONE}/{process}", "")
    threading.Thread(target=leave, args=("",), daemon=True).start()  # others may be gone too


@contextlib.contextmanager
def stop_signals() -> Generator[Callable[[], bool]]:
    """Holds back SIGINT (Ctrl-C) and SIGTERM, so that a loop can stop between two steps. Stands around `Checkpoints`.

    In a run of several processes a signal to any of them stops all before the same step, a second or two later.

    Yields:
        A function that tells whether to stop. In a run of several, all must call it once before each step. A second
        signal is not held back, but for SIGTERM in a run of several.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        del frame
        came.append(number)
        restore()

    def pass_on(number: int, frame: Any) -> None:
        del frame
        signal.signal(number, before[signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        if jax.process_count() == 1:
            for number in before:
                signal.signal(number, note)
            yield lambda: bool(came)
        else:
            agreed = _agreed_stop()
            signal.signal(signal.SIGINT, pass_on)
            yield agreed
    finally:
        restore()


def _agreed_stop() -> Callable[[], bool]:
    """Whether all are at the call before which they have agreed to stop, since one of them has got SIGTERM.

    JAX catches that in C, and agrees with the others in threads of its own on the largest number of calls, plus one.
    """
    state, calls = _coordination(), itertools.count()
    if state.preemption_sync_manager is None:
        config: Any = jax.config
        config.update("jax_enable_preemption_service", True)
        state.initialize_preemption_sync_manager()
    return lambda: state.preemption_sync_manager.reached_sync_point(next(calls))


def _listen(done: threading.Event) -> None:
    """Answers, when another leaves, for a main thread that may be inside a collective and wait for it."""
    while not done.wait(LISTEN_EVERY):
        late = threading.Timer(PATIENCE, _warn, [f"process 0 has not answered for {PATIENCE:g} s: is it stopped?"])
        late.daemon = True
        late.start()
        leaving = None
        with contextlib.suppress(*UNREACHABLE):  # for a moment: after the heartbeat's time JAX ends the process
            leaving = _coordination().client.key_value_dir_get(LEAVING)
        late.cancel()
        if leaving:
            leave("")


def _warn(text: str) -> None:
    warn(f"process {_coordination().process_id}: {text}")


def leave(failure: str, code: int = RESTART) -> NoReturn:
    """Ends this process of several, from any of its threads, and so those others that are inside `leaving_together`.

    It first waits until the others have said why they leave, or for 5 seconds; with a failure of its own only process 0
    does.

    Args:
        failure: what failed here; empty: another process did, which tells the code too.
        code: the exit code of all.
    """
    _LEAVING_ONCE.acquire()
    try:
        state = _coordination()
        me, said, gone = state.process_id, dict[int, str](), set[int]()
        state.client.key_value_set(f"{LEAVING}/{me}", failure and f"{code} {failure[:300]}")
        deadline = time.monotonic() + PATIENCE
        if me == 0:
            _PEERS.close()
        while (
            len(gone | said.keys()) < state.num_processes and time.monotonic() < deadline and not (failure and me > 0)
        ):
            time.sleep(max(0.05, state.num_processes / 2000))
            said, gone = _told_of(LEAVING), set(_told_of(GONE))
        failed = sorted(process for process, why in said.items() if why)
        lost = sorted(set(range(state.num_processes)) - set(said))
        if failure:
            line = "failed"
        elif failed:
            told, _, why = min(said[process] for process in failed).partition(" ")  # 1, its own error, before 75
            line, code = f"{_named(failed)} failed: {why}", int(told)
        elif lost:
            line, code = f"lost {_named(lost)}", RESTART
        else:
            line, code = "a collective failed while all processes live", RESTART
    except UNREACHABLE as error:
        time.sleep(LISTEN_EVERY)  # JAX may be about to end this process too, and to say why
        me, line, code = "?", f"lost process 0 ({type(error).__name__}: {error})", code if failure else RESTART
    warn(f"process {me}: {line}; leaving with exit code {code}")
    drop_unsaid()
    if me == 0:  # JAX would end the others, which hear of each other through this process
        _PEERS.let_go(_coordination().num_processes - 1, within=PATIENCE)
    os._exit(code)


def _told_of(what: str) -> dict[int, str]:
    """What is written of it, by the numbers of the processes."""
    return {int(key.rpartition("/")[2]): said for key, said in _coordination().client.key_value_dir_get(what)}


def _coordination() -> Any:
    """JAX's connection to the service in process 0: private, but nothing else tells who lives. Orbax uses it too."""
    from jax._src import distributed  # pyright: ignore[reportPrivateUsage]

    return distributed.global_state


def _short(text: str) -> str:
    return text if len(text) <= 64 else f"{text[:40]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _named(processes: Sequence[int]) -> str:
    some = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process {some}" if len(processes) == 1 else f"processes {some}"
