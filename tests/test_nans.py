"""The first NaN is found where it is made, in loops and in gradients too."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import pallas as pl

from jaxlm.nans import first_nan
from jaxlm.train import make_step, start
from jaxlm.types import Aux, Batch, Params


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def in_loops(x: jax.Array, factors: jax.Array) -> jax.Array:
    def inner(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x * factor
        return x, jnp.sqrt(x - 3)  # NaN as soon as x is below 3

    def outer(x: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(inner, x, factors)

    return jnp.sum(jax.lax.scan(outer, x, factors)[1])


def test_in_loops_within_loops() -> None:
    factors = jnp.full((3, 4), 0.5)  # 64, 32, 16, 8; 4, 2
    found = first_nan(in_loops, jnp.float32(128), factors)
    assert found == f"sqrt, iteration 1 of 3, iteration 1 of 4, {line_of(in_loops, 'jnp.sqrt')}"
    assert first_nan(in_loops, jnp.float32(1e6), factors) is None


def test_in_a_gradient_that_a_where_was_meant_to_leave_out() -> None:
    def safe(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(x > 0, jnp.sqrt(jnp.abs(x)), 0.0))

    x = jnp.array([4.0, 0.0])
    assert first_nan(safe, x) is None
    found = first_nan(jax.jit(jax.grad(safe)), x)
    assert found is not None
    assert found.startswith("mul, in the backward pass")  # 0 times the infinite slope of the root
    assert found.endswith(line_of(safe, "jnp.sqrt"))


def test_in_a_loop_that_runs_backward() -> None:
    def body(x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
        return jnp.log(x - y), None

    def last_first(x: jax.Array) -> jax.Array:
        return jax.lax.scan(body, x, jnp.array([0.0, 9.0, 0.0]), reverse=True)[0]

    assert first_nan(last_first, jnp.float32(2)) == f"log, iteration 1 of 3, {line_of(body, 'jnp.log')}"


def by_hand(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    with_rule = jax.custom_jvp(f)
    with_rule.defjvps(None)
    return with_rule


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, by_hand], ids=["checkpoint", "jit", "custom_jvp"])
def test_in_what_is_called(wrap: Any) -> None:
    def root(x: jax.Array) -> jax.Array:
        return jnp.sqrt(x)

    found = first_nan(lambda x: wrap(root)(x) + 1, jnp.array([1.0, -1.0]))
    assert found == f"sqrt, {line_of(root, 'jnp.sqrt')}"


def test_in_a_kernel() -> None:
    def kernel(x: Any, y: Any) -> None:
        y[:] = jnp.log(x[:])

    def loss(x: jax.Array) -> jax.Array:
        shape, block = jax.ShapeDtypeStruct(x.shape, x.dtype), pl.BlockSpec((4,), lambda i: (i,))
        logs = pl.pallas_call(kernel, shape, grid=(2,), in_specs=[block], out_specs=block, interpret=True)(x)
        return jnp.sum(jnp.sqrt(logs))

    assert first_nan(loss, jnp.arange(8.0) + 1) is None
    for x, operation in ((jnp.arange(8.0) - 1, "pallas_call"), (jnp.arange(8.0) + 0.5, "sqrt")):
        found = first_nan(loss, x)
        assert found is not None
        assert found.startswith(f"{operation}, ")
        assert __file__ in found


def test_in_a_reduction_of_our_own() -> None:
    def largest(x: jax.Array) -> jax.Array:
        return jax.lax.reduce((x, -x), (x[0], -x[0]), lambda a, b: (jnp.maximum(a[0], b[0]), jnp.sqrt(b[1])), (0,))[1]

    found = first_nan(largest, jnp.array([1.0, 2.0]))
    assert found == f"reduce, {line_of(largest, 'reduce')}"


def test_an_argument_that_is_one_already() -> None:
    assert first_nan(jnp.sqrt, jnp.array([jnp.nan])) == "the arguments have a NaN"


def test_a_step_makes_no_nan_of_its_own() -> None:
    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        del key
        return jnp.sum(params["w"] * batch["x"]), Aux(jnp.sum(batch["x"]), {})

    step = make_step(jax.value_and_grad(loss, has_aux=True), optax.adamw(1e-3), jax.random.key(0))
    state = start({"w": jnp.ones(2)}, optax.adamw(1e-3))
    with jax.debug_nans(True):
        for weight in (1.0, 0.0):
            step(state, {"x": jnp.full(2, weight)})
        with pytest.raises(FloatingPointError):
            step(state, {"x": -jnp.ones(2)})
