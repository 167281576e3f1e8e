"""The arrays of a step that has been traced but not compiled, by what they are for."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.types import TrainState


class Arrays(NamedTuple):
    """What a step's equations tell, in bytes where nothing else is said."""

    logits: int
    """`[tokens, V]`, of as many tokens as have them at a time."""
    tokens: int
    kept: int
    """What the scan over layers stacks for the backward pass."""
    kept_float32: int
    streams: int
    """What goes from layer to layer, at all of them."""
    products: int
    """What a layer's products come to in the scan back: at the peak of a layer there is at least about as much."""
    microbatches: int
    sums: int
    """Gradients that add up over microbatches."""
    of_layers: int
    """Gradients that the scan back over layers stacks."""
    in_use: int
    """Parameters that have been brought together or rounded."""
    rounded: bool
    by_layer: bool
    """Whether parameters are brought together layer by layer."""


def find(state: TrainState, jaxpr: Any, vocab: int | None) -> Arrays:
    """Reads a step's equations; the arguments are those of `memory`."""
    leaves = jax.tree.leaves(state.params)
    whole = {x.shape for x in leaves}
    # By the last axes alone, since a model may cut the axis of its layers, to scan over groups of them.
    shapes = {_matrices(shape) for shape in whole | {shard(x) for x in leaves}}
    equations = list(_equations(jaxpr))
    scans = [e for e in equations if e.primitive.name == "scan"]
    back = [e for e in scans if _goes_back(e)]

    # Indices read from a parameter are tokens; where the loss reads its targets, it is from no parameter.
    read = [e.invars[0].aval.shape for e in equations if e.primitive.name == "gather"]
    ids = vocab or max((shape[0] for shape in read if shape in whole and len(shape) == 2), default=0)
    matrices = {tuple(sorted(shape)) for shape in whole if ids in shape}
    logits = [
        (_nbytes(e.outvars[0]), e.outvars[0].aval.size // ids)
        for e in _products(equations)
        if e.outvars[0].aval.shape[-1:] == (ids,) and any(tuple(sorted(x.aval.shape)) in matrices for x in e.invars)
    ]

    kept, kept_float32, streams = max(_layers(jaxpr), default=(0, 0, 0))
    outer = [e for e in scans if not e.params["reverse"] and any(map(_goes_back, _equations(e.params["jaxpr"])))]
    # What comes after the last scan back is the optimizer's.
    last = max((i for i, e in enumerate(equations) if _goes_back(e)), default=len(equations))
    of_params = [e for e in equations[:last] if e.primitive.name in ("all_gather", "convert_element_type")]
    made = [(e, e.outvars[0].aval) for e in of_params if _matrices(e.outvars[0].aval.shape) in shapes]
    made = [(e, aval) for e, aval in made if jnp.issubdtype(aval.dtype, jnp.floating)]
    used = [e for e, aval in made if e.primitive.name == "all_gather" or aval.dtype.itemsize < _width(e.invars[0])]
    return Arrays(
        *max(logits, default=(0, 0)),
        kept,
        kept_float32,
        streams,
        sum(_nbytes(e.outvars[0]) for scan in back for e in _products(_equations(scan.params["jaxpr"]))),
        math.prod(e.params["length"] for e in outer),
        sum(_nbytes(x) for e in outer for x in _carried(e) if _matrices(x.aval.shape) in shapes),
        sum(_nbytes(x) for e in back for x in _stacked(e) if _matrices(x.aval.shape) in shapes),
        sum(_nbytes(e.outvars[0]) for e in used),
        min([x.dtype.itemsize for x in leaves] + [_width(e.outvars[0]) for e in used]) < 4,
        any(e.primitive.name == "all_gather" for scan in back for e in _equations(scan.params["jaxpr"])),
    )


def _layers(jaxpr: Any) -> Iterator[tuple[int, int, int]]:
    """What each scan forward stacks for a scan back, how much of it is float32, and its carry at all layers."""
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    needed = {id(x) for e in scans if _goes_back(e) for x in e.invars}
    for e in scans:
        stacked = [x for x in _stacked(e) if not e.params["reverse"] and id(x) in needed]
        if kept := [x for x in stacked if x.aval.memory_space != jax.memory.Space.Host]:
            float32 = [x for x in kept if x.aval.dtype == jnp.float32]
            streams = e.params["length"] * sum(map(_nbytes, _carried(e)))
            yield sum(map(_nbytes, kept)), sum(map(_nbytes, float32)), streams
    for e in jaxpr.eqns:
        for inner in _inner(e):
            yield from _layers(inner)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for e in jaxpr.eqns:
        yield e
        for inner in _inner(e):
            yield from _equations(inner)


def _inner(equation: Any) -> Iterator[Any]:
    """The programs within an equation: of loops, calls, rematerialization, `shard_map`."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _products(equations: Iterable[Any]) -> Iterator[Any]:
    return (e for e in equations if e.primitive.name == "dot_general")


def _goes_back(equation: Any) -> bool:
    return equation.primitive.name == "scan" and equation.params["reverse"]


def _matrices(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many matrices, or vectors, an array holds, and their shape."""
    last = shape[-2:] if len(shape) > 2 else shape[-1:]
    return math.prod(shape) // max(1, math.prod(last)), *last


def _carried(scan: Any) -> list[Any]:
    """The results that a scan ends with; the others it stacks, with one axis more than in its body."""
    results = zip(scan.outvars, next(_inner(scan)).outvars, strict=True)
    return [x for x, inner in results if x.aval.ndim == inner.aval.ndim]


def _stacked(scan: Any) -> list[Any]:
    return scan.outvars[len(_carried(scan)) :]


def _width(variable: Any) -> int:
    return variable.aval.dtype.itemsize


def _nbytes(variable: Any) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize


def shard(x: Any) -> tuple[int, ...]:
    """The shape of what each device has; of arrays without a sharding, all."""
    sharding = getattr(x, "sharding", None)
    return x.shape if sharding is None else sharding.shard_shape(x.shape)


def per_device(arrays: Any) -> int:
    """The bytes that each device has of a tree of arrays."""
    return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
