"""Where documents come from."""

import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from jaxlm.files import exists, fail, is_file, redacted

LARGEST_DOCUMENT: Final = 2**30
"""Bytes that a document may have, for each is in memory whole: what unpacks to more is none."""


class Document(NamedTuple):
    """A text and where it came from."""

    name: str
    text: bytes


def text_files(
    folder: str | os.PathLike[str],
    suffixes: Iterable[str] = (".txt", ".md", ".py"),
    *,
    leave_out: Collection[str] = (),
) -> Iterator[Document]:
    """The files in a folder and those below it, in order of their names, read one at a time.

    Args:
        folder: where.
        suffixes: how the names of wanted files end.
        leave_out: names of folders and files to leave out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no file has one of the suffixes, or it or a folder is a link out of the folder, or to nothing; or at
            its turn, a file of more than 1 GiB.
    """
    given, folder, suffixes = os.fspath(folder), Path(folder), tuple(suffixes)
    if not folder.is_dir():
        raise FileNotFoundError(f"{redacted(given)} is not a folder")
    below, inside = files_below(folder, leave_out), folder.resolve()
    paths = [path for path in below if path.name.endswith(suffixes) and path.name not in leave_out]
    for path in paths:
        refuse_link_out(path, inside)
    found = [path for path in paths if is_file(path)]
    if not found:
        raise ValueError(f"{folder} has no text: no file in it ends in one of {suffixes}")
    names = sorted(file.relative_to(folder) for file in found)
    return (Document(name.as_posix(), _content(folder / name)) for name in names)


def files_below(folder: Path, leave_out: Collection[str]) -> Iterator[Path]:
    """What is in a folder and those below it, but for folders of these names, and for links to folders within it.

    Raises:
        ValueError: a link to a folder elsewhere: it would be left out, or lead out.
    """
    inside = folder.resolve()
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in leave_out]
        for name in folders:
            refuse_link_out(Path(parent, name), inside)
        yield from (Path(parent, name) for name in names)


def refuse_link_out(path: Path, inside: Path) -> None:
    """Raises a `ValueError` if a path isn't inside a folder, of which links are resolved, but behind a link there."""
    if not path.resolve().is_relative_to(inside):
        raise ValueError(f"{path} is a link to {path.resolve()}, out of the folder; put what is there itself into it")
    if path.is_symlink() and not exists(path):
        raise ValueError(f"{path} is a link to {path.resolve()}, where nothing is; remove it, or bring that back")


def _content(file: Path) -> bytes:
    if (size := file.stat().st_size) > LARGEST_DOCUMENT:
        raise ValueError(
            f"{file} has {size} bytes, and a document {LARGEST_DOCUMENT} at most; cut it into several files"
        )
    return file.read_bytes()


def python_library() -> Iterator[Document]:
    """The sources of the running Python's standard library without its tests: 11 MB of text that is always there."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    links = {path.name for path in folder.iterdir() if path.is_symlink()}  # Debian's into /etc
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", *links}
    return text_files(folder, [".py"], leave_out=left_out)
