from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import models
from jaxlm.models.layers import Activation, FeedForward, Linear, RMSNorm, rotary


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return tuple(jax.jit(f) for f in models.functional(make))


def float64(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


@pytest.mark.parametrize("axes", [(), (3,), (2, 3), (2, 3, 4)])
def test_linear_is_a_product_over_the_last_axis(axes: tuple[int, ...]):
    _, apply = functional(lambda rngs: Linear(5, 7, rngs))
    x, kernel = normal(0, *axes, 5), normal(1, 5, 7)
    x64, kernel64 = float64(x, kernel)
    np.testing.assert_allclose(apply({"kernel": kernel}, x), x64 @ kernel64, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("std", "expected"), [(None, 1 / 8), (0.3, 0.3), (0.0, 0.0)])
def test_linear_is_drawn_with_its_standard_deviation(std: float | None, expected: float):
    init, _ = functional(lambda rngs: Linear(64, 128, rngs, std=std))
    kernel = init(jax.random.key(0))["kernel"]
    # The standard error of a standard deviation of n normal numbers is 1 / sqrt(2 n) of it: 0.8 % here.
    assert float(jnp.std(kernel)) == pytest.approx(expected, rel=0.03)
    assert float(jnp.mean(kernel)) == pytest.approx(0, abs=4 * expected / 64 / 2**0.5)


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)])
def test_rms_norm_is_its_formula(axes: tuple[int, ...]):
    _, apply = functional(lambda rngs: RMSNorm(6, rngs, epsilon=0.1))
    x, scale = normal(0, *axes, 6), normal(1, 6)
    x64, scale64 = float64(x, scale)
    expected = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 0.1) * scale64
    np.testing.assert_allclose(apply({"scale": scale}, x), expected, rtol=1e-5)


def test_rms_norm_starts_with_scale_one():
    init, _ = functional(lambda rngs: RMSNorm(6, rngs, epsilon=0.1))
    np.testing.assert_array_equal(init(jax.random.key(0))["scale"], np.ones(6, np.float32))


def test_rms_norm_of_zeros_is_zero_and_has_a_gradient():
    _, apply = functional(lambda rngs: RMSNorm(6, rngs, epsilon=1e-6))
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(apply({"scale": jnp.ones(6)}, x)))(jnp.zeros(6))
    assert value == 0
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("layer", ["norm", "rotary"])
def test_bfloat16_input_is_computed_in_float32_and_rounded_once(layer: str):
    # 4097 is no bfloat16 number, and 2**12 squares of about 1 are no sum that bfloat16 can keep.
    if layer == "norm":
        _, norm = functional(lambda rngs: RMSNorm(4096, rngs, epsilon=1e-6))
        function: Callable[[jax.Array], jax.Array] = lambda x: norm({"scale": jnp.full(4096, 0.3)}, x)  # noqa: E731
        x = jnp.asarray(normal(0, 2, 4096), jnp.bfloat16)
    else:
        function = lambda x: rotary(x, jnp.full((1, 3), 4097), 10_000.0)  # noqa: E731
        x = jnp.asarray(normal(0, 2, 3, 4, 8), jnp.bfloat16)
    y = function(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, function(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("rows", [1, 2])
def test_rotary_turns_complex_numbers(rows: int):
    x = normal(0, 2, 3, 4, 8)
    positions = np.array([[0, 5, 11], [3, 1, 40]])[:rows]
    frequencies = 100.0 ** (-np.arange(4) / 4)
    angles = positions[:, :, None, None] * frequencies
    (x64,) = float64(x)
    turned = (x64[..., :4] + 1j * x64[..., 4:]) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    # Angles up to 40 are rounded to 2e-6.
    np.testing.assert_allclose(rotary(x, jnp.asarray(positions), 100.0), expected, rtol=0, atol=1e-5)


def test_rotary_products_depend_on_distances_alone():
    q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)

    def product(at: int) -> float:
        turned = (rotary(x, jnp.full((1, 1), p), 50.0) for x, p in ((q, at + 4), (k, at)))
        return float(jnp.vdot(*turned))

    assert product(0) == pytest.approx(product(90), abs=1e-4)
    assert product(0) != pytest.approx(float(jnp.vdot(q, k)), abs=0.1)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_feed_forward_is_its_formula(activation: Activation):
    _, apply = functional(lambda rngs: FeedForward(4, 6, activation, rngs, out_scale=1.0))
    x, gate, up, down = normal(0, 2, 3, 4), normal(1, 4, 6), normal(2, 4, 6), normal(3, 6, 4)
    params = {"up": {"kernel": up}, "down": {"kernel": down}}
    x64, gate64, up64, down64 = float64(x, gate, up, down)
    if activation == "swiglu":
        params["gate"] = {"kernel": gate}
        hidden = x64 @ gate64 / (1 + np.exp(-(x64 @ gate64))) * (x64 @ up64)
    else:
        hidden = np.maximum(x64 @ up64, 0) ** 2
    np.testing.assert_allclose(apply(params, x), hidden @ down64, rtol=1e-5, atol=1e-5)


def test_feed_forward_scales_its_output_kernel():
    init, _ = functional(lambda rngs: FeedForward(64, 128, "swiglu", rngs, out_scale=0.5))
    params = init(jax.random.key(0))
    expected = {"gate": 64**-0.5, "up": 64**-0.5, "down": 0.5 * 128**-0.5}
    assert {name: float(jnp.std(p["kernel"])) for name, p in params.items()} == pytest.approx(expected, rel=0.03)
