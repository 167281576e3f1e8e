"""Rows are divided over all devices; what is replicated lies whole on each."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import sharding


def test_rows_are_divided_in_order_over_all_devices() -> None:
    x = jax.device_put(jnp.arange(32).reshape(16, 2), sharding.by_rows(sharding.mesh()))
    shards = sorted(x.addressable_shards, key=lambda shard: shard.device.id)
    assert [shard.device for shard in shards] == jax.devices()
    np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), x)
    assert {shard.data.shape for shard in shards} == {(2, 2)}


def test_a_mesh_of_some_devices() -> None:
    mesh = sharding.mesh(devices=jax.devices()[:2])
    assert mesh.shape == {"data": 2}
    x = jax.device_put(jnp.ones(3), sharding.replicated(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(3,)}
    assert len(x.addressable_shards) == 2
