"""The five types that jaxlm is made of; two of them are optax's and grain's own.

| value                    | signature                                            |
|--------------------------|------------------------------------------------------|
| `LossFn`                 | `(params, batch, key) -> (loss_sum, Aux)`            |
| `GradFn`                 | `(params, batch, key) -> ((loss_sum, Aux), grads)`   |
| `GradientTransformation` | optax's                                              |
| `Step`                   | `(state, batch) -> (state, metrics)`                 |
| `Iterator[Batch]`        | grain's: `__next__`, `get_state`, `set_state`        |

Loss functions and gradient functions return *sums* over the batch, with the weight that they are sums over. Sums may
be added, over microbatches and over devices, and stay exact; means may not, as soon as two parts hold different
numbers of real tokens. The step divides by the total weight, once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax

Params = Any
"""A pytree of arrays."""

Batch = Mapping[str, Any]
"""Arrays by name, on host or device: `tokens [B T]`, of any integer type, and at most one of these, which say which
tokens are real (default: all): `lengths [B]`, one document a row, the padding at its end; `segments [B T]`, the number
of each token's document within its row, counted from 1, with 0 for padding. Further, where there is need:
`inputs [B T]`, what the model sees in place of the tokens that it predicts; `window`, a `Static` int, how far attention
looks."""

Metrics = dict[str, jax.Array]
"""Scalars by name."""


class Aux(NamedTuple):
    """What a loss function returns beside the sum of its losses."""

    weight_sum: jax.Array
    """float32 scalar: the weight that all the sums are over; the number of predicted tokens, if each has weight 1."""
    metrics: Metrics
    """Further sums over the same weight, float32 scalars: they are divided with the loss."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A value that a program is compiled for rather than given: part of a batch's shape, so to speak."""

    value: Any

    def __str__(self) -> str:
        return str(self.value)


@runtime_checkable
class LossFn(Protocol):
    """Sums a loss over the batch. Differentiable in `params`."""

    def __call__(self, params: Params, batch: Batch, key: jax.Array, /) -> tuple[jax.Array, Aux]: ...


@runtime_checkable
class GradFn(Protocol):
    """What `jax.value_and_grad(loss_fn, has_aux=True)` is: the sums of a `LossFn` and the gradient of its loss sum.

    Those that compute in float16 take the scale of the loss as a fourth argument: see `precision.scale_loss`.
    """

    def __call__(self, params: Params, batch: Batch, key: jax.Array, /) -> tuple[tuple[jax.Array, Aux], Params]: ...


class TrainState(NamedTuple):
    """All that a run's next step depends on, beside its batch."""

    step: jax.Array
    """int32 scalar: the number of steps taken."""
    params: Params
    opt_state: optax.OptState


@runtime_checkable
class Step(Protocol):
    """Takes one training step. The metrics are means over the batch's real tokens."""

    def __call__(self, state: TrainState, batch: Batch, /) -> tuple[TrainState, Metrics]: ...
