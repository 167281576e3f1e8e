"""What stands around an optimizer: clipping, skipping, averaging."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm import tree
from jaxlm.optim._leaves import at, check_range, need, next_count, transformation


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a global norm of `max_norm`, taken in float32; shorter ones keep every bit.

    Updates whose norm overflows float32, beyond 1e19, become 0; infinite ones NaN: see `skip_nonfinite`.

    The norm is `tree.norm`, as the step's metric `grad_norm` is: in one program it is computed once for both.

    Args:
        max_norm: above 0.

    Raises:
        ValueError: `max_norm` isn't above 0.
    """
    if isinstance(max_norm, float | int) and not max_norm > 0:
        raise ValueError(f"clip_by_global_norm: max_norm is {max_norm}; use a number above 0")

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params, extra
        norm = tree.norm(updates)
        scale = jnp.where(norm > max_norm, max_norm / norm, 1)
        return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates), state

    return transformation(lambda _: optax.EmptyState(), update)


class SkipState(NamedTuple):
    """The state of `skip_nonfinite`."""

    inner: Any
    skipped: jax.Array
    """int32: how many updates were skipped."""


def skip_nonfinite(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters and all state as they are, bit for bit, where a gradient has an infinite or undefined norm.

    So the schedule doesn't advance either. The test is the global norm in float32: gradients beyond 1e19 fail it too.
    It is meant to be outermost, around a whole chain: what comes after it must not change updates of -0.

    Args:
        tx: any transformation.

    Returns:
        A transformation whose updates are -0 where it skips, since x + -0 is x for every x, -0 included.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> SkipState:
        return SkipState(tx.init(params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: SkipState, params: Any = None, **extra: Any) -> tuple[Any, SkipState]:
        fine = jnp.isfinite(tree.norm(updates))
        updates, inner = tx.update(updates, state.inner, params, **extra)
        updates = jax.tree.map(lambda u: jnp.where(fine, u, jnp.array(-0.0, u.dtype)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(fine, new, old), inner, state.inner)
        return updates, SkipState(inner, state.skipped + (~fine).astype(jnp.int32))

    return transformation(init, update)


class WeightEmaState(NamedTuple):
    """The state of `weight_ema`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    weights: Any
    """The average of the parameters, float32 or wider."""


def weight_ema(decay: Any) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters, to evaluate with; updates pass unchanged.

    It must be the last of a chain, since it averages the parameters that its updates lead to. It begins with the
    parameters as they are at first, and early on forgets them faster: the decay after t updates is at most
    (1 + t) / (10 + t), as in TensorFlow's `ExponentialMovingAverage`.

    Args:
        decay: at least 0 and below 1, or a schedule: 0.999 averages about the last thousand updates.

    Raises:
        ValueError: the decay is out of range.
    """
    check_range("weight_ema", 0.0, 1.0, decay=decay)

    def init(params: Any) -> WeightEmaState:
        weights = jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), params)
        return WeightEmaState(jnp.zeros((), jnp.int32), weights)

    def update(updates: Any, state: WeightEmaState, params: Any = None, **extra: Any) -> tuple[Any, WeightEmaState]:
        del extra
        moved = optax.apply_updates(need(params, "weight_ema"), updates)
        count = next_count(state.count)
        age = count.astype(jnp.result_type(float))
        share = 1 - jnp.minimum(at(decay, state.count), (1 + age) / (10 + age))
        weights = jax.tree.map(lambda w, p: (w + share * (p.astype(w.dtype) - w)).astype(w.dtype), state.weights, moved)
        return updates, WeightEmaState(count, weights)

    return transformation(init, update)


def averaged_weights(opt_state: Any, params: Any) -> Any:
    """The averages that `weight_ema` has kept, in the parameters' dtypes.

    Args:
        opt_state: the state of an optimizer with one `weight_ema` in it, however deep.
        params: the parameters, for their dtypes.

    Raises:
        ValueError: there is none, or more than one.
    """

    def is_ema(x: Any) -> bool:
        return isinstance(x, WeightEmaState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ema) if is_ema(x)]
    if len(found) != 1:
        raise ValueError(f"averaged_weights: the optimizer has {len(found)} weight_ema; it must have one, as its last")
    return jax.tree.map(lambda w, p: w.astype(p.dtype), found[0].weights, params)
