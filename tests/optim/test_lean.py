"""State in fewer bytes: what a code loses, and that it isn't always the same side."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import optim
from jaxlm.optim._lean import BLOCK, random_bits

RNG = np.random.default_rng(0)


def coded(codec: optim.Codec, x: jax.Array, seed: Any = 0) -> jax.Array:
    return codec.decode(codec.encode(x, lambda: random_bits(x.shape, "leaf", jnp.int32(seed))))


@pytest.mark.parametrize("width", [BLOCK, 3 * BLOCK, BLOCK + 44, 7])
@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_a_code_is_one_of_the_two_neighbours(name: str, width: int):
    codec, most = {"int8": (optim.int8, 127), "uint8": (optim.uint8, 255)}[name]
    x = np.exp(RNG.normal(scale=4, size=(5, width))).astype(np.float32) * RNG.choice([1e-6, 1.0, 1e6], size=(5, 1))
    x = np.asarray(x * (RNG.choice([-1, 1], size=x.shape) if name == "int8" else 1), np.float32)
    stored = codec.encode(jnp.asarray(x), lambda: random_bits(x.shape, "leaf", jnp.int32(0)))
    assert stored.codes.shape == x.shape
    assert stored.scales.shape == (5, -(-width // BLOCK))
    found = np.asarray(codec.decode(stored), np.float64)
    scale = np.repeat(np.asarray(stored.scales, np.float64), BLOCK, axis=1)[:, :width]
    levels = (np.arange(most + 1) / most) ** 4
    share = np.minimum(np.abs(x) / scale, 1)
    below = np.clip(np.searchsorted(levels, share * (1 + 1e-6), side="right") - 1, 0, most - 1)
    low, high = levels[below] * scale, levels[below + 1] * scale
    slack = 1e-5 * (np.abs(x) + np.abs(found))  # a share that is a level but for rounding may fall to either side
    near = np.minimum(np.abs(np.abs(found) - low), np.abs(np.abs(found) - high))
    assert np.all((near <= slack) | (np.abs(np.abs(found) - np.abs(x)) <= slack))
    assert np.all((np.sign(found) == np.sign(x)) | (found == 0))
    if name == "uint8":
        assert np.all(found > 0)


@pytest.mark.parametrize("codec", [optim.int8, optim.uint8, optim.bfloat16_stochastic])
def test_rounding_is_right_on_average(codec: optim.Codec):
    x = jnp.abs(jnp.asarray(RNG.standard_t(3, size=(4, 512)), jnp.float32))
    draws = np.asarray(jax.lax.map(lambda seed: coded(codec, x, seed), jnp.arange(2000)), np.float64)
    mean, deviation = draws.mean(0), draws.std(0)
    both = (draws == draws.max(0)).sum(0)
    tossed = (both > 50) & (both < 1950)  # the mean of a rarer event isn't distributed normally
    z = (mean - np.asarray(x))[tossed] / (deviation[tossed] / np.sqrt(len(draws)))
    assert tossed.mean() > 0.9
    assert np.abs(z).max() < 5.5  # of 2048 normal numbers one in 13 000 times
    assert 0.9 < np.sqrt(np.mean(z**2)) < 1.1


def test_zeros_stay_zeros_and_what_is_not_finite_stays_to_be_seen():
    for codec in (optim.int8, optim.uint8, optim.bfloat16_stochastic):
        assert not np.any(coded(codec, jnp.zeros((2, BLOCK))))
        for bad in (jnp.nan, jnp.inf):
            assert not np.all(np.isfinite(coded(codec, jnp.ones((1, BLOCK)).at[0, 3].set(bad))))


def test_bits_are_uniform_and_independent():
    bits = np.asarray(random_bits((600, 700), "a", jnp.int32(5)))
    size = bits.size
    ones = np.unpackbits(bits.reshape(-1).view(np.uint8)).reshape(size, 32).mean(0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(size)
    u = bits / 2.0**32
    others = [np.roll(u, 1, 0), np.roll(u, 1, 1)]
    others += [np.asarray(random_bits((600, 700), *x)) / 2.0**32 for x in (("a", jnp.int32(6)), ("b", jnp.int32(5)))]
    for other in others:
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(size)


@pytest.mark.parametrize(
    ("codec", "reached"), [(optim.bfloat16, 1 - 2**-9 / 0.01), (optim.bfloat16_stochastic, 1.0), (optim.int8, 1.0)]
)
def test_an_average_reaches_a_constant_only_if_rounding_is_random(codec: optim.Codec, reached: float):
    # Rounded to the nearest it stays where a step is smaller than half of what is between two numbers, 2**-8.
    def step(mu: jax.Array, seed: jax.Array) -> tuple[jax.Array, None]:
        return coded(codec, 0.99 * mu + 0.01, seed), None

    mu, _ = jax.lax.scan(step, jnp.zeros((16, BLOCK)), jnp.arange(2000))
    assert float(mu.mean()) == pytest.approx(reached, abs=0.01)


@pytest.mark.parametrize(
    ("tx", "bytes_each"),
    [(optim.lion_int8(1e-3), 1.016), (optim.adamw_int8(1e-3), 2.031), (optim.adafactor_bf16(1e-3), 2.004)],
)
def test_presets_take_the_bytes_that_they_promise(tx: Any, bytes_each: float):
    params = {"kernel": jax.ShapeDtypeStruct((1024, 2048), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert total / (1024 * 2048) == pytest.approx(bytes_each, abs=0.002)


def test_a_parameter_may_be_called_as_a_moment_is():
    params = {"mu": jnp.ones((64, 128)), "other": jnp.ones((64, 128))}
    state = optim.adamw_int8(1e-3).init(params)
    moments = state.inner[0]
    assert {moments.nu[name].codes.dtype for name in params} == {jnp.dtype(jnp.uint8)}
    assert {moments.mu[name].codes.dtype for name in params} == {jnp.dtype(jnp.int8)}
    factors = optim.adafactor_bf16(1e-3, min_factored=8).init(params).inner[0].nu["mu"]
    assert {x.dtype for x in factors} == {jnp.dtype(jnp.float32)}
