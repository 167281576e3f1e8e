"""A small model of stacked layers, its batches, and how it lies on meshes of eight devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm import losses, optim, sharding
from jaxlm.types import Batch, LossFn, Params

KEY = jax.random.key(0)
VOCAB, L, D, F = 32, 3, 16, 32
ROWS, LENGTH, STEPS = 32, 9, 20
STACKED = optim.by_name({"blocks/.*": True, ".*": False})
MATRICES = optim.by_name({"blocks/.*kernel": True, ".*": False})
RULES = {
    "blocks/up_kernel": PartitionSpec(None, None, "model"),
    "blocks/down_kernel": PartitionSpec(None, "model"),
    "head": PartitionSpec(None, "model"),
    ".*": PartitionSpec(),
}
MESHES: dict[str, dict[str, Any]] = {"8": {}, "2x4": {"replica": 2}, "4x2 model": {"model": 2}}
PARTS: dict[str, dict[str, Any]] = {
    "(2x4)": {"data": (2, 4)},
    "(2x2x2)": {"data": (2, 2, 2)},
    "2x(2x2)": {"replica": 2, "data": (2, 2)},
    "(2x2)x2 model": {"data": (2, 2), "model": 2},
}


def params() -> Params:
    rng = np.random.default_rng(0)
    shapes = {
        "blocks": {"up_kernel": (L, D, F), "down_kernel": (L, F, D), "scale": (L, D)},
        "embed": (VOCAB, D),
        "head": (D, VOCAB),
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) / 4, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def model(wrap_layer: Any = None) -> LossFn:
    """Residual layers, scanned, between an embedding and an output matrix."""

    def layer(params: Params, x: jax.Array) -> jax.Array:
        normed = x * (1 + params["scale"].reshape(1, 1, -1))
        return x + jnp.tanh(normed @ params["up_kernel"]) @ params["down_kernel"]

    run = wrap_layer(layer) if wrap_layer else layer

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, p: (run(p, x), None), params["embed"][tokens], params["blocks"])
        return x @ params["head"]

    return losses.next_token(apply)


def batches(steps: int) -> list[Batch]:
    """Rows of 1 to 9 tokens, some empty, so that devices and microbatches have unequal numbers of them."""
    rng = np.random.default_rng(1)
    lengths = np.where(rng.random((steps, ROWS)) < 0.3, 0, rng.integers(1, LENGTH + 1, (steps, ROWS)))
    lengths[:, :4] = 0  # a device of eight, or a microbatch, without a single token
    tokens = rng.integers(0, VOCAB, (steps, ROWS, LENGTH))
    return [
        {"tokens": t.astype(np.uint16), "lengths": n.astype(np.int32)} for t, n in zip(tokens, lengths, strict=True)
    ]


def lay_out(mesh: str, zero: int) -> sharding.Layout:
    return sharding.lay_out(
        params(), sharding.mesh(**(MESHES | PARTS)[mesh]), zero=zero, rules=RULES, stacked=STACKED, tolerance=0.1
    )
