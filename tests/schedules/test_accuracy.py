"""Every value is exact to a few roundings, at every step to 2^31 - 1, in float32 and in float64.

Bounds are relative, and count in u = 2^-24 (2^-53), half a unit in the last place, which is the most that one rounding
changes. A conversion, sum, product, quotient or root adds 1; sin, log2 and pow are taken to be within a whole unit, 2;
log1p and expm1, which are worse in XLA, within two and three, 4 and 6. A quotient by a constant may be compiled to a
product with its reciprocal, 1 more: a share of steps, with the conversions of both integers, is within 4. All terms of
these schedules are positive, so relative errors don't grow in sums; f(x (1 + e)) is off by e x f'(x) / f(x).
"""

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import schedules

LAST = 2**31 - 1
LENGTHS = [1, 2, 3, 1000, 2**24 + 1, LAST - 1, LAST]
A, B = 3e-4, 1e-6  # start and end; neither is a float32
PI = np.longdouble("3.14159265358979323846")

Exact = Any  # np.longdouble: its 64 bits are 11 more than float64's


@pytest.fixture(
    params=[
        "float32",
        pytest.param(
            "float64",
            marks=pytest.mark.skipif(
                np.finfo(np.longdouble).eps > 2**-60, reason="long doubles are no wider than doubles here"
            ),
        ),
    ]
)
def u(request: pytest.FixtureRequest) -> Iterator[float]:
    """Half a unit in the last place of the default float type."""
    wide = request.param == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        yield 2**-53 if wide else 2**-24


def samples(*boundaries: int) -> np.ndarray:
    """Steps: around each boundary, between, and to the last."""
    rng = np.random.default_rng(0)
    ends = [*boundaries, LAST]
    near = [end + i for end in ends for i in range(-3, 4)]
    between = [int(x) for end in ends for x in rng.uniform(0, end, 200)]
    return np.unique(np.clip(near + between, 0, LAST))


def assert_within(values: Any, exact: Exact, bound: Any) -> None:
    """Within a bound that is relative to the exact values; an exact 0 is 0."""
    error = np.abs(np.asarray(values, np.longdouble) - exact)
    over = error > bound * exact
    assert not over.any(), f"{over.sum()} of {over.size}, by {np.max((error / (bound * exact))[over]):.3g} times"


def share(t: np.ndarray, steps: int) -> tuple[Exact, Exact]:
    """Of the steps, the share that has passed, and the one that is left."""
    t = np.minimum(t, steps)
    return np.longdouble(t) / steps, np.longdouble(steps - t) / steps


def half_wave(x: Exact) -> Exact:
    return np.sin(PI / 2 * x) ** 2


def log_of_left(x: Exact, y: Exact) -> Exact:
    with np.errstate(divide="ignore"):
        return np.where(x < 0.5, np.log1p(-np.minimum(x, 0.5)), np.log(y))


class Shape(NamedTuple):
    piece: schedules.Piece
    exact: Callable[[float, float, Exact, Exact], Exact]
    """Of start, end and the shares passed and left."""
    roundings: Callable[[Exact], Any]
    """Of the share left."""


def polynomial(p: float) -> Shape:
    # Down: the base's 4, p times; p's 1, |log of the result| times; pow's 2. Up: the share's
    # 4, in log from 3/4 down at most 1 / log(4/3) = 3.5 times; log's 2; 2 for p and its product; expm1's 6. In log1p to
    # 1/4 they are fewer. Then, as everywhere, 3: the value's conversion, the product, the sum.
    return Shape(
        lambda a, b, steps: schedules.polynomial(a, b, steps, p),
        lambda a, b, x, y: a * y**p - b * np.expm1(p * log_of_left(x, y)),
        lambda y: 3 + np.maximum(4 * p + 2 + p * np.abs(np.log(np.maximum(y, 2.0**-31))), 24),
    )


SHAPES = {
    # The share's 4, and 3.
    "linear": Shape(schedules.linear, lambda a, b, x, y: a * y + b * x, lambda _: 7),
    # The share's 4 and 2 of its product with pi/2, not more in the sine, since z cot z <= 1; the sine's 2; all doubled
    # by the square; its own 1.
    "cosine": Shape(schedules.cosine, lambda a, b, x, y: a * half_wave(y) + b * half_wave(x), lambda _: 20),
    # 1 + root: half of the share's 4, the root's 1, both at most halved by the sum, whose 1 is added: 2.5. With the
    # other share's 4 and the quotient's 1: 7.5.
    "one_minus_sqrt": Shape(
        schedules.one_minus_sqrt, lambda a, b, x, y: a * (y / (1 + np.sqrt(x))) + b * np.sqrt(x), lambda _: 11
    ),
    "polynomial, 1.7": polynomial(1.7),
    "polynomial, 0.3": polynomial(0.3),
    # 2^z, where z has the share's 4, the logarithm's 1 and the product's 1, is off by |z| ln 2 times that; pow's 2; the
    # value's conversion and the product.
    "exponential": Shape(
        schedules.exponential, lambda a, b, x, y: a**y * b**x, lambda y: 4 + 6 * np.log(A / B) * np.minimum(y, 1 - y)
    ),
}


