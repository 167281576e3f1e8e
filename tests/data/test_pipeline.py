"""Batches: the plan's tokens, from any start, on the devices."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from jaxlm import data, sharding
from jaxlm.data.pipeline import HostBatch
from jaxlm.types import Batch


def batches_of(path: Path, count: int | None = None, seed: int = 0) -> data.Batches:
    """Batches of 32 rows of 16, 16 of 32 or 8 of 64 tokens; longer documents are cut."""
    corpus = data.open_corpus(path)
    plan = data.bucket(corpus.lengths, row_lengths=[16, 32, 64], tokens_per_batch=512, seed=seed)
    return data.Batches(corpus, plan, count)


@pytest.fixture
def batches(corpus_path: Path) -> data.Batches:
    """Two epochs and a bit."""
    batches = batches_of(corpus_path)
    return dataclasses.replace(batches, count=2 * len(batches) + 3)


@contextlib.contextmanager
def iterating(*args: object, **options: object) -> Iterator[grain.DatasetIterator]:
    with contextlib.closing(data.iterate(*args, **options)) as iterator:
        yield iterator


def assert_same(found: Iterable[Batch], expected: Sequence[HostBatch]) -> None:
    found = list(itertools.islice(found, len(expected) + 1))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_equal(one, other)


@pytest.mark.parametrize("index", [-1, "len"])
def test_there_is_no_batch_out_of_range(batches: data.Batches, index: int | str) -> None:
    index = len(batches) if index == "len" else int(index)
    with pytest.raises(IndexError, match=f"batch {index} of {len(batches)}"):
        batches[index]


def test_batches_hold_the_tokens_of_the_plan(batches: data.Batches) -> None:
    corpus = batches.corpus
    ids = np.fromfile(corpus.path / "train.tokens.bin", np.uint16).tolist()
    for i, batch in enumerate(batches):
        rows = batches.plan.batch(i)
        expected = [
            ids[start : start + length] + [0] * (rows.row_length - length)
            for start, length in zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True)
        ]
        assert batch.keys() == {"tokens", "lengths"}
        assert batch["tokens"].tolist() == expected
        assert batch["lengths"].tolist() == rows.lengths.tolist()
        assert (batch["tokens"].dtype, batch["lengths"].dtype) == (np.uint16, np.int32)
    assert i == len(batches) - 1


def test_an_epoch_holds_the_text(corpus_path: Path) -> None:
    batches = batches_of(corpus_path)
    pieces = [
        row[:length].tolist()
        for batch in batches
        for row, length in zip(batch["tokens"], batch["lengths"], strict=True)
        if length
    ]
    expected: list[list[int]] = []
    for ids in batches.corpus:
        expected += [ids[i : i + 64].tolist() for i in range(0, len(ids) - 1, 63)]
    assert sorted(pieces) == sorted(expected)


@pytest.mark.parametrize("count", [None, 0, 1, 20])
def test_count_ends_the_iteration(corpus_path: Path, count: int | None) -> None:
    batches = batches_of(corpus_path, count)
    assert len(batches) == (batches.plan.batches_per_epoch if count is None else count)
    with iterating(batches) as iterator:
        assert_same(iterator, [batches[i] for i in range(len(batches))])
        assert next(iterator, None) is None  # and does not begin again


def test_a_later_epoch_has_other_batches(batches: data.Batches) -> None:
    num = batches.plan.batches_per_epoch
    first, second = ({batches[i]["tokens"].tobytes() for i in range(start, start + num)} for start in (0, num))
    assert len(first) == len(second) == num
    assert not first & second


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
@pytest.mark.parametrize("start", [0, 1, 7, -1, "len"])
def test_from_any_start_come_the_batches_that_remain(batches: data.Batches, prefetch: int, start: int | str) -> None:
    start = len(batches) if start == "len" else int(start) % len(batches)
    with iterating(batches, start=start, prefetch=prefetch) as iterator:
        assert iterator.get_state() == {"next_index": start}
        assert_same(iterator, [batches[i] for i in range(start, len(batches))])


@pytest.mark.parametrize("beyond", [-1, 1])
def test_a_start_out_of_range_is_refused(batches: data.Batches, beyond: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        data.iterate(batches, start=beyond if beyond < 0 else len(batches) + beyond)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_state_counts_what_was_given_and_not_what_was_prefetched(batches: data.Batches, prefetch: int) -> None:
    prepared = threading.Semaphore(0)

    def place(batch: HostBatch) -> Batch:
        prepared.release()
        return batch

    with iterating(batches, start=3, place=place, prefetch=prefetch) as iterator:
        next(iterator)
        for _ in range(1 + prefetch):
            assert prepared.acquire(timeout=10)
        state = json.loads(json.dumps(iterator.get_state()))
        assert state == {"next_index": 4}
        prepared.acquire(timeout=0.1)  # one more may wait for a place in the buffer, but no further one
        assert not prepared.acquire(timeout=0.1)
    with iterating(batches, start=state["next_index"]) as iterator:
        np.testing.assert_equal(next(iterator), batches[4])


def test_an_iterator_goes_to_the_state_that_is_set(batches: data.Batches) -> None:
    with iterating(batches) as iterator:
        for index in (5, 2, 2, len(batches) - 1, 0):
            iterator.set_state({"next_index": index})
            assert iterator.get_state() == {"next_index": index}
            np.testing.assert_equal(next(iterator), batches[index])
            assert iterator.get_state() == {"next_index": index + 1}


def test_batches_are_placed_on_the_devices(corpus_path: Path) -> None:
    by_rows = sharding.by_rows(sharding.mesh())
    batches = batches_of(corpus_path)
    with iterating(batches, place=lambda batch: jax.device_put(batch, by_rows)) as iterator:
        placed = list(itertools.islice(iterator, len(batches)))
    for batch in placed:
        for array in batch.values():
            assert array.sharding.is_equivalent_to(by_rows, array.ndim)
            assert len({shard.device for shard in array.addressable_shards}) == 8
            assert {shard.data.shape[0] for shard in array.addressable_shards} == {array.shape[0] // 8}
    assert_same([jax.device_get(batch) for batch in placed], list(batches))


@pytest.mark.parametrize("wrong", [258, 2**16 - 1])
def test_an_id_beyond_the_vocabulary_is_found_in_its_batch(corpus_path: Path, tmp_path: Path, wrong: int) -> None:
    shutil.copytree(corpus_path, tmp_path / "corpus")
    plan = batches_of(corpus_path).plan
    rows = plan.batch(2)
    tokens = np.memmap(tmp_path / "corpus" / "train.tokens.bin", np.uint16, "r+")
    tokens[rows.starts[0] + rows.lengths[0] // 2] = wrong
    tokens.flush()
    damaged = batches_of(tmp_path / "corpus")
    message = f"batch 2 of .*corpus has the token id {wrong}, beyond the vocabulary of 258"
    with pytest.raises(ValueError, match=message):
        damaged[2]
    with iterating(damaged) as iterator:
        assert_same(itertools.islice(iterator, 2), [damaged[0], damaged[1]])
        for _ in range(2):  # it is not skipped by asking again
            with pytest.raises(ValueError, match=message):
                next(iterator)


def test_fingerprint_is_of_the_corpus_and_the_plan(corpus_path: Path, tmp_path: Path) -> None:
    data.write_corpus(tmp_path / "other", [data.Document("other.txt", b"other")], data.ByteTokenizer(), heldout=0.0)
    batches = batches_of(corpus_path)
    assert batches.fingerprint == batches_of(corpus_path, count=5).fingerprint
    different = [batches, batches_of(corpus_path, seed=1), batches_of(tmp_path / "other")]
    assert len({batches.fingerprint for batches in different}) == 3


def test_a_plan_for_a_larger_corpus_is_refused(corpus_path: Path, tmp_path: Path) -> None:
    data.write_corpus(tmp_path / "other", [data.Document("other.txt", b"other")], data.ByteTokenizer(), heldout=0.0)
    with pytest.raises(ValueError, match=r"the plan needs \d+ tokens"):
        data.Batches(data.open_corpus(tmp_path / "other"), batches_of(corpus_path).plan)


@pytest.mark.parametrize("given", [0, 1, None])
def test_closing_ends_the_thread(batches: data.Batches, given: int | None) -> None:
    before = set(threading.enumerate())
    with iterating(batches) as iterator:
        assert_same(itertools.islice(iterator, given), list(batches)[:given])
    assert set(threading.enumerate()) <= before
