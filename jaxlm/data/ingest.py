"""From documents to a corpus: in parts that an interrupted run needn't write again, joined at the end."""

import concurrent.futures
import contextlib
import copy
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from jaxtyping import Bool, Integer, UInt64

from jaxlm import files
from jaxlm.data.corpus import BLOCK, FORMAT, KINDS, SPLITS, Split
from jaxlm.data.sources import Shard, UnreadableError
from jaxlm.data.text import Document, python_library
from jaxlm.data.tokenizers import Tokenizer, save_tokenizer
from jaxlm.numbers import check_whole

PART = 2**24  # bytes of text, stored as it may be, after which a part ends
CHUNK = 2**18  # tokens that are in memory at once when parts are joined, unless a document has more
NAMED = 100
JOINED = "joined-"
RECORD = np.dtype([("hash", np.uint64), ("bytes", np.int64), ("tokens", np.int64)])
_RECORD = struct.Struct("=Qqq")  # the same, for one
Json = dict[str, Any]


def write_corpus(
    path: str | os.PathLike[str],
    source: Iterable[Document] | Sequence[Shard],
    tokenizer: Tokenizer,
    *,
    heldout: float = 0.04,
    drop_duplicates: bool = False,
    skip_unreadable: bool = False,
    workers: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Tokenizes documents into a new corpus folder.

    Shards are written in parts to a folder beside it, `.NAME.unfinished`. If that ends before its time, by an error or
    by kill -9, the same call goes on after the parts that are finished, and the corpus is the same, bit for bit. What
    has changed since is written again: a part is known by its tokenizer and its shards' versions. A failure with
    documents instead of shards leaves nothing behind. Only one process may write a corpus at a time.

    A document is held out if the hash of its text says so: whatever its name and place, and all copies of it alike.
    Empty documents are left out. The manifest counts these, and exact copies of earlier documents, by a hash of
    8 bytes; and it names up to 100 documents that aren't UTF-8 text, and up to 100 shards that can't be read.

    Args:
        path: the folder to make.
        source: documents, which are read once, one at a time, or a list of shards.
        tokenizer: is named in the manifest, and saved with the corpus where it has `files`.
        heldout: the share of documents to hold out for evaluation; 0 for none, less than 1.
        drop_duplicates: leave out exact copies of earlier documents.
        skip_unreadable: leave out shards that can't be read to their end, rather than stop.
        workers: processes that tokenize shards, with the same result. With more than one, whatever calls this must be
            behind `if __name__ == "__main__"`.
        progress: is called after each part with its documents, bytes of text, and bytes as stored.

    Raises:
        FileExistsError: the folder exists.
        ValueError: no document to train on, none held out though a share was asked for, a share that isn't one, or a
            tokenizer that gives no ids, or ids that aren't below its vocabulary.
        UnreadableError: a shard can't be read, at its turn.
        OSError: the disk is full or can't be written to.
    """
    path = Path(path)
    if not 0 <= heldout < 1:
        raise ValueError(f"write_corpus: heldout is {heldout}; use a share from 0 to less than 1")
    check_whole("write_corpus", workers=workers)
    if path.exists():
        raise FileExistsError(f"{path} exists; delete it or give another name")
    kept = isinstance(source, Sequence) and all(isinstance(shard, Shard) for shard in source)
    if workers > 1 and not kept:
        raise ValueError(f"write_corpus: {workers} workers share out shards; give a list of them, or use 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name}.unfinished"
    if kept:
        groups, folder = _groups(cast(Sequence[Shard], source)), path.parent / name
        folder.mkdir(exist_ok=True)
    else:
        documents = functools.partial(iter, cast(Iterable[Document], source))
        groups, folder = [[Shard("", "", 0, documents)]], Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{name}-"))
    parts: list[Path] = []
    try:
        write = functools.partial(_write_part, folder, tokenizer, skip_unreadable)
        for group, part in zip(groups, _mapped(write, groups, workers), strict=True):
            parts.append(part)
            if progress is not None:
                read = _manifest(part)
                progress(read["documents"], read["bytes"], sum(shard.size for shard in group))
        joined = Path(tempfile.mkdtemp(dir=folder, prefix=JOINED))
        _join(joined, parts, tokenizer, heldout, drop_duplicates)
        joined.chmod(0o755)
        joined.rename(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(f"{path} was written meanwhile, by another process") from None
        if kept:
            error.add_note(
                f"{len(parts)} of {len(groups)} parts are kept in {folder}: the same call goes on from there"
            )
        raise
    finally:
        for left in [folder] if path.exists() or not kept else folder.glob(f"{JOINED}*"):
            shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if there is nothing in it


def python_library_corpus(cache: str | os.PathLike[str], tokenizer: Tokenizer) -> Path:
    """The corpus of `python_library`, written into a cache folder if it isn't there yet. Versions have their own."""
    name = f"python-{platform.python_version()}-{tokenizer.name}-{FORMAT}"
    return cached_corpus(Path(cache) / name, python_library, tokenizer)


def cached_corpus(
    path: str | os.PathLike[str],
    source: Callable[[], Iterable[Document] | Sequence[Shard]],
    tokenizer: Tokenizer,
    **options: Any,
) -> Path:
    """Writes a corpus as `write_corpus` does if it isn't there yet, and returns its path."""
    if not Path(path).exists():
        with contextlib.suppress(FileExistsError):
            write_corpus(path, source(), tokenizer, **options)
    return Path(path)


def is_heldout(text: bytes, share: float) -> bool:
    """Whether `write_corpus` holds out a document of that text."""
    return _hash(text) / 2**64 < share


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _groups(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Cuts shards into runs of at most `PART` bytes, or of one shard."""
    groups: list[list[Shard]] = []
    size = 0
    for shard in shards:
        if not groups or size + shard.size > PART:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.size
    return groups


def _mapped(write: Callable[[list[Shard]], Path], groups: list[list[Shard]], workers: int) -> Iterator[Path]:
    if workers == 1:
        yield from map(write, groups)
        return
    # Forking would copy locks that threads of this process may hold.
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(write, groups)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_part(folder: Path, tokenizer: Tokenizer, skip_unreadable: bool, group: list[Shard]) -> Path:
    """Writes the documents of some shards under a name that tells what they are, unless they are there."""
    content = json.dumps([FORMAT, tokenizer.name, tokenizer.vocab, [shard[:2] for shard in group]])
    part = folder / hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    if part.exists():
        if _is_whole(part) and (skip_unreadable or not _manifest(part)["unreadable"]):
            return part
        shutil.rmtree(part)
    written = Path(tempfile.mkdtemp(dir=folder, prefix=f"{part.name}-"))
    try:
        manifest = _write_documents(written, tokenizer, skip_unreadable, group)
        files.write_whole(written / "manifest.json", json.dumps({**manifest, "checksum": _checksum(written, manifest)}))
        written.rename(part)
    except OSError:
        if not _is_whole(part):  # else another worker has written it, where the same shards are given twice
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return part


def _manifest(part: Path) -> Json:
    return json.loads((part / "manifest.json").read_bytes())


def _is_whole(part: Path) -> bool:
    try:
        manifest = files.read_json(part / "manifest.json")
        return manifest.pop("checksum", None) == _checksum(part, manifest)
    except (OSError, ValueError):
        return False


def _checksum(part: Path, manifest: Json) -> int:
    """Of all that a part holds."""
    found = zlib.crc32(json.dumps(manifest).encode())
    for name in ("tokens.bin", "records.bin"):
        with open(part / name, "rb") as file:
            while block := file.read(2**18):
                found = zlib.crc32(block, found)
    return found


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab <= 2**16 else np.uint32)


def _write_documents(folder: Path, tokenizer: Tokenizer, skip_unreadable: bool, group: list[Shard]) -> Json:
    """Writes the ids of all documents that aren't empty, and a record of each."""
    dtype = _dtype(tokenizer)
    manifest: Json = dict.fromkeys(("documents", "empty", "not_utf8", "unreadable", "bytes", "tokens"), 0)
    manifest |= {"not_utf8_names": [], "unreadable_names": []}
    with open(folder / "tokens.bin", "wb", 2**20) as tokens, open(folder / "records.bin", "wb", 2**16) as records:
        for shard in group:
            before = copy.deepcopy(manifest), tokens.tell(), records.tell()
            try:
                for document in shard.open():
                    manifest["documents"] += 1
                    if not document.text:
                        manifest["empty"] += 1
                        continue
                    try:
                        document.text.decode()
                    except UnicodeDecodeError:
                        _count(manifest, "not_utf8", document.name)
                    ids = _checked(tokenizer.encode(document.text), tokenizer, document.name)
                    manifest["bytes"] += len(document.text)
                    manifest["tokens"] += len(ids)
                    tokens.write(ids.astype(dtype).tobytes())
                    records.write(_RECORD.pack(_hash(document.text), len(document.text), len(ids)))
            except UnreadableError:
                if not skip_unreadable:
                    raise
                manifest = before[0]
                _count(manifest, "unreadable", shard.name)
                for file, end in ((tokens, before[1]), (records, before[2])):
                    file.seek(end)
                    file.truncate()
        for file in (tokens, records):
            file.flush()
            os.fsync(file.fileno())
    return manifest


def _count(manifest: Json, kind: str, name: str) -> None:
    manifest[kind] += 1
    manifest[f"{kind}_names"] += [name][: NAMED - len(manifest[f"{kind}_names"])]


def _checked(ids: Integer[np.ndarray, " T"], tokenizer: Tokenizer, name: str) -> Integer[np.ndarray, " T"]:
    if not len(ids):
        raise ValueError(f"write_corpus: the tokenizer {tokenizer.name!r} gave no ids for {name!r}")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"write_corpus: the tokenizer {tokenizer.name!r} gave ids of {ids.dtype} for {name!r}")
    if ids.min() < 0 or ids.max() >= tokenizer.vocab:
        wrong = ids[(ids < 0) | (ids >= tokenizer.vocab)][0]
        raise ValueError(
            f"write_corpus: the tokenizer {tokenizer.name!r} gave the id {wrong} for {name!r}, "
            f"beyond its vocabulary of {tokenizer.vocab}"
        )
    return ids


def _join(folder: Path, parts: list[Path], tokenizer: Tokenizer, heldout: float, drop_duplicates: bool) -> None:
    """Writes the files of a corpus from its parts."""
    manifests = [_manifest(part) for part in parts]
    total = {name: sum(m[name] for m in manifests) for name in ("documents", "empty", "not_utf8", "unreadable")}
    names = {name: [x for m in manifests for x in m[name]][:NAMED] for name in ("not_utf8_names", "unreadable_names")}
    parts = [part for part, manifest in zip(parts, manifests, strict=True) if manifest["tokens"]]
    copies, repeated = _repeated(parts)
    taken = np.zeros(len(repeated), np.bool_)
    with contextlib.ExitStack() as stack:
        writers = {split: _SplitWriter(folder, split, stack) for split in SPLITS}
        for part in parts:
            for records, tokens in _chunks(part, _dtype(tokenizer)):
                wanted = np.ones(len(records), np.bool_)
                if drop_duplicates:
                    wanted = _first(records["hash"], repeated, taken)
                out = records["hash"] / 2**64 < heldout
                for split, chosen in (("train", wanted & ~out), ("heldout", wanted & out)):
                    ids = tokens[np.repeat(chosen, records["tokens"])]
                    writers[split].add(ids, records[chosen])
        splits = {split: writer.finish() for split, writer in writers.items()}
    for split in SPLITS if heldout else SPLITS[:1]:
        if not splits[split]["documents"]:
            raise ValueError(
                f"write_corpus: no documents in the {split} split, out of {total['documents']} "
                f"({total['empty']} of them empty); give more text or another heldout than {heldout}"
            )
    save_tokenizer(tokenizer, folder)
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        "vocab": tokenizer.vocab,
        "dtype": _dtype(tokenizer).name,
        **total,
        **names,
        "duplicates": copies,
        "dropped": copies if drop_duplicates else 0,
        **splits,
    }
    files.write_whole(folder / "manifest.json", files.signed(manifest))


