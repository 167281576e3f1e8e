"""What every optimizer keeps to: one matrix of optimizers and of what is asked of them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import optim, sharding, train
from jaxlm.checkpoint import Checkpoints

STACKED = optim.by_name({"blocks/.*": True, ".*": False})
MATRICES = optim.by_name({"blocks/.*kernel.*": True, ".*": False})
DECAYS = optim.by_name({".*kernel.*|embed": True, ".*": False})
DECAY: dict[str, Any] = {"weight_decay": 0.1, "decay_mask": DECAYS}
# The longer sides' products have a null space after one gradient, whose basis is any: rounding chooses.
SOAP: dict[str, Any] = {"every": 2, "largest": 32}


def optimizers(stacked: Any = STACKED) -> dict[str, optax.GradientTransformationExtraArgs]:
    guarded = optax.chain(
        optim.clip_by_global_norm(1.0), optim.lion(optax.linear_schedule(1e-3, 0, 9)), optim.weight_ema(0.9)
    )
    return {
        "adamw": optim.adamw(1e-2, **DECAY),
        "lion": optim.lion(1e-3, **DECAY),
        "lamb": optim.lamb(1e-2, adapt_mask=DECAYS, trust_clip=(0.0, 10.0), stacked=stacked, **DECAY),
        "adafactor": optim.adafactor(min_factored=8, b2_cap=0.99, stacked=stacked, **DECAY),
        "adafactor_momentum": optim.adafactor(1e-2, min_factored=8, momentum=0.9, stacked=stacked, **DECAY),
        "muon": optim.muon(
            1e-2, MATRICES, stacked=stacked, orthogonalize=optim.newton_schulz(dtype=jnp.float32), **DECAY
        ),
        "normuon": optim.muon(
            1e-2,
            MATRICES,
            stacked=stacked,
            orthogonalize=optim.polar_express(),
            variance_b2=0.95,
            scale=optim.spectral,
        ),
        "soap": optim.soap(1e-2, stacked=stacked, **SOAP, **DECAY),
        "lion_int8": optim.lion_int8(1e-3, **DECAY),
        "adamw_int8": optim.adamw_int8(1e-2, **DECAY),
        "adafactor_bf16": optim.adafactor_bf16(1e-2, min_factored=8, stacked=stacked, **DECAY),
        "per_layer": optim.per_layer(optax.lamb(1e-2), stacked),
        "guarded": optim.skip_nonfinite(guarded),
    }


LEAN = {"lion_int8", "adamw_int8", "adafactor_bf16"}


def all_but(*names: str) -> Any:
    """The test for every optimizer, but for some that the reason beside it speaks of."""
    return pytest.mark.parametrize("name", [name for name in optimizers() if name not in names])


SHAPES = {"blocks": {"kernel": (3, 24, 64), "out_kernel": (3, 64, 24), "scale": (3, 24)}, "embed": (40, 24), "gain": ()}


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def tree_of(seed: int, dtype: Any = jnp.float32, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s), dtype), SHAPES, is_leaf=is_shape)


def layout(x: Any) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.weak_type


def run(tx: Any, params: Any, steps: int = 4, first_seed: int = 1, state: Any = None) -> tuple[Any, Any]:
    """Parameters and state after some updates from fixed gradients."""
    state = jax.jit(tx.init)(params) if state is None else state

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(first_seed, first_seed + steps):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), tree_of(seed), params)
        params, state = update(grads, state, params)
    one_device = len(jax.tree.leaves(params)[0].devices()) == 1  # where the state's place is not for XLA to choose
    assert not one_device or update._cache_size() == 1  # a second call compiles nothing
    return params, state


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any, tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


@pytest.mark.sampled(5)
@all_but()
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_state_keeps_its_structure_and_dtypes(name: str, dtype: Any):
    tx, params = optimizers()[name], tree_of(0, dtype)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    before = jax.eval_shape(tx.init, params)
    assert jax.tree.map(layout, before) == jax.tree.map(layout, jax.eval_shape(tx.init, shapes))
    assert jax.tree.map(layout, before) == jax.tree.map(layout, jax.eval_shape(tx.update, shapes, before, shapes)[1])
    if name != "guarded":  # which copies the parameters
        assert jax.tree.map(layout, before) == jax.tree.map(layout, tx.init(shapes))
    if name not in ("per_layer", "adafactor_bf16"):
        floats = {x.dtype for x in jax.tree.leaves(before) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert floats == {jnp.dtype(jnp.float32)}


@all_but("per_layer")  # optax's own
def test_state_keeps_its_dtypes_also_where_float64_is_on(name: str):
    with jax.enable_x64(True):
        tx = optimizers()[name]
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=is_shape)
        before = jax.eval_shape(tx.init, shapes)
        updates, after = jax.eval_shape(tx.update, shapes, before, shapes)
    assert jax.tree.map(layout, before) == jax.tree.map(layout, after)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


@pytest.mark.sampled(5)
@all_but("per_layer")  # optax's own LAMB computes in the parameters' dtype
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_get_the_updates_of_float32_ones(name: str, dtype: Any):
    """So neither state nor hyperparameters are rounded to the parameters' precision."""
    tx, halves, grads = optimizers()[name], tree_of(0, dtype), tree_of(1, dtype)
    wide_params, wide_grads = (jax.tree.map(lambda p: p.astype(jnp.float32), x) for x in (halves, grads))
    if name == "guarded":  # clipping keeps the gradients' dtype, and rounds
        grads = wide_grads
    updates, _ = jax.jit(tx.update)(grads, tx.init(halves), halves)
    expected, _ = jax.jit(tx.update)(wide_grads, tx.init(wide_params), wide_params)
    # XLA may fuse a multiplication and an addition in one of them: a rounding of the larger summand.
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=0, atol=2e-7 * jnp.abs(e).max()), updates, expected)


