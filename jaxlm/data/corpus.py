"""The token store: documents as token ids in memory-mapped files.

A corpus is a folder:

    manifest.json           tokenizer, counts and SHA-256 of each split
    train.tokens.bin        the ids of all documents, one after another, uint16 or uint32
    train.offsets.bin       int64, where each document begins, and the end of the last
    heldout.tokens.bin      the same for the documents that are held out for evaluation
    heldout.offsets.bin

It is written in one pass under another name and renamed when complete, so a folder with its name is whole.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import Int, Integer

from jaxlm.data.text import Document, python_library
from jaxlm.data.tokenizers import Tokenizer

FORMAT = 1
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of a corpus folder, memory-mapped."""

    path: Path
    split: Split
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> Integer[np.ndarray, " T"]:
        """The token ids of a document."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]

    @functools.cached_property
    def tokens(self) -> Integer[np.ndarray, " T"]:
        """The ids of all documents, one after another."""
        return np.memmap(self.path / f"{self.split}.tokens.bin", np.dtype(self.manifest["dtype"]), "r")

    @functools.cached_property
    def offsets(self) -> Int[np.ndarray, " D"]:
        """Where each document begins in `tokens`, and the end of the last."""
        return np.memmap(self.path / f"{self.split}.offsets.bin", np.int64, "r")

    @property
    def lengths(self) -> Int[np.ndarray, " D"]:
        """Tokens in each document."""
        return np.diff(self.offsets)

    @property
    def vocab(self) -> int:
        """One more than the largest id that the tokenizer gives."""
        return self.manifest["vocab"]

    @property
    def fingerprint(self) -> str:
        """Differs if any token, document or the tokenizer does."""
        content = [self.manifest["tokenizer"], self.manifest[self.split]["tokens"], self.manifest[self.split]["sha256"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def bits_per_byte(self, loss: float) -> float:
        """A mean loss per predicted token, in nats, as bits per byte of text: comparable between tokenizers."""
        counts = self.manifest[self.split]
        predicted = counts["tokens"] - counts["documents"]  # all but the first of each document
        return loss / math.log(2) * predicted / counts["bytes"]

    @property
    def summary(self) -> str:
        """What it is made of, in a line."""
        counts, not_utf8, names = self.manifest[self.split], self.manifest["not_utf8"], self.manifest["not_utf8_names"]
        such = f"{not_utf8}, such as {names[0]}" if names else "none"
        return f"{counts['documents']:,} documents, {counts['bytes']:,} bytes (not UTF-8: {such})"

    def text(self, tokenizer: Tokenizer) -> bytes:
        """All documents decoded, one after another."""
        return b"".join(tokenizer.decode(self[i]) for i in range(len(self)))

    def verify(self) -> None:
        """Reads everything and compares it with the manifest's hashes.

        Raises:
            ValueError: a file that isn't what was written.
        """
        for kind in ("tokens", "offsets"):
            file = self.path / f"{self.split}.{kind}.bin"
            with open(file, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != self.manifest[self.split]["sha256"][kind]:
                raise ValueError(
                    f"{file} is damaged: its SHA-256 is not the manifest's; delete the corpus, write it again"
                )


def open_corpus(path: str | os.PathLike[str], split: Split = "train") -> Corpus:
    """Opens a split of a corpus folder. Checks the size of its files, not their content; `Corpus.verify` does.

    Raises:
        FileNotFoundError: there is no corpus.
        ValueError: it has another format, no document in this split, or files that don't agree with its manifest.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} is not a corpus: it has no manifest.json; make one with write_corpus"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / 'manifest.json'} is damaged ({error}); delete the corpus, write it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path / 'manifest.json'} is not of format {FORMAT}; write the corpus again with this version"
        )
    try:
        tokens, documents = int(manifest[split]["tokens"]), int(manifest[split]["documents"])
        width = np.dtype(manifest["dtype"]).itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path / 'manifest.json'} is damaged ({error!r}); delete the corpus, write it again"
        ) from None
    if not documents:
        raise ValueError(f"{path} has no document in its {split} split")
    for kind, size in (("tokens", width * tokens), ("offsets", 8 * (documents + 1))):
        file = path / f"{split}.{kind}.bin"
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, not {size}; delete the corpus, write it again")
    corpus = Corpus(path, split, manifest)
    if corpus.offsets[0] != 0 or corpus.offsets[-1] != tokens or (corpus.lengths <= 0).any():
        raise ValueError(f"{path / f'{split}.offsets.bin'} is damaged; delete the corpus, write it again")
    return corpus


