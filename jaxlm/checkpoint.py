"""Saving and restoring a run: its state, its place in the data, and what is needed to read its weights.

A checkpoint is a folder named after its step. It is written in the background and counts only when complete.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import jax
from orbax.checkpoint import v1 as ocp

from jaxlm.tree import named_leaves
from jaxlm.types import Params, TrainState

FORMAT = 1
Json = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Close it when done, or use it in a `with` statement.

    Args:
        folder: where they are; it is made with the first one.
        about: what else a reader must know, as JSON: the model's shape, the tokenizer, which data. It is saved with
            every state, and must be the same when one is restored.
        keep: how many to keep, the newest ones.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(self, folder: str | os.PathLike[str], about: Json, *, keep: int = 2):
        self._about: Json = json.loads(json.dumps(about))
        if keep < 1:
            raise ValueError(f"Checkpoints: keep is {keep}; use 1 or more")
        # A file in each complete checkpoint marks it: renaming alone would let half-deleted ones pass for complete.
        context = ocp.Context()
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        self._checkpointer = ocp.training.Checkpointer(
            str(Path(folder).absolute()),
            context=context,
            cleanup_tmp_directories=True,
            preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(keep)),
        )
        self._saving: ocp.AsyncResponse[bool] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        self.wait()
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState) -> None:
        """Begins to save a state under its step, and returns once it is safe to donate it.

        Does nothing if its step is the newest one already.

        Raises:
            OSError: this save can't begin, or the one before it failed; that one is lost, older ones are intact.
        """
        step = int(state.step)
        if self.latest == step:
            return
        parts = _parts(state)
        metadata: Json = {
            "format": FORMAT,
            "about": self._about,
            "leaves": {name: _shapes(part) for name, part in parts.items()},
        }
        with _disk_errors():
            self._saving = self._checkpointer.save_checkpointables_async(
                step, parts, force=True, custom_metadata=metadata
            )

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            OSError: it failed; older checkpoints are intact.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with _disk_errors():
                saving.result()

    def restore(self, like: TrainState) -> TrainState | None:
        """The state of the newest complete checkpoint; None if there is none.

        Args:
            like: the state that is expected, or its shapes and shardings; the result lies on devices as it does.

        Raises:
            ValueError: the checkpoint is `about` something else, or holds other leaves, shapes or dtypes than `like`;
                the first difference is named.
        """
        step = self.latest
        if step is None:
            return None
        saved: Json = cast(Json, self._checkpointer.checkpointables_metadata(step).custom_metadata)
        _check_format(saved, step)
        parts = _parts(like)
        _check_same(step, _flat(saved["about"]), _flat(self._about))
        for name, part in parts.items():
            _check_same(step, saved["leaves"][name], _shapes(part))
        loaded = self._checkpointer.load_checkpointables(step, jax.tree.map(_abstract, parts))
        return TrainState(params=loaded["params"], **loaded["rest"])

    def close(self) -> None:
        """Waits for the last save, and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def load_params(folder: str | os.PathLike[str]) -> tuple[Params, Json]:
    """The parameters in the newest complete checkpoint, on the first device, and what was said `about` them.

    They must have been nested dicts of arrays, as those of jaxlm's models are.

    Args:
        folder: the folder of a run's checkpoints.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
    """
    folder = Path(folder).absolute()
    complete = [path.parent for path in folder.glob("*/commit_success.txt") if path.parent.name.isdecimal()]
    if not complete:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint")
    newest = max(complete, key=lambda path: int(path.name))
    saved: Json = cast(Json, ocp.checkpointables_metadata(str(newest)).custom_metadata)
    _check_format(saved, int(newest.name))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract: Json = {}
    for name, shape in saved["leaves"]["params"].items():
        *parents, last = name.split("/")
        branch = abstract
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = jax.ShapeDtypeStruct(shape[1:], shape[0], sharding=sharding)
    return ocp.load_checkpointables(str(newest), {"params": abstract})["params"], saved["about"]


def _parts(state: TrainState) -> dict[str, Any]:
    """What is saved under names of their own, so that the parameters can be read alone. None may be without a leaf."""
    return {"params": state.params, "rest": {"step": state.step, "opt_state": state.opt_state}}


def _shapes(tree: Any) -> dict[str, list[Any]]:
    """The dtype and shape of each leaf, as JSON: `{"embed": ["float32", 258, 128]}`."""
    return {name: [str(leaf.dtype), *leaf.shape] for name, leaf in named_leaves(tree).items()}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _check_format(saved: Json, step: int) -> None:
    if not saved or saved.get("format") != FORMAT:
        raise ValueError(f"checkpoint {step} is not of format {FORMAT}, which is this version's")


def _check_same(step: int, saved: Json, expected: Json) -> None:
    for name in {**saved, **expected}:
        if saved.get(name) != expected.get(name):
            raise ValueError(
                f"checkpoint {step} has {name} {saved.get(name)}, but this run has {expected.get(name)}; go on with "
                "the model, optimizer and data that it was saved with, or use another folder"
            )


def _flat(about: Json, prefix: str = "") -> Json:
    """`{"model": {"width": 128}}` as `{"model/width": 128}`."""
    flat: Json = {}
    for name, value in about.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@contextlib.contextmanager
def _disk_errors() -> Generator[None]:
    """Turns Orbax's many ways to say that the disk is full into the one that Python has."""
    try:
        yield
    except Exception as error:
        text, cause = "", error
        while cause is not None:
            text, cause = f"{text} {cause}", cause.__cause__ or cause.__context__
        if isinstance(error, OSError) or not re.search("No space left|quota exceeded|File too large", text):
            raise
        message = "the disk is full: the checkpoint was not saved, older ones are intact"
        raise OSError(errno.ENOSPC, message) from error