def check_shape(shape: Shape, steps: int, t: np.ndarray, u: float, wrap: Callable[..., Any] = lambda f: f) -> None:
    x, y = share(t, steps)
    inside = (t > 0) & (t < steps)
    bound = np.broadcast_to(shape.roundings(y) * u, t.shape)[inside]
    for a, b in [(A, B), (B, A)]:
        values = np.asarray(wrap(shape.piece(a, b, steps))(t))
        assert_within(values[inside], shape.exact(a, b, x, y)[inside], bound)
        start, end = np.asarray([a, b], values.dtype)
        assert np.all(values[t == 0] == start)
        assert np.all(values[t >= steps] == end)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pieces_of_every_length_to_1000_at_every_step(shape: Shape, u: float) -> None:
    for steps in range(1, 1001) if u == 2**-24 else range(1, 1001, 37):
        check_shape(shape, steps, np.arange(2048), u)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pieces_of_all_sizes(shape: Shape, steps: int, u: float) -> None:
    t = samples(steps // 2, steps)
    check_shape(shape, steps, t, u)
    check_shape(shape, steps, t, u, jax.jit)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "exponential"])
def test_next_to_a_zero_values_are_small_not_zero(name: str) -> None:
    shape = SHAPES[name]
    down, up = shape.piece(1.0, 0.0, 10**6), shape.piece(0.0, 1.0, 10**6)
    assert down(10**6) == up(0) == 0
    assert 0 < down(10**6 - 1) < down(10**6 - 2) < 1
    assert 0 < up(1) < up(2) < 1


