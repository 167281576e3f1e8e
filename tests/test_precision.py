from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import models
from jaxlm.losses import next_token
from jaxlm.precision import compute_in
from jaxlm.types import Aux, Batch, Params

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
PARAMS = {"embed": RNG.normal(size=(7, 16)).astype(np.float32), "head": RNG.normal(size=(16, 7)).astype(np.float32)}
BATCH = {"tokens": RNG.integers(0, 7, (4, 9))}

loss_fn = next_token(lambda params, tokens: params["embed"][tokens] @ params["head"])


def loss_and_grads(dtype: Any) -> tuple[jax.Array, Params]:
    function = compute_in(dtype, loss_fn) if dtype else loss_fn
    (loss_sum, _), grads = jax.jit(jax.value_and_grad(function, has_aux=True))(PARAMS, BATCH, KEY)
    return loss_sum, grads


def test_bfloat16_is_close_and_has_float32_gradients():
    (loss, grads), (exact_loss, exact_grads) = loss_and_grads(jnp.bfloat16), loss_and_grads(None)
    assert {x.dtype for x in jax.tree.leaves((loss, grads))} == {jnp.dtype(jnp.float32)}
    # Rounded by at most 2**-8 each: two parameters, their product, its gradient and the product with that. Nearly none
    # of the errors would point the same way.
    error = optax.tree.norm(optax.tree.sub(grads, exact_grads)) / optax.tree.norm(exact_grads)
    assert 2**-11 < error < 5**0.5 * 2**-8
    assert 0 < abs(loss / exact_loss - 1) < 2**-8


def test_float32_changes_nothing():
    jax.tree.map(np.testing.assert_array_equal, loss_and_grads(jnp.float32), loss_and_grads(None))


def test_only_floating_point_parameters_are_rounded():
    params = {"kernel": jnp.ones(2), "half": jnp.ones(2, jnp.bfloat16), "count": jnp.ones(2, jnp.int32), "key": KEY}

    def look(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        del batch, key
        return jnp.zeros(()), Aux(jnp.zeros(()), params)

    def dtypes(dtype: Any) -> dict[str, Any]:
        return {
            name: x.dtype for name, x in jax.eval_shape(compute_in(dtype, look), params, BATCH, KEY)[1].metrics.items()
        }

    same = {"count": jnp.int32, "key": KEY.dtype}
    assert dtypes(jnp.bfloat16) == {"kernel": jnp.bfloat16, "half": jnp.bfloat16} | same
    assert dtypes(jnp.float32) == {"kernel": jnp.float32, "half": jnp.float32} | same


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64, jnp.int32, "float16"])
def test_other_types_are_refused(dtype: Any):
    with pytest.raises(ValueError, match=f"{jnp.dtype(dtype).name} is neither bfloat16 nor float32; use one of these"):
        compute_in(dtype, loss_fn)


def test_the_gradient_of_a_frequent_token_is_that_of_float32() -> None:
    init, apply = models.transformer(models.TransformerConfig(vocab=8, layers=1, width=8, heads=2))
    params = init(jax.random.key(0))
    batch = {"tokens": jnp.full((16, 256), 3)}
    half, full = (
        jax.jit(jax.grad(lambda p, loss_fn=loss_fn: loss_fn(p, batch, jax.random.key(0))[0]))(params)["embed"][3]
        for loss_fn in (compute_in(dtype, next_token(apply)) for dtype in (jnp.bfloat16, jnp.float32))
    )
    np.testing.assert_allclose(half, full, rtol=0, atol=0.03 * float(jnp.max(jnp.abs(full))))
