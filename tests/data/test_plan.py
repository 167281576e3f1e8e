"""Plans: what batches hold, whatever the lengths of the documents."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import data
from jaxlm.data import parts
from jaxlm.data.plan import VERSION, Plan, Rows
from jaxlm.stages import Stage

LENGTHS = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 400)), min_size=1, max_size=60).map(lambda x: [*x, 7])
ROW_LENGTHS = st.lists(st.integers(2, 64), min_size=1, max_size=6, unique=True)
MAKERS = {
    "pack": data.pack,
    "bucket": data.bucket,
    "pad": lambda lengths, rows, *args, **kwargs: data.pad(lengths, max(rows), *args, **kwargs),
    "concat": lambda lengths, rows, *args, **kwargs: data.concat(lengths, max(rows), *args, **kwargs),
}
each_plan = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
property_test = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Row lengths, tokens per batch and a seed."""
    rows = draw(ROW_LENGTHS)
    return rows, max(rows) * draw(st.integers(1, 4)) + draw(st.integers(0, 5)), draw(st.integers(0, 2**40))


def batches_of(plan: Plan, count: int | None = None) -> list[Rows]:
    count = plan.count if count is None else count
    assert count is not None
    return [plan.batch(i) for i in range(count)]


def predicted(pieces: Sequence[np.ndarray], lengths: Mapping[str, Sequence[int]]) -> list[np.ndarray]:
    """How often each token of each corpus is predicted."""
    counts = [np.zeros(sum(each), int) for each in lengths.values()]
    for source, length, start in itertools.chain.from_iterable(piece.tolist() for piece in pieces):
        counts[source][start + 1 : start + length] += 1
    return counts


def all_but_first(lengths: Sequence[int]) -> np.ndarray:
    """1 for every token but the first of each document."""
    wanted = np.zeros(sum(lengths), int)
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        wanted[end - length + 1 : end] = 1
    return wanted


def many_documents(seed: int = 0, make: Callable[..., Plan] = data.pack, **options: Any) -> Plan:
    lengths = np.random.default_rng(7).lognormal(2, 0.8, 300).astype(int)
    return make(lengths, [8, 16, 32], 128, seed, **options)


@each_plan
@property_test
@given(LENGTHS, settings_of(), st.integers(1, 3))
def test_each_pass_predicts_every_token_but_the_first_of_each_document_once(
    make: Callable[..., Plan], lengths: list[int], how: tuple[list[int], int, int], passes: int
) -> None:
    plan = make(np.array(lengths), *how, passes=passes)
    found = predicted([rows.pieces for rows in batches_of(plan)], {"text": lengths})
    joined = [sum(lengths)] if make is MAKERS["concat"] else lengths
    np.testing.assert_array_equal(found[0], passes * all_but_first(joined))


@property_test
@given(st.dictionaries(st.sampled_from("abc"), LENGTHS, min_size=1), st.data())
def test_what_was_taken_is_in_a_batch_or_waits_through_stages_and_mixtures(
    lengths: dict[str, list[int]], drawn: st.DataObject
) -> None:
    stages, end = list[Stage](), 0
    for i in range(count := drawn.draw(st.integers(1, 3))):
        rows, budget, seed = drawn.draw(settings_of())
        end += budget * drawn.draw(st.integers(1, 5))
        weights = {name: drawn.draw(st.integers(1, 9)) for name in lengths} if drawn.draw(st.booleans()) else None
        stages.append(Stage(rows, budget, None if i == count - 1 else end, weights=weights))
    place = drawn.draw(st.sampled_from([data.best_fit, data.one_a_row]))
    plan = data.make_plan({name: np.array(each) for name, each in lengths.items()}, stages, place, seed=seed)
    held = list[np.ndarray]()
    for part in itertools.islice(plan.parts(), 6):
        held += [plan.batch(part.start.batch + i).pieces for i in range(len(part.batches))]
        assert part.after is not None
        taken = [np.zeros(sum(each), int) for each in lengths.values()]
        for source, documents in enumerate(plan.documents.values()):
            epochs, more = divmod(part.after.taken[source], len(documents))
            taken[source] += epochs * all_but_first(list(lengths.values())[source])
            order = data.parts.shuffle(len(documents), plan.seed, 0, source, epochs)[:more]
            for _, length, start in documents[order].tolist():
                taken[source][start + 1 : start + length] += 1
        found = predicted([*held, part.after.waiting], lengths)
        np.testing.assert_equal(found, taken)
    assert plan.stage(0) == 0


