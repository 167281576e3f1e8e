"""Meshes, and how batches lie on them."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import tree

MODEL: Final = "model"
"""The axis that matrices are divided over by rules, as Megatron-LM does (https://arxiv.org/abs/1909.08053)."""


def mesh(
    replica: int = 1, data: int | tuple[int, ...] = -1, model: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes `replica`, `data` and `model`, neighbours along `model` being the closest.

    On TPUs, where `data` fills a box of more than one dimension, it is several axes, one for each dimension: `data0`,
    `data1` and so on. What is divided over `data` travels along one after another, which sends as many bytes; of a
    reduce-scatter along all at once XLA makes an all-reduce on most slices, which sends twice as many.

    Args:
        replica: copies of all that lies along the other two, such as one in each slice or island of fast links; rows
            are divided over them too.
        data: devices that divide parameters, optimizer state and rows among them; -1: as many as there are; several
            sizes: the axes to make of it, the outermost first, whatever the devices.
        model: devices that divide each matrix product among them.
        devices: all of them by default. They are put in an order that suits how they are connected.

    Returns:
        A mesh; of axes of size 1 it has `data` alone.

    Raises:
        ValueError: the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    data = max(1, len(devices) // max(1, model * replica)) if data == -1 else data
    sizes = {"replica": replica, "data": data, MODEL: model}
    shape = (replica, *(data if isinstance(data, tuple) else (data,)), model)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh: {' x '.join(f'{name} {size}' for name, size in sizes.items())} isn't the number of devices, "
            f"{len(devices)}; choose sizes of 1 or more whose product it is"
        )
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if replica == len(slices) > 1:
        between = (replica, *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), between, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu" and isinstance(data, int):
        grid = _by_dimension(grid)
    parts = {f"data{i}": size for i, size in enumerate(size for size in grid.shape[1:-1] if size > 1)}
    parts = parts if len(parts) > 1 else {"data": math.prod(parts.values())}
    axes = {"replica": replica, **parts, MODEL: model}
    kept = {name: size for name, size in axes.items() if size > 1 or name == "data"}
    return Mesh(grid.reshape([*kept.values()]), [*kept], axis_types=(AxisType.Auto,) * len(kept))


def _by_dimension(grid: np.ndarray) -> np.ndarray:
    """TPUs `[R D M]` as `[R D0 D1 ... M]`, if those along D fill a box of D0 x D1 x ..."""
    places = [(*device.coords, device.core_on_chip) for device in grid[0, :, 0]]
    box = [len(set(along)) for along in zip(*places, strict=True)]
    if math.prod(box) != len(places):
        return grid
    order = sorted(range(len(places)), key=places.__getitem__)
    return grid[:, order].reshape(len(grid), *box, -1)


def data_axes(mesh: Mesh) -> tuple[str, ...]:
    """Those of the mesh's axes that parameters are divided over: `data`, or its parts, the outermost first."""
    return tuple(axis for axis in mesh.shape if axis.startswith("data"))


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """Those of the mesh's axes that rows are divided over: `replica`, if there is one, and those of `data`."""
    return tuple(axis for axis in ("replica", *data_axes(mesh)) if axis in mesh.shape)


def by_rows(mesh: Mesh) -> NamedSharding:
    """A batch: its rows divided over all devices, but for those along `model`, which have the same."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def share(rows: NamedSharding, own: Collection[Any] | None = None) -> tuple[tuple[int, ...], int]:
    """(parts, n): of any batch a process has these of n equal parts of its rows, counted from 0.

    Args:
        rows: what `by_rows` makes.
        own: the devices of the process; None: those of this one.
    """
    devices = len(rows.device_set)
    begins = {device: i.indices(devices)[0] for device, (i,) in rows.devices_indices_map((devices,)).items()}
    all_parts = sorted(set(begins.values()))
    parts = sorted({begins[device] for device in own or rows.addressable_devices})
    if parts == all_parts:
        return (0,), 1
    return tuple(all_parts.index(part) for part in parts), len(all_parts)


def place(batch: Mapping[str, Any], rows: NamedSharding) -> dict[str, Any]:
    """Puts a batch onto the devices, with no communication.

    Args:
        batch: this process' share of it (`share`): arrays whose first axis are rows, and what is static.
        rows: what `by_rows` makes.

    Raises:
        ValueError: integers beyond 32 bits, which JAX would cut off.
    """
    tree.check_integers(batch)
    parts, of = share(rows)

    def put(x: np.ndarray) -> jax.Array:
        each = len(x) // len(parts)

        def on_device(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(each * of)
            own = parts.index(begin // each) * each + begin % each
            return x[own : own + end - begin]

        return jax.make_array_from_callback((each * of, *x.shape[1:]), rows, on_device)

    return jax.tree.map(put, dict(batch))


def to_host(arrays: Any) -> Any:
    """The whole of each array as NumPy's, in every process; no device holds more than one of them whole at a time.

    All processes must call it.
    """
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), arrays)
