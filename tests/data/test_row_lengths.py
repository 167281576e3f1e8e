"""Row lengths by dynamic programming, against trying all of them."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import data


def costs(lengths: np.ndarray, row_lengths: tuple[int, ...], cost: dict[int, float]) -> float:
    return sum(cost[min(row for row in row_lengths if row >= length)] for length in lengths.tolist())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(2, 64), min_size=1, max_size=30),
    st.integers(1, 4),
    st.sampled_from([8, 16]),
    st.lists(st.floats(0.1, 10), min_size=8, max_size=8),
)
def test_none_cost_less(lengths: list[int], count: int, multiple: int, per_row: list[float]) -> None:
    most = -(-max(lengths) // multiple)
    cost = {multiple * (i + 1): c for i, c in enumerate(np.cumsum(per_row).tolist())}
    found = data.best_row_lengths(
        np.array(lengths), count, multiple=multiple, cost=lambda n: np.array([cost[i] for i in n.tolist()])
    )
    assert 1 <= len(found) <= count
    assert found[-1] == most * multiple
    candidates = [multiple * i for i in range(1, most)]
    others = [
        (*some, most * multiple) for k in range(count) for some in itertools.combinations(candidates, min(k, most - 1))
    ]
    least = min(costs(np.array(lengths), other, cost) for other in others)
    assert costs(np.array(lengths), found, cost) == pytest.approx(least, rel=1e-12)


def test_longer_documents_are_cut_as_the_plan_cuts_them() -> None:
    lengths = np.array([5] * 3 + [100] * 2)
    found = data.best_row_lengths(lengths, 2, multiple=8, longest=32)
    # 100 tokens in rows of 32 that overlap by a token are 32, 32, 32 and 7.
    assert found == (8, 32)
    plan = data.bucket(lengths, found, 32, passes=1)
    assert data.describe(plan).rows[8]["rows"] == 5


def test_the_least_padding_is_less_than_that_of_powers_of_two() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 2
    best = data.best_row_lengths(lengths, 4, longest=2048)
    real = [data.describe(data.bucket(lengths, rows, 2**16, passes=1)).real for rows in (best, (256, 512, 1024, 2048))]
    assert real[0] > real[1] + 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 7}, "count is 7"),
        ({"count": 2.5}, "count is 2.5"),
        ({"count": 2, "multiple": 0}, "multiple is 0"),
        ({"count": 2, "multiple": 1}, "5000 multiples of 1"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.best_row_lengths(np.array([5000]), **options)
