from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import layered
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxlm import grads, models, optim, sharding, train
from jaxlm.evaluate import make_eval
from jaxlm.losses import next_token
from jaxlm.precision import compute_in, scale_loss
from jaxlm.types import Aux, Batch, LossFn, Params

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


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.int32, "float64"])
def test_other_types_are_refused(dtype: Any):
    with pytest.raises(ValueError, match=f"{jnp.dtype(dtype).name} is none of float32, bfloat16, float16; use one"):
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


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_what_the_table_says_is_float32_is(dtype: Any, activation: Any):
    config = models.TransformerConfig(vocab=8, layers=1, width=8, heads=2, qk_norm=True, activation=activation)
    init, apply = models.transformer(config)
    grad_fn = jax.value_and_grad(compute_in(dtype, next_token(apply, chunk=4, z_loss=1e-4)), has_aux=True)
    scale = (jnp.float32(8),) if dtype == jnp.float16 else ()
    traced = jax.make_jaxpr(grad_fn)(init(KEY), {"tokens": jnp.zeros((2, 6), jnp.int32)}, KEY, *scale)
    seen: dict[str, set[Any]] = {}
    for equation in equations(traced.jaxpr):
        floating = {v.aval.dtype for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
        seen.setdefault(equation.primitive.name, set()).update(floating)
    float32 = {jnp.dtype(jnp.float32)}
    # Softmax and log Z; norms; rotary; sums, those of accumulated gradients too; lookups and their gradients.
    for name in ("exp", "log", "rsqrt", "cos", "sin", "reduce_max", "reduce_sum", "argmax", "scatter-add", "gather"):
        assert seen.get(name, float32) == float32, name
    assert {"exp", "log", "rsqrt", "cos", "reduce_sum", "scatter-add"} <= set(seen)
    products = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    assert sum(jnp.dtype(dtype) in {v.aval.dtype for v in e.invars} for e in products) == len(products)
    logits = [e.outvars[0].aval for e in products if e.outvars[0].aval.shape == (4, config.vocab)]
    assert {x.dtype for x in logits} == float32


def test_a_scale_saves_gradients_that_underflow_and_comes_out_of_them_again():
    """2**-26 is 0 in float16, and times 2**20 it isn't."""

    def tiny(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        del batch, key
        return 2.0**-26 * jnp.sum(params["w"].astype(jnp.float32)), Aux(jnp.ones(()), {})

    params = {"w": jnp.full(3, 5.0)}
    grad_fn = jax.jit(jax.value_and_grad(compute_in(jnp.float16, tiny), has_aux=True))
    for scale, expected in ((2.0**20, 2.0**-26), (1.0, 0.0)):
        (loss, _), found = grad_fn(params, {}, KEY, jnp.float32(scale))
        assert loss == 15 * 2.0**-26
        np.testing.assert_array_equal(found["w"], np.full(3, expected, np.float32))
    halves = jax.tree.map(lambda w: w.astype(jnp.float16), params)
    _, found = jax.value_and_grad(scale_loss(tiny), has_aux=True)(halves, {}, KEY, jnp.float32(2.0**20))
    np.testing.assert_array_equal(found["w"], np.full(3, 2.0**-6, np.float16))  # too small for float16 otherwise


PLAIN = optax.chain(optim.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


def sgd(**options: Any) -> optax.GradientTransformationExtraArgs:
    return optim.dynamic_loss_scale(PLAIN, **options)


def test_float16_falls_recovers_and_goes_where_float32_does():
    """Gradients times 2**24 overflow, and so they do each time that the scale has doubled too often."""
    optimizer, batches = sgd(initial=2.0**24, growth_interval=4), layered.batches(40)
    grad_fn = jax.value_and_grad(compute_in(jnp.float16, layered.model()), has_aux=True)
    step = jax.jit(train.make_step(grad_fn, optimizer, KEY))
    exact = jax.jit(train.make_step(jax.value_and_grad(layered.model(), has_aux=True), PLAIN, KEY))
    state, plain = train.start(layered.params(), optimizer), train.start(layered.params(), PLAIN)
    scales, skipped = [], 0
    for batch in batches:
        before, (state, metrics) = state, step(state, batch)
        scales.append(float(metrics["loss_scale"]))
        assert np.isfinite(metrics["loss"])
        if metrics["skipped"] > skipped:
            skipped += 1
            jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
            continue
        plain, expected = exact(plain, batch)
        np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=2e-3)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
    falls = [b < a for a, b in zip([2.0**24, *scales], scales, strict=False)]
    rises = [b > a for a, b in zip([2.0**24, *scales], scales, strict=False)]
    assert sum(falls) == skipped
    assert any(rises[: len(falls) - 1 - falls[::-1].index(True)])  # and falls again after that
    moved = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b)), plain.params, layered.params())
    apart = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b)), plain.params, state.params)
    jax.tree.map(lambda a, m: np.testing.assert_array_less(a, 5e-3 * m), apart, moved)


