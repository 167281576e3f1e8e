"""Adam, with float32 moments whatever the parameters' dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.optim._decay import add_decayed_weights
from jaxlm.optim._leaves import (
    TINY,
    Mask,
    Scalar,
    at,
    average,
    bounded,
    check_range,
    debias,
    map_leaves,
    next_count,
    scale_by_learning_rate,
    transformation,
    wide_zeros,
)


def init_moments(params: Any) -> optax.ScaleByAdamState:
    """The state before the first update."""
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), wide_zeros(params), wide_zeros(params))


def moments(grad: jax.Array, mu: jax.Array, nu: jax.Array, b1: Any, b2: Any) -> tuple[jax.Array, jax.Array]:
    """The averages of a leaf's gradient and of its square, one step on."""
    grad = bounded(grad, mu.dtype)
    return average(mu, grad, b1), average(nu, jnp.square(grad), b2)


def scale_by_adam(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    r"""Adam (https://arxiv.org/abs/1412.6980, algorithm 1).

    $$m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
    u = \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}$$

    It differs from optax's in that both moments are float32 or wider, also of bfloat16 parameters (in bfloat16 the
    second stops growing), that gradients beyond 1e15 don't leave it infinite, and that betas may be schedules; the
    correction of the bias then takes the present value for all past ones.

    Args:
        b1: decay of the gradients' average, at least 0 and below 1; a schedule gets the number of updates so far.
        b2: decay of their squares' average, likewise.
        eps: added to the root, above 0: where a gradient has always been 0 the quotient is 0 / eps.

    Returns:
        A transformation with optax's own state for Adam; updates are float32 or wider.

    Raises:
        ValueError: a beta or `eps` out of range.
    """
    check_range("scale_by_adam", 0.0, 1.0, b1=b1, b2=b2)
    check_range("scale_by_adam", TINY, float("inf"), eps=eps)

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params, extra
        d1, d2 = at(b1, state.count), at(b2, state.count)
        count = next_count(state.count)
        scale1, scale2 = debias(d1, count), debias(d2, count)

        def leaf(grad: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, ...]:
            mu, nu = moments(grad, mu, nu, d1, d2)
            return (scale1 * mu / (jnp.sqrt(scale2 * nu) + eps)).astype(mu.dtype), mu, nu

        updates, mu, nu = map_leaves(leaf, 3, updates, state.mu, state.nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return transformation(init_moments, update)


def adamw(
    learning_rate: Scalar,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101, algorithm 2).

    Args:
        learning_rate: a number or a schedule; it multiplies the decay too.
        b1: see `scale_by_adam`.
        b2: see `scale_by_adam`; language models are trained with 0.95 to 0.98.
        eps: see `scale_by_adam`.
        weight_decay: 0.1 is usual.
        decay_mask: which leaves decay; None: all.
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps),
        add_decayed_weights(weight_decay, decay_mask),
        scale_by_learning_rate("adamw", learning_rate),
    )
