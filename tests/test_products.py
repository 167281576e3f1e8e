"""Products of 8-bit operands against their equations in NumPy, alone and in a model on devices."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from test_precision import equations

from jaxlm import grads, losses, models, precision, sharding
from jaxlm.types import Batch, Params

TYPES = [jnp.int8, jnp.float8_e4m3fn]
CONFIG = models.TransformerConfig(vocab=32, layers=2, width=32, heads=4, kv_heads=2)


def operands(dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    """Tokens of very unequal sizes, with outliers, one of them all zeros; a kernel; a gradient."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 48)) * np.exp2(rng.integers(-12, 12, (24, 1)))
    x[3], x[5, 7] = 0, 1e3
    kernel, grad = rng.normal(size=(48, 16)) * np.exp2(rng.integers(-3, 3, 16)), rng.normal(size=(24, 16)) * 1e-4
    return tuple(jnp.asarray(a, dtype) for a in (x, kernel, grad))


def rounded(x: Any, to: Any, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`x` as numbers of 8 bits times a scale for each index along `axis`; how far from `x` they may be; and how far
    from these, where `x` is halfway between two.
    """
    x = np.asarray(x, np.float32)
    integer = jnp.dtype(to) == jnp.int8
    if integer:
        largest, digits, smallest = 127.0, 0.0, 0.5
    else:
        info = ml_dtypes.finfo(to)
        largest, digits, smallest = float(info.max), 2.0 ** -(1 + info.nmant), float(info.smallest_subnormal) / 2
    scale = np.abs(x).max(1 - axis, keepdims=True) / np.float32(largest)
    scale = np.where(scale == 0, np.float32(1), scale)

    def narrow(x: np.ndarray) -> np.ndarray:
        return np.clip(np.round(x), -127, 127) if integer else np.clip(x, -largest, largest).astype(to).astype(x.dtype)

    above, below = (narrow(x / scale * np.float32(factor)) for factor in (1 + 4e-7, 1 - 4e-7))
    wide = narrow(x / scale).astype(np.float64) * scale
    return wide, np.maximum(digits * np.abs(x), smallest * scale) * (1 + 1e-6), np.abs(above - below) * scale


def gradient_type(dtype: Any) -> Any:
    return jnp.int8 if dtype == jnp.int8 else jnp.float8_e5m2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("of", [jnp.float32, jnp.bfloat16])
def test_output_and_gradients_are_those_of_the_equations(dtype: Any, of: Any):
    x, kernel, grad = operands(of)
    y, pull = jax.vjp(jax.jit(precision.product_in(dtype)), x, kernel)
    input_grad, kernel_grad = pull(grad)
    assert {a.dtype for a in (y, input_grad, kernel_grad)} == {jnp.dtype(of)}
    x64, grad64 = (np.asarray(a, np.float64) for a in (x, grad))
    for found, (a, _, a_apart), (b, _, b_apart) in (
        (y, rounded(x, dtype, 0), rounded(kernel, dtype, 1)),
        (input_grad, rounded(grad, gradient_type(dtype), 0), [part.T for part in rounded(kernel, dtype, 0)]),
        (kernel_grad, (x64.T, 0, 0 * x64.T), (grad64, 0, 0 * grad64)),
    ):
        digits = 2**-8 if of == jnp.bfloat16 else 1e-6
        allowed = digits * np.abs(a @ b) + 2e-6 * np.abs(a) @ np.abs(b)
        allowed += a_apart @ np.abs(b) + np.abs(a) @ b_apart + a_apart @ b_apart
        assert np.all(np.abs(np.asarray(found, np.float64) - a @ b) <= allowed)
        assert np.mean(allowed <= 2e-6 * np.abs(a) @ np.abs(b) + digits * np.abs(a @ b)) > 0.1


@pytest.mark.parametrize("dtype", TYPES)
def test_it_is_no_further_from_the_exact_product_than_rounding_allows(dtype: Any):
    x, kernel, _ = operands()
    found = np.asarray(precision.product_in(dtype)(x, kernel), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    (_, x_error, _), (_, kernel_error, _) = rounded(x, dtype, 0), rounded(kernel, dtype, 1)
    bound = x_error @ np.abs(kernel) + np.abs(x) @ kernel_error + x_error @ kernel_error
    assert np.all(np.abs(found - exact) <= bound + 1e-6 * np.abs(x) @ np.abs(kernel))
    assert np.linalg.norm(found - exact) > 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_token_comes_out_the_same_whatever_else_is_in_its_batch(dtype: Any):
    x, kernel, grad = operands()
    product = jax.jit(precision.product_in(dtype))
    y, pull = jax.vjp(product, x, kernel)
    for part in (slice(0, 12), slice(12, 24)):
        part_y, part_pull = jax.vjp(product, x[part], kernel)
        np.testing.assert_array_equal(part_y, y[part])
        np.testing.assert_array_equal(part_pull(grad[part])[0], pull(grad)[0][part])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_where_it_is(dtype: Any, bad: float):
    x, kernel, _ = operands()
    y = precision.product_in(dtype)(x.at[2, 3].set(bad), kernel)
    assert not np.any(np.isfinite(y[2]))
    assert np.all(np.isfinite(np.delete(y, 2, 0)))


@pytest.mark.parametrize("dtype", TYPES)
def test_two_of_three_products_of_each_linear_layer_are_of_8_bits_and_no_others(dtype: Any):
    init, apply = models.transformer(CONFIG, product=precision.product_in(dtype))
    loss_fn = precision.compute_in(jnp.bfloat16, losses.next_token(apply))
    traced = jax.make_jaxpr(jax.grad(lambda p: loss_fn(p, {"tokens": jnp.zeros((2, 8), jnp.int32)}, KEY)[0]))(init(KEY))
    products = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    types = [{v.aval.dtype for v in e.invars} for e in products]
    narrow = {jnp.dtype(dtype), jnp.dtype(gradient_type(dtype))}
    assert sum(t <= narrow for t in types) == 2 * 7  # queries, keys, values, output; gate, up, down
    assert sum(t == {jnp.dtype(jnp.bfloat16)} for t in types) >= 7
    assert all(t <= narrow or not t & narrow for t in types)


KEY = jax.random.key(0)


def batch() -> Batch:
    rng = np.random.default_rng(1)
    return {"tokens": jnp.asarray(rng.integers(0, 32, (32, 16))), "lengths": jnp.asarray(rng.integers(0, 17, 32))}


def gradients(product: Any, mesh: dict[str, Any] | None = None, zero: int = 0, microbatches: int = 1) -> Params:
    """Of the same parameters and batch."""
    init, apply = models.transformer(CONFIG, product=product)
    params = init(KEY)
    if mesh is None:
        return jax.jit(jax.grad(lambda p: losses.next_token(apply)(p, batch(), KEY)[0]))(params)
    rules = models.tensor_parallel(CONFIG)
    layout = sharding.lay_out(params, sharding.mesh(**mesh), zero=zero, rules=rules, stacked=models.stacked)
    if zero == 3:
        _, apply = models.transformer(CONFIG, product=product, wrap_layer=grads.gather_layers(layout, "blocks"))
    alone = jax.value_and_grad(losses.next_token(apply), has_aux=True)
    grad_fn = grads.data_parallel(alone, layout, microbatches=microbatches)
    return jax.jit(grad_fn)(jax.device_put(params, layout.params), batch(), KEY)[1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("mesh", "zero", "microbatches"), [({}, 1, 1), ({}, 3, 4), ({"model": 2}, 0, 4), ({"model": 2}, 3, 1)]
)
def test_gradients_on_devices_in_microbatches_are_those_of_one(dtype: Any, mesh: Any, zero: int, microbatches: int):
    """But for numbers halfway between two of 8 bits, which the last digit of float32 decides about.

    On one device, moving parameters by that digit moves gradients by up to 0.014 of what int8 does, 0.21 of float8.
    """
    exact, alone = gradients(jnp.matmul), gradients(precision.product_in(dtype))
    found = gradients(precision.product_in(dtype), mesh, zero, microbatches)

    def apart(a: Params, b: Params) -> float:
        return float(optax.tree.norm(jax.tree.map(lambda x, y: jax.device_get(x) - jax.device_get(y), a, b)))

    assert apart(alone, exact) > 1e-3 * float(optax.tree.norm(exact))
    assert apart(found, alone) < (0.03 if dtype == jnp.int8 else 0.4) * apart(alone, exact)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e5m2, jnp.int32])
def test_other_types_are_refused(dtype: Any):
    with pytest.raises(ValueError, match=f"{jnp.dtype(dtype).name} is not int8 or float8_e4m3fn; use one, or compute"):
        precision.product_in(dtype)


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "able"),
    [
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", False),
        ("gpu", "NVIDIA L4", "8.9", True),
        ("gpu", "NVIDIA B200", "10.0", True),
        ("tpu", "TPU v5 lite", None, False),
        ("tpu", "TPU v6 lite", None, False),
        ("tpu", "TPU7x", None, True),
    ],
)
def test_float8_is_refused_where_the_device_has_none(
    monkeypatch: pytest.MonkeyPatch, platform: str, kind: str, capability: str | None, able: bool
):
    device = types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    precision.product_in(jnp.int8)
    if able:
        precision.product_in(jnp.float8_e4m3fn)
    else:
        with pytest.raises(ValueError, match=f"{kind} has no products in float8; use jnp.int8"):
            precision.product_in(jnp.float8_e4m3fn)
