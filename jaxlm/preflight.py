"""What a training step needs of each device's memory, before it runs, and what would make it less."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import tree
from jaxlm.compiled import Compiled, donating
from jaxlm.types import Batch, Step, TrainState

MEMORY: Final = {
    "NVIDIA A100-SXM4-40GB": 40 * 2**30,
    "NVIDIA A100": 80 * 2**30,
    "NVIDIA H100": 80 * 2**30,
    "NVIDIA H200": 140 * 2**30,
    "TPU v4": 32 * 2**30,
    "TPU v5 lite": 16 * 2**30,
    "TPU v5": 95 * 2**30,
    "TPU v6 lite": 32 * 2**30,
}
"""Bytes of devices that aren't here, by the beginning of their kind; drivers take some of it."""


class Knob(NamedTuple):
    """Something to change, alone."""

    name: str
    saves: int
    """Bytes on each device, about."""
    price: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a step needs of each device, in bytes. `str` makes a table of it."""

    title: str
    nbytes: dict[str, int]
    """Parameters, optimizer state and batch by their shapes and shardings, the rest by the compiler's account."""
    parts: dict[str, int]
    """Of the temporaries, by the step's arrays before XLA fuses them; `other` is what is left. They needn't exist at
    the same time: the gradient of the logits is gone when those of the layers are made."""
    limit: int | None
    """What a device has; None: not known."""
    knobs: list[Knob]
    """What applies, the greatest saving first."""
    refused: str = ""
    """Why the compiler made no program, where the memory isn't enough; temporaries are then the sum of the parts."""

    @property
    def total(self) -> int:
        return sum(self.nbytes.values())

    @property
    def fits(self) -> bool | None:
        """None: the limit isn't known."""
        if self.refused:
            return False
        return None if self.limit is None else self.total <= self.limit

    def __str__(self) -> str:
        def row(name: str, nbytes: int, more: str = "") -> str:
            return f"  {name:<44}{nbytes / 1e6:>12,.2f} MB  {more}".rstrip()

        lines = [self.title]
        for name, nbytes in self.nbytes.items():
            lines.append(row(name, nbytes))
            if name == "temporaries":
                lines += [row(f"  {part}", size) for part, size in self.parts.items() if size]
        lines.append(row("total", self.total, {None: "", True: "fits", False: "does not fit"}[self.fits]))
        lines += [row("limit", self.limit)] if self.limit else []
        lines += [f"  {self.refused}"] if self.refused else []
        lines += ["each of these would save, about"] if self.knobs else []
        for knob in self.knobs:
            then = self.limit is not None and not self.fits and self.total - knob.saves <= self.limit
            lines.append(row(knob.name, knob.saves, f"{knob.price}{'; then it should fit' if then else ''}"))
        return "\n".join(lines)


def memory(
    step: Step, state: TrainState, batches: Iterable[Batch], *, limit: int | None = None, vocab: int | None = None
) -> Memory:
    """Compiles a step for each shape of batch and says what the most demanding one holds on each device.

    Nothing runs, and nothing need exist: shapes with shardings over devices that aren't here do, where jax can compile
    for them. Arrays that XLA divides itself, along `model` or without `grads.data_parallel`, count whole among `parts`.

    Args:
        step: what `train.make_step` returns.
        state: the state, or its shapes and shardings.
        batches: one batch of each shape, or its shapes and shardings.
        limit: bytes of each device; None: what the device says or, by its kind, what is known of it.
        vocab: the number of token ids, by which logits are known; None: the rows of the largest parameter that is read
            by indices.

    Raises:
        ValueError: a step that has been compiled, or no batch.
    """
    if isinstance(step, Compiled):
        raise ValueError("preflight.memory: the step has been compiled; give what train.make_step returns")
    programs: list[tuple[float, Batch, Any, Any, str]] = []
    for batch in batches:
        traced = donating(step, state).trace(state, batch)
        try:
            program = traced.lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            programs.append((math.inf, batch, traced, None, str(error).partition("\n")[0]))
        else:
            held = program.argument_size_in_bytes + program.output_size_in_bytes - program.alias_size_in_bytes
            programs.append((held + program.temp_size_in_bytes, batch, traced, program, ""))
    if not programs:
        raise ValueError("preflight.memory: no batches; give one of each shape")
    held, batch, traced, program, refused = max(programs, key=lambda item: item[0])
    found = _find(state, traced.jaxpr.jaxpr, vocab)
    parts = {
        "gradients": max(found.sums + found.of_layers, 0 if found.sums else _own(state.params)),
        "logits and their gradient": 2 * found.logits,
        "activations kept for the backward pass": found.kept,
        "parameters in use": found.in_use,
    }
    nbytes = {"parameters": _own(state.params), "optimizer state": _own(state.opt_state), "batch": _own(batch)}
    temporaries = program.temp_size_in_bytes if program else sum(parts.values())
    parts["other"] = max(0, temporaries - sum(parts.values()))
    if program:
        nbytes["results, padding"] = max(0, int(held) - sum(nbytes.values()) - temporaries)
    nbytes["temporaries"] = temporaries
    knobs = [
        knob
        for knob in _knobs(found, parts["gradients"], temporaries, state, batch)
        if knob.saves > 0.01 * sum(nbytes.values())
    ]
    device = _device(state)
    shape = " x ".join(map(str, batch["tokens"].shape))
    return Memory(
        f"on each {device.device_kind}, for a batch of {shape} tokens",
        nbytes,
        parts,
        _limit(device) if limit is None else limit,
        sorted(knobs, key=lambda knob: -knob.saves),
        refused,
    )


