"""Which tokens go into which row of which batch: pure functions of document lengths, stages and a seed.

Rows come in a few lengths, and every batch has the same number of positions, so a step costs about the same whichever
it gets and a program is compiled for each length only. As batch i depends on nothing but the plan, a run resumes from
one integer, on any number of hosts, and these need no communication to have the same shape at the same step.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxlm import stages as staging
from jaxlm.data import parts
from jaxlm.data.packing import best_fit, one_a_row
from jaxlm.data.parts import PIECE, Part, Pieces, Place, Start, ranges
from jaxlm.numbers import is_whole
from jaxlm.stages import Stage

Lengths = Int[np.ndarray, " D"]

VERSION = 1  # to be raised when the same plan comes to have other batches, as tests/data/test_plan.py will notice
LONGEST = 2**31  # tokens that no document has, for lengths are int32
KEPT = 8  # parts whose beginnings are remembered, for going back a little
_PLANNING = threading.RLock()  # one thread may prepare batches while another evaluates


class Rows(NamedTuple):
    """What one batch holds: piece p is in row `row[p]` from position `at[p]` on; all else is padding."""

    num_rows: int
    row_length: int
    pieces: Pieces
    """By row and position."""
    row: Int[np.ndarray, " P"]
    at: Int[np.ndarray, " P"]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The batches of a run, by number. Made by `pack`, `bucket`, `pad` and `concat`.

    Raises:
        ValueError: what those say.
    """

    documents: Mapping[str, Pieces]
    """Those of each corpus in which there is something to predict."""
    stages: tuple[Stage, ...]
    place: Place
    seed: int
    passes: int | None
    """How often each document comes; None: for ever."""
    too_short: Mapping[str, int]
    """Documents of each corpus that have less than two tokens, and so nothing to predict: they are left out."""

    def __post_init__(self):
        if not (is_whole(self.seed, 0) and self.seed < 2**128):
            raise ValueError(f"plan: the seed is {self.seed}; use a whole number, 0 or more")
        for name, documents in self.documents.items():
            if not len(documents):
                raise ValueError(f"plan: no document of {name!r} has two tokens, so that there is nothing to predict")
        for stage in self.stages:
            if stage.weights is not None and stage.weights.keys() != self.documents.keys():
                raise ValueError(f"plan: weights of {sorted(stage.weights)} for the corpora {sorted(self.documents)}")
        ends = staging.steps(self.stages)
        if self.passes is not None and (not is_whole(self.passes) or ends != [None] or self.stages[0].weights):
            raise ValueError(
                f"plan: {self.passes} passes; use 1 or more, for a single stage that has no end and no weights"
            )

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents."""
        return self.place is best_fit

    @functools.cached_property
    def count(self) -> int | None:
        """How many batches there are; None: endless."""
        if self.passes is None:
            return None if self.stages[-1].until_tokens is None else sum(filter(None, staging.steps(self.stages)))
        *_, last = self.parts()
        return last.start.batch + len(last.batches)

    @functools.cached_property
    def shapes(self) -> list[list[tuple[int, int]]]:
        """Rows and row length of every kind of batch that each stage may have, shortest rows first."""
        found: list[list[tuple[int, int]]] = []
        documents = [documents["length"] for documents in self.documents.values()]
        lengths = np.empty(0, np.int32)  # of earlier stages' pieces, which may wait for a later one
        for stage in self.stages:
            longest = stage.row_lengths[-1]
            uncut = np.concatenate([lengths, *documents])
            last = 2 + (uncut - 2) % (longest - 1)  # the length of the last piece; those before it have the longest
            lengths = np.flatnonzero(np.bincount(np.concatenate([np.minimum(uncut, longest), last])))
            used = set(np.searchsorted(stage.row_lengths, lengths).tolist())
            found.append([shape for i, shape in enumerate(stage.shapes) if i in used])
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs if any batch does."""
        stages = [dataclasses.asdict(stage) for stage in self.stages]
        about = [VERSION, self.place.__name__, stages, int(self.seed), self.passes, list(self.documents)]
        digest = hashlib.sha256(json.dumps(about).encode())
        for documents in self.documents.values():
            digest.update(documents.tobytes())
        return digest.hexdigest()[:16]

    def stage(self, index: int) -> int:
        """The number of the stage that batch `index` belongs to."""
        ends = np.cumsum([np.inf if steps is None else steps for steps in staging.steps(self.stages)])
        return int(np.searchsorted(ends, index, "right"))

    def batch(self, index: int) -> Rows:
        """What batch `index` holds.

        Raises:
            IndexError: it is below 0, or the plan ends before it.
        """
        part = self._part_with(index)
        row_length, rows = part.batches[index - part.start.batch]
        begins, counts = part.begins[rows], part.begins[rows + 1] - part.begins[rows]
        which = ranges(begins, counts)
        num_rows = self.stages[part.start.stage].tokens_per_batch // row_length
        return Rows(num_rows, row_length, part.pieces[which], np.repeat(np.arange(len(rows)), counts), part.at[which])

    def parts(self) -> Iterator[Part]:
        """What is planned together, one after another."""
        number = 0
        while (part := self._part(number)) is not None:
            yield part
            number += 1

    @functools.cached_property
    def _starts(self) -> dict[int, Start | None]:
        """Where parts begin, by their numbers: the first and the last few that were planned."""
        return {0: Start(taken=(0,) * len(self.documents), owed=(0.0,) * len(self.documents))}

    @functools.cached_property
    def _planned(self) -> Callable[[int], Part]:
        """The part of that number, whose beginning is known."""

        @functools.lru_cache(maxsize=4)
        def planned(number: int) -> Part:
            start = self._starts[number]
            assert start is not None
            return parts.part(self, start)

        return planned

    def _part(self, number: int) -> Part | None:
        with _PLANNING:
            known = max(n for n in self._starts if n <= number)
            while known < number and self._starts[known] is not None:
                known += 1
                self._starts[known] = self._planned(known - 1).after
                self._starts.pop(known - KEPT if known > KEPT else -1, None)
            return None if self._starts[known] is None else self._planned(number)

    def _part_with(self, index: int) -> Part:
        with _PLANNING:
            number = max(
                (n for n, start in self._starts.items() if start is not None and start.batch <= index), default=0
            )
            while index >= 0 and (part := self._part(number)) is not None:
                if index < part.start.batch + len(part.batches):
                    return part
                number += 1
        raise IndexError(f"batch {index} of a plan that has {self.count} of them")


