"""What optax has too is the same here after 100 steps in float32; where optax errs, each test says in what."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from jaxlm import optim

STEPS = 100
SHAPES = {"scalar": (), "vector": (7,), "wide": (4, 9), "tall": (8, 5), "cube": (5, 3, 6)}
MATRICES = ("wide", "tall")
EPS = float(np.finfo(np.float32).eps)


def leaves(names: Any = SHAPES, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(0.05 * rng.normal(size=SHAPES[name]), jnp.float32) for name in names}
    grads = {name: jnp.asarray(rng.normal(size=(STEPS, *SHAPES[name])), jnp.float32) for name in names}
    return params, grads


def at_least_matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def trajectory(tx: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    """The parameters after each gradient, [step, ...]."""

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return jax.tree.map(np.asarray, run(params, grads))


def ramp(count: Any) -> Any:
    return 2e-5 * (count + 1)


# optax doesn't multiply Adafactor's decay by the learning rate: for ours it is divided by that.
FACTORED = {"min_dim_size_to_factor": 4, "momentum": None}
PAIRS = {
    "adamw": (
        partial(optim.adamw, 1e-3, b1=0.9, b2=0.95, weight_decay=0.1, decay_mask=at_least_matrices),
        partial(optax.adamw, 1e-3, b1=0.9, b2=0.95, weight_decay=0.1, mask=at_least_matrices),
    ),
    "adamw with a schedule": (
        partial(optim.adamw, ramp, b2=0.98),
        partial(optax.adamw, ramp, b2=0.98, weight_decay=0.0),
    ),
    "lamb": (partial(optim.lamb, 1e-2), partial(optax.lamb, 1e-2)),
    # optax's mask is of the decay alone: every leaf is adapted, biases and scalars too.
    "lamb with decay": (
        partial(optim.lamb, 1e-2, b2=0.98, weight_decay=0.01, decay_mask=at_least_matrices),
        partial(optax.lamb, 1e-2, b2=0.98, weight_decay=0.01, mask=at_least_matrices),
    ),
    "adafactor": (
        partial(optim.adafactor, 1e-2, min_factored=4),
        partial(optax.adafactor, 1e-2, **FACTORED),
    ),
    "adafactor with momentum": (
        partial(optim.adafactor, 1e-2, min_factored=4, momentum=0.9),
        partial(optax.adafactor, 1e-2, **FACTORED | {"momentum": 0.9}),
    ),
    "adafactor with decay": (
        partial(optim.adafactor, 1e-3, min_factored=4, parameter_scale=False, clip=None, weight_decay=0.1),
        partial(
            optax.adafactor,
            1e-3,
            **FACTORED,
            multiply_by_parameter_scale=False,
            clipping_threshold=None,
            weight_decay_rate=1e-4,
        ),
    ),
    "adafactor unfactored": (
        partial(optim.adafactor, 1e-2, b2_decay=0.6),
        partial(optax.adafactor, 1e-2, decay_rate=0.6),
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_same_as_optax(ours: Any, theirs: Any) -> None:
    params, grads = leaves()
    got, wanted = (trajectory(make(), params, grads) for make in (ours, theirs))
    for name in params:
        assert np.max(np.abs(got[name] - wanted[name])) <= 2e-7, name


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion_is_the_same_as_optax(decay: float) -> None:
    """But where c is all rounding, whose sign is anyone's."""
    params, grads = leaves()
    options = {"b1": 0.95, "b2": 0.98, "weight_decay": decay}
    got, wanted = (trajectory(lion(1e-4, **options), params, grads) for lion in (optim.lion, optax.lion))
    undetermined = 0
    for name in params:
        rule = oracles.Lion(0.95, 0.98)
        for g in np.asarray(grads[name], np.float64):
            rule(g, params[name])
        determined = rule.margin > 16 * EPS
        undetermined += np.sum(~determined)
        assert np.max(np.abs(got[name] - wanted[name]) * determined) <= 2e-7, name
    assert undetermined <= 1  # of 174


@pytest.mark.parametrize(
    ("scale", "consistent_rms"), [(optim.spectral, None), (optim.match_adamw, 0.2)], ids=["spectral", "match_adamw"]
)
def test_muon_without_nesterov_is_the_same_as_optax(scale: Any, consistent_rms: float | None) -> None:
    params, grads = leaves(MATRICES)
    ours = optax.chain(
        optim.scale_by_muon(
            nesterov=False, scale=scale, orthogonalize=optim.newton_schulz(dtype=jnp.float32, eps=1e-8)
        ),
        optax.scale_by_learning_rate(1e-3),
    )
    # optax's momentum is an average with bias correction, of which Newton-Schulz sees the direction alone.
    theirs = optax.contrib.muon(1e-3, nesterov=False, consistent_rms=consistent_rms)
    got, wanted = (trajectory(tx, params, grads) for tx in (ours, theirs))
    for name in params:
        assert np.max(np.abs(got[name] - wanted[name])) <= 2e-7, name


def test_optax_corrects_muons_nesterov_as_if_it_were_adam() -> None:
    """optax weighs momentum and gradient by NAdam's corrections, so that its early updates turn towards the gradient.

    Jordan's (and ours) is g + mu B, the same direction as mu m + (1 - mu) g without correction.
    """
    params, grads = leaves(MATRICES)
    ours = optax.chain(
        optim.scale_by_muon(orthogonalize=optim.newton_schulz(dtype=jnp.float32)), optax.scale_by_learning_rate(1e-3)
    )
    got, theirs = (trajectory(tx, params, grads) for tx in (ours, optax.contrib.muon(1e-3, consistent_rms=0.2)))
    for name in params:
        jordan = list(oracles.descend(oracles.Muon(), params[name], grads[name], 1e-3))
        assert np.max(np.abs(got[name] - jordan)) <= 2e-7, name
        assert np.max(np.abs(theirs[name] - jordan)) > 1e-4, name


