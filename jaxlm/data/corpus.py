"""The token store: documents as token ids in memory-mapped files.

A corpus is a folder:

    manifest.json           tokenizer, counts, and SHA-256 of each split's files
    tokenizer.json          what the tokenizer is, unless its name says all, and a tokenizer_config.json
    train.tokens.bin        the ids of all documents, one after another, uint16 or uint32
    train.offsets.bin       int64, where each document begins, and the end of the last
    train.checks.bin        uint32, the CRC-32 of each 64 KiB of the ids
    heldout.*.bin           the same for the documents that are held out for evaluation

It is written under another name and renamed when complete, so a folder with its name is whole: see `ingest`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt32

from jaxlm import files
from jaxlm.data.tokenizers import Tokenizer

FORMAT = 2
BLOCK = 2**16  # bytes of ids that have a checksum
KINDS = ("tokens", "offsets", "checks")
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_split(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    found = cast(dict[str, Any], value)
    sizes, hashes = [found.get(name) for name in ("documents", "tokens", "bytes")], found.get("sha256")
    whole = isinstance(hashes, dict) and all(isinstance(hashes.get(kind), str) for kind in KINDS)
    return whole and all(map(_is_count, sizes)) and (not sizes[0] or bool(sizes[2]))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in cast(list[Any], value))


FORM: dict[str, Callable[[Any], bool]] = {
    "tokenizer": lambda value: isinstance(value, str),
    "dtype": lambda value: value in ("uint16", "uint32"),
    "vocab": lambda value: _is_count(value) and value > 0,
    "not_utf8": _is_count,
    "not_utf8_names": _is_names,
    **dict.fromkeys(SPLITS, _is_split),
}
"""What the entries of a manifest must be that are used."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of a corpus folder, memory-mapped. What is read of it is held against its checksums first."""

    path: Path
    split: Split
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> Integer[np.ndarray, " T"]:
        """The token ids of a document.

        Raises:
            IndexError: there is no such document.
            ValueError: its ids aren't what was written.
        """
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        bounds = self.offsets[document : document + 2]
        self.check(bounds[:1], bounds[1:])
        return self.tokens[slice(*bounds)]

    @functools.cached_property
    def tokens(self) -> Integer[np.ndarray, " T"]:
        """The ids of all documents, one after another."""
        return np.memmap(self.file("tokens"), np.dtype(self.manifest["dtype"]), "r")

    @functools.cached_property
    def offsets(self) -> Int[np.ndarray, " D"]:
        """Where each document begins in `tokens`, and the end of the last."""
        return np.memmap(self.file("offsets"), np.int64, "r")

    def file(self, kind: str) -> Path:
        """Where ids (`tokens`), `offsets` or `checks` are."""
        return self.path / f"{self.split}.{kind}.bin"

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

    def text(self, tokenizer: Tokenizer, *, most: int | None = None) -> bytes:
        """All documents decoded, one after another; or the first so many bytes of them."""
        found = bytearray()
        for i in range(len(self)):
            if most is not None and len(found) >= most:
                break
            found += tokenizer.decode(self[i])
        return bytes(found[:most])

    def check(self, begins: Int[np.ndarray, " N"], ends: Int[np.ndarray, " N"]) -> None:
        """Holds all blocks in which these tokens are against their checksums, each once for as long as this is open.

        Args:
            begins: where ranges of `tokens` begin.
            ends: where they end, each after its beginning.

        Raises:
            ValueError: a block isn't what was written; the file and the place in it are named.
        """
        size = self.tokens.itemsize
        first, last = begins * size // BLOCK, (ends * size - 1) // BLOCK
        blocks = first
        if (first < last).any():
            blocks = np.minimum(first[:, None] + np.arange((last - first).max() + 1), last[:, None])
        for block in sorted(set(blocks[~self._checked[blocks]].tolist())):
            begin = block * BLOCK
            if zlib.crc32(self._bytes[begin : begin + BLOCK]) != self._checks[block]:
                raise ValueError(
                    f"{self.file('tokens')} is damaged somewhere in {BLOCK} bytes from byte {begin} on: their checksum "
                    "isn't what it was; delete the corpus, write it again"
                )
            self._checked[block] = True

    @functools.cached_property
    def _bytes(self) -> memoryview:
        return np.asarray(self.tokens).view(np.uint8).data

    @functools.cached_property
    def _checks(self) -> UInt32[np.ndarray, " K"]:
        return np.fromfile(self.file("checks"), np.uint32)

    @functools.cached_property
    def _checked(self) -> Bool[np.ndarray, " K"]:
        return np.zeros(len(self._checks), np.bool_)

    def verify(self) -> None:
        """Reads everything and compares it with the manifest's hashes.

        Raises:
            ValueError: a file that isn't what was written.
        """
        for kind in KINDS:
            self.verify_file(kind)

    def verify_file(self, kind: str) -> None:
        """Reads one of the files and compares it with the manifest's hash.

        Raises:
            ValueError: it isn't what was written.
        """
        with open(self.file(kind), "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.manifest[self.split]["sha256"][kind]:
            raise ValueError(
                f"{self.file(kind)} is damaged: its SHA-256 is not the manifest's; delete the corpus, write it again"
            )


def open_corpus(path: str | os.PathLike[str], split: Split = "train") -> Corpus:
    """Opens a split of a corpus folder. Of the ids, which are many, it looks at the number alone, and `Corpus.check` at
    those that are read.

    Raises:
        FileNotFoundError: there is no corpus.
        ValueError: it has another format, no document in this split, or files that don't agree with its manifest.
    """
    path = Path(path)
    try:
        if (manifest := files.read_json(path / "manifest.json")).get("format") == FORMAT:
            manifest = files.read_signed(path / "manifest.json")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is not a corpus: it has no manifest.json; make one with write_corpus"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}; delete the corpus, write it again") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path / 'manifest.json'} is not of format {FORMAT}; delete the corpus, write it again with this version"
        )
    for name, fits in FORM.items():
        value = manifest.get(name)
        if not fits(value) or (name == "vocab" and manifest["vocab"] - 1 > np.iinfo(manifest["dtype"]).max):
            raise ValueError(
                f"{path / 'manifest.json'} is damaged: {name} is {value!r:.80}; delete the corpus, write it again"
            )
    tokens, documents = manifest[split]["tokens"], manifest[split]["documents"]
    if not documents:
        raise ValueError(f"{path} has no document in its {split} split")
    corpus, ids = Corpus(path, split, manifest), np.dtype(manifest["dtype"]).itemsize * tokens
    for kind, size in zip(KINDS, (ids, 8 * (documents + 1), 4 * -(-ids // BLOCK)), strict=True):
        file = corpus.file(kind)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there; delete the corpus, write it again")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, not {size}; delete the corpus, write it again")
        if kind != "tokens":
            corpus.verify_file(kind)
    if corpus.offsets[0] != 0 or corpus.offsets[-1] != tokens or (corpus.lengths <= 0).any():
        raise ValueError(f"{corpus.file('offsets')} is damaged; delete the corpus, write it again")
    return corpus
