"""jaxlm's training step compiled for devices that aren't here, and what its program sends."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm import grads, hlo, losses, models, optim, sharding, train
from jaxlm.compiled import donating

WHILE: Final = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
TRIPS: Final = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
BOUND: Final = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
NAME: Final = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step, with clipping, in bfloat16."""

    chip: str
    topology: str
    """`HOSTSxEACH` of H100s, or a TPU's, such as `2x4`."""
    zero: int
    model: models.TransformerConfig
    optimizer: str = "adamw"
    microbatches: int = 1
    tokens: int = 512
    """In the one row that each device has in each microbatch."""
    remat: bool = False
    """Compute each layer again for the backward pass."""

    @property
    def devices(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def title(self) -> str:
        return f"{self.chip} {self.topology}, {self.optimizer}, zero {self.zero}, {self.microbatches} mb"


class Sent(NamedTuple):
    """Arrays that go alike in a step."""

    kind: str
    dtype: str
    in_loop: bool
    asynchronous: bool
    arrays: int
    """In the program's text."""
    operations: int
    nbytes: int
    """Of the whole arrays on one device, as often as the step sends them."""
    sent: float
    """By each device in a step."""


class Compiled(NamedTuple):
    params: int
    devices: int
    description: sharding.Description
    sent: list[Sent]
    memory: Any


def compiled(case: Case, devices: list[Any]) -> Compiled:
    """The step as an experiment puts it together, compiled from shapes alone.

    Raises:
        jax.errors.JaxRuntimeError: a TPU's memory isn't enough.
    """
    mesh, dtype, key = sharding.mesh(devices=devices), jnp.bfloat16, jax.random.key(0)
    init, apply = models.transformer(case.model)
    params = jax.eval_shape(init, key)
    layout = sharding.lay_out(params, mesh, zero=case.zero, stacked=models.stacked)
    wrap = grads.gather_layers(layout, "blocks", dtype=dtype) if case.zero == 3 else None
    if case.remat:
        wrap = _computed_again(wrap)
    _, apply = models.transformer(case.model, wrap_layer=wrap)
    grad_fn = jax.value_and_grad(losses.next_token(apply), has_aux=True)
    grad_fn = grads.data_parallel(grad_fn, layout, dtype=dtype, microbatches=case.microbatches)
    chains = {
        "adamw": lambda: optim.adamw(3e-4, weight_decay=0.1),
        "muon": lambda: optim.muon(3e-4, models.matrices, stacked=models.stacked, bank_sharding=layout.banks),
    }
    optimizer = optax.chain(optim.clip_by_global_norm(1.0), chains[case.optimizer]())
    state = jax.eval_shape(lambda: train.start(init(key), optimizer))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout.state(optimizer)
    )
    rows, by_rows = mesh.size * case.microbatches, sharding.by_rows(mesh)
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, case.tokens), jnp.uint16, sharding=by_rows),
        "lengths": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_rows),
    }
    program = donating(train.make_step(grad_fn, optimizer, key), state).lower(state, batch).compile()
    return Compiled(
        sum(x.size for x in jax.tree.leaves(params)),
        mesh.size,
        sharding.describe(layout, optimizer, dtype=dtype, microbatches=case.microbatches),
        sent(program.as_text()),
        program.memory_analysis(),
    )


def sent(program: str) -> list[Sent]:
    """What a step sends, its loops counted through."""
    where = {
        found[0]: name for name, body in hlo.COMPUTATION.findall(program) for found in hlo.COLLECTIVE.findall(body)
    }
    times = runs(program)
    groups: dict[tuple[str, str, bool, bool], list[hlo.Collective]] = defaultdict(list)
    for c in hlo.collectives(program):
        groups[c.kind, c.dtype, c.in_loop, c.asynchronous].append(c)
    return [
        Sent(
            *group,
            arrays=len(found),
            operations=len({c.operation for c in found}),
            nbytes=sum(c.nbytes * times[where[c.operation]] for c in found),
            sent=sum(c.sent * times[where[c.operation]] for c in found),
        )
        for group, found in sorted(groups.items())
    ]


def runs(program: str) -> dict[str, int]:
    """How often each computation runs. Where a loop's count isn't told, it is what its condition compares with."""
    computations: dict[str, str] = dict(hlo.COMPUTATION.findall(program))
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, body in computations.items():
        for line in body.splitlines():
            if "-done(" in line or "-update(" in line:  # names again what was started
                continue
            called = {n for _, names in hlo.CALL.findall(line) for n in NAME.findall(names)}
            trips = 1
            if loop := WHILE.search(line):
                told = TRIPS.search(line)
                trips = int(told[1]) if told else max(map(int, BOUND.findall(computations[loop[1]])))
            for other in called:
                callers[other].append((name, trips))

    @functools.cache
    def count(name: str) -> int:
        return sum(count(caller) * trips for caller, trips in callers[name]) if name in callers else 1

    return {name: count(name) for name in computations}


def _computed_again(wrap: Any) -> Any:
    return (lambda layer: jax.checkpoint(wrap(layer))) if wrap else jax.checkpoint
