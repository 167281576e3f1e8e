"""The parts of a plan: documents taken, cut to pieces, placed in rows, rows in batches.

A part depends on the plan and on where the one before it ended. Documents are taken from each corpus epoch after epoch,
in an order of each epoch's own, as many at a time as pack well. What doesn't fill a batch waits for the next part.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxlm.data.packing import Placement, argsort
from jaxlm.stages import Stage, steps

PART = 2**16  # pieces planned together, about: more pack no better, and take longer until the first batch

PIECE = np.dtype([("source", np.int32), ("length", np.int32), ("start", np.int64)])
"""Consecutive tokens of a document: which corpus, how many, and where they begin among its tokens."""

Pieces = np.ndarray  # of dtype PIECE
Place = Callable[[Int[np.ndarray, " P"], Sequence[int]], Placement]


@runtime_checkable
class Recipe(Protocol):
    """What `plan.Plan` holds."""

    @property
    def documents(self) -> Mapping[str, Pieces]: ...
    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def place(self) -> Place: ...
    @property
    def seed(self) -> int: ...
    @property
    def passes(self) -> int | None: ...


class Start(NamedTuple):
    """All that a part depends on, beside the plan."""

    number: int = 0
    batch: int = 0
    """The number of its first batch."""
    stage: int = 0
    stage_batch: int = 0
    """The number of the stage's first batch."""
    taken: tuple[int, ...] = ()
    """Documents taken from each corpus before, over all epochs."""
    owed: tuple[float, ...] = ()
    """Tokens that each corpus has yet to give for those that others gave in this stage."""
    waiting: Pieces = np.empty(0, PIECE)
    """Pieces that were taken and are in no batch yet."""


class Part(NamedTuple):
    """Batches that are planned together."""

    start: Start
    pieces: Pieces
    """By row and position."""
    at: Int[np.ndarray, " P"]
    """The position in its row at which each piece begins."""
    begins: Int[np.ndarray, " R"]
    """Where the pieces of each row begin, and the end of the last."""
    batches: Sequence[tuple[int, Int[np.ndarray, " B"]]]
    """The row length and the rows of each; fewer rows where empty ones fill the last batches up."""
    after: Start | None
    """None: it is the last."""


def part(plan: Recipe, start: Start) -> Part:
    """Plans the part that begins so."""
    stage = plan.stages[start.stage]
    lengths, budget = stage.row_lengths, stage.tokens_per_batch
    count = steps(plan.stages)[start.stage]
    left = None if count is None else count - (start.batch - start.stage_batch)
    waiting = cut(start.waiting, lengths[-1])
    drawn, taken, owed = _draw(plan, start, _tokens(plan, start, left))
    last = plan.passes is not None and all(
        number == plan.passes * len(documents) for number, documents in zip(taken, plan.documents.values(), strict=True)
    )

    pieces = np.concatenate([waiting, cut(drawn, lengths[-1])])
    placed = plan.place(pieces["length"], lengths)
    rows = len(placed.row_lengths)
    begins = np.cumsum(np.bincount(placed.row + 1, minlength=rows + 1))
    in_order = np.argsort((np.cumsum(placed.row_lengths) - placed.row_lengths)[placed.row] + placed.at)
    pieces, at, row = pieces[in_order], placed.at[in_order], placed.row[in_order]

    shuffled = shuffle(rows, plan.seed, 1, start.number)
    has_waited = np.zeros(rows, bool)
    has_waited[placed.row[: len(waiting)]] = True
    shuffled = np.concatenate([shuffled[has_waited[shuffled]], shuffled[~has_waited[shuffled]]])
    batches: list[tuple[int, Int[np.ndarray, " B"]]] = []
    for length in lengths:
        those, size = shuffled[placed.row_lengths[shuffled] == length], budget // length
        end = len(those) if last else len(those) // size * size
        batches += [(length, those[i : min(i + size, end)]) for i in range(0, end, size)]
    batches = [batches[i] for i in shuffle(len(batches), plan.seed, 2, start.number)[:left]]

    unused = np.ones(rows, bool)
    for _, those in batches:
        unused[those] = False
    after = Start(
        start.number + 1,
        start.batch + len(batches),
        start.stage,
        start.stage_batch,
        taken,
        owed,
        pieces[unused[row]],
    )
    if left == len(batches):
        after = after._replace(stage=start.stage + 1, stage_batch=after.batch, owed=(0.0,) * len(owed))
    return Part(start, pieces, at, begins, batches, None if last or after.stage == len(plan.stages) else after)


