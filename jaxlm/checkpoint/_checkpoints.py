"""Saving in the background, restoring what is whole: Orbax moves the arrays, the rest is here."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jax

from jaxlm import distributed, files
from jaxlm.checkpoint import _folder
from jaxlm.checkpoint._folder import Json
from jaxlm.checkpoint._reading import (
    check,
    check_copies,
    load,
    none_whole,
    or_damage,
    or_damage_of_any,
    report_damage,
    shapes,
)
from jaxlm.checkpoint._writing import begin, compile_ahead, disk_error
from jaxlm.numbers import check_whole, is_whole
from jaxlm.output import warn
from jaxlm.tree import named_leaves, nbytes
from jaxlm.types import TrainState

FAILURES: Final = 3
"""Saves that fail in a row, for want of space or with an error of the disk, until that ends the run."""
# What its threads raise is raised here too, and said in a line rather than two hundred.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.msg)


class Checkpoints:
    """The checkpoints of one run. Close it when done, or use it in a `with` statement. All processes do the same.

    Args:
        folder: where they are; it is made if need be, and held for this process: see `files.lock`.
        about: what else a reader must know, as JSON: the model's shape, the tokenizer, which data. It is saved with
            every state, and must be the same when one is restored.
        keep: how many to keep, the newest ones. The one with the best `score` is kept besides.
        keep_every: also keep those whose step is a multiple of this.

    Raises:
        ValueError: `keep` isn't 2 or more, or `keep_every` 1 or more.
        RuntimeError: another process uses the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], about: Json, *, keep: int = 2, keep_every: int | None = None):
        if not is_whole(keep, 2):
            raise ValueError(f"Checkpoints: keep is {keep}; use 2 or more: if the newest is damaged, there is another")
        if keep_every is not None:
            check_whole("Checkpoints", keep_every=keep_every)
        self._folder = Path(folder).absolute()
        self._about: Json = json.loads(json.dumps(about))
        self._keep, self._keep_every = keep, keep_every
        self._release: Callable[[], None] = lambda: None
        self._scores: dict[int, float | None] = {}
        self._steps = set(distributed.by_first(self._open))
        self._background = ThreadPoolExecutor(1)
        self._saving: tuple[int, Future[None]] | None = None
        self._failed: OSError | None = None
        self._failures = 0

    def _open(self) -> list[int]:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._release = files.lock(self._folder)
        _folder.sweep(self._folder)
        self._scores = _folder.read_scores(self._folder)
        return _folder.whole(self._folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if exception is None:
            self.close()
        else:  # which is the one to see; and of several processes some may be gone, which a save would wait for
            self._background.shutdown(wait=jax.process_count() == 1)
            self._let_go()

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        self._settle()
        return max(self._steps, default=None)

    def save(self, state: TrainState, *, after: Callable[[], object] = lambda: None) -> None:
        """Begins to save a state under its step, and returns once it is safe to donate it.

        Does nothing if its step is the newest one already. A save that fails for want of space, or because the disk has
        errors, is reported on stderr, what it wrote is removed, and the run goes on: the next save may succeed. Of
        several processes the first looks for room, for all bytes of the state, before any begins; where the system then
        fails one in the middle, which the others would wait for, all leave (see `distributed.leaving_together`): for a
        restart, if it was the disk. Until a state is written it takes the host's memory once more; in one process on
        CPUs twice, while Orbax begins.

        What several devices hold must be the same on all: where it isn't, one of them has failed without a sign, or the
        program isn't deterministic (`--xla_gpu_deterministic_ops=true`). A parameter that isn't finite, and never will
        be again, ends the run too, before such a checkpoint takes the place of one to go back to.

        Args:
            state: what to save.
            after: called before, in the first process: it puts on the disk what must be there once the checkpoint
                counts, as `metrics.Log.sync` does. Where the disk fails it, the save has failed.

        Raises:
            OSError: the last three saves failed so; older checkpoints are intact.
            RuntimeError: copies differ; the leaf and the devices are named, and older checkpoints are intact.
            ValueError: there is a newer checkpoint, or a leaf has no elements.
            FloatingPointError: the save before was of a parameter that isn't finite; older checkpoints are intact.
            Exception: any other error of the save before, or, but in one process on CPUs, of this one's beginning.
        """
        step, newest = int(state.step), self.latest
        if self._failed and self._failures >= FAILURES:
            raise self._failed
        if newest is not None and step <= newest:
            if step < newest:
                raise ValueError(
                    f"save: the state is of step {step}, and {self._folder} has a checkpoint of step {newest}; "
                    "restore that and go on, or use another folder"
                )
            return
        parts = _parts(state)
        check_copies("save", step, parts)

        def prepare() -> None:
            after()
            if jax.process_count() > 1 and shutil.disk_usage(self._folder).free < nbytes(parts) + 2**20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        failed = distributed.by_first(lambda: getattr(self._attempt(step, prepare), "errno", None))
        if failed:
            end = OSError(failed, os.strerror(failed))
        else:
            path = _folder.unfinished(self._folder, step)
            end = self._attempt(step, lambda: begin(path, parts), together=True)
        self._saving = step, self._background.submit(self._finish, step, shapes(parts), end)

    def _finish(self, step: int, shapes: Json, end: Callable[[], dict[str, str]] | OSError) -> None:
        """Waits until all arrays are written, and lets them count, in the background; or raises why they aren't."""

        def commit() -> None:
            leaves = {name: [*shape, prints[name]] for name, shape in shapes.items()}
            _folder.commit(self._folder, step, {"format": _folder.FORMAT, "about": self._about, "leaves": leaves})

        prints: Any = end if isinstance(end, OSError) else self._attempt(step, end, together=True)
        failed = prints if isinstance(prints, OSError) else None
        if not failed and distributed.first():
            failed = self._attempt(step, commit)
        if failed:
            raise failed
        if distributed.first():
            try:
                self._remove_old()
            except OSError as error:
                warn(f"what is no longer needed of {self._folder} was not all removed: {error}")

    def _remove_old(self) -> None:
        _folder.sweep(self._folder)  # threads of Orbax may have gone on writing after an earlier save had failed
        _folder.sweep(self._folder, "rewound")
        steps, scores = _folder.whole(self._folder), dict(self._scores)
        keep = _folder.kept(steps, scores, keep=self._keep, keep_every=self._keep_every)
        for old in sorted(set(steps) - keep):
            try:
                _folder.remove(self._folder, old)
            except OSError as error:
                warn(f"checkpoint {old} could not be removed: {error}")

    def _attempt(self, step: int, work: Callable[[], Any], *, together: bool = False) -> Any:
        """What `work` returns, or the error if the disk fails it: that is said, and what it has written removed.

        In work that processes do together the others would wait for the one that fails, Orbax's for 20 minutes.
        """
        try:
            return work()
        except Exception as error:
            failed = disk_error(error)
            why = failed.strerror if failed else f"{error!r:.300}"
            warn(f"checkpoint {step} was not saved: {why}; the older ones are intact")
            if together and failed and jax.process_count() > 1:
                code = distributed.RESTART if failed.errno in files.DISK_ERRORS else 1
                distributed.leave(f"checkpoint {step} was not saved: {why}", code)
            if failed is None:
                raise
            shutil.rmtree(_folder.unfinished(self._folder, step), ignore_errors=True)
            return failed

    def _settle(self) -> None:
        """Waits for the save under way, and agrees with the other processes on whether it succeeded."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        error = saving.exception()
        failed = error and disk_error(error)
        if error and not failed:
            raise error
        codes = distributed.exchange(failed and failed.errno)
        if any(codes):
            self._failures += 1
            code = next(filter(None, codes))
            message = f"checkpoint {step} was not saved: {os.strerror(code)}; the older ones are intact"
            self._failed = OSError(code, message)
            distributed.by_first(lambda: _folder.sweep(self._folder))
        else:
            self._failures, self._failed = 0, None
        # Also where it failed: its name may have been given already, and then counts.
        self._steps = set(distributed.by_first(lambda: _folder.whole(self._folder)))

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            OSError: it failed; older checkpoints are intact.
            FloatingPointError: as `save`, of the last one.
        """
        self._settle()
        if self._failed:
            raise self._failed

    def score(self, step: int, value: float | int) -> None:
        """Notes how good a checkpoint is, such as its loss on held-out text: the one with the lowest value is kept.

        Args:
            step: its step; it may still be being saved. Say it before the next is saved, which is when old ones go.
            value: NaN is no score.
        """
        self._scores[step] = float(value)

        def write() -> None:
            try:
                _folder.write_scores(self._folder, self._scores)
            except OSError as error:
                warn(f"the score of checkpoint {step} was not written: {error}")

        distributed.by_first(write)

    def restore(
        self, like: TrainState, *, until: int | None = None, watch: Callable[[str], object] = lambda _: None
    ) -> TrainState | None:
        """The state of the newest checkpoint that is whole; None if there never was one, or none up to `until`.

        Every leaf is held against its fingerprint. A damaged checkpoint is reported on stderr, with the leaf or the
        file that is damaged, and renamed once an older one has been restored.

        Args:
            like: the state that is expected, which is left alone, and so on the devices besides what is read; or its
                shapes and shardings, as from the `eval_shape()` of a jitted function. The result lies as it does,
                and what is of the host on the first device. What saves need is compiled now.
            until: the last step that will do.
            watch: is told which checkpoint is being read, as a `watchdog.Watchdog` wants to be.

        Raises:
            ValueError: the checkpoint is `about` something else, or holds other leaves, shapes or dtypes than `like`;
                the first difference is named. Or a leaf of `like` has no elements.
            RuntimeError: there are checkpoints, but none that isn't damaged; or copies on several devices differ, as in
                `save`.
        """
        self._settle()
        parts = _parts(like)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)

        abstract = jax.tree.map(shape, parts)
        damaged: list[int] = []
        for step in sorted(step for step in self._steps if until is None or step <= until)[::-1]:
            watch(f"reading checkpoint {step}")
            loaded, damage = self._read(step, abstract)
            if loaded is None:
                watch(f"reading checkpoint {step} again")
                loaded, _ = self._read(step, abstract)  # an error of reading may be gone
                what = "is damaged and not used" if loaded is None else "is whole at the second reading; at the first"
                report_damage(step, damage, what)
            if loaded is not None:
                compile_ahead(loaded)
                check_copies("restore", step, loaded)
                self._steps = set(distributed.by_first(lambda: self._set_aside(damaged)))
                return TrainState(params=loaded["params"], **loaded["rest"])
            damaged.append(step)
        names = [*map(str, damaged), *distributed.by_first(lambda: _folder.aside(self._folder))]
        if names and until is None:
            raise RuntimeError(none_whole(self._folder, names))
        compile_ahead(parts)
        return None

    def _read(self, step: int, like: Json) -> tuple[Json | None, str | None]:
        """What is in a checkpoint, each leaf held against its fingerprint; or what is damaged, for all processes."""
        manifest, damage = distributed.by_first(lambda: or_damage(_folder.read, self._folder, step))
        if manifest is None:
            return None, damage
        _check_same(step, _flat(manifest["about"]), _flat(self._about))
        _check_same(step, {name: leaf[:2] for name, leaf in manifest["leaves"].items()}, shapes(like))
        loaded, damage = or_damage_of_any(load, self._folder / str(step), like)
        if loaded is not None and damage is None:
            # A collective, which all reach or none; but each looks at its own copy.
            _, damage = or_damage_of_any(check, manifest, loaded)
        return (loaded if damage is None else None), damage

    def rewind(self, step: int) -> int:
        """Renames the checkpoints after a step, but for the oldest of all, so that the run goes on from there.

        The next save that succeeds removes them: until then one of them can be named back, if all others are damaged.

        Returns:
            The step of the newest that is left; 0 if there is none.
        """
        # The save under way may be of parameters that aren't finite: it doesn't count, and is of a later step.
        with contextlib.suppress(FloatingPointError):
            self._settle()
        last = max(step, min(self._steps, default=0))
        self._scores = {scored: value for scored, value in self._scores.items() if scored <= last}

        def rename() -> list[int]:
            _folder.write_scores(self._folder, self._scores)
            for later in sorted(self._steps, reverse=True):
                if later > last:
                    _folder.rewind(self._folder, later)
            return _folder.whole(self._folder)

        self._steps = set(distributed.by_first(rename))
        return max(self._steps, default=0)

    def _set_aside(self, damaged: list[int]) -> list[int]:
        for step in damaged:
            warn(f"checkpoint {step} is now {_folder.set_aside(self._folder, step)}")
        return _folder.whole(self._folder)

    def close(self) -> None:
        """Waits for the last save, and lets go of the folder.

        Raises:
            OSError: it failed; older checkpoints are intact.
            FloatingPointError: as `save`, of the last one.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._let_go()

    def _let_go(self) -> None:
        self._release, release = lambda: None, self._release
        release()


def _parts(state: TrainState) -> Json:
    """What is saved under names of their own, so that the parameters can be read alone. None may be without a leaf."""
    parts: Json = {"params": state.params, "rest": {"step": state.step, "opt_state": state.opt_state}}
    if empty := [name for name, leaf in named_leaves(parts).items() if leaf.size == 0]:
        raise ValueError(f"Checkpoints: {empty[0]} has no elements, and Orbax saves no such arrays; leave it out")
    return parts


def _check_same(step: int, saved: Json, expected: Json) -> None:
    for name in {**saved, **expected}:
        if saved.get(name) != expected.get(name):
            raise ValueError(
                f"checkpoint {step} has {name:.300} {saved.get(name)!s:.300}, but this run has "
                f"{expected.get(name)!s:.300}; go on with the model, optimizer and data that it was saved with, or use "
                "another folder"
            )


def _flat(about: Json, prefix: str = "") -> Json:
    """`{"model": {"width": 128}}` as `{"model/width": 128}`."""
    flat: Json = {}
    for name, value in about.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
