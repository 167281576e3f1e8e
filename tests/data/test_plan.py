"""Plans: what an epoch holds, whatever the lengths of the documents."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from jaxtyping import Int

from jaxlm import data
from jaxlm.data.plan import Rows

ROW_LENGTHS = [length for length in range(2, 241) if 240 % length == 0]
SEEDS = range(25)


def random_case(seed: int) -> tuple[Int[np.ndarray, " D"], list[int], data.BucketPlan]:
    """Documents of 0 to thousands of tokens, and up to 6 row lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(rng.uniform(0.5, 5), 1.5, rng.integers(1, 100)).astype(np.int64)
    lengths[rng.integers(len(lengths))] = 2 + rng.integers(300)
    row_lengths = rng.choice(ROW_LENGTHS, rng.integers(1, 7), replace=False).tolist()
    budget = 240 * int(rng.integers(1, 5))
    return lengths, row_lengths, data.bucket(lengths, row_lengths=row_lengths, tokens_per_batch=budget, seed=seed)


def epoch_of(plan: data.BucketPlan, epoch: int = 0) -> list[Rows]:
    first = epoch * plan.batches_per_epoch
    return [plan.batch(first + i) for i in range(plan.batches_per_epoch)]


def pieces_of(batches: Sequence[Rows]) -> list[tuple[int, int]]:
    """Where each piece begins, and its length, in order."""
    rows = [row for batch in batches for row in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)]
    return [(start, length) for start, length in rows if length]