@each_plan
@property_test
@given(LENGTHS, settings_of())
def test_documents_that_fit_a_row_are_not_cut(
    make: Callable[..., Plan], lengths: list[int], how: tuple[list[int], int, int]
) -> None:
    lengths = [sum(lengths)] if make is MAKERS["concat"] else lengths
    plan = make(np.array(lengths), *how, passes=1)
    starts = np.cumsum(lengths) - lengths
    whole = {(s, n) for s, n in zip(starts.tolist(), lengths, strict=True) if 2 <= n <= max(how[0])}
    pieces = itertools.chain.from_iterable(rows.pieces.tolist() for rows in batches_of(plan))
    assert whole <= {(start, length) for _, length, start in pieces}


@each_plan
@property_test
@given(LENGTHS, settings_of(), st.sampled_from([None, 1, 2]))
def test_batches_have_the_budget_and_shapes_that_the_plan_lists_and_pieces_do_not_overlap(
    make: Callable[..., Plan], lengths: list[int], how: tuple[list[int], int, int], passes: int | None
) -> None:
    plan = make(np.array(lengths), *how, passes=passes)
    for rows in batches_of(plan, None if passes else 12):
        assert (rows.num_rows, rows.row_length) in plan.shapes[0]
        assert 0 <= how[1] - rows.num_rows * rows.row_length < rows.row_length
        begins, ends = rows.row * rows.row_length + rows.at, rows.at + rows.pieces["length"]
        assert (begins[1:] >= (begins + rows.pieces["length"])[:-1]).all()
        assert len(rows.row)
        assert rows.row.max() < rows.num_rows
        assert (ends <= rows.row_length).all()
        assert plan.packed or len(set(rows.row.tolist())) == len(rows.row)


@each_plan
@pytest.mark.parametrize("passes", [None, 2])
def test_only_the_last_batch_of_each_shape_has_empty_rows(make: Callable[..., Plan], passes: int | None) -> None:
    plan = many_documents(make=make, passes=passes)
    unfilled = [
        rows for rows in batches_of(plan, None if passes else 200) if len(set(rows.row.tolist())) < rows.num_rows
    ]
    assert max(Counter(rows.row_length for rows in unfilled).values(), default=0) <= (1 if passes else 0)


def test_each_epoch_has_an_order_of_its_own() -> None:
    plan = many_documents(make=data.bucket)
    per_epoch = [list[int](), list[int]()]
    parts = list(itertools.islice(plan.parts(), 2))
    for part, starts in zip(parts, per_epoch, strict=True):
        for i in range(len(part.batches)):
            starts += plan.batch(part.start.batch + i).pieces["start"].tolist()
    assert len(set(per_epoch[0]) & set(per_epoch[1])) > 0.8 * len(set(per_epoch[0]))
    assert per_epoch[0] != per_epoch[1]


def test_shapes_are_mixed_within_an_epoch() -> None:
    lengths = [rows.row_length for rows in batches_of(many_documents(), 60)]
    assert len(set(lengths)) == 3
    assert sum(one != other for one, other in itertools.pairwise(lengths)) > 15


@pytest.mark.parametrize("seeds", [[0, 1, 2, 3], [0, 1, 2**32, 2**32 + 1]])
def test_no_part_of_a_seed_is_one_of_another(seeds: list[int]) -> None:
    plans = [many_documents(seed) for seed in seeds]
    parts = [part for plan in plans for part in itertools.islice(plan.parts(), 4)]
    assert len({part.pieces.tobytes() for part in parts}) == len(parts)


@pytest.mark.parametrize("count", [1, 100])
def test_a_batch_depends_on_nothing_but_the_plan_and_its_index(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.parts, "PART", 40)  # a dozen parts an epoch
    stages = [Stage([8, 16], 64, until_tokens=3000), Stage([8, 16, 32], 128, weights={"a": 1, "b": 2})]
    lengths = {"a": np.random.default_rng(7).integers(0, 90, 300), "b": np.arange(20)}
    plans = [data.make_plan(lengths, stages, data.best_fit, seed=3) for _ in range(2)]
    in_order = batches_of(plans[0], 200)
    assert len(list(itertools.takewhile(lambda part: part.start.batch < 200, plans[0].parts()))) > 20
    for plan in plans:
        for i in np.random.default_rng(0).permutation(200).tolist()[:count]:
            np.testing.assert_equal(plan.batch(i), in_order[i])


