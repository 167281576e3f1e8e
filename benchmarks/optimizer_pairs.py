"""What `optimizers.py` measures: trees of parameters, and each optimizer by jaxlm and by optax."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxlm import optim

LEARNING_RATE: Final = 1e-2
"""Large, so that steps stand out of the parameters' rounding."""
WEIGHT_DECAY: Final = 0.1
CHECKED_STEPS: Final = 3
SCALES: Final = (0.02, 0.006, 0.06)
"""Of the checked steps' gradients. They differ: of equal gradients Adam's first updates don't tell its betas."""

ULP: Final = 2.0**-23
"""Between neighbouring float32 numbers, in units of the smaller one, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """The parameters of a GPT-2: 6 leaves a layer and 3 more, none of them a bias."""

    name: str
    layers: int
    width: int
    vocab: int
    length: int

    def shapes(self, *, stacked: bool) -> dict[str, Any]:
        """float32 shapes; with `stacked` each leaf of the layers is one array `[L ...]`."""
        D = self.width
        block = {"ln1": (D,), "ln2": (D,), "qkv": (D, 3 * D), "o": (D, D), "fc": (D, 4 * D), "proj": (4 * D, D)}
        blocks: Any = [{name: _float32(*shape) for name, shape in block.items()} for _ in range(self.layers)]
        if stacked:
            blocks = {name: _float32(self.layers, *shape) for name, shape in block.items()}
        return {"wte": _float32(self.vocab, D), "wpe": _float32(self.length, D), "lnf": _float32(D), "blocks": blocks}


TREES: Final = {
    tree.name: tree
    for tree in (
        Tree(name="124M", layers=12, width=768, vocab=50304, length=1024),
        Tree(name="10M", layers=6, width=384, vocab=65, length=256),
    )
}
SMOKE: Final = Tree(name="smoke", layers=2, width=128, vocab=256, length=64)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An optimizer by one library."""

    label: str
    make: Callable[[], optax.GradientTransformation]
    tolerance: float = 0.0
    """How far its steps may be from the reference's, see `disagreement`."""


def step_of(tx: optax.GradientTransformation) -> Callable[[tuple[Any, Any], Any], tuple[Any, Any]]:
    """Update and apply, `step((params, state), grads) -> (params, state)`: what is measured."""
    tx = optax.with_extra_args_support(tx)

    def step(at: tuple[Any, Any], grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, at[1], at[0])
        return optax.apply_updates(at[0], updates), state

    return step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Contestants whose turns are next to each other: one optimizer."""

    name: str
    ours: tuple[Contestant, ...]
    reference: Contestant | None = None
    """optax's, which ours are checked against and compared with."""
    clips: bool = False
    """By the norm of the whole gradient, which so must be read twice."""
    period: int = 1
    """Steps until all kinds of step have been: a turn is a multiple of it."""
    slow: bool = False
    """Measured only if asked for."""
    undecided: Callable[[Any, Any], Any] | None = None
    """Where the reference's update, from its state and gradients, hangs on rounding: not compared."""

    @property
    def contestants(self) -> list[Contestant]:
        """All, the reference first."""
        return [*([self.reference] if self.reference else []), *self.ours]


