"""The same schedules as elsewhere: optax's own, and the formulas of Hugging Face, PyTorch and T5X in float64."""

import math
from collections.abc import Callable

import numpy as np
import optax
import pytest

from jaxlm.schedules import (
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    cyclic,
    exp_range,
    exponential,
    inverse_sqrt,
    linear,
    one_cycle,
    one_minus_sqrt,
    piecewise,
    piecewise_constant,
    polynomial,
    sequence,
    step_decay,
    triangular,
    triangular2,
    warmup,
    wsd,
)

PEAK = 3e-4
STEPS = np.arange(150)

OPTAX = {
    "constant": (constant(PEAK), optax.constant_schedule(PEAK)),
    "linear": (linear(PEAK, 1e-5, 90), optax.linear_schedule(PEAK, 1e-5, 90)),
    "polynomial": (polynomial(PEAK, 1e-5, 90, 2.5), optax.polynomial_schedule(PEAK, 1e-5, 2.5, 90)),
    "cosine": (cosine(PEAK, 0.1 * PEAK, 90), optax.cosine_decay_schedule(PEAK, 90, alpha=0.1)),
    "exponential": (exponential(PEAK, PEAK / 10, 90), optax.exponential_decay(PEAK, 90, 0.1, end_value=PEAK / 10)),
    "step decay": (step_decay(PEAK, 0.7, 20), optax.exponential_decay(PEAK, 20, 0.7, staircase=True)),
    "warmup": (
        warmup(cosine(PEAK, 1e-5, 80), 10, start=0.0),
        optax.warmup_cosine_decay_schedule(0.0, PEAK, 10, 90, end_value=1e-5),
    ),
    "joined": (
        sequence((linear(0, PEAK, 30), 30), then=cosine(PEAK, 0, 60)),
        optax.join_schedules([optax.linear_schedule(0, PEAK, 30), optax.cosine_decay_schedule(PEAK, 60)], [30]),
    ),
    "steps": (
        piecewise_constant({0: PEAK, 30: PEAK / 2, 60: PEAK / 8}),
        optax.piecewise_constant_schedule(PEAK, {30: 0.5, 60: 0.25}),
    ),
    "interpolated": (
        piecewise({0: PEAK, 30: PEAK / 2, 60: PEAK / 8}, cosine),
        optax.piecewise_interpolate_schedule("cosine", PEAK, {30: 0.5, 60: 0.25}),
    ),
    "restarts": (
        cosine_restarts(PEAK, 20, multiple=2, peak_decay=0.5),
        optax.sgdr_schedule(
            [
                {"init_value": PEAK / 2**i, "peak_value": PEAK / 2**i, "warmup_steps": 0, "decay_steps": 20 * 2**i}
                for i in range(3)
            ]
        ),
    ),
    "one cycle": (one_cycle(PEAK, 90), optax.cosine_onecycle_schedule(90, PEAK)),
    "linear one cycle": (
        sequence(
            (linear(PEAK / 25, PEAK, 30), 30),
            (linear(PEAK, PEAK / 25, 50), 50),
            then=linear(PEAK / 25, PEAK / 25 / 1e4, 20),
        ),
        optax.linear_onecycle_schedule(100, PEAK, 0.3, 0.8),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), OPTAX.values(), ids=OPTAX)
def test_optax(ours: Schedule, theirs: optax.Schedule) -> None:
    steps = STEPS[:140] if theirs is OPTAX["restarts"][1] else STEPS  # theirs end
    expected = np.array([theirs(step) for step in steps], float)
    # Both within 20 half units in the last place (test_accuracy), but theirs of the peak, as they subtract from 1.
    np.testing.assert_allclose(np.asarray(ours(steps), float), expected, rtol=0, atol=PEAK * 2 * 20 * 2**-24)


def falling(steps: int, shape: Callable[[float], float]) -> Callable[[int], float]:
    return lambda t: PEAK * shape(min(t / steps, 1.0))


def after_warmup(steps: int, rest: Callable[[int], float]) -> Callable[[int], float]:
    """Hugging Face's warm-up: `step / max(1, num_warmup_steps)`."""
    return lambda t: PEAK * t / steps if t < steps else rest(t - steps)


def hf_wsd(shape: Callable[[float], float]) -> Callable[[int], float]:
    """`get_wsd_schedule(num_warmup_steps=10, num_decay_steps=40, num_stable_steps=50, min_lr_ratio=0.1)`."""

    def value(t: int) -> float:
        if t < 10:
            return PEAK * t / 10
        return PEAK * (0.9 * shape(min(max(t - 60, 0) / 40, 1.0)) + 0.1)

    return value


def hf_inverse_sqrt(t: int, timescale: int = 30, steps: int = 10) -> float:
    shift = timescale - steps
    return PEAK * t / steps if t < steps else PEAK / math.sqrt((t + shift) / timescale)


def transformer(t: int, d: int = 512, steps: int = 30) -> float:
    """Attention is all you need, equation 3; its peak is 1 / sqrt(d W)."""
    return 0.0 if t == 0 else d**-0.5 * min(t**-0.5, t * steps**-1.5)


def t5x(t: int, steps: int = 30) -> float:
    """The factors 'constant * linear_warmup * rsqrt_decay'."""
    return 0.1 * min(1.0, t / steps) / math.sqrt(max(t, steps))


def torch_restarts(t: int, first: int = 10, multiple: int = 2, low: float = 1e-5) -> float:
    """`CosineAnnealingWarmRestarts`."""
    while t >= first:
        t, first = t - first, first * multiple
    return low + (PEAK - low) * (1 + math.cos(math.pi * t / first)) / 2


