"""What all transformations share: masks, hyperparameters and the way through a tree, leaf by leaf."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import tree
from jaxlm.numbers import known

Mask = Any
"""A pytree (or a prefix of one) of bools, or a function of the parameters that returns one; None: see the function."""

Scalar = Any
"""A number, a traced scalar, or a schedule: a function of the count of updates before this one."""

LARGEST = 1e15
"""Gradient elements beyond it count as it, so that no sum of squares overflows float32 and stays there."""

TINY = float(np.finfo(np.float32).tiny)
"""Devices may take for 0 what is smaller."""


def by_name(patterns: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A mask, or any other labels, from the names of leaves: `tree.labels` as a function of the parameters.

    Under `optax.masked` and `optax.partition`, where some leaves are left out, a pattern may be without a leaf.

    Args:
        patterns: regular expressions, each with its value; the first that matches the whole name counts.

    Raises:
        ValueError: when called: a leaf that no pattern matches, or a pattern that no leaf takes its value from.

    >>> by_name({"blocks/.*": True, ".*": False})({"blocks": {"kernel": 1.0}, "embed": 2.0})
    {'blocks': {'kernel': True}, 'embed': False}
    """

    def labels(params: Any) -> Any:
        return tree.labels(params, patterns, unused=has_masked(params))

    return labels


def flags(mask: Mask, params: Any, *, default: bool) -> Any:
    """The mask as a tree of bools, one for each leaf of `params`; None stands for the default everywhere."""
    mask = default if mask is None else mask(params) if callable(mask) else mask

    def flag(value: Any, part: Any) -> Any:
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"a mask holds {value!r}; use True or False, one for each leaf or for a whole branch")
        return jax.tree.map(lambda _: bool(value), part)

    return jax.tree.map(flag, mask, params)


def layers(stacked: Mask, params: Any) -> Any:
    """The mask of stacked leaves as a tree of bools.

    Raises:
        ValueError: a stacked leaf without an axis.
    """
    split = flags(stacked, params, default=False)
    leaves = tree.named_leaves(params)
    for name, is_stacked in tree.named_leaves(split).items():
        if is_stacked and not leaves[name].shape:
            raise ValueError(f"`stacked` marks {name!r}, a scalar; mark leaves whose first axis is that of layers")
    return split


def map_leaves(function: Callable[..., tuple[Any, ...]], outputs: int, first: Any, *others: Any) -> tuple[Any, ...]:
    """`function` of corresponding leaves, which returns `outputs` values, as so many trees of the structure of `first`.

    What the others hold in the place of a leaf may be a tree.
    """
    leaves, structure = jax.tree.flatten(first)
    columns = [structure.flatten_up_to(other) for other in others]
    rows = [function(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(structure.unflatten([row[i] for row in rows]) for i in range(outputs))


def layerwise(function: Callable[..., Any], stacked: bool) -> Callable[..., Any]:
    """A function of one tensor, for `[L ...]` that are L tensors if `stacked`."""
    return jax.vmap(function) if stacked else function


def wide_zeros(params: Any) -> Any:
    """Zeros like the parameters, in float32 if theirs is narrower."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), params)


def zeros_without(param: Any, axis: int) -> jax.Array:
    """Zeros like a parameter without one of its axes, in float32 or wider."""
    wide = jnp.promote_types(param.dtype, jnp.float32)
    # By way of a type, which tells how the parameter lies on an explicit mesh.
    return jnp.zeros_like(jax.eval_shape(lambda p: jnp.sum(p.astype(wide), axis), param))


def bounded(grad: jax.Array, dtype: Any) -> jax.Array:
    """A gradient as `dtype`, with elements of at most `LARGEST`; NaN stays."""
    return jnp.clip(grad.astype(dtype), -LARGEST, LARGEST)


def transformation(
    init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """Optax's pair of functions, of functions with narrower types."""
    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def next_count(count: Any) -> jax.Array:
    """One more, but never more than an int32 holds."""
    return cast(jax.Array, optax.safe_increment(count))


def at(value: Scalar, count: Any) -> Any:
    """A hyperparameter after `count` updates."""
    return value(count) if callable(value) else value


def average(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    """One step of an exponential moving average. `1 - decay` is taken in double precision if that is a Python float."""
    return (decay * old + (1 - decay) * new).astype(old.dtype)


def debias(decay: Any, count: jax.Array) -> jax.Array:
    r"""$1 / (1 - decay^{count})$, without the cancellation that `1 - decay**count` has at first."""
    static = isinstance(decay, float | int)
    log = (math.log(decay) if decay > 0 else -math.inf) if static else jnp.log(decay)
    return -1 / jnp.expm1(log * count.astype(jnp.result_type(float)))


def check_range(function: str, low: float, high: float, **values: Any) -> None:
    """Raises a ValueError for numbers outside `low <= value < high`; schedules and traced scalars are let through."""
    for name, value in values.items():
        if (number := known(value)) is not None and not low <= number < high:
            raise ValueError(f"{function}: {name} is {value}; use {low} <= {name} < {high}")


def scale_by_learning_rate(function: str, learning_rate: Scalar) -> optax.GradientTransformation:
    """Optax's, of a schedule, or of a number that isn't below 0."""
    check_range(function, 0.0, math.inf, learning_rate=learning_rate)
    return optax.scale_by_learning_rate(learning_rate)


def need(params: Any, function: str) -> Any:
    """The parameters, which an update was to be given."""
    if params is None:
        raise ValueError(f"{function}: update needs the parameters; call `update(updates, state, params)`")
    return params


def has_masked(params: Any) -> bool:
    """Whether `optax.masked` or `optax.partition` has left leaves out."""

    def masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    return any(map(masked, jax.tree.leaves(params, is_leaf=masked)))
