"""Which tokens go into which row of which batch: pure functions of document lengths and a seed.

Rows come in a few lengths, and every batch has the same number of positions, so a step costs about the same whichever
it gets and a program is compiled for each length only. As batch i depends on nothing but the plan, a run resumes from
one integer and needs no communication between hosts.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Rows(NamedTuple):
    """What one batch holds: row r has the tokens from `starts[r]` to `starts[r] + lengths[r]`, and padding after."""

    starts: Int[np.ndarray, " B"]
    """Into the corpus' tokens."""
    lengths: Int[np.ndarray, " B"]
    """Real tokens; 0 for a row that is all padding."""
    row_length: int
    """Positions in each row."""


class Bucket(NamedTuple):
    """The pieces that go into rows of one length."""

    row_length: int
    pieces: Int[np.ndarray, " P"]


@dataclasses.dataclass(frozen=True, eq=False)
class BucketPlan:
    """One piece of a document a row, in the shortest row that holds it. Made by `bucket`."""

    starts: Int[np.ndarray, " P"]
    lengths: Int[np.ndarray, " P"]
    buckets: tuple[Bucket, ...]
    """Those that hold anything, shortest rows first."""
    tokens_per_batch: int
    seed: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and row length of every kind of batch in the plan."""
        return [(self.tokens_per_batch // bucket.row_length, bucket.row_length) for bucket in self.buckets]

    @property
    def batches_per_epoch(self) -> int:
        return sum(-(-len(bucket.pieces) // rows) for bucket, (rows, _) in zip(self.buckets, self.shapes, strict=True))

    @property
    def real_share(self) -> float:
        """The share of an epoch's positions that hold real tokens; the rest is padding."""
        return int(self.lengths.sum()) / (self.batches_per_epoch * self.tokens_per_batch)

    @property
    def fingerprint(self) -> str:
        """Differs if any batch does."""
        digest = hashlib.sha256(json.dumps([self.shapes, self.seed]).encode())
        digest.update(self.starts.tobytes())
        digest.update(self.lengths.tobytes())
        return digest.hexdigest()[:16]

    def batch(self, index: int) -> Rows:
        """Batch `index`, counted over all epochs; each epoch holds every piece once, in an order of its own."""
        epoch, place = divmod(index, self.batches_per_epoch)
        row_length, pieces = _epoch(self, epoch)[place]
        empty = np.zeros(self.tokens_per_batch // row_length - len(pieces), np.int64)
        starts, lengths = (np.concatenate([column[pieces], empty]) for column in (self.starts, self.lengths))
        return Rows(starts, lengths, row_length)


def bucket(lengths: Int[np.ndarray, " D"], row_lengths: Iterable[int], tokens_per_batch: int, seed: int) -> BucketPlan:
    """Length-bucketed rows: no attention across documents, little padding, and short rows cost little attention.

    Documents longer than the longest row are cut into pieces that overlap by one token, so every token but the first
    of each document is predicted exactly once an epoch. What doesn't fill a batch goes into one with empty rows.

    Args:
        lengths: tokens in each document, which follow one another in the corpus.
        row_lengths: the lengths that rows may have; 1 to 6 of them.
        tokens_per_batch: positions in each batch, a multiple of every row length.
        seed: orders pieces and batches; 0 or more.

    Raises:
        ValueError: no document has two tokens, so that there is nothing to predict; row lengths below 2, more than 6,
            or that don't divide `tokens_per_batch`; a negative seed.

    >>> plan = bucket(np.array([3, 9, 4]), row_lengths=[4, 8], tokens_per_batch=16, seed=0)
    >>> plan.shapes, plan.batches_per_epoch, plan.starts, plan.lengths
    ([(4, 4), (2, 8)], 2, array([ 0,  3, 10, 12]), array([3, 8, 2, 4]))
    """
    lengths = np.asarray(lengths, np.int64)
    row_lengths = sorted({int(length) for length in row_lengths})
    if not 1 <= len(row_lengths) <= 6 or row_lengths[0] < 2:
        raise ValueError(f"bucket: row lengths {row_lengths}; use 1 to 6 of them, each 2 or more")
    if wrong := [length for length in row_lengths if tokens_per_batch < 1 or tokens_per_batch % length]:
        raise ValueError(
            f"bucket: {tokens_per_batch} tokens per batch is not a positive multiple of the row lengths {wrong}"
        )
    if seed < 0:
        raise ValueError(f"bucket: the seed is {seed}; use 0 or more")
    stride = row_lengths[-1] - 1
    counts = np.maximum(-(-(lengths - 1) // stride), 0)
    if not counts.any():
        raise ValueError(f"bucket: none of {len(lengths)} documents has two tokens, so there is nothing to predict")
    document = np.repeat(np.arange(len(lengths)), counts)
    within = stride * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
    starts = (np.cumsum(lengths) - lengths)[document] + within
    pieces = np.minimum(lengths[document] - within, row_lengths[-1])
    which = np.searchsorted(row_lengths, pieces)
    buckets = tuple(
        Bucket(row_length, np.flatnonzero(which == i)) for i, row_length in enumerate(row_lengths) if (which == i).any()
    )
    return BucketPlan(starts, pieces, buckets, int(tokens_per_batch), int(seed))


@functools.lru_cache(maxsize=4)
def _epoch(plan: BucketPlan, epoch: int) -> list[tuple[int, Int[np.ndarray, " B"]]]:
    """The row length and the pieces of every batch of an epoch."""
    rng = np.random.default_rng(np.random.SeedSequence(plan.seed, spawn_key=(epoch,)))
    batches: list[tuple[int, Int[np.ndarray, " B"]]] = []
    for (rows, row_length), bucket in zip(plan.shapes, plan.buckets, strict=True):
        pieces = rng.permutation(bucket.pieces)
        batches += [(row_length, pieces[i : i + rows]) for i in range(0, len(pieces), rows)]
    return [batches[i] for i in rng.permutation(len(batches))]
