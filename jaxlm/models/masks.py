"""Which keys a query sees, as values: all that came before, a window of them, blocks of them, and combinations.

All are causal, and in all of them a query sees itself, so that no query sees nothing. Whether it sees a key depends on
the two positions alone, not on how long the row is: a model generates with the pattern that it was trained with.

>>> sparse = window(128) | bigbird(64, window=1, first=1, random=2)
>>> bool(sparse.allowed(1000, 3)), bool((sparse & window(500)).allowed(1000, 3))
(True, False)
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from jaxlm.numbers import check_whole, is_whole

EMPTY: Final = 0
PARTIAL: Final = 1
FULL: Final = 2


@runtime_checkable
class Mask(Protocol):
    """Hashable, and equal to another that was made alike."""

    def allowed(self, q: Any, k: Any, /) -> Any:
        """Whether the query at position `q` sees the key at `k`: NumPy or traced integers that broadcast together."""
        ...

    def bounds(self, starts: np.ndarray, size: int, /) -> tuple[np.ndarray, np.ndarray]:
        """For blocks that begin at `starts [n]`: whether any query of one (rows) may see any key of another, and
        whether all surely see all. Where `bounds` doesn't know, `blocks` looks at each position.
        """
        ...

    def __and__(self, other: Any, /) -> "Mask": ...

    def __or__(self, other: Any, /) -> "Mask": ...


def _and(self: Mask, other: Mask) -> Mask:
    return self if other == causal else _Both(self, other)


def _or(self: Mask, other: Mask) -> Mask:
    return _Either(self, other)


@dataclasses.dataclass(frozen=True)
class Window:
    """The last `width` keys, the query's own position included; None: all.

    Raises:
        ValueError: a width that is no whole number of 1 or more.
    """

    width: int | None = None

    def __post_init__(self):
        if self.width is not None and not is_whole(self.width):
            raise ValueError(
                f"window: the width is {self.width}; use a whole number, 1 or more (1: each token sees itself alone)"
            )

    def allowed(self, q: Any, k: Any) -> Any:
        before = k <= q
        return before if self.width is None else before & (q - k < self.width)

    def bounds(self, starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        distance = starts[:, None] - starts[None]  # in a pair of blocks it goes up to size - 1 further, both ways
        width = math.inf if self.width is None else self.width
        some = (distance + size > 0) & (distance - size + 1 < width)
        return some, (distance - size + 1 >= 0) & (distance + size - 1 < width)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Window):
            return other if self.width is None else _Both(self, other)
        widths = [mask.width for mask in (self, other) if mask.width is not None]
        return Window(min(widths)) if widths else self

    __or__ = _or


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of `size` positions: a query of block i sees those keys before it of which `rule(i, j, *parameters)`.

    Args:
        size: positions in a block.
        rule: a function at the top of a module, of NumPy or traced integers that broadcast together. It must hold for
            i = j.
        parameters: what else to give it; hashable.

    Raises:
        ValueError: a size below 1.
    """

    size: int
    rule: Callable[..., Any]
    parameters: tuple[Any, ...] = ()

    def __post_init__(self):
        check_whole("blocks", size=self.size)

    def allowed(self, q: Any, k: Any) -> Any:
        return (k <= q) & self.rule(q // self.size, k // self.size, *self.parameters)

    def bounds(self, starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        cell = math.gcd(size, self.size)  # within cells of this size the rule is constant
        at = (starts[:, None] + np.arange(0, size, cell)).ravel() // self.size
        rule = np.broadcast_to(self.rule(at[:, None], at[None], *self.parameters), (len(at), len(at)))
        rule = rule.reshape(len(starts), size // cell, len(starts), size // cell)
        some, all_before = Window().bounds(starts, size)
        return rule.any((1, 3)) & some, rule.all((1, 3)) & all_before

    __and__, __or__ = _and, _or


@dataclasses.dataclass(frozen=True)
class _Both:
    left: Mask
    right: Mask

    def allowed(self, q: Any, k: Any) -> Any:
        return self.left.allowed(q, k) & self.right.allowed(q, k)

    def bounds(self, starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        left, right = self.left.bounds(starts, size), self.right.bounds(starts, size)
        return left[0] & right[0], left[1] & right[1]

    __and__, __or__ = _and, _or


@dataclasses.dataclass(frozen=True)
class _Either:
    left: Mask
    right: Mask

    def allowed(self, q: Any, k: Any) -> Any:
        return self.left.allowed(q, k) | self.right.allowed(q, k)

    def bounds(self, starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        left, right = self.left.bounds(starts, size), self.right.bounds(starts, size)
        return left[0] | right[0], left[1] | right[1]

    __and__, __or__ = _and, _or


causal: Final = Window()
"""All keys up to the query's own position."""


def window(width: int) -> Mask:
    """The last `width` keys, the query's own position included (Longformer, https://arxiv.org/abs/2004.05150).

    Raises:
        ValueError: a width that is no whole number of 1 or more.
    """
    return Window(width)


def strided(block: int, stride: int) -> Mask:
    """The last `stride` blocks and each `stride`-th before: Sparse Transformer's strided pattern, by blocks.

    Both of its heads' patterns together (https://arxiv.org/abs/1904.10509, section 4.3); with a stride of about
    `sqrt(T / block)` a row of T costs `T ** 1.5`.

    Args:
        block: positions in a block.
        stride: in blocks.

    Raises:
        ValueError: one of them is below 1.
    """
    check_whole("strided", stride=stride)
    return Blocks(block, _strided, (stride,))


def fixed(block: int, stride: int) -> Mask:
    """The blocks of the query's own group of `stride`, and the last block of each group: Sparse Transformer's fixed
    pattern, by blocks, which its authors prefer for text (https://arxiv.org/abs/1904.10509, section 4.3).

    Args:
        block: positions in a block.
        stride: blocks in a group.

    Raises:
        ValueError: one of them is below 1.
    """
    check_whole("fixed", stride=stride)
    return Blocks(block, _fixed, (stride,))


def bigbird(block: int, *, window: int = 3, first: int = 1, random: int = 2, seed: int = 0) -> Mask:
    """The last `window` blocks, the `first` of the row, and `random` others (https://arxiv.org/abs/2007.14062).

    The causal part of BigBird. Each block of queries draws its random blocks from those before it, with replacement,
    by a hash of its number, so that they don't depend on the length of the row.

    Args:
        block: positions in a block.
        window: blocks, the query's own included.
        first: blocks that all queries see.
        random: draws for each block of queries.
        seed: another one draws others.

    Raises:
        ValueError: `block` or `window` is below 1, or another below 0.
    """
    check_whole("bigbird", window=window)
    check_whole("bigbird", 0, first=first, random=random, seed=seed)
    return Blocks(block, _bigbird, (window, first, random, seed))


@functools.lru_cache(maxsize=64)
def blocks(mask: Mask, length: int, size: int) -> np.ndarray:
    """Which blocks of `size` queries (rows) see which blocks of as many keys: EMPTY, PARTIAL or FULL, int8 `[n n]`.

    What `mask.bounds` knows costs nothing; other blocks are looked at position by position.

    Args:
        mask: which keys a query sees.
        length: of the row; the last block is taken as whole.
        size: positions in a block.

    >>> blocks(window(4), 12, 4)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]], dtype=int8)
    """
    starts = np.arange(0, length, size)
    some, every = mask.bounds(starts, size)
    found = np.where(every, FULL, EMPTY).astype(np.int8)
    within = np.arange(size)
    for i in range(len(starts)):
        unknown = np.flatnonzero(some[i] & ~every[i])
        q, k = starts[i] + within[:, None, None], starts[unknown][:, None] + within
        allowed = np.broadcast_to(mask.allowed(q, k), (size, len(unknown), size))
        found[i, unknown] = allowed.any((0, 2)) + allowed.all((0, 2))
    found.flags.writeable = False
    return found


def _strided(i: Any, j: Any, stride: int) -> Any:
    return (i - j < stride) | ((i - j) % stride == 0)


def _fixed(i: Any, j: Any, stride: int) -> Any:
    return (i // stride == j // stride) | (j % stride == stride - 1)


def _bigbird(i: Any, j: Any, window: int, first: int, random: int, seed: int) -> Any:
    seen = (i - j < window) | (j < first)
    for draw in range(random):
        # A multiplicative hash in 24 bits, whose products fit into int32 wherever int64 isn't to be had.
        mixed = (i % 4096 + 1) * (40503 + 2 * (seed * 31 + draw) % 65536) % 65521
        mixed = (mixed * 30011 + i // 4096 + draw) % 65521
        seen = seen | (j == mixed % (i + (i == 0)))
    return seen
