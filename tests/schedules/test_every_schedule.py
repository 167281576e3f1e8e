"""What holds for all schedules: any integer is a step, jitted or not, and no gradient is infinite."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxlm import schedules
from jaxlm.schedules import Schedule

LAST = 2**31 - 1
# Compiled programs round elsewhere: they fuse products with sums, and divide by constants through reciprocals. Two such
# values are each within the 30 half units in the last place of test_accuracy.
CLOSE = 2 * 30 * 2**-24

# From hyperparameters, to which values are differentiable, to a schedule with something of interest within 40 steps.
SCHEDULES: dict[str, tuple[Callable[..., Schedule], tuple[float, ...]]] = {
    "constant": (schedules.constant, (0.3,)),
    "linear": (lambda a, b: schedules.linear(a, b, 30), (0.3, 0.1)),
    "linear in one step": (lambda a, b: schedules.linear(a, b, 1), (0.3, 0.1)),
    "cosine": (lambda a, b: schedules.cosine(a, b, 30), (0.3, 0.1)),
    "one_minus_sqrt": (lambda a, b: schedules.one_minus_sqrt(a, b, 30), (0.3, 0.1)),
    "polynomial": (lambda a, b, p: schedules.polynomial(a, b, 30, p), (0.3, 0.1, 0.5)),
    "exponential": (lambda a, b: schedules.exponential(a, b, 30), (0.3, 0.1)),
    "step_decay": (lambda a, f: schedules.step_decay(a, f, 10), (0.3, 0.7)),
    "inverse_sqrt": (schedules.inverse_sqrt, (0.3, 7.0)),
    "power": (schedules.power, (0.3, 0.8, -0.51)),
    "piecewise": (lambda a, b: schedules.piecewise({0: a, 10: b, 20: a}), (0.3, 0.1)),
    "piecewise_constant": (lambda a, b: schedules.piecewise_constant({0: a, 10: b, 20: a}), (0.3, 0.1)),
    "cosine_restarts": (
        lambda a, d, b: schedules.cosine_restarts(a, 10, multiple=2, peak_decay=d, end=b),
        (0.3, 0.7, 0.1),
    ),
    "cosine_restarts, equal": (lambda a, d: schedules.cosine_restarts(a, 10, peak_decay=d), (0.3, 0.7)),
    "cyclic": (lambda a, b, c, d: schedules.cyclic(a, b, 4, 6, cycle_decay=c, step_decay=d), (0.1, 0.3, 0.7, 0.9)),
    "triangular": (lambda a, b: schedules.triangular(a, b, 10), (0.1, 0.3)),
    "triangular2": (lambda a, b: schedules.triangular2(a, b, 5), (0.1, 0.3)),
    "exp_range": (lambda a, b, g: schedules.exp_range(a, b, 5, g), (0.1, 0.3, 0.9)),
    "one_cycle": (lambda a: schedules.one_cycle(a, 30), (0.3,)),
    "wsd": (
        lambda a, b: schedules.wsd(a, 30, warmup=10, cooldown=10, shape=schedules.one_minus_sqrt, end=b),
        (0.3, 0.1),
    ),
    "warmup": (lambda a, s: schedules.warmup(schedules.inverse_sqrt(a, 10), 10, s), (0.3, 0.1)),
    "sequence": (
        lambda a, b, p: schedules.sequence(
            (schedules.triangular(b, a, 5), 10),
            (schedules.polynomial(a, b, 10, p), 10),
            then=schedules.power(a, b, -p),
        ),
        (0.3, 0.1, 0.5),
    ),
    "scaled and clipped": (
        lambda a, b, c: schedules.clipped(
            schedules.scaled(schedules.scaled(schedules.linear(a, 0, 30), schedules.cosine(1, 0, 20)), c), b, a
        ),
        (0.3, 0.01, 0.9),
    ),
    "by_tokens": (
        lambda a, b: schedules.by_tokens(schedules.cosine(a, b, 70), 30, unit=10, ramp=[(10, 10)]),
        (0.3, 0.1),
    ),
}
every = pytest.mark.parametrize(("make", "values"), SCHEDULES.values(), ids=SCHEDULES)
STEPS = np.array([*range(41), 2**24 + 1, LAST - 1, LAST])


@pytest.mark.sampled(5)
@every
def test_any_integer_is_a_step_jitted_or_not(make: Callable[..., Schedule], values: tuple[float, ...]) -> None:
    schedule = make(*values)
    expected = np.array([schedule(int(step)) for step in STEPS])
    assert expected.dtype == np.float32
    assert jnp.shape(schedule(3)) == ()
    jitted = jax.jit(schedule)
    ways: dict[str, Any] = {
        "an array": schedule(STEPS),
        "a matrix": np.ravel(schedule(STEPS.reshape(4, -1))),
        "vmap": jax.vmap(schedule)(STEPS),
        "jit": [jitted(step) for step in STEPS],
        "jit of vmap": jax.jit(jax.vmap(schedule))(STEPS),
        "traced hyperparameters": jax.jit(lambda *v: make(*v)(STEPS))(*values),
    }
    for way, got in ways.items():
        np.testing.assert_allclose(np.array(got), expected, rtol=CLOSE, atol=0, err_msg=way)
    for step, value in zip(STEPS[::6], expected[::6], strict=True):
        assert schedule(step) == schedule(np.uint32(step)) == schedule(jnp.int32(step)) == value
    assert schedule(-1) == schedule(-(2**40)) == schedule(0)
    assert schedule(2**31) == schedule(2**40) == schedule(np.uint64(2**63)) == schedule(LAST)
    assert schedule(np.int8(5)) == schedule(np.uint8(5)) == schedule(5)


@every
def test_a_step_that_is_no_integer_is_refused(make: Callable[..., Schedule], values: tuple[float, ...]) -> None:
    schedule = make(*values)
    for step in [1.0, np.float64(1), jnp.float32(1), True]:
        with pytest.raises(TypeError, match=r"a step of type \w+; use an integer"):
            schedule(step)
    with pytest.raises(TypeError, match="use an integer"):
        jax.jit(schedule)(1.0)


@pytest.mark.sampled(5)
@every
def test_gradients_are_finite_and_right(make: Callable[..., Schedule], values: tuple[float, ...]) -> None:
    for gradient in jax.jacobian(lambda v: make(*v)(STEPS))(values):
        assert np.all(np.isfinite(gradient))
    inside = STEPS[(STEPS > 0) & (STEPS < 40)]
    with jax.enable_x64(True):
        check_grads(lambda *v: make(*v)(inside), values, order=1, modes=("fwd", "rev"), eps=1e-6)


@every
def test_hyperparameters_may_be_batched(make: Callable[..., Schedule], values: tuple[float, ...]) -> None:
    columns = [jnp.array([value, 0.9 * value]) for value in values]
    both = jax.vmap(lambda *v: make(*v)(17))(*columns)
    for got, row in zip(both, zip(*columns, strict=True), strict=True):
        np.testing.assert_allclose(got, make(*row)(17), rtol=CLOSE)


@every
def test_it_is_an_optax_schedule(make: Callable[..., Schedule], values: tuple[float, ...]) -> None:
    schedule = make(*values)
    optimizer = optax.sgd(schedule)
    params = jnp.zeros(3)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(3):
        updates, state = update(jnp.ones(3), state, params)
        np.testing.assert_allclose(updates, np.full(3, -schedule(step)), rtol=CLOSE)


def test_bfloat16_hyperparameters_have_float32_values() -> None:
    low, high = jnp.bfloat16(0.25), jnp.bfloat16(1)
    for schedule in (
        schedules.linear(high, low, 7),
        schedules.cyclic(low, high, 7),
        schedules.cosine_restarts(high, 7),
    ):
        assert jnp.asarray(schedule(3)).dtype == jnp.float32
        np.testing.assert_allclose(schedule(3), schedule(np.array([3]))[0], rtol=CLOSE)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no steps": (lambda: schedules.linear(1, 0, 0), "steps: 0; use a whole number from 1 to"),
    "too many steps": (lambda: schedules.cosine(1, 0, 2**31), "steps: 2147483648; use a whole number"),
    "a power of 0": (lambda: schedules.polynomial(1, 0, 9, 0.0), "the exponent: 0.0; use a number above 0"),
    "exponential to 0": (lambda: schedules.exponential(1, 0, 9), "exponential: end: 0; use a number above 0"),
    "exponential from NaN": (lambda: schedules.exponential(float("nan"), 1, 9), "exponential: start: nan"),
    "no factor": (lambda: schedules.step_decay(1, 0, 9), "step_decay: the factor: 0"),
    "every 0": (lambda: schedules.step_decay(1, 0.5, 0), "step_decay: every: 0"),
    "no timescale": (lambda: schedules.inverse_sqrt(1, 0), "inverse_sqrt: the timescale: 0"),
    "power that rises": (lambda: schedules.power(1, 1, 0.5), "power: minus the exponent: -0.5"),
    "power of nothing": (lambda: schedules.power(1, 0, -0.5), "power: the coefficient: 0"),
    "first cycle": (lambda: schedules.cosine_restarts(1, 0), "cosine_restarts: first: 0"),
    "multiple": (lambda: schedules.cosine_restarts(1, 9, multiple=0), "cosine_restarts: multiple: 0"),
    "peak decay": (lambda: schedules.cosine_restarts(1, 9, peak_decay=0), "cosine_restarts: peak_decay: 0"),
    "up": (lambda: schedules.cyclic(0, 1, 0), "cyclic: up: 0"),
    "down": (lambda: schedules.cyclic(0, 1, 1, 0), "cyclic: down: 0"),
    "up and down": (lambda: schedules.cyclic(0, 1, LAST), "cyclic: up and down together: 4294967294"),
    "cycle decay": (lambda: schedules.cyclic(0, 1, 1, cycle_decay=-1), "cyclic: cycle_decay: -1"),
    "step decay": (lambda: schedules.exp_range(0, 1, 1, 0), "cyclic: step_decay: 0"),
    "one step": (lambda: schedules.one_cycle(1, 1), "one_cycle: steps: 1; use a whole number from 2"),
    "all up": (lambda: schedules.one_cycle(1, 9, up=9), "one_cycle: 9 of 9 steps go up; use 1 to 8"),
    "short wsd": (lambda: schedules.wsd(1, 9, warmup=5, cooldown=5), "wsd: 5 steps of warm-up and 5 of decay"),
    "wsd without decay": (lambda: schedules.wsd(1, 9, warmup=5, cooldown=0), "steps: 0; use"),
    "negative warm-up": (lambda: schedules.warmup(schedules.constant(1), -1), "warmup: steps: -1"),
    "negative part": (lambda: schedules.sequence((abs, -1), then=abs), "sequence: steps: -1"),
    "parts too long": (
        lambda: schedules.sequence((abs, LAST), (abs, 1), then=abs),
        "sequence: steps in all: 2147483648",
    ),
    "start": (lambda: schedules.cosine(math.nan, 0, 9), "start and end: nan; use a finite number"),
    "end": (lambda: schedules.linear(1, math.inf, 9), "start and end: inf"),
    "constant": (lambda: schedules.constant(np.float32(math.nan)), "constant: nan"),
    "peak": (lambda: schedules.cosine_restarts(math.inf, 9), "cosine_restarts: peak and end: inf"),
    "high": (lambda: schedules.triangular(0, math.nan, 9), "cyclic: low and high: nan"),
    "step decay of": (lambda: schedules.step_decay(math.nan, 0.5, 9), "step_decay: value: nan"),
    "infinite factor": (lambda: schedules.step_decay(1, math.inf, 9), "step_decay: the factor: inf"),
    "inverse_sqrt": (lambda: schedules.inverse_sqrt(math.nan, 9), "inverse_sqrt: peak: nan"),
    "power": (lambda: schedules.power(math.nan, 1, -0.5), "power: peak: nan"),
    "clipped": (lambda: schedules.clipped(abs, 1.0, 0.0), r"clipped: from 1.0 to 0.0; use a low"),
    "clipped to nothing": (lambda: schedules.clipped(abs, math.nan), "clipped: from nan to None"),
    "scaled": (lambda: schedules.scaled(abs, math.inf), "scaled: by: inf"),
    "nothing": (lambda: schedules.piecewise({}), r"piecewise: values at the steps \[\]; begin with 0"),
    "no value at 0": (lambda: schedules.piecewise_constant({1: 1.0}), r"at the steps \[1\]; begin with 0"),
    "out of order": (lambda: schedules.piecewise({0: 1.0, 9: 2.0, 5: 1.0}), r"\[0, 9, 5\]; begin with 0 and go upward"),
    "no unit": (lambda: schedules.by_tokens(abs, 1, unit=0), "1 tokens a step in units of 0; use 1 or more"),
    "unit of a float": (
        lambda: schedules.by_tokens(abs, 1, unit=1e6),
        "units of 1000000.0; use 1 or more of both, whole",
    ),
    "no tokens": (lambda: schedules.by_tokens(abs, 1, unit=1, ramp=[(1, 0)]), "0 tokens a step in units of 1"),
    "small unit": (lambda: schedules.by_tokens(abs, 2**40, unit=2), "1099511627776 tokens a step in units of 2 have"),
    "odd unit": (lambda: schedules.by_tokens(abs, 500_003, unit=10**6), "too little in common .* a multiple of 500003"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("unchecked_types")
def test_what_is_refused_says_why(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_traced_values_are_let_through() -> None:
    assert jax.jit(lambda end: schedules.exponential(1, end, 9)(9))(0.5) == 0.5
