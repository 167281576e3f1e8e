"""What a training step needs of each device's memory, before it runs, and what would make it less."""

import contextlib
import dataclasses
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxlm import distributed, tree
from jaxlm.compiled import Compiled, compile_for, donating
from jaxlm.preflight._traced import Arrays, find, per_device, shard
from jaxlm.types import Batch, Step, TrainState

FULL: Final = "RESOURCE_EXHAUSTED"
"""In XLA's errors for want of memory."""

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
            if FULL not in str(error):
                raise
            programs.append((math.inf, batch, traced, None, str(error).partition("\n")[0]))
        else:
            programs.append((_held(program), batch, traced, program, ""))
    if not programs:
        raise ValueError("preflight.memory: no batches; give one of each shape")
    held, batch, traced, program, refused = max(programs, key=lambda item: item[0])
    found = find(state, traced.jaxpr.jaxpr, vocab)
    parts = {
        "gradients": max(found.sums + found.of_layers, 0 if found.sums else per_device(state.params)),
        "logits and their gradient": 2 * found.logits,
        "activations kept for the backward pass": found.kept,
        "parameters in use": found.in_use,
    }
    nbytes = {
        "parameters": per_device(state.params),
        "optimizer state": per_device(state.opt_state),
        "batch": per_device(batch),
    }
    temporaries = program.temp_size_in_bytes if program else sum(parts.values())
    parts["other"] = max(0, temporaries - sum(parts.values()))
    if program:
        nbytes["results, padding"] = max(0, int(held) - sum(nbytes.values()) - temporaries)
    nbytes["temporaries"] = temporaries
    least = sum(nbytes.values()) // 100
    knobs = [k for k in _knobs(found, parts["gradients"], temporaries, state, batch) if k.saves > least]
    device = _devices(state)[0]
    shape = " x ".join(map(str, batch["tokens"].shape))
    return Memory(
        f"on each {device.device_kind}, for a batch of {shape} tokens",
        nbytes,
        parts,
        _limit(device) if limit is None else limit,
        sorted(knobs, key=lambda k: -k.saves),
        refused,
    )


def compile_to_fit(step: Step, state: TrainState, batches: Sequence[Batch]) -> Compiled:
    """Compiles a step for each shape of batch, as long as the devices' memory is enough.

    Raises:
        MemoryError: it isn't; what the step holds is said, and what would make it less.
    """
    own = [device for device in _devices(state) if device.process_index == jax.process_index()]
    limit = min(filter(None, map(_own_limit, own)), default=None)
    compiled, full, refused = None, False, None
    try:
        compiled = compile_for(step, state, batches, donate=True)
        if limit is not None:
            accounts = [cast(Any, program).memory_analysis() for program in compiled.programs.values()]
            full = any(account is not None and _held(account) > limit for account in accounts)
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
        full, refused = True, error
    if compiled and not any(distributed.exchange(full)):  # or else all refuse it
        return compiled
    told = f"\n{memory(step, state, batches, limit=limit)}" if all("tokens" in batch for batch in batches) else ""
    raise MemoryError(f"there is not enough memory for the step{told}") from refused


@contextlib.contextmanager
def explained() -> Generator[None]:
    """Adds to an error for want of a device's memory how to find what takes it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if FULL in str(error):
            error.add_note(
                "A device's memory is full. preflight.memory(step, state, batches) says what a step holds of it, and "
                "what would make that less"
            )
        raise


def _held(program: Any) -> int:
    """Bytes of a compiled program, by its account of its memory."""
    held = program.argument_size_in_bytes + program.output_size_in_bytes - program.alias_size_in_bytes
    return held + program.temp_size_in_bytes


def _knobs(found: Arrays, gradients: int, temporaries: int, state: TrainState, batch: Batch) -> Iterator[Knob]:
    """All that applies, however little it saves."""
    own, share = per_device(state.params), _share(state.params)
    exact = 4 * tree.size(state.params)
    rows, length = shard(batch["tokens"])
    rows //= found.microbatches
    tokens = found.tokens
    chunked = 0 < tokens < rows * length

    if rows % 2 == 0:
        fixed = gradients + found.in_use + (2 * found.logits if chunked else 0)
        saves = (temporaries - fixed) // 2 - (0 if found.sums else exact)
        yield Knob(f"{2 * found.microbatches} microbatches", saves, "little or no time; with zero 2 and 3 more is sent")
    yield Knob('wrap_layer=models.remat("full")', found.kept - found.streams, "about a third more time")
    # Without logits the peak is in a layer; where they, with their gradient, aren't at the peak, it is there already.
    if not chunked and found.kept + 2 * found.logits > 0.9 * temporaries and (chunk := min(1024, tokens // 8)):
        in_layer = found.kept + found.of_layers + found.in_use + found.products
        saves = min(2 * found.logits * (tokens - chunk) // tokens, temporaries - in_layer)
        yield Knob(f"losses.next_token(chunk={chunk})", saves, "little time")
    if not found.rounded:
        copies = 0 if found.in_use else own // 2
        saves = found.kept_float32 // 2 - copies
        yield Knob("compute in bfloat16, at most", saves, "digits; norms and softmax stay in float32")
    state_leaves = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.float32 and x.size >= 4096]
    shapes = {x.shape for x in jax.tree.leaves(state.params)}
    lean = sum(per_device(x) * (3 - 4 / min(256, x.shape[-1])) / 4 for x in state_leaves if x.shape in shapes)
    yield Knob("optim.lean, state in int8", int(lean), "random rounding, which takes a CPU time")

    divided = own < tree.nbytes(state.params)
    lasting = 0 if divided else int((own + per_device(state.opt_state)) * share)
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
    mesh = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
    return 0.0 if mesh is None else 1 - 1 / mesh.shape.get("data", 1)


def _devices(state: Any) -> list[Any]:
    shardings = [x.sharding for x in jax.tree.leaves(state) if getattr(x, "sharding", None) is not None]
    return sorted(shardings[0].device_set, key=lambda device: device.id) if shardings else jax.devices()[:1]


def _limit(device: Any) -> int | None:
    known = next((MEMORY[kind] for kind in MEMORY if device.device_kind.startswith(kind)), None)
    return _own_limit(device) or known


def _own_limit(device: Any) -> int | None:
    """What a device says that it has."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # it isn't here
        return None
