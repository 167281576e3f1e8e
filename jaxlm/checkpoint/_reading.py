"""What is in a checkpoint, and whether that is what was saved; and whether what is to be saved is of one mind."""

import collections
import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import tensorstore
from orbax.checkpoint import v1 as ocp

from jaxlm import distributed, files
from jaxlm.checkpoint import _folder
from jaxlm.checkpoint._folder import DamagedError, Json
from jaxlm.fingerprint import copies, copies_agree, fingerprints
from jaxlm.output import warn
from jaxlm.tree import named_leaves, nbytes
from jaxlm.types import Params

T = TypeVar("T")
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def load_params(folder: str | os.PathLike[str], step: int | None = None) -> tuple[Params, Json]:
    """The parameters in the newest checkpoint that is whole, on the first device, and what was said `about` them.

    They must have been nested dicts of arrays, as those of jaxlm's models are. Each is held against its fingerprint.

    Args:
        folder: the folder of a run's checkpoints.
        step: use this one and no other.

    Raises:
        FileNotFoundError: there is no checkpoint.
        RuntimeError: there are some, but none that isn't damaged; or the parameters need more memory than there is.
    """
    folder = Path(folder).absolute()
    steps = [found for found in reversed(_folder.whole(folder)) if step in (None, found)]
    if not steps:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint{'' if step is None else f' of step {step}'}")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for found in steps:
        try:
            manifest = _folder.read(folder, found)
            like = _nested(manifest["leaves"], sharding)
            _check_room(found, like)
            loaded = load(folder / str(found), like)
            check(manifest, loaded)
            return loaded["params"], manifest["about"]
        except DamagedError as damage:
            report_damage(found, str(damage), "is damaged and not used")
    raise RuntimeError(none_whole(folder, [*map(str, steps)]))


def _nested(leaves: Json, sharding: jax.sharding.Sharding) -> Json:
    """The shapes of the parameters as nested dicts, by the names of their leaves, and of nothing else."""
    like: Json = {"params": {}}
    for name, (dtype, shape, _) in leaves.items():
        *parents, last = name.split("/")
        if {"", ".", ".."} & {*parents, last}:
            raise DamagedError(f"{name!r} is no name of a leaf")  # but perhaps of a file elsewhere
        if name.startswith("params/"):
            branch = like
            try:
                for parent in parents:
                    branch = branch.setdefault(parent, {})
                branch[last] = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
            except (TypeError, AttributeError) as error:
                raise DamagedError(f"{name} can't be a leaf: {error}") from None
    return like


def _check_room(step: int, like: Json) -> None:
    needs, has = nbytes(like), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container, by either version
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            has = min(has, int((_CONTROL_GROUP / limit).read_text()))
    if needs > has:
        raise RuntimeError(
            f"checkpoint {step} says that its parameters have {needs} bytes, and this machine's memory has {has}; "
            "load them where there is more, if that is what they should have"
        )


def or_damage(work: Callable[..., T], *arguments: Any) -> tuple[T | None, str | None]:
    """What a function returns, or what it finds damaged."""
    try:
        return work(*arguments), None
    except DamagedError as damage:
        return None, str(damage)


def or_damage_of_any(work: Callable[..., T], *arguments: Any) -> tuple[T | None, str | None]:
    """What a function returns, and what it finds damaged in any process. All must call it."""
    found, damage = or_damage(work, *arguments)
    return found, next(filter(None, distributed.exchange(damage)), None)


