"""The parts of a decoder block.

Axes, here and everywhere: `B` batch, `T` query length, `S` key length, `D` model width, `F` feed-forward width, `N`
query heads, `K` key and value heads, `G = N / K` query heads per key head, `H` head width, `V` vocabulary, `L` layers.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

Activation = Literal["swiglu", "relu2"]
Product = Callable[[Float[Array, "N I"], Float[Array, "I O"]], Float[Array, "N O"]]
"""How linear layers multiply, their input by their kernel: `jnp.matmul`, or `precision.product_in(...)`."""


class Linear(nnx.Module):
    """`x @ kernel`, over the last axis; `kernel [in out]` is drawn from a normal distribution."""

    def __init__(
        self, inputs: int, outputs: int, rngs: nnx.Rngs, *, std: float | None = None, product: Product = jnp.matmul
    ):
        self.product = product
        self.kernel = nnx.Param(
            (inputs**-0.5 if std is None else std) * jax.random.normal(rngs.params(), (inputs, outputs))
        )

    def __call__(self, x: Float[Array, "*axes I"]) -> Float[Array, "*axes O"]:
        # One axis to contract in the backward pass too: with more, XLA:CPU takes 1.5 times as long for the whole step.
        kernel = self.kernel[...]
        return self.product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis, in float32 (https://arxiv.org/abs/1910.07467, eq. 4)."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, epsilon: float):
        del rngs
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon) * scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return normed.astype(x.dtype)


def rotary(x: Float[Array, "B T heads H"], positions: Int[Array, "#B T"], theta: float) -> Float[Array, "B T heads H"]:
    """Turns pairs `(x[i], x[i + H/2])` by the angle `position * theta ** (-2i / H)`, in float32.

    RoFormer, https://arxiv.org/abs/2104.09864, eq. 34, with the pairing that Llama's published weights expect.
    """
    frequencies = theta ** (-jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class FeedForward(nnx.Module):
    """SwiGLU, `down(silu(gate(x)) * up(x))` (https://arxiv.org/abs/2002.05202), or squared ReLU,
    `down(relu(up(x)) ** 2)` (https://arxiv.org/abs/2109.08668).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation,
        rngs: nnx.Rngs,
        *,
        out_scale: float,
        product: Product = jnp.matmul,
    ):
        self.gate = Linear(width, hidden, rngs, product=product) if activation == "swiglu" else None
        self.up = Linear(width, hidden, rngs, product=product)
        self.down = Linear(hidden, width, rngs, std=out_scale * hidden**-0.5, product=product)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.gate is None:
            return self.down(jnp.square(jax.nn.relu(self.up(x))))
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
