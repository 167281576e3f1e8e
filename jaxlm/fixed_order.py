"""A step whose bits don't depend on the number of devices, to find out why two runs differ."""

from collections.abc import Iterable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxlm import sharding, train
from jaxlm.compiled import Compiled, signature
from jaxlm.grads import accumulate, takes_loss_scale
from jaxlm.optim import loss_scaling
from jaxlm.types import Batch, GradFn, Metrics, Params, TrainState


def make_step(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batches: Iterable[Batch],
    *,
    mesh: Mesh,
    slices: int,
) -> Compiled:
    """A step in place of those of `train.make_step`, with the order of all sums fixed; `train.fit` takes it as it is.

    A batch is cut into slices of consecutive rows, as many on one device as on all, with a key for each. Each is
    computed by the same program for one device; then every device adds up what was found of all of them, in their
    order, and takes the whole optimizer step by itself. So metrics and states are the same to the bit on any number of
    devices and processes, with one kind of device and one version of JAX; on CPUs with several threads or with one
    (NPROC) in all runs; on GPUs, where it wasn't tried, with `--xla_gpu_deterministic_ops=true`. It isn't made to be
    fast: every device holds the gradients of all slices, nothing is donated, and programs are compiled for each device.

    Args:
        grad_fn: what to call on each slice, with whole parameters: what `grads.data_parallel` would get. Metrics are
            added up over slices, which those of `grads.leaf_norms` don't allow.
        optimizer: as for `train.make_step`, but without shardings, such as a `bank_sharding` of Muon.
        key: the key of the run.
        batches: one whole batch of each shape, or its shapes and shardings.
        mesh: devices along `data` and perhaps `replica`, which divide batches among them (`sharding.by_rows`); states
            lie whole on each, as `sharding.lay_out` has them with stage 0.
        slices: a multiple of the number of devices. It is part of what the bits depend on.

    Raises:
        ValueError: a mesh with other axes, slices that its devices don't divide or that don't divide a batch's rows;
            when called, a state that doesn't lie whole on all devices, or a gradient function or optimizer that has
            more of them in mind.
    """
    here, left_over = divmod(slices, mesh.devices.size)
    if {*mesh.shape} != {*sharding.row_axes(mesh)}:
        raise ValueError(f"fixed_order: the mesh has axes {[*mesh.shape]}; use data, and perhaps replica")
    if here < 1 or left_over:
        raise ValueError(f"fixed_order: {slices} slices on {mesh.devices.size} devices; use a multiple of these")
    for batch in (batches := [jax.eval_shape(lambda x: x, batch) for batch in batches]):
        if (count := batch["tokens"].shape[0]) % slices:
            raise ValueError(f"fixed_order: {slices} slices of a batch of {count} rows; use a divisor of these")
    rows, whole = sharding.by_rows(mesh), sharding.replicated(mesh)

    @jax.jit
    def cut(batch: Batch) -> list[Batch]:
        def part(i: int) -> Batch:
            return jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:])[i], batch)

        return [*map(part, range(here))]

    @jax.jit
    def find(state: TrainState, batch: Batch, number: jax.typing.ArrayLike) -> Any:
        scaling = loss_scaling(state.opt_state) if takes_loss_scale(grad_fn) else None
        own_key = jax.random.fold_in(jax.random.fold_in(key, state.step), number)
        return grad_fn(state.params, batch, own_key, *((scaling.loss_scale,) if scaling else ()))

    @jax.jit
    def stack(*found: Any) -> Batch:
        # `accumulate` takes the number of rows from the tokens.
        return {"tokens": jnp.arange(here), "found": jax.tree.map(lambda *x: jnp.stack(x), *found)}

    @wraps(grad_fn)
    def found_of(_params: Params, batch: Batch, *_key_and_scale: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[0], batch["found"])

    first = {device: i.indices(slices)[0] for device, (i,) in rows.devices_indices_map((slices,)).items()}
    gather = jax.jit(lambda found: found, out_shardings=whole)
    update = jax.jit(train.make_step(accumulate(found_of, slices), optimizer, key))

    def on_each(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own, found = {device: _on(device, state) for device in whole.addressable_devices}, list[Batch]()
        for device in own:
            parts = enumerate(cut(_on(device, batch)), first[device])
            found.append(stack(*(find(own[device], part, number) for number, part in parts)))
        gathered = gather(_as_one(found, rows))
        return _as_one([update(own[device], _on(device, gathered)) for device in own], whole)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not all(x.sharding.is_equivalent_to(whole, x.ndim) for x in jax.tree.leaves(state)):
            raise ValueError("fixed_order: the state doesn't lie whole on each device; lay it out with stage 0 of ZeRO")
        try:
            return on_each(state, jax.device_put(batch, rows))
        except ValueError as error:
            if "incompatible devices" not in str(error):
                raise
            raise ValueError(
                "fixed_order: grad_fn or the optimizer names devices, but each runs on one; leave out data_parallel, "
                "bank_sharding and the like"
            ) from error

    return Compiled({signature(batch): step for batch in batches})


def _on(device: Any, arrays: Any) -> Any:
    """What a device has of them, as arrays that know of no other."""

    def part(x: jax.Array) -> jax.Array:
        return jax.device_put(next(shard.data for shard in x.addressable_shards if shard.device == device), device)

    return jax.tree.map(part, arrays)


def _as_one(parts: list[Any], where: NamedSharding) -> Any:
    """One array of what lies on each device."""

    def join(*x: jax.Array) -> jax.Array:
        shape = x[0].shape if where.is_fully_replicated else (len(where.device_set) * x[0].shape[0], *x[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, where, [*x])

    return jax.tree.map(join, *parts)
