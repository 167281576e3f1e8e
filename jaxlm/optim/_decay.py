"""Weight decay, decoupled from the gradient's statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.numbers import known
from jaxlm.optim._leaves import Mask, check_range, flags, need, transformation


def add_decayed_weights(
    weight_decay: Any, mask: Mask = None, *, cautious: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Adds `weight_decay` times the parameters to the updates, in the updates' dtype.

    Before `optax.scale_by_learning_rate`, so that parameters shrink by learning rate times weight decay
    (https://arxiv.org/abs/1711.05101). Cautious decay leaves those elements alone that the update moves away from
    zero: it adds $\lambda x \, [u x \ge 0]$ (https://arxiv.org/abs/2510.12402, algorithm 1).

    Args:
        weight_decay: a number or traced scalar, not below 0; 0 adds nothing.
        mask: which leaves decay; None: all.
        cautious: decay only where the update doesn't oppose it.

    Raises:
        ValueError: a decay below 0, infinite or undefined.
    """
    check_range("add_decayed_weights", 0.0, float("inf"), weight_decay=weight_decay)
    if known(weight_decay) == 0:
        return optax.with_extra_args_support(optax.identity())

    def decayed(update: jax.Array, param: jax.Array, decays: bool) -> jax.Array:
        if not decays:
            return update
        param = param.astype(update.dtype)
        decay = weight_decay * param
        return update + (jnp.where(update * param >= 0, decay, 0) if cautious else decay)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        params = need(params, "add_decayed_weights")
        return jax.tree.map(decayed, updates, params, flags(mask, params, default=True)), state

    return transformation(lambda _: optax.EmptyState(), update)
