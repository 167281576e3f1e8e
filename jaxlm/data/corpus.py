"""The token store: documents as token ids in memory-mapped files.

A corpus is a folder:

    manifest.json           tokenizer, counts and SHA-256 of each split
    tokenizer.json          what the tokenizer is, unless its name says all, and a tokenizer_config.json
    train.tokens.bin        the ids of all documents, one after another, uint16 or uint32
    train.offsets.bin       int64, where each document begins, and the end of the last
    heldout.tokens.bin      the same for the documents that are held out for evaluation
    heldout.offsets.bin

It is written under another name and renamed when complete, so a folder with its name is whole: see `ingest`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Integer

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
        width = {"uint16": 2, "uint32": 4}[manifest["dtype"]]
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