def cut(pieces: Pieces, longest: int) -> Pieces:
    """Cuts pieces to at most `longest` tokens.

    Those of one piece overlap by a token, so that every token but its first is predicted once.
    """
    counts = -(-(pieces["length"] - 1) // (longest - 1))
    if (counts == 1).all():
        return pieces
    found = np.repeat(pieces, counts)
    within = (longest - 1) * ranges(np.zeros_like(counts), counts)
    found["start"] += within
    found["length"] = np.minimum(found["length"] - within, longest)
    return found


def ranges(begins: Int[np.ndarray, " N"], counts: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """`range(begin, begin + count)` for each, one after another."""
    return np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def shuffle(count: int, seed: int, *stream: int) -> Int[np.ndarray, " N"]:
    """An order of `count` things, the same with every version of NumPy, which promises that of raw bits alone."""
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(count)
    return argsort((bits >> np.uint64(1 + count.bit_length())).astype(np.int64))


def shares(plan: Recipe, stage: Stage) -> Sequence[float]:
    """The share of tokens that each corpus gives in a stage."""
    weights = stage.weights
    given = [int(d["length"].sum()) if weights is None else weights[name] for name, d in plan.documents.items()]
    return [share / sum(given) for share in given]


def _tokens(plan: Recipe, start: Start, left: int | None) -> float:
    """How many tokens to take: to the end of the longest epoch, unless fewer pack as well or are needed."""
    stage = plan.stages[start.stage]
    wanted = pieces = 0.0
    for source, (share, documents) in enumerate(zip(shares(plan, stage), plan.documents.values(), strict=True)):
        if share:
            epoch, first = divmod(start.taken[source], len(documents))
            _, ends = _epoch(plan, source, epoch)
            wanted = max(wanted, float(ends[-1] - ends[first]) / share)
            pieces += (
                share * float((1 + (documents["length"] - 2) // (stage.row_lengths[-1] - 1)).sum()) / float(ends[-1])
            )
    wanted = min(wanted, PART / pieces)
    if (
        left is not None
    ):  # by halves towards a stage's end, as padding takes positions too and the next may mix otherwise
        wanted = min(wanted, left * stage.tokens_per_batch / 2)
    return max(wanted, float(len(stage.row_lengths) * stage.tokens_per_batch))


def _draw(plan: Recipe, start: Start, tokens: float) -> tuple[Pieces, tuple[int, ...], tuple[float, ...]]:
    """Takes documents: what they are, how many have been taken of each corpus, and what each owes."""
    found: list[Pieces] = []
    taken, gave = list(start.taken), [0] * len(start.taken)
    weights = shares(plan, plan.stages[start.stage])
    for source, documents in enumerate(plan.documents.values()):
        wanted = start.owed[source] + weights[source] * tokens
        while gave[source] < wanted and taken[source] != (plan.passes or -1) * len(documents):
            epoch, first = divmod(taken[source], len(documents))
            order, ends = _epoch(plan, source, epoch)
            last = int(np.searchsorted(ends[1:], ends[first] + wanted - gave[source]))
            end = max(first, min(last, len(documents) - 1)) + 1  # rounding may leave nothing of what is wanted
            found.append(documents[order[first:end]])
            gave[source] += int(ends[end] - ends[first])
            taken[source] += end - first
    owed = tuple(o + w * sum(gave) - g for o, w, g in zip(start.owed, weights, gave, strict=True))
    return np.concatenate([np.empty(0, PIECE), *found]), tuple(taken), owed


@functools.lru_cache(maxsize=8)
def _epoch(plan: Recipe, source: int, epoch: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]]:
    """The order of a corpus' documents in an epoch, and how many tokens come before each, and in all."""
    documents = list(plan.documents.values())[source]
    order = shuffle(len(documents), plan.seed, 0, source, epoch)
    return order, np.concatenate([[0], np.cumsum(documents["length"][order], dtype=np.int64)])