def halves(names: Any = SHAPES) -> tuple[Any, Any]:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), leaves(names))


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "make",
    [
        optim.adamw,
        optim.lion,
        optim.lamb,
        partial(optim.adafactor, min_factored=4, momentum=0.9),
        optim.soap,
        partial(optim.muon, matrices={name: name in MATRICES for name in SHAPES}),
    ],
    ids=["adamw", "lion", "lamb", "adafactor", "soap", "muon"],
)
def test_state_of_half_precision_parameters_is_float32(make: Any) -> None:
    """optax keeps Adam's and Adafactor's moments in the type of the parameters, where b2 = 0.999 is 1."""
    params, grads = halves()
    tx = make(1e-3)
    state = tx.init(params)
    _, after = tx.update(jax.tree.map(lambda g: g[0], grads), state, params)
    for leaf in jax.tree.leaves((state, after)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    theirs = [optax.adamw(1e-3).init(params), optax.adafactor(1e-3).init(params)]
    assert all(any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state)) for state in theirs)


def test_the_second_moment_of_half_precision_parameters_does_not_stall() -> None:
    """After a jump of the gradient a bfloat16 v stays behind: its steps are below half a unit in the last place."""
    p, g = jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)

    def second_moment(tx: Any) -> Any:
        return jax.lax.fori_loop(0, 3000, lambda _, s: tx.update(g, s)[1], tx.init(p)).nu

    ours, theirs = (np.asarray(second_moment(tx), np.float64) for tx in (optim.scale_by_adam(), optax.scale_by_adam()))
    np.testing.assert_allclose(ours, 1 - 0.999**3000, rtol=1e-4)
    assert np.all(theirs < 0.6)


def test_a_learning_rate_that_changes_needs_no_injection() -> None:
    """inject_hyperparams gives b2 the type of the parameters: 0.999 becomes 1, and the first update 0/0."""
    params, grads = halves()
    first = jax.tree.map(lambda g: g[0], grads)
    ours, theirs = optim.adamw(ramp), optax.inject_hyperparams(optax.adamw)(ramp)
    got, wanted = (tx.update(first, tx.init(params), params)[0] for tx in (ours, theirs))
    exact = optim.adamw(ramp).update(
        *(jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (first, ours.init(params), params))
    )[0]
    for name in params:
        np.testing.assert_allclose(np.asarray(got[name], np.float64), np.asarray(exact[name]), rtol=2**-8)
        assert np.all(np.isnan(np.asarray(wanted[name], np.float32)))


def test_an_offset_of_adafactor_before_its_step_is_no_nan() -> None:
    """optax takes the power of a negative step."""
    params, grads = leaves()
    ours = trajectory(optim.adafactor(1e-2, b2_offset=5), params, grads)
    theirs = trajectory(optax.adafactor(1e-2, decay_offset=5), params, grads)
    for name in params:
        wanted = list(oracles.descend(oracles.Adafactor(offset=5), params[name], grads[name], 1e-2))
        assert np.max(np.abs(ours[name] - wanted)) <= 2e-7
        assert np.all(np.isnan(theirs[name][-1]))


def test_adafactors_decay_follows_the_learning_rate() -> None:
    """optax decays after the learning rate: a schedule that ends at zero goes on shrinking the parameters."""
    params, grads = leaves()
    ours = trajectory(optim.adafactor(lambda _: 0.0, weight_decay=0.1), params, grads)
    theirs = trajectory(optax.adafactor(lambda _: 0.0, weight_decay_rate=0.1), params, grads)
    for name in params:
        np.testing.assert_array_equal(ours[name][-1], params[name])
        assert np.max(np.abs(theirs[name][-1])) < 1e-4 * np.max(np.abs(params[name]))


def test_adafactor_without_a_learning_rate_has_the_papers() -> None:
    """optax then has none, which is one of 1: a hundred times the paper's."""
    params, grads = leaves()
    ours = trajectory(optim.adafactor(), params, grads)["vector"][0]
    theirs = trajectory(optax.adafactor(), params, grads)["vector"][0]
    moves = [np.max(np.abs(x - params["vector"])) for x in (ours, theirs)]
    np.testing.assert_allclose(moves[1] / moves[0], 100, rtol=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (partial(optim.lamb, 1e-2), partial(optax.lamb, 1e-2)),
        (partial(optim.adafactor, 1e-2, min_factored=4), partial(optax.adafactor, 1e-2, **FACTORED)),
    ],
    ids=["lamb", "adafactor"],
)
def test_stacked_layers_step_by_themselves(ours: Any, theirs: Any) -> None:
    """optax takes norms, clips and scales over all layers at once: a small layer moves as the large one has it."""
    (layer, grads), (other, others) = (leaves(["wide"], seed) for seed in (0, 1))
    stack = {"wide": jnp.stack([layer["wide"], 100 * other["wide"]])}
    both = {"wide": jnp.stack([grads["wide"], others["wide"]], axis=1)}
    alone = trajectory(theirs(), layer, grads)["wide"]
    got = trajectory(ours(stacked={"wide": True}), stack, both)["wide"][:, 0]
    assert np.max(np.abs(got - alone)) <= 2e-7
    way = np.max(np.abs(alone - np.asarray(layer["wide"])))
    assert np.max(np.abs(trajectory(theirs(), stack, both)["wide"][:, 0] - alone)) > 10 * way
