"""The algebra: boundaries, joins, and tokens counted exactly."""

import itertools
import random

import jax
import numpy as np
import optax
import pytest

from jaxlm import schedules
from jaxlm.schedules import (
    Schedule,
    by_tokens,
    clipped,
    constant,
    cosine,
    cosine_restarts,
    cyclic,
    linear,
    piecewise,
    piecewise_constant,
    power,
    scaled,
    sequence,
    step_decay,
    triangular,
    warmup,
    wsd,
)

LAST = 2**31 - 1


def count(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """The schedule whose value is the step that it is given."""
    return step


def test_a_boundary_belongs_to_what_follows_and_counts_begin_anew() -> None:
    schedule = sequence((count, 3), (lambda step: step + 100, 2), (count, 0), then=lambda step: step + 1000)
    assert [int(schedule(step)) for step in range(8)] == [0, 1, 2, 100, 101, 1000, 1001, 1002]
    late = sequence((count, LAST - 1), (lambda step: step + 7, 1), then=lambda step: step + 9)
    assert [int(late(step)) for step in (LAST - 2, LAST - 1, LAST)] == [LAST - 2, 7, 9]


def test_no_part_sees_a_step_outside_of_its_own() -> None:
    seen: list[int] = []

    def spy(step: jax.Array) -> jax.Array:
        seen.append(int(step))
        return step

    schedule = sequence((spy, 3), (spy, 5), then=spy)
    for step in (0, 2, 3, 7, 8, 50):
        schedule(step)
    first, second, last = (set(seen[i::3]) for i in (2, 1, 0))
    assert first <= set(range(3))
    assert second <= set(range(5))
    assert last == {0, 42}


def test_gradients_through_a_sequence_are_finite_where_those_of_join_schedules_are_not() -> None:
    def theirs(scale: jax.Array, step: int) -> jax.Array:
        return optax.join_schedules([optax.constant_schedule(1.0), lambda t: scale * t**scale], [10])(step)

    def ours(scale: jax.Array, step: int) -> jax.Array:
        return sequence((constant(1.0), 10), then=lambda t: scale * t.astype(float) ** scale)(step)

    assert not np.isfinite(jax.grad(theirs)(0.5, 3))
    for step in (0, 9, 10, 11):
        assert np.isfinite(jax.grad(ours)(0.5, step))


def test_triangles_then_a_cosine() -> None:
    cycles, decay = triangular(0.1, 1.0, 5), cosine(1.0, 0.0, 50)
    schedule = sequence((cycles, 25), then=decay)  # two and a half cycles: they end at the top
    for step in range(100):
        assert schedule(step) == (cycles(step) if step < 25 else decay(step - 25))


# With the steepest change in one step: of a line 1 over its length, of half a wave pi/2 times that, of a power |b|/t.
JOINED: dict[str, tuple[Schedule, float]] = {
    "warmup, cosine": (warmup(cosine(1.0, 0.0, 5000), 1000), 1 / 1000),
    "warmup from 0, cosine": (warmup(cosine(1.0, 0.0, 1000), 5000, 0.0), np.pi / 2 / 1000),
    "warmup, power": (warmup(power(1.0, 20.0, -0.5), 1000), 1 / 800),  # it leaves 1 at step 400
    "wsd": (wsd(1.0, 6000, warmup=2000, cooldown=1000), 1 / 1000),
    "triangles, cosine": (sequence((triangular(0.0, 1.0, 1000), 3000), then=cosine(1.0, 0.0, 3000)), 1 / 1000),
    "cyclic": (cyclic(1.0, 0.0, 1000, 3000), 1 / 1000),
    "one_cycle": (schedules.one_cycle(1.0, 6000, shape=linear), 1 / 1800),
    "piecewise": (piecewise({0: 1.0, 1000: 0.0, 3000: 0.5}), 1 / 1000),
}


@pytest.mark.parametrize(("schedule", "steepest"), JOINED.values(), ids=JOINED)
def test_joins_are_continuous(schedule: Schedule, steepest: float) -> None:
    values = np.asarray(schedule(np.arange(8000)), float)
    assert values.max() == 1
    assert 0.9 * steepest < np.max(np.abs(np.diff(values))) < steepest + 20 * 2**-24


def test_warmup_loses_no_step_and_meets_the_schedule() -> None:
    rate = 3e-4
    for steps in (1, 2, 10, 1000):
        schedule = warmup(step_decay(rate, 0.5, 3), steps)
        t = np.arange(steps + 1)
        np.testing.assert_allclose(schedule(t), rate * (t + 1) / (steps + 1), rtol=8 * 2**-24)  # linear's 7, a quotient
        assert schedule(steps) == np.float32(rate)
        assert [float(schedule(steps + i)) for i in (2, 3, 6)] == [np.float32(rate) * 2.0**-i for i in (0, 1, 2)]
        assert warmup(constant(rate), steps, 0.0)(0) == 0
    bare = constant(rate)
    assert warmup(bare, 0) is bare


def test_warmup_begins_where_it_is_told_and_may_fall() -> None:
    schedule = warmup(constant(1.0), 4, 2.0)
    assert [float(schedule(step)) for step in range(6)] == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]