def groups(*, stacked: bool, tensor_cores: bool) -> list[Group]:
    """All optimizers; `tensor_cores`: products of float32 are less exact than that, as they are on GPUs.

    Tolerances, in units of the way. One operation in float32 errs by 2^-24, some ten make an update: 1e-5 has room for
    ten such. optax takes 1 - b2^t from a float32 power, which may be 2^-23 off: with b2 = 0.999 that is 1.2e-4 of the
    second moment and half of that in the update, so 1e-4 for all that contain Adam. A sum of n squares errs by some
    2^-24 sqrt(n), 4e-4 for the largest leaf. The three terms of Muon's quintic, ten together, cancel to one: each of
    five iterations enlarges the rounding of its products, 2^-9 in bfloat16 and 2^-11 in what GPUs take for float32,
    ten times; its other leaves are Adam's. Momentum in bfloat16 is stored in steps of 2^-7. Moments in int8 are stored
    in steps of 3 to 10 %, some third of which is the error; Lion's sign then differs in some hundredths of the
    elements, and each is 2 steps off.
    """
    layers = optim.by_name({"blocks/.*": True, ".*": False}) if stacked else None
    matrices = optim.by_name({"blocks/.*(qkv|o|fc|proj)": True, ".*": False})
    decay: dict[str, Any] = {"weight_decay": WEIGHT_DECAY}
    ours: dict[str, Any] = {**decay, "stacked": layers}

    muon: dict[str, Any] = {**ours, "nesterov": False, "adamw_b2": 0.999, "adamw_eps": 1e-8}

    def by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return _by_layer(tx, layers) if layers else tx

    def axes(params: Any) -> Any:
        numbers = optax.contrib.MuonDimensionNumbers(stacked, stacked + 1)
        return jax.tree.map(lambda is_matrix: numbers if is_matrix else None, matrices(params))

    return [
        Group(
            name="adamw",
            reference=Contestant("optax", lambda: optax.adamw(LEARNING_RATE, **decay)),
            ours=(
                Contestant("jaxlm", lambda: optim.adamw(LEARNING_RATE, **decay), _ADAM),
                Contestant("jaxlm, int8", lambda: optim.adamw_int8(LEARNING_RATE, **decay), _ADAM_INT8),
            ),
        ),
        Group(
            name="clip + adamw",
            clips=True,
            reference=Contestant(
                "optax", lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, **decay))
            ),
            ours=(
                Contestant(
                    "jaxlm",
                    lambda: optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(LEARNING_RATE, **decay)),
                    _ADAM + _SUMS,
                ),
            ),
        ),
        Group(
            name="lion",
            undecided=_near_zero,
            reference=Contestant("optax", lambda: optax.lion(LEARNING_RATE, **decay)),
            ours=(
                Contestant("jaxlm", lambda: optim.lion(LEARNING_RATE, **decay), _ELEMENTWISE),
                Contestant("jaxlm, int8", lambda: optim.lion_int8(LEARNING_RATE, **decay), _LION_INT8),
            ),
        ),
        Group(
            name="adafactor",
            reference=Contestant("optax", lambda: by_layer(_optax_adafactor())),
            ours=(Contestant("jaxlm", lambda: optim.adafactor(LEARNING_RATE, **ours), _ELEMENTWISE + _SUMS),),
        ),
        Group(
            name="adafactor + momentum",
            reference=Contestant("optax", lambda: by_layer(_optax_adafactor(momentum=0.9))),
            ours=(
                Contestant("jaxlm", lambda: optim.adafactor(LEARNING_RATE, momentum=0.9, **ours), _ELEMENTWISE + _SUMS),
                Contestant(
                    "jaxlm, bfloat16", lambda: optim.adafactor_bf16(LEARNING_RATE, momentum=0.9, **ours), _MOMENTUM_BF16
                ),
            ),
        ),
        Group(
            name="lamb",
            reference=Contestant("optax", lambda: by_layer(optax.lamb(LEARNING_RATE, **decay))),
            ours=(Contestant("jaxlm", lambda: optim.lamb(LEARNING_RATE, **ours), _ADAM + _SUMS),),
        ),
        Group(
            name="muon",
            slow=True,
            # Without Nesterov's step, before which optax corrects the biases of momentum and gradient, each its own:
            # the first directions then differ.
            reference=Contestant(
                "optax",
                lambda: optax.contrib.muon(
                    LEARNING_RATE,
                    **decay,
                    nesterov=False,
                    adam_weight_decay=WEIGHT_DECAY,
                    muon_weight_dimension_numbers=axes,
                    consistent_rms=0.2,
                ),
            ),
            ours=(
                Contestant("jaxlm", lambda: optim.muon(LEARNING_RATE, matrices, **muon), _MUON_BF16),
                Contestant(
                    "jaxlm, float32",
                    lambda: optim.muon(
                        LEARNING_RATE, matrices, orthogonalize=optim.newton_schulz(dtype=jnp.float32), **muon
                    ),
                    _ADAM + (_MUON_TENSOR_CORES if tensor_cores else _MUON),
                ),
            ),
        ),
        Group(
            name="soap",
            slow=True,
            period=10,
            ours=(Contestant("jaxlm", lambda: optim.soap(LEARNING_RATE, **ours)),),
        ),
    ]


