"""The algebra: schedules made of schedules."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxlm import stages as staging
from jaxlm.numbers import is_whole, known
from jaxlm.schedules._shapes import Piece, constant, linear
from jaxlm.schedules._steps import LAST, Schedule, Value, counted, finite, whole


def sequence(*parts: tuple[Schedule, int], then: Schedule) -> Schedule:
    """One schedule after the other, each counting from 0 when its turn comes.

    Args:
        parts: schedules, with the number of steps for which each holds; the step after them belongs to the next.
        then: the schedule of all further steps.

    >>> schedule = sequence((linear(0, 1, 4), 4), (constant(1), 4), then=linear(1, 0, 4))
    >>> [float(schedule(step)) for step in (2, 4, 8, 9)]
    [0.5, 1.0, 1.0, 0.75]
    """
    ends = list(itertools.accumulate((whole("sequence: steps", steps, 0) for _, steps in parts), initial=0))
    whole("sequence: steps in all", ends[-1], 0)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = counted(step)
        value = jnp.asarray(then(jnp.maximum(t - ends[-1], 0)))
        for (part, steps), begin in zip(reversed(parts), reversed(ends[:-1]), strict=True):
            # All parts are computed, and each within its own steps: elsewhere its gradient might not be finite.
            own = jnp.clip(t - begin, 0, max(steps - 1, 0))
            value = jnp.where(t < begin + steps, part(own), value)
        return value

    return schedule


def warmup(schedule: Schedule, steps: int, start: Value | None = None) -> Schedule:
    """A straight line up to the first value of a schedule, and then the schedule.

    Args:
        schedule: what follows; its step 0 is step `steps`.
        steps: the length of the line; with 0 there is none.
        start: the value at step 0. By default step t has the share (t + 1) / (steps + 1) of the schedule's first value,
            so that none is lost: with 0, the first step would change nothing but the averages of an optimizer.

    >>> [float(warmup(constant(1), 4, start)(step)) for start in (None, 0) for step in (0, 1, 4)]
    [0.20000000298023224, 0.4000000059604645, 1.0, 0.0, 0.25, 1.0]
    """

    def rise(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        first = jnp.asarray(schedule(0))
        return linear(first / (steps + 1) if start is None else start, first, steps)(step)

    return sequence((rise, steps), then=schedule) if whole("warmup: steps", steps, 0) else schedule


def piecewise(values: Mapping[int, Value], between: Piece = linear) -> Schedule:
    """Values at given steps, and between them what joins two; after the last step, its value.

    Args:
        values: by their steps, from 0 upward.
        between: how one value becomes the next.

    >>> float(piecewise({0: 1.0, 100: 3.0, 300: 0.0})(50))
    2.0
    """
    steps = list(values)
    if steps[:1] != [0] or steps != sorted(set(steps)):
        raise ValueError(f"piecewise: values at the steps {steps}; begin with 0 and go upward")
    pairs = itertools.pairwise(values.items())
    parts = ((between(start, end, to - begin), to - begin) for (begin, start), (to, end) in pairs)
    return sequence(*parts, then=constant(values[steps[-1]]))


def piecewise_constant(values: Mapping[int, Value]) -> Schedule:
    """Each value from its step on.

    Args:
        values: by their first steps, from 0 upward.

    >>> [float(piecewise_constant({0: 1.0, 100: 0.5})(step)) for step in (99, 100)]
    [1.0, 0.5]
    """

    def stay(start: Value, end: Value, steps: int) -> Schedule:
        del end, steps
        return constant(start)

    return piecewise(values, stay)


def scaled(schedule: Schedule, by: Value | Schedule) -> Schedule:
    """A schedule times a number, or times another."""
    finite("scaled: by", by)
    return lambda step: jnp.multiply(schedule(step), by(step) if callable(by) else by)


def clipped(schedule: Schedule, low: Value | None = None, high: Value | None = None) -> Schedule:
    """A schedule whose values are `low` at least and `high` at most.

    Raises:
        ValueError: `low` is above `high`, or one of them undefined.
    """
    least, most = known(low), known(high)
    if not (-math.inf if least is None else least) <= (math.inf if most is None else most):
        raise ValueError(f"clipped: from {low} to {high}; use a low that isn't above high")
    return lambda step: jnp.clip(schedule(step), low, high)


def by_tokens(schedule: Schedule, tokens_per_step: int, *, unit: int, ramp: Sequence[tuple[int, int]] = ()) -> Schedule:
    r"""A schedule over tokens: what it holds for the step doesn't change when the batch grows.

    At step t it is the schedule's value at $\lfloor \text{tokens before t} / \text{unit} \rfloor$, a number that is
    exact although it is computed in int32, which the tokens themselves overflow within the first hour of a large run.

    Args:
        schedule: its steps are units of tokens.
        tokens_per_step: tokens in a batch.
        unit: tokens in a unit: few enough for the schedule to be smooth, many enough that it ends before 2^31 units,
            after which it stands still.
        ramp: (steps, tokens per step) of the smaller batches that come first, in their order.

    Raises:
        ValueError: `tokens_per_step` and `unit` have so little in common that int32 doesn't do.

    >>> decay = linear(1, 0, 1000)  # over 1000 million tokens
    >>> float(by_tokens(decay, 4_000_000, unit=1_000_000, ramp=[(50, 1_000_000)])(150))
    0.550000011920929
    """
    parts: list[tuple[Schedule, int]] = []
    before = 0
    for steps, tokens in ramp:
        parts.append((_units(before, tokens, unit, steps), steps))
        before += steps * tokens
    count = sequence(*parts, then=_units(before, tokens_per_step, unit, LAST))
    return lambda step: schedule(count(step))


def in_stages(schedule: Schedule, stages: Sequence[staging.Stage], *, unit: int) -> Schedule:
    """A schedule over tokens for a run in stages: it counts each stage's batches, and is scaled as the stage says.

    Args:
        schedule: its steps are units of tokens.
        stages: those of the plan.
        unit: tokens in a unit, as in `by_tokens`.

    Raises:
        ValueError: as `stages.steps` and `by_tokens`.

    >>> from jaxlm.stages import Stage
    >>> stages = [Stage([64], 1000, until_tokens=10_000, learning_rate=0.5), Stage([64], 4000)]
    >>> [float(in_stages(linear(64, 0, 64), stages, unit=1000)(step)) for step in (0, 5, 10, 20)]
    [32.0, 29.5, 54.0, 14.0]
    """
    counts = staging.steps(stages)
    ramp = [(count, stage.tokens_per_batch) for stage, count in zip(stages, counts, strict=True) if count is not None]
    firsts = itertools.accumulate((count for count, _ in ramp), initial=0)
    scales = {first: stage.learning_rate for first, stage in zip(firsts, stages, strict=False)}
    over_tokens = by_tokens(schedule, stages[-1].tokens_per_batch, unit=unit, ramp=ramp[: len(stages) - 1])
    return scaled(over_tokens, piecewise_constant(scales))


def _units(before: int, tokens: int, unit: int, steps: int) -> Schedule:
    """Of a step, `min((before + tokens * step) // unit, LAST)`, without an integer above `LAST`.

    With whole units a step, and what is left over as a fraction in lowest terms: (rest + few * step) // parts.
    """
    if not (is_whole(tokens) and is_whole(unit)):
        raise ValueError(f"by_tokens: {tokens} tokens a step in units of {unit}; use 1 or more of both, whole numbers")
    done, rest = divmod(before, unit)
    each, few = divmod(tokens, unit)
    common = math.gcd(few, unit)
    rest, few, parts = rest // common, few // common, unit // common
    last = ((LAST + 1) * unit - 1 - before) // tokens  # the last step whose count is `LAST` at most; -1: none
    last = min(max(last, -1), LAST)
    if max(min(parts - 1, steps) * few + rest, parts, each) > LAST:
        raise ValueError(
            f"by_tokens: {tokens} tokens a step in units of {unit} have too little in common to be counted in 32 bits;"
            f" use a unit that is a multiple of {tokens}, or half, a third... of it"
        )

    def count(step: jax.typing.ArrayLike) -> jax.Array:
        t = counted(step)
        s = jnp.clip(t, 0, max(last, 0))
        value = min(done, LAST) + each * s + s // parts * few + (s % parts * few + rest) // parts
        return jnp.where(t <= last, value, LAST)

    return count