class _Found(NamedTuple):
    """What a step's equations tell, in bytes where nothing else is said."""

    vocab: int
    logits: int
    """float32 `[tokens, V]`, of as many tokens as have them at a time."""
    kept: int
    """What the scan over layers stacks for the backward pass."""
    kept_float32: int
    streams: int
    """What goes from layer to layer, at all of them."""
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


def _find(state: TrainState, jaxpr: Any, vocab: int | None) -> _Found:
    leaves = jax.tree.leaves(state.params)
    whole = {x.shape for x in leaves}
    shapes = whole | {_shard(x) for x in leaves}
    equations = list(_equations(jaxpr))
    scans = [e for e in equations if e.primitive.name == "scan"]
    back = [e for e in scans if _goes_back(e)]

    # Indices read from a parameter are tokens; where the loss reads its targets, it is from no parameter.
    read = [e.invars[0].aval.shape for e in equations if e.primitive.name == "gather"]
    ids = vocab or max((shape[0] for shape in read if shape in whole and len(shape) == 2), default=0)
    matrices = {tuple(sorted(shape)) for shape in whole if ids in shape}
    logits = [
        _nbytes(e.outvars[0])
        for e in equations
        if e.primitive.name == "dot_general"
        and e.outvars[0].aval.shape[-1:] == (ids,)
        and any(tuple(sorted(x.aval.shape)) in matrices for x in e.invars)
    ]

    kept, kept_float32, streams = max(_layers(jaxpr), default=(0, 0, 0))
    outer = [e for e in scans if not e.params["reverse"] and any(map(_goes_back, _equations(e.params["jaxpr"])))]
    # What comes after the last scan back is the optimizer's.
    last = max((i for i, e in enumerate(equations) if _goes_back(e)), default=len(equations))
    of_params = [e for e in equations[:last] if e.primitive.name in ("all_gather", "convert_element_type")]
    made = [(e, e.outvars[0].aval) for e in of_params if e.outvars[0].aval.shape in shapes]
    made = [(e, aval) for e, aval in made if jnp.issubdtype(aval.dtype, jnp.floating)]
    used = [e for e, aval in made if e.primitive.name == "all_gather" or aval.dtype.itemsize < _width(e.invars[0])]
    return _Found(
        ids,
        max(logits, default=0),
        kept,
        kept_float32,
        streams,
        math.prod(e.params["length"] for e in outer),
        sum(_nbytes(x) for e in outer for x in e.outvars[: e.params["num_carry"]] if x.aval.shape in shapes),
        sum(_nbytes(x) for e in back for x in e.outvars[e.params["num_carry"] :] if x.aval.shape in shapes),
        sum(_nbytes(e.outvars[0]) for e in used),
        min([x.dtype.itemsize for x in leaves] + [_width(e.outvars[0]) for e in used]) < 4,
        any(e.primitive.name == "all_gather" for scan in back for e in _equations(scan.params["jaxpr"])),
    )