def run(zero: int | None, microbatches: int, mesh: str = "8") -> train.TrainState:
    """Some steps of which the first overflow; on one device for no stage."""
    optimizer, given = sgd(initial=2.0**16), layered.batches(12)
    if zero is None:
        grad_fn = jax.value_and_grad(compute_in(jnp.float16, layered.model()), has_aux=True)
        grad_fn = grads.accumulate(grad_fn, microbatches)
        state = train.start(layered.params(), optimizer)
    else:
        layout = layered.lay_out(mesh, zero)
        wrap_layer = grads.gather_layers(layout, "blocks", dtype=jnp.float16) if zero == 3 else None
        grad_fn = jax.value_and_grad(scale_loss(layered.model(wrap_layer)), has_aux=True)
        grad_fn = grads.data_parallel(grad_fn, layout, dtype=jnp.float16, microbatches=microbatches)
        shardings = layout.state(optimizer)
        state = jax.jit(lambda: train.start(layered.params(), optimizer), out_shardings=shardings)()
        given = [sharding.place(batch, sharding.by_rows(layout.mesh)) for batch in given]
    *_, (state, _) = train.fit(train.make_step(grad_fn, optimizer, KEY), state, given)
    return sharding.to_host(state)


@pytest.fixture(scope="module")
def alone() -> train.TrainState:
    """In microbatches, since the gradient of the whole batch overflows once more than those of its parts."""
    return run(None, 4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("zero", "microbatches", "mesh"),
    [*((zero, k, "8") for zero in range(4) for k in (1, 4)), (0, 1, "4x2 model"), (3, 4, "4x2 model")],
)
def test_float16_on_devices_in_microbatches_is_as_on_one(
    zero: int, microbatches: int, mesh: str, alone: train.TrainState
):
    found = run(zero, microbatches, mesh)
    assert (found.opt_state.skipped, found.opt_state.loss_scale) == (3, 2.0**13)
    assert (alone.opt_state.skipped, alone.opt_state.loss_scale) == (3, 2.0**13)
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b), alone.params, jax.device_get(layered.params()))
    apart = jax.tree.map(lambda a, b: np.linalg.norm(a - b), alone.params, found.params)
    jax.tree.map(lambda a, m: np.testing.assert_array_less(a, 2e-3 * m), apart, moved)


def squares(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    del key
    return jnp.dot(params["w"], params["w"]).astype(jnp.float32) * batch["x"], Aux(jnp.ones(()), {})


def test_a_run_that_overflows_for_ever_ends_with_an_error():
    optimizer, batches = sgd(initial=2.0**24, smallest=2.0**22, patience=3), layered.batches(9)
    grad_fn = jax.value_and_grad(compute_in(jnp.float16, layered.model()), has_aux=True)
    step = train.make_step(grad_fn, optimizer, KEY)
    step = train.compile_step(step, train.start(layered.params(), optimizer), batches[:1])

    def states(count: int) -> Iterator[Params]:
        for state, _ in train.fit(step, train.start(layered.params(), optimizer), batches[:count]):
            yield jax.device_get(state.params)

    seen: list[Params] = []
    with pytest.raises(FloatingPointError, match="even at the smallest loss scale, and 5 steps were skipped; look for"):
        seen.extend(states(9))
    assert len(seen) == 5  # halved twice, skipped three times there, seen one step late
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), seen[-1], jax.device_get(layered.params()))
    with pytest.raises(FloatingPointError):  # also where it is the last step
        list(states(5))
    assert len(list(states(4))) == 4


def test_float16_without_a_scale_is_refused():
    params, batch = {"w": jnp.ones(3)}, {"tokens": np.ones((8, 1)), "x": np.float32(1)}
    scaled: LossFn = compute_in(jnp.float16, squares)
    with pytest.raises(ValueError, match=r"without a loss scale; wrap the optimizer in optim\.dynamic_loss_scale"):
        jax.jit(train.make_step(jax.value_and_grad(scaled, has_aux=True), optax.sgd(0.1), KEY))(
            train.start(params, optax.sgd(0.1)), batch
        )
    with pytest.raises(ValueError, match=r"grad_fn takes no loss scale; wrap the loss in precision\.scale_loss"):
        train.make_step(grads.accumulate(jax.value_and_grad(squares, has_aux=True), 2), sgd(), KEY)(
            train.start(params, sgd()), batch
        )
    layout = sharding.lay_out(params, sharding.mesh())
    with pytest.raises(ValueError, match=r"gradients underflow float16; wrap the loss in precision\.scale_loss"):
        grads.data_parallel(jax.value_and_grad(squares, has_aux=True), layout, dtype=jnp.float16)
    halves = {"w": jnp.ones(3, jnp.float16)}
    with pytest.raises(ValueError, match=r"gradients in float16, .*keep parameters in float32"):
        train.make_step(jax.value_and_grad(squares, has_aux=True), optax.sgd(0.1), KEY)(
            train.start(halves, optax.sgd(0.1)), batch
        )


def test_a_loss_alone_needs_no_scale():
    loss, _ = jax.jit(make_eval(compute_in(jnp.float16, squares)))({"w": jnp.full(3, 1 / 3)}, {"x": jnp.float32(1)})
    assert loss == pytest.approx(1 / 3, rel=2**-9)