def torch_cyclic(t: int, up: int = 7, down: int = 12, scale: Callable[[int, int], float] = lambda *_: 1.0) -> float:
    """`CyclicLR`, which is Smith's with legs of two lengths."""
    low, high, total = 1e-5, PEAK, up + down
    cycle = math.floor(1 + t / total)
    x = 1 + t / total - cycle
    height = x / (up / total) if x <= up / total else (x - 1) / (up / total - 1)
    return low + (high - low) * height * scale(cycle, t)


def torch_cyclic_momentum(t: int, up: int = 7, down: int = 12) -> float:
    """`CyclicLR(cycle_momentum=True)`, of 0.8 and 0.9."""
    height = (torch_cyclic(t, up, down) - 1e-5) / (PEAK - 1e-5)
    return 0.9 - (0.9 - 0.8) * height


def torch_one_cycle(t: int, begin: float, peak: float, end: float, total: int = 100) -> float:
    """`OneCycleLR(total_steps=100, pct_start=0.3)`: the peak is at step 29, the end at 99."""

    def anneal(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    first, last = 0.3 * total - 1, total - 1
    t = min(t, last)
    return anneal(begin, peak, t / first) if t <= first else anneal(peak, end, (t - first) / (last - first))


OTHERS: dict[str, tuple[Schedule, Callable[[int], float]]] = {
    "HF linear": (warmup(linear(PEAK, 0, 90), 10, 0.0), after_warmup(10, falling(90, lambda x: 1 - x))),
    "HF cosine": (
        warmup(cosine(PEAK, 0, 90), 10, 0.0),
        after_warmup(10, falling(90, lambda x: 0.5 * (1 + math.cos(math.pi * x)))),
    ),
    "HF polynomial": (
        warmup(polynomial(PEAK, 1e-7, 90, 2.0), 10, 0.0),
        after_warmup(10, lambda t: (PEAK - 1e-7) * (1 - min(t / 90, 1)) ** 2 + 1e-7),
    ),
    "HF hard restarts": (
        warmup(cosine_restarts(PEAK, 50), 10, 0.0),
        after_warmup(10, lambda t: PEAK * 0.5 * (1 + math.cos(math.pi * (t / 50 % 1)))),
    ),
    "HF inverse sqrt": (warmup(inverse_sqrt(PEAK, 30), 10, 0.0), hf_inverse_sqrt),
    **{
        f"HF WSD {name}": (
            warmup(sequence((constant(PEAK), 50), then=shape(PEAK, 0.1 * PEAK, 40)), 10, 0.0),
            hf_wsd(factor),
        )
        for name, shape, factor in [
            ("linear", linear, lambda x: 1 - x),
            ("cosine", cosine, lambda x: 0.5 * (1 + math.cos(math.pi * x))),
            ("1-sqrt", one_minus_sqrt, lambda x: 1 - math.sqrt(x)),
        ]
    },
    "WSD": (
        wsd(PEAK, 100, warmup=9, cooldown=40),
        lambda t: PEAK * min((t + 1) / 10, 1, max(100 - t, 0) / 40),
    ),
    "Transformer": (warmup(inverse_sqrt((512 * 30) ** -0.5, 30), 30, 0.0), transformer),
    "T5X": (
        warmup(inverse_sqrt(0.1 / math.sqrt(30), 30), 30, 0.0),
        t5x,
    ),
    "T5": (
        sequence((constant(30**-0.5), 30), then=inverse_sqrt(30**-0.5, 30)),
        lambda t: 1 / math.sqrt(max(t, 30)),
    ),
    "PyTorch restarts": (cosine_restarts(PEAK, 10, multiple=2, end=1e-5), torch_restarts),
    "PyTorch cyclic": (cyclic(1e-5, PEAK, 7, 12), torch_cyclic),
    "triangular": (triangular(1e-5, PEAK, 9), lambda t: torch_cyclic(t, 9, 9)),
    "triangular2": (
        triangular2(1e-5, PEAK, 9),
        lambda t: torch_cyclic(t, 9, 9, lambda cycle, _: 1 / 2.0 ** (cycle - 1)),
    ),
    "exp_range": (exp_range(1e-5, PEAK, 9, 0.97), lambda t: torch_cyclic(t, 9, 9, lambda _, t: 0.97**t)),
    "PyTorch cycle of momentum": (cyclic(0.9, 0.8, 7, 12), torch_cyclic_momentum),
    "PyTorch one cycle": (
        one_cycle(PEAK, 99, up=29),
        lambda t: torch_one_cycle(t, PEAK / 25, PEAK, PEAK / 25 / 1e4),
    ),
    "PyTorch one cycle of momentum": (
        one_cycle(0.85, 99, up=29, start=0.95, end=0.95),
        lambda t: torch_one_cycle(t, 0.95, 0.85, 0.95),
    ),
}


@pytest.mark.parametrize(("ours", "formula"), OTHERS.values(), ids=OTHERS)
def test_other_libraries(ours: Schedule, formula: Callable[[int], float]) -> None:
    expected = [formula(int(t)) for t in STEPS]
    # Ours are within 30 half units in the last place; some of the formulas cancel, by 1e-16 of the peak.
    np.testing.assert_allclose(np.asarray(ours(STEPS), float), expected, rtol=30 * 2**-24, atol=1e-14)


def test_one_cycle_has_a_step_each_way_however_short() -> None:
    for steps in range(2, 8):
        values = np.asarray(one_cycle(1.0, steps)(np.arange(8)))
        assert values[0] == np.float32(1 / 25)
        assert values.max() == 1
        assert np.all(values[steps:] == np.float32(1 / 25 / 1e4))
