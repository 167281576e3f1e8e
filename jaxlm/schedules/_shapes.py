"""Schedules in one piece."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.schedules._steps import Schedule, Value, counted, finite, positive, raised, whole

Piece = Callable[[Value, Value, int], Schedule]
"""`(start, end, steps) -> schedule`: exactly `start` at step 0, exactly `end` from step `steps` on."""


def _piece(start: Value, end: Value, steps: int, between: Callable[[jax.Array, jax.Array], jax.Array]) -> Schedule:
    """A piece from the value after a share of its steps, given that share and the share that is left.

    Both are quotients of exact integers, so neither loses digits near 0 as `1 - share` would.
    """
    steps = whole("steps", steps)
    finite("start and end", start, end)
    parts = max(steps, 2)  # so that there is something between the ends, if only for gradients to be finite

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = counted(step)
        passed = jnp.clip(t, 1, parts - 1)
        value = between(passed.astype(float) / parts, (parts - passed).astype(float) / parts)
        return jnp.where(t <= 0, start, jnp.where(t < steps, value, end))

    return schedule


def linear(start: Value, end: Value, steps: int) -> Schedule:
    r"""A straight line. To 0 it is the best known decay at compute-optimal lengths (https://arxiv.org/abs/2502.15938).

    $$v_t = a \frac{T - t}{T} + b \frac{t}{T}$$

    Args:
        start: the value a at step 0.
        end: the value b from step T on.
        steps: T, 1 or more.

    >>> schedule = linear(1, 0, 10)
    >>> [float(schedule(step)) for step in (0, 5, 10, 20)]
    [1.0, 0.5, 0.0, 0.0]
    """
    return _piece(start, end, steps, lambda passed, left: start * left + end * passed)


def cosine(start: Value, end: Value, steps: int) -> Schedule:
    r"""Half a wave (https://arxiv.org/abs/1608.03983, equation 5, without restarts).

    $$v_t = a \sin^2\frac{\pi (T - t)}{2T} + b \sin^2\frac{\pi t}{2T}$$

    which is $b + (a - b)(1 + \cos(\pi t/T))/2$, but doesn't cancel where the cosine nears -1.

    Args:
        start: the value a at step 0.
        end: the value b from step T on.
        steps: T, 1 or more.
    """
    return _piece(start, end, steps, lambda passed, left: start * half_wave(left) + end * half_wave(passed))


def half_wave(share: jax.Array) -> jax.Array:
    """From 0 at 0 to 1 at 1, with slope 0 at both."""
    return jnp.square(jnp.sin(np.pi / 2 * share))


def one_minus_sqrt(start: Value, end: Value, steps: int) -> Schedule:
    r"""A fast fall and a long tail, as the end of `wsd` (https://arxiv.org/abs/2405.18392).

    $$v_t = a (1 - \sqrt{t/T}) + b \sqrt{t/T}, \qquad 1 - \sqrt{t/T} = \frac{(T - t)/T}{1 + \sqrt{t/T}}$$

    Args:
        start: the value a at step 0.
        end: the value b from step T on.
        steps: T, 1 or more.
    """

    def between(passed: jax.Array, left: jax.Array) -> jax.Array:
        root = jnp.sqrt(passed)
        return start * (left / (1 + root)) + end * root

    return _piece(start, end, steps, between)


def polynomial(start: Value, end: Value, steps: int, exponent: Value) -> Schedule:
    r"""A power of the share of steps that is left.

    $$v_t = a r^p + b (1 - r^p), \qquad r = (T - t)/T$$

    Args:
        start: the value a at step 0.
        end: the value b from step T on.
        steps: T, 1 or more.
        exponent: p, above 0: 1 is `linear`; more falls fast at first, less at last.
    """
    positive("polynomial: the exponent", exponent)

    def between(passed: jax.Array, left: jax.Array) -> jax.Array:
        # Near 1 log loses digits; past a third XLA's log1p in float64 loses two.
        log = jnp.where(passed < 0.25, jnp.log1p(-passed), jnp.log(left))
        return start * jnp.power(left, exponent) - end * jnp.expm1(exponent * log)

    return _piece(start, end, steps, between)


def exponential(start: Value, end: Value, steps: int) -> Schedule:
    r"""A straight line on a logarithmic axis.

    $$v_t = a^{(T - t)/T} b^{t/T}$$

    Args:
        start: the value a at step 0, above 0.
        end: the value b from step T on, above 0.
        steps: T, 1 or more.
    """
    positive("exponential: start", start)
    positive("exponential: end", end)

    def between(passed: jax.Array, left: jax.Array) -> jax.Array:  # from the end that is nearer: its power is smaller
        return jnp.where(passed < left, start * raised(end / start, passed), end * raised(start / end, left))

    return _piece(start, end, steps, between)


def constant(value: Value) -> Schedule:
    """The same value at every step."""
    finite("constant", value)
    return lambda step: jnp.full(counted(step).shape, value, float)


def step_decay(value: Value, factor: Value, every: int) -> Schedule:
    r"""A value that is multiplied by a factor every so many steps: $v_t = a f^{\lfloor t/n \rfloor}$.

    Args:
        value: a, that of the first `every` steps.
        factor: f, above 0.
        every: n, 1 or more; with 1, an exponential decay without end.

    >>> schedule = step_decay(1.0, 0.5, every=10)
    >>> [float(schedule(step)) for step in (9, 10, 35)]
    [1.0, 0.5, 0.125]
    """
    finite("step_decay: value", value)
    positive("step_decay: the factor", factor)
    every = whole("step_decay: every", every)
    return lambda step: value * raised(factor, counted(step) // every)


def inverse_sqrt(peak: Value, timescale: Value) -> Schedule:
    r"""A decay without end, for runs whose length isn't known: $v_t = a \sqrt{\tau / (t + \tau)}$.

    In front of it go the beginnings under which it is known:
    `warmup(inverse_sqrt(peak, w), w, start=0.0)` is that of the Transformer (https://arxiv.org/abs/1706.03762), and
    `sequence((constant(peak), k), then=inverse_sqrt(peak, k))` that of T5 (https://arxiv.org/abs/1910.10683).

    Args:
        peak: a, the value at step 0.
        timescale: τ, above 0; after three times as many steps half the peak is left.
    """
    finite("inverse_sqrt: peak", peak)
    positive("inverse_sqrt: the timescale", timescale)
    return lambda step: peak / jnp.sqrt(1 + counted(step).astype(float) / timescale)


def power(peak: Value, coefficient: Value, exponent: Value) -> Schedule:
    r"""The power scheduler's decay (https://arxiv.org/abs/2408.13359): $v_t = \min(a, c t^b)$.

    It neither knows the run's length nor depends on the batch's size if, as in the paper, t counts tokens (`by_tokens`)
    and c is proportional to the tokens in a batch. A `warmup` before it and an `exponential` after it complete it.

    Args:
        peak: a, the highest value.
        coefficient: c, above 0.
        exponent: b, below 0; the paper's is -0.51.
    """
    finite("power: peak", peak)
    positive("power: the coefficient", coefficient)
    positive("power: minus the exponent", -exponent)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = counted(step)
        return jnp.where(
            t > 0, jnp.minimum(peak, coefficient * jnp.power(jnp.maximum(t, 1).astype(float), exponent)), peak
        )

    return schedule
