"""From a plan to batches on the devices, through grain."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import grain
import jax
import numpy as np
from jaxtyping import Int, Integer

from jaxlm import files
from jaxlm.data.augment import Augment, Row
from jaxlm.data.corpus import Corpus
from jaxlm.data.parts import Pieces
from jaxlm.data.plan import Plan, Rows
from jaxlm.types import Batch, Static

HostBatch = dict[str, Any]  # of NumPy arrays, and of what is static
SEGMENTS = 2**16 - 1  # documents in a row: their numbers are uint16, as transferring them takes time


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a plan: a random-access source for grain, or for indexing.

    `batches[i]` is `{"tokens": [B T], "segments": [B T]}` if rows are packed, else `{"tokens": [B T], "lengths": [B]}`,
    the tokens in the corpus' dtype. Targets and positions follow from these, and are made on the device.

    Raises:
        ValueError: no count for an endless plan, or one beyond the plan's end; corpora of other names than the
            plan's, with fewer tokens, or of different tokenizers; a share that there isn't.
    """

    corpora: Corpus | Mapping[str, Corpus]
    """Where the tokens are: the corpora of the plan, by name if there are several."""
    plan: Plan
    count: int | None = None
    """How many batches there are; None: all of the plan's."""
    augment: Sequence[Augment] = ()
    """What changes rows, one after another; its randomness depends on nothing but plan, batch and row."""
    skip: Sequence[Sequence[int]] = ()
    """Ranges `(begin, end)` of the plan's batches to leave out; what follows moves up. See `train.stop_at_spikes`."""
    share: tuple[Sequence[int], int] = ((0,), 1)
    """(parts, n): of each batch only these of n equal parts of its rows: a process its own, by `sharding.share`."""

    def __post_init__(self):
        ends = self.plan.count
        if self.count is None and ends is None:
            raise ValueError("Batches: the plan is endless; give a count")
        if not _in_order(self.skip):
            raise ValueError(f"Batches: skip is {self.skip}; give ranges (begin, end) in order, none within another")
        left = None if ends is None else ends - sum(end - begin for begin, end in self.skip)
        if self.count is not None and (self.count < 0 or (left is not None and self.count > left)):
            raise ValueError(f"Batches: the count is {self.count}; the plan has {left or 'no end of'} batches")
        if list(self.share[0]) != sorted(set(self.share[0]) & set(range(self.share[1]))) or not self.share[0]:
            raise ValueError(f"Batches: no parts {self.share[0]} of {self.share[1]}; count from 0, in order")
        if list(self.plan.documents) != list(self._corpora):
            raise ValueError(f"Batches: the corpora are {list(self._corpora)}, the plan's {list(self.plan.documents)}")
        if len({(corpus.manifest["tokenizer"], corpus.vocab) for corpus in self._corpora.values()}) > 1:
            raise ValueError(f"Batches: the corpora {list(self._corpora)} have different tokenizers; use one for all")
        if not 0 <= self.vocab - 1 <= np.iinfo(self._dtype).max:
            raise ValueError(f"Batches: augment has an id beyond {self._dtype}, the corpora's type of ids")
        for rows, length in itertools.chain.from_iterable(self.plan.shapes):
            if rows % self.share[1]:
                raise ValueError(
                    f"Batches: {rows} rows of {length} tokens can't be divided by {self.share[1]}; choose tokens per "
                    f"batch of a multiple of {self.share[1]} rows"
                )
        for documents, corpus in zip(self.plan.documents.values(), self._corpora.values(), strict=True):
            end = int(documents["start"][-1] + documents["length"][-1])
            if end > len(corpus.tokens):
                raise ValueError(f"Batches: the plan needs {end} tokens and {corpus.path} has {len(corpus.tokens)}")

    def __len__(self) -> int:
        if self.count is not None:
            return self.count
        assert self.plan.count is not None
        return self.plan.count - sum(end - begin for begin, end in self.skip)

    def __iter__(self) -> Iterator[HostBatch]:
        return (self[index] for index in range(len(self)))

    @property
    def vocab(self) -> int:
        """One more than the largest id that the corpora and what is put into rows may have."""
        ids = [id for augment in self.augment for id in augment.ids]
        return 1 + max([next(iter(self._corpora.values())).vocab - 1, *ids])

    @property
    def fingerprint(self) -> str:
        """Differs if any batch does, whichever are skipped."""
        about = repr(([corpus.fingerprint for corpus in self._corpora.values()], list(self.augment)))
        return f"{hashlib.sha256(about.encode()).hexdigest()[:16]}-{self.plan.fingerprint}"

    def specs(self, sharding: jax.sharding.Sharding | None = None) -> list[Batch]:
        """The shapes of every kind of batch, to compile for; on devices as `sharding` says.

        Raises:
            ValueError: a batch whose rows the devices don't divide.
        """
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        found: dict[str, Batch] = {}
        for stage, shapes in zip(self.plan.stages, self.plan.shapes, strict=True):
            for rows, length in shapes:
                if sharding is not None:
                    _divide(rows, length, sharding)
                batch: dict[str, Any] = {"tokens": shape((rows, length), self._dtype)}
                if self.plan.packed:
                    batch["segments"] = shape((rows, length), np.uint16)
                else:
                    batch["lengths"] = shape((rows,), np.int32)
                if self.augment:
                    batch["inputs"] = batch["tokens"]
                if stage.window:
                    batch["window"] = Static(stage.window)
                found.setdefault(str((rows, length, stage.window)), batch)
        return list(found.values())

    def __getitem__(self, index: int) -> HostBatch:
        """Gathers a batch.

        Raises:
            IndexError: `index` isn't below `len(batches)`.
            ValueError: a corpus isn't what was written, or it or an augmentation has an id beyond the vocabulary, which
                on a device would silently be another.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        index = self.planned(index)
        rows = self._own(self.plan.batch(index))
        tokens = np.zeros((rows.num_rows, rows.row_length), self._dtype)
        to = rows.row * rows.row_length + rows.at
        self._fill(tokens, rows.pieces, to)
        vocab = next(iter(self._corpora.values())).vocab
        if tokens.max() >= vocab:
            place = int(np.argmax(tokens.reshape(-1) >= vocab))
            raise ValueError(
                f"batch {index} has the token id {tokens.reshape(-1)[place]}, beyond the vocabulary of {vocab}, from "
                f"{self._where(rows.pieces, to, place)}; delete that corpus, write it again"
            )
        batch: HostBatch = {"tokens": tokens}
        if self.plan.packed:
            batch["segments"] = _segments(rows, to)
        else:
            batch["lengths"] = np.zeros(rows.num_rows, np.int32)
            batch["lengths"][rows.row] = rows.pieces["length"]
        if self.augment:
            batch["inputs"], batch["tokens"] = self._augmented(tokens, rows, index)
        stage = self.plan.stages[self.plan.stage(index)]
        return batch | ({"window": Static(stage.window)} if stage.window else {})

    def planned(self, index: int) -> int:
        """Which of the plan's batches the one at `index` is: a later one, if some are skipped."""
        for begin, end in self.skip:
            index += end - begin if index >= begin else 0
        return index

    def without(self, begin: int, end: int) -> "Batches":
        """These batches but for those from index `begin` to before `end`, which those after them take the place of."""
        first, after = self.planned(begin), self.planned(end - 1) + 1
        others = [(i, j) for i, j in self.skip if not first <= i < after]
        return dataclasses.replace(self, skip=sorted([*others, (first, after)]))

    @functools.cached_property
    def _corpora(self) -> Mapping[str, Corpus]:
        return self.corpora if isinstance(self.corpora, Mapping) else {"text": self.corpora}

    @functools.cached_property
    def _tokens(self) -> list[Integer[np.ndarray, " T"]]:
        """Of each corpus. A memmap's own slices would cost more than what they hold."""
        return [np.asarray(corpus.tokens) for corpus in self._corpora.values()]

    @property
    def _dtype(self) -> np.dtype[Any]:
        return self._tokens[0].dtype

    def _own(self, rows: Rows) -> Rows:
        """This process' share of the rows."""
        parts, of = self.share
        each = rows.num_rows // of
        own = np.isin(rows.row // each, parts)
        row = np.searchsorted(parts, rows.row[own] // each) * each + rows.row[own] % each
        return Rows(each * len(parts), rows.row_length, rows.pieces[own], row, rows.at[own])

    def _fill(self, tokens: Integer[np.ndarray, "B T"], pieces: Pieces, to: Int[np.ndarray, " P"]) -> None:
        """Copies each piece to where it begins among the batch's positions."""
        # Slices of memoryviews cost a third of what those of arrays do, and for short pieces that is all the cost.
        found, corpora = tokens.reshape(-1).data, [corpus.data for corpus in self._tokens]
        begins, ends = pieces["start"], pieces["start"] + pieces["length"]
        for source, corpus in enumerate(self._corpora.values()):
            own = pieces["source"] == source if len(corpora) > 1 else slice(None)
            corpus.check(begins[own], ends[own])
        columns = (pieces["source"], begins, ends, to, to + pieces["length"])
        for source, begin, end, at, after in zip(*(column.tolist() for column in columns), strict=True):
            found[at:after] = corpora[source][begin:end]

    def _where(self, pieces: Pieces, to: Int[np.ndarray, " P"], place: int) -> str:
        """Where a corpus has what is at a place among the batch's positions."""
        i = int(np.flatnonzero((to <= place) & (place < to + pieces["length"]))[0])
        corpus, token = list(self._corpora.values())[pieces["source"][i]], int(pieces["start"][i]) + place - int(to[i])
        document = int(np.searchsorted(corpus.offsets, token, "right")) - 1
        return f"position {token - corpus.offsets[document]} of document {document} of {corpus.file('tokens')}"

    def _augmented(self, tokens: Integer[np.ndarray, "B T"], rows: Rows, index: int) -> tuple[Any, Any]:
        """What the model sees and what it predicts, row by row."""
        inputs, tokens = tokens.copy(), tokens.copy()
        each, vocab = rows.num_rows // len(self.share[0]), self.vocab
        for row in range(rows.num_rows):
            these = rows.row == row
            bounds = np.stack([rows.at[these], rows.at[these] + rows.pieces["length"][these]], axis=1)
            changed = Row(inputs[row], tokens[row], bounds)
            seed = np.random.SeedSequence(
                self.plan.seed, spawn_key=(3, index, self.share[0][row // each] * each + row % each)
            )
            rng = np.random.Generator(np.random.Philox(seed))
            for augment in self.augment:
                changed = augment(changed, rng)
            for ids in (changed.inputs, changed.tokens):
                if ids.min() < 0 or ids.max() >= vocab:
                    raise ValueError(
                        f"batch {index} has token ids from {ids.min()} to {ids.max()} after {self.augment}, and a "
                        f"vocabulary of {vocab}; their `ids` must name all that they put into rows"
                    )
            inputs[row], tokens[row] = changed.inputs, changed.tokens
        return inputs, tokens


def _segments(rows: Rows, to: Int[np.ndarray, " P"]) -> Integer[np.ndarray, "B T"]:
    """The number of each position's document within its row, counted from 1, with 0 for padding."""
    size, lengths = rows.num_rows * rows.row_length, rows.pieces["length"]
    numbers = 1 + np.arange(len(to)) - np.searchsorted(rows.row, rows.row)
    space = np.append(to, size) - np.append(0, to + lengths)  # before each piece, and after the last
    if rows.row_length > 2 * SEGMENTS and numbers.max() > SEGMENTS:
        raise ValueError(f"a row has {numbers.max()} documents, and may have {SEGMENTS}; use shorter rows")
    of_each = np.append(np.stack([0 * to, numbers], axis=1), 0).astype(np.uint16)
    return np.repeat(of_each, np.append(np.stack([space[:-1], lengths], axis=1), space[-1])).reshape(rows.num_rows, -1)


def _divide(rows: int, length: int, sharding: jax.sharding.Sharding) -> None:
    try:
        sharding.shard_shape((rows, length))
    except ValueError:
        raise ValueError(
            f"Batches: {rows} rows of {length} tokens can't be divided over {len(sharding.device_set)} devices; "
            "choose more tokens per batch, with a multiple of as many rows"
        ) from None


def write_skips(path: Path, skip: Sequence[Sequence[int]]) -> None:
    """Writes the ranges that `Batches` leave out into a file."""
    files.write_whole(path, files.signed({"batches": skip}))


def read_skips(path: Path) -> list[list[int]]:
    """What `write_skips` wrote; none if there is no such file.

    Raises:
        ValueError: the file is damaged, or says something else.
    """
    if not files.exists(path):
        return []
    found: Any = files.read_signed(path).get("batches")
    if not isinstance(found, list) or not (all(map(_is_range, cast(list[Any], found))) and _in_order(found)):
        raise ValueError(f"{path} is damaged: {found!s:.200} are no ranges of batches")
    return found


def _in_order(ranges: Sequence[Sequence[int]]) -> bool:
    return all(end > begin >= after for (begin, end), (_, after) in zip(ranges, [(0, 0), *ranges], strict=False))


def _is_range(value: Any) -> bool:
    bounds = cast(list[Any], value) if isinstance(value, list) else []
    return len(bounds) == 2 and all(type(bound) is int and abs(bound) < 2**31 for bound in bounds)


class _Placed:
    """Batches where they are to lie, for grain, which takes `StopIteration` for the end, and waits for ever once a
    thread has ended by what is no `Exception`.
    """

    def __init__(self, batches: Batches, place: Callable[[HostBatch], Batch] | None):
        self._batches, self._place = batches, place

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        try:
            batch = self._batches[index]
            return self._place(batch) if self._place else batch
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                raise
            raise RuntimeError(f"batch {index} can't be made: {error!r}") from error


def iterate(
    batches: Batches, *, start: int = 0, place: Callable[[HostBatch], Batch] | None = None, prefetch: int = 2
) -> grain.DatasetIterator[Batch]:
    """Iterates over batches, preparing the next ones in the background.

    Its state is one integer, the index of the next batch, whatever was prefetched. Close it when done.

    Args:
        batches: a source.
        start: the index of the first batch to give.
        place: puts a batch onto devices, such as `functools.partial(sharding.place, rows=by_rows(mesh))`.
        prefetch: how many batches to prepare ahead.
    """
    # Threads to read with would cost 30 times the reading: the file is memory-mapped.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(_Placed(batches, place)).to_iter_dataset(reading)
    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch))
    iterator.set_state({"next_index": start})
    return iterator
