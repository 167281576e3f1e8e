"""Adafactor: the second moment of a matrix from those of its rows and columns."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.optim._decay import add_decayed_weights
from jaxlm.optim._leaves import (
    LARGEST,
    TINY,
    Mask,
    Scalar,
    at,
    average,
    bounded,
    check_range,
    layers,
    layerwise,
    map_leaves,
    need,
    next_count,
    scale_by_learning_rate,
    transformation,
    wide_zeros,
    zeros_without,
)


class Factored(NamedTuple):
    """The second moment of a tensor, averaged over its largest axis and over its second largest."""

    row: jax.Array
    """Without the largest axis."""
    column: jax.Array
    """Without the second largest axis."""


class AdafactorState(NamedTuple):
    """What Adafactor keeps of past gradients, float32 or wider."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    """The momentum, or None."""
    nu: Any
    """In the place of each parameter `Factored`, or the whole second moment."""


def scale_by_adafactor(
    *,
    b2_decay: float = 0.8,
    b2_cap: float = 1.0,
    b2_offset: int = 0,
    eps1: float = 1e-30,
    eps2: float = 1e-3,
    clip: float | None = 1.0,
    parameter_scale: bool = True,
    min_factored: int = 128,
    momentum: Scalar | None = None,
    stacked: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor (https://arxiv.org/abs/1804.04235, algorithms 4 to 6), without its learning rate.

    $$R = \beta_t R + (1-\beta_t) \operatorname{mean}_{columns}(g^2 + \epsilon_1), \quad C \text{ likewise over rows},
    \quad u = g \Big/ \sqrt{R C / \operatorname{mean}(R)}$$
    $$\text{update} = \max(\epsilon_2, \operatorname{rms}(x)) \, u / \max(1, \operatorname{rms}(u) / d), \qquad
    \beta_t = \min(1 - t^{-0.8}, \text{cap}), \; t = 1, 2, \ldots$$

    Args:
        b2_decay: the exponent in $\beta_t$.
        b2_cap: the greatest $\beta_t$: with 0.99 to 0.999 long runs don't stop forgetting.
        b2_offset: updates to take off $t$, which is 1 at least: for tuning a model whose state goes on.
        eps1: added to squares, above 0.
        eps2: the least scale of a parameter.
        clip: $d$, the greatest root mean square of $u$ for one tensor; None: any.
        parameter_scale: multiply by the parameter's root mean square, as the first factor of the update does.
        min_factored: tensors whose second largest axis is shorter keep the whole second moment. Of more than two
            axes, the largest two are factored.
        momentum: decay of an average of the updates, without correction of its bias; None: no momentum. It is taken
            before the learning rate, so a change of that acts at once.
        stacked: which leaves `[L ...]` are L tensors, each with factors, clipping and scale of its own; None: none.

    Raises:
        ValueError: an argument out of range.
    """
    name, infinity = "scale_by_adafactor", float("inf")
    check_range(name, 0.0, infinity, b2_decay=b2_decay, eps2=eps2, min_factored=min_factored, b2_offset=b2_offset)
    check_range(name, TINY, infinity, eps1=eps1)
    check_range(name, 0.0, 1.0, momentum=momentum)
    if not 0 < b2_cap <= 1:
        raise ValueError(f"{name}: b2_cap is {b2_cap}; use 0 < b2_cap <= 1")
    if clip is not None and not clip > 0:
        raise ValueError(f"{name}: clip is {clip}; use a positive number, or None for no clipping")

    def init(params: Any) -> AdafactorState:
        def second_moment(param: Any, split: bool) -> tuple[Any]:
            axes = _factored_axes(param.shape[split:], min_factored)
            if axes is None:
                return (wide_zeros(param),)
            return (Factored(*(zeros_without(param, axis + split) for axis in axes)),)

        (nu,) = map_leaves(second_moment, 1, params, layers(stacked, params))
        return AdafactorState(jnp.zeros((), jnp.int32), None if momentum is None else wide_zeros(params), nu)

    def update(updates: Any, state: AdafactorState, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        params = need(params, name)
        count = next_count(state.count)
        age = jnp.maximum(count - b2_offset, 1).astype(jnp.result_type(float))
        b2 = jnp.minimum(1 - age**-b2_decay, b2_cap)

        def tensor(grad: jax.Array, nu: Any, param: jax.Array) -> tuple[jax.Array, Any]:
            def scale(u: jax.Array) -> Any:
                """Of the parameter, over what clips an update."""
                least = jnp.maximum(_rms(param), eps2) if parameter_scale else 1
                return least if clip is None else least / jnp.maximum(1, _rms(u) / clip)

            # The barriers have XLA read the gradient again for each sum and for the update, rather than keep its
            # square and the update, as large as all parameters.
            if not isinstance(nu, Factored):
                grad = bounded(grad, nu.dtype)
                nu = average(nu, jnp.square(grad) + eps1, b2)
                grad, nu = jax.lax.optimization_barrier((grad, nu))
                factor = jax.lax.optimization_barrier(scale(grad * jax.lax.rsqrt(nu)))
                return factor * (grad * jax.lax.rsqrt(nu)), nu
            grad = grad.astype(nu.row.dtype)
            axes = _factored_axes(grad.shape, min_factored)
            assert axes is not None
            largest, second = axes
            row = average(nu.row, _mean_square(grad, largest) + eps1, b2)
            grad, row = jax.lax.optimization_barrier((grad, row))
            column = average(nu.column, _mean_square(grad, second) + eps1, b2)
            grad, column = jax.lax.optimization_barrier((grad, column))
            mean = jnp.mean(row, second - (second > largest), keepdims=True)
            by_row = jnp.expand_dims(jax.lax.rsqrt(row / mean), largest)
            by_column = jnp.expand_dims(jax.lax.rsqrt(column), second)
            factors = scale(grad * by_row * by_column) * by_row, by_column
            by_row, by_column = jax.lax.optimization_barrier(factors)
            return grad * by_row * by_column, Factored(row, column)

        def leaf(grad: jax.Array, nu: Any, param: jax.Array, split: bool) -> tuple[jax.Array, Any]:
            return layerwise(tensor, split)(grad, nu, param)

        split = layers(stacked, params)
        updates, nu = map_leaves(leaf, 2, updates, state.nu, params, split)
        mu = None
        if momentum is not None:
            b1 = at(momentum, state.count)
            updates = mu = jax.tree.map(lambda m, u: average(m, u, b1), state.mu, updates)
        return updates, AdafactorState(count, mu, nu)

    return transformation(init, update)


def adafactor(
    learning_rate: Scalar | None = None, *, weight_decay: float = 0.0, decay_mask: Mask = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor with decoupled weight decay.

    Args:
        learning_rate: a number or a schedule, relative to the parameters' scale where `parameter_scale` is on; None:
            the paper's $\min(10^{-2}, 1/\sqrt t)$.
        weight_decay: multiplied by the learning rate, but not by the parameter's scale.
        decay_mask: which leaves decay; None: all.
        options: those of `scale_by_adafactor`.
    """
    return optax.chain(
        scale_by_adafactor(**options),
        add_decayed_weights(weight_decay, decay_mask),
        scale_by_learning_rate("adafactor", _relative_step if learning_rate is None else learning_rate),
    )


def _relative_step(count: Any) -> jax.Array:
    return jnp.minimum(1e-2, jax.lax.rsqrt(jnp.asarray(count, jnp.result_type(float)) + 1))


def _factored_axes(shape: tuple[int, ...], least: int) -> tuple[int, int] | None:
    """The largest axis and the second largest (of equal ones the last is the largest), if that is long enough."""
    order = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
    return (order[-1], order[-2]) if len(shape) > 1 and shape[order[-2]] >= least else None


def _mean_square(grad: jax.Array, axis: int) -> jax.Array:
    # Bounded after the sum, since XLA:CPU fuses a square into a sum, but not a bound.
    return jnp.minimum(jnp.mean(jnp.square(grad), axis), LARGEST**2)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))))
