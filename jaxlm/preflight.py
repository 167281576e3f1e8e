"""What a training step needs of each device's memory, before it runs, and what would make it less."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxlm import tree
from jaxlm.compiled import Compiled, donating
from jaxlm.types import Batch, Step, TrainState

MEMORY: Final = {
    "NVIDIA A100-SXM4-40GB": 40 * 2**30,
    "NVIDIA A100": 80 * 2**30,
    "NVIDIA H100": 80 * 2**30,
    "NVIDIA H200": 141 * 10**9,
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
    """`parameters`, `optimizer state` and `batch` by their shapes and shardings, `temporaries` and `results, padding` by
    the compiler's account."""
    parts: dict[str, int]
    """Of the temporaries, by the step's own arrays before XLA fuses them. They needn't exist at the same time, so what
    is left of the temporaries, `other`, is the least that it can be."""
    limit: int | None
    """What a device has; None: not known."""
    knobs: list[Knob]
    """What applies, the greatest saving first."""
    refused: str = ""
    """Why the compiler made no program, if the memory isn't enough for it; then temporaries are the sum of the parts."""

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
            lines.append(row(knob.name, knob.saves, f"{knob.price}{'; then it fits' if then else ''}"))
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
    found: list[tuple[int, Batch, Any, Any, str]] = []
    for batch in batches:
        traced, program, refused = donating(step, state).trace(state, batch), None, ""
        try:
            program = traced.lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = str(error).partition("\n")[0]
        needed = program.temp_size_in_bytes + program.argument_size_in_bytes if program else tree.nbytes(batch) << 60
        found.append((needed, batch, traced, program, refused))
    if not found:
        raise ValueError("preflight.memory: no batches; give one of each shape")
    _, batch, traced, program, refused = max(found, key=lambda item: item[0])
    arrays = _Arrays(state, batch, traced.jaxpr.jaxpr, vocab)
    parts = arrays.parts()
    nbytes = {"parameters": _own(state.params), "optimizer state": _own(state.opt_state), "batch": _own(batch)}
    held = sum(nbytes.values())
    nbytes["temporaries"] = program.temp_size_in_bytes if program else sum(parts.values())
    if program:
        more = program.argument_size_in_bytes + program.output_size_in_bytes - program.alias_size_in_bytes - held
        nbytes["results, padding"] = max(0, more)
    parts["other"] = max(0, nbytes["temporaries"] - sum(parts.values()))
    device = _device(state)
    worthwhile = [knob for knob in arrays.knobs(parts) if knob.saves > 0.01 * sum(nbytes.values())]
    knobs = sorted(worthwhile, key=lambda knob: -knob.saves)
    shape = "x".join(map(str, batch["tokens"].shape))
    title = f"each {device.device_kind}, for a batch of {shape} tokens"
    return Memory(title, nbytes, parts, _limit(device) if limit is None else limit, knobs, refused)


class _Scan(NamedTuple):
    """A loop over layers, of which a part is kept for the backward pass."""

    kept: int
    kept_float32: int
    streams: int
    """Bytes of what goes from layer to layer, at all of them."""


