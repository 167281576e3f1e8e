"""Masks: each against its definition one pair at a time, and blocks against all their positions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.models import masks
from jaxlm.models.masks import Mask

LENGTH = 61
POSITIONS = np.arange(LENGTH)

# The definitions, for numbers: whether q sees k, given that k <= q.
DEFINED: dict[str, tuple[Mask, Callable[[int, int], bool]]] = {
    "causal": (masks.causal, lambda q, k: k <= q),
    "window": (masks.window(7), lambda q, k: k > q - 7),
    "window of one": (masks.window(1), lambda q, k: k == q),
    "strided": (masks.strided(4, 3), lambda q, k: q // 4 - k // 4 in {0, 1, 2, *range(0, 100, 3)}),
    "fixed": (masks.fixed(4, 3), lambda q, k: q // 12 == k // 12 or k // 4 in range(2, 100, 3)),
    "bigbird, nothing random": (
        masks.bigbird(4, window=2, first=3, random=0),
        lambda q, k: q // 4 - k // 4 < 2 or k < 12,
    ),
    "both": (masks.window(9) & masks.fixed(4, 3), lambda q, k: k > q - 9 and (q // 12 == k // 12 or k // 4 % 3 == 2)),
    "either": (masks.window(9) | masks.fixed(4, 3), lambda q, k: k > q - 9 or q // 12 == k // 12 or k // 4 % 3 == 2),
}


def whole(mask: Mask, length: int = LENGTH) -> np.ndarray:
    q, k = np.indices((length, length))
    return np.broadcast_to(mask.allowed(q, k), (length, length))


@pytest.mark.parametrize("name", DEFINED)
def test_a_mask_is_its_definition(name: str):
    mask, sees = DEFINED[name]
    expected = [[k <= q and sees(q, k) for k in range(LENGTH)] for q in range(LENGTH)]
    np.testing.assert_array_equal(whole(mask), expected)


@pytest.mark.parametrize("mask", [*(mask for mask, _ in DEFINED.values()), masks.bigbird(4)], ids=[*DEFINED, "bigbird"])
def test_traced_positions_give_the_same_and_a_query_sees_itself(mask: Mask):
    traced = jax.jit(lambda q, k: jnp.broadcast_to(mask.allowed(q[:, None], k[None]), (LENGTH, LENGTH)))
    np.testing.assert_array_equal(traced(POSITIONS, POSITIONS), whole(mask))
    assert np.all(np.diag(whole(mask)))
    assert not np.any(np.triu(whole(mask), 1))


def test_masks_are_values():
    assert masks.bigbird(4, seed=1) == masks.bigbird(4, seed=1) != masks.bigbird(4, seed=2)
    assert hash(masks.window(3) & masks.fixed(2, 2)) == hash(masks.window(3) & masks.fixed(2, 2))
    assert masks.window(3) & masks.window(5) & masks.causal == masks.window(3)
    assert masks.causal & masks.fixed(2, 2) == masks.fixed(2, 2) == masks.fixed(2, 2) & masks.causal


def test_bigbird_draws_before_its_block_evenly_and_whatever_the_length():
    blocks, draws = 400, 3
    mask = masks.bigbird(1, window=1, first=0, random=draws)
    seen = whole(mask, blocks) & ~np.eye(blocks, dtype=bool)
    np.testing.assert_array_equal(seen.sum(1) <= draws, True)
    # Two of three draws coincide seldom, and where in the row they fall is even: a tenth of the row has its share.
    assert seen[50:].sum() > 0.97 * draws * (blocks - 50)
    i, j = np.nonzero(seen[50:])
    shares = np.histogram(j / (i + 50), 10, (0, 1))[0] / len(j)
    np.testing.assert_allclose(shares, 0.1, atol=5 * (0.1 * 0.9 / len(j)) ** 0.5)
    other = whole(masks.bigbird(1, window=1, first=0, random=draws, seed=1), blocks)
    assert (seen & other)[50:].sum() - (blocks - 50) < 0.1 * seen[50:].sum()
    np.testing.assert_array_equal(whole(mask, 100), whole(mask, blocks)[:100, :100])


def test_bigbird_hashes_far_positions_without_overflow():
    mask = masks.bigbird(1, window=1, first=0, random=8, seed=12345)
    q = np.array([4095, 4096, 99_999, 1_000_000])[:, None]
    expected = mask.allowed(q.astype(np.int64), np.arange(1_000_001)[None])
    np.testing.assert_array_equal(jax.jit(mask.allowed)(q.astype(np.int32), jnp.arange(1_000_001)[None]), expected)


small = st.integers(1, 9)
single = st.one_of(
    st.builds(masks.window, st.integers(1, 80)),
    st.builds(masks.strided, small, small),
    st.builds(masks.fixed, small, small),
    st.builds(functools.partial(masks.bigbird), small, window=small, first=st.integers(0, 3), random=st.integers(0, 3)),
)
combined = st.recursive(
    single,
    lambda inner: st.builds(lambda a, b, both: a & b if both else a | b, inner, inner, st.booleans()),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(combined, st.integers(1, 70), st.integers(1, 20))
def test_blocks_are_what_all_their_positions_are(mask: Mask, length: int, size: int):
    n = -(-length // size)
    cells = whole(mask, n * size).reshape(n, size, n, size)
    expected = cells.any((1, 3)).astype(int) + cells.all((1, 3))
    np.testing.assert_array_equal(masks.blocks(mask, length, size), expected)
    some, every = mask.bounds(np.arange(0, length, size), size)
    assert np.all(some | (expected == masks.EMPTY))
    assert np.all(~every | (expected == masks.FULL))


def test_few_blocks_of_a_window_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    looked, allowed = 0, masks.Window.allowed

    def counted(self: Any, q: Any, k: Any) -> Any:
        nonlocal looked
        found = allowed(self, q, k)
        looked += found.size
        return found

    monkeypatch.setattr(masks.Window, "allowed", counted)
    masks.blocks(masks.window(512), 2**15, 128)
    assert looked <= 2**15 * 3 * 128  # the diagonal and the window's end


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.window(0), "window: the width is 0; use a whole number, 1 or more"),
        (lambda: masks.window(float("nan")), "window: the width is nan"),  # which would see what comes after
        (lambda: masks.window(2.5), "window: the width is 2.5"),
        (lambda: masks.window(True), "window: the width is True"),
        (lambda: masks.strided(2.5, 2), "size is 2.5"),
        (lambda: masks.strided(0, 2), "size is 0"),
        (lambda: masks.strided(2, 0), "strided: stride is 0; use a whole number, 1 or more"),
        (lambda: masks.fixed(2, 0), "fixed: stride is 0"),
        (lambda: masks.bigbird(2, window=0), "bigbird: window is 0"),
        (lambda: masks.bigbird(2, random=-1), "bigbird: random is -1; use a whole number, 0 or more"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_impossible_masks_are_refused(make: Callable[[], Mask], message: str):
    with pytest.raises(ValueError, match=message):
        make()