@pytest.mark.sampled(5)
@all_but()
def test_composes_with_optax(name: str):
    tx, params, grads = optimizers()[name], tree_of(0), tree_of(1)
    blocks = {"blocks": True, "embed": False, "gain": False}
    labels = {"blocks": "a", "embed": "b", "gain": "b"}
    expected = jax.jit(tx.update)(grads, tx.init(params), params)[0]
    # A global norm, or one random number, is another where there are fewer leaves or other names.
    depends = name == "guarded" or name in LEAN
    for composed, same in (
        (optax.chain(tx, optax.scale(1.0)), name not in LEAN),
        (optax.masked(tx, blocks), not depends),
        (optax.partition({"a": tx, "b": optax.sgd(1.0)}, labels), not depends),
        (optax.MultiSteps(tx, 1), True),
    ):
        state = composed.init(params)
        updates, after = jax.jit(composed.update)(grads, state, params)
        assert jax.tree.structure(state) == jax.tree.structure(after)
        if same:
            assert_close(updates["blocks"], expected["blocks"], 1e-7)


@pytest.mark.sampled(5)
@all_but()
def test_waits_for_the_second_microbatch_in_multisteps(name: str):
    tx, params, grads = optimizers()[name], tree_of(0), tree_of(1)
    multi = optax.MultiSteps(tx, 2)
    update, state = jax.jit(multi.update), multi.init(params)
    updates, state = update(grads, state, params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    updates, state = update(grads, state, params)
    assert_close(updates, jax.jit(tx.update)(grads, tx.init(params), params)[0], 1e-7)


@all_but()
def test_trees_may_have_holes(name: str):
    tx, params, grads = optimizers()[name], tree_of(0) | {"hole": None}, tree_of(1) | {"hole": None}
    assert jax.jit(tx.update)(grads, tx.init(params), params)[0]["hole"] is None


@pytest.mark.parametrize("empty", [{}, optax.MaskedNode()])
def test_trees_may_be_empty(empty: Any):
    for tx in (
        optim.adamw(1e-2),
        optim.lion(1e-2),
        optim.lamb(1e-2),
        optim.adafactor(momentum=0.9),
        optim.muon(1e-2, True),
        optim.soap(1e-2),
        optim.lion_int8(1e-2),
        optim.adamw_int8(1e-2),
        optim.adafactor_bf16(1e-2),
        optim.per_layer(optax.lamb(1e-2), False),
        optim.skip_nonfinite(optax.chain(optim.clip_by_global_norm(1.0), optim.weight_ema(0.9))),
    ):
        assert tx.update(empty, tx.init(empty), empty)[0] == empty


@all_but("per_layer")  # optax's own LAMB overflows
def test_gradients_of_any_size_leave_nothing_infinite_and_nothing_behind(name: str):
    tx = optimizers()[name]
    update = jax.jit(tx.update)
    for params in (tree_of(0), tree_of(0, scale=0)):
        for size in (0.0, 1e-38, 1e-30, 1e-15, 1e15, 1e30):
            updates, state = update(tree_of(1, scale=size), tx.init(params), params)
            for seed in range(2, 4):
                assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
                updates, state = update(tree_of(seed), state, params)
            # Of the order of a learning rate, so nothing is left of the extreme one.
            assert max(float(jnp.abs(u).max()) for u in jax.tree.leaves(updates)) < 1


@pytest.mark.sampled(5)
@all_but()
def test_a_nonfinite_gradient_can_be_skipped_without_a_trace(name: str):
    tx = optim.skip_nonfinite(optimizers()[name])
    params, state = run(tx, tree_of(0), steps=2)
    params["gain"] = jnp.array(-0.0)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        grads = tree_of(9)
        grads["embed"] = grads["embed"].at[3, 2].set(bad)
        updates, skipped = jax.jit(tx.update)(grads, state, params)
        after = optax.apply_updates(params, updates)
        assert [np.asarray(x).tobytes() for x in jax.tree.leaves((after, skipped.inner))] == [
            np.asarray(x).tobytes() for x in jax.tree.leaves((params, state.inner))
        ]
        assert skipped.skipped == 1


@pytest.mark.parametrize("guard", [optim.skip_nonfinite, optim.dynamic_loss_scale])
def test_a_nonfinite_loss_is_skipped_though_its_gradient_is_finite(guard: Any):
    """As that of a cross-entropy is where the target's logit is minus infinity."""
    tx = guard(optim.adamw(1e-3))
    params = tree_of(0)
    for loss, skipped in ((1.0, 0), (jnp.nan, 1), (jnp.inf, 1)):
        updates, state = jax.jit(tx.update)(tree_of(1), tx.init(params), params, value=jnp.float32(loss))
        assert state.skipped == skipped
        assert bool(optax.tree.norm(updates) == 0) == bool(skipped)


SPECS = {
    "blocks": {
        "kernel": PartitionSpec(None, None, "data"),
        "out_kernel": PartitionSpec(None, "data"),
        "scale": PartitionSpec(None, "data"),
    },
    "embed": PartitionSpec("data"),
    "gain": PartitionSpec(),
}


@pytest.mark.sampled(5)
@all_but()
def test_sharded_is_unsharded(name: str):
    mesh, tx, params = sharding.mesh(), optimizers()[name], tree_of(0)
    alone, alone_state = run(tx, params)
    if name == "soap":
        tx = optim.soap(1e-2, stacked=STACKED, basis_sharding=sharding.replicated(mesh), **SOAP, **DECAY)
    sharded, state = run(tx, jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)))
    # Sums in another order: some roundings of numbers of the order of 1. NorMuon rounds products to bfloat16, to
    # one neighbour or the other; SOAP's QR iteration and a momentum's random rounding amplify a last digit likewise.
    tolerance = {"normuon": 1e-3, "soap": 1e-4, "adafactor_bf16": 1e-4}.get(name, 2e-6)
    assert_close(sharded, alone, tolerance)
    if name in ("lion_int8", "adamw_int8"):  # rounding at random is the same on any mesh
        jax.tree.map(np.testing.assert_array_equal, state, alone_state)


