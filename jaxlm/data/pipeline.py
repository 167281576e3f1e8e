"""From a plan to batches on the devices, through grain."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from jaxtyping import Integer

from jaxlm.data.corpus import Corpus
from jaxlm.data.plan import BucketPlan
from jaxlm.types import Batch

HostBatch = dict[str, Integer[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a plan: a random-access source for grain, or for indexing.

    Args:
        corpus: where the tokens are.
        plan: which of them go into which batch.
        count: how many batches there are, counted over all epochs; None: one epoch.

    `batches[i]` is `{"tokens": [B T], "lengths": [B]}`, the tokens in the corpus' dtype.

    Raises:
        ValueError: the plan is for a larger corpus.
    """

    corpus: Corpus
    plan: BucketPlan
    count: int | None = None

    def __post_init__(self):
        end = int((self.plan.starts + self.plan.lengths).max())
        if end > len(self.corpus.tokens):
            raise ValueError(
                f"Batches: the plan needs {end} tokens and {self.corpus.path} has {len(self.corpus.tokens)}"
            )

    def __len__(self) -> int:
        return self.plan.batches_per_epoch if self.count is None else self.count

    def __iter__(self) -> Iterator[HostBatch]:
        return (self[index] for index in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Differs if any batch does."""
        return f"{self.corpus.fingerprint}-{self.plan.fingerprint}"

    def specs(self, sharding: jax.sharding.Sharding | None = None) -> list[Batch]:
        """The shapes of every kind of batch, to compile for; on devices as `sharding` says."""
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        return [
            {"tokens": shape((rows, length), self.corpus.tokens.dtype), "lengths": shape((rows,), np.int32)}
            for rows, length in self.plan.shapes
        ]

    def __getitem__(self, index: int) -> HostBatch:
        """Gathers a batch.

        Raises:
            IndexError: `index` isn't below `len(batches)`.
            ValueError: the corpus holds an id beyond its vocabulary. On a device it would silently be another's.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows = self.plan.batch(index)
        tokens = np.zeros((len(rows.starts), rows.row_length), self.corpus.tokens.dtype)
        for row, start, length in zip(tokens, rows.starts, rows.lengths, strict=True):
            row[:length] = self.corpus.tokens[start : start + length]
        if tokens.max() >= self.corpus.vocab:
            raise ValueError(
                f"batch {index} of {self.corpus.path} has the token id {tokens.max()}, beyond the vocabulary of "
                f"{self.corpus.vocab}; the corpus is damaged: delete it, write it again"
            )
        return {"tokens": tokens, "lengths": rows.lengths.astype(np.int32)}


def iterate(
    batches: Batches, *, start: int = 0, place: Callable[[HostBatch], Batch] | None = None, prefetch: int = 2
) -> grain.DatasetIterator[Batch]:
    """Iterates over batches, preparing the next ones in the background.

    Its state is one integer, the index of the next batch, whatever was prefetched. Close it when done.

    Args:
        batches: a source.
        start: the index of the first batch to give.
        place: puts a batch onto devices, such as `lambda batch: jax.device_put(batch, by_rows(mesh))`.
        prefetch: how many batches to prepare ahead.
    """
    # Threads to read with would cost 30 times the reading: the file is memory-mapped.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(reading).map(place or (lambda batch: batch))
    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch))
    iterator.set_state({"next_index": start})
    return iterator
