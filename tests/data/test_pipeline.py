"""Batches: the plan's tokens, from any start, on the devices."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest

from jaxlm import data, sharding
from jaxlm.data import pipeline
from jaxlm.data.pipeline import HostBatch
from jaxlm.stages import Stage
from jaxlm.types import Batch, Static


def batches_of(path: Path, make: Callable[..., data.Plan] = data.bucket, seed: int = 0, **options: Any) -> data.Batches:
    """Batches of 32 rows of 16, 16 of 32 or 8 of 64 tokens; longer documents are cut."""
    corpus = data.open_corpus(path)
    return data.Batches(corpus, make(corpus.lengths, [16, 32, 64], 512, seed), **options)


def one_pass(path: Path, make: Callable[..., data.Plan] = data.bucket) -> data.Batches:
    return batches_of(path, partial(make, passes=1))


@pytest.fixture(params=[data.pack, data.bucket])
def batches(request: pytest.FixtureRequest, corpus_path: Path) -> data.Batches:
    """Two epochs and a bit."""
    return batches_of(corpus_path, request.param, count=50)


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
    corpus = batches.corpora
    ids = np.fromfile(corpus.path / "train.tokens.bin", np.uint16)
    for i, batch in enumerate(batches):
        rows = batches.plan.batch(i)
        tokens, segments = np.zeros((2, rows.num_rows, rows.row_length), int)
        for row, at, (_, length, start) in zip(rows.row, rows.at, rows.pieces.tolist(), strict=True):
            tokens[row, at : at + length] = ids[start : start + length]
            segments[row, at : at + length] = segments[row].max() + 1
        assert batch["tokens"].tolist() == tokens.tolist()
        assert batch["tokens"].dtype == np.uint16
        if batches.plan.packed:
            assert batch.keys() == {"tokens", "segments"}
            assert batch["segments"].tolist() == segments.tolist()
            assert batch["segments"].dtype == np.uint16
        else:
            assert batch.keys() == {"tokens", "lengths"}
            assert batch["lengths"].tolist() == segments.sum(axis=1).tolist()
            assert batch["lengths"].dtype == np.int32
    assert i == len(batches) - 1


def documents_in(batch: HostBatch) -> list[list[int]]:
    if "lengths" in batch:
        rows = zip(batch["tokens"], batch["lengths"], strict=True)
        return [row[:length].tolist() for row, length in rows if length]
    rows = zip(batch["tokens"], batch["segments"], strict=True)
    return [row[segments == n].tolist() for row, segments in rows for n in range(1, segments.max() + 1)]


@pytest.mark.parametrize("make", [data.pack, data.bucket])
def test_a_pass_holds_the_text(corpus_path: Path, make: Callable[..., data.Plan]) -> None:
    batches = one_pass(corpus_path, make)
    pieces = [document for batch in batches for document in documents_in(batch)]
    expected: list[list[int]] = []
    for ids in batches.corpora:
        expected += [ids[i : i + 64].tolist() for i in range(0, len(ids) - 1, 63)]
    assert sorted(pieces) == sorted(expected)


@pytest.mark.parametrize("count", [None, 0, 1, 4])
def test_count_ends_the_iteration(corpus_path: Path, count: int | None) -> None:
    batches = dataclasses.replace(one_pass(corpus_path), count=count)
    assert len(batches) == (batches.plan.count if count is None else count)
    with iterating(batches) as iterator:
        assert_same(iterator, [batches[i] for i in range(len(batches))])
        assert next(iterator, None) is None  # and does not begin again


@pytest.mark.parametrize(("count", "message"), [(None, "endless"), (-1, "count is -1")])
def test_refuses_a_count(corpus_path: Path, count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches_of(corpus_path, count=count)
    with pytest.raises(ValueError, match="count is 1000; the plan has"):
        dataclasses.replace(one_pass(corpus_path), count=1000)


def test_what_is_skipped_is_left_out_and_the_rest_moves_up(corpus_path: Path) -> None:
    augment = [data.TokenDropout(0.5, 0)]
    batches = batches_of(corpus_path, augment=augment, count=20)
    some = dataclasses.replace(batches, skip=[(0, 2), (5, 9), (9, 10)], count=13)
    kept = [2, 3, 4, *range(10, 20)]
    assert_same(some, [batches[i] for i in kept])
    assert [some.planned(i) for i in range(13)] == kept
    assert some.fingerprint == batches.fingerprint
    fewer = dataclasses.replace(batches, count=12).without(3, 5).without(1, 2).without(2, 6)
    assert [fewer.planned(i) for i in range(12)] == [0, 2, *range(9, 19)]
    assert fewer.skip == [(1, 2), (3, 5), (5, 9)]
    assert fewer.without(1, 3).skip == [(1, 2), (2, 10)]
    whole = one_pass(corpus_path)
    assert_same(dataclasses.replace(whole, skip=[(1, 3)]), [whole[i] for i in range(len(whole)) if i not in (1, 2)])
    with pytest.raises(ValueError, match=f"the plan has {len(whole) - 2} batches"):
        dataclasses.replace(whole, skip=[(1, 3)], count=len(whole))


@pytest.mark.parametrize("skip", [[(-1, 3)], [(3, 3)], [(5, 4)], [(5, 7), (2, 3)], [(1, 4), (3, 6)]], ids=str)
def test_refuses_ranges_to_skip_that_are_empty_or_out_of_order(corpus_path: Path, skip: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="give ranges"):
        batches_of(corpus_path, count=20, skip=skip)


def test_shares_are_the_rows_of_the_whole_in_their_order(batches: data.Batches) -> None:
    for hosts in (2, 4, 8):
        shares = [dataclasses.replace(batches, share=((k,), hosts)) for k in range(hosts)]
        assert {share.fingerprint for share in shares} == {batches.fingerprint}
        for i in range(10):
            parts = [share[i] for share in shares]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            np.testing.assert_equal(joined, batches[i])
    with pytest.raises(ValueError, match=r"32 rows of 16 tokens can't be divided by 3"):
        dataclasses.replace(batches, share=((0,), 3))
    apart = dataclasses.replace(batches, share=((0, 3), 4))[0]
    for name, whole in batches[0].items():
        np.testing.assert_array_equal(apart[name], np.concatenate([np.split(whole, 4)[k] for k in (0, 3)]))
    for wrong in ([2], [], [1, 0], [0, 0], [-1]):
        with pytest.raises(ValueError, match=r"no parts .* of 2"):
            dataclasses.replace(batches, share=(wrong, 2))


@pytest.mark.parametrize("documents", range(10))
@pytest.mark.parametrize("make", [data.pack, partial(data.bucket, passes=1)], ids=["pack", "bucket, once"])
def test_of_few_documents_each_process_has_its_rows_of_every_batch_or_is_refused(
    make: Any, documents: int, tmp_path: Path
) -> None:
    texts = [data.Document(str(i), b"abcdefghijklmnopq"[: 3 + 5 * i % 15]) for i in range(documents)]
    if not texts:
        with pytest.raises(ValueError, match="no documents in the train split"):
            data.write_corpus(tmp_path / "few", texts, data.ByteTokenizer(), heldout=0.0)
        return
    data.write_corpus(tmp_path / "few", texts, data.ByteTokenizer(), heldout=0.0)
    corpus = data.open_corpus(tmp_path / "few")
    for rows, processes in itertools.product((1, 2, 3, 4, 8, 16), range(1, 9)):
        plan = make(corpus.lengths, [8, 16], 16 * rows, 0)
        whole = data.Batches(corpus, plan, 3 if make is data.pack else None)
        divides = all(of % processes == 0 for of, _ in itertools.chain.from_iterable(plan.shapes))
        if not divides:
            with pytest.raises(ValueError, match=f"can't be divided by {processes}"):
                dataclasses.replace(whole, share=((0,), processes))
            continue
        shares = [dataclasses.replace(whole, share=((k,), processes)) for k in range(processes)]
        assert {len(share) for share in shares} == {len(whole)}
        for batch, *parts in zip(whole, *shares, strict=True):
            np.testing.assert_equal({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)
    with pytest.raises(ValueError, match="hold a row of 16"):
        make(corpus.lengths, [8, 16], 8, 0)


def test_batches_of_several_corpora_hold_each_ones_tokens(corpus_path: Path) -> None:
    corpora = {"train": data.open_corpus(corpus_path), "heldout": data.open_corpus(corpus_path, "heldout")}
    stage = Stage([16, 32, 64], 512, weights={"train": 1, "heldout": 3})
    plan = data.make_plan({name: corpus.lengths for name, corpus in corpora.items()}, stage, data.best_fit)
    batches = data.Batches(corpora, plan, count=20)
    for i, batch in enumerate(batches):
        expected = [
            list(corpora.values())[source].tokens[start : start + length].tolist()
            for source, length, start in plan.batch(i).pieces.tolist()
        ]
        assert documents_in(batch) == expected
    assert data.describe(plan, 20).corpora["heldout"]["share"] == pytest.approx(0.75, abs=0.1)
    with pytest.raises(ValueError, match=r"the corpora are \['text'\], the plan's \['train', 'heldout'\]"):
        data.Batches(corpora["train"], plan, count=1)


def test_specs_are_those_of_the_batches_of_all_stages(corpus_path: Path) -> None:
    corpus = data.open_corpus(corpus_path)
    stages = [Stage([16], 256, until_tokens=1000, window=8), Stage([16, 32], 512), Stage([16, 32], 512, window=8)]
    stages[1] = dataclasses.replace(stages[1], until_tokens=20_000)
    batches = data.Batches(corpus, data.make_plan(corpus.lengths, stages, data.best_fit), count=80)
    found = {str(jax.tree.map(lambda x: (x.shape, x.dtype.name), batch)) for batch in batches}
    assert found <= {str(jax.tree.map(lambda x: (x.shape, x.dtype.name), spec)) for spec in batches.specs()}
    assert len(batches.specs()) == 5
    assert [batches[i].get("window") for i in (0, 4, 79)] == [Static(8), None, Static(8)]


def test_specs_refuse_rows_that_the_devices_do_not_divide(corpus_path: Path) -> None:
    corpus = data.open_corpus(corpus_path)
    batches = data.Batches(corpus, data.bucket(corpus.lengths, [64], 64 * 4), count=1)
    with pytest.raises(ValueError, match="4 rows of 64 tokens can't be divided over 8 devices"):
        batches.specs(sharding.by_rows(sharding.mesh(1, -1, 1)))


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
    batches = one_pass(corpus_path)
    with iterating(batches, place=partial(sharding.place, rows=by_rows)) as iterator:
        placed = list(itertools.islice(iterator, len(batches)))
    for batch in placed:
        for array in batch.values():
            assert array.sharding.is_equivalent_to(by_rows, array.ndim)
            assert len({shard.device for shard in array.addressable_shards}) == 8
            assert {shard.data.shape[0] for shard in array.addressable_shards} == {array.shape[0] // 8}
    assert_same([jax.device_get(batch) for batch in placed], list(batches))


@pytest.mark.parametrize("wrong", [258, 2**16 - 1])
def test_an_id_beyond_the_vocabulary_is_found_in_its_batch(
    corpus_path: Path, tmp_path: Path, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(corpus_path, tmp_path / "corpus")
    rows = one_pass(corpus_path).plan.batch(2)
    corpus = data.open_corpus(tmp_path / "corpus")
    place = int(rows.pieces["start"][0] + rows.pieces["length"][0] // 2)
    tokens = np.memmap(corpus.file("tokens"), np.uint16, "r+")
    tokens[place] = wrong
    tokens.flush()
    with pytest.raises(ValueError, match=r"train.tokens.bin is damaged"):
        one_pass(tmp_path / "corpus")[2]
    monkeypatch.setattr(data.Corpus, "check", lambda *_: None)  # as if it had been written so
    damaged = one_pass(tmp_path / "corpus")
    document = next(i for i in range(len(corpus)) if corpus.offsets[i] <= place < corpus.offsets[i + 1])
    message = (
        f"batch 2 has the token id {wrong}, beyond the vocabulary of 258, from position "
        f"{place - corpus.offsets[document]} of document {document} of .*corpus/train.tokens.bin; delete that corpus"
    )
    with pytest.raises(ValueError, match=message):
        damaged[2]
    with iterating(damaged) as iterator:
        assert_same(itertools.islice(iterator, 2), [damaged[0], damaged[1]])
        for _ in range(2):  # it is not skipped by asking again
            with pytest.raises(ValueError, match=message):
                next(iterator)


def test_fingerprint_is_of_the_corpus_and_the_plan(corpus_path: Path, tmp_path: Path) -> None:
    data.write_corpus(tmp_path / "other", [data.Document("other.txt", b"other")], data.ByteTokenizer(), heldout=0.0)
    batches = batches_of(corpus_path, count=1)
    assert batches.fingerprint == batches_of(corpus_path, count=5).fingerprint
    different = [
        batches,
        batches_of(corpus_path, seed=1, count=1),
        batches_of(tmp_path / "other", count=1),
        batches_of(corpus_path, count=1, augment=[data.TokenDropout(0.1, 0)]),
        batches_of(corpus_path, count=1, augment=[data.TokenDropout(0.2, 0)]),
    ]
    assert len({batches.fingerprint for batches in different}) == 5


def test_a_plan_for_a_larger_corpus_is_refused(corpus_path: Path, tmp_path: Path) -> None:
    data.write_corpus(tmp_path / "other", [data.Document("other.txt", b"other")], data.ByteTokenizer(), heldout=0.0)
    with pytest.raises(ValueError, match=r"the plan needs \d+ tokens"):
        data.Batches(data.open_corpus(tmp_path / "other"), batches_of(corpus_path, count=1).plan, 1)


class PanicException(BaseException):
    """As of libraries in Rust."""


@pytest.mark.parametrize("error", [StopIteration, IndexError, KeyError, PanicException], ids=lambda e: e.__name__)
def test_whatever_fails_while_batches_are_prepared_is_an_error(
    error: type[BaseException], batches: data.Batches
) -> None:
    def place(batch: Any) -> Any:
        if next(count) == 2:
            raise error
        return batch

    count = itertools.count()
    iterator = data.iterate(batches, place=place)
    next(iterator), next(iterator)
    with pytest.raises((RuntimeError, IndexError, KeyError)):
        next(iterator)
    iterator.close()


def test_a_row_of_more_documents_than_have_numbers_is_refused() -> None:
    plan = data.pack(np.full(70_000, 2), [2**18], 2**18, passes=1)
    with pytest.raises(ValueError, match="a row has 70000 documents, and may have 65535; use shorter rows"):
        pipeline._segments(plan.batch(0), plan.batch(0).row * 2**18 + plan.batch(0).at)


@pytest.mark.parametrize("given", [0, 1, None])
def test_closing_ends_the_thread(batches: data.Batches, given: int | None) -> None:
    before = set(threading.enumerate())
    with iterating(batches) as iterator:
        assert_same(itertools.islice(iterator, given), list(batches)[:given])
    assert set(threading.enumerate()) <= before
