"""What is held to the contract, and how a run of it is taken."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Final, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxlm import data, models, sharding, train, tree
from jaxlm.types import Aux, Batch, GradFn, LossFn, Metrics, Params, Step, TrainState

Leaves = dict[str, np.ndarray]
"""Arrays in float64 by the names that `tree.named_leaves` gives."""
Options = Mapping[str, Mapping[str, Any]]
GRADIENT: Final = "gradient/"

MODEL_OPTIONS: Final[Options] = {
    "layers unrolled": {"unroll": True},
    "layers computed again": {"wrap_layer": models.remat("full")},
    "dense attention": {"implementation": models.attention.dense},
    "blockwise attention": {"implementation": functools.partial(models.attention.blockwise, block=16)},
}
LOSS_OPTIONS: Final[Options] = {"cross-entropy in chunks of 97": {"chunk": 97}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """An experiment, in a size that a few seconds are enough for. It must draw nothing at random after its start.

    Raises:
        ValueError: fewer than two batches: the run is interrupted between them.
    """

    model: Callable[..., tuple[Callable[..., Params], Callable[..., Any]]]
    """`model(**options) -> (init, apply)`, which without options is what the others are compared with."""
    loss: Callable[..., LossFn]
    """`loss(apply, **options) -> LossFn`, such as `losses.next_token`."""
    optimizer: optax.GradientTransformation | Callable[[sharding.Layout | None], optax.GradientTransformation]
    """Any chain; one that must know how parameters lie, as Muon does, is made of that: None on one device."""
    batches: data.Batches
    """A step for each. Rows must be divisible over devices and microbatches, and of each batch the first eighth of them
    is emptied, so that these hold unequal numbers of tokens, or none."""
    key: jax.Array
    """Parameters are drawn with it."""
    mesh: Mesh = dataclasses.field(default_factory=sharding.mesh)
    microbatches: int = 4
    rules: Mapping[str, PartitionSpec] | None = None
    """For `sharding.lay_out`, on a mesh with an axis `model`."""
    stacked: Callable[[Params], Any] | None = models.stacked
    """For `sharding.lay_out`; None: no layers are stacked, and stage 3 of ZeRO isn't asked for."""
    layers: str = "blocks"
    """For `grads.gather_layers`, the name of the subtree of stacked layers."""
    model_options: Options = dataclasses.field(default_factory=lambda: MODEL_OPTIONS)
    """By a name for each, options of `model` that must change nothing."""
    loss_options: Options = dataclasses.field(default_factory=lambda: LOSS_OPTIONS)
    """By a name for each, options of `loss` that must change nothing."""

    def __post_init__(self):
        if len(self.batches) < 2:
            raise ValueError(f"Contract: {len(self.batches)} batches; use 2 or more, such as 4")

    @functools.cached_property
    def given(self) -> list[Batch]:
        """The batches, the first eighth of their rows emptied."""
        return [emptied(batch) for batch in self.batches]

    @property
    def positions(self) -> int:
        """Of the largest batch: as many terms has the sum that a parameter's gradient is."""
        return max(batch["tokens"].size for batch in self.given)

    def documents(self, index: int) -> list[np.ndarray]:
        """Those of batch `index`, as the corpora have them."""
        rows = self.batches.plan.batch(self.batches.planned(index))
        corpora = self.batches.corpora
        tokens = [corpus.tokens for corpus in (corpora.values() if isinstance(corpora, Mapping) else [corpora])]
        pieces = rows.pieces[rows.row >= rows.num_rows // 8]
        return [tokens[p["source"]][p["start"] : p["start"] + p["length"]] for p in pieces]

    def loss_fn(self, model_options: Mapping[str, Any] | None = None, **loss_options: Any) -> LossFn:
        """The loss of the model with some options."""
        return self.loss(self.model(**(model_options or {}))[1], **loss_options)

    @functools.cached_property
    def params(self) -> Params:
        """Those that every run begins with."""
        return jax.jit(self.model()[0])(self.key)

    def chain(self, layout: sharding.Layout | None = None) -> optax.GradientTransformation:
        """The optimizer, for parameters that lie so."""
        made = self.optimizer
        return made if isinstance(made, optax.GradientTransformation) else made(layout)

    @functools.cached_property
    def plain_step(self) -> Step:
        """The step that all others are compared with: one device, whole batches, no options."""
        return self.step(gradient_of(self.loss_fn()), self.chain())

    def start(self, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """A state on the first device of the mesh."""
        return jax.device_put(train.start(params, optimizer), self.mesh.devices.flat[0])

    def step(self, grad_fn: GradFn, optimizer: optax.GradientTransformation) -> Step:
        """A step whose metrics hold the mean's gradient too."""
        return train.make_step(_with_gradient(grad_fn), optimizer, self.key)


class Run(NamedTuple):
    """What two runs are compared by, all of it in float64 on the host."""

    losses: list[float]
    """Of each step, the mean over its tokens."""
    gradient: Leaves
    """That of the first step."""
    moved: Leaves
    """The parameters after the last step, less those before the first."""
    state: Leaves
    """All of the state after the last step."""


def follow(state: TrainState, taken: Iterable[tuple[TrainState, Metrics]]) -> Run:
    """Looks at steps as they are taken.

    Args:
        state: before the first of them.
        taken: what `train.fit` returns, its metrics those of `Contract.step`.
    """
    first, losses, gradient = _leaves(state.params), list[float](), Leaves()
    for state, metrics in taken:  # noqa: B007
        if not losses:
            found = {name: x for name, x in metrics.items() if name.startswith(GRADIENT)}
            gradient = {name.removeprefix(GRADIENT): x for name, x in _leaves(found).items()}
        losses.append(float(metrics["loss"]))
    last = _leaves(state.params)
    return Run(losses, gradient, {name: last[name] - first[name] for name in first}, _leaves(state))


def _with_gradient(grad_fn: GradFn) -> GradFn:
    @wraps(grad_fn)
    def with_gradient(params: Params, batch: Batch, key: jax.Array, *loss_scale: jax.Array) -> Any:
        (loss_sum, aux), gradient = grad_fn(params, batch, key, *loss_scale)
        named = {GRADIENT + name: leaf for name, leaf in tree.named_leaves(gradient).items()}
        return (loss_sum, Aux(aux.weight_sum, {**aux.metrics, **named})), gradient

    return with_gradient


def _leaves(arrays: Any) -> Leaves:
    host: Any = sharding.to_host(arrays)
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.named_leaves(host).items()}


def emptied(batch: Batch) -> Batch:
    """A batch whose first eighth of rows holds nothing."""
    masks = "segments" if "segments" in batch else "lengths"
    mask = batch[masks].copy()
    mask[: len(mask) // 8] = 0
    return {**batch, masks: mask}


def gradient_of(loss_fn: LossFn) -> GradFn:
    """The gradient function of a loss."""
    return jax.value_and_grad(loss_fn, has_aux=True)