def many_documents(seed: int = 0) -> data.BucketPlan:
    lengths = np.random.default_rng(7).integers(0, 90, 300)
    return data.bucket(lengths, row_lengths=[8, 16, 32], tokens_per_batch=128, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_token_but_the_first_of_each_document_is_predicted_once(seed: int) -> None:
    lengths, _, plan = random_case(seed)
    predicted, expected = np.zeros((2, lengths.sum()), int)
    for start, length in pieces_of(epoch_of(plan)):
        predicted[start + 1 : start + length] += 1
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        expected[end - length + 1 : end] = 1
    np.testing.assert_array_equal(predicted, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_piece_is_in_the_shortest_row_that_holds_it(seed: int) -> None:
    _, row_lengths, plan = random_case(seed)
    for batch in epoch_of(plan):
        for length in batch.lengths[batch.lengths > 0]:
            assert batch.row_length == min(row for row in row_lengths if row >= length)


@pytest.mark.parametrize("seed", SEEDS)
def test_documents_that_fit_a_row_are_not_cut(seed: int) -> None:
    lengths, row_lengths, plan = random_case(seed)
    starts = np.cumsum(lengths) - lengths
    whole = (lengths >= 2) & (lengths <= max(row_lengths))
    assert set(zip(starts[whole].tolist(), lengths[whole].tolist(), strict=True)) <= set(pieces_of(epoch_of(plan)))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_batch_has_the_whole_budget_and_a_shape_that_the_plan_lists(seed: int) -> None:
    _, _, plan = random_case(seed)
    batches = epoch_of(plan)
    for batch in batches:
        assert len(batch.starts) == len(batch.lengths)
        assert len(batch.starts) * batch.row_length == plan.tokens_per_batch
    assert sorted({(len(batch.starts), batch.row_length) for batch in batches}, reverse=True) == plan.shapes


@pytest.mark.parametrize("seed", SEEDS)
def test_at_most_one_batch_of_each_shape_has_empty_rows_and_they_are_its_last(seed: int) -> None:
    _, _, plan = random_case(seed)
    unfilled = [batch for batch in epoch_of(plan) if 0 in batch.lengths]
    assert max(Counter(batch.row_length for batch in unfilled).values(), default=0) <= 1
    for batch in unfilled:
        assert batch.lengths[0] > 0
        assert (np.diff(batch.lengths == 0) >= 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_real_share_is_the_share_of_positions_with_a_token(seed: int) -> None:
    _, _, plan = random_case(seed)
    batches = epoch_of(plan)
    real = sum(int(batch.lengths.sum()) for batch in batches)
    positions = sum(len(batch.lengths) * batch.row_length for batch in batches)
    assert plan.real_share == pytest.approx(real / positions, rel=1e-12)


def test_each_epoch_has_the_same_pieces_in_other_batches() -> None:
    plan = many_documents()
    epochs = [epoch_of(plan, epoch) for epoch in range(4)]
    for one, other in itertools.combinations(epochs, 2):
        assert Counter(pieces_of(one)) == Counter(pieces_of(other))
        # Neither the order of batches nor what is together in one may repeat.
        assert [batch.row_length for batch in one] != [batch.row_length for batch in other]
        assert not {frozenset(batch.starts) for batch in one} & {frozenset(batch.starts) for batch in other}


def test_shapes_are_mixed_within_an_epoch() -> None:
    plan = many_documents()
    lengths = [batch.row_length for batch in epoch_of(plan)]
    changes = sum(one != other for one, other in itertools.pairwise(lengths))
    assert changes > 5 * len(plan.shapes)


@pytest.mark.parametrize("seeds", [[0, 1, 2, 3], [0, 1, 2**32, 2**32 + 1]])
def test_no_epoch_of_a_seed_is_one_of_another(seeds: list[int]) -> None:
    orders = [tuple(pieces_of(epoch_of(many_documents(seed), epoch))) for seed in seeds for epoch in range(4)]
    assert len(set(orders)) == len(orders)


def test_a_batch_depends_on_nothing_but_the_plan_and_its_index() -> None:
    plan = many_documents()
    num_batches = 6 * plan.batches_per_epoch
    in_order = [plan.batch(i) for i in range(num_batches)]
    for plan_again in (plan, many_documents()):
        for i in np.random.default_rng(0).permutation(num_batches).tolist():
            batch = plan_again.batch(i)
            np.testing.assert_equal(batch, in_order[i])
            batch.starts[:] = batch.lengths[:] = -1  # what a caller does with a batch changes no other


def test_fingerprint_is_of_the_batches() -> None:
    lengths = np.array([3, 9, 4, 30, 2])

    def fingerprint(
        lengths: Int[np.ndarray, " D"] = lengths,
        row_lengths: Sequence[int] = (4, 8),
        tokens_per_batch: int = 16,
        seed: int = 0,
    ) -> str:
        return data.bucket(lengths, row_lengths=row_lengths, tokens_per_batch=tokens_per_batch, seed=seed).fingerprint

    different = [
        fingerprint(),
        fingerprint(lengths=lengths[::-1]),
        fingerprint(lengths=np.append(lengths, 2)),
        fingerprint(lengths=np.array([3, 9, 4, 30, 3])),
        fingerprint(lengths=np.insert(lengths, 1, 1)),  # has no piece, but moves those after it
        fingerprint(row_lengths=(4, 16)),
        fingerprint(row_lengths=(8,)),
        fingerprint(tokens_per_batch=32),
        fingerprint(seed=1),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint(row_lengths=(8, 4, 4)) == different[0]


@pytest.mark.parametrize(
    ("lengths", "row_lengths", "tokens_per_batch", "message"),
    [
        ([], [4], 8, "none of 0 documents"),
        ([0, 1, 1], [4], 8, "none of 3 documents"),
        ([9], [], 8, "1 to 6"),
        ([9], [1, 4], 8, r"\[1, 4\].*2 or more"),
        ([9], [-4], 8, "2 or more"),
        ([9], [2, 3, 4, 6, 8, 12, 24], 24, "1 to 6"),
        ([9], [4, 5, 7], 20, r"20 .* multiple .*\[7\]"),
        ([9], [4], 2, "multiple"),
        ([9], [4], 0, "positive"),
        ([9], [4], -4, "positive"),
    ],
)
def test_refuses(lengths: list[int], row_lengths: list[int], tokens_per_batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.bucket(np.array(lengths, int), row_lengths=row_lengths, tokens_per_batch=tokens_per_batch, seed=0)


def test_refuses_a_negative_seed() -> None:
    with pytest.raises(ValueError, match="seed"):
        data.bucket(np.array([3]), row_lengths=[4], tokens_per_batch=8, seed=-1)


def test_documents_of_less_than_two_tokens_have_no_row_but_keep_their_place() -> None:
    plan = data.bucket(np.array([0, 1, 3, 0, 1, 2, 1, 0]), row_lengths=[4], tokens_per_batch=8, seed=0)
    assert sorted(pieces_of(epoch_of(plan))) == [(1, 3), (5, 2)]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_a_corpus_smaller_than_a_batch_gives_one_batch_an_epoch(epoch: int) -> None:
    plan = data.bucket(np.array([3]), row_lengths=[4, 64], tokens_per_batch=64, seed=0)
    (batch,) = epoch_of(plan, epoch)
    assert (batch.starts[0], batch.row_length, batch.lengths.tolist()) == (0, 4, [3] + 15 * [0])
    assert plan.real_share == 3 / 64
