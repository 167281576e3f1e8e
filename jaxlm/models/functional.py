"""The boundary between Flax and the rest: the only place that splits and merges modules."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxlm.types import Params


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[jax.Array], Params], Callable[..., Any]]:
    """A Flax NNX module as two pure functions.

    Args:
        make: makes the module; all its variables must be `nnx.Param`.

    Returns:
        `init(key) -> params`, a nested dict of arrays, and `apply(params, *args, **kwargs)`, which calls the module.

    >>> init, apply = functional(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> params = init(jax.random.key(0))
    >>> apply(params, jax.numpy.ones((5, 3))).shape
    (5, 2)
    """
    graphdef, variables = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    if others := [v for v in jax.tree.leaves(variables, is_leaf=_is_variable) if not isinstance(v, nnx.Param)]:
        raise ValueError(f"functional: a {type(others[0]).__name__} is not an nnx.Param; the module must be stateless")

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, nnx.State(params))(*args, **kwargs)

    return init, apply


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
