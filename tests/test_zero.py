"""A run is the same however it lies on devices: every stage of ZeRO, every optimizer, every shape of mesh."""

import collections
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from ports import free_port

from jaxlm import distributed, grads, hlo, losses, optim, sharding, train, tree
from jaxlm.compiled import donating
from jaxlm.types import Batch, LossFn, Params

KEY = jax.random.key(0)
VOCAB, L, D, F = 32, 3, 16, 32
ROWS, LENGTH, STEPS = 32, 9, 20
STACKED = optim.by_name({"blocks/.*": True, ".*": False})
MATRICES = optim.by_name({"blocks/.*kernel": True, ".*": False})
RULES = {
    "blocks/up_kernel": PartitionSpec(None, None, "model"),
    "blocks/down_kernel": PartitionSpec(None, "model"),
    "head": PartitionSpec(None, "model"),
    ".*": PartitionSpec(),
}
MESHES: dict[str, dict[str, Any]] = {"8": {}, "2x4": {"replica": 2}, "4x2 model": {"model": 2}}
PARTS: dict[str, dict[str, Any]] = {
    "(2x4)": {"data": (2, 4)},
    "(2x2x2)": {"data": (2, 2, 2)},
    "2x(2x2)": {"replica": 2, "data": (2, 2)},
    "(2x2)x2 model": {"data": (2, 2), "model": 2},
}


def params() -> Params:
    rng = np.random.default_rng(0)
    shapes = {
        "blocks": {"up_kernel": (L, D, F), "down_kernel": (L, F, D), "scale": (L, D)},
        "embed": (VOCAB, D),
        "head": (D, VOCAB),
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) / 4, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def model(wrap_layer: Any = None) -> LossFn:
    """Residual layers, scanned, between an embedding and an output matrix."""

    def layer(params: Params, x: jax.Array) -> jax.Array:
        normed = x * (1 + params["scale"].reshape(1, 1, -1))
        return x + jnp.tanh(normed @ params["up_kernel"]) @ params["down_kernel"]

    run = wrap_layer(layer) if wrap_layer else layer

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, p: (run(p, x), None), params["embed"][tokens], params["blocks"])
        return x @ params["head"]

    return losses.next_token(apply)


def batches(steps: int) -> list[Batch]:
    """Rows of 1 to 9 tokens, some empty, so that devices and microbatches have unequal numbers of them."""
    rng = np.random.default_rng(1)
    lengths = np.where(rng.random((steps, ROWS)) < 0.3, 0, rng.integers(1, LENGTH + 1, (steps, ROWS)))
    lengths[:, :4] = 0  # a device of eight, or a microbatch, without a single token
    tokens = rng.integers(0, VOCAB, (steps, ROWS, LENGTH))
    return [
        {"tokens": t.astype(np.uint16), "lengths": n.astype(np.int32)} for t, n in zip(tokens, lengths, strict=True)
    ]


OPTIMIZERS: dict[str, Callable[[sharding.Layout | None], optax.GradientTransformation]] = {
    "adamw": lambda _: optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3, eps=1e-4, weight_decay=0.1)),
    "lion": lambda _: optim.lion(1e-4, weight_decay=0.1),
    "lamb": lambda _: optim.lamb(1e-3, eps=1e-4, weight_decay=0.1, stacked=STACKED),
    "adafactor": lambda _: optim.adafactor(1e-3, min_factored=8, stacked=STACKED, weight_decay=0.1),
    "adafactor relative": lambda _: optim.adafactor(min_factored=8, momentum=0.9, stacked=STACKED),
    "muon": lambda layout: _muon(layout),
    "normuon": lambda layout: _muon(layout, variance_b2=0.95, scale=optim.spectral),
    "soap": lambda layout: optim.soap(
        1e-3,
        eps=1e-4,
        every=2,
        largest=D,  # of longer sides' products some eigenvalues are equal: rounding chooses among their bases
        stacked=STACKED,
        basis_sharding=layout and sharding.replicated(layout.mesh),
    ),
    "lion int8": lambda _: optim.lion_int8(1e-4),
    "adamw int8": lambda _: optim.adamw_int8(1e-3, eps=1e-4),
    "adafactor bf16": lambda _: optim.adafactor_bf16(1e-3, min_factored=8, stacked=STACKED),
    "per layer": lambda _: optim.per_layer(optax.lamb(1e-3, eps=1e-4), STACKED),
    "guarded": lambda _: optim.skip_nonfinite(optax.chain(optim.adamw(1e-3, eps=1e-4), optim.weight_ema(0.9))),
    "optax adamw": lambda _: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-4)),
    "optax lamb": lambda _: optax.lamb(1e-3, eps=1e-4),
    "optax adafactor": lambda _: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "optax sgd": lambda _: optax.sgd(0.1, momentum=0.9),
    "optax partition": lambda _: optax.partition(
        {True: optax.adafactor(1e-3, min_dim_size_to_factor=8), False: optax.masked(optax.adam(1e-3, eps=1e-4), True)},
        MATRICES,
    ),
    "optax MultiSteps": lambda _: optax.MultiSteps(optax.adam(1e-3, eps=1e-4), 2).gradient_transformation(),
}


