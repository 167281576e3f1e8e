"""What numbers that were given as arguments are held against."""

from typing import Any

import numpy as np
from jax.core import Tracer


def is_whole(number: Any, least: int = 1) -> bool:
    """Whether it is an integer, Python's or NumPy's but no bool, and `least` or more."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool) and bool(number >= least)


def check_whole(function: str, least: int = 1, **values: Any) -> None:
    """Raises a ValueError for what is no integer of `least` or more."""
    for name, value in values.items():
        if not is_whole(value, least):
            raise ValueError(f"{function}: {name} is {value}; use a whole number, {least} or more")


def known(value: Any) -> float | None:
    """The value of a number, of whatever type; None, which nothing can be said about, of what is traced or called."""
    if value is None or callable(value) or isinstance(value, Tracer) or np.ndim(value):
        return None
    return float(value)
