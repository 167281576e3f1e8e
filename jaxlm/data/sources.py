"""Shards of documents: files of several formats, from here or from any URL that fsspec knows."""

import errno
import functools
import gzip
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from jaxlm.data.text import LARGEST_DOCUMENT, Document, files_below, refuse_link_out
from jaxlm.files import LARGEST, redacted
from jaxlm.optional import optional

Stream = Any  # a file opened for reading bytes: a BinaryIO, but what gzip and fsspec give is none to the letter
BATCH = 64  # rows of a table that are in memory at once
FEW = 4  # of Parquet, where what is stored once may be the text of every row


class UnreadableError(ValueError):
    """A shard that can't be read to its end."""


class Shard(NamedTuple):
    """A part of a source: what is read, or can't be, as a whole."""

    name: str
    version: str
    """Differs if the content does: its size and the time of its last change, or a hash."""
    size: int
    """Bytes where it is stored, for showing progress."""
    open: Callable[[], Iterator[Document]]
    """Gives its documents, in order; raises `UnreadableError` if it can't. To be called by other processes it must
    pickle."""


class Reader(NamedTuple):
    """How to read files of a format."""

    suffixes: tuple[str, ...]
    """How the names of its files end, without `.gz` and `.zst`, which are unpacked first."""
    read: Callable[[Stream, str], Iterator[Document]]
    """From an open file and its name to its documents. What is packed may hold far more than its size says."""


def plain_text(suffixes: Iterable[str] = (".txt", ".md", ".py")) -> Reader:
    """Each file is a document."""
    return Reader(tuple(suffixes), _read_text)


def json_lines(field: str = "text", suffixes: Iterable[str] = (".jsonl", ".ndjson")) -> Reader:
    """Each line, of 128 MiB at most, is a JSON object with a string in `field`, which is a document."""
    return Reader(tuple(suffixes), functools.partial(_read_json_lines, field))


def parquet(column: str = "text", suffixes: Iterable[str] = (".parquet",)) -> Reader:
    """Each row of a Parquet file is a document, strings or bytes in `column`. Null is an empty one."""
    return Reader(tuple(suffixes), functools.partial(_read_parquet, column))


def array_record(
    text: Callable[[bytes], bytes] = bytes, suffixes: Iterable[str] = (".array_record", ".arrayrecord")
) -> Reader:
    """Each record of an ArrayRecord file is a document, by what `text` makes of it. Such files aren't packed again."""
    return Reader(tuple(suffixes), functools.partial(_read_array_record, text))


def shards(
    path: str | os.PathLike[str], readers: Sequence[Reader] | None = None, *, leave_out: Collection[str] = ()
) -> list[Shard]:
    """The files in a folder and those below it, or a single file, in order of their names: each is a shard.

    Args:
        path: a path, or a URL that fsspec knows, such as `gs://bucket/folder`.
        readers: the first whose suffix a file has reads it; files without one are left out. None: text, JSON lines,
            Parquet and ArrayRecord by their usual names, the text being in `text`.
        leave_out: names of folders not to look into.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no file has one of the suffixes, or a file that does isn't in the folder: its name leaves it, or
            it, or a folder there, is a link out of it or to nothing.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "b.txt").write_text("A file."), (folder / "a.jsonl").write_text('{"body": "A line."}')
    >>> [next(shard.open()) for shard in shards(folder, [plain_text(), json_lines("body")])]
    [Document(name='a.jsonl:1', text=b'A line.'), Document(name='b.txt', text=b'A file.')]
    """
    readers = (plain_text(), json_lines(), parquet(), array_record()) if readers is None else readers
    place = os.fspath(path)
    list_files = _remote_files if "://" in place.removeprefix("file://") else _local_files
    found: list[Shard] = []
    for file in sorted(list_files(place.removeprefix("file://"), leave_out), key=lambda file: file.name):
        if (reader := _reader_of(file.name, readers)) is None:
            continue
        version, size = file.describe()
        version = f"{version}-{_name_of(reader.read)}"  # what another reader makes of it is something else
        read = functools.partial(_read_file, file.open, file.name, reader.read)
        found.append(Shard(file.name, version, size, functools.partial(_read, file.name, read)))
    if not found:
        suffixes = [suffix for reader in readers for suffix in reader.suffixes]
        raise ValueError(f"{redacted(place)} has no text: no file's name ends in one of {', '.join(suffixes)}")
    return found


