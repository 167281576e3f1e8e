"""Which lengths rows should have."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlm.numbers import check_whole, is_whole
from jaxlm.stages import MOST_ROW_LENGTHS

MOST_CANDIDATES = 4096


def best_row_lengths(
    lengths: Int[np.ndarray, " D"],
    count: int,
    *,
    multiple: int = 64,
    longest: int | None = None,
    cost: Callable[[Any], Any] = lambda length: length,
) -> tuple[int, ...]:
    r"""The row lengths with which `bucket` costs least, exactly.

    They minimise $\sum_d c(s_d)$ over documents, $s_d$ the shortest row length that holds document d, by dynamic
    programming over the histogram of lengths. For `pack` powers of two are as good: it fills rows anyway.

    Args:
        lengths: tokens in each document.
        count: how many row lengths at most, 1 to 6.
        multiple: what each is a multiple of; hardware likes 64 or 128.
        longest: the longest row, rounded up to a multiple; longer documents are cut. None: the longest document.
        cost: of one row of a length, given as an array; `row_cost` makes it from measured steps. Without one, it is the
            row's positions, and the result has the least padding.

    Raises:
        ValueError: a count that isn't 1 to 6, a multiple below 1, or so small that there are more than 4096 candidates.

    >>> best_row_lengths(np.array([10, 60, 61, 62, 500]), 2, multiple=16)
    (64, 512)
    """
    check_whole("best_row_lengths", multiple=multiple)
    if not (is_whole(count) and count <= MOST_ROW_LENGTHS):
        raise ValueError(f"best_row_lengths: the count is {count}; use 1 to {MOST_ROW_LENGTHS}")
    lengths = np.asarray(lengths, np.int64)
    most = -(-int(longest or lengths.max(initial=2)) // multiple)
    if most > MOST_CANDIDATES:
        raise ValueError(
            f"best_row_lengths: {most} multiples of {multiple} to choose from; use a larger multiple, for "
            f"{MOST_CANDIDATES} of them at most"
        )
    stride = most * multiple - 1  # pieces overlap by one token
    whole, rest = np.divmod(np.maximum(lengths[lengths >= 2] - 1, 0), stride)
    which = -(-(rest[rest > 0] + 1) // multiple)
    rows = np.bincount(which, minlength=most + 1)
    rows[most] += whole.sum()

    upto = np.cumsum(rows)
    each = np.concatenate([[0.0], np.asarray(cost(multiple * np.arange(1, most + 1)), np.float64)])
    # spent[j]: the least cost of all documents that rows of j multiples hold, with as many row lengths as turns so far.
    spent, before = np.where(upto > 0, np.inf, 0.0), list[Int[np.ndarray, " M"]]()
    for _ in range(count):
        # From i to j: one more row length, j, for those documents that i doesn't hold.
        costs = spent[:, None] + np.where(
            np.tri(most + 1, dtype=bool).T, (upto[None] - upto[:, None]) * each[None], np.inf
        )
        before.append(np.argmin(costs, axis=0))
        spent = np.min(costs, axis=0)
    found, last = set[int](), most
    for chosen in reversed(before):
        if upto[last] > upto[chosen[last]]:
            found.add(multiple * last)
        last = int(chosen[last])
    return tuple(sorted(found))


def row_cost(seconds: Mapping[int, int | float], tokens_per_batch: int) -> Callable[[Any], Any]:
    """What a row of any length costs, from measured steps.

    Between measured lengths, seconds per position are on a straight line, as attention is linear in the row's length.

    Args:
        seconds: of a step, by the length of the batch's rows.
        tokens_per_batch: positions in those batches.

    >>> float(row_cost({64: 1.0, 192: 3.0}, tokens_per_batch=960)(128))  # 1/480 s for each position
    0.2666666666666667
    """
    measured = sorted(seconds)
    each = [seconds[length] / (tokens_per_batch // length * length) for length in measured]
    return lambda length: length * np.interp(length, measured, each)
