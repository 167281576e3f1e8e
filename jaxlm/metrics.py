"""The record of a run: its configuration, source, versions, and a line of metrics for each step."""

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from jaxlm import files
from jaxlm.output import UNWRITABLE, say, warn

T = TypeVar("T")

CONFIG = "config.json"
ROOM = 2**20
"""Bytes of lines that are kept while the disk is full: some thousand steps."""
PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def open_run(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    source: str | os.PathLike[str],
    *,
    free: Collection[str] = (),
) -> Path:
    """Makes the folder of a run, or checks that it is this run's if that has begun.

    The folder is held until the process ends: a second start is refused before it touches anything. What a command with
    other options has made there is removed if it ended before it trained; the same command goes on with it. The folder
    gets `config.json` and a copy of the source that made it; later `note_start` and `Log` add to it. Passwords and
    tokens in URLs are left out.

    Args:
        folder: where.
        config: all that the run depends on, as JSON.
        source: the file of the experiment.
        free: names in `config` of what may change when the run goes on, since it changes nothing that is learnt.

    Returns:
        The folder.

    Raises:
        ValueError: the folder belongs to a run with another configuration, and the first difference is named; or its
            record of that is damaged.
        RuntimeError: another process holds the folder.
        OSError: the disk is full or can't be written to.
    """
    folder = Path(folder)
    config = json.loads(json.dumps(files.redacted(config)))
    folder.mkdir(parents=True, exist_ok=True)
    files.lock(folder)
    begun = any(files.exists(folder / name) for name in ("metrics.jsonl", "checkpoints"))
    saved = files.read_json(folder / CONFIG) if files.exists(folder / CONFIG) else {}
    names = {**saved, **config} if saved else {}
    other = [name for name in names if name not in free and saved.get(name) != config.get(name)]
    if other and (begun or saved.keys() != config.keys()):
        raise ValueError(
            f"{folder} belongs to another configuration: {other[0]:.80} is {saved.get(other[0])!r:.200} there and "
            f"{config.get(other[0])!r:.200} here; give the run another name or delete the folder"
        )
    if other:
        # Of no command: should this be killed, whichever comes next clears again.
        files.write_whole(folder / CONFIG, json.dumps(dict.fromkeys(saved)))
        _clear(folder)
    if other or not saved:
        files.write_whole(folder / Path(source).name, Path(source).read_text())
    if not saved or saved != config:
        files.write_whole(folder / CONFIG, json.dumps(config, indent=1))
    return folder