def test_piecewise_holds_its_values_at_their_steps() -> None:
    values = {0: 0.5, 1: 2.0, 8: 1.0, 1000: 0.25, LAST: 3.0}
    for shape in (linear, cosine, schedules.one_minus_sqrt, schedules.exponential):
        schedule = piecewise(values, shape)
        assert {step: float(schedule(step)) for step in values} == values
    flat = piecewise_constant(values)
    for (step, value), (following, _) in itertools.pairwise(values.items()):
        assert flat(step) == flat(following - 1) == value
    assert flat(LAST) == 3


def test_scaled_and_clipped() -> None:
    line = linear(1.0, 0.0, 10)
    assert [float(scaled(line, 3)(step)) for step in (0, 5, 10)] == [3.0, 1.5, 0.0]
    assert [float(scaled(line, line)(step)) for step in (0, 5, 10)] == [1.0, 0.25, 0.0]
    assert [float(clipped(line, 0.25, 0.75)(step)) for step in (0, 5, 10)] == [0.75, 0.5, 0.25]
    assert [float(clipped(line, low=0.25)(step)) for step in (0, 10)] == [1.0, 0.25]
    assert [float(clipped(line, high=0.75)(step)) for step in (0, 10)] == [0.75, 0.0]


STAGES = [
    # unit, tokens per step at last, (steps, tokens per step) before
    (10**6, 4 * 2**20, []),
    (10**6, 2**24, [(10_000, 2**19), (20_000, 2**21), (50_000, 2**23)]),
    (2**20, 3 * 2**20 + 2**14, [(1, 7 * 2**15), (999, 2**20)]),
    (1, 1, [(5, 3)]),
    (7, 7, [(3, 1), (3, 2), (3, 6)]),
    (46_337, 10**9 + 7, [(1, 46_336), (100, 1)]),
    (2**40, 2**22, [(2**20, 2**10)]),
    (2, 2**31, [(3, 1)]),
    (1000, 333, [(100, 10**12), (100, 333)]),
    (1, 1, [(LAST - 1, 5)]),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("unit", "last", "ramp"), STAGES)
def test_tokens_are_counted_exactly(unit: int, last: int, ramp: list[tuple[int, int]]) -> None:
    rng = random.Random(0)
    ends = [0, *itertools.accumulate(steps for steps, _ in ramp), LAST]
    fills = (2**31 * unit - sum(steps * tokens for steps, tokens in ramp)) // last + ends[-2]  # 2^31 units, about
    steps = {end + i for end in [*ends, fills] for i in range(-3, 4)} | {rng.randrange(end + 1) for end in ends * 99}
    steps = sorted({min(max(step, 0), LAST) for step in steps})

    def tokens_before(step: int) -> int:
        parts = zip(itertools.pairwise(ends), [*(tokens for _, tokens in ramp), last], strict=True)
        return sum((min(step, to) - begin) * tokens for (begin, to), tokens in parts if step > begin)

    expected = [min(tokens_before(step) // unit, LAST) for step in steps]
    counted = by_tokens(count, last, unit=unit, ramp=ramp)
    np.testing.assert_array_equal(counted(np.array(steps)), expected)
    np.testing.assert_array_equal(jax.jit(counted)(np.array(steps)), expected)


def test_trillions_of_tokens() -> None:
    schedule = by_tokens(cosine(3e-4, 0.0, 15_000_000), 16 * 2**20, unit=10**6, ramp=[(10_000, 4 * 2**20)])
    step = 700_000
    units = (10_000 * 4 * 2**20 + (step - 10_000) * 16 * 2**20) // 10**6
    assert units * 10**6 > 11 * 10**12
    assert schedule(step) == cosine(3e-4, 0.0, 15_000_000)(units)


def test_a_ramped_batch_gives_the_schedule_that_a_constant_one_gives() -> None:
    decay = cosine(1.0, 0.0, 4000)
    small, ramped = by_tokens(decay, 10, unit=10), by_tokens(decay, 40, unit=10, ramp=[(1000, 10), (500, 20)])
    for step, tokens in [(0, 0), (1000, 10_000), (1250, 15_000), (1500, 20_000), (1750, 30_000), (2000, 40_000)]:
        assert ramped(step) == small(tokens // 10)


def test_a_run_resumes_into_a_new_warm_up() -> None:
    old = wsd(1.0, 100, warmup=10, cooldown=20)
    schedule = sequence((old, 60), then=warmup(cosine(1.0, 0.0, 50), 9))
    np.testing.assert_allclose([schedule(t) for t in (59, 60, 69, 119)], [1, 0.1, 1, 0], rtol=1e-6)


def test_restarts_end_when_they_are_told() -> None:
    schedule = sequence((cosine_restarts(1.0, 10), 20), then=constant(0.0))
    assert schedule(10) == 1
    assert schedule(20) == schedule(10**9) == 0