def _layers(jaxpr: Any) -> Iterator[tuple[int, int, int]]:
    """What each scan forward stacks for a scan back, how much of it is float32, and its carry at all layers."""
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    needed = {id(x) for e in scans if _goes_back(e) for x in e.invars}
    for e in scans:
        carry = e.params["num_carry"]
        if kept := [x for x in e.outvars[carry:] if not e.params["reverse"] and id(x) in needed]:
            float32 = [x for x in kept if x.aval.dtype == jnp.float32]
            streams = e.params["length"] * sum(map(_nbytes, e.outvars[:carry]))
            yield sum(map(_nbytes, kept)), sum(map(_nbytes, float32)), streams
    for e in jaxpr.eqns:
        for inner in _inner(e):
            yield from _layers(inner)


def _knobs(found: _Found, gradients: int, temporaries: int, state: TrainState, batch: Batch) -> Iterator[Knob]:
    """All that applies, however little it saves."""
    own, share = _own(state.params), _share(state.params)
    exact = 4 * tree.size(state.params)
    rows, length = _shard(batch["tokens"])
    rows //= found.microbatches
    tokens = found.logits // (4 * found.vocab) if found.vocab else 0
    chunked = 0 < tokens < rows * length

    if rows % 2 == 0:
        fixed = gradients + found.in_use + (2 * found.logits if chunked else 0)
        saves = (temporaries - fixed) // 2 - (0 if found.sums else exact)
        yield Knob(f"{2 * found.microbatches} microbatches", saves, "little or no time; with zero 2 and 3 more is sent")
    yield Knob('wrap_layer=models.remat("full")', found.kept - found.streams, "about a third more time")
    # Where logits with their gradient aren't at the peak, a layer's backward pass is, and nothing is saved.
    if not chunked and found.kept + 2 * found.logits > 0.9 * temporaries and (chunk := min(1024, tokens // 8)):
        yield Knob(f"losses.next_token(chunk={chunk})", 2 * found.logits * (tokens - chunk) // tokens, "little time")
    if not found.rounded:
        copies = 0 if found.in_use else own // 2
        yield Knob(
            "compute in bfloat16, at most",
            found.kept_float32 // 2 - copies,
            "digits; norms and softmax stay in float32",
        )
    state_leaves = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.float32 and x.size >= 4096]
    shapes = {x.shape for x in jax.tree.leaves(state.params)}
    lean = sum(_own(x) * (3 - 4 / min(256, x.shape[-1])) / 4 for x in state_leaves if x.shape in shapes)
    yield Knob("optim.lean, state in int8", int(lean), "random rounding, which takes a CPU time")

    divided = own < tree.nbytes(state.params)
    lasting = 0 if divided else int((own + _own(state.opt_state)) * share)
    copies = 0 if divided or found.in_use else own  # whole parameters during the step, as stage 0 has anyway
    whole = gradients - (found.sums if found.sums < exact else 0)  # what isn't divided
    if not divided:
        yield Knob("zero=1", lasting - copies, "no more is sent than without")
    if found.sums >= exact:
        yield Knob("zero=2", lasting - copies + int(exact * share), "gradients are sent in each microbatch")
    if not found.by_layer:
        saves = lasting + int((whole + found.in_use) * share)
        yield Knob("zero=3", saves, "gradients, and parameters twice, are sent in each microbatch")


def _share(params: Any) -> float:
    """The part of an array that a device needn't have where it is divided over `data`."""
    mesh = getattr(_sharding(jax.tree.leaves(params)[0]), "mesh", None)
    return 0.0 if mesh is None else 1 - 1 / mesh.shape.get("data", 1)


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


def _goes_back(equation: Any) -> bool:
    return equation.primitive.name == "scan" and equation.params["reverse"]


def _width(variable: Any) -> int:
    return variable.aval.dtype.itemsize


def _nbytes(variable: Any) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize


def _sharding(x: Any) -> Any:
    return getattr(x, "sharding", None)


def _shard(x: Any) -> tuple[int, ...]:
    return x.shape if _sharding(x) is None else x.sharding.shard_shape(x.shape)


def _own(arrays: Any) -> int:
    """The bytes that each device has."""
    return sum(math.prod(_shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _device(state: Any) -> Any:
    of = (_sharding(x) for x in jax.tree.leaves(state))
    return next((min(s.device_set, key=lambda d: d.id) for s in of if s is not None), jax.devices()[0])


def _limit(device: Any) -> int | None:
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # it isn't here
        stats = {}
    known = next((MEMORY[kind] for kind in MEMORY if device.device_kind.startswith(kind)), None)
    return stats.get("bytes_limit", known)
