"""Clipping, skipping, averaging, decaying, layers apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import losses, optim, train

RNG = np.random.default_rng(0)
PARAMS = {"a": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32), "b": jnp.asarray(RNG.normal(size=5), jnp.float32)}
GRADS = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), jnp.float32), PARAMS)


def test_clipping_scales_to_the_norm_and_keeps_every_bit_of_shorter_gradients():
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in GRADS.values()))
    clip = optim.clip_by_global_norm(0.5)
    clipped, _ = clip.update(GRADS, clip.init(PARAMS))
    jax.tree.map(lambda c, g: np.testing.assert_allclose(c, np.float64(g) * 0.5 / norm, rtol=3e-7), clipped, GRADS)
    long = optim.clip_by_global_norm(float(norm) * 1.001)
    jax.tree.map(np.testing.assert_array_equal, long.update(GRADS, long.init(PARAMS))[0], GRADS)


def test_the_norm_of_bfloat16_gradients_is_taken_in_float32():
    grads = {"a": jnp.full((300, 300), 1.0, jnp.bfloat16)}  # a bfloat16 sum of ones stops at 256
    clip = optim.clip_by_global_norm(3.0)
    clipped, _ = clip.update(grads, clip.init(grads))
    assert clipped["a"].dtype == jnp.bfloat16
    assert float(clipped["a"][0, 0]) == 3 / 300 + (float(jnp.bfloat16(0.01)) - 0.01)


def test_zero_gradients_are_not_divided_by_their_norm():
    clip = optim.clip_by_global_norm(1.0)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, clip.update(zeros, clip.init(PARAMS))[0], zeros)


def test_a_step_computes_the_norm_once_for_clipping_skipping_and_its_metric():
    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return params["embed"][tokens] @ params["head"]

    params = {"embed": jnp.ones((7, 5)), "head": jnp.ones((5, 7))}
    grad_fn = jax.value_and_grad(losses.next_token(apply), has_aux=True)
    batch = {"tokens": jnp.ones((2, 6), jnp.int32)}

    def sums(optimizer: optax.GradientTransformation) -> int:
        step = jax.jit(train.make_step(grad_fn, optimizer, jax.random.key(0)))
        text = step.lower(train.start(params, optimizer), batch).compile().as_text()
        assert text
        return text.count(" reduce(")

    clipped = optax.chain(optim.clip_by_global_norm(1.0), optax.sgd(0.1))
    assert sums(optim.skip_nonfinite(clipped)) == sums(optax.sgd(0.1))
    assert sums(optax.chain(optax.scale(0.5), clipped)) > sums(optax.sgd(0.1))  # a norm of something else


def test_a_skipped_update_advances_no_schedule():
    tx = optim.skip_nonfinite(optax.sgd(lambda count: 10.0**-count))
    state = tx.init(PARAMS)
    sizes = []
    for bad in (False, True, True, False):
        grads = jax.tree.map(lambda g, bad=bad: jnp.full_like(g, jnp.nan if bad else 1.0), GRADS)
        updates, state = tx.update(grads, state, PARAMS)
        sizes.append(float(updates["b"][0]))
    np.testing.assert_allclose(sizes, [-1, 0, 0, -0.1], rtol=1e-6)
    assert state.skipped == 2


def test_the_loss_scale_doubles_after_clean_updates_and_halves_at_overflow():
    tx = optim.dynamic_loss_scale(optax.adam(0.1), initial=8, smallest=2, growth_interval=3, patience=3)
    update, state, params = jax.jit(tx.update), tx.init(PARAMS), PARAMS
    scales: list[float] = []
    for fine in (1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0):
        grads = jax.tree.map(lambda g, fine=fine: g.at[0].set(g[0] if fine else jnp.inf), GRADS)
        before, (updates, state) = state, update(grads, state, params)
        if not fine or not before.loss_scale:
            jax.tree.map(np.testing.assert_array_equal, state.inner, before.inner)
            jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), params)
        params = optax.apply_updates(params, updates)
        scales.append(float(state.loss_scale))
    # Halved to the smallest, where two skipped in a row are borne and the third ends it, for ever.
    assert scales == [8, 8, 16, 16, 16, 8, 8, 8, 4, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0]
    assert (state.inner[0].count, state.skipped) == (8, 12)


def test_the_loss_scale_is_not_the_loss():
    """A loss that is infinite though its gradient is not leaves the scale as it is."""
    tx = optim.dynamic_loss_scale(optax.sgd(0.1), initial=8, smallest=2, growth_interval=3, patience=3)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    scales: list[float] = []
    for loss in (1, 1, jnp.inf, 1, 1, jnp.nan, jnp.inf, 1, jnp.inf, jnp.inf, jnp.inf, 1):
        _, state = update(GRADS, state, PARAMS, value=jnp.float32(loss))
        scales.append(float(state.loss_scale))
    assert scales == [8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 32]
    assert state.skipped == 6


def test_the_loss_scale_has_a_ceiling():
    tx = optim.dynamic_loss_scale(optax.sgd(0.1), initial=2**23, growth_interval=1)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(GRADS, state, PARAMS)
    assert state.loss_scale == 2**24


def test_the_loss_scale_is_found_wherever_it_is():
    tx = optax.chain(optax.identity(), optim.skip_nonfinite(optim.dynamic_loss_scale(optax.sgd(0.1), initial=4)))
    found = optim.loss_scaling(tx.init(PARAMS))
    assert found is not None
    assert found.loss_scale == 4
    assert optim.loss_scaling(optax.adam(0.1).init({"loss_scale": jnp.ones(())})) is None
    with pytest.raises(ValueError, match="has 2 dynamic_loss_scale; use one"):
        optim.loss_scaling((tx.init(PARAMS), tx.init(PARAMS)))


def test_weights_are_averaged_in_float32():
    tx = optax.chain(optax.sgd(0.1), optim.weight_ema(0.9))
    params: Any = {"a": jnp.full(3, 1.0, jnp.bfloat16)}
    state = tx.init(params)
    average = weights = np.ones(3)
    for count in range(1, 30):
        updates, state = tx.update({"a": jnp.full(3, 0.5, jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
        weights = np.asarray(params["a"], np.float64)
        decay = min(0.9, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * weights
    found = optim.averaged_weights(state, params)["a"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(state[1].weights["a"], average, rtol=1e-6)
    assert not np.allclose(average, weights, rtol=0.1)
    with pytest.raises(ValueError, match="has 0 weight_ema"):
        optim.averaged_weights(optax.sgd(0.1).init(params), params)


def test_decay_follows_its_mask_and_cautious_decay_opposes_no_update():
    updates = {"a": jnp.array([1.0, -1.0, 0.0]), "b": jnp.array([1.0])}
    params = {"a": jnp.array([2.0, 2.0, -2.0]), "b": jnp.array([2.0])}
    plain = optim.add_decayed_weights(0.5, {"a": True, "b": False})
    jax.tree.map(
        np.testing.assert_array_equal,
        plain.update(updates, plain.init(params), params)[0],
        {"a": np.array([2.0, 0.0, -1.0]), "b": np.array([1.0])},
    )
    cautious = optim.add_decayed_weights(0.5, cautious=True)
    found, _ = cautious.update(updates, cautious.init(params), params)
    np.testing.assert_array_equal(found["a"], [2.0, -1.0, -1.0])


def test_per_layer_keeps_what_looks_at_the_whole_tree_whole():
    params = {"blocks": jnp.asarray(RNG.normal(size=(3, 4, 2)), jnp.float32), "embed": PARAMS["a"]}
    apart = {f"{layer}": params["blocks"][layer] for layer in range(3)} | {"embed": params["embed"]}
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.scale_by_trust_ratio())
    stacked = optim.per_layer(tx, optim.by_name({"blocks": True, "embed": False}))
    found, _ = stacked.update(params, stacked.init(params), params)
    expected, _ = tx.update(apart, tx.init(apart), apart)
    np.testing.assert_array_equal(found["blocks"], np.stack([expected[f"{layer}"] for layer in range(3)]))
    np.testing.assert_array_equal(found["embed"], expected["embed"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.clip_by_global_norm(0.0), "max_norm is 0.0; use a number above 0"),
        (lambda: optim.dynamic_loss_scale(optax.sgd(0.1), initial=3), "initial is 3; use a power of two"),
        (lambda: optim.dynamic_loss_scale(optax.sgd(0.1), initial=2**25), "initial is 33554432; .*at most 2"),
        (lambda: optim.dynamic_loss_scale(optax.sgd(0.1), smallest=0), "smallest is 0; use a power of two"),
        (lambda: optim.dynamic_loss_scale(optax.sgd(0.1), initial=1, smallest=2), "initial is 1, below the smallest"),
        (
            lambda: optim.dynamic_loss_scale(optax.sgd(0.1), growth_interval=0),
            "growth_interval is 0; use a whole number",
        ),
        (lambda: optim.dynamic_loss_scale(optax.sgd(0.1), patience=0), "patience is 0; use a whole number, 1 or more"),
        (lambda: optim.dynamic_loss_scale(optax.sgd(0.1), patience=np.nan), "patience is nan"),
        (lambda: optim.clip_by_global_norm(np.float32(-1.0)), "max_norm is -1.0"),  # which would turn gradients round
        (lambda: optim.weight_ema(1.0), "decay is 1.0; use 0.0 <= decay < 1.0"),
        (lambda: optim.scale_by_adam(b2=1.0), "b2 is 1.0"),
        (lambda: optim.lion(1e-3, b2=0.0), "nothing is kept of past gradients"),
        (lambda: optim.scale_by_lamb(trust_clip=(2.0, 1.0)), r"trust_clip is \(2.0, 1.0\)"),
        (lambda: optim.scale_by_adafactor(clip=0.0), "clip is 0.0"),
        (lambda: optim.scale_by_adafactor(clip=np.nan), "clip is nan"),
        (lambda: optim.scale_by_adafactor(b2_offset=-1), "b2_offset is -1; use 0.0 <= b2_offset"),
        (lambda: optim.scale_by_adafactor(eps1=0.0), "eps1 is 0.0"),
        (lambda: optim.scale_by_adam(eps=0.0), "eps is 0.0"),  # where a gradient is 0 the update would be NaN
        (lambda: optim.scale_by_adam(eps=1e-50), "eps is 1e-50"),
        (lambda: optim.scale_by_lamb(eps=0.0), "eps is 0.0"),
        (lambda: optim.scale_by_soap(eps=0.0), "eps is 0.0"),
        (lambda: optim.scale_by_adam(b1=jnp.float32(1.0)), "b1 is 1.0"),
        (lambda: optim.adamw(float("nan")), "adamw: learning_rate is nan; use 0.0 <= learning_rate < inf"),
        (lambda: optim.adamw(np.float64(-1e-3)), "adamw: learning_rate is -0.001"),
        (lambda: optim.adafactor(-1.0), "adafactor: learning_rate"),
        (lambda: optim.lamb(-1.0), "lamb: learning_rate"),
        (lambda: optim.lion(-1.0), "lion: learning_rate"),
        (lambda: optim.muon(-1.0, True), "muon: learning_rate"),
        (lambda: optim.soap(-1.0), "soap: learning_rate"),
        (lambda: optim.adamw(1e-3, weight_decay=-0.1), "weight_decay is -0.1; use 0.0 <= weight_decay < inf"),
        (lambda: optim.lamb(1e-3, weight_decay=np.nan), "weight_decay is nan"),
        (lambda: optim.scale_by_soap(every=2.5), "every is 2.5"),
        (lambda: optim.newton_schulz(0), "newton_schulz: steps is 0; use a whole number, 1 or more"),
        (lambda: optim.newton_schulz(eps=np.nan), "eps is nan"),
        (lambda: optim.newton_schulz(eps=0.0), "eps is 0.0"),
        (lambda: optim.scale_by_adafactor(b2_cap=0.0), "b2_cap is 0.0"),
        (lambda: optim.scale_by_soap(every=0), "every is 0"),
        (lambda: optim.scale_by_muon().init(PARAMS), r"the leaf 'b' has shape \(5,\), so isn't a matrix.*AdamW"),
        (lambda: optim.scale_by_muon(stacked=True).init({"a": PARAMS["a"]}), "'a'.*isn't a stack of matrices"),
        (lambda: optim.lean(optim.lion(1e-3), {".*nu.*": optim.int8}).init(PARAMS), "no state leaf matches"),
        (lambda: optim.muon(1e-3, {"a": "muon", "b": "adamw"}).init(PARAMS), "a mask holds 'muon'; use True or False"),
        (lambda: optim.adafactor(stacked=True).init({"gain": jnp.ones(())}), "`stacked` marks 'gain', a scalar"),
        (lambda: optim.polar_express(0), "polar_express: steps is 0; use a whole number, 1 or more"),
        (lambda: optim.by_name({"a": True})(PARAMS), "no pattern matches the leaf 'b'"),
        (lambda: optim.by_name({".*": True, "c": False})(PARAMS), r"no leaf takes its value from \['c'\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_is_wrong_is_said_where_it_is_made(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("tx", [optim.lamb(1e-2), optim.adafactor(), optim.adamw(1e-2, weight_decay=0.1)])
def test_an_update_without_parameters_is_refused_where_they_are_needed(tx: Any):
    with pytest.raises(ValueError, match="update needs the parameters"):
        tx.update(GRADS, tx.init(PARAMS))
