"""Every optimizer follows its paper's equations: to 1e-12 in float64, to 2e-7 of parameters of order 0.1 in float32."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from oracles import Array, Rule, Value

from jaxlm import optim

STEPS = 100
LAYERS = 3
# By the two largest axes of at least 4: vectors, `thin` and scalars aren't factored, `cube` is over axes 0 and 2. No
# matrix is more than one longer than wide: SOAP's first covariance then has a null space of one dimension at most, and
# all its eigenvectors are determined but for their signs. `zeros` begins at zero, `still` has no gradient, `stack`
# is three tensors.
SHAPES = {
    "scalar": (),
    "vector": (7,),
    "thin": (2, 3),
    "wide": (4, 5),
    "tall": (5, 4),
    "zeros": (5, 5),
    "cube": (5, 3, 4),
    "stack": (LAYERS, 4, 5),
    "still": (4, 3),
}
STACKED = {name: name == "stack" for name in SHAPES}
MATRICES = ("thin", "wide", "tall", "zeros", "stack", "still")
MUON_STACKED = {name: STACKED[name] for name in MATRICES}


def leaves(names: tuple[str, ...] = tuple(SHAPES)) -> tuple[dict[str, Array], dict[str, Array]]:
    """Float32 parameters of order 0.1, and gradients [step, ...]; layers of `stack` differ by decades in both."""
    rng = np.random.default_rng(0)
    params = {name: 0.05 * rng.normal(size=shape) * (name != "zeros") for name, shape in SHAPES.items()}
    grads = {name: rng.normal(size=(STEPS, *shape)) * (name != "still") for name, shape in SHAPES.items()}
    params["stack"] *= np.array([0.01, 0.3, 1.0])[:, None, None]
    grads["stack"] *= np.array([1e-2, 1.0, 1e2])[:, None, None]
    return ({n: params[n].astype(np.float32) for n in names}, {n: grads[n].astype(np.float32) for n in names})


class Case(NamedTuple):
    make: Callable[[Any], optax.GradientTransformationExtraArgs]  # of the dtype to orthogonalise in
    rule: Callable[[str], Rule]  # a new oracle for the leaf of this name, or for a layer of it
    learning_rate: Value
    decay: Callable[[str], float] = lambda _: 0.0
    names: tuple[str, ...] = tuple(SHAPES)
    cautious: bool = False  # of the matrices
    vectors_rate: Value | None = None  # of the leaves that Muon leaves to AdamW, if another


def ramp(count: Any) -> Any:
    return 2e-5 * (count + 1)


def momentum_cycle(count: Any) -> Any:
    """Between 0.85 and 0.95, the same in Python and in JAX."""
    return 0.95 - 0.01 * (count % 11)


def at_least_matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def only_matrices(value: float, name: str) -> float:
    return value if name not in ("scalar", "vector") else 0.0


ADAFACTOR = {"min_factored": 4}
ADAMW_LM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
SOAP = {"b1": 0.9, "b2": 0.95, "shampoo_b2": 0.8}
CLIP = (0.03, 1.5)


def adafactor(learning_rate: Value | None, *, decay: float = 0.0, **options: Any) -> Case:
    """Of jaxlm's own names for what the oracle calls decay, cap and offset."""
    names = {"b2_decay": "decay", "b2_cap": "cap", "b2_offset": "offset"}
    ours = {"learning_rate": learning_rate, "weight_decay": decay, "stacked": STACKED, **ADAFACTOR, **options}
    theirs = ADAFACTOR | {names.get(name, name): value for name, value in options.items()}
    return Case(
        lambda _: optim.adafactor(**ours),
        lambda _: oracles.Adafactor(**theirs),
        oracles.relative_step if learning_rate is None else learning_rate,
        lambda _: decay,
    )


def lamb(learning_rate: float, *, decay: float = 0.0, masked: bool = False, clip: Any = None, **options: Any) -> Case:
    mask = at_least_matrices if masked else None
    return Case(
        lambda _: optim.lamb(
            learning_rate,
            weight_decay=decay,
            decay_mask=mask,
            adapt_mask=mask,
            trust_clip=clip,
            stacked=STACKED,
            **options,
        ),
        lambda name: oracles.Lamb(
            decay=only_matrices(decay, name) if masked else decay,
            adapt=not masked or name not in ("scalar", "vector"),
            clip=clip or (0.0, np.inf),
            **options,
        ),
        learning_rate,
    )


