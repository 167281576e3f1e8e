"""What lies on the disk. A checkpoint is a folder named after its step; what has another name counts for nothing.

`12` is whole, `12.unfinished` is being written or removed, `12.damaged-1` was set aside, and `12.rewound` will be
removed once the run has saved anew. In each the manifest says which files there are, which leaves they hold, and the
fingerprint of each leaf.
"""

import json
import math
import os
import shutil
import stat
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

from jaxlm import files
from jaxlm.output import warn

Json = dict[str, Any]
Scores = Mapping[int, float | None]  # by steps; None: it was lost

FORMAT: Final = 2
MANIFEST: Final = "jaxlm.json"
SCORES: Final = "scores.json"
SMALL: Final = 2**24
"""Bytes up to which a file has a checksum, since it may be one of those that say what the others mean. What larger ones
hold is held against the fingerprints of leaves."""


class DamagedError(Exception):
    """A checkpoint isn't what was saved; the message names the file or the leaf."""

    def __init__(self, why: str):
        super().__init__(f"{why:.500}")  # where a name in it is damaged too


def whole(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, the oldest first; none if there is no folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii() and name == str(int(name)))


def aside(folder: Path) -> list[str]:
    """The names of those that were set aside."""
    return sorted(name for name in os.listdir(folder) if ".damaged-" in name or name.endswith(".rewound"))


def unfinished(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return folder / f"{step}.unfinished"


def sweep(folder: Path, what: str = "unfinished") -> None:
    """Removes what was left unfinished, or was rewound."""
    for path in [folder / name for name in os.listdir(folder) if name.endswith(f".{what}")]:
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)


def commit(folder: Path, step: int, manifest: Json) -> None:
    """Makes the unfinished checkpoint whole, at once, and after all of it is on the disk."""
    path = unfinished(folder, step)
    checksums = {name: [size, _checksum(path / name, size)] for name, size in _sizes(path).items()}
    (path / MANIFEST).write_text(files.signed({**manifest, "files": checksums}))
    for parent, _, names in os.walk(path, topdown=False, onerror=files.fail):
        for name in names:
            files.sync(Path(parent, name))
        files.sync(Path(parent))
    path.rename(folder / str(step))
    files.sync(folder)


def read(folder: Path, step: int) -> Json:
    """The manifest of a checkpoint, whose files are as it says.

    Raises:
        DamagedError: they aren't.
        ValueError: another version has written it.
    """
    path = folder / str(step)
    if path.is_symlink():
        raise DamagedError("its folder is a symbolic link")
    try:
        manifest = files.read_signed(path / MANIFEST)
    except (OSError, ValueError) as error:
        raise DamagedError(str(error)) from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {manifest.get('format')!r:.100}; this version reads {FORMAT}")
    _check_form(manifest)
    try:
        sizes = _sizes(path)
        for name, (size, checksum) in manifest["files"].items():
            if name not in sizes:
                raise DamagedError(f"{name} is missing")
            if sizes[name] != size:
                raise DamagedError(f"{name} doesn't have its {size} bytes")
            if checksum is not None and _checksum(path / name, size) != checksum:
                raise DamagedError(f"{name} has another content than was saved")
    except OSError as error:
        raise DamagedError(f"a file can't be read: {error}") from None
    return manifest


def remove(folder: Path, step: int) -> None:
    """Removes a checkpoint, which counts for nothing from the first moment on."""
    gone = (folder / str(step)).rename(unfinished(folder, step))
    shutil.rmtree(gone, ignore_errors=True)


def rewind(folder: Path, step: int) -> None:
    """Lets a checkpoint count for nothing, until `sweep` removes it."""
    rewound = folder / f"{step}.rewound"
    if rewound.is_symlink():
        rewound.unlink()
    elif rewound.exists():  # of a run that was killed while it removed that
        shutil.rmtree(rewound)
    (folder / str(step)).rename(rewound)
    files.sync(folder)


def set_aside(folder: Path, step: int) -> str:
    """Renames a damaged checkpoint, so that it counts for nothing, and returns its new name."""
    taken = set(aside(folder))
    name = next(name for i in range(1, len(taken) + 2) if (name := f"{step}.damaged-{i}") not in taken)
    (folder / str(step)).rename(folder / name)
    files.sync(folder)
    return name


def kept(steps: Collection[int], scores: Scores, *, keep: int, keep_every: int | None) -> set[int]:
    """Which to keep: the newest, every so many steps, the one with the lowest score, and those whose score is lost.

    >>> sorted(kept([10, 20, 30, 40, 50], {20: 1.5, 30: 1.7}, keep=2, keep_every=None))
    [20, 40, 50]
    """
    newest = set(sorted(steps)[-keep:])
    now_and_then = {step for step in steps if keep_every and step % keep_every == 0}
    scored = [(score, -step) for step, score in scores.items() if step in steps and score is not None]
    best = {-step for _, step in sorted(pair for pair in scored if not math.isnan(pair[0]))[:1]}
    return newest | now_and_then | best | {step for step in steps if step in scores and scores[step] is None}


def read_scores(folder: Path) -> dict[int, float | None]:
    """The scores that were noted. If they can't be read, that of every checkpoint there is lost."""
    try:
        found = files.read_json(folder / SCORES)
        return {int(step): None if score is None else float(score) for step, score in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, OverflowError) as error:
        steps = whole(folder)
        warn(f"{folder / SCORES} can't be read: {error!s:.300}; since one of {steps} may be the best, all are kept")
        return dict.fromkeys(steps)


def write_scores(folder: Path, scores: Scores) -> None:
    """Notes all scores."""
    files.write_whole(folder / SCORES, json.dumps({str(step): score for step, score in sorted(scores.items())}))


def _sizes(path: Path) -> dict[str, int]:
    """The size of each file in a folder, by its path within; what is neither file nor folder is refused."""
    sizes: dict[str, int] = {}
    for entry in _entries(path):
        name, status = os.path.relpath(entry.path, path), entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{name} is neither a file nor a folder, but perhaps a link")
        sizes[name] = status.st_size
    return dict(sorted(sizes.items()))


def _entries(path: Path) -> Iterator[os.DirEntry[str]]:
    folders = [os.fspath(path)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield entry


def _checksum(path: Path, size: int) -> str | None:
    return f"{zlib.crc32(path.read_bytes()):08x}" if size <= SMALL else None


def _check_form(manifest: Json) -> None:
    """Refuses what no version has written, so that nobody who reads it need be careful."""

    def leaf(value: Any) -> bool:
        return (
            isinstance(value, list)
            and [type(part) for part in cast(list[Any], value)] == [str, list, str]
            and len(value[1]) <= 32
            and all(type(size) is int and 0 <= size < 2**62 for size in value[1])
        )

    def file(value: Any) -> bool:
        return isinstance(value, list) and [type(part) for part in cast(list[Any], value)] in (
            [int, str],
            [int, type(None)],
        )

    for name, fits in {"about": lambda _: True, "leaves": leaf, "files": file}.items():
        part = manifest.get(name)
        if not isinstance(part, dict):
            raise DamagedError(f"{MANIFEST} has no {name}")
        for key, value in cast(Json, part).items():
            if not fits(value):
                raise DamagedError(f"{MANIFEST} says something else than it should of {name}/{key}")
