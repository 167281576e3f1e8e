"""With the order of its sums fixed, a run is the same to the bit on any number of devices and processes."""

import json
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from processes import call_together, own_rows
from test_topologies import batches

from jaxlm import distributed, fixed_order, grads, losses, models, optim, sharding, train
from jaxlm.fingerprint import fingerprints
from jaxlm.precision import compute_in
from jaxlm.types import Aux, Batch, LossFn, Params, Step, TrainState

STEPS = 100
SLICES = 8
KEY = jax.random.key(1)
OPTIMIZERS = {
    "adamw": optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(3e-3, weight_decay=0.1)),
    "adafactor": optim.adafactor(3e-3, stacked=models.stacked),
    "lamb": optim.lamb(3e-3, weight_decay=0.1, stacked=models.stacked),
    "muon": optim.skip_nonfinite(optim.muon(3e-3, matrices=models.matrices, stacked=models.stacked)),
    "float16": optim.dynamic_loss_scale(optim.adamw(3e-3)),
}
IN_PROCESSES = "adamw", "muon"
# Unrolled, XLA makes another program of it for one device than for several, with other bits.
init, apply = models.transformer(
    models.TransformerConfig(vocab=64, layers=2, width=16, heads=2, qk_norm=True), unroll=True
)
next_token = losses.next_token(apply)


def noisy_loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    loss_sum, aux = next_token(params, batch, key)
    return loss_sum * (1 + 0.1 * jax.random.normal(key)), aux


GRAD_FN = jax.value_and_grad(noisy_loss, has_aux=True)


def mesh_of(devices: int) -> Mesh:
    return sharding.mesh(devices=jax.devices()[:devices])


def start(name: str, mesh: Mesh) -> TrainState:
    return jax.jit(lambda: train.start(init(KEY), OPTIMIZERS[name]), out_shardings=sharding.replicated(mesh))()


def step_of(name: str, mesh: Mesh) -> Step:
    grad_fn = jax.value_and_grad(compute_in(jnp.float16, next_token), has_aux=True) if name == "float16" else GRAD_FN
    return fixed_order.make_step(grad_fn, OPTIMIZERS[name], KEY, batches(0, 1), mesh=mesh, slices=SLICES)


def run(name: str, mesh: Mesh) -> dict[str, Any]:
    """All that each step measures, and the fingerprints of the state after the last."""
    rows, measured = sharding.by_rows(mesh), list[dict[str, str]]()
    given = (sharding.place(own_rows(batch, rows), rows) for batch in batches(0, STEPS))
    state = start(name, mesh)
    for state, metrics in train.fit(step_of(name, mesh), state, given):  # noqa: B007
        measured.append({metric: float(value).hex() for metric, value in metrics.items()})
    return {"measured": measured, "state": fingerprints(state)}


@cache
def alone(name: str) -> dict[str, Any]:
    found = run(name, mesh_of(1))
    before, after = (float.fromhex(found["measured"][i]["loss"]) for i in (0, -1))
    assert after < 0.9 * before
    return found


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        pytest.param(name, devices, marks=[] if (name, devices) == ("adamw", 2) else pytest.mark.slow)
        for name in OPTIMIZERS
        for devices in (2, 4, 8)
    ],
)
def test_every_number_of_devices_has_the_same_bits(name: str, devices: int) -> None:
    assert run(name, mesh_of(devices)) == alone(name)


@pytest.mark.slow
def test_replicas_have_them() -> None:
    assert run("adamw", sharding.mesh(replica=2)) == alone("adamw")


@pytest.mark.slow
def test_without_a_fixed_order_they_differ() -> None:
    found: list[list[float]] = []
    for devices in (1, 8):
        mesh = mesh_of(devices)
        layout = sharding.lay_out(jax.eval_shape(init, KEY), mesh)
        grad_fn = grads.data_parallel(jax.value_and_grad(next_token, has_aux=True), layout)
        given = [sharding.place(batch, sharding.by_rows(mesh)) for batch in batches(0, 5)]
        taken = train.fit(train.make_step(grad_fn, OPTIMIZERS["adamw"], KEY), start("adamw", mesh), given)
        found.append([float(metrics[name]) for _, metrics in taken for name in ("loss", "grad_norm")])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def write_runs(folder: str) -> None:
    found = {name: run(name, sharding.mesh()) for name in IN_PROCESSES}
    if distributed.first():
        (Path(folder) / "runs.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (2, 4), (4, 2)])
def test_every_number_of_processes_has_them(processes: int, devices: int, tmp_path: Path) -> None:
    call_together(processes, devices, write_runs, tmp_path)
    assert json.loads((tmp_path / "runs.json").read_text()) == {name: alone(name) for name in IN_PROCESSES}


def test_a_step_is_that_of_whole_batches() -> None:
    mesh, (batch,), grad_fn = mesh_of(2), batches(0, 1), jax.value_and_grad(next_token, has_aux=True)
    step = fixed_order.make_step(grad_fn, OPTIMIZERS["adamw"], KEY, [batch], mesh=mesh, slices=SLICES)
    found, measured = step(start("adamw", mesh), sharding.place(batch, sharding.by_rows(mesh)))
    plain = jax.jit(train.make_step(grad_fn, OPTIMIZERS["adamw"], KEY))
    expected, metrics = plain(start("adamw", mesh_of(1)), batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), measured, metrics)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), found.params, expected.params)


