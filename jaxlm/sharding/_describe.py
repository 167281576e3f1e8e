"""What a layout costs, before anything is compiled."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxlm import hlo, tree
from jaxlm.sharding._layout import Layout, undivided
from jaxlm.sharding._mesh import data_axes


class Transfer(NamedTuple):
    """Operations of one kind between devices in a step. Gathers are in the dtype of use, reductions in float32."""

    kind: str
    """`all-gather`, `reduce-scatter` or `all-reduce`."""
    names: list[str]
    """The parameters; XLA may join their arrays."""
    times: int
    """How often in a step."""
    nbytes: int
    """Of all the whole arrays on one device, once."""
    devices: int
    """Among which they are sent; along parts of `data` one after another, which sends as much."""

    @property
    def sent(self) -> float:
        """The bytes that each device sends in a step, by the ring algorithm."""
        return self.times * hlo.sent(self.kind, self.nbytes, self.devices)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a layout costs on each device. `str` makes a table of it."""

    title: str
    nbytes: dict[str, int]
    """Of what lies on each device: `parameters` and `optimizer state` always; during the step also those in use,
    rounded and brought together, and gradients, of which XLA may send some before it makes others."""
    transfers: list[Transfer]
    """What `grads.data_parallel` sends; not what the optimizer reduces, nor activations over `model`."""
    whole: dict[str, str]
    """What isn't divided over `data`, and why, by name."""

    def __str__(self) -> str:
        lines = [self.title, *(f"  {name:<28}{_size(size):>10}" for name, size in self.nbytes.items() if size)]
        for t in self.transfers:
            times = f"{t.times} times " if t.times > 1 else ""
            lines.append(f"  {t.kind:<28}{_size(t.nbytes):>10}  {times}of {len(t.names)} arrays: {_size(t.sent)} sent")
        for reason in dict.fromkeys(self.whole.values()):
            names = [name for name, why in self.whole.items() if why == reason]
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"  whole, {reason}: {', '.join(names[:4])}{more}")
        return "\n".join(lines)


def _size(nbytes: int | float) -> str:
    for unit, digits in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= digits:
            return f"{nbytes / digits:,.2f} {unit}"
    return f"{nbytes / 1e3:,.2f} kB"


def describe(
    layout: Layout,
    optimizer: optax.GradientTransformation,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    microbatches: int = 1,
) -> Description:
    """What each device holds and sends in a step, activations aside.

    Args:
        layout: what `lay_out` returns.
        optimizer: the whole chain.
        dtype: that of `grads.data_parallel`: what parameters are rounded to where they are used.
        microbatches: that of `grads.data_parallel`.
    """
    mesh = layout.mesh
    data, replicas = math.prod(mesh.shape[axis] for axis in data_axes(mesh)), mesh.shape.get("replica", 1)
    shapes, specs = tree.named_leaves(layout.shapes), tree.named_leaves(layout.specs)
    by_layer = tree.named_leaves(layout.by_layer)
    divided = {name: layout.data in spec for name, spec in specs.items()}

    def own(x: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

    def width(name: str, dtype: Any) -> int:
        """The bytes of a parameter in a dtype, of the part along `model` that a device has."""
        along_model = mesh.shape.get("model", 1) if "model" in specs[name] else 1
        return shapes[name].size // along_model * jnp.dtype(dtype).itemsize

    def used(name: str) -> int:
        return width(name, dtype or shapes[name].dtype)

    def casts(name: str) -> bool:
        return used(name) != width(name, shapes[name].dtype)

    def exact(name: str) -> int:
        return width(name, jnp.float32)

    top = [name for name in shapes if divided[name] and not by_layer[name]]
    layered = [name for name in shapes if by_layer[name]]
    whole = [name for name in shapes if not divided[name]]
    one_layer = sum(used(name) // shapes[name].shape[0] for name in layered)
    # In float32, over microbatches; those of one are made in the dtype of use.
    sums = sum(
        exact(name) // (data if divided[name] and (layout.zero > 1 or microbatches == 1) else 1) for name in shapes
    )
    state = jax.eval_shape(optimizer.init, layout.shapes)
    state_shardings = layout.state(optimizer).opt_state
    nbytes = {
        "parameters": sum(own(shapes[name], NamedSharding(mesh, specs[name])) for name in shapes),
        "optimizer state": sum(jax.tree.leaves(jax.tree.map(own, state, state_shardings))),
        "parameters in use": sum(map(used, top)) + one_layer + sum(used(name) for name in whole if casts(name)),
        "gradients, at most": sum(map(used, [*top, *whole])) + one_layer + sums,
    }

    def transfer(kind: str, names: list[str], nbytes: Callable[[str], int], times: int, devices: int) -> Transfer:
        return Transfer(kind, names, times, sum(map(nbytes, names)), devices)

    in_loop = microbatches if layout.zero > 1 else 1
    transfers = [
        transfer("all-gather", top, used, 1, data),
        transfer("all-gather", layered, used, 2 * microbatches, data),
        transfer("reduce-scatter", top, exact, in_loop, data),
        transfer("reduce-scatter", layered, exact, microbatches, data),
        transfer("all-reduce", whole, exact, 1, data * replicas),
        transfer("all-reduce", [*top, *layered], lambda name: exact(name) // data, 1, replicas),
    ]
    stacked = tree.named_leaves(layout.stacked)
    reasons = {
        name: "a vector" if len(shapes[name].shape) - stacked[name] < 2 else f"no dimension that {data} divides is free"
        for name in (undivided(layout) if layout.zero and data > 1 else ())
    }
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    title = f"{tree.size(layout.shapes):,} parameters, {mesh.size} devices ({axes}), ZeRO {layout.zero}; on each:"
    return Description(title, nbytes, [t for t in transfers if t.names and t.devices > 1], reasons)
