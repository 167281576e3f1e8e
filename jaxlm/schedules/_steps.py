"""What all schedules are made of: steps that are int32, checked numbers, and powers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.numbers import known

Schedule = optax.Schedule
"""`step -> value`; the step an integer or an array of them."""

Value = int | float | jax.Array
"""A number, or a traced scalar."""

LAST = 2**31 - 1
"""The last step there is."""


def counted(step: jax.typing.ArrayLike) -> jax.Array:
    """A step as int32: one below 0 is 0, and one beyond the last is the last.

    Raises:
        TypeError: the step is no integer; float32 holds none exactly beyond 2^24.
    """
    on = jnp if isinstance(step, jax.Array) else np  # JAX would cut a Python integer or an int64 down to 32 bits
    step = on.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(f"a schedule was given a step of type {step.dtype.name}; use an integer, as int(step)")
    return jnp.asarray(on.clip(step, 0, min(LAST, np.iinfo(step.dtype).max)), jnp.int32)


def whole(what: str, number: int, least: int = 1) -> int:
    """The number, if it is one that int32 holds and at least `least`."""
    if not least <= number <= LAST or number != int(number):
        raise ValueError(f"{what}: {number}; use a whole number from {least} to 2**31 - 1")
    return int(number)


def positive(what: str, number: Value) -> None:
    """Refuses a number that is not above 0, or infinite; what is traced is let through."""
    if (value := known(number)) is not None and not 0 < value < math.inf:
        raise ValueError(f"{what}: {number}; use a number above 0")


def finite(what: str, *numbers: Value | Schedule) -> None:
    """Refuses numbers that are infinite or undefined; what is traced is let through, and schedules are."""
    for number in numbers:
        if not math.isfinite(known(number) or 0):
            raise ValueError(f"{what}: {number}; use a finite number")


def raised(factor: Value, times: jax.Array) -> jax.Array:
    """`factor ** times`, through a logarithm that is taken in float64 where the factor is known.

    As a float32, 0.99994 is so far off that its 100 000th power has an error of a thousandth.
    """
    log2 = jnp.log2(factor) if isinstance(factor, jax.Array) else math.log2(factor)
    return jnp.power(2.0, log2 * times.astype(float))  # jnp.exp2 has fifty times its error
