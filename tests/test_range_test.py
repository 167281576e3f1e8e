import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import models, train
from jaxlm.losses import next_token
from jaxlm.range_test import RangeTest, lr_range_test
from jaxlm.schedules import Schedule, constant, triangular
from jaxlm.types import Aux, Batch, Params, Step, TrainState

KEY = jax.random.key(0)
EMPTY: Iterable[Batch] = itertools.repeat({})


def descent(loss: Callable[[Any], Any], begin: float) -> tuple[Callable[[Schedule], Step], TrainState]:
    """Gradient descent on a function of one number: what a range test is given."""

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        del batch, key
        return loss(params), Aux(jnp.ones(()), {})

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def make(schedule: Schedule) -> Step:
        return train.make_step(grad_fn, optax.sgd(schedule), KEY)

    return make, train.start(jnp.float32(begin), optax.sgd(constant(0.0)))


@pytest.mark.parametrize("curvature", [0.7, 3.0, 3.1, 50.0, 1000.0])
@pytest.mark.parametrize("steps", [50, 100, 237])
def test_the_high_bound_of_a_parabola_is_just_below_where_descent_becomes_unstable(
    curvature: float, steps: int
) -> None:
    make, state = descent(lambda w: curvature / 2 * w**2, begin=1.0)
    low, high = 1e-4, 100.0
    found = lr_range_test(make, state, EMPTY, low=low, high=high, steps=steps)
    # A step at rate r multiplies w by 1 - r curvature: the loss falls until r is 2 / curvature, then rises. A mean over
    # a window of such losses is least where the window holds the last that fell, which is one of its `steps // 20`.
    window, ratio = steps // 20, (high / low) ** (1 / (steps - 1))
    assert 2 / curvature / ratio**window < found.high < 2 / curvature
    assert found.rates[0] <= found.low < found.high


def test_it_is_smiths_rule_on_means_of_losses() -> None:
    make, state = descent(lambda w: w**2, begin=1.0)
    found = lr_range_test(make, state, EMPTY, low=0.01, high=10.0, steps=60)
    rates = 0.01 * 1000 ** (np.arange(60) / 59)
    losses = np.cumprod((1 - 2 * rates) ** 2)  # after each
    means = np.convolve(losses, np.full(3, 1 / 3), "valid")
    count = 1 + np.argmax(means > 4 * np.minimum.accumulate(means))
    np.testing.assert_allclose(found.rates, rates[:count], rtol=1e-6)
    np.testing.assert_allclose(found.losses, means[:count], rtol=1e-3, atol=0)
    assert found.high == found.rates[np.argmin(means)]
    assert found.low == found.rates[np.argmax(means < 0.9 * means[0] + 0.1 * means.min()) - 1]


def test_it_stops_at_the_first_loss_that_is_not_finite() -> None:
    make, state = descent(lambda w: w - jnp.log(w), begin=3.0)  # curvature 1 at its least; NaN left of 0
    batches = iter([{}] * 100)
    found = lr_range_test(make, state, batches, low=1e-3, high=1e3, steps=99)
    assert np.all(np.isfinite(found.losses))
    assert 0 < len(list(batches)) < 100
    assert found.low < found.high < 2


def test_it_ends_with_the_batches() -> None:
    make, state = descent(lambda w: w**2, begin=1.0)
    found = lr_range_test(make, state, [{}] * 51, low=1e-5, high=1.0, steps=100)
    assert len(found.rates) == len(found.losses) == 50 - 4  # the last four windows are cut off
    np.testing.assert_allclose(found.rates[-1], 1e-5 ** (1 - 45 / 99), rtol=1e-6)


def test_what_is_refused_says_why() -> None:
    make, state = descent(lambda w: w**2, begin=1.0)
    with pytest.raises(ValueError, match=r"the loss never fell, from 1.5 upward.*; lower `low`"):
        lr_range_test(make, state, EMPTY, low=1.5, high=10.0)
    with pytest.raises(ValueError, match="the loss never fell"):
        lr_range_test(make, state, [])
    with pytest.raises(ValueError, match=r"the state has taken 3 steps; use what train.start returns"):
        lr_range_test(make, state._replace(step=jnp.int32(3)), EMPTY)
    for low, high, steps in [(0.0, 1.0, 9), (1.0, 1.0, 9), (0.1, 1.0, 1)]:
        with pytest.raises(ValueError, match=f"{steps} rates from {low} to {high}; use 2 or more, rising"):
            lr_range_test(make, state, EMPTY, low=low, high=high, steps=steps)


def token_batches() -> Iterator[Batch]:
    """Counting up, from anywhere: easy to learn."""
    rng = np.random.default_rng(0)
    while True:
        yield {"tokens": (rng.integers(0, 11, (8, 1)) + np.arange(12)) % 11}


def test_a_transformer_learns_with_the_bounds_and_its_state_is_left_as_it_was() -> None:
    init, apply = models.transformer(models.TransformerConfig(vocab=11, layers=1, width=16, heads=2))
    grad_fn = jax.value_and_grad(next_token(apply), has_aux=True)

    def make(schedule: Schedule) -> Step:
        return train.make_step(grad_fn, optax.adam(schedule), KEY)

    state = train.start(init(KEY), optax.adam(constant(0.0)))
    before = jax.tree.map(np.array, state)
    found = lr_range_test(make, state, token_batches(), low=1e-6, high=10.0, steps=100)
    jax.tree.map(np.testing.assert_array_equal, before, state)
    again = lr_range_test(make, state, token_batches(), low=1e-6, high=10.0, steps=100)
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert 1e-6 < found.low < found.high < 10

    def learnt(schedule: Schedule) -> float:
        copy = jax.tree.map(jnp.copy, state)
        return [float(m["loss"]) for _, m in train.fit(make(schedule), copy, itertools.islice(token_batches(), 60))][-1]

    cycles = learnt(triangular(found.low, found.high, 10))
    assert cycles < learnt(constant(found.low))
    assert cycles < 0.5 * np.log(11)  # nats, of the 11 tokens that are equally likely at first


def test_the_plot_shows_losses_and_bounds(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    test = RangeTest(np.array([1e-3, 1e-2, 1e-1, 1.0]), np.array([3.0, 2.5, 1.0, 9.0]), 1e-3, 1e-1)
    (axes,) = test.plot(tmp_path / "range.svg").axes
    assert axes.get_xscale() == "log"
    np.testing.assert_array_equal(axes.lines[0].get_data(), test[:2])
    bottom, top = axes.get_ylim()
    assert bottom < 1 < 3 < top < 9  # a loss that diverges doesn't hide the others
    assert (tmp_path / "range.svg").stat().st_size
