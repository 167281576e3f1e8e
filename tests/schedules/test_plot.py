from pathlib import Path

import numpy as np
import optax
import pytest

from jaxlm import schedules

pytest.importorskip("matplotlib")


def test_a_plot_shows_each_schedule_by_its_name(tmp_path: Path) -> None:
    named = {
        "ours": schedules.wsd(1.0, 3000, warmup=10, cooldown=500),
        "optax's": optax.linear_schedule(1.0, 0.0, 3000),
    }
    figure = schedules.plot(named, 3000, tmp_path / "both.png")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == list(named)
    for line, schedule in zip(axes.lines, named.values(), strict=True):
        steps, values = line.get_data()
        assert (steps[0], steps[-1]) == (0, 3000)
        some = [schedule(step) for step in steps[::200]]
        np.testing.assert_allclose(values[::200], some, rtol=0, atol=4 * 2**-24)  # optax's subtracts from 1
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_one_schedule_needs_no_name() -> None:
    (axes,) = schedules.plot(schedules.cosine(1.0, 0.0, 10), 10).axes
    assert axes.get_legend() is None
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), np.arange(11))  # each step once
