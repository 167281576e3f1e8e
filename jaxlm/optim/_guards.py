"""What stands around an optimizer: clipping, skipping, the scale of the loss, averaging."""

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxlm import tree
from jaxlm.numbers import check_whole, known
from jaxlm.optim._leaves import at, check_range, need, next_count, transformation

T = TypeVar("T")


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a global norm of `max_norm`, taken in float32; shorter ones keep every bit.

    Updates whose norm overflows float32, beyond 1e19, become 0; infinite ones NaN: see `skip_nonfinite`.

    The norm is `tree.norm`, as the step's metric `grad_norm` is: in one program it is computed once for both.

    Args:
        max_norm: above 0.

    Raises:
        ValueError: `max_norm` isn't above 0.
    """
    if (number := known(max_norm)) is not None and not number > 0:
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
    """Leaves parameters and all state as they are, bit for bit, where a gradient has an infinite or undefined norm, or
    the loss is infinite or undefined, if the update is told its `value`, as `train.make_step` does.

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
        fine = jnp.isfinite(tree.norm(updates)) & _has_finite_loss(extra)
        updates, inner = _update_if(fine, tx, updates, state.inner, params, extra)
        return updates, SkipState(inner, state.skipped + (~fine).astype(jnp.int32))

    return transformation(init, update)


def _has_finite_loss(extra: Mapping[str, Any]) -> jax.Array:
    """Whether the loss is finite, which it may not be where its gradient is; so it is if it isn't told."""
    return jnp.isfinite(extra.get("value", 0.0))


def _update_if(fine: jax.Array, tx: Any, updates: Any, state: Any, params: Any, extra: Any) -> tuple[Any, Any]:
    """The update and the state of `tx`; -0 and as it was, if not `fine`."""
    updates, new = tx.update(updates, state, params, **extra)
    updates = jax.tree.map(lambda u: jnp.where(fine, u, jnp.array(-0.0, u.dtype)), updates)
    return updates, jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, state)


class LossScaleState(NamedTuple):
    """The state of `dynamic_loss_scale`."""

    inner: Any
    loss_scale: jax.Array
    """float32: what the next loss is to be multiplied by; 0 once the run can't go on."""
    clean: jax.Array
    """int32: updates taken since the scale changed."""
    stuck: jax.Array
    """int32: overflows in a row at the smallest scale."""
    skipped: jax.Array
    """int32: how many updates were skipped."""


LARGEST_SCALE: Final = 2.0**24
"""Beyond it is nothing to gain: float16's smallest number times it is 1."""


def dynamic_loss_scale(
    tx: optax.GradientTransformation,
    *,
    initial: float | int = 2.0**16,
    smallest: float | int = 2.0**-10,
    growth_interval: int = 2000,
    patience: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """Finds the greatest scale at which gradients don't overflow float16: doubled after some steps, halved at overflow.

    As in https://arxiv.org/abs/1710.03740, section 3.2. It doesn't scale: `precision.scale_loss` does, to which
    `train.make_step` passes the scale on, and undoes it, so that all here are true gradients. Where their global norm
    or the loss is infinite or undefined, parameters and all other state are left as they are, as by `skip_nonfinite`.
    The loss alone doesn't change the scale, by which it isn't multiplied.

    A run that overflows at the smallest scale again and again has another problem than range: its scale becomes 0, no
    update is taken any more, and `train.fit` ends it with an error.

    Scales are smaller than where losses are means: a gradient in float16 is that of the sum over a microbatch.

    Args:
        tx: any transformation; this is meant to be outermost, around a whole chain.
        initial: the first scale, a power of two.
        smallest: the least scale, a power of two.
        growth_interval: updates in a row after which the scale doubles, up to 2**24.
        patience: how many overflows in a row at the smallest scale end the run.

    Raises:
        ValueError: scales that aren't powers of two or out of order, an interval or patience below 1.
    """
    for name, value in {"initial": initial, "smallest": smallest}.items():
        if not 0 < value <= LARGEST_SCALE or math.frexp(value)[0] != 0.5:
            raise ValueError(f"dynamic_loss_scale: {name} is {value}; use a power of two, at most 2**24")
    if initial < smallest:
        raise ValueError(f"dynamic_loss_scale: initial is {initial}, below the smallest, {smallest}; use at least that")
    check_whole("dynamic_loss_scale", growth_interval=growth_interval, patience=patience)
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> LossScaleState:
        zero = jnp.zeros((), jnp.int32)
        return LossScaleState(tx.init(params), jnp.full((), initial, jnp.float32), zero, zero, zero)

    def update(updates: Any, state: LossScaleState, params: Any = None, **extra: Any) -> tuple[Any, LossScaleState]:
        scale, fits = state.loss_scale, jnp.isfinite(tree.norm(updates))
        fine = fits & _has_finite_loss(extra) & (scale > 0)
        updates, inner = _update_if(fine, tx, updates, state.inner, params, extra)
        clean = jnp.where(fits, state.clean + fine, 0)
        stuck = jnp.where(~fits & (scale <= smallest), state.stuck + 1, 0)
        grows = clean >= growth_interval
        raised = jnp.where(grows, jnp.minimum(2 * scale, LARGEST_SCALE), scale)
        new_scale = jnp.where(fits, raised, jnp.maximum(scale / 2, smallest))
        scale = jnp.where((scale > 0) & (stuck < patience), new_scale, 0)
        skipped = state.skipped + (~fine).astype(jnp.int32)
        return updates, LossScaleState(inner, scale, jnp.where(grows, 0, clean), stuck, skipped)

    return transformation(init, update)


def loss_scaling(opt_state: Any) -> LossScaleState | None:
    """The state of the `dynamic_loss_scale` in an optimizer's state, however deep; None if there is none.

    Raises:
        ValueError: there is more than one.
    """
    found = _states_of(LossScaleState, opt_state)
    if len(found) > 1:
        raise ValueError(f"loss_scaling: the optimizer has {len(found)} dynamic_loss_scale; use one, around all others")
    return found[0] if found else None


def skipped(opt_state: Any) -> jax.Array | None:
    """How many steps `skip_nonfinite` or `dynamic_loss_scale` has left out, int32; None if there is neither."""
    counts = [x.skipped for kind in (SkipState, LossScaleState) for x in _states_of(kind, opt_state)]
    return sum(counts[1:], counts[0]) if counts else None


def _states_of(kind: type[T], opt_state: Any) -> list[T]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]


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
    found = _states_of(WeightEmaState, opt_state)
    if len(found) != 1:
        raise ValueError(f"averaged_weights: the optimizer has {len(found)} weight_ema; it must have one, as its last")
    return jax.tree.map(lambda w, p: w.astype(p.dtype), found[0].weights, params)
