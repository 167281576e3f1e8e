"""What a step's program sends and holds is what the stage of ZeRO says, and what is described."""

import collections
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from layered import KEY, LENGTH, MESHES, ROWS, VOCAB, D, F, L, batches, lay_out, model, params

from jaxlm import grads, hlo, optim, sharding, train
from jaxlm.compiled import donating


class Compiled(NamedTuple):
    layout: sharding.Layout
    description: sharding.Description
    found: list[hlo.Collective]
    stable: str
    """The program before XLA's passes, in the dtypes that were asked for: the CPU computes bfloat16 in float32."""
    memory: Any


def compiled(zero: int, microbatches: int, mesh: str = "8", dtype: Any = None) -> Compiled:
    """A whole training step with clipped AdamW."""
    layout, optimizer = lay_out(mesh, zero), optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    wrap_layer = grads.gather_layers(layout, "blocks", dtype=dtype) if zero == 3 else None
    grad_fn = jax.value_and_grad(model(wrap_layer), has_aux=True)
    step = train.make_step(grads.data_parallel(grad_fn, layout, dtype=dtype, microbatches=microbatches), optimizer, KEY)
    shapes = jax.eval_shape(lambda: train.start(params(), optimizer))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout.state(optimizer)
    )
    rows = sharding.by_rows(layout.mesh)
    batch = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for n, x in batches(1)[0].items()}
    lowered = donating(step, state).lower(state, batch)
    program = lowered.compile()
    description = sharding.describe(layout, optimizer, dtype=dtype, microbatches=microbatches)
    found = hlo.collectives(program.as_text())
    return Compiled(layout, description, found, lowered.as_text(), program.memory_analysis())


MATRIX = 200
"""Elements: what is smaller is a vector, a scalar, or of the metrics."""


def large(step: Compiled, devices: int = 8) -> collections.Counter[tuple[str, bool]]:
    """How many matrices are sent among so many devices, by kind and by whether it is in a loop."""
    return collections.Counter(
        (c.kind, c.in_loop) for c in step.found if math.prod(c.shape) >= MATRIX and c.devices == devices
    )


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_program_sends_what_the_stage_says_and_no_more(zero: int, microbatches: int):
    step = compiled(zero, microbatches)
    top, stacked = 2, 2  # matrices
    in_loop = microbatches > 1
    expected = {
        0: {("all-reduce", False): top + stacked},
        1: {("all-gather", False): top + stacked, ("reduce-scatter", False): top + stacked},
        2: {("all-gather", False): top + stacked, ("reduce-scatter", in_loop): top + stacked},
        3: collections.Counter({("all-gather", False): top, ("all-gather", True): 2 * stacked})
        + collections.Counter({("reduce-scatter", True): stacked})
        + collections.Counter({("reduce-scatter", in_loop): top}),
    }[zero]
    assert large(step) == expected
    small = sum(c.nbytes for c in step.found if math.prod(c.shape) < MATRIX)
    assert small <= 4 * (L * D + 20)  # vectors, the global norm, the metrics


@pytest.mark.parametrize(("zero", "microbatches"), [(0, 1), (1, 4), (2, 4), (3, 1)])
def test_where_data_is_several_axes_matrices_travel_along_one_after_another(zero: int, microbatches: int):
    whole, step = large(compiled(zero, microbatches)), compiled(zero, microbatches, "(2x4)")
    assert large(step, devices=8) == (whole if zero == 0 else {})
    assert large(step, devices=2) == large(step, devices=4) == ({} if zero == 0 else whole)


@pytest.mark.parametrize("zero", [1, 3])
def test_over_the_model_axis_go_activations_alone(zero: int):
    step = compiled(zero, 1, "4x2 model")
    assert large(step, devices=4) == large(compiled(zero, 1))
    parts = [c for c in step.found if c.devices == 4 and math.prod(c.shape) >= MATRIX]
    assert {math.prod(c.shape[-2:]) for c in parts} == {D * F // 2, VOCAB * D}  # but for the embedding a half of each
    assert all(c.shape[:2] == (ROWS // 4, LENGTH) for c in step.found if c.devices == 2 and math.prod(c.shape) > 8)


def test_between_replicas_go_gradients_once_and_divided():
    step = compiled(1, 4, "2x4")
    between = [c for c in step.found if c.devices == 2 and math.prod(c.shape) >= MATRIX // 4]
    assert {c.kind for c in between} == {"all-reduce"}
    assert not any(c.in_loop for c in between)
    assert sum(c.nbytes for c in between) == 4 * (2 * L * D * F + 2 * VOCAB * D) // 4
    assert large(step, devices=4) == large(compiled(1, 4))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_parameters_travel_in_the_compute_dtype_and_gradients_in_float32(zero: int):
    step = compiled(zero, 1, dtype=jnp.bfloat16)
    for operation, dtype in (("all_gather", "bf16"), ("reduce_scatter", "f32")):
        lines = re.findall(rf'"?stablehlo.{operation}"?.*?-> tensor<[0-9x]*x(\w+)>', step.stable, re.DOTALL)
        assert set(lines) == {dtype}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mesh", [*MESHES, "(2x4)", "(2x2x2)", "2x(2x2)"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_is_described_is_what_is_compiled(zero: int, mesh: str):
    step = compiled(zero, 1, mesh)
    rows = sum(x.nbytes for x in batches(1)[0].values()) // (4 if mesh == "4x2 model" else 8)
    nbytes = step.description.nbytes
    counter = 4  # the step's
    assert step.memory.argument_size_in_bytes == nbytes["parameters"] + nbytes["optimizer state"] + counter + rows
    said, found = collections.defaultdict[str, float](float), collections.defaultdict[str, float](float)
    for t in step.description.transfers:
        said[t.kind] += t.sent
    for c in step.found:
        if "model" not in mesh or c.devices != 2:  # those are activations
            found[c.kind] += c.sent * (L if c.in_loop else 1)
    scalars = 128  # the global norm's, the metrics
    assert all(said[key] <= found[key] <= said[key] + scalars for key in said | found)