def _repeated(parts: list[Path]) -> tuple[int, UInt64[np.ndarray, " R"]]:
    """How many documents are copies of earlier ones, and the hashes that occur more than once, sorted."""
    sizes = [(part / "records.bin").stat().st_size // RECORD.itemsize for part in parts]
    hashes = np.empty(sum(sizes), np.uint64)  # 8 bytes for each document, however many there are
    for part, end, size in zip(parts, itertools.accumulate(sizes), sizes, strict=True):
        hashes[end - size : end] = np.memmap(part / "records.bin", RECORD, "r")["hash"]
    hashes.sort()
    copies = hashes[1:][hashes[1:] == hashes[:-1]]
    return len(copies), np.unique(copies)


def _first(
    hashes: UInt64[np.ndarray, " D"], repeated: UInt64[np.ndarray, " R"], taken: Bool[np.ndarray, " R"]
) -> Bool[np.ndarray, " D"]:
    """Which come for the first time; notes in `taken` those of the repeated ones that have come."""
    first = np.ones(len(hashes), np.bool_)
    for i in np.flatnonzero(np.isin(hashes, repeated)):
        place = np.searchsorted(repeated, hashes[i])
        first[i] = not taken[place]
        taken[place] = True
    return first


def _chunks(part: Path, dtype: np.dtype[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Records and ids of some documents at a time: as many as make `CHUNK` tokens, or one."""
    records, tokens = np.memmap(part / "records.bin", RECORD, "r"), np.memmap(part / "tokens.bin", dtype, "r")
    start = begin = 0
    while start < len(records):
        some = records[start : start + CHUNK // 64]
        ends = np.cumsum(some["tokens"])
        count = max(int(np.searchsorted(ends, CHUNK, "right")), 1)
        end = begin + int(ends[count - 1])
        yield some[:count], tokens[begin:end]
        start, begin = start + count, end


class _SplitWriter:
    """Writes the files of a split, and counts and hashes what goes into them."""

    def __init__(self, folder: Path, split: Split, stack: contextlib.ExitStack):
        self._files: dict[str, BinaryIO] = {
            kind: stack.enter_context((folder / f"{split}.{kind}.bin").open("wb")) for kind in KINDS
        }
        self._hashes = {kind: hashlib.sha256() for kind in self._files}
        self._tokens = self._documents = self._bytes = self._check = 0
        self._write("offsets", np.zeros(1, np.int64))

    def add(self, ids: Integer[np.ndarray, " T"], records: np.ndarray) -> None:
        offsets = self._tokens + np.cumsum(records["tokens"])
        self._tokens += len(ids)
        self._documents += len(records)
        self._bytes += int(records["bytes"].sum())
        data, room = ids.view(np.uint8).data, BLOCK - self._files["tokens"].tell() % BLOCK
        while len(data) >= room:
            self._check = zlib.crc32(data[:room], self._check)
            self._end_block()
            data, room = data[room:], BLOCK
        self._check = zlib.crc32(data, self._check)
        self._write("tokens", ids)
        self._write("offsets", offsets)

    def _end_block(self) -> None:
        self._write("checks", np.array([self._check], np.uint32))
        self._check = 0

    def finish(self) -> Json:
        if self._files["tokens"].tell() % BLOCK:
            self._end_block()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        hashes = {kind: found.hexdigest() for kind, found in self._hashes.items()}
        return {"documents": self._documents, "tokens": self._tokens, "bytes": self._bytes, "sha256": hashes}

    def _write(self, kind: str, array: np.ndarray) -> None:
        self._files[kind].write(array.data)
        self._hashes[kind].update(array.data)