_ELEMENTWISE: Final = 1e-5
_ADAM: Final = 1e-4
_SUMS: Final = 4e-4
_MUON: Final = 5 * 10 * 2.0**-24
_MUON_TENSOR_CORES: Final = 5 * 10 * 2.0**-11
_MUON_BF16: Final = 5 * 10 * 2.0**-9
_MOMENTUM_BF16: Final = 2.0**-7
_ADAM_INT8: Final = 0.05
_LION_INT8: Final = 0.3


def disagreement(found: Any, expected: Any, start: Any, undecided: Any) -> jax.Array:
    """How far apart two optimizers' parameters are after the checked steps, in units of how far they have come.

    The root mean square of the difference in the worst row of a leaf, over that of the leaf's movement; the largest of
    all leaves. Off goes what rounding to float32 alone does to parameters: half a unit in the last place at each step,
    for each of both.

    Args:
        found: parameters after the steps.
        expected: the reference's.
        start: those before.
        undecided: bools; where True, the difference doesn't count.
    """

    def rms(x: jax.Array, axis: int | None = None) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(x), axis))

    def leaf(found: jax.Array, expected: jax.Array, start: jax.Array, undecided: jax.Array) -> jax.Array:
        rounding = CHECKED_STEPS * ULP * jnp.maximum(rms(start), rms(expected))
        apart = jnp.max(rms(jnp.where(undecided, 0, found - expected), axis=-1))
        return jnp.maximum(apart - rounding, 0) / rms(expected - start)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(leaf, found, expected, start, undecided))))


def normal(shapes: Any, seed: int, scale: float) -> Any:
    """A tree of random numbers."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([scale * _normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def size_in_bytes(tree: Any) -> int:
    """Of all leaves, also of a tree of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def least_bytes(params: Any, state_bytes: int, *, clips: bool) -> int:
    """What a step must move: gradients are read, parameters and state read and written, each once.

    A norm of the whole gradient must be known before its first element is used, and no cache holds the gradient till
    then: with clipping it is read twice. The sums that LAMB and Adafactor take are over one tensor, which a cache might
    hold, so that they are not counted.
    """
    return (3 + clips) * size_in_bytes(params) + 2 * state_bytes


def select(names: Sequence[str] | None, everything: list[Group], *, slow: bool) -> list[Group]:
    """The groups of these names, or all, the slow ones if asked for."""
    if unknown := set(names or ()) - {group.name for group in everything}:
        raise ValueError(f"no {sorted(unknown)}; use some of {[group.name for group in everything]}")
    return [group for group in everything if (group.name in names if names else slow or not group.slow)]


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


_normal = jax.jit(jax.random.normal, static_argnums=1)


def _optax_adafactor(momentum: float | None = None) -> optax.GradientTransformation:
    # optax's decay is not multiplied by the learning rate
    return optax.adafactor(LEARNING_RATE, momentum=momentum, weight_decay_rate=LEARNING_RATE * WEIGHT_DECAY)


def _by_layer(tx: optax.GradientTransformation, layers: Callable[[Any], Any]) -> optax.GradientTransformation:
    """For stacked leaves, each layer by itself: optax would take all layers of a leaf for one tensor."""
    each = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    return optax.partition({True: each, False: tx}, layers)


def _near_zero(state: Any, grads: Any) -> Any:
    """Where what Lion takes the sign of is within some rounding errors of zero: some 4 in a million."""

    def leaf(mu: jax.Array, grad: jax.Array) -> jax.Array:
        terms = 0.9 * mu, 0.1 * grad
        return jnp.abs(sum(terms)) <= 8 * ULP * jnp.maximum(*(jnp.max(jnp.abs(term)) for term in terms))

    return jax.tree.map(leaf, state[0].mu, grads)