@pytest.mark.sampled(5)
@all_but()
def test_goes_on_from_a_checkpoint(name: str, tmp_path: Path):
    tx = optimizers()[name]
    params, state = run(tx, tree_of(0), steps=2)
    saved = train.TrainState(jnp.array(2, jnp.int32), params, state)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(saved)
        restored = checkpoints.restore(train.start(params, tx))
    assert restored is not None
    assert_same(saved, restored)
    assert jax.tree.structure(saved) == jax.tree.structure(restored)
    assert_same(run(tx, params, 2, 3, state), run(tx, restored.params, 2, 3, restored.opt_state))


@pytest.mark.sampled(5)
@all_but(*LEAN, "guarded")  # random rounding depends on names; there is no reduction but the global norm
def test_stacked_is_unstacked(name: str):
    def apart(tree: Any) -> Any:
        layers = [jax.tree.map(lambda x, layer=layer: x[layer], tree["blocks"]) for layer in range(3)]
        return tree | {"blocks": {str(layer): block for layer, block in enumerate(layers)}}

    def scales(tree: Any) -> Any:
        """Layers of very different sizes, which a reduction over all would mix."""
        factors = jnp.array([0.01, 1.0, 100.0])
        blocks = jax.tree.map(lambda x: x * factors.reshape(3, *[1] * (x.ndim - 1)), tree["blocks"])
        return tree | {"blocks": blocks}

    # Sums of some thousand numbers, in another order perhaps. SOAP's QR iteration amplifies that.
    tolerance = 1e-3 if name == "soap" else 2e-6

    def close(stacked: jax.Array, alone: jax.Array) -> None:
        np.testing.assert_allclose(stacked, alone, rtol=tolerance, atol=tolerance * jnp.abs(alone).max())

    stacked_tx, tx = optimizers()[name], optimizers(stacked=False)[name]
    stacked = scales(tree_of(0))
    alone = apart(stacked)
    stacked_state, state = stacked_tx.init(stacked), tx.init(alone)
    stacked_update, update = jax.jit(stacked_tx.update), jax.jit(tx.update)
    for seed in range(1, 5):
        grads = scales(tree_of(seed))
        stacked_updates, stacked_state = stacked_update(grads, stacked_state, stacked)
        updates, state = update(apart(grads), state, alone)
        jax.tree.map(close, apart(stacked_updates), updates)
        stacked, alone = optax.apply_updates(stacked, stacked_updates), optax.apply_updates(alone, updates)