def test_lines_and_triangles_equal_fractions() -> None:
    a, b, u = Fraction(A), Fraction(B), Fraction(1, 2**24)
    for steps in [1, 2, 7, 12345, LAST]:
        line, square = schedules.linear(A, B, steps), schedules.polynomial(A, B, steps, 2.0)
        for t in sorted({min(i, steps) for i in (0, 1, 3, steps // 3, steps // 2, steps - 1, steps)}):
            left = Fraction(steps - t, steps)
            assert abs(Fraction(float(line(t))) - (a * left + b * (1 - left))) <= 7 * u * a
            assert abs(Fraction(float(square(t))) - (a * left**2 + b * (1 - left**2))) <= 27 * u * a
    for up, down in [(1, 1), (3, 5), (2**20 + 7, 3), (10**9, 10**9)]:
        cycle = schedules.cyclic(B, A, up, down)
        for t in sorted({up, up + 1, up + down - 1, up + down, 3 * up + 2 * down, LAST - 1, LAST}):
            place = min(t, LAST) % (up + down)
            height = Fraction(place, up) if place < up else Fraction(up + down - place, down)
            exact = b + (a - b) * height
            assert abs(Fraction(float(cycle(t))) - exact) <= 9 * u * exact  # the share's 4, the end's 2, 3 as ever


def test_unbounded_decays(u: float) -> None:
    t = samples(10, 1000, 10**6)
    exact_t = np.longdouble(t)
    for wrap in (lambda f: f, jax.jit):
        # Quotient 4, sum 1, the root of both, its own 1, the value's 1, the quotient's 1.
        values = wrap(schedules.inverse_sqrt(A, 1000))(t)
        assert_within(values, A / np.sqrt(1 + exact_t / 1000), 6 * u)
        # t's conversion b times, b's conversion |log t^b| times, pow's 2, the coefficient's 1, the product's 1.
        values = np.asarray(wrap(schedules.power(A, 10 * A, -0.51))(t))
        later = t > 0
        exact = np.minimum(A, 10 * A * exact_t[later] ** np.longdouble(-0.51))
        assert_within(values[later], exact, (4 + 0.51 * (1 + np.log(exact_t[later]))) * u)
        assert np.all(values[~later] == np.asarray(A, values.dtype))
        assert np.all(wrap(schedules.constant(A))(t) == np.asarray(A, values.dtype))


@pytest.mark.parametrize(("factor", "every"), [(0.5, 7), (0.97, 1), (0.1, 30), (1.01, 2), (0.99994, 1), (0.9, 10**8)])
def test_step_decay(factor: float, every: int, u: float) -> None:
    t = samples(every, 10 * every, 100 * every)
    times = t // every
    with np.errstate(over="ignore"):
        exact = A * np.longdouble(factor) ** times
    normal = (exact > 1e-37) & (exact < 1e37)  # float32 has no more
    # The exponent has 3, for the logarithm, the count and their product; pow 2; the value and its product 2.
    bound = (4 + 3 * np.abs(times * np.log(factor))) * u
    values = np.asarray(schedules.step_decay(A, factor, every)(t))
    assert_within(values[normal], exact[normal], bound[normal])
    assert np.all(values[normal & (times == 0)] == np.asarray(A, values.dtype))
    assert np.all(np.isfinite(values[exact < 1e37]))


RESTARTS = [(1, 1), (10, 1), (1, 2), (7, 3), (12345, 1000), (LAST, 1), (LAST, 7), (2**30, 2)]


def cycle_of(t: int, first: int, multiple: int) -> tuple[int, int, int]:
    """The cycle, the step in it and its length, in Python's integers."""
    if multiple == 1:
        return *divmod(t, first), first
    cycle, length = 0, first
    while t >= length:
        cycle, t, length = cycle + 1, t - length, length * multiple
    return cycle, t, length


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("first", "multiple"), RESTARTS)
def test_cosine_restarts(first: int, multiple: int, u: float) -> None:
    begins = [begin for i in range(32) if (begin := sum(first * multiple**j for j in range(i))) <= LAST]
    t = np.union1d(samples(*begins), np.arange(1000))
    cycles, passed, lengths = (
        np.array(x, object) for x in zip(*(cycle_of(int(i), first, multiple) for i in t), strict=True)
    )
    passed, lengths, cycles = passed.astype(np.longdouble), lengths.astype(np.longdouble), cycles.astype(np.int64)
    for decay in (1.0, 0.5, 0.9):
        top = B + (A - B) * np.longdouble(decay) ** cycles
        exact = top * half_wave((lengths - passed) / lengths) + B * half_wave(passed / lengths)
        # Half a wave has 17 (above), and 2 more with a length beyond int32. The top: pow's 2 and its exponent's 3,
        # |log| times, at most doubled by `1 - share`; 1 for that, 3 for the rest of it; 2 for the last product and sum.
        bound = (30 + 6 * np.abs(cycles * np.log(decay))) * u
        schedule = schedules.cosine_restarts(A, first, multiple=multiple, peak_decay=decay, end=B)
        for values in (schedule(t), jax.jit(schedule)(t)):
            assert_within(values, exact, bound)
            if decay == 1:
                restart = passed == 0
                assert np.all(np.asarray(values)[restart] == np.asarray(A, values.dtype))


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("up", "down"), [(1, 1), (5, 5), (1, 9), (1000, 3), (2**24 + 1, 12345), (2**30, 2**30 - 1)])
def test_cycles(up: int, down: int, u: float) -> None:
    t = np.union1d(samples(up, up + down, 2 * up + down, 10 * (up + down)), np.arange(1000))
    cycle, place = np.divmod(t, up + down)
    height = np.where(place < up, np.longdouble(place) / up, np.longdouble(up + down - place) / down)
    rest = np.where(place < up, np.longdouble(up - place) / up, np.longdouble(place - up) / down)
    for cycle_decay, step_decay in [(1.0, 1.0), (0.5, 1.0), (1.0, 0.99994), (0.9, 0.9999)]:
        size = np.longdouble(cycle_decay) ** cycle * np.longdouble(step_decay) ** t
        exact = B * rest + (B * (1 - size) + A * size) * height
        # The share's 4; both powers' 2 and 3 |log| times and their product's 1, doubled at most where 1 minus that is
        # taken; 3 for the high now, 3 as ever.
        bound = (20 + 6 * np.abs(cycle * np.log(cycle_decay) + t * np.log(step_decay))) * u
        schedule = schedules.cyclic(B, A, up, down, cycle_decay=cycle_decay, step_decay=step_decay)
        for wrap in (lambda f: f, jax.jit):
            assert_within(wrap(schedule)(t), exact, bound)
    # Momentum: the same with the ends exchanged, and where the one is highest the other is lowest.
    values = np.asarray(schedules.cyclic(A, B, up, down)(t))
    assert_within(values, A * rest + B * height, 9 * u)


def test_values_have_the_default_float_type(u: float) -> None:
    for schedule in (
        schedules.linear(1, 0, 9),
        schedules.constant(1),
        schedules.cyclic(0, 1, 3),
        schedules.power(1, 2, -1),
    ):
        assert jnp.asarray(schedule(3)).dtype == (jnp.float32 if u == 2**-24 else jnp.float64)
