"""Changes of rows that a model learns from, drawn anew each time a document comes."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer


class Row(NamedTuple):
    """A row of a batch."""

    inputs: Integer[np.ndarray, " T"]
    """What the model sees."""
    tokens: Integer[np.ndarray, " T"]
    """What it predicts: at each position the next."""
    bounds: Int[np.ndarray, "P 2"]
    """Where each document begins and ends."""


@runtime_checkable
class Augment(Protocol):
    """A pure function of a row, whose `repr` tells it from others: a frozen dataclass that can be called."""

    @property
    def ids(self) -> Sequence[int]:
        """The token ids that it puts into rows of its own."""
        ...

    def __call__(self, row: Row, rng: np.random.Generator, /) -> Row: ...


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Moves a random middle of a document to its end, so that the model learns to fill gaps.

    `[first ... last]` becomes `[first, prefix, ..., suffix, ..., middle, ..., last]`, with a special token before each
    part: PSM of https://arxiv.org/abs/2207.14255, section 3, on tokens. As a document keeps its length, the last three
    tokens before its very last give way to the special ones. One of less than 8 tokens stays as it is.

    Raises:
        ValueError: a rate that isn't from 0 to 1.
    """

    rate: int | float
    """The share of documents to change."""
    prefix: int
    """The ids of the special tokens; those from the tokenizer's `vocab` on are free."""
    suffix: int
    middle: int

    def __post_init__(self):
        _check(self.rate, "FillInTheMiddle")

    @property
    def ids(self) -> Sequence[int]:
        """The special tokens."""
        return self.prefix, self.suffix, self.middle

    def __call__(self, row: Row, rng: np.random.Generator) -> Row:
        """Changes the documents of a row."""
        inputs, tokens = row.inputs.copy(), row.tokens.copy()
        for begin, end in row.bounds:
            draw = rng.random(3)
            if draw[0] >= self.rate or end - begin < 8:
                continue
            for ids in (inputs, tokens):
                first, text, last = ids[begin : begin + 1], ids[begin + 1 : end - 4], ids[end - 1 : end]
                one, other = np.sort((draw[1:] * (len(text) + 1)).astype(int))
                marks = np.array([[self.prefix], [self.suffix], [self.middle]], ids.dtype)
                parts = (first, marks[0], text[:one], marks[1], text[other:], marks[2], text[one:other], last)
                ids[begin:end] = np.concatenate(parts)
        return Row(inputs, tokens, row.bounds)


@dataclasses.dataclass(frozen=True)
class TokenDropout:
    """Replaces random tokens that the model sees, but not those that it predicts.

    Word dropout, https://arxiv.org/abs/1511.06349, section 3.

    Raises:
        ValueError: a rate that isn't from 0 to 1.
    """

    rate: int | float
    """The share of tokens to replace."""
    replacement: int
    """The id to put there."""

    def __post_init__(self):
        _check(self.rate, "TokenDropout")

    @property
    def ids(self) -> Sequence[int]:
        """The replacement."""
        return (self.replacement,)

    def __call__(self, row: Row, rng: np.random.Generator) -> Row:
        """Changes what the model sees of a row."""
        dropped = rng.random(len(row.inputs)) < self.rate
        return row._replace(inputs=np.where(dropped, row.inputs.dtype.type(self.replacement), row.inputs))


def _check(rate: int | float, what: str) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{what}: the rate is {rate}; use 0 to 1")