def small_step(loss_fn: LossFn) -> tuple[Step, TrainState]:
    """Of one parameter, on two devices."""
    mesh, optimizer, grad_fn = mesh_of(2), optax.sgd(0.1), jax.value_and_grad(loss_fn, has_aux=True)
    step = fixed_order.make_step(grad_fn, optimizer, KEY, batches(0, 1), mesh=mesh, slices=SLICES)
    return step, jax.device_put(train.start({"w": jnp.ones(())}, optimizer), sharding.replicated(mesh))


def test_each_slice_has_a_key_of_its_own() -> None:
    def drawing(params: Params, _: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        return params["w"], Aux(jnp.ones(()), {"drawn": jax.random.uniform(key)})

    step, state = small_step(drawing)
    found = [float(metrics["drawn"]) for _, metrics in train.fit(step, state, batches(0, 2))]
    keys = [[jax.random.fold_in(jax.random.fold_in(KEY, step), i) for i in range(SLICES)] for step in range(2)]
    assert found == pytest.approx([np.mean([jax.random.uniform(key) for key in of]) for of in keys])


@pytest.mark.parametrize("place", ["host", "whole on each", "one device"])
def test_a_batch_may_lie_anywhere(place: str) -> None:
    def sum_of(params: Params, batch: Batch, _: jax.Array) -> tuple[jax.Array, Aux]:
        return params["w"] * batch["tokens"].sum(), Aux(jnp.ones(()), {})

    mesh, (batch,) = mesh_of(2), batches(0, 1)
    rows, whole = sharding.by_rows(mesh), sharding.replicated(mesh)
    where = {"host": None, "whole on each": whole, "one device": jax.devices()[1]}[place]
    given = batch if where is None else jax.device_put(batch, where)
    step, state = small_step(sum_of)
    found, expected = (step(state, x)[1] for x in (given, jax.device_put(batch, rows)))
    assert found == expected


def test_what_names_other_devices_is_refused() -> None:
    mesh, (batch,) = mesh_of(2), batches(0, 1)
    layout = sharding.lay_out(jax.eval_shape(init, KEY), mesh)
    muon = optim.muon(3e-3, matrices=models.matrices, stacked=models.stacked, bank_sharding=layout.banks)
    for grad_fn, optimizer in ((GRAD_FN, muon), (grads.data_parallel(GRAD_FN, layout), OPTIMIZERS["muon"])):
        state = jax.device_put(train.start(init(KEY), optimizer), sharding.replicated(mesh))
        step = fixed_order.make_step(grad_fn, optimizer, KEY, [batch], mesh=mesh, slices=SLICES)
        with pytest.raises(ValueError, match="names devices, but each runs on one; leave out data_parallel"):
            step(state, batch)


@pytest.mark.parametrize(
    ("model", "slices", "message"),
    [
        (1, 20, "20 slices on 8 devices; use a multiple of these"),
        (1, 4, "4 slices on 8 devices"),
        (1, 32, "32 slices of a batch of 16 rows; use a divisor of these"),
        (2, 16, "axes ['data', 'model']; use data, and perhaps replica"),
    ],
)
def test_what_has_no_fixed_order_is_refused(model: int, slices: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fixed_order.make_step(
            GRAD_FN, OPTIMIZERS["adamw"], KEY, batches(0, 1), mesh=sharding.mesh(model=model), slices=slices
        )


def test_a_state_that_is_divided_is_refused() -> None:
    mesh, optimizer, (batch,) = mesh_of(8), OPTIMIZERS["adamw"], batches(0, 1)
    layout = sharding.lay_out(jax.eval_shape(init, KEY), mesh, zero=1)
    state = jax.device_put(start("adamw", mesh), layout.state(optimizer))
    with pytest.raises(ValueError, match="doesn't lie whole on each device; lay it out with stage 0"):
        step_of("adamw", mesh)(state, sharding.place(batch, sharding.by_rows(mesh)))


def test_a_scale_that_the_loss_does_not_take_is_refused() -> None:
    mesh, (batch,) = mesh_of(1), batches(0, 1)
    step = fixed_order.make_step(GRAD_FN, OPTIMIZERS["float16"], KEY, [batch], mesh=mesh, slices=SLICES)
    with pytest.raises(ValueError, match="grad_fn takes no loss scale"):
        step(start("float16", mesh), sharding.place(batch, sharding.by_rows(mesh)))