def test_stages_begin_and_end_where_they_say() -> None:
    stages = [Stage([8], 64, until_tokens=600), Stage([8, 32], 128, until_tokens=1500), Stage([32], 256, 4000)]
    plan = data.make_plan(np.random.default_rng(7).integers(2, 90, 300), stages, data.best_fit)
    assert plan.count == 10 + 7 + 10
    budgets = [rows.num_rows * rows.row_length for rows in batches_of(plan)]
    assert budgets == 10 * [64] + 7 * [128] + 10 * [256]
    assert [plan.stage(i) for i in (0, 9, 10, 16, 17, 26)] == [0, 0, 1, 1, 2, 2]
    assert plan.shapes == [[(8, 8)], [(16, 8), (4, 32)], [(8, 32)]]
    with pytest.raises(IndexError, match=r"batch 27 .* 27"):
        plan.batch(27)


@pytest.mark.parametrize("place", [data.best_fit, data.one_a_row])
def test_corpora_are_mixed_by_tokens_in_every_stretch(place: data.Place) -> None:
    rng = np.random.default_rng(0)
    lengths = {"long": rng.integers(30, 200, 500), "short": rng.integers(2, 30, 100), "none": np.array([5])}
    stages = [
        Stage([16, 64], 1024, until_tokens=100_000, weights={"long": 1, "short": 1, "none": 0}),
        Stage([16, 64], 1024, weights={"long": 3, "short": 1, "none": 0}),
    ]
    plan = data.make_plan(lengths, stages, place)
    for first, wanted in ((0, 0.5), (100, 0.25), (400, 0.25)):
        held = np.zeros(3)
        for i in range(first, first + 80):
            pieces = plan.batch(i).pieces
            held += np.bincount(pieces["source"], pieces["length"] - 1.0, 3)
        assert held[1] / held.sum() == pytest.approx(wanted, abs=0.05)
        assert held[2] == 0


def test_what_is_wanted_may_be_less_than_rounding_leaves_of_it() -> None:
    plan = data.pack({"text": np.full(2**13, 1024)}, [1024], 2**14)
    tokens, owed = 3 * 1024.0, 1e-10  # which is less than floats near the 4 million tokens before can tell
    found, taken, still_owed = parts._draw(plan, parts.Start(taken=(2**12,), owed=(owed,)), tokens)
    assert len(found) == taken[0] - 2**12 == 4
    assert still_owed[0] == pytest.approx(owed)


def test_without_weights_corpora_end_together() -> None:
    lengths = {"a": np.full(300, 10), "b": np.full(50, 33)}
    found = data.describe(data.pack(lengths, [16, 64], 1024))
    assert [corpus["epochs"] for corpus in found.corpora.values()] == pytest.approx([1, 1], abs=0.25)
    assert found.corpora["a"]["share"] == pytest.approx(3000 / 4650, abs=0.05)


def test_the_same_plan_has_the_same_batches_in_each_version() -> None:
    """Or runs that go on would learn other batches. Where it has others on purpose, `plan.VERSION` must be raised."""
    rng = np.random.Philox(7)
    lengths = 1 + (rng.random_raw(300) % 90).astype(np.int64)
    stages = [
        Stage([8, 32], 256, until_tokens=2_000, weights={"a": 1, "b": 2}),
        Stage([16, 64], 512, weights={"a": 3, "b": 1}),
    ]
    plans = {name: make(lengths, [16, 64], 512, 3) for name, make in MAKERS.items()}
    plans["stages"] = data.make_plan({"a": lengths, "b": lengths[:50]}, stages, data.best_fit, seed=3)
    expected = {
        "pack": "224b7f8c2f945f58",
        "bucket": "180dcc4edfd399e6",
        "pad": "086d11cbc0d58b8b",
        "concat": "dca116294017a396",
        "stages": "74602a6d53c65456",
    }
    assert plans.keys() == expected.keys()
    for name, plan in plans.items():
        digest = hashlib.sha256()
        for rows in batches_of(plan, 40):
            digest.update(repr((rows.num_rows, rows.row_length)).encode())
            for part in (*(rows.pieces[field] for field in ("source", "start", "length")), rows.row, rows.at):
                digest.update(part.astype(np.int64).tobytes())
        assert digest.hexdigest()[:16] == expected[name]
    assert VERSION == 1


