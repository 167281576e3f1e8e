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
from jaxlm.grads import takes_loss_scale
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
    devices and processes, with one kind of device and one version of JAX (on GPUs with
    `--xla_gpu_deterministic_ops=true`). Every device holds the gradients of all slices: it isn't made to be fast.

    Args:
        grad_fn: what to call on each slice, with whole parameters.
        optimizer: as for `train.make_step`.
        key: the key of the run.
        batches: one batch of each shape, or its shapes and shardings.
        mesh: devices along `data` and perhaps `replica`, which divide batches among them (`sharding.by_rows`); states
            lie whole on each, as `sharding.lay_out` has them with stage 0.
        slices: a multiple of the number of devices. It is part of what the bits depend on.

    Raises:
        ValueError: a mesh with `model`, slices that its devices don't divide or that don't divide a batch's rows; when
            called, a state that doesn't lie whole on all devices.
    """
    here, left_over = divmod(slices, mesh.devices.size)
    if sharding.MODEL in mesh.shape:
        raise ValueError(
            f"fixed_order: the mesh has {dict(mesh.shape)}, but sums along model have no order; leave it out"
        )
    if here < 1 or left_over:
        raise ValueError(f"fixed_order: {slices} slices on {mesh.devices.size} devices; use a multiple of these")
    for batch in (batches := [*batches]):
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
        return {"found": jax.tree.map(lambda *x: jnp.stack(x), *found)}

    @wraps(grad_fn)
    def added_up(_params: Params, batch: Batch, *_key_and_scale: jax.Array) -> Any:
        found = batch["found"]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), found)

        def add(total: Any, one: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one), None

        total, _ = jax.lax.scan(add, zeros, found)
        return jax.tree.map(lambda t, x: t.astype(x.dtype), total, found)

    first = {device: i.indices(slices)[0] for device, (i,) in rows.devices_indices_map((slices,)).items()}
    gather = jax.jit(lambda found: found, out_shardings=whole)
    update = jax.jit(train.make_step(added_up, optimizer, key))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not all(x.sharding.is_equivalent_to(whole, x.ndim) for x in jax.tree.leaves(state)):
            raise ValueError("fixed_order: the state doesn't lie whole on each device; lay it out with stage 0 of ZeRO")
        own, found = {device: _on(device, state) for device in whole.addressable_devices}, list[Batch]()
        for device in own:
            parts = enumerate(cut(_on(device, batch)), first[device])
            found.append(stack(*(find(own[device], part, number) for number, part in parts)))
        gathered = gather(_as_one(found, rows))
        return _as_one([update(own[device], _on(device, gathered)) for device in own], whole)

    return Compiled({signature(batch): step for batch in batches})


def _on(device: Any, arrays: Any) -> Any:
    """What a device has of them."""
    return jax.tree.map(lambda x: next(shard.data for shard in x.addressable_shards if shard.device == device), arrays)


def _as_one(parts: list[Any], where: NamedSharding) -> Any:
    """One array of what lies on each device."""

    def join(*x: jax.Array) -> jax.Array:
        shape = x[0].shape if where.is_fully_replicated else (len(where.device_set) * x[0].shape[0], *x[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, where, [*x])

    return jax.tree.map(join, *parts)