class _Arrays:
    """The arrays of a step, as it was traced."""

    def __init__(self, state: TrainState, batch: Batch, jaxpr: Any, vocab: int | None):
        self.state, self.batch, self.jaxpr = state, batch, jaxpr
        leaves = jax.tree.leaves(state.params)
        self.whole = {x.shape for x in leaves}
        self.shapes = self.whole | {_shard(x) for x in leaves}
        equations = list(_equations(jaxpr))
        read = [e.invars[0].aval.shape for e in equations if e.primitive.name == "gather"]
        rows = [shape[0] for shape in read if shape in self.whole and len(shape) == 2]
        self.vocab = vocab or max(rows, default=0)
        matrices = {tuple(sorted(shape)) for shape in self.whole if self.vocab in shape}
        self.logits = max(
            (
                e.outvars[0].aval
                for e in equations
                if e.primitive.name == "dot_general"
                and e.outvars[0].aval.shape[-1:] == (self.vocab,)
                and any(tuple(sorted(x.aval.shape)) in matrices for x in e.invars)
            ),
            key=lambda aval: aval.size,
            default=None,
        )
        self.layers = max(_layers(jaxpr), key=lambda scan: scan.kept, default=_Scan(0, 0, 0))
        self.microbatches, self.sums = 1, 0
        for e in equations:
            if e.primitive.name == "scan" and not e.params["reverse"] and _differentiates(e.params["jaxpr"].jaxpr):
                self.microbatches *= e.params["length"]
                carried = [x.aval for x in e.outvars[: e.params["num_carry"]]]
                self.sums = sum(map(_nbytes, (x for x in carried if x.shape in self.shapes)))
        self.stacked = sum(
            _nbytes(x.aval)
            for e in equations
            if e.primitive.name == "scan" and e.params["reverse"]
            for x in e.outvars[e.params["num_carry"] :]
            if x.aval.shape in self.shapes
        )
        self.in_use = sum(_nbytes(e.outvars[0].aval) for e in equations if self._is_used_copy(e))

    def _is_used_copy(self, equation: Any) -> bool:
        """Whether it brings a parameter together, or rounds it."""
        name = equation.primitive.name
        if name not in ("all_gather", "convert_element_type") or equation.outvars[0].aval.shape not in self.shapes:
            return False
        before, after = equation.invars[0].aval, equation.outvars[0].aval
        return name == "all_gather" or after.dtype.itemsize < before.dtype.itemsize

    def parts(self) -> dict[str, int]:
        """Gradients: the sums over microbatches and the layers' of one; without microbatches, at least all."""
        return {
            "gradients": self.sums + self.stacked if self.sums else max(self.stacked, _own(self.state.params)),
            "logits": 0 if self.logits is None else _nbytes(self.logits),
            "activations kept for the backward pass": self.layers.kept,
            "parameters in use": self.in_use,
        }

    def knobs(self, parts: dict[str, int]) -> Iterator[Knob]:
        """All that applies, however little it saves."""
        params, logits = self.state.params, parts["logits"]
        rows, length = _shard(self.batch["tokens"])
        rows //= self.microbatches
        kept = self.layers.kept
        if rows % 2 == 0:
            sums = 0 if self.sums else sum(x.size * 4 for x in jax.tree.leaves(params))
            price = "little or no time; with ZeRO 2 and 3 more is sent"
            yield Knob(f"{2 * self.microbatches} microbatches", (kept + logits) // 2 - sums, price)
        yield Knob('wrap_layer=models.remat("full")', kept - self.layers.streams, "about a third more time")
        tokens = 0 if self.logits is None else self.logits.size // self.vocab
        if tokens == rows * length and (chunk := min(1024, tokens // 8)):
            yield Knob(f"losses.next_token(chunk={chunk})", logits * (tokens - chunk) // tokens, "little time")
        rounded = self.layers.kept_float32 // 2 - (0 if self.in_use else _own(params) // 2)
        yield Knob("bfloat16", rounded, "digits; what is float32 in any case isn't halved, so at most")
        leaves = [x for x in jax.tree.leaves(self.state.opt_state) if x.dtype == jnp.float32 and x.size >= 4096]
        lean = sum(int(_own(x) * (1 - (1 + 4 / min(256, x.shape[-1])) / 4)) for x in leaves if x.shape in self.whole)
        yield Knob("optim.lean, state in int8", lean, "time on CPUs; no loss to be seen in docs/optimizers.md")
        yield from self._zero(parts)

    def _zero(self, parts: dict[str, int]) -> Iterator[Knob]:
        params = self.state.params
        mesh = getattr(_sharding(jax.tree.leaves(params)[0]), "mesh", None)
        share = 1 - 1 / mesh.shape.get("data", 1) if mesh is not None else 0.0
        exact = sum(x.size * 4 for x in jax.tree.leaves(params))
        divided = _own(params) < tree.nbytes(params)
        lasting = 0 if divided else int((_own(params) + _own(self.state.opt_state)) * share)
        copies = 0 if divided or self.in_use else _own(params)  # whole parameters, which stage 0 has anyway
        sums = int(exact * share) if self.sums >= exact else 0
        if not divided:
            yield Knob("zero=1", lasting - copies, "none: what is sent is no more")
        if sums:
            yield Knob("zero=2", lasting - copies + sums, "gradients are sent in each microbatch")
        yield Knob("zero=3", lasting + sums + int(self.in_use * share), "parameters too are sent, twice a microbatch")


def _layers(jaxpr: Any) -> Iterator[_Scan]:
    """Of every level that has scans which go forward and, over what they have stacked, back."""
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    back = {id(x) for e in scans if e.params["reverse"] for x in e.invars}
    for e in scans:
        if not e.params["reverse"]:
            carry = e.params["num_carry"]
            kept = [x.aval for x in e.outvars[carry:] if id(x) in back]
            if kept:
                float32 = sum(_nbytes(x) for x in kept if x.dtype == jnp.float32)
                streams = e.params["length"] * sum(_nbytes(x.aval) for x in e.outvars[:carry])
                yield _Scan(sum(map(_nbytes, kept)), float32, streams)
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


def _differentiates(jaxpr: Any) -> bool:
    return any(e.primitive.name == "scan" and e.params["reverse"] for e in _equations(jaxpr))


def _nbytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize


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