def test_fingerprint_is_of_the_batches() -> None:
    lengths = [3, 9, 4, 30, 2]

    def fingerprint(lengths: Any = lengths, rows: Any = (4, 8), tokens: int = 16, seed: int = 0, **options: Any) -> str:
        make = options.pop("make", data.pack)
        return make(np.array(lengths), rows, tokens, seed, **options).fingerprint

    different = [
        fingerprint(),
        fingerprint(lengths=lengths[::-1]),
        fingerprint(lengths=[*lengths, 2]),
        fingerprint(lengths=[3, 9, 4, 30, 3]),
        fingerprint(lengths=[3, 1, 9, 4, 30, 2]),  # has no piece, but moves those after it
        fingerprint(rows=(4, 16)),
        fingerprint(rows=(8,)),
        fingerprint(tokens=32),
        fingerprint(seed=1),
        fingerprint(passes=1),
        fingerprint(make=data.bucket),
        data.make_plan(np.array(lengths), Stage((4, 8), 16, window=4), data.best_fit).fingerprint,
        data.make_plan({"b": np.array(lengths)}, Stage((4, 8), 16), data.best_fit).fingerprint,
    ]
    assert len(set(different)) == len(different)
    assert fingerprint(rows=(8, 4, 4)) == different[0]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "no document of 'text' has two tokens"),
        ([0, 1, 1], {}, "no document of 'text' has two tokens"),
        ([9], {"seed": -1}, "seed is -1"),
        ([9], {"seed": 0.5}, "seed is 0.5"),
        ([9], {"passes": 0}, "0 passes"),
        ([9], {"passes": 1.5}, "1.5 passes"),
        ([9], {"passes": 1, "stages": [Stage([4], 8, until_tokens=100)]}, "no end"),
        ([9], {"passes": 1, "stages": [Stage([4], 8, weights={"text": 1})]}, "no weights"),
        ([9], {"stages": []}, "there is none"),
        ([9], {"stages": [Stage([4], 8), Stage([4], 8)]}, "stage 0 of 2 has no end"),
        ([9], {"stages": [Stage([4], 8, weights={"code": 1})]}, r"weights of \['code'\] for the corpora \['text'\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refuses(lengths: list[int], options: dict[str, Any], message: str) -> None:
    stages = options.pop("stages", Stage([4], 8))
    with pytest.raises(ValueError, match=message):
        data.make_plan(np.array(lengths, int), stages, data.best_fit, **options)


@pytest.mark.parametrize("total", [2**30, 3 * 10**9, 5 * 10**9])
def test_a_corpus_of_any_size_is_concatenated(total: int) -> None:
    plan = data.concat(np.array([total - 5, 5]), 2**26, 2**26, passes=1)
    found = np.sort(np.concatenate([plan.batch(i).pieces for i in range(plan.count or 0)]), order="start")
    assert found["length"].min() > 1
    ends = found["start"] + found["length"]
    assert (found["start"][0], ends[-1]) == (0, total)
    assert set(found["start"][1:] - ends[:-1]) <= {-1, 0}
    with pytest.raises(ValueError, match="document 1 of text has 2147483648 tokens; cut it"):
        data.pack(np.array([5, 2**31]), [8], 64)


def test_documents_of_less_than_two_tokens_have_no_row_but_keep_their_place() -> None:
    plan = data.bucket(np.array([0, 1, 3, 0, 1, 2, 1, 0]), [4], 8, passes=1)
    pieces = np.concatenate([rows.pieces for rows in batches_of(plan)])
    assert sorted(zip(pieces["start"].tolist(), pieces["length"].tolist(), strict=True)) == [(1, 3), (5, 2)]
    assert plan.too_short == {"text": 6}


@each_plan
def test_a_corpus_smaller_than_a_batch_is_enough(make: Callable[..., Plan]) -> None:
    plan = make(np.array([3]), [4], 64)
    for rows in batches_of(plan, 5):
        assert (rows.num_rows, rows.row_length, rows.pieces["length"].min()) == (16, 4, 3)
    assert make(np.array([3]), [4], 64, passes=1).count == 1