def load(path: Path, like: Json) -> Json:
    """The arrays in a checkpoint.

    Args:
        path: its folder.
        like: their shapes and shardings.

    Raises:
        DamagedError: they can't be read, or have other shapes and dtypes.
    """
    context, own = ocp.Context(), jax.process_index()
    # Each process reads for itself: Orbax would let those for which all is well wait for one that fails.
    alone = context.multiprocessing_options
    alone.primary_host, alone.active_processes, alone.barrier_sync_key_prefix = own, {own}, str(own)
    try:
        for name, part in like.items():
            _check_pieces(path / name, part)
        with context:
            loaded = ocp.load_checkpointables(str(path), like)
    except Exception as error:
        *_, root = chain = list(causes(error))
        if any(isinstance(cause, MemoryError | jax.errors.JaxRuntimeError) for cause in chain):
            raise  # an older one would fail too
        damage = " ".join(f"{type(root).__name__}: {root}".split())[:300]
        del error, root, chain
    else:
        expected = shapes(like)
        for name, found in shapes(loaded).items():
            if found != expected[name]:  # such as a key that is read as its bits, where it isn't said to be one
                raise DamagedError(f"{name} is read as {found}, and was {expected[name]} when it was saved")
        return loaded
    with warnings.catch_warnings(action="ignore"):  # about coroutines that Orbax began and now nobody waits for
        gc.collect()
    raise DamagedError(damage)


def _check_pieces(path: Path, like: Json) -> None:
    """That no piece of an array has more than the array: each is unpacked whole."""
    about = files.read_json(path / "_METADATA")
    if not (about.get("use_ocdbt") and about.get("use_zarr3")):
        raise ValueError("arrays are stored in another way than they should be")
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}).result()
    keys = [key for key in store.list().result() if key.endswith(b"zarr.json")]
    if len(keys) != len(jax.tree.leaves(like)):
        raise ValueError(f"{len(keys)} arrays are stored, rather than {len(jax.tree.leaves(like))}")
    for key in keys:
        name = key.decode(errors="replace")
        array = files.parse_json(store.read(key).result().value, name)
        for piece in _pieces(array):
            if any(size > max(1, of) for size, of in zip(piece, array["shape"], strict=True)):
                raise ValueError(f"{name} has pieces of {piece} of {array['shape']}")


def _pieces(array: Any) -> Iterator[Any]:
    """The shapes of pieces, and of pieces of pieces, that the description of an array has."""
    if isinstance(array, dict):
        for name, value in cast(Json, array).items():
            yield from [value] if name == "chunk_shape" else _pieces(value)
    elif isinstance(array, list):
        for value in cast(list[Any], array):
            yield from _pieces(value)


def shapes(parts: Json) -> Json:
    """The dtype and shape of each leaf, as JSON: `{"params/embed": ["float32", [258, 128]]}`."""
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named_leaves(parts).items()}


def check(manifest: Json, loaded: Json) -> None:
    """Refuses arrays that aren't what was saved, and names the first."""
    for name, found in fingerprints(loaded).items():
        saved = manifest["leaves"][name][2]
        if found != saved:
            raise DamagedError(f"{name} has the fingerprint {found}, and had {saved} when it was saved")


def check_copies(to: str, step: int, parts: Json) -> None:
    """That what several devices hold is the same on all, `to` save or restore it. All processes must call it."""
    if copies_agree(parts):
        return
    having: dict[str, dict[str, list[str]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for said in distributed.exchange(copies(parts)):
        for part, prints in said.items():
            for value, devices in prints.items():
                having[part][value] += devices
    for part, prints in having.items():
        if len(prints) > 1:
            fewest, *others = sorted(prints.values(), key=len)
            raise RuntimeError(
                f"{to}: at step {step} {part} on {', '.join(fewest[:4])} isn't what it is on {sum(map(len, others))} "
                f"other devices. Nothing was {to}d: leave out what errs, and go on from the newest checkpoint"
            )
    raise RuntimeError(
        f"{to}: at step {step} devices differed in what several of them hold, and a moment later did not: one errs now "
        f"and then. Nothing was {to}d: find it (a test of the hardware), and go on from the newest checkpoint"
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def report_damage(step: int, damage: str | None, what: str) -> None:
    """Says what becomes of a checkpoint, once for all processes."""
    if distributed.first():
        warn(f"checkpoint {step} {what}: {damage}")


def none_whole(folder: Path, names: list[str]) -> str:
    """The message for where nothing can be restored."""
    return (
        f"{folder} has no checkpoint that is whole, but {', '.join(names)}; bring one back from a copy, name one "
        "back that was rewound, or start anew in another folder"
    )
