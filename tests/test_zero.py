"""A run is the same however it lies on devices: every stage of ZeRO, every optimizer, every shape of mesh."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layered import KEY, MATRICES, MESHES, PARTS, ROWS, STACKED, STEPS, D, batches, lay_out, model, params
from processes import call_together, own_rows

from jaxlm import distributed, grads, optim, sharding, train, tree
from jaxlm.types import Batch, Params

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
        given = [sharding.place(own_rows(batch, rows), rows) for batch in batches(STEPS)]
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


def run_each(folder: str) -> None:
    """A run of each optimizer, in turn with each stage, mesh and number of microbatches."""
    for i, name in enumerate(OPTIMIZERS):
        found = run(OPTIMIZERS[name], lay_out(list(MESHES)[i % 3], i % 4), (1, 4)[i % 2])
        if distributed.first():
            np.savez(Path(folder) / name, **tree.named_leaves(found))


@pytest.mark.slow
def test_a_run_is_the_same_in_two_processes(tmp_path: Path, alone: Callable[[str], Any]):
    call_together(2, 4, run_each, tmp_path)
    for name in OPTIMIZERS:
        with np.load(tmp_path / f"{name}.npz") as found:
            assert_close(dict(found), tree.named_leaves(alone(name)), name)


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
        with pytest.raises(ValueError, match="microbatches is 0; use a whole number"):
            grads.data_parallel(jax.value_and_grad(model(), has_aux=True), lay_out("8", zero), microbatches=0)