def write_corpus(
    path: str | os.PathLike[str], documents: Iterable[Document], tokenizer: Tokenizer, *, heldout: float = 0.04
) -> None:
    """Tokenizes documents into a new corpus folder, in one pass. A failure leaves no part of it behind.

    A document is held out if the hash of its text says so: whatever its name and place, and all copies of it alike.
    Empty documents are left out. The manifest counts these and names up to 100 documents that aren't UTF-8 text.

    Args:
        path: the folder to make.
        documents: are read once, one at a time.
        tokenizer: is named in the manifest.
        heldout: the share of documents to hold out for evaluation; 0 for none, less than 1.

    Raises:
        FileExistsError: the folder exists.
        ValueError: no document to train on, none held out though a share was asked for, a share that isn't one, or a
            tokenizer that gives no ids, or ids that aren't below its vocabulary.
        OSError: the disk is full or can't be written to.
    """
    path = Path(path)
    if not 0 <= heldout < 1:
        raise ValueError(f"write_corpus: heldout is {heldout}; use a share from 0 to less than 1")
    if path.exists():
        raise FileExistsError(f"{path} exists; delete it or give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.unfinished-"))
    try:
        dtype = np.dtype(np.uint16 if tokenizer.vocab <= 2**16 else np.uint32)
        manifest = _write_splits(unfinished, documents, tokenizer, heldout, dtype)
        for split in SPLITS if heldout else SPLITS[:1]:
            if not manifest[split]["documents"]:
                raise ValueError(
                    f"write_corpus: no documents in the {split} split, out of {manifest['documents']} "
                    f"({manifest['empty']} of them empty); give more text or another heldout than {heldout}"
                )
        with (unfinished / "manifest.json").open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.chmod(0o755)
        unfinished.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(f"{path} was written meanwhile, by another process") from None
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def python_library_corpus(cache: str | os.PathLike[str], tokenizer: Tokenizer) -> Path:
    """The corpus of `python_library`, written into a cache folder if it isn't there yet. Versions have their own."""
    name = f"python-{platform.python_version()}-{tokenizer.name}"
    return cached_corpus(Path(cache) / name, python_library, tokenizer)


def cached_corpus(
    path: str | os.PathLike[str], documents: Callable[[], Iterable[Document]], tokenizer: Tokenizer, **options: Any
) -> Path:
    """Writes a corpus as `write_corpus` does if it isn't there yet, and returns its path."""
    if not Path(path).exists():
        with contextlib.suppress(FileExistsError):
            write_corpus(path, documents(), tokenizer, **options)
    return Path(path)


def _write_splits(
    folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, heldout: float, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """Writes the files of both splits, and returns the manifest."""
    seen = empty = 0
    not_utf8: list[str] = []
    not_utf8_count = 0
    with contextlib.ExitStack() as stack:
        writers = {split: _SplitWriter(folder, split, stack) for split in SPLITS}
        for document in documents:
            seen += 1
            if not document.text:
                empty += 1
                continue
            try:
                document.text.decode()
            except UnicodeDecodeError:
                not_utf8_count += 1
                not_utf8 += [document.name][: 100 - len(not_utf8)]
            ids = tokenizer.encode(document.text)
            if not len(ids):
                raise ValueError(f"write_corpus: the tokenizer {tokenizer.name!r} gave no ids for {document.name!r}")
            if ids.min() < 0 or ids.max() >= tokenizer.vocab:
                wrong = ids[(ids < 0) | (ids >= tokenizer.vocab)][0]
                raise ValueError(
                    f"write_corpus: the tokenizer {tokenizer.name!r} gave the id {wrong} for {document.name!r}, "
                    f"beyond its vocabulary of {tokenizer.vocab}"
                )
            hashed = int.from_bytes(hashlib.blake2b(document.text, digest_size=8).digest(), "big") / 2**64
            writers["heldout" if hashed < heldout else "train"].add(ids.astype(dtype), len(document.text))
        counts = {split: writer.finish() for split, writer in writers.items()}
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        "vocab": tokenizer.vocab,
        "dtype": dtype.name,
        "documents": seen,
        "empty": empty,
        "not_utf8": not_utf8_count,
        "not_utf8_names": not_utf8,
        **counts,
    }


class _SplitWriter:
    """Writes the two files of a split, and counts and hashes what goes into them."""

    def __init__(self, folder: Path, split: Split, stack: contextlib.ExitStack):
        self._files: dict[str, BinaryIO] = {
            kind: stack.enter_context((folder / f"{split}.{kind}.bin").open("wb")) for kind in ("tokens", "offsets")
        }
        self._hashes = {kind: hashlib.sha256() for kind in self._files}
        self._tokens = self._documents = self._bytes = 0
        self._write("offsets", np.int64(0).tobytes())

    def add(self, ids: Integer[np.ndarray, " T"], num_bytes: int) -> None:
        self._tokens += len(ids)
        self._documents += 1
        self._bytes += num_bytes
        self._write("tokens", ids.tobytes())
        self._write("offsets", np.int64(self._tokens).tobytes())

    def finish(self) -> dict[str, Any]:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        hashes = {kind: found.hexdigest() for kind, found in self._hashes.items()}
        return {"documents": self._documents, "tokens": self._tokens, "bytes": self._bytes, "sha256": hashes}

    def _write(self, kind: str, data: bytes) -> None:
        self._files[kind].write(data)
        self._hashes[kind].update(data)
