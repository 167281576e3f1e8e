"""Which piece of a document goes into which row: pure functions of lengths."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Placement(NamedTuple):
    """Where pieces are, in rows of a few lengths."""

    row_lengths: Int[np.ndarray, " R"]
    """Positions in each row."""
    row: Int[np.ndarray, " P"]
    """The row that each piece is in."""
    at: Int[np.ndarray, " P"]
    """The position in it at which the piece begins."""


def one_a_row(lengths: Int[np.ndarray, " P"], row_lengths: Sequence[int]) -> Placement:
    """Each piece alone, in the shortest row that holds it.

    Args:
        lengths: tokens in each piece, none above the longest row.
        row_lengths: the lengths that rows may have, ascending.

    >>> one_a_row(np.array([3, 9, 4]), [4, 16]).row_lengths
    array([ 4, 16,  4])
    """
    shortest = np.asarray(row_lengths)[np.searchsorted(row_lengths, lengths)]
    return Placement(shortest, np.arange(len(lengths)), np.zeros(len(lengths), np.int64))


def best_fit(lengths: Int[np.ndarray, " P"], row_lengths: Sequence[int]) -> Placement:
    """Longest pieces first, each into the row where it leaves the least space, or else into a new, shortest row.

    Best-fit decreasing, for all pieces of one length at once: its time grows with the number of different lengths, so
    millions of pieces take a second. (Packing by the histogram: https://arxiv.org/abs/2107.02027; best fit for
    language models: https://arxiv.org/abs/2404.10830. Rows of several lengths are an addition.)

    Args:
        lengths: tokens in each piece, none above the longest row. Among equally long ones the earlier goes first.
        row_lengths: the lengths that rows may have, ascending.

    >>> best_fit(np.array([3, 9, 4, 7]), [8, 16])
    Placement(row_lengths=array([16,  8]), row=array([1, 0, 1, 0]), at=array([4, 0, 0, 9]))
    """
    order = argsort(-lengths.astype(np.int64))
    in_order = lengths[order]
    ends = 1 + np.flatnonzero(np.diff(in_order, append=0))  # of the pieces of each length
    row, space_before, opened = np.empty((3, len(lengths)), np.int64)
    begin = count = 0  # pieces placed, and rows opened, whose lengths are in `opened`
    with_space: dict[int, list[Int[np.ndarray, " N"]]] = {}  # rows, by the positions that they have left
    spaces: list[int] = []  # its keys, ascending

    def leave(space: int, rows: Int[np.ndarray, " N"]) -> None:
        if space and len(rows):
            if space not in with_space:
                bisect.insort(spaces, space)
                with_space[space] = []
            with_space[space].append(rows)

    for length, end in zip(in_order[ends - 1].tolist(), ends.tolist(), strict=True):
        while begin < end and (tightest := bisect.bisect_left(spaces, length)) < len(spaces):
            space = spaces[tightest]
            rows = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[tightest]
            leave(space, rows[end - begin :])
            rows = rows[: end - begin]
            leave(space - length, rows)
            row[begin : begin + len(rows)], space_before[begin : begin + len(rows)] = rows, space
            begin += len(rows)
        if begin < end:
            new = row_lengths[bisect.bisect_left(row_lengths, length)]
            each = new // length
            which, place = np.divmod(np.arange(end - begin), each)
            row[begin:end], space_before[begin:end] = count + which, new - place * length
            full, more = divmod(end - begin, each)
            rows = np.arange(count, count + full + (more > 0))
            opened[rows] = new
            leave(new - each * length, rows[:full])
            leave(new - more * length, rows[full:])
            count += len(rows)
            begin = end
    found = np.empty((2, len(lengths)), np.int64)
    found[:, order] = row, opened[row] - space_before
    return Placement(opened[:count].copy(), *found)


def argsort(keys: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """A stable argsort of integers whose size, times their number, is below 2^63.

    NumPy sorts numbers in a fifth of the time that it takes to sort their indices: so these are put into the keys.
    """
    count = len(keys)
    return np.sort(keys * count + np.arange(count)) % max(1, count)
