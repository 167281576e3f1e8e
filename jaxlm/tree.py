"""Pytrees by the names of their leaves."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, parts joined with `/`.

    >>> named_leaves({"block": {"kernel": 1, "scale": 2}})
    {'block/kernel': 1, 'block/scale': 2}
    """
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def labels(tree: Any, patterns: Mapping[str, T], *, unused: bool = False) -> Any:
    """Gives each leaf the value of the first pattern that matches its whole name.

    Args:
        tree: any pytree.
        patterns: regular expressions over names as `named_leaves` gives them.
        unused: let a pattern be without a leaf.

    Returns:
        A tree of the same structure, as `optax.partition` and masks take it.

    Raises:
        ValueError: a leaf that no pattern matches, or a pattern that no leaf takes its value from.

    >>> labels({"block": {"kernel": 1, "scale": 2}}, {".*/kernel": True, ".*": False})
    {'block': {'kernel': True, 'scale': False}}
    """
    without_leaf = set(patterns)

    def label(path: Any, _: Any) -> T:
        for pattern, value in patterns.items():
            if re.fullmatch(pattern, _name(path)):
                without_leaf.discard(pattern)
                return value
        raise ValueError(f"labels: no pattern matches the leaf {_name(path)!r}; add one, or '.*' at the end")

    labelled = jax.tree.map_with_path(label, tree)
    if without_leaf and not unused:
        raise ValueError(
            f"labels: no leaf takes its value from {sorted(without_leaf)}; the leaves are {list(named_leaves(tree))}"
        )
    return labelled


def check_integers(batch: Mapping[str, Any]) -> None:
    """Refuses what JAX would silently change: of integers it keeps the last 32 bits, unless `jax_enable_x64` is set.

    Args:
        batch: arrays by name; those that aren't NumPy's are JAX's, where it has happened already.

    Raises:
        ValueError: a number that doesn't fit; it and its array are named.

    >>> check_integers({"tokens": np.array([5, 2**33 + 5])})
    Traceback (most recent call last):
    ValueError: tokens has 8589934597, of which JAX would make 5: it holds integers of 32 bits
    """
    config: Any = jax.config
    for name, x in batch.items():
        if isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.dtype.itemsize == 8 and not config.jax_enable_x64:
            kept = x.astype(f"{x.dtype.kind}4").reshape(-1)
            wrong = np.flatnonzero(kept != x.reshape(-1))
            if wrong.size:
                number, made = x.reshape(-1)[wrong[0]], kept[wrong[0]]
                raise ValueError(f"{name} has {number}, of which JAX would make {made}: it holds integers of 32 bits")


def norm(tree: Any) -> jax.Array:
    """The L2 norm of all leaves together, in float32 or wider whatever their dtype; 0 of an empty tree.

    Within one compiled program the norms of the same tree are computed once, wherever they are asked for.
    """
    leaves = (leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(tree))
    square = sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), jnp.zeros(()))
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))  # with a derivative of 0 at 0


def vary_like(x: jax.Array, *like: Any) -> jax.Array:
    """`x`, which inside `jax.shard_map` may from here on differ among devices wherever an array of these types may.

    Args:
        x: any array.
        like: what `jax.typeof` or `jax.eval_shape` returns.
    """
    varying = frozenset[str]().union(*(getattr(one.manual_axis_type, "varying", ()) for one in like))
    missing = varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def vary_alike(*trees: Any) -> Any:
    """Trees in which every array may differ among devices as any of them may."""
    types = [jax.typeof(x) for x in jax.tree.leaves(trees)]
    return jax.tree.map(lambda x: vary_like(x, *types), trees)


def size(tree: Any) -> int:
    """The number of elements in all leaves; also of a tree of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """The bytes that all leaves take; also of a tree of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
