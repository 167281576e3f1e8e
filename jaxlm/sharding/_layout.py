"""How parameters and optimizer state lie on a mesh.

ZeRO (https://arxiv.org/abs/1910.02054) is a layout here: parameters and optimizer state are divided over the devices
that share the rows of a batch, `grads.data_parallel` brings parameters together where they are used and gradients to
where they are needed, and the optimizer, in plain `jax.jit`, sees global arrays: any optax chain keeps its meaning.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import tree
from jaxlm.sharding._mesh import MODEL, data_axes, replicated, row_axes
from jaxlm.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run lies on a mesh. `lay_out` makes it."""

    mesh: Mesh
    zero: int
    """ZeRO's stage, see `lay_out`."""
    shapes: Params
    """The parameters' shapes and dtypes."""
    specs: Params
    """A PartitionSpec for each parameter: how it lies between steps, and so its gradient and optimizer state."""
    stacked: Params
    """A bool for each parameter: whether it holds the layers' one after another."""

    @property
    def data(self) -> str | tuple[str, ...]:
        """What a spec has for a dimension that is divided over `data`: one axis of the mesh, or all its parts."""
        return PartitionSpec(data_axes(self.mesh))[0]

    @property
    def by_layer(self) -> Params:
        """A bool for each parameter: whether the model brings it together layer by layer, as stage 3 does."""
        return jax.tree.map(
            lambda is_stacked, spec: self.zero == 3 and is_stacked and self.data in spec, self.stacked, self.specs
        )

    @property
    def params(self) -> Params:
        """A sharding for each parameter."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs)

    @property
    def banks(self) -> NamedSharding:
        """Of what is worked on matrix by matrix, each on one device: for Muon's `bank_sharding`.

        With stage 0 every device works on all of them: to bring the results together would send more than a step does.
        """
        return NamedSharding(self.mesh, PartitionSpec(self.data) if self.zero else PartitionSpec())

    def state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """A sharding for each array of a `TrainState`: what the optimizer keeps of a parameter lies as that does.

        Works for any transformation: `init` is traced with types that say how each array is divided, and what it makes
        of them says so too. Where they don't fit, as in a reshape of what is divided, an array with the name and the
        shape of a parameter lies as that does, and any other lies whole on every device.

        Args:
            optimizer: the whole chain.
        """
        typed = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=(AxisType.Explicit,) * self.mesh.devices.ndim)

        def divided(shape: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(typed, spec))

        def sharding(x: jax.ShapeDtypeStruct) -> NamedSharding:
            found = x.sharding
            return NamedSharding(self.mesh, found.spec if isinstance(found, NamedSharding) else PartitionSpec())

        try:
            with jax.sharding.use_abstract_mesh(typed.abstract_mesh):
                opt_state = jax.eval_shape(optimizer.init, jax.tree.map(divided, self.shapes, self.specs))
            opt_state = jax.tree.map(sharding, opt_state)
        except Exception:  # JAX has no public name for that of its types; any other is raised again here
            opt_state = self._by_name(jax.eval_shape(optimizer.init, self.shapes))
        step: Any = replicated(self.mesh)
        return TrainState(step, self.params, opt_state)

    def _by_name(self, opt_state: Any) -> Any:
        shapes, specs = tree.named_leaves(self.shapes), tree.named_leaves(self.specs)

        def sharding(name: str, x: jax.ShapeDtypeStruct) -> NamedSharding:
            of = [param for param in shapes if f"/{param}/" in f"/{name}/" and shapes[param].shape == x.shape]
            return NamedSharding(self.mesh, specs[max(of, key=len)] if of else PartitionSpec())

        named = tree.named_leaves(opt_state)
        return jax.tree.unflatten(jax.tree.structure(opt_state), [sharding(*item) for item in named.items()])


def lay_out(
    params: Params,
    mesh: Mesh,
    *,
    zero: int = 0,
    rules: Mapping[str, PartitionSpec] | None = None,
    stacked: Callable[[Params], Any] | None = None,
    tolerance: float = 0.05,
) -> Layout:
    """Chooses how parameters lie on a mesh.

    | `zero` | parameters, optimizer state | whole parameters exist       | gradients add up        |
    |--------|-----------------------------|------------------------------|-------------------------|
    | 0      | whole on every device       | always                       | whole                   |
    | 1      | divided over `data`         | during the step              | whole, divided at last  |
    | 2      | divided over `data`         | during the step              | divided                 |
    | 3      | divided over `data`         | layer by layer               | divided                 |

    A matrix is divided along its first dimension that `data` divides and no rule has given away; the layer axis of a
    stacked one is none. Vectors stay whole, and everything where `data` is one device.

    Args:
        params: the parameters or their shapes.
        mesh: with an axis `data` or its parts, and perhaps `replica` and `model`; what `mesh` makes.
        zero: ZeRO's stage. For stage 3, the model must bring its layers together: `grads.gather_layers`.
        rules: a PartitionSpec for each parameter by regular expressions over names, for dividing them over `model`:
            what `models.tensor_parallel` returns. The first that matches a whole name counts. On a mesh without
            `model` they divide nothing.
        stacked: which leaves `[L ...]` hold L layers: True or False for each, what `optim.by_name` makes; None: none.
        tolerance: the greatest share of the parameters that may stay whole on every device for stages 1 to 3.

    Raises:
        ValueError: a stage that isn't there, a mesh without `data`, a parameter without a rule or a rule without one, a
            rule with an axis that the mesh lacks or that doesn't divide its dimension, or too much that stays whole.
    """
    if zero not in range(4):
        raise ValueError(f"lay_out: zero is {zero}; use 0, 1, 2 or 3")
    if not data_axes(mesh) or set(mesh.shape) - {*row_axes(mesh), MODEL}:
        raise ValueError(f"lay_out: the mesh has axes {list(mesh.shape)}; use data, and perhaps replica and model")
    if zero == 3 and stacked is None:
        raise ValueError("lay_out: stage 3 brings parameters together layer by layer; say which are stacked")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    layers = stacked(shapes) if stacked else jax.tree.map(lambda _: False, shapes)
    given = tree.labels(shapes, rules or {".*": PartitionSpec()})
    sizes = {"data": math.prod(mesh.shape[axis] for axis in data_axes(mesh)), MODEL: mesh.shape.get(MODEL, 1)}
    for (name, shape), spec in zip(tree.named_leaves(shapes).items(), jax.tree.leaves(given), strict=True):
        _check_rule(name, shape.shape, spec, sizes)
    divides = zero > 0 and sizes["data"] > 1
    data = PartitionSpec(data_axes(mesh))[0]
    lies = {"data": data, MODEL: MODEL if MODEL in mesh.shape else None, None: None}

    def divide(shape: jax.ShapeDtypeStruct, spec: PartitionSpec, is_stacked: bool) -> PartitionSpec:
        axes = [lies[axis] for axis in spec]
        axes += [None] * (len(shape.shape) - len(spec))
        if divides and data not in axes and len(axes) - is_stacked > 1:
            for i in range(is_stacked, len(axes)):
                if axes[i] is None and shape.shape[i] % sizes["data"] == 0:
                    axes[i] = data
                    break
        while axes and axes[-1] is None:
            axes.pop()
        return PartitionSpec(*axes)

    specs = jax.tree.map(divide, shapes, given, layers)
    layout = Layout(mesh, zero, shapes, specs, layers)
    whole = undivided(layout)
    if divides and sum(whole.values()) > tolerance * tree.nbytes(shapes):
        largest = sorted(whole, key=lambda name: -whole[name])[:3]
        raise ValueError(
            f"lay_out: {sum(whole.values()) / tree.nbytes(shapes):.0%} of the parameters can't be divided over "
            f"{sizes['data']} devices, the largest being {', '.join(largest)}; choose sizes that are multiples of "
            f"it, fewer devices along data, or a tolerance above {tolerance}"
        )
    return layout


def undivided(layout: Layout) -> dict[str, int]:
    """The bytes of the parameters that lie whole on every device along `data`, by name."""
    specs = tree.named_leaves(layout.specs)
    shapes = tree.named_leaves(layout.shapes)
    return {name: tree.nbytes(x) for name, x in shapes.items() if layout.data not in specs[name]}


def _check_rule(name: str, shape: tuple[int, ...], spec: PartitionSpec, sizes: Mapping[str, int]) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"lay_out: {name} has the shape {shape}, but its rule {spec} has {len(spec)} dimensions")
    for size, axis in zip(shape, spec, strict=False):
        if axis is None:
            continue
        if axis not in ("data", MODEL):
            raise ValueError(
                f"lay_out: the rule {spec} of {name} has the axis {axis!r}; use 'data' or {MODEL!r}, or None"
            )
        if size % sizes[axis]:
            raise ValueError(
                f"lay_out: {name} has the shape {shape}, whose {size} {axis} {sizes[axis]} doesn't divide; change "
                f"its rule {spec}, or the size"
            )
