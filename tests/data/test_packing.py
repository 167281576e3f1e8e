"""Placements: every piece in one row, none over another, little space left."""

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import data
from jaxlm.data.packing import Placement

ROW_LENGTHS = st.lists(st.integers(2, 64), min_size=1, max_size=6, unique=True).map(sorted)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    row_lengths = draw(ROW_LENGTHS)
    return np.array(draw(st.lists(st.integers(1, row_lengths[-1]), max_size=200)), np.int32), row_lengths


def one_by_one(lengths: np.ndarray, row_lengths: list[int]) -> list[int]:
    """Best-fit decreasing as it is usually written: the lengths of the rows that it opens."""
    spaces, rows = list[int](), list[int]()
    for length in sorted(lengths.tolist(), reverse=True):
        tightest = bisect.bisect_left(spaces, length)
        if tightest < len(spaces):
            left = spaces.pop(tightest) - length
        else:
            rows.append(min(row for row in row_lengths if row >= length))
            left = rows[-1] - length
        bisect.insort(spaces, left)
    return rows


def pieces_of(placed: Placement, lengths: np.ndarray) -> list[list[tuple[int, int]]]:
    """From where to where pieces go, row by row."""
    rows: list[list[tuple[int, int]]] = [[] for _ in placed.row_lengths]
    for row, at, length in zip(placed.row.tolist(), placed.at.tolist(), lengths.tolist(), strict=True):
        rows[row].append((at, at + length))
    return [sorted(row) for row in rows]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
@pytest.mark.parametrize("place", [data.best_fit, data.one_a_row])
def test_pieces_lie_one_after_another_in_rows_that_hold_them(
    place: data.Place, case: tuple[np.ndarray, list[int]]
) -> None:
    lengths, row_lengths = case
    placed = place(lengths, row_lengths)
    for row_length, pieces in zip(placed.row_lengths.tolist(), pieces_of(placed, lengths), strict=True):
        assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
        assert pieces[-1][1] <= row_length
        longest = max(end - begin for begin, end in pieces)
        assert row_length == min(row for row in row_lengths if row >= longest)
        assert len(pieces) == 1 or place is data.best_fit


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_a_piece_goes_into_no_new_row_if_it_fits_an_open_one(case: tuple[np.ndarray, list[int]]) -> None:
    lengths, row_lengths = case
    placed = data.best_fit(lengths, row_lengths)
    opened = [pieces[0] for pieces in pieces_of(placed, lengths)]
    left = placed.row_lengths - np.array([sum(end - begin for begin, end in p) for p in pieces_of(placed, lengths)])
    for row, (_, first) in enumerate(opened):
        assert not any(left[:row] >= first)


def test_as_few_positions_as_one_piece_at_a_time() -> None:
    rng = np.random.default_rng(0)
    for scale in (20, 100, 500):
        lengths = np.clip(rng.lognormal(np.log(scale), 1, 3000).astype(int), 2, 2048)
        placed = data.best_fit(lengths, [256, 512, 1024, 2048])
        assert placed.row_lengths.sum() <= 1.002 * sum(one_by_one(lengths, [256, 512, 1024, 2048]))
        assert lengths.sum() / placed.row_lengths.sum() > 0.99


def test_nothing_to_place() -> None:
    for place in (data.best_fit, data.one_a_row):
        assert all(len(column) == 0 for column in place(np.empty(0, int), [4, 8]))
