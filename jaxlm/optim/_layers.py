"""Any transformation, with stacked layers taken apart."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.optim._leaves import Mask, layers, transformation


def per_layer(tx: optax.GradientTransformation, stacked: Mask) -> optax.GradientTransformationExtraArgs:
    """Shows a transformation each layer of a stacked leaf `[L ...]` as a leaf of its own.

    So norms, factors and clipping mean what they mean for an unstacked model, whatever the transformation. Its state
    stays taken apart. A program with that many more leaves takes longer to compile: jaxlm's own transformations take
    `stacked` themselves, and need no wrapper.

    Args:
        tx: any transformation.
        stacked: which leaves are stacked.

    >>> scale = per_layer(optax.scale_by_trust_ratio(), True)
    >>> params = jnp.array([[3.0, 4.0], [30.0, 40.0]])
    >>> scale.update(jnp.ones((2, 2)), scale.init(params), params)[0][:, 0].round(2)
    Array([ 3.54, 35.36], dtype=float32)
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        split = layers(stacked, updates if params is None else params)
        apart = None if params is None else _apart(params, split)
        updates, state = tx.update(_apart(updates, split), state, apart, **extra)
        return jax.tree.map(lambda s, x: jnp.stack(x) if s else x, split, updates), state

    def init(params: Any) -> Any:
        return tx.init(_apart(params, layers(stacked, params)))

    return transformation(init, update)


def _apart(tree: Any, split: Any) -> Any:
    def each(x: Any) -> tuple[Any, ...]:
        if isinstance(x, jax.ShapeDtypeStruct):
            return (jax.ShapeDtypeStruct(x.shape[1:], x.dtype),) * x.shape[0]
        return tuple(x[i] for i in range(x.shape[0]))

    return jax.tree.map(lambda s, x: each(x) if s else x, split, tree)