def hugging_face(
    dataset: str | os.PathLike[str], *, split: str = "train", column: str = "text", rows: int = 100_000
) -> list[Shard]:
    """A column of strings of a Hugging Face dataset, which `datasets` loads; no code of the dataset's is ever run.

    Args:
        dataset: a folder that `save_to_disk` wrote, or the name of a dataset.
        split: which of its splits.
        column: where the text is.
        rows: how many make a shard.

    Raises:
        ImportError: `datasets` isn't installed.
        ValueError: there is no such split or column.
    """
    name = os.fspath(dataset)
    table = _load_dataset(name, split)
    if column not in table.column_names:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(table.column_names)}")
    found: list[Shard] = []
    for start in range(0, len(table), rows):
        some = range(start, min(start + rows, len(table)))
        label, version = f"{name}:{split}:{start}", f"{table._fingerprint}-{column}-{rows}"
        read = functools.partial(_read_dataset, name, split, column, some)
        size = table.data.nbytes * len(some) // len(table)
        found.append(Shard(label, version, size, functools.partial(_read, label, read)))
    return found


def _name_of(part: Any) -> str:
    """A function by its name, with what it was given first; a text as it is, and anything else by its type."""
    if isinstance(part, functools.partial):
        return f"{_name_of(part.func)}({', '.join(map(_name_of, (*part.args, *part.keywords.values())))})"
    return part if isinstance(part, str) else getattr(part, "__qualname__", type(part).__qualname__)


class _File(NamedTuple):
    name: str
    describe: Callable[[], tuple[str, int]]
    """Gives what tells whether it changes, and its size."""
    open: Callable[[], Stream]


def _local_files(path: str, leave_out: Collection[str]) -> Iterator[_File]:
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{root} is neither a file nor a folder")
    if not root.is_dir():
        yield _File(root.name, functools.partial(_describe_local, root), functools.partial(open, root, "rb"))
        return
    inside = root.resolve()
    for file in files_below(root, leave_out):
        describe, opened = functools.partial(_describe_local, file, inside), functools.partial(open, file, "rb")
        yield _File(file.relative_to(root).as_posix(), describe, opened)


def _describe_local(file: Path, inside: Path | None = None) -> tuple[str, int]:
    if inside:
        refuse_link_out(file, inside)
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} is not a regular file; remove it or leave it out")
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}", found.st_size


def _remote_files(url: str, leave_out: Collection[str]) -> Iterator[_File]:
    system, root = optional("fsspec").url_to_fs(url)
    found = cast(dict[str, dict[str, Any]], system.find(root, detail=True))
    if not found:
        raise FileNotFoundError(f"{redacted(url)} is neither a file nor a folder with files")
    for path, about in found.items():
        name = redacted(path.removeprefix(root).removeprefix("/") or PurePosixPath(path).name)
        parts = PurePosixPath(name).parts
        if ".." in parts or PurePosixPath(name).is_absolute() or not path.startswith(root):
            raise ValueError(
                f"{redacted(url)} has a file whose name leaves it, {redacted(path)!r}; rename or remove it"
            )
        if not set(parts[:-1]) & set(leave_out):
            # Where a file is and how large, when it was changed or its hash, as far as the file system tells.
            version = json.dumps(about, sort_keys=True, default=str)
            described = version, about.get("size") or 0
            yield _File(name, lambda described=described: described, functools.partial(system.open, path, "rb"))


def _reader_of(name: str, readers: Sequence[Reader]) -> Reader | None:
    name = name.removesuffix(".gz").removesuffix(".zst")
    return next((reader for reader in readers if name.endswith(reader.suffixes)), None)


def _read(name: str, read: Callable[[], Iterator[Document]]) -> Iterator[Document]:
    try:
        for document in read():
            if len(document.text) > LARGEST_DOCUMENT:
                raise ValueError(
                    f"{document.name} is longer than the {LARGEST_DOCUMENT} bytes of a document; cut it up"
                )
            yield document
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each format has its own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # of a copy that was being made
        raise UnreadableError(redacted(f"{name} can't be read: {str(error) or repr(error):.500}")) from error