def make_plan(
    lengths: Lengths | Mapping[str, Lengths],
    stages: Stage | Sequence[Stage],
    place: Place,
    *,
    seed: int = 0,
    passes: int | None = None,
) -> Plan:
    """What `pack` and `bucket` are made with: any rule of what goes into which row, and any stages.

    Documents longer than the longest row are cut into pieces that overlap by one token, so every token but the first
    of each document is predicted exactly once an epoch.

    Args:
        lengths: tokens in each document, which follow one another in their corpus; of several corpora by their names.
        stages: what batches are like, and for how long.
        place: `packing.best_fit` or `packing.one_a_row`.
        seed: orders documents, rows and batches; 0 or more.
        passes: how often each document comes. Then batches that aren't full have empty rows, and the plan ends: for
            evaluation. None: epochs follow without end, and what doesn't fill a batch waits for the next one.

    Raises:
        ValueError: a corpus without a document of two tokens, so that there is nothing to predict; a negative seed;
            stages of which one but the last has no end, or whose weights name other corpora; less than one pass, or
            passes of more than a single stage without end and weights; a document of 2^31 tokens or more.
    """
    named = lengths if isinstance(lengths, Mapping) else {"text": lengths}
    documents: dict[str, Pieces] = {}
    too_short: dict[str, int] = {}
    for source, (name, each) in enumerate(named.items()):
        each = np.asarray(each, np.int64)
        if (long := each >= LONGEST).any():
            raise ValueError(
                f"make_plan: document {int(np.argmax(long))} of {name} has {each[long][0]} tokens; cut it into such of "
                f"less than {LONGEST}"
            )
        found = np.empty(len(each), PIECE)
        found["source"], found["length"], found["start"] = source, each, np.cumsum(each) - each
        documents[name] = found[each >= 2]
        too_short[name] = len(each) - len(documents[name])
    stages = (stages,) if isinstance(stages, Stage) else tuple(stages)
    return Plan(documents, stages, place, seed, passes, too_short)


def pack(
    lengths: Lengths | Mapping[str, Lengths],
    row_lengths: Sequence[int],
    tokens_per_batch: int,
    seed: int = 0,
    *,
    passes: int | None = None,
) -> Plan:
    """Length-bucketed packing: rows of a few lengths, each filled with whole documents.

    A document goes where it leaves the least space, or else into a new row, the shortest that holds it: with 4 lengths
    some 0.998 of all positions hold real tokens, and short documents cost little attention. Documents in a row don't
    see each other, if the model heeds a batch's `segments`.

    Args, errors: as `make_plan`; `row_lengths` and `tokens_per_batch` as in `Stage`.

    >>> plan = pack(np.array([3, 7, 4, 5]), row_lengths=[4, 8], tokens_per_batch=8, passes=1)
    >>> plan.shapes, plan.count, [plan.batch(i).pieces["length"].tolist() for i in range(3)]
    ([[(2, 4), (1, 8)]], 3, [[7], [5, 3], [4]])
    """
    return make_plan(lengths, Stage(row_lengths, tokens_per_batch), best_fit, seed=seed, passes=passes)


def bucket(
    lengths: Lengths | Mapping[str, Lengths],
    row_lengths: Sequence[int],
    tokens_per_batch: int,
    seed: int = 0,
    *,
    passes: int | None = None,
) -> Plan:
    """Length-bucketed rows: one piece of a document in each, in the shortest row that holds it.

    For models that can't keep documents in a row apart, and for evaluation; `best_row_lengths` chooses the lengths.

    Args, errors: as `make_plan`; `row_lengths` and `tokens_per_batch` as in `Stage`.
    """
    return make_plan(lengths, Stage(row_lengths, tokens_per_batch), one_a_row, seed=seed, passes=passes)


def pad(
    lengths: Lengths | Mapping[str, Lengths],
    row_length: int,
    tokens_per_batch: int,
    seed: int = 0,
    *,
    passes: int | None = None,
) -> Plan:
    """One piece of a document a row, and all rows equally long: what everything else is measured against."""
    return bucket(lengths, [row_length], tokens_per_batch, seed, passes=passes)


def concat(
    lengths: Lengths | Mapping[str, Lengths],
    row_length: int,
    tokens_per_batch: int,
    seed: int = 0,
    *,
    passes: int | None = None,
) -> Plan:
    """Each corpus as one long document, cut into rows: none is padded, documents are cut, and rows see across them.

    As nanoGPT, GPT-3 and most others do; for comparison. Beyond 2^30 tokens it is several documents, each as long.
    """
    named = lengths if isinstance(lengths, Mapping) else {"text": lengths}
    totals = {name: int(np.sum(each, dtype=np.int64)) for name, each in named.items()}
    joined = {name: np.diff([*range(0, total, LONGEST // 2), total]) for name, total in totals.items()}
    return bucket(joined, [row_length], tokens_per_batch, seed, passes=passes)
