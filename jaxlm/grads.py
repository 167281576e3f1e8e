"""Wrappers of `GradFn`. The first one is made by `jax.value_and_grad(loss_fn, has_aux=True)`.

They pass on a fourth argument, `loss_scale`, for what computes in float16: see `precision.scale_loss`.
"""

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm import tree
from jaxlm.numbers import check_whole
from jaxlm.sharding import MODEL, Layout, data_axes, row_axes
from jaxlm.types import Aux, Batch, GradFn, LossFn, Params

T = TypeVar("T")


def accumulate(grad_fn: GradFn, microbatches: int) -> GradFn:
    """Adds up the gradients of a batch's slices, one slice at a time.

    The result is that of the whole batch, however the real tokens fall among the slices, for the memory of a single
    slice. Gradients add up in float32 and come out in their own dtype.

    Args:
        grad_fn: what to call on each slice. Each call has a key of its own.
        microbatches: how many slices of consecutive rows to cut the batch into.

    Raises:
        ValueError: `microbatches` isn't 1 or more, or (when traced) a batch whose rows they don't divide.
    """
    check_whole("accumulate", microbatches=microbatches)
    if microbatches == 1:
        return grad_fn

    @wraps(grad_fn)
    def accumulated(
        params: Params, batch: Batch, key: jax.Array, *loss_scale: jax.Array
    ) -> tuple[tuple[jax.Array, Aux], Params]:
        rows = batch["tokens"].shape[0]
        if rows % microbatches:
            raise ValueError(
                f"accumulate: a batch of {rows} rows is not divisible into {microbatches} microbatches; "
                f"use a divisor of {rows}, or a token budget of a multiple of {microbatches} rows"
            )
        slices = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
        keys = jax.random.split(key, microbatches)
        sums = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], slices), key, *loss_scale)

        def add(total: Any, slice_and_key: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda t, x: t + x, total, grad_fn(params, *slice_and_key, *loss_scale)), None

        zeros = jax.tree.map(lambda s: tree.vary_like(jnp.zeros(s.shape, jnp.float32), s), sums)
        total, _ = jax.lax.scan(add, zeros, (slices, keys))
        return jax.tree.map(lambda t, s: t.astype(s.dtype), total, sums)

    return accumulated


def leaf_norms(grad_fn: GradFn) -> GradFn:
    """Adds the L2 norm of each leaf's gradient to the metrics, as `norm/` with the leaf's name.

    They are of the sums, as all that a gradient function returns, so a step's division makes them the mean's. It is
    meant to be outermost, around `data_parallel` and `accumulate`: norms don't add up.
    """

    @wraps(grad_fn)
    def with_norms(
        params: Params, batch: Batch, key: jax.Array, *loss_scale: jax.Array
    ) -> tuple[tuple[jax.Array, Aux], Params]:
        (loss_sum, aux), grads = grad_fn(params, batch, key, *loss_scale)
        norms = {f"norm/{name}": tree.norm(leaf) for name, leaf in tree.named_leaves(grads).items()}
        return (loss_sum, Aux(aux.weight_sum, {**aux.metrics, **norms})), grads

    return with_norms


def takes_loss_scale(function: Callable[..., Any]) -> bool:
    """Whether a loss or gradient function takes a fourth argument, as what `precision.scale_loss` makes does."""
    try:
        inspect.signature(function).bind(None, None, None, None)
    except TypeError:
        return False
    return True