def muon(learning_rate: float, *, scale: str = "match_adamw", decay: float = 0.0, **options: Any) -> Case:
    """`scale_by_muon` in the chain that the alias documents; both scales have one name here and there."""

    def make(dtype: Any) -> optax.GradientTransformationExtraArgs:
        orthogonalize = optim.newton_schulz(dtype=dtype)
        direction = optim.scale_by_muon(
            orthogonalize=orthogonalize, scale=getattr(optim, scale), stacked=MUON_STACKED, **options
        )
        return optax.chain(
            direction,
            optim.add_decayed_weights(decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    return Case(
        make,
        lambda _: oracles.Muon(scale=getattr(oracles, scale), **options),
        learning_rate,
        lambda _: decay,
        MATRICES,
    )


def soap(learning_rate: float, *, decay: float = 0.0, **options: Any) -> Case:
    return Case(
        lambda _: optim.soap(learning_rate, stacked=STACKED, weight_decay=decay, **options),
        lambda _: oracles.Soap(**options),
        learning_rate,
        lambda _: decay,
    )


def whole_muon(**options: Any) -> Case:
    """The alias: Muon for the matrices, AdamW for the rest."""
    betas = {"b1": 0.8, "b2": 0.98, "eps": 1e-6}
    return Case(
        lambda dtype: optim.muon(
            1e-3,
            {name: name in MATRICES for name in SHAPES},
            orthogonalize=optim.newton_schulz(dtype=dtype),
            weight_decay=0.1,
            decay_mask=at_least_matrices,
            stacked=STACKED,
            **{f"adamw_{name}": value for name, value in betas.items()},
            **options,
        ),
        lambda name: oracles.Muon() if name in MATRICES else oracles.Adam(**betas),
        1e-3,
        partial(only_matrices, 0.1),
        cautious=options.get("cautious", False),
        vectors_rate=options.get("adamw_learning_rate"),
    )


CASES = {
    "adamw": Case(lambda _: optim.adamw(1e-3), lambda _: oracles.Adam(), 1e-3),
    "adamw with decay of matrices": Case(
        lambda _: optim.adamw(1e-3, weight_decay=0.1, decay_mask=at_least_matrices, **ADAMW_LM),
        lambda _: oracles.Adam(**ADAMW_LM),
        1e-3,
        partial(only_matrices, 0.1),
    ),
    "adamw with a schedule": Case(
        lambda _: optim.adamw(ramp, b2=0.98, weight_decay=0.1),
        lambda _: oracles.Adam(b2=0.98),
        ramp,
        lambda _: 0.1,
    ),
    "lion": Case(lambda _: optim.lion(1e-4, b1=0.9, b2=0.99), lambda _: oracles.Lion(0.9, 0.99), 1e-4),
    "lion with decay of matrices": Case(
        lambda _: optim.lion(3e-4, b1=0.95, b2=0.98, weight_decay=1.0, decay_mask=at_least_matrices),
        lambda _: oracles.Lion(0.95, 0.98),
        3e-4,
        partial(only_matrices, 1.0),
    ),
    "lion with schedules": Case(
        lambda _: optim.lion(ramp, b1=momentum_cycle, b2=0.98),
        lambda _: oracles.Lion(momentum_cycle, 0.98),
        ramp,
    ),
    "lamb": lamb(1e-2),
    "lamb with decay": lamb(1e-2, decay=0.01, b1=0.9, b2=0.98, eps=1e-6),
    "lamb as the authors' code": lamb(1e-3, decay=0.01, masked=True, bias_correction=False),
    "lamb with clipped ratios": lamb(1e-2, decay=0.1, clip=CLIP),
    "adafactor": adafactor(None),
    "adafactor with a learning rate": adafactor(1e-3, parameter_scale=False),
    "adafactor with a schedule and decay": adafactor(ramp, parameter_scale=False, decay=0.1),
    "adafactor unfactored": adafactor(None, min_factored=128),
    "adafactor unclipped": adafactor(None, clip=None),
    "adafactor with an eps1 that is felt": adafactor(None, eps1=1e-2),
    "adafactor clipped hard": adafactor(1e-2, clip=0.5, eps2=0.03, b2_decay=0.6),
    "adafactor with momentum": adafactor(1e-2, momentum=0.9, decay=0.1),
    "adafactor as in vision": adafactor(1e-3, momentum=0.9, clip=None, parameter_scale=False, b2_cap=0.9, decay=0.03),
    "adafactor with an offset": adafactor(None, b2_offset=7),
    "muon": muon(1e-3),
    "muon with decay and spectral scale": muon(1e-3, scale="spectral", decay=0.1),
    "muon without nesterov": muon(1e-3, nesterov=False, momentum=0.9),
    "normuon": muon(1e-3, variance_b2=0.95),
    "muon and adamw": whole_muon(),
    "muon and adamw, cautious, two rates": whole_muon(cautious=True, adamw_learning_rate=ramp),
    "soap": soap(1e-3, **SOAP),
    "soap with decay, at every step": soap(1e-3, decay=0.1, every=1),
    "soap with an axis too long": soap(1e-3, every=3, largest=4),
}


def trajectory(tx: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    """The parameters after each gradient, [step, ...]."""

    def step(carry: Any, g: Any) -> Any:
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


def followed(tx: optax.GradientTransformation, params: dict[str, Array], grads: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(np.asarray, jax.jit(partial(trajectory, tx))(params, grads))


def required(
    case: Case, params: dict[str, Array], grads: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What the oracle says, [step, ...], and how determined each coordinate is (Lion's margin)."""
    wanted, margins = {}, {}
    for name in case.names:
        layers = [(i,) for i in range(LAYERS)] if STACKED[name] else [(...,)]
        wanted[name] = np.empty((STEPS, *SHAPES[name]))
        margins[name] = np.full(SHAPES[name], np.inf)
        for i in layers:
            rule = case.rule(name)
            other = case.vectors_rate is not None and name not in MATRICES
            rate = case.vectors_rate if other else case.learning_rate
            args = (params[name][i], grads[name][(slice(None), *i)], rate, case.decay(name))
            for t, x in enumerate(oracles.descend(rule, *args, cautious=case.cautious and name in MATRICES)):
                wanted[name][(t, *i)] = x
            margins[name][i] = getattr(rule, "margin", np.inf)
    return wanted, margins


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float64_equals_the_paper(case: Case) -> None:
    """To 1e-12 of the way gone so far, at every one of 100 steps, for every leaf and layer by itself."""
    params, grads = leaves(case.names)
    with jax.enable_x64(True):
        double = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
        got = followed(case.make(jnp.float64), double(params), double(grads))
    wanted, _ = required(case, params, grads)
    for name in case.names:
        assert got[name].dtype == np.float64
        axes = tuple(range(2 if STACKED[name] else 1, wanted[name].ndim))
        start = np.asarray(params[name], np.float64)[None]
        way = np.cumsum(np.max(np.abs(np.diff(wanted[name], axis=0, prepend=start)), axis=axes), axis=0)
        error = np.max(np.abs(got[name] - wanted[name]), axis=axes)
        assert np.all(error <= 1e-12 * way), f"{name}: {np.max(error / np.maximum(way, 1e-300)):.1e}"


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float32_stays_with_the_paper_for_100_steps(case: Case) -> None:
    params, grads = leaves(case.names)
    got = followed(case.make(jnp.float32), params, grads)
    wanted, margins = required(case, params, grads)
    undetermined = 0
    for name in case.names:
        assert got[name].dtype == np.float32
        determined = margins[name] > 16 * np.finfo(np.float32).eps
        undetermined += np.sum(~determined)
        error = np.max(np.abs(got[name] - wanted[name]) * determined)
        assert error <= 2e-7, f"{name}: {error:.1e}"
    assert undetermined <= 1  # of 209: Lion's signs where c is all rounding


def test_the_relative_step_of_adafactor_falls_after_ten_thousand_updates() -> None:
    """min(1e-2, 1/sqrt(t)) changes at t = 10,000."""
    steps, start = 10_400, np.array([0.05, -0.1, 0.02])
    grads = np.random.default_rng(1).normal(size=(steps, 3))
    *_, before, last = oracles.descend(oracles.Adafactor(), start, grads, oracles.relative_step)
    *_, constant = oracles.descend(oracles.Adafactor(), start, grads, 1e-2)
    with jax.enable_x64(True):
        got = followed(optim.adafactor(), {"x": jnp.asarray(start)}, {"x": jnp.asarray(grads)})["x"]
    np.testing.assert_allclose(got[-2:], [before, last], rtol=1e-11)
    assert np.max(np.abs(constant / last - 1)) > 1e-3


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda b1, b2: optim.scale_by_adam(b1, b2), oracles.Adam),
        (lambda b1, b2: optim.scale_by_lion(b1, b2), oracles.Lion),
        (lambda b1, b2: optim.scale_by_lamb(b1, b2), oracles.Lamb),
        (lambda b1, b2: optim.scale_by_soap(b1, b2), oracles.Soap),
        (
            lambda b1, b2: optim.scale_by_muon(
                b1, variance_b2=b2, orthogonalize=optim.newton_schulz(dtype=jnp.float64)
            ),
            lambda b1, b2: oracles.Muon(b1, variance_b2=b2),
        ),
    ],
    ids=["adam", "lion", "lamb", "soap", "muon"],
)
def test_betas_may_be_traced(
    make: Callable[[Any, Any], optax.GradientTransformation], rule: Callable[..., Rule]
) -> None:
    """One compiled program for all values, which then are arguments."""
    params, grads = (tree["wide"].astype(np.float64) for tree in leaves())

    @jax.jit
    def run(b1: Any, b2: Any) -> Any:
        tx = optax.chain(make(b1, b2), optax.scale_by_learning_rate(1e-3))
        return trajectory(tx, jnp.asarray(params), jnp.asarray(grads))

    with jax.enable_x64(True):
        for b1, b2 in [(0.9, 0.99), (0.6, 0.95)]:
            *_, wanted = oracles.descend(rule(b1=b1, b2=b2), params, grads, 1e-3)
            got = np.asarray(run(jnp.float64(b1), jnp.float64(b2)))[-1]
            assert np.max(np.abs(got - wanted)) <= 1e-12 * np.max(np.abs(wanted))
    assert run._cache_size() == 1


def test_lion_needs_a_momentum() -> None:
    """Its update is made from the new momentum, which with b2 = 0 has forgotten the gradient before."""
    with pytest.raises(ValueError, match="b2 is 0"):
        optim.lion(1e-3, b2=0.0)


def test_cautious_decay_follows_its_paper_at_zero_too() -> None:
    """Algorithm 1 decays where u x >= 0, so also where nothing moves the parameter."""
    x, u = np.array([1.0, 1.0, -1.0, -1.0, 2.0, 0.0]), np.array([3.0, -3.0, 3.0, -3.0, 0.0, 1.0])
    tx = optim.add_decayed_weights(0.1, cautious=True)
    got, _ = tx.update(jnp.asarray(u), tx.init(jnp.asarray(x)), jnp.asarray(x))
    (wanted,) = oracles.descend(lambda g, _: g, x, [u], 1.0, 0.1, cautious=True)
    np.testing.assert_allclose(x - np.asarray(got), wanted, rtol=1e-6)


def with_spectrum(rows: int, columns: int, spectrum: Array) -> Array:
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(spectrum))))[0] for n in (rows, columns))
    return u @ np.diag(spectrum) @ v.T


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize(
    ("make", "oracle"),
    [(optim.newton_schulz, oracles.newton_schulz), (optim.polar_express, oracles.polar_express)],
    ids=["newton_schulz", "polar_express"],
)
def test_orthogonalizations_equal_their_papers(make: Any, oracle: Any, shape: tuple[int, int], steps: int) -> None:
    """To the rounding of each step's terms, which the slopes at zero of the steps after it enlarge."""
    for spectrum in (np.logspace(0, -6, min(shape)), np.linspace(3, 1, min(shape)), np.eye(min(shape))[0]):
        g = with_spectrum(*shape, spectrum)
        wanted = oracle(g, steps)
        with jax.enable_x64(True):
            got = np.asarray(jax.jit(make(steps, dtype=jnp.float64))(jnp.asarray(g)))
        assert got.dtype == np.float64
        slope = rounding = 1.0
        for c in reversed(make(steps).coefficients):
            rounding += slope * np.sum(np.abs(c))
            slope *= c[0]
        assert np.max(np.abs(got - wanted)) <= np.finfo(np.float64).eps * rounding
        single = np.asarray(make(steps, dtype=jnp.float32)(jnp.asarray(g, jnp.float32)))
        assert np.max(np.abs(single - wanted)) <= np.finfo(np.float32).eps * rounding


def test_half_precision_leaves_matrices_nearly_orthogonal() -> None:
    """Polar Express within twice its exact error, which is less than Jordan's plateau of 0.3."""
    g = with_spectrum(16, 24, np.logspace(0, -2, 16))

    def error(x: Array) -> float:
        return float(np.max(np.abs(np.linalg.svd(np.asarray(x, np.float64), compute_uv=False) - 1)))

    exact = error(oracles.polar_express(g))
    assert exact < 0.15
    assert error(optim.polar_express()(jnp.asarray(g, jnp.float32))) < 2 * exact
    assert 0.2 < error(optim.newton_schulz()(jnp.asarray(g, jnp.float32))) < 0.5
