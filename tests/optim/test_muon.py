"""What Muon's parts are for: singular values near 1, whole matrices on each device."""

import re
from math import inf, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import optim, sharding
from jaxlm.optim._muon import POLAR_EXPRESS

RNG = np.random.default_rng(0)


def test_polar_express_is_the_best_quintic_at_each_step():
    """The Remez algorithm, as in the paper's section 3, from singular values of 0.001 with its cushion."""
    low, high, table = 1e-3, 1.0, []
    for _ in range(7):
        least = max(low, 0.02407327424182761 * high)
        a, b, c = _best_quintic(least, high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        a, b, c = (2 / sum(ends) * k for k in (a, b, c))
        table.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    np.testing.assert_allclose(POLAR_EXPRESS[:7], table, rtol=1e-5)


def _best_quintic(low: float, high: float) -> tuple[float, float, float]:
    q, r, error, before = (3 * low + high) / 4, (low + 3 * high) / 4, inf, 0.0
    a = b = c = 0.0
    while abs(error - before) > 1e-14:
        before = error
        rows = [[x, x**3, x**5, sign] for x, sign in ((low, 1), (q, -1), (r, 1), (high, -1))]
        a, b, c, error = np.linalg.solve(rows, np.ones(4))
        q, r = (sqrt((-3 * b + sign * sqrt(9 * b * b - 20 * a * c)) / (10 * c)) for sign in (-1, 1))
    return a, b, c


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32), (3, 16, 24)])
@pytest.mark.parametrize(
    ("how", "low", "high"), [(optim.newton_schulz(), 0.6, 1.25), (optim.polar_express(8), 0.9, 1.1)]
)
def test_singular_values_come_near_one(shape: tuple[int, ...], how: optim.Orthogonalize, low: float, high: float):
    scale = optim.scale_by_muon(0.0, orthogonalize=how, scale=lambda *_: 1.0, stacked=len(shape) == 3)
    grads = 1e-3 * jnp.asarray(RNG.normal(size=shape), jnp.float32)
    updates, _ = scale.update(grads, scale.init(grads))
    values = np.linalg.svd(updates, compute_uv=False)
    if shape[-1] == shape[-2]:  # the smallest of a square matrix may begin below what the steps can raise
        values = values[..., :-3]
    assert low < values.min()
    assert values.max() < high
    turned = np.einsum("...ij,...kj->...ik", *([np.asarray(x, np.float64) for x in (updates, grads)]))
    assert np.all(np.trace(turned, axis1=-2, axis2=-1) > 0)  # still downhill


def test_banks_are_divided_by_layer_with_two_all_to_alls():
    mesh = sharding.mesh()
    bank = NamedSharding(mesh, PartitionSpec("data"))
    tx = optim.scale_by_muon(stacked=True, bank_sharding=bank, orthogonalize=optim.polar_express(dtype=jnp.float32))
    grads = {"q": jnp.asarray(RNG.normal(size=(8, 16, 32)), jnp.float32)}
    rows = jax.device_put(grads, NamedSharding(mesh, PartitionSpec(None, "data")))
    state = tx.init(rows)
    update = jax.jit(tx.update, out_shardings=(jax.tree.map(lambda x: x.sharding, rows), None))
    text = update.lower(rows, state).compile().as_text()
    assert text
    assert len(re.findall(r" all-to-all\(", text)) == 2
    assert " all-gather(" not in text
    plain = optim.scale_by_muon(stacked=True, orthogonalize=optim.polar_express(dtype=jnp.float32))
    expected, _ = jax.jit(plain.update)(grads, plain.init(grads))
    np.testing.assert_allclose(update(rows, state)[0]["q"], expected["q"], atol=1e-5)


def test_muon_and_adamw_share_a_tree_and_a_learning_rate():
    params = {"kernel": jnp.asarray(RNG.normal(size=(32, 64)), jnp.float32), "scale": jnp.ones(32)}
    tx = optim.muon(1e-2, optim.by_name({"kernel": True, "scale": False}))
    grads = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), jnp.float32), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    rms = jax.tree.map(lambda u: float(jnp.sqrt(jnp.mean(u**2))), updates)
    assert rms["kernel"] == pytest.approx(0.2e-2, rel=0.2)  # AdamW's once it is under way
    assert rms["scale"] == pytest.approx(1e-2, rel=0.01)  # of its first step
