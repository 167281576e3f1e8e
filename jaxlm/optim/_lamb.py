"""LAMB: Adam's direction, as long as the layer's weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.optim._adam import init_moments, moments
from jaxlm.optim._leaves import (
    TINY,
    Mask,
    Scalar,
    at,
    check_range,
    debias,
    flags,
    layers,
    layerwise,
    map_leaves,
    need,
    next_count,
    scale_by_learning_rate,
    transformation,
)


def scale_by_lamb(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: float = 1e-6,
    *,
    bias_correction: bool = True,
    weight_decay: Any = 0.0,
    decay_mask: Mask = None,
    adapt_mask: Mask = None,
    trust_clip: tuple[float, float] | None = None,
    stacked: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LAMB (https://arxiv.org/abs/1904.00962, algorithm 2), with $\phi(z) = z$.

    $$u = \frac{\|x\|}{\|r + \lambda x\|} (r + \lambda x), \qquad r \text{ Adam's direction}$$

    where both norms are those of one layer's tensor; the ratio is 1 where either is 0. The decay is inside the norm:
    it changes the direction alone.

    Args:
        b1: see `scale_by_adam`.
        b2: see `scale_by_adam`.
        eps: see `scale_by_adam`.
        bias_correction: as in the paper; the authors' code for BERT goes without.
        weight_decay: $\lambda$.
        decay_mask: which leaves decay; None: all.
        adapt_mask: which leaves are scaled by the ratio; None: all. The authors leave out biases and norms' scales.
        trust_clip: the least and the greatest ratio; None: any.
        stacked: which leaves `[L ...]` are L tensors, each with a ratio of its own; None: none.

    Raises:
        ValueError: a beta, `eps` or `trust_clip` out of range.
    """
    check_range("scale_by_lamb", 0.0, 1.0, b1=b1, b2=b2)
    check_range("scale_by_lamb", TINY, float("inf"), eps=eps)
    check_range("scale_by_lamb", 0.0, float("inf"), weight_decay=weight_decay)
    if trust_clip is not None and not 0 <= trust_clip[0] <= trust_clip[1]:
        raise ValueError(f"scale_by_lamb: trust_clip is {trust_clip}; use (low, high) with 0 <= low <= high")

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        params = need(params, "scale_by_lamb")
        d1, d2 = at(b1, state.count), at(b2, state.count)
        count = next_count(state.count)
        scale1, scale2 = (debias(d1, count), debias(d2, count)) if bias_correction else (1, 1)

        def leaf(
            grad: jax.Array, mu: jax.Array, nu: jax.Array, param: jax.Array, decays: bool, adapts: bool, split: bool
        ) -> tuple[jax.Array, ...]:
            def direction(mu: jax.Array, nu: jax.Array, param: jax.Array) -> jax.Array:
                adam = (scale1 * mu / (jnp.sqrt(scale2 * nu) + eps)).astype(mu.dtype)
                return adam + weight_decay * param.astype(adam.dtype) if decays else adam

            def adapted(mu: jax.Array, nu: jax.Array, param: jax.Array) -> jax.Array:
                # The barriers have the direction computed twice, from what is in memory anyway, rather than kept.
                mu, nu = jax.lax.optimization_barrier((mu, nu))
                ratio = _trust_ratio(param, direction(mu, nu, param), trust_clip)
                mu, nu, param, ratio = jax.lax.optimization_barrier((mu, nu, param, ratio))
                return ratio * direction(mu, nu, param)

            mu, nu = moments(grad, mu, nu, d1, d2)
            return (layerwise(adapted, split) if adapts else direction)(mu, nu, param), mu, nu

        masks = *(flags(mask, params, default=True) for mask in (decay_mask, adapt_mask)), layers(stacked, params)
        updates, mu, nu = map_leaves(leaf, 3, updates, state.mu, state.nu, params, *masks)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return transformation(init_moments, update)


def lamb(learning_rate: Scalar, **options: Any) -> optax.GradientTransformationExtraArgs:
    """LAMB: each layer moves by the learning rate times the norm of its weights.

    Args:
        learning_rate: a number or a schedule.
        options: those of `scale_by_lamb`, weight decay among them.
    """
    return optax.chain(scale_by_lamb(**options), scale_by_learning_rate("lamb", learning_rate))


def _trust_ratio(param: jax.Array, direction: jax.Array, clip: tuple[float, float] | None) -> jax.Array:
    param_norm, direction_norm = map(jnp.sqrt, _sums_of_squares(param.astype(direction.dtype), direction))
    some = (param_norm > 0) & (direction_norm > 0)
    ratio = jnp.where(some, param_norm / jnp.where(some, direction_norm, 1), 1)
    return ratio if clip is None else jnp.clip(ratio, *clip)


@jax.custom_jvp
def _sums_of_squares(a: jax.Array, b: jax.Array) -> list[jax.Array]:
    """Both from one pass: for a sum of its own XLA:CPU would first store b, whose roots and quotients it can't fuse."""
    zero, last = jnp.zeros((), b.dtype), tuple(range(b.ndim))[-1:]
    squares, zeros = (jnp.square(a), jnp.square(b)), (zero, zero)
    return [jnp.sum(x) for x in jax.lax.reduce(squares, zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), last)]


@_sums_of_squares.defjvp
def _sums_of_squares_jvp(primals: Any, tangents: Any) -> Any:
    pairs = zip(primals, tangents, strict=True)
    return _sums_of_squares(*primals), [2 * jnp.sum(x * dx) for x, dx in pairs]
