"""SOAP: Adam in the eigenbasis of Shampoo."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.numbers import check_whole
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
    layers,
    layerwise,
    map_leaves,
    next_count,
    scale_by_learning_rate,
    transformation,
    wide_zeros,
)

Sides = tuple[jax.Array | None, ...]
"""A square matrix for each axis of a tensor; None for an axis that is left as it is."""


class SoapState(NamedTuple):
    """What SOAP keeps of past gradients, float32 or wider."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    """The momentum, in the parameter's own basis."""
    nu: Any
    """The second moment, in the eigenbasis."""
    gram: Any
    """In the place of each parameter, for each axis the average of the gradient times itself over the others."""
    basis: Any
    """The eigenvectors of these, or nearly, as columns, those of the largest eigenvalues first."""


def scale_by_soap(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    *,
    shampoo_b2: Scalar = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    largest: int = 10_000,
    stacked: Mask = None,
    basis_sharding: jax.sharding.Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP (https://arxiv.org/abs/2409.11321, algorithm 3), for tensors of any rank.

    $$L = \beta L + (1-\beta) G G^T, \quad R = \beta R + (1-\beta) G^T G, \quad
    u = Q_L \, \operatorname{Adam}(Q_L^T G Q_R) \, Q_R^T$$

    with $Q_L, Q_R$ the eigenvectors of L and R. As in the authors' code the first update is zero, for it would be
    measured by its own gradient; L and R take each gradient after it has been used; and the eigenvectors follow by one
    step of QR iteration every so many updates. Vectors get plain Adam, from the second update.

    Args:
        b1: decay of the momentum, at least 0 and below 1; a schedule gets the number of updates so far.
        b2: decay of the second moment, likewise.
        shampoo_b2: $\beta$, likewise.
        eps: added to the root, before the correction of its bias.
        every: updates between two steps of QR iteration.
        largest: axes longer than that, such as a vocabulary, keep their own basis.
        stacked: which leaves `[L ...]` are L tensors, each with bases of its own; None: none.
        basis_sharding: how each basis lies on devices; needed where parameters are sharded. Whole on every device
            (`sharding.replicated`) the QR iteration, which not every update runs, exchanges nothing.

    Returns:
        A transformation whose state takes 2 floats a parameter, and for each axis of length n twice n*n.

    Raises:
        ValueError: an argument out of range.
    """
    check_range("scale_by_soap", 0.0, 1.0, b1=b1, b2=b2, shampoo_b2=shampoo_b2)
    check_range("scale_by_soap", TINY, float("inf"), eps=eps)
    check_whole("scale_by_soap", every=every)

    def init(params: Any) -> SoapState:
        def sides(param: Any, split: bool) -> tuple[Sides, Sides]:
            stack, shape = param.shape[:split], param.shape[split:]
            dtype = jnp.promote_types(param.dtype, jnp.float32)
            eyes = [jnp.eye(n, dtype=dtype) if len(shape) > 1 and n <= largest else None for n in shape]
            basis = tuple(None if eye is None else jnp.broadcast_to(eye, (*stack, *eye.shape)) for eye in eyes)
            return tuple(None if q is None else jnp.zeros_like(q) for q in basis), basis

        gram, basis = map_leaves(sides, 2, params, layers(stacked, params))
        return SoapState(jnp.zeros((), jnp.int32), wide_zeros(params), wide_zeros(params), gram, basis)

    def update(updates: Any, state: SoapState, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        d1, d2, d3 = (at(value, state.count) for value in (b1, b2, shampoo_b2))
        first = state.count == 0
        age = jnp.maximum(state.count, 1)  # of the moments, once this gradient is in them; the first never is
        correction = debias(d1, age) / jnp.sqrt(debias(d2, age))
        turn = jnp.where(first, 2, (state.count % every == 0).astype(jnp.int32))

        def whole(sides: Sides) -> Sides:
            if basis_sharding is None:
                return sides
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, basis_sharding), sides)

        def tensor(
            grad: jax.Array, mu: jax.Array, nu: jax.Array, gram: Sides, basis: Sides
        ) -> tuple[jax.Array, jax.Array, jax.Array, Sides]:
            grad = bounded(grad, mu.dtype)
            new_mu = average(mu, grad, d1)
            new_nu = average(nu, jnp.square(_rotate(grad, basis)), d2)
            adam = correction * _rotate(new_mu, basis) / (jnp.sqrt(new_nu) + eps)
            direction = jnp.where(first, 0, _rotate(adam.astype(mu.dtype), basis, back=True))
            gram = tuple(None if a is None else average(a, _gram(grad, axis), d3) for axis, a in enumerate(gram))
            return direction, jnp.where(first, mu, new_mu), jnp.where(first, nu, new_nu), gram

        def leaf(
            grad: jax.Array, mu: jax.Array, nu: jax.Array, gram: Sides, basis: Sides, split: bool
        ) -> tuple[jax.Array, jax.Array, jax.Array, Sides, Sides]:
            direction, mu, nu, gram = layerwise(tensor, split)(grad, mu, nu, gram, basis)
            if all(q is None for q in basis):
                return direction, mu, nu, gram, basis
            gram = whole(gram)
            turns = [layerwise(_keep, split), _one_by_one(_iterate, split), _one_by_one(_decompose, split)]
            orders, basis = jax.lax.switch(turn, turns, gram, basis)
            return direction, mu, layerwise(_reorder, split)(nu, orders), gram, whole(basis)

        split = layers(stacked, updates if params is None else params)
        updates, *rest = map_leaves(leaf, 5, updates, state.mu, state.nu, state.gram, state.basis, split)
        return updates, SoapState(next_count(state.count), *rest)

    return transformation(init, update)


def soap(
    learning_rate: Scalar, *, weight_decay: float = 0.0, decay_mask: Mask = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """SOAP with decoupled weight decay.

    Args:
        learning_rate: a number or a schedule, of the size that AdamW gets.
        weight_decay: multiplied by the learning rate.
        decay_mask: which leaves decay; None: all.
        options: those of `scale_by_soap`.
    """
    return optax.chain(
        scale_by_soap(**options),
        add_decayed_weights(weight_decay, decay_mask),
        scale_by_learning_rate("soap", learning_rate),
    )


def _product(a: jax.Array, b: jax.Array, axes: Any) -> jax.Array:
    """In full precision, which GPUs and TPUs don't take by themselves."""
    return jnp.tensordot(a, b, axes, precision=jax.lax.Precision.HIGHEST)


def _rotate(x: jax.Array, basis: Sides, *, back: bool = False) -> jax.Array:
    """Into the basis, axis by axis, or back."""
    for q in basis:  # each product moves the first axis to the end, so that all have their turn and their place again
        x = jnp.moveaxis(x, 0, -1) if q is None else _product(x, q, (0, 1 if back else 0))
    return x


def _gram(x: jax.Array, axis: int) -> jax.Array:
    others = [i for i in range(x.ndim) if i != axis]
    return _product(x, x, (others, others))


def _reorder(nu: jax.Array, orders: Sides) -> jax.Array:
    for axis, order in enumerate(orders):
        nu = nu if order is None else jnp.take(nu, order, axis)
    return nu


def _one_by_one(function: Callable[..., Any], split: bool) -> Callable[..., Any]:
    """Layer after layer: XLA:CPU's decompositions of many matrices at once may wait for each other for ever."""
    return (lambda *sides: jax.lax.map(lambda one: function(*one), sides)) if split else function


def _keep(gram: Sides, basis: Sides) -> tuple[Sides, Sides]:
    """The basis, and its order as seen from the one before."""
    return tuple(None if a is None else jnp.arange(len(a)) for a in gram), basis


def _iterate(gram: Sides, basis: Sides) -> tuple[Sides, Sides]:
    """One step of QR iteration, after ordering by the present estimates of the eigenvalues."""
    orders: list[jax.Array | None] = []
    new: list[jax.Array | None] = []
    for a, q in zip(gram, basis, strict=True):
        if a is None or q is None:
            orders.append(None)
            new.append(None)
            continue
        aq = _product(a, q, 1)
        order = jnp.argsort(jnp.sum(q * aq, 0), descending=True)
        orders.append(order)
        new.append(jnp.linalg.qr(jnp.take(aq, order, 1))[0])
    return tuple(orders), tuple(new)


def _decompose(gram: Sides, basis: Sides) -> tuple[Sides, Sides]:
    orders, _ = _keep(gram, basis)
    return orders, tuple(None if a is None else jnp.linalg.eigh(a)[1][:, ::-1] for a in gram)
