import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.models import functional


class Pair(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(3, 3, rngs=rngs)
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (3,)))

    def __call__(self, x: jax.Array, *, power: int = 1) -> jax.Array:
        return (self.inner(x) * self.scale[...][None]) ** power


class Stateful(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, variable: str):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = nnx.Dropout(0.5, rngs=rngs) if variable == "RngKey" else nnx.BatchNorm(3, rngs=rngs)


X = np.arange(6, dtype=np.float32).reshape(2, 3)
init, apply = functional(Pair)


def test_apply_is_the_module_and_passes_arguments_on():
    module, params = Pair(nnx.Rngs(jax.random.key(4))), init(jax.random.key(4))
    np.testing.assert_array_equal(apply(params, X), module(X))
    np.testing.assert_array_equal(apply(params, X, power=2), module(X, power=2))


def test_params_are_plain_dicts_of_arrays():
    params = init(jax.random.key(0))
    assert type(params) is dict
    assert type(params["inner"]) is dict
    assert (set(params), set(params["inner"])) == ({"inner", "scale"}, {"kernel", "bias"})
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {type(jnp.zeros(()))}


def test_init_is_a_function_of_its_key():
    jax.tree.map(np.testing.assert_array_equal, init(jax.random.key(1)), init(jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, init(jax.random.key(1)), jax.jit(init)(jax.random.key(1)))
    one, other = init(jax.random.key(1)), init(jax.random.key(2))
    assert np.all(np.asarray(one["scale"]) != np.asarray(other["scale"]))


def test_apply_depends_on_its_arguments_alone():
    params = init(jax.random.key(0))
    before = np.asarray(apply(params, X))
    assert np.all(np.asarray(apply(jax.tree.map(np.zeros_like, params), X)) == 0)
    np.testing.assert_array_equal(apply(params, X), before)


def test_init_and_apply_may_be_transformed():
    params = init(jax.random.key(0))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, X))))(params)
    np.testing.assert_allclose(
        grads["scale"], np.sum(X @ params["inner"]["kernel"] + params["inner"]["bias"][None], axis=0), rtol=1e-5
    )
    population = jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), 4))
    each = [apply(jax.tree.map(lambda p, i=i: p[i], population), X) for i in range(4)]
    np.testing.assert_allclose(jax.jit(jax.vmap(apply, (0, None)))(population, X), np.stack(each), rtol=1e-5)


def test_shapes_are_known_without_computing():
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert {leaf.shape for leaf in jax.tree.leaves(shapes)} == {(3, 3), (3,)}


@pytest.mark.parametrize("variable", ["RngKey", "BatchStat"])
def test_modules_with_state_are_refused(variable: str):
    with pytest.raises(ValueError, match=r"is not an nnx\.Param; the module must be stateless"):
        functional(lambda rngs: Stateful(rngs, variable=variable))
