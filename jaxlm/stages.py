"""What batches are like while a run goes on: one value that plan, schedule and step all read.

Lengths of rows, tokens in a batch, how far attention looks, how corpora are mixed and how the learning rate is scaled
may change from stage to stage. How many steps each takes follows from the stages alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxlm.numbers import check_whole, is_whole

MOST_ROW_LENGTHS = 6  # a program is compiled for each


@dataclasses.dataclass(frozen=True)
class Stage:
    """What batches are like for a while.

    Raises:
        ValueError: row lengths below 2, more than 6 of them or none; fewer tokens in a batch than its longest row has;
            a window, a learning rate or an end that isn't above 0; weights below 0, or that sum to nothing.
    """

    row_lengths: Sequence[int]
    """The lengths that rows may have, 1 to 6 of them; kept in order."""
    tokens_per_batch: int
    """Positions in a batch: it has as many rows as fit."""
    until_tokens: int | None = None
    """Where the stage ends: at the first batch that has this many positions of the run before it; None: never."""
    window: int | None = None
    """Each position sees so many, itself among them; None: all before it."""
    learning_rate: int | float = 1.0
    """Times the schedule's."""
    weights: Mapping[str, int | float] | None = None
    """The share of tokens that each corpus gives, in any unit; None: as many as it has, so that all end together."""

    def __post_init__(self):
        row_lengths = tuple(sorted({*self.row_lengths}))
        if not 1 <= len(row_lengths) <= MOST_ROW_LENGTHS or not all(is_whole(length, 2) for length in row_lengths):
            raise ValueError(
                f"Stage: row lengths {list(row_lengths)}; use 1 to {MOST_ROW_LENGTHS}, whole numbers of 2 or more"
            )
        object.__setattr__(self, "row_lengths", tuple(map(int, row_lengths)))
        for name in ("tokens_per_batch", "until_tokens", "window"):
            if (value := getattr(self, name)) is not None:
                check_whole("Stage", **{name: value})
        if self.tokens_per_batch < row_lengths[-1]:
            raise ValueError(
                f"Stage: {self.tokens_per_batch} tokens per batch don't hold a row of {row_lengths[-1]}; use more, or "
                "shorter rows"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"Stage: learning_rate is {self.learning_rate}; use a number above 0")
        if self.weights is not None and not (
            min(self.weights.values(), default=-1) >= 0 and 0 < sum(self.weights.values()) < math.inf
        ):
            raise ValueError(f"Stage: the weights are {dict(self.weights)}; use 0 or more, and more than 0 for one")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and row length of every kind of batch, shortest rows first."""
        return [(self.tokens_per_batch // length, length) for length in self.row_lengths]


def steps(stages: Sequence[Stage]) -> list[int | None]:
    """How many steps each stage takes; None: it doesn't end, as only the last may.

    Raises:
        ValueError: no stage, one before the last that has no end, or one that ends before it begins.

    >>> steps([Stage([64], 1024, until_tokens=10_000), Stage([64, 256], 4096)])
    [10, None]
    """
    if not stages:
        raise ValueError("stages: there is none; give one or more")
    found: list[int | None] = []
    tokens = 0
    for i, stage in enumerate(stages):
        if stage.until_tokens is None:
            if i < len(stages) - 1:
                raise ValueError(f"stages: stage {i} of {len(stages)} has no end; give it until_tokens")
            return [*found, None]
        count = -(-(stage.until_tokens - tokens) // stage.tokens_per_batch)
        if count < 1:
            raise ValueError(
                f"stages: stage {i} ends at {stage.until_tokens} tokens, when {tokens} have gone; let it end later"
            )
        found.append(count)
        tokens += count * stage.tokens_per_batch
    return found


def tokens_before(stages: Sequence[Stage], step: int) -> int:
    """Positions in the batches before a step: what a schedule over tokens counts.

    Raises:
        ValueError: as `steps`, or a step after the last stage's end.

    >>> tokens_before([Stage([64], 1024, until_tokens=10_000), Stage([64, 256], 4096)], step=11)
    14336
    """
    tokens = 0
    for stage, count in zip(stages, steps(stages), strict=True):
        taken = step if count is None else min(step, count)
        tokens += taken * stage.tokens_per_batch
        step -= taken
    if step:
        raise ValueError(f"tokens_before: the stages end {step} steps earlier")
    return tokens


def length_warmup(row_lengths: Sequence[int], tokens_per_batch: int, tokens: int) -> list[Stage]:
    """Short rows first, which cost less attention and allow a higher learning rate early on.

    The first stage has only the shortest rows, and each further one those of one more length; documents that are
    longer than its rows are cut. (Sequence length warm-up, https://arxiv.org/abs/2108.06084, truncates them instead.)

    Args:
        row_lengths: those of the last stage.
        tokens_per_batch: positions in a batch, the same in all stages.
        tokens: when the last stage begins; the others share them equally.

    >>> [stage.row_lengths for stage in length_warmup([64, 128, 256], 1024, tokens=100_000)]
    [(64,), (64, 128), (64, 128, 256)]
    """
    lengths = sorted(set(row_lengths))
    ends = [tokens * i // (len(lengths) - 1) for i in range(1, len(lengths))]
    return [Stage(lengths[: i + 1], tokens_per_batch, end) for i, end in enumerate([*ends, None])]


def batch_ramp(row_lengths: Sequence[int], tokens_per_batch: int, tokens: int, *, first: int) -> list[Stage]:
    """Small batches first, which double until they have their size.

    Each size up to the last gets an equal share of `tokens`. The learning rate grows with the root of the size, as
    Adam's does (https://arxiv.org/abs/2405.14578, section 3, for small batches): it is the schedule's at full size.

    Args:
        row_lengths: those of all stages.
        tokens_per_batch: positions in a batch at the end: `first` times a power of two.
        tokens: when batches have their size.
        first: positions in a batch at the beginning.

    Raises:
        ValueError: `tokens_per_batch` isn't `first` times a power of two.

    >>> [stage.tokens_per_batch for stage in batch_ramp([64], 4096, tokens=100_000, first=1024)]
    [1024, 2048, 4096]
    """
    doublings = max(1, tokens_per_batch // max(1, first)).bit_length() - 1
    if first << doublings != tokens_per_batch:
        raise ValueError(
            f"batch_ramp: {tokens_per_batch} tokens per batch isn't {first} times a power of two; choose another first"
        )
    return [
        Stage(
            row_lengths,
            first << i,
            None if i == doublings else tokens * (i + 1) // doublings,
            learning_rate=2 ** (-(doublings - i) / 2),
        )
        for i in range(doublings + 1)
    ]
