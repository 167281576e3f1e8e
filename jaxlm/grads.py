"""Wrappers of `GradFn`. The first one is made by `jax.value_and_grad(loss_fn, has_aux=True)`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxlm.types import Aux, Batch, GradFn, Params


def accumulate(grad_fn: GradFn, microbatches: int) -> GradFn:
    """Adds up the gradients of a batch's slices, one slice at a time.

    The result is that of the whole batch, however the real tokens fall among the slices, for the memory of a single
    slice. Gradients add up in float32 and come out in their own dtype.

    Args:
        grad_fn: what to call on each slice. Each call has a key of its own.
        microbatches: how many slices of consecutive rows to cut the batch into.

    Raises:
        ValueError: less than one microbatch, or (when traced) a batch whose rows they don't divide.
    """
    if microbatches < 1:
        raise ValueError(f"accumulate: {microbatches} microbatches; use 1 or more")
    if microbatches == 1:
        return grad_fn

    def accumulated(params: Params, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, Aux], Params]:
        rows = batch["tokens"].shape[0]
        if rows % microbatches:
            raise ValueError(
                f"accumulate: a batch of {rows} rows is not divisible into {microbatches} microbatches; "
                f"use a divisor of {rows}, or a token budget of a multiple of {microbatches} rows"
            )
        slices = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
        keys = jax.random.split(key, microbatches)
        sums = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], slices), key)

        def add(total: Any, slice_and_key: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda t, x: t + x, total, grad_fn(params, *slice_and_key)), None

        zeros = jax.tree.map(lambda s: jnp.zeros_like(s, jnp.float32), sums)  # on each device its own, if the sums are
        total, _ = jax.lax.scan(add, zeros, (slices, keys))
        return jax.tree.map(lambda t, s: t.astype(s.dtype), total, sums)

    return accumulated


def data_parallel(grad_fn: GradFn, mesh: Mesh, axis: str = "data") -> GradFn:
    """Gives each device an equal share of the batch's rows, and adds up what they find.

    As everything that a `GradFn` returns is a sum, the result is exactly that of the whole batch. Each device has a
    key of its own.

    Place the state whole on every device (`sharding.replicated`) before the first step; else the step is compiled again
    for the second.

    Args:
        grad_fn: what each device calls on its rows.
        mesh: the devices.
        axis: the mesh axis that rows are divided over; parameters are whole on every device.

    Raises:
        ValueError: the mesh has no such axis, or (when traced) a batch whose rows its devices don't divide.
    """
    if axis not in mesh.shape:
        raise ValueError(f"data_parallel: the mesh has axes {list(mesh.shape)}, not {axis!r}")
    devices = mesh.shape[axis]
    whole, divided = PartitionSpec(), PartitionSpec(axis)

    def on_each_device(params: Params, batch: Batch, key: jax.Array) -> Any:
        # Differentiating an array that is the same everywhere would add up its gradients at each use, so in every
        # microbatch; one that may differ is added up once, below.
        params = jax.tree.map(lambda p: jax.lax.pcast(p, axis, to="varying"), params)
        return jax.lax.psum(grad_fn(params, batch, jax.random.fold_in(key, jax.lax.axis_index(axis))), axis)

    parallel = jax.shard_map(on_each_device, mesh=mesh, in_specs=(whole, divided, whole), out_specs=whole)

    def checked(params: Params, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, Aux], Params]:
        rows = batch["tokens"].shape[0]
        if rows % devices:
            raise ValueError(
                f"data_parallel: a batch of {rows} rows is not divisible over {devices} devices; "
                f"use a token budget of a multiple of {devices} rows"
            )
        return parallel(params, batch, key)

    return checked
