"""A short number that is another one as soon as one bit of an array is, however the array lies on devices."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.tree import named_leaves


def fingerprints(tree: Any) -> dict[str, str]:
    """The fingerprint of each leaf by name: 16 hexadecimal digits, the same on any mesh and with any sharding.

    Args:
        tree: arrays, of one mesh; also keys of `jax.random.key`. All processes must call it.

    >>> fingerprints({"a": jnp.zeros(2), "b": jnp.array([0.0, -0.0])})
    {'a': '92ca2f0ef9fd5f75', 'b': 'bd12a56aa5692d2e'}
    """
    return read_fingerprints(begin_fingerprints(tree))


def begin_fingerprints(tree: Any) -> dict[str, jax.Array]:
    """The fingerprints as arrays that the devices have yet to compute: the tree may be donated at once.

    An element's bits are mixed with its place by two bijections, and each is summed over all elements modulo 2^32,
    which no order of adding changes. Whatever happens to one element of at most 32 bits is seen; other damage is missed
    once in 2^64. Each device reads what it has once, and sends two numbers per leaf. Accidents are found, forgers not.
    """
    return _sums(named_leaves(tree))


def read_fingerprints(sums: dict[str, jax.Array]) -> dict[str, str]:
    """What `begin_fingerprints` began, once it is computed."""
    return {name: _digits(pair) for name, pair in jax.device_get(sums).items()}


def _digits(pair: np.ndarray) -> str:
    return "".join(f"{part:08x}" for part in pair)


def copies_agree(tree: Any) -> bool:
    """Whether what several devices hold is the same on all: each computes its copy itself, and no step compares them.

    The devices compare fingerprints, sixteen bytes a leaf.

    Args:
        tree: arrays. All processes must call it, and all get the same answer.

    >>> copies_agree({"a": jnp.zeros(2)})
    True
    """
    differ = [_differ(mesh, _specs(leaves))(tuple(leaves.values())) for mesh, leaves in _of_several(tree).items()]
    return not any(map(bool, differ))


def compile_fingerprints(tree: Any) -> None:
    """Compiles what `begin_fingerprints` and `copies_agree` need for a tree of arrays, or of shapes with shardings."""
    _sums.lower(named_leaves(tree)).compile()
    for mesh, leaves in _of_several(tree).items():
        _differ(mesh, _specs(leaves)).lower(tuple(leaves.values())).compile()


def copies(tree: Any) -> dict[str, dict[str, list[str]]]:
    """The fingerprints of each part of a leaf that several devices hold, with those of this process's that hold it so.

    Args:
        tree: arrays. All processes must call it.

    >>> copies({"a": jnp.zeros(2)})
    {}
    """
    found: dict[str, dict[str, list[str]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for mesh, its in _of_several(tree).items():
        sums = _sums_on_each(mesh, _specs(its))(tuple(its.values()))
        for shard in sums.addressable_shards:
            device = f"{shard.device} of process {shard.device.process_index}"
            for (name, leaf), pair in zip(its.items(), np.asarray(shard.data)[0], strict=True):
                own = leaf.sharding.devices_indices_map(leaf.shape)[shard.device]
                part = ", ".join(":" if at == slice(None) else f"{at.start}:{at.stop}" for at in own)
                found[f"{name}[{part}]"][_digits(pair)].append(device)
    return {part: dict(prints) for part, prints in found.items()}


def _of_several(tree: Any) -> dict[Mesh, dict[str, Any]]:
    """The leaves of which some device holds what another does, by their mesh and their name."""
    found: dict[Any, dict[str, Any]] = collections.defaultdict(dict)
    for name, leaf in named_leaves(tree).items():
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            held = len(leaf.sharding.device_set) * math.prod(leaf.sharding.shard_shape(leaf.shape))
            if held > leaf.size:
                found[leaf.sharding.mesh][name] = leaf
    return found


def _specs(leaves: dict[str, Any]) -> tuple[PartitionSpec, ...]:
    return tuple(leaf.sharding.spec for leaf in leaves.values())


@functools.lru_cache
def _differ(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> jax.stages.Wrapped:
    def own(leaves: tuple[jax.Array, ...]) -> jax.Array:
        sums: dict[tuple[str, ...], list[jax.Array]] = collections.defaultdict(list)
        for leaf, spec in zip(leaves, specs, strict=True):
            divided = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
            sums[tuple(axis for axis in mesh.axis_names if axis not in divided)].append(_sum(leaf))
        differ = jnp.zeros((), jnp.uint32)
        for axes, those in sums.items():
            each = jnp.stack(those)
            largest = jax.lax.pmax(jnp.stack([each, ~each]), axes)
            differ |= (largest[0] != ~largest[1]).any()  # which is the smallest
        return jax.lax.pmax(differ, mesh.axis_names)

    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False))


@functools.lru_cache
def _sums_on_each(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[..., jax.Array]:
    def own(leaves: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([_sum(leaf) for leaf in leaves])[None]

    # Unchecked, since what is said to be the same on several devices is what may differ.
    every = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=every, check_vma=False))


@jax.jit
def _sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _sum(leaf) for name, leaf in leaves.items()}


def _sum(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    one = _mix(words ^ (place * jnp.uint32(0x9E3779B9)))
    other = _mix((words + jnp.uint32(0x7F4A7C15)) ^ _mix(place + jnp.uint32(1)))
    # Both in one reduction: two sums XLA makes of arrays as large as the leaf, on a CPU at a fifteenth of the speed.
    zeros = (np.uint32(0), np.uint32(0))
    return jnp.stack(jax.lax.reduce((one, other), zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), range(words.ndim)))


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as one uint32, or as several along a last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return x.astype(jnp.uint32)  # of other integers and booleans no two become the same


def _mix(h: jax.Array) -> jax.Array:
    """The last step of MurmurHash3: a bijection of 32 bits, each of which changes about half of the result."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
