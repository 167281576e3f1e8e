"""Schedules that come back, and recipes for whole runs."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.schedules import _compose
from jaxlm.schedules._shapes import Piece, constant, cosine, half_wave, linear
from jaxlm.schedules._steps import LAST, Schedule, Value, counted, finite, positive, raised, whole


def cosine_restarts(
    peak: Value, first: int, *, multiple: int = 1, peak_decay: Value = 1.0, end: Value = 0.0
) -> Schedule:
    r"""SGDR: a cosine that falls again and again (https://arxiv.org/abs/1608.03983, section 3).

    $$v = a_i \sin^2\frac{\pi (T_i - t)}{2T_i} + b \sin^2\frac{\pi t}{2T_i}, \qquad T_i = T_0 m^i, \quad
    a_i = b + (a - b) d^i$$

    at step t of cycle i.

    Args:
        peak: a, the value at the first step.
        first: T_0, the steps of the first cycle.
        multiple: m, a whole number: each cycle is so many times as long as the one before it.
        peak_decay: d, above 0: what is left of the peak's height over `end`, from one cycle to the next.
        end: b, the value that every cycle falls to.

    >>> schedule = cosine_restarts(1.0, 10, multiple=2)
    >>> [round(float(schedule(step)), 6) for step in (0, 10, 20, 30)]
    [1.0, 1.0, 0.5, 1.0]
    """
    first, multiple = whole("cosine_restarts: first", first), whole("cosine_restarts: multiple", multiple)
    finite("cosine_restarts: peak and end", peak, end)
    positive("cosine_restarts: peak_decay", peak_decay)
    begins, lengths = [0], [first]
    while multiple > 1 and begins[-1] + lengths[-1] <= LAST:
        begins.append(begins[-1] + lengths[-1])
        lengths.append(lengths[-1] * multiple)
    # A logarithm instead of the table would be off by a cycle at some restarts. The last cycle may be longer than int32
    # can say: what is beyond is added as a float.
    begin, length = np.array(begins, np.int32), np.minimum(lengths, LAST).astype(np.int32)
    beyond, length_as_float = np.array(lengths, float) - length, np.array(lengths, float)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = counted(step)
        row = jnp.searchsorted(begin, t, side="right", method="compare_all") - 1
        t, steps = t - jnp.asarray(begin)[row], jnp.asarray(length)[row]
        cycle, passed = row + t // steps, t % steps
        total = jnp.asarray(length_as_float, float)[row]
        left = (steps - passed).astype(float) + jnp.asarray(beyond, float)[row]
        top = _mix(end, peak, raised(peak_decay, cycle))
        return top * half_wave(left / total) + end * half_wave(passed.astype(float) / total)

    return schedule


def cyclic(
    low: Value,
    high: Value,
    up: int,
    down: int | None = None,
    *,
    cycle_decay: Value = 1.0,
    step_decay: Value = 1.0,
) -> Schedule:
    r"""Cyclical learning rates: a line up, a line down, and again (https://arxiv.org/abs/1506.01186, section 3).

    $$v_t = a + (b - a) x_t d^{\lfloor t/n \rfloor} \gamma^t$$

    with x_t going from 0 to 1 in `up` steps and back to 0 in `down`, and n = up + down.

    Momentum goes against the learning rate (https://arxiv.org/abs/1803.09820, section 4.3): its cycle is this one too,
    with `low` and `high` exchanged: `cyclic(0.95, 0.85, up, down)`.

    Args:
        low: a, at which cycles begin and end.
        high: b, in their middle.
        up: steps from low to high.
        down: steps back; as many by default.
        cycle_decay: d, above 0: what is left of the height, from one cycle to the next.
        step_decay: γ, above 0: what is left of it, from one step to the next.

    >>> schedule = cyclic(1.0, 3.0, 4, cycle_decay=0.5)
    >>> [float(schedule(step)) for step in (0, 2, 4, 8, 12)]
    [1.0, 2.0, 3.0, 1.0, 2.0]
    """
    down = up if down is None else down
    period = whole("cyclic: up", up) + whole("cyclic: down", down)
    whole("cyclic: up and down together", period)
    finite("cyclic: low and high", low, high)
    positive("cyclic: cycle_decay", cycle_decay)
    positive("cyclic: step_decay", step_decay)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = counted(step)
        place = t % period
        rising = place < up
        passed, left = jnp.where(rising, place, period - place), jnp.where(rising, up - place, place - up)
        length = jnp.where(rising, up, down).astype(float)
        top = _mix(low, high, raised(cycle_decay, t // period) * raised(step_decay, t))
        return low * (left / length) + top * (passed / length)

    return schedule


def triangular(low: Value, high: Value, half: int) -> Schedule:
    """`cyclic` with `half` the steps of a cycle each way."""
    return cyclic(low, high, half)


def triangular2(low: Value, high: Value, half: int) -> Schedule:
    """`cyclic` with the height halved after each cycle."""
    return cyclic(low, high, half, cycle_decay=0.5)


def exp_range(low: Value, high: Value, half: int, gamma: Value) -> Schedule:
    """`cyclic` with the height multiplied by `gamma` at each step."""
    return cyclic(low, high, half, step_decay=gamma)


def one_cycle(
    peak: Value,
    steps: int,
    *,
    up: int | None = None,
    start: Value | None = None,
    end: Value | None = None,
    shape: Piece = cosine,
) -> Schedule:
    """Up once and down to almost nothing (https://arxiv.org/abs/1708.07120).

    Momentum goes against it: `one_cycle(0.85, steps, start=0.95, end=0.95)`.

    Args:
        peak: the value at step `up`.
        steps: of the whole cycle, 2 or more.
        up: steps to the peak, 1 or more and fewer than all; three tenths by default.
        start: the value at step 0; a 25th of the peak by default.
        end: the value at step `steps` and after; a 10 000th of `start` by default.
        shape: of both ways.
    """
    whole("one_cycle: steps", steps, 2)
    up = max(1, steps * 3 // 10) if up is None else up
    if not 1 <= up < steps:
        raise ValueError(f"one_cycle: {up} of {steps} steps go up; use 1 to {steps - 1}, so that both ways have some")
    start = peak / 25 if start is None else start
    end = start / 10_000 if end is None else end
    return _compose.sequence((shape(start, peak, up), up), then=shape(peak, end, steps - up))


def wsd(peak: Value, steps: int, *, warmup: int, cooldown: int, shape: Piece = linear, end: Value = 0.0) -> Schedule:
    """Warm-up, stable, decay: a run can go on from any step before the decay (https://arxiv.org/abs/2404.06395).

    Args:
        peak: the value of the stable part.
        steps: in all.
        warmup: of these, those of the warm-up, which is `warmup`'s; 0 or more.
        cooldown: of these, those of the decay, 1 or more.
        shape: of the decay: `linear`, `one_minus_sqrt` (https://arxiv.org/abs/2405.18392), `cosine`, `exponential`.
        end: the value at step `steps` and after.

    >>> schedule = wsd(1.0, 100, warmup=9, cooldown=20)
    >>> [round(float(schedule(step)), 6) for step in (0, 9, 80, 90, 100)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    stable = steps - warmup - cooldown
    if stable < 0:
        raise ValueError(f"wsd: {warmup} steps of warm-up and {cooldown} of decay are more than {steps}; use fewer")
    return _compose.warmup(_compose.sequence((constant(peak), stable), then=shape(peak, end, cooldown)), warmup)


def _mix(low: Value, high: Value, share: jax.Array) -> jax.Array:
    """Exactly `low` at share 0 and exactly `high` at share 1."""
    return low * (1 - share) + high * share
