"""Schedules to look at. It needs matplotlib, from the extra `experiments`, and only when it draws."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.schedules._steps import Schedule


def plot(schedules: Schedule | Mapping[str, Schedule], steps: int, path: str | Path | None = None) -> Any:
    """Draws one schedule, or several by their names, from step 0 to `steps`.

    Args:
        schedules: any; those of very different size want pictures of their own.
        steps: where the picture ends.
        path: the file to write; its ending says what kind.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    at = np.unique(np.linspace(0, steps, 2001).astype(np.int64))

    def draw(axes: Any) -> None:
        for name, schedule in (schedules if isinstance(schedules, Mapping) else {"": schedules}).items():
            axes.plot(at, jax.vmap(schedule)(at), label=name)
        axes.set_xlabel("step")
        axes.margins(x=0)
        if isinstance(schedules, Mapping):
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

    return chart(draw, path)


def chart(draw: Callable[[Any], None], path: str | Path | None) -> Any:
    """A figure with the one pair of axes that `draw` fills."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        axes.grid(color="0.92")
        draw(axes)
        if path is not None:
            figure.savefig(path, dpi=150)
    return figure