def data_parallel(
    grad_fn: GradFn, layout: Layout, *, dtype: jax.typing.DTypeLike | None = None, microbatches: int = 1
) -> GradFn:
    """Gives each device an equal share of the batch's rows, and adds up what they find.

    As everything that a `GradFn` returns is a sum, the result is exactly that of the whole batch. Parameters come and
    gradients leave as the layout has them. Per step and divided parameter there is one all-gather, in `dtype`, and one
    reduce-scatter, in float32; with stage 2 a reduce-scatter, with stage 3 all of that, in each microbatch. Whole
    parameters have one all-reduce. Where `data` is several axes, a gather or scatter is one along each of them in turn.

    Begin with a state that lies as `layout.state(optimizer)` says.

    Args:
        grad_fn: what each device calls on its rows, with whole parameters; those that the layout has brought together
            by layer it gets as they lie, and `gather_layers` must do so. Each device has a key of its own.
        layout: what `sharding.lay_out` returns.
        dtype: what parameters are rounded to where they are used, before they travel; None: they aren't. float16 needs
            the gradient of what `precision.scale_loss` makes.
        microbatches: slices of each device's rows, as in `accumulate`.

    Raises:
        ValueError: less than one microbatch, float16 without a scaled loss, or (when traced) a batch whose rows can't
            be divided so.
    """
    if dtype is not None and jnp.dtype(dtype) == jnp.float16 and not takes_loss_scale(grad_fn):
        raise ValueError(
            "data_parallel: gradients underflow float16; wrap the loss in precision.scale_loss and the optimizer in "
            "optim.dynamic_loss_scale, or use bfloat16"
        )
    in_place = jax.tree.map(lambda spec, by_layer: by_layer or layout.data not in spec, layout.specs, layout.by_layer)

    def scattered(grad_fn: GradFn) -> GradFn:
        def to_shards(params: Params, *args: Any) -> tuple[tuple[jax.Array, Aux], Params]:
            sums, grads = grad_fn(params, *args)
            return sums, jax.tree.map(
                lambda g, spec, ready: g if ready else _scatter(g, spec, layout), grads, layout.specs, in_place
            )

        return to_shards

    def local(
        params: Params, batch: Batch, key: jax.Array, *loss_scale: jax.Array
    ) -> tuple[tuple[jax.Array, Aux], Params]:
        sums, grads = grad_fn(params, batch, key, *loss_scale)

        def true(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
            wide = _along_model(lambda x: x.astype(jnp.float32), spec)(grad)
            return wide / loss_scale[0] if loss_scale and grad.dtype == jnp.float16 else wide

        return sums, jax.tree.map(true, grads, layout.specs)

    if layout.zero < 2:
        found = scattered(accumulate(local, microbatches))
    else:
        found = accumulate(scattered(local), microbatches)

    def on_each_device(
        params: Params, batch: Batch, key: jax.Array, *loss_scale: jax.Array
    ) -> tuple[tuple[jax.Array, Aux], Params]:
        sums, grads = found(_brought_together(params, layout, dtype), batch, _own_key(key, layout), *loss_scale)

        def add_up(grad: jax.Array, param: jax.Array, spec: PartitionSpec) -> jax.Array:
            axes = _same_on(spec, layout)
            return (_along_model(lambda x: jax.lax.psum(x, axes), spec)(grad) if axes else grad).astype(param.dtype)

        return jax.lax.psum(sums, row_axes(layout.mesh)), jax.tree.map(add_up, grads, params, layout.specs)

    return wraps(grad_fn)(_on_rows(on_each_device, layout, (PartitionSpec(), _over_rows(layout)), microbatches))


def parallel_loss(loss_fn: LossFn, layout: Layout, *, dtype: jax.typing.DTypeLike | None = None) -> LossFn:
    """A loss alone in the same way: what `data_parallel` is for gradients, for evaluation.

    Args:
        loss_fn: what each device calls on its rows.
        layout: what `sharding.lay_out` returns.
        dtype: what parameters are rounded to where they are used; None: they aren't.

    Raises:
        ValueError: when traced, a batch whose rows the devices don't divide.
    """

    def on_each_device(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        sums = loss_fn(_brought_together(params, layout, dtype), batch, _own_key(key, layout))
        return jax.lax.psum(sums, row_axes(layout.mesh))

    return _on_rows(on_each_device, layout, PartitionSpec(), 1)


def gather_layers(
    layout: Layout,
    name: str,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    policy: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Brings a layer's parameters together right before it is computed: for stage 3, inside the model.

    Each is gathered in `dtype`, and its gradient reduce-scattered in float32, where the layer is computed. For the
    backward pass it is gathered again rather than kept, by `jax.checkpoint`; to compute the layer again too, give this
    its policy rather than call that once more.

    Args:
        layout: what `sharding.lay_out` returned for the whole model.
        name: of the subtree that holds the stacked layers, such as `"blocks"`.
        dtype: what parameters are rounded to before they travel; None: they aren't. Give `data_parallel` the same.
        policy: what else to keep for the backward pass, such as `models.remat_policy("dots")` or one of
            `jax.checkpoint_policies`; None: everything but the parameters.

    Returns:
        A wrapper of the function `layer(params, *args)`, whose parameters are a pytree with as many leaves, in the same
        order, as the subtree: what `models.transformer` takes as `wrap_layer`.

    Raises:
        ValueError: the layout has no such subtree.
    """
    if name not in layout.specs:
        raise ValueError(f"gather_layers: the parameters have no {name!r}, only {sorted(layout.specs)}")
    specs = [PartitionSpec(*spec[1:]) for spec in jax.tree.leaves(layout.specs[name])]
    by_layer = jax.tree.leaves(layout.by_layer[name])

    def gather(params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        whole = [
            _gathered(x, spec, layout, dtype) if gathers else _cast(x, dtype)
            for x, spec, gathers in zip(leaves, specs, by_layer, strict=True)
        ]
        return structure.unflatten(whole)

    def wrap(layer: Callable[..., T]) -> Callable[..., T]:
        def gathering(params: Any, *args: Any) -> T:
            return layer(gather(params), *args)

        return jax.checkpoint(gathering, policy=policy or _keep_activations)

    return wrap


def _keep_activations(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: everything is kept but what is gathered and what only rearranges it."""
    rearranging = "shard_map", "sharding_constraint", "convert_element_type", "reshape", "transpose", "squeeze"
    return primitive.name not in ("all_gather", *rearranging)


def _brought_together(params: Params, layout: Layout, dtype: jax.typing.DTypeLike | None) -> Params:
    """What the function on one device gets: everything whole, but for what it brings together itself."""

    def whole(param: jax.Array, spec: PartitionSpec, by_layer: bool) -> jax.Array:
        # Differentiating an array that is the same everywhere would add up its gradients at each use, so in every
        # microbatch; one that may differ is added up once.
        same_on = _same_on(spec, layout)
        param = jax.lax.pcast(param, same_on, to="varying") if same_on else param
        if by_layer:
            return param
        return _gather(param, spec, layout, dtype) if layout.data in spec else _cast(param, dtype)

    return jax.tree.map(whole, params, layout.specs, layout.by_layer)


def _same_on(spec: PartitionSpec, layout: Layout) -> tuple[str, ...]:
    """The axes along which a parameter is the same, of those that rows are divided over."""
    divided = data_axes(layout.mesh) if layout.data in spec else ()
    return tuple(axis for axis in row_axes(layout.mesh) if axis not in divided)


def _gather(param: jax.Array, spec: PartitionSpec, layout: Layout, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    def gather(x: jax.Array) -> jax.Array:
        for axis in reversed(data_axes(layout.mesh)):
            x = jax.lax.all_gather(x, axis, axis=spec.index(layout.data), tiled=True)
        return x

    return _along_model(gather, spec)(_cast(param, dtype))


def _scatter(grad: jax.Array, spec: PartitionSpec, layout: Layout) -> jax.Array:
    dimension, axes = spec.index(layout.data), data_axes(layout.mesh)
    sizes = [layout.mesh.shape[axis] for axis in axes]

    def scatter(x: jax.Array) -> jax.Array:
        if len(axes) == 1:
            return jax.lax.psum_scatter(x, axes[0], scatter_dimension=dimension, tiled=True)
        # Every device's part as a matrix, one after another: of some other shapes XLA:TPU makes all-reduces.
        parts = x.reshape(*x.shape[:dimension], math.prod(sizes), -1, *x.shape[dimension + 1 :])
        parts = jnp.moveaxis(parts, dimension, 0)
        shape = parts.shape[1:]
        for axis, size in zip(axes, sizes, strict=True):
            parts = jax.lax.psum_scatter(parts.reshape(size, -1, shape[-1]), axis)
        return parts.reshape(shape)

    # Behind the barrier, lest XLA add up the microbatches' whole gradients first, as it does on TPUs.
    return jax.lax.optimization_barrier(_along_model(scatter, spec)(grad.astype(jnp.float32)))


def _gathered(param: jax.Array, spec: PartitionSpec, layout: Layout, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    """`_gather` with a gradient that adds up in float32; its own would do so in `dtype`."""

    @jax.custom_vjp
    def gather(param: jax.Array) -> jax.Array:
        return _gather(param, spec, layout, dtype)

    def forward(param: jax.Array) -> tuple[jax.Array, None]:
        return _gather(param, spec, layout, dtype), None

    def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
        return (_scatter(grad, spec, layout).astype(param.dtype),)

    gather.defvjp(forward, backward)
    return gather(param)


def _cast(param: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    return param if dtype is None or not jnp.issubdtype(param.dtype, jnp.floating) else param.astype(dtype)


def _along_model(function: Callable[[jax.Array], jax.Array], spec: PartitionSpec) -> Callable[[jax.Array], jax.Array]:
    """Calls a function of an array with the part along `model` that a device has; XLA would gather the parts first."""
    if MODEL not in spec:
        return function
    part = PartitionSpec(*(axis if axis == MODEL else None for axis in spec))
    return jax.shard_map(function, in_specs=part, out_specs=part, axis_names={MODEL})


def _over_rows(layout: Layout) -> Params:
    """How parameters are divided over the axes that `_on_rows` is written out for."""
    return jax.tree.map(lambda spec: PartitionSpec(*(None if axis == MODEL else axis for axis in spec)), layout.specs)


def _own_key(key: jax.Array, layout: Layout) -> jax.Array:
    return jax.random.fold_in(key, jax.lax.axis_index(row_axes(layout.mesh)))


def _on_rows(function: Callable[..., T], layout: Layout, out_specs: Any, microbatches: int) -> Callable[..., T]:
    """Runs `function(params, batch, key)` on each device with its rows."""
    rows_spec = PartitionSpec(row_axes(layout.mesh))
    devices = math.prod(layout.mesh.shape[axis] for axis in row_axes(layout.mesh))

    def checked(params: Params, batch: Batch, key: jax.Array, *loss_scale: jax.Array) -> T:
        rows = batch["tokens"].shape[0]
        if rows % (devices * microbatches):
            slices = f" in {microbatches} microbatches" if microbatches > 1 else ""
            raise ValueError(
                f"data_parallel: a batch of {rows} rows is not divisible over {devices} devices{slices}; "
                f"use a token budget of a multiple of {devices * microbatches} rows"
            )
        parallel = jax.shard_map(
            function,
            mesh=layout.mesh,
            in_specs=(_over_rows(layout), rows_spec, PartitionSpec(), *[PartitionSpec()] * len(loss_scale)),
            out_specs=out_specs,
            axis_names=set(row_axes(layout.mesh)),
        )
        return parallel(params, batch, key, *loss_scale)

    return checked