def _muon(layout: sharding.Layout | None, **options: Any) -> optax.GradientTransformation:
    exact = optim.newton_schulz(dtype=jnp.float32)
    return optim.muon(
        1e-3,
        MATRICES,
        stacked=STACKED,
        orthogonalize=exact,
        adamw_eps=1e-4,
        bank_sharding=layout and layout.banks,
        **options,
    )


def run(make_optimizer: Any, layout: sharding.Layout | None, microbatches: int = 1) -> Params:
    """Parameters after some steps; without a layout on one device, in one batch."""
    optimizer = make_optimizer(layout)
    if layout is None:
        grad_fn = jax.value_and_grad(model(), has_aux=True)
        state, given = train.start(params(), optimizer), batches(STEPS)
    else:
        wrap_layer = grads.gather_layers(layout, "blocks") if layout.zero == 3 else None
        grad_fn = jax.value_and_grad(model(wrap_layer), has_aux=True)
        grad_fn = grads.data_parallel(grad_fn, layout, microbatches=microbatches)
        shardings = layout.state(optimizer)
        state = jax.jit(lambda: train.start(params(), optimizer), out_shardings=shardings)()
        rows = sharding.by_rows(layout.mesh)
        parts, of = sharding.share(rows)

        def own(x: np.ndarray) -> np.ndarray:
            return np.concatenate([np.split(x, of)[part] for part in parts])

        given = [sharding.place(jax.tree.map(own, batch), rows) for batch in batches(STEPS)]
    step = train.compile_step(train.make_step(grad_fn, optimizer, KEY), state, given[:1])
    *_, (state, _) = train.fit(step, state, given)
    if layout is not None:
        jax.tree.map(lambda x, s: _assert_lies(x, s), state, shardings)
    return sharding.to_host(state.params)


def _assert_lies(x: jax.Array, sharding: jax.sharding.Sharding) -> None:
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.fixture(scope="module")
def alone() -> Callable[[str], Any]:
    """A run on one device in one batch, once for each optimizer."""
    done: dict[str, Any] = {}
    return lambda name: done.setdefault(name, None) or done.update({name: run(OPTIMIZERS[name], None)}) or done[name]


def lay_out(mesh: str, zero: int) -> sharding.Layout:
    return sharding.lay_out(
        params(), sharding.mesh(**(MESHES | PARTS)[mesh]), zero=zero, rules=RULES, stacked=STACKED, tolerance=0.1
    )


