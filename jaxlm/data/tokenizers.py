"""Text to token ids and back."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer


@runtime_checkable
class Tokenizer(Protocol):
    """Turns a document into ids below `vocab` and back."""

    @property
    def name(self) -> str:
        """Tells this tokenizer from others; it is saved with the corpora and the models that use it."""
        ...

    @property
    def vocab(self) -> int: ...

    @property
    def end(self) -> int:
        """The id that every document ends with."""
        ...

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]: ...

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes: ...


class ByteTokenizer:
    """Each byte is its own id; a document begins with 256 and ends with 257.

    >>> ids = ByteTokenizer().encode(b"Hi")
    >>> ids.tolist(), ByteTokenizer().decode(ids)
    ([256, 72, 105, 257], b'Hi')
    """

    name = "bytes"
    vocab = 258
    start = 256
    end = 257

    def encode(self, text: bytes) -> Integer[np.ndarray, " T"]:
        ids = np.empty(len(text) + 2, np.uint16)
        ids[0], ids[1:-1], ids[-1] = self.start, np.frombuffer(text, np.uint8), self.end
        return ids

    def decode(self, ids: Integer[np.ndarray, " T"]) -> bytes:
        return np.asarray(ids)[np.asarray(ids) < self.start].astype(np.uint8).tobytes()


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of that name.

    Raises:
        ValueError: there is none.
    """
    if name != ByteTokenizer.name:
        raise ValueError(f"tokenizer_of: unknown tokenizer {name!r}; there is {ByteTokenizer.name!r}")
    return ByteTokenizer()
