"""Small corpora of random texts."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from jaxlm import data
from jaxlm.data.corpus import Split


@dataclasses.dataclass(frozen=True)
class ShiftedBytes:
    """A tokenizer with any vocabulary, which gives no start and no end."""

    shift: int = 0
    vocab: int = 256
    name: str = "shifted"
    start: int = 0
    end: int = 0

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
        return np.frombuffer(text, np.uint8).astype(np.int64) + self.shift

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes:
        return (ids.astype(np.int64) - self.shift).astype(np.uint8).tobytes()


BYTES = data.ByteTokenizer()
RAW = ShiftedBytes()


def random_texts(num: int = 50) -> list[bytes]:
    """Different texts of 1 to 200 bytes, most of them not UTF-8."""
    rng = np.random.default_rng(0)
    return [i.to_bytes(2, "big")[-1 if i < 10 else 0 :] + rng.bytes(rng.integers(198)) for i in range(num)]


def named(texts: Iterable[bytes]) -> Iterator[data.Document]:
    return (data.Document(f"{i}.txt", text) for i, text in enumerate(texts))


def write(path: Path, texts: Iterable[bytes], tokenizer: data.Tokenizer = BYTES, heldout: float = 0.0) -> data.Corpus:
    data.write_corpus(path, named(texts), tokenizer, heldout=heldout)
    return data.open_corpus(path)


def texts_of(path: Path, split: Split, tokenizer: data.Tokenizer = BYTES) -> list[bytes]:
    corpus = data.open_corpus(path, split)
    texts = [tokenizer.decode(corpus[i]) for i in range(len(corpus))]
    assert corpus.text(tokenizer) == b"".join(texts)
    assert corpus.text(tokenizer, most=5) == b"".join(texts)[:5]
    return texts