@pytest.mark.sampled(5)
@all_but("lion_int8", "adamw_int8")  # integers have no derivative
def test_can_be_differentiated_through(name: str):
    """As meta-learning does: the parameters after two updates, by the first gradients."""
    tx, params = optimizers()[name], tree_of(0)

    def after(grads: Any) -> jax.Array:
        updates, state = tx.update(grads, tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        updates, _ = tx.update(tree_of(2), state, moved)
        return optax.tree.sum(jax.tree.map(lambda p: jnp.sum(p**2), optax.apply_updates(moved, updates)))

    derivative = jax.jit(jax.grad(after))(tree_of(1))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(derivative))


@pytest.mark.parametrize("name", sorted(LEAN))
def test_lean_state_is_close_and_small(name: str):
    full = {
        "lion_int8": optim.lion(1e-3, **DECAY),
        "adamw_int8": optim.adamw(1e-2, **DECAY),
        "adafactor_bf16": optim.adafactor(1e-2, min_factored=8, momentum=0.9, stacked=STACKED, **DECAY),
    }[name]
    params = tree_of(0)
    lean, state = run(optimizers()[name], params, steps=20)
    exact, exact_state = run(full, params, steps=20)
    moved = optax.tree.norm(optax.tree.sub(exact, params))
    error = optax.tree.norm(optax.tree.sub(lean, exact))
    assert 0 < error < {"lion_int8": 0.5, "adamw_int8": 0.1, "adafactor_bf16": 0.02}[name] * moved

    def size(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    kernels = 2 * 3 * 24 * 64
    bytes_each = {"lion_int8": 1 + 4 / 64, "adamw_int8": 2 * (1 + 4 / 64), "adafactor_bf16": 2.0}[name]
    full_each = {"lion_int8": 4, "adamw_int8": 8, "adafactor_bf16": 4}[name]
    out_extra = {"lion_int8": 1, "adamw_int8": 2, "adafactor_bf16": 0}[name] * (4 / 24 - 4 / 64) * kernels / 2
    saved = kernels * (full_each - bytes_each) - out_extra
    assert size(exact_state) - size(state) == pytest.approx(saved - 4)  # its own count