# Each optimizer meets each stage, and in turn each mesh and number of microbatches.
CASES = [
    (name, zero, list(MESHES)[(i + zero) % 3], (1, 4)[(i // 3 + zero) % 2])
    for i, name in enumerate(OPTIMIZERS)
    for zero in range(4)
]
# The stages differ in how gradients come about, and optimizers in what they do with them: seldom in both.
FEW = {("adamw", *case[1:]) for case in CASES[::5]} | {
    case for i, case in enumerate(CASES) if case[1] == 1 + i // 4 % 3
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "zero", "mesh", "microbatches"),
    [pytest.param(*case, marks=[] if case in FEW else [pytest.mark.slow]) for case in sorted({*CASES, *FEW})],
)
def test_a_run_is_the_same_on_one_device_and_on_many(
    name: str, zero: int, mesh: str, microbatches: int, alone: Callable[[str], Any]
):
    assert_close(run(OPTIMIZERS[name], lay_out(mesh, zero), microbatches), alone(name), name)


@pytest.mark.parametrize(
    "zero", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_a_nan_on_one_device_changes_nothing_on_any(zero: int):
    layout = lay_out("8", zero)

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> Any:
        loss, aux = model(grads.gather_layers(layout, "blocks") if zero == 3 else None)(params, batch, key)
        return jnp.where(jnp.any(batch["bad"]), jnp.nan, 1) * loss, aux

    optimizer = optim.skip_nonfinite(optim.adamw(1e-3))
    grad_fn = grads.data_parallel(jax.value_and_grad(loss_fn, has_aux=True), layout)
    state = jax.jit(lambda: train.start(params(), optimizer), out_shardings=layout.state(optimizer))()
    rows, before = sharding.by_rows(layout.mesh), sharding.to_host(state)
    bad = {**batches(1)[0], "bad": np.arange(ROWS) == 20}  # on the sixth device
    found, metrics = jax.jit(train.make_step(grad_fn, optimizer, KEY))(state, sharding.place(bad, rows))
    assert not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 1
    found = sharding.to_host(found)
    jax.tree.map(
        np.testing.assert_array_equal, (found.params, found.opt_state.inner), (before.params, before.opt_state.inner)
    )
    good = {**bad, "bad": np.zeros(ROWS, bool)}
    _, metrics = jax.jit(train.make_step(grad_fn, optimizer, KEY))(state, sharding.place(good, rows))
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "zero", "mesh"),
    [
        pytest.param(name, zero, mesh, marks=[] if (i + zero - j) % 4 == 0 else [pytest.mark.slow])
        for i, name in enumerate(("adamw", "muon", "adafactor", "lamb"))
        for zero in (1, 2, 3)
        for j, mesh in enumerate(PARTS)
    ],
)
def test_a_run_is_the_same_where_data_is_several_axes(name: str, zero: int, mesh: str, alone: Callable[[str], Any]):
    assert_close(run(OPTIMIZERS[name], lay_out(mesh, zero), 4 if zero == 2 else 1), alone(name), name)


def assert_close(found: Params, expected: Params, name: str) -> None:
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, expected)
    # SOAP's bases turn within what belongs to nearly equal eigenvalues by as much as rounding says.
    assert max(jax.tree.leaves(differences)) <= (1e-4 if name == "soap" else 1e-6), differences


PROCESS = """
import sys
from jaxlm import distributed
coordinator, process, folder = sys.argv[1:]
distributed.start((coordinator, 2, int(process)))
import test_zero
with distributed.leaving_together():
    test_zero.run_each(folder)
"""


def run_each(folder: str) -> None:
    """A run of each optimizer, in turn with each stage, mesh and number of microbatches."""
    for i, name in enumerate(OPTIMIZERS):
        found = run(OPTIMIZERS[name], lay_out(list(MESHES)[i % 3], i % 4), (1, 4)[i % 2])
        if distributed.first():
            np.savez(Path(folder) / name, **tree.named_leaves(found))


@pytest.mark.slow
def test_a_run_is_the_same_in_two_processes(tmp_path: Path, alone: Callable[[str], Any]):
    coordinator = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(Path(__file__).parent)}
    environment.pop("NPROC", None)
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, coordinator, str(i), str(tmp_path)], env=environment)
        for i in range(2)
    ]
    try:
        assert [process.wait(900) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for name in OPTIMIZERS:
        with np.load(tmp_path / f"{name}.npz") as found:
            assert_close(dict(found), tree.named_leaves(alone(name)), name)


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


@pytest.mark.parametrize(("zero", "mesh"), [(0, "8"), (1, "2x4"), (3, "4x2 model"), (3, "8"), (3, "(2x4)")])
def test_a_loss_alone_is_that_of_one_device(zero: int, mesh: str):
    layout = lay_out(mesh, zero)
    wrap_layer = grads.gather_layers(layout, "blocks") if zero == 3 else None
    parallel = jax.jit(grads.parallel_loss(model(wrap_layer), layout))
    placed, batch = jax.device_put(params(), layout.params), batches(1)[0]
    found = jax.device_get(parallel(placed, batch, KEY))
    expected = jax.device_get(model()(params(), batch, KEY))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_layers_of_another_name_are_refused():
    with pytest.raises(ValueError, match=r"no 'layers', only \['blocks', 'embed', 'head'\]"):
        grads.gather_layers(lay_out("8", 3), "layers")


def test_less_than_one_microbatch_is_refused():
    for zero in range(4):
        with pytest.raises(ValueError, match="0 microbatches; use 1 or more"):
            grads.data_parallel(jax.value_and_grad(model(), has_aux=True), lay_out("8", zero), microbatches=0)
