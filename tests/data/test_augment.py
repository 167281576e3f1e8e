"""Augmentation: what moves, what stays, and what it depends on."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxlm import data
from jaxlm.data.augment import Row

FIM = data.FillInTheMiddle(1.0, prefix=300, suffix=301, middle=302)


def row_of(*lengths: int) -> Row:
    tokens = np.arange(sum(lengths) + 3, dtype=np.uint16)
    ends = np.cumsum(lengths)
    return Row(tokens, tokens, np.stack([ends - lengths, ends], axis=1))


def test_the_middle_goes_to_the_end_and_nothing_else_changes() -> None:
    for seed in range(50):
        before = row_of(30, 9, 7, 50)
        after = FIM(before, np.random.default_rng(seed))
        np.testing.assert_array_equal(after.inputs, after.tokens)
        np.testing.assert_array_equal(before.tokens, np.arange(99))
        for begin, end in ((0, 30), (30, 39), (46, 96)):
            ids = after.tokens[begin:end].tolist()
            assert (ids[0], ids[1], ids[-1]) == (begin, 300, end - 1)
            suffix, middle = ids.index(301), ids.index(302)
            parts = ids[2:suffix] + ids[middle + 1 : -1] + ids[suffix + 1 : middle]
            assert parts == list(range(begin + 1, end - 4))
        assert after.tokens[39:46].tolist() == list(range(39, 46))  # too short to change
        assert after.tokens[96:].tolist() == [96, 97, 98]


def test_every_place_of_the_middle_is_drawn() -> None:
    rng, found = np.random.default_rng(0), Counter[tuple[int, int]]()
    for _ in range(4000):
        ids = FIM(row_of(8), rng).tokens.tolist()
        found[(ids.index(301), ids.index(302))] += 1
    # Two ends among 4 places, in order: 10 pairs, those of equal ends half as often as others.
    assert len(found) == 10
    assert max(found.values()) < 3 * min(found.values())


def test_dropout_changes_what_is_seen_and_not_what_is_predicted() -> None:
    row = row_of(5000, 5000)
    after = data.TokenDropout(0.2, replacement=65_535)(row, np.random.default_rng(0))
    dropped = after.inputs == 65_535
    assert dropped.mean() == pytest.approx(0.2, abs=0.02)
    np.testing.assert_array_equal(after.inputs[~dropped], row.inputs[~dropped])
    np.testing.assert_array_equal(after.tokens, row.tokens)
    assert after.inputs.dtype == row.inputs.dtype


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_refuses_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ValueError, match="the rate is"):
        data.TokenDropout(rate, 0)
    with pytest.raises(ValueError, match="the rate is"):
        dataclasses.replace(FIM, rate=rate)


def test_a_batch_is_the_same_in_any_order_and_in_any_number_of_shares(corpus_path: Path) -> None:
    corpus = data.open_corpus(corpus_path)
    plan = data.pack(corpus.lengths, [16, 64], 512, seed=3)
    augment = [data.FillInTheMiddle(0.5, 1, 2, 3), data.TokenDropout(0.1, 0)]
    whole = data.Batches(corpus, plan, 20, augment)
    plain = data.Batches(corpus, plan, 20)
    for i in (7, 3, 7):
        shares = [dataclasses.replace(whole, share=((k,), 4))[i] for k in range(4)]
        assert whole[i].keys() == {"tokens", "inputs", "segments"}
        for name in whole[i]:
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), whole[i][name])
        np.testing.assert_array_equal(whole[i]["segments"], plain[i]["segments"])
        assert 0.03 < (whole[i]["inputs"] != whole[i]["tokens"]).mean() < 0.2
        assert (whole[i]["tokens"] != plain[i]["tokens"]).mean() > 0.1
    rows = [whole[i]["inputs"].tobytes() for i in range(20)]
    assert len(set(rows)) == 20


def test_special_tokens_enlarge_the_vocabulary(corpus_path: Path) -> None:
    corpus = data.open_corpus(corpus_path)
    plan = data.pack(corpus.lengths, [16, 64], 512)
    assert data.Batches(corpus, plan, 1, [FIM]).vocab == 303
    assert data.Batches(corpus, plan, 1, [data.TokenDropout(0.1, 5)]).vocab == corpus.vocab
    with pytest.raises(ValueError, match="an id beyond uint16"):
        data.Batches(corpus, plan, 1, [data.TokenDropout(0.1, 2**16)])


def test_an_id_that_nobody_announced_is_refused(corpus_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Stray:
        id: int
        ids = ()

        def __call__(self, row: Row, _: np.random.Generator) -> Row:
            return row._replace(inputs=np.where(row.inputs == 257, self.id, row.inputs.astype(np.int64)))

    corpus = data.open_corpus(corpus_path)
    for stray in (258, 2**16 + 5, -1):
        batches = data.Batches(corpus, data.pack(corpus.lengths, [16, 64], 512), 1, [Stray(stray)])
        with pytest.raises(ValueError, match=rf"batch 0 has token ids .*{stray} .*after .*Stray.* of 258"):
            batches[0]
