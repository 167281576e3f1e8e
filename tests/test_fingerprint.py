"""Equal to NumPy's, on any mesh; another one for any bit, place or sign of zero; computed where the leaves are."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm import fingerprint, models, sharding, train
from jaxlm.fingerprint import fingerprints
from jaxlm.tree import named_leaves


def mix(h: np.ndarray) -> np.ndarray:
    """MurmurHash3's `fmix32`, in integers that don't wrap by themselves."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B % 2**32
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def expected(x: np.ndarray) -> str:
    width = x.dtype.itemsize
    words = np.frombuffer(x.tobytes(), f"<u{min(width, 4)}")
    if x.dtype.kind == "i":  # negative ones are as 32 bits would be
        words = np.frombuffer(x.astype(np.int32).tobytes(), "<u4") if width < 8 else words
    words, places = words.astype(np.uint64), np.arange(words.size, dtype=np.uint64)
    one = mix(words ^ (places * 0x9E3779B9 % 2**32))
    other = mix(((words + 0x7F4A7C15) % 2**32) ^ mix(places + 1))
    return f"{int(one.sum()) % 2**32:08x}{int(other.sum()) % 2**32:08x}"


DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int16", "int32", "uint32", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 2)], ids=str)
def test_equals_numpy(dtype: str, shape: tuple[int, ...]) -> None:
    bits = np.random.default_rng(0).integers(0, 256, (*shape, 4), np.uint8)
    x = bits[..., 0] % 2 > 0 if dtype == "bool" else bits.view(np.uint32)[..., 0].astype(np.uint32)
    if dtype != "bool":
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        x = x.astype(f"u{kind.itemsize}").view(kind)
    assert fingerprints({"x": jnp.asarray(x)}) == {"x": expected(x)}


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "complex64", "complex128"])
def test_equals_numpy_with_64_bits(dtype: str) -> None:
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
        assert fingerprints(jnp.asarray(x)) == {"": expected(x)}


def test_keys_have_the_fingerprint_of_their_data() -> None:
    keys = jax.random.split(jax.random.key(3), 5)
    assert fingerprints({"k": keys}) == fingerprints({"k": jax.random.key_data(keys)})


AUTO, EXPLICIT = (AxisType.Auto,) * 2, (AxisType.Explicit,) * 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("spec", [(), ("a",), (None, "b"), (("a", "b"),), ("b", "a")], ids=str)
def test_is_the_same_on_any_mesh_with_any_sharding(types: Any, shape: tuple[int, int], spec: tuple[Any, ...]) -> None:
    tree = {
        name: jnp.asarray(np.random.default_rng(0).integers(0, 2, (16, 24)), name)
        for name in ("float32", "bfloat16", "int8", "bool")
    }
    mesh = jax.make_mesh(shape, ("a", "b"), types, devices=jax.devices()[: shape[0] * shape[1]])
    placed = jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    assert fingerprints(placed) == fingerprints(tree)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_state_has_the_same_with_any_stage_of_zero_and_no_device_gets_a_leaf(zero: int) -> None:
    init, _ = models.transformer(models.TransformerConfig(vocab=64, layers=2, width=64, heads=2))
    optimizer = optax.adamw(1e-3)
    state = train.start(jax.jit(init)(jax.random.key(0)), optimizer)
    layout = sharding.lay_out(
        jax.eval_shape(init, jax.random.key(0)), sharding.mesh(), zero=zero, stacked=models.stacked
    )
    placed = jax.device_put(state, layout.state(optimizer))
    assert fingerprints(placed) == fingerprints(state)
    program = fingerprint._sums.lower(named_leaves(placed)).compile()
    sent = re.findall(
        r"= \(?u32\[([\d,]*)\].*? (?:all-gather|all-reduce|all-to-all|collective-permute)\(", program.as_text()
    )
    assert zero == 0 or sent
    assert all(np.prod([int(n) for n in shape.split(",") if n]) <= 8 for shape in sent)
    assert program.memory_analysis().temp_size_in_bytes < 100 * len(jax.tree.leaves(state)) + 10_000


def test_temporaries_do_not_grow_with_the_leaf() -> None:
    leaf = jax.ShapeDtypeStruct((1024, 8192), jnp.bfloat16)
    assert fingerprint._sums.lower({"x": leaf}).compile().memory_analysis().temp_size_in_bytes < 10_000


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 99), st.integers(0, 31))
def test_any_bit_of_any_element_changes_it(seed: int, place: int, bit: int) -> None:
    x = np.random.default_rng(seed).integers(0, 2**32, 100, np.uint32)
    before = fingerprints({"x": jnp.asarray(x)})
    x[place] ^= np.uint32(1 << bit)
    assert fingerprints({"x": jnp.asarray(x)}) != before


def test_places_the_sign_of_zero_and_rows_are_told_apart() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    zeros = np.zeros_like(x)
    different = [x, -x, np.roll(x, 1), np.roll(x, 1, 0), x.T.reshape(4, 6), x[::-1], zeros, np.copysign(zeros, -1)]
    assert len({fingerprints({"x": jnp.asarray(one)})["x"] for one in different}) == len(different)


def test_the_state_may_be_donated_at_once() -> None:
    x = jax.device_put(jnp.arange(1e6), jax.devices()[0])
    before = fingerprints({"x": x})
    begun = fingerprint.begin_fingerprints({"x": x})
    jax.jit(lambda x: x + 1, donate_argnums=0)(x).block_until_ready()
    assert fingerprint.read_fingerprints(begun) == before


@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [(), ("b",), (None, "a")], ids=str)
def test_a_bit_that_one_of_several_copies_has_wrong_is_found_and_where(types: Any, spec: tuple[Any, ...]) -> None:
    mesh, rng = jax.make_mesh((2, 4), ("a", "b"), types), np.random.default_rng(0)
    tree = {name: jnp.asarray(rng.integers(0, 2, (16, 24)), name) for name in ("float32", "bfloat16", "int8")}
    tree = jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    alone = {"alone": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec(("a", "b"))))}
    other = jax.device_put(jnp.ones(3), NamedSharding(jax.make_mesh((8,), ("c",)), PartitionSpec()))
    parts = 1 + 3 * {(): 1, ("b",): 4, (None, "a"): 2}[spec]
    assert fingerprint.copies_agree(tree | {"other": other} | alone)
    for _ in range(20):
        name, number = rng.choice(list(tree)), rng.integers(8)
        shards = [np.array(shard.data) for shard in tree[name].addressable_shards]
        bits = shards[number].reshape(-1).view(np.uint8)
        bits[rng.integers(bits.size)] ^= np.uint8(1 << rng.integers(8))
        devices = [shard.device for shard in tree[name].addressable_shards]
        arrays = [jax.device_put(x, device) for x, device in zip(shards, devices, strict=True)]
        wrong = jax.make_array_from_single_device_arrays(tree[name].shape, tree[name].sharding, arrays)
        assert not fingerprint.copies_agree(tree | {name: wrong, "other": other} | alone)
        found = fingerprint.copies(tree | {name: wrong, "other": other} | alone)
        assert len(found) == parts
        (part,) = (part for part, prints in found.items() if len(prints) > 1)
        assert part.startswith(f"{name}[")
        assert [f"{devices[number]} of process 0"] in found[part].values()
        assert sum(map(len, found[part].values())) == 8 * 3 // (parts - 1)