def _clear(folder: Path) -> None:
    """Removes what a command made that was ended before it trained, but for what tells of that and other runs."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if not any(files.LOCK in names for _, _, names in os.walk(path, onerror=files.fail)):
                shutil.rmtree(path)
        elif path.name not in (files.LOCK, CONFIG):
            path.unlink()


def note_start(folder: str | os.PathLike[str], step: int, **about: Any) -> None:
    """Adds a line to `starts.jsonl`: the step, and its `provenance`.

    Call it in one process, each time that a run begins or goes on.

    Args:
        folder: the folder of the run.
        step: from which it goes on.
        about: what else a result depends on, as JSON, such as the fingerprint of its data.

    Raises:
        OSError: the disk is full or can't be written to.
    """
    path = Path(folder) / "starts.jsonl"
    lines = [*read_starts(folder), {"step": step, **provenance(**about)}]
    files.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def provenance(**about: Any) -> dict[str, Any]:
    """What a result depends on: the command, a hash of jaxlm's and the experiment's sources, versions, devices.

    Nothing of the environment is in it; passwords and tokens in URLs are left out.

    Args:
        about: what else, as JSON, such as the fingerprint of the data.
    """
    packages = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    devices = [jax.devices()[0].device_kind, len(jax.devices())]
    versions = {"python": platform.python_version(), **packages, "machine": platform.machine(), "devices": devices}
    found = {"command": shlex.join(sys.argv), "sources": _hash_of_sources(), **about, **versions}
    return json.loads(json.dumps(files.redacted(found)))


class Log:
    """Two files of JSON lines in a run's folder: `metrics.jsonl`, which is the same whenever and however often
    interrupted a run is repeated, and `timing.jsonl`, the seconds that each step took and waited for its batch.

    Metrics are read one step late, so that the device always has a next step to go on with. The newest are shown in a
    progress line. While the disk is full, lines stay in memory. Close the log when done, or use it in a `with`
    statement.

    Args:
        folder: the folder of the run; None: nothing is kept or shown, as in all processes of a run but the first.
        step: the step from which the run goes on: lines of later ones, written after the checkpoint, are removed.
        steps: the number of steps of the whole run.

    Raises:
        ValueError: a line that is there is damaged.
        OSError: later, the disk is full and so is the memory for lines, or it is full when the log is closed; or it has
            failed to keep lines that were written: go on from the last checkpoint, in a new process.
    """

    def __init__(self, folder: Path | None, step: int, *, steps: int):
        paths = [folder / "metrics.jsonl", folder / "timing.jsonl"] if folder else []
        kept = [_keep_until(path, step) for path in paths]
        self._files = [path.open("ab", ROOM) for path in paths]
        self._failed = False
        self._lost: OSError | None = None
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._last = time.perf_counter()
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=20)
        self._waited = 0.0
        self._latest = {"loss": math.nan, "heldout": math.nan}
        for line in kept[0] if kept else []:
            self._latest |= line
        columns = "{task.completed}/{task.total}", BarColumn(None), "{task.description}", TimeRemainingColumn(True)
        self._progress = Progress(*columns, expand=True, disable=folder is None)
        self._task = self._progress.add_task("", completed=step, total=steps)
        self._progress.start()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if exception is None:  # else that is the one to see
                raise
            warn(f"metrics are not all written: {error}")

    def close(self) -> None:
        """Writes what has been taken, waits until it is on the disk, and closes the files."""
        try:
            self.sync()
        finally:
            with contextlib.suppress(*UNWRITABLE):
                self._progress.stop()
            with contextlib.ExitStack() as stack:
                for file in self._files:
                    stack.callback(file.close)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, and writes those of the step before."""
        self.flush()
        self._pending = (step, metrics)

    def sync(self) -> None:
        """Writes what has been taken, and waits until it is on the disk: `Checkpoints.save(state, after=log.sync)`.

        Raises:
            OSError: the disk is full, or fails.
        """
        self.flush()
        for file in self._files:
            file.flush()
            with self._losing():  # the system may have dropped what it says once that it couldn't write
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _losing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            self._lost = OSError(error.errno, f"{error.strerror}: lines of metrics are lost")
            raise self._lost from None

    def flush(self) -> None:
        """Writes what has been taken, once the device has computed it."""
        if self._lost:
            raise self._lost
        if self._pending is None or not self._files:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        now, waited, self._waited = time.perf_counter(), self._waited, 0.0
        timing = {"seconds": round(now - self._last, 6), "waited": round(waited, 6)}
        for file, line in zip(self._files, (values, timing), strict=True):
            with self._losing():
                file.write((json.dumps({"step": step, **line}) + "\n").encode())
        failed, self._failed = self._failed, False
        for file in self._files:
            try:
                file.flush()  # what it can't write it keeps
            except OSError as error:
                if not failed and not self._failed:
                    warn(f"metrics stay in memory for now: {file.name}: {error.strerror}")
                self._failed = True
        self._recent.append((values.get("weight", 0.0), now - self._last))
        self._last = now
        self._latest |= values
        self._show(step, in_full="heldout" in values)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time that each is waited for is noted beside its step's."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begin
            yield batch

    def restart_clock(self) -> None:
        """Leaves what happened since the last step out of the next one's seconds."""
        self._last = time.perf_counter()

    def _show(self, step: int, *, in_full: bool) -> None:
        weights, seconds = map(sum, zip(*self._recent, strict=True))
        loss, heldout = self._latest["loss"], self._latest["heldout"]
        line = f"loss {loss:.3f} held-out {heldout:.3f} bits/byte {weights / seconds:,.0f} tok/s"
        self._progress.update(self._task, completed=step, description=line)
        if in_full and not self._progress.console.is_terminal:  # no line can be drawn over: a new one now and then
            say(f"step {step}: {line}")


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file that `Log` wrote, but for a last one that was cut off: numbers by name, and their `step`.

    Raises:
        ValueError: a line is damaged, and named.
    """
    return list(_steps(Path(path)))


def read_starts(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What `note_start` wrote, start by start.

    Raises:
        ValueError: a line is damaged, and named.
    """
    return [line for _, line in _lines(Path(folder) / "starts.jsonl")]


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    for number, values in _lines(path):
        if type(values.get("step")) is not int or not all(map(_is_number, values.values())):
            raise ValueError(
                f"{path}: line {number} is damaged: it isn't a step and numbers; remove the line to go on without it"
            )
        yield values


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not files.is_file(path):  # but perhaps a pipe
        return
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(files.LARGEST), b""), 1):
            if not line.endswith(b"\n") and len(line) < files.LARGEST:
                return  # it was cut off
            try:
                yield number, files.parse_json(line, f"{path}: line {number}")
            except ValueError as error:
                raise ValueError(f"{error}; remove the line to go on without it") from None


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes the lines of later steps, which may be damaged, for nobody waited until they were on the disk."""
    kept: list[dict[str, Any]] = []
    for line in _steps(path) if step else ():
        if line["step"] <= step:
            kept.append(line)
        if line["step"] >= step:
            break
    files.write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _hash_of_sources() -> str:
    own = Path(__file__).parent
    texts = [path.read_bytes() for path in (*sorted(own.rglob("*.py")), Path(sys.argv[0])) if path.is_file()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _installed(package: str) -> bool:
    return any(importlib.metadata.distributions(name=package))
