"""What docs/optimizers.md says of optax's own; a failure here may mean that optax has been mended: change the page."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

from jaxlm import optim, schedules

BEHIND_CLIPPING: dict[str, Any] = {
    "ademamix": contrib.ademamix(1e-2),
    "adopt": contrib.adopt(1e-2),
    "nadamw": optax.nadamw(1e-2),
    "schedule_free": contrib.schedule_free(optim.adamw(1e-2, b1=0.0), 1e-2),
}
PARAMS = {"matrix": jnp.full((3, 4), 0.5), "vector": jnp.full(4, 0.5)}


def finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", BEHIND_CLIPPING)
def test_the_recommended_ones_are_sound_behind_clipping(name: str):
    tx = optax.chain(optim.clip_by_global_norm(1.0), BEHIND_CLIPPING[name])
    update = jax.jit(tx.update)
    for params in (PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)):
        state = tx.init(params)
        for size in (0.0, 1e15, 1.0):
            updates, after = update(jax.tree.map(lambda p, size=size: jnp.full_like(p, size), PARAMS), state, params)
            assert jax.tree.structure(state) == jax.tree.structure(after)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
                lambda x: (x.shape, x.dtype), after
            )
            state = after
            assert finite((updates, state))


def test_schedule_free_around_our_adamw_descends():
    inner = contrib.schedule_free(optim.adamw(0.05, b1=0.0), 0.05)
    params, state = PARAMS, inner.init(PARAMS)
    for _ in range(200):
        updates, state = inner.update(params, state, params)  # the gradient of half the sum of squares
        params = optax.apply_updates(params, updates)
    found = contrib.schedule_free_eval_params(state, params)
    assert all(float(jnp.abs(x).max()) < 0.05 for x in jax.tree.leaves(found))


def test_an_infinite_second_moment_stays_in_optax_s_and_not_in_ours():
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e25), PARAMS)
    for tx, ours in ((optax.adamw(1e-2), False), (optim.adamw(1e-2), True), (optax.lion(1e-2), True)):
        assert finite(tx.update(grads, tx.init(PARAMS), PARAMS)[1]) == ours


def test_bfloat16_parameters_have_bfloat16_moments_in_optax():
    state: Any = optax.adamw(1e-2).init(jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS))
    assert state[0].nu["vector"].dtype == jnp.bfloat16


@pytest.mark.parametrize("tx", [contrib.prodigy(), contrib.dadapt_adamw()])
def test_a_first_gradient_of_zero_is_not_a_number_to_these(tx: Any):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert not finite(tx.update(zeros, tx.init(zeros), zeros))


def test_sm3_knows_no_scalars():
    gain = {"gain": jnp.ones(())}
    with pytest.raises(IndexError):
        optax.sm3(1e-2).update(gain, optax.sm3(1e-2).init(gain), gain)


def test_a_momentum_cycle_reaches_adam_as_a_schedule():
    tx = optim.scale_by_adam(b1=schedules.triangular(0.95, 0.85, 2), b2=0.9)
    state, mu = tx.init(PARAMS), 0.0
    for b1 in (0.95, 0.9, 0.85, 0.9, 0.95):
        _, state = tx.update(PARAMS, state)
        mu = b1 * mu + (1 - b1) * 0.5
        assert float(state.mu["vector"][0]) == pytest.approx(mu, rel=1e-6)
