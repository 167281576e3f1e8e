"""Files that are there whole or not at all, and folders that one process at a time writes to."""

import errno
import fcntl
import json
import os
import re
import socket
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TextIO, cast

LOCK: Final = ".lock"
"""The file in a folder by which a process holds it."""

DEEPEST: Final = 100
"""JSON that is nested deeper was written by nobody here, and Python's own limit depends on who calls."""

NAME: Final = re.compile(r"\w[\w.=+,-]{0,99}(/\w[\w.=+,-]{0,99}){0,9}")
"""What `within` takes: no part of it begins with a dot, and none is empty."""

DISK_ERRORS: Final = {
    code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
}
"""What the system says of a disk that is full or fails, by its number: what may be over when a run is started again.
Linux makes a file system read-only once it has failed."""

LARGEST: Final = 2**27
"""Bytes that a file may have which is read whole: no manifest or vocabulary has nearly as many, another file may."""

_HELD: dict[tuple[int, Path], tuple[int, int]] = {}
"""The open file of each lock of this process, by the process' id and the folder, and how often it was locked."""

SECRETS: Final = (
    re.compile(r"(://)(?:[^/\s\"']+|[^/\s\"':]*:(?!\d+/)[^\s\"']+)(?=@)"),
    re.compile(
        r"([?&;#][^=&;#\s\"']*(?:key|token|secret|sig|password|credential|auth(?!or))[^=&;#\s\"']*=)[^&;#\s\"']+",
        re.IGNORECASE,
    ),
)
"""Of URLs: users and passwords, which may hold a slash, and parameters that stand for them."""


def redacted(said: Any) -> Any:
    """A text, or JSON with all texts in it, without the users, passwords and tokens of the URLs there.

    >>> redacted("s3://me:hush@host/x?X-Amz-Signature=hush&part=2")
    's3://...@host/x?X-Amz-Signature=...&part=2'
    """
    if isinstance(said, Mapping):
        return {redacted(name): redacted(value) for name, value in cast(Mapping[Any, Any], said).items()}
    if isinstance(said, list | tuple):
        return [redacted(value) for value in cast(Sequence[Any], said)]
    if isinstance(said, str):
        for secret in SECRETS:
            said = secret.sub(r"\1...", said)
    return said


def within(folder: Path, name: str) -> Path:
    """The path of that name, such as `first` or `wide/first`, in a folder.

    Raises:
        ValueError: the name leads elsewhere, be it by a symbolic link, or has other characters than it may.

    >>> within(Path("runs"), "../first")
    Traceback (most recent call last):
    ValueError: '../first' must be a folder within runs, no link out, of letters, digits and _.=+,- as in 'wide/lr=3e-4'
    """
    if NAME.fullmatch(name) is None or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{redacted(name)!r:.300} must be a folder within {folder}, no link out, of letters, digits and "
            "_.=+,- as in 'wide/lr=3e-4'"
        )
    return folder / name


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, also if the power fails."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with create(unfinished) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync(path.parent)


def disk_error(error: BaseException | None) -> int | None:
    """The number of an error of a disk that is full or fails; None: it is another error."""
    return error.errno if isinstance(error, OSError) and error.errno in DISK_ERRORS else None


def fail(error: OSError) -> None:
    """For `os.walk`, which otherwise leaves out what it can't read."""
    raise error


def exists(path: Path) -> bool:
    """Whether there is something of that name, and no link that leads nowhere.

    Raises:
        OSError: the system can't tell, which Python 3.14's `Path.exists` takes for no.
    """
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Whether there is such a file, which is no pipe or folder. Raises what `exists` does."""
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return 0


def create(path: Path) -> TextIO:
    """Opens a new file for writing in place of the one that is there: through a link another would be written to."""
    path.unlink(missing_ok=True)
    return path.open("x", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON. What its entries are is for the caller to check.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, and is named.
    """
    return parse_json(read_small(path), str(path))


def read_small(path: Path) -> bytes:
    """The content of a file that is read whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large for that.
    """
    if not is_file(path):  # but perhaps a pipe, which would have nobody to end it
        raise FileNotFoundError(f"{path} is not there, or no file")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size} bytes, more than any such file: is it another one?")
    return path.read_bytes()


def signed(content: Mapping[str, Any]) -> str:
    """JSON whose last entry is a checksum of the others, for `read_signed`."""
    return json.dumps({**content, "checksum": f"{zlib.crc32(json.dumps(content).encode()):08x}"}, indent=1)


def read_signed(path: Path) -> dict[str, Any]:
    """The object in a file of JSON that `signed` has made, without the checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than was written, and is named.
    """
    text = read_small(path)
    found = parse_json(text, str(path))
    found.pop("checksum", None)
    if signed(found).encode() != text:
        raise ValueError(f"{path} is damaged: it doesn't have the checksum that it says")
    return found


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object in JSON; a `ValueError` says `where` it holds something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: it holds no JSON object")
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        containers = (part for part in level if isinstance(part, dict | list))
        level = [inner for part in containers for inner in (part.values() if isinstance(part, dict) else part)]
    if level:
        raise ValueError(f"{where} is damaged: it is nested more than {DEEPEST} deep")
    return cast(dict[str, Any], found)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def lock(folder: Path) -> Callable[[], None]:
    """Holds a folder for this process, which may do so again, until it has let go as often or ends, however it ends.

    It is a lock of POSIX: the kernel releases it, network file systems pass it on, and children that are forked don't
    inherit it.

    Args:
        folder: an existing one. It gets a file `.lock`, which stays; nobody should remove it.

    Returns:
        What lets go of it.

    Raises:
        RuntimeError: another process holds it, which is named.
        OSError: the file system has no locks, or can't be written to.
    """
    key = os.getpid(), folder.resolve()
    file, times = _HELD.get(key) or (_acquire(folder), 0)
    _HELD[key] = file, times + 1

    def release() -> None:
        file, times = _HELD.pop(key)
        if times > 1:
            _HELD[key] = file, times - 1
        else:
            os.close(file)

    return release


def _acquire(folder: Path) -> int:
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException as error:
        holder = os.pread(file, 300, 0).decode(errors="replace") or "another process"
        os.close(file)
        if isinstance(error, BlockingIOError | PermissionError):
            raise RuntimeError(
                f"{folder} is in use by {holder}; wait until that ends, end it, or use another folder"
            ) from None
        raise
    return file