def _read_file(
    opened: Callable[[], Stream], name: str, read: Callable[[Stream, str], Iterator[Document]]
) -> Iterator[Document]:
    with opened() as stream:
        if not name.endswith((".gz", ".zst")):
            yield from read(stream, name)
            return
        if not stream.read(1):
            raise EOFError("it is empty")  # what is packed never is
        stream.seek(0)
        with _unpacked(stream, name) as unpacked:
            yield from read(unpacked, name)


def _unpacked(stream: Stream, name: str) -> Stream:
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=stream))
    arrow = optional("pyarrow")  # unlike other readers of zstd it tells when the end is missing
    return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(stream, mode="r"), "zstd"))


def _read_text(stream: Stream, name: str) -> Iterator[Document]:
    text = bytearray()
    while block := stream.read(2**20):
        text += block
        if len(text) > LARGEST_DOCUMENT:
            raise ValueError(f"it is longer than the {LARGEST_DOCUMENT} bytes of a document; cut it up")
    yield Document(name, bytes(text))


def _read_json_lines(field: str, stream: Stream, name: str) -> Iterator[Document]:
    # What fsspec opens may have a readline that takes no size.
    lines = stream if isinstance(stream, io.BufferedIOBase) else io.BufferedReader(stream)
    for number, line in enumerate(iter(lambda: lines.readline(LARGEST + 1), b""), 1):
        if len(line) > LARGEST:
            raise ValueError(f"line {number} is longer than the {LARGEST} bytes of a line; cut it up")
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON ({error})") from None
        if not isinstance(found, dict) or field not in found:
            raise ValueError(f"line {number} is not an object with a field {field!r}")
        text = cast(dict[str, Any], found)[field]
        if not isinstance(text, str):
            raise ValueError(f"line {number} has {type(text).__name__}, not a string, in {field!r}")
        # JSON can hold halves of characters, which UTF-8 can't.
        yield Document(f"{name}:{number}", text.encode(errors="surrogatepass"))


def _read_parquet(column: str, stream: Stream, name: str) -> Iterator[Document]:
    arrow = optional("pyarrow")
    with optional("pyarrow.parquet").ParquetFile(stream) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(f"there is no column {column!r}; there is {', '.join(names)}")
        number = 0
        for batch in file.iter_batches(FEW, columns=[column]):
            for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                yield Document(f"{name}:{(number := number + 1)}", value or b"")


def _read_array_record(text: Callable[[bytes], bytes], stream: Stream, name: str) -> Iterator[Document]:
    # Its reader wants a file of this machine, and returns no record at all from one that is cut off.
    module = optional("array_record.python.array_record_module")
    if name.endswith((".gz", ".zst")):  # of whatever size, and the copy may lie in memory
        raise ValueError("ArrayRecord files, which are compressed already, are only read unpacked; unpack it")
    with tempfile.NamedTemporaryFile() as copy:
        local = isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO)
        if not local:
            shutil.copyfileobj(stream, copy)
            copy.flush()
        reader = module.ArrayRecordReader(os.fspath(stream.name) if local else copy.name)
        if not reader.ok():
            raise ValueError("it is no whole ArrayRecord file")
        for number in range(1, reader.num_records() + 1):
            yield Document(f"{name}:{number}", text(reader.read()))
        reader.close()  # not after an error: it would raise another, without a message


@functools.lru_cache(maxsize=1)
def _load_dataset(name: str, split: str) -> Any:
    datasets = optional("datasets", "datasets")
    if not os.path.isdir(name):
        return datasets.load_dataset(name, split=split)
    loaded = datasets.load_from_disk(name)
    if not isinstance(loaded, dict):
        return loaded
    splits = cast(dict[str, Any], loaded)
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _read_dataset(name: str, split: str, column: str, rows: range) -> Iterator[Document]:
    table = _load_dataset(name, split).select_columns([column]).select(rows)
    number = rows.start
    for batch in table.iter(BATCH):
        for text in batch[column]:
            if not isinstance(text, str):
                raise ValueError(f"row {number} has {type(text).__name__}, not a string, in {column!r}")
            yield Document(f"{name}:{split}:{number}", text.encode(errors="surrogatepass"))
            number += 1
