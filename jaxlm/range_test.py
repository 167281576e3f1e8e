"""Which learning rates a model can be trained with, found by trying them all."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxlm.schedules import Schedule, exponential
from jaxlm.schedules._plot import chart
from jaxlm.train import fit
from jaxlm.types import Batch, Step, TrainState


class RangeTest(NamedTuple):
    """What a range test saw, and the bounds that it suggests for a cyclic schedule."""

    rates: Float[np.ndarray, " N"]
    losses: Float[np.ndarray, " N"]
    """After each rate the mean of the next few losses."""
    low: float
    high: float

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the losses over the rates, and the bounds, as `schedules.plot` does."""

        def draw(axes: Any) -> None:
            axes.semilogx(self.rates, self.losses)
            axes.axvspan(self.low, self.high, color="0.9", label=f"suggested: {self.low:.2g} to {self.high:.2g}")
            bottom, top = min(self.losses), self.losses[0]
            axes.set_ylim(bottom - 0.1 * (top - bottom), top + 0.3 * (top - bottom))
            axes.set(xlabel="learning rate", ylabel="loss")
            axes.margins(x=0)
            axes.legend(frameon=False)

        return chart(draw, path)


def lr_range_test(
    make_step: Callable[[Schedule], Step],
    state: TrainState,
    batches: Iterable[Batch],
    *,
    low: float = 1e-5,
    high: float = 1.0,
    steps: int = 100,
) -> RangeTest:
    """Smith's range test (https://arxiv.org/abs/1506.01186, section 3.3): training while the rate rises exponentially.

    It reads every loss, and stops where one isn't finite or the smoothed one is four times the best. Smoothed is the
    mean of the losses after a step at a rate and at the few higher ones that follow, a twentieth of them all.

    The paper's bounds are the rate where the loss begins to fall and the rate where it stops, grows ragged or rises.
    Here the first is the last rate before a tenth of the fall was seen; the second is where the smoothed loss is least.
    If losses still fall at the last rate, `high` was too low.

    Args:
        make_step: from a schedule of the learning rate to a step.
        state: what `start` returned, with the optimizer of such a step. Unlike `fit`, this works on a copy.
        batches: `steps + 1` or more; the test ends with them.
        low: the first rate.
        high: the last.
        steps: the number of rates, 2 or more.

    Raises:
        ValueError: fewer than two rates, or rates that don't rise; a state that has taken steps, so that its optimizer
            would begin in the middle; a loss that never fell.
    """
    if not 0 < low < high or steps < 2:
        raise ValueError(f"lr_range_test: {steps} rates from {low} to {high}; use 2 or more, rising from above 0")
    if int(state.step) != 0:
        raise ValueError(f"lr_range_test: the state has taken {int(state.step)} steps; use what train.start returns")
    schedule, window = exponential(low, high, steps - 1), max(1, steps // 20)
    losses: list[float] = []
    means: list[float] = []  # each of the losses after a step at one rate and at the next few
    for _, metrics in fit(make_step(schedule), jax.tree.map(jnp.copy, state), itertools.islice(batches, steps + 1)):
        losses.append(float(metrics["loss"]))
        if not np.isfinite(losses[-1]):
            break
        if len(losses) > window:
            means.append(float(np.mean(losses[-window:])))
            if means[-1] - min(means) > 3 * abs(min(means)):
                break
    best = int(np.argmin(means)) if means else 0
    if best == 0:
        raise ValueError(f"lr_range_test: the loss never fell, from {low} upward: {losses[:5]}...; lower `low`")
    rates = np.asarray(schedule(np.arange(len(means))), float)
    flat = np.flatnonzero(np.array(means[:best]) >= 0.9 * means[0] + 0.1 * means[best])
    return RangeTest(rates, np.array(means), float(rates[flat[-1]]), float(rates[best]))
