"""A run as one page to look at. It needs matplotlib, from the extra `experiments`."""

import html
import importlib.util
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlm.files import read_json, write_whole
from jaxlm.metrics import read_log, read_starts

if importlib.util.find_spec("matplotlib") is None:  # it takes a second, and is imported when a run is over
    raise ImportError("jaxlm.report draws with matplotlib, which isn't there: pip install 'jaxlm[experiments]'")

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }
h1 { margin-bottom: 0 } svg { width: 100%; height: auto } table { border-collapse: collapse }
table { margin: 1rem 0 }
td { padding: .1rem 1.5rem .1rem 0; border-bottom: 1px solid #ddd } td + td { font-variant-numeric: tabular-nums }
pre { background: #f6f6f4; padding: 1rem; overflow-x: auto; font-size: 14px } summary { cursor: pointer }"""


def write_report(folder: Path, results: Mapping[str, str]) -> Path:
    """Writes `results.json` and `report.html` into the folder of a run: results, curves, configuration and versions.

    Args:
        folder: the folder of a run, with the files that `open_run` and `Log` write.
        results: what came out, by name; a `sample` of generated text gets a place of its own.

    Returns:
        The path of the page, which needs no other file.

    Raises:
        FileNotFoundError: the folder has no record of a configuration.
        ValueError: one of the files is damaged, and named.
    """
    lines, timing = read_log(folder / "metrics.jsonl"), read_log(folder / "timing.jsonl")
    config, starts = read_json(folder / "config.json"), read_starts(folder)
    title = html.escape(folder.name)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>
{_table({name: result for name, result in results.items() if name != "sample"})}
{_curves(lines, timing)}
<h2>Sample</h2><pre>{html.escape(results.get("sample", ""))}</pre>
<details><summary>Configuration</summary>{_table(config)}</details>
<details><summary>Versions</summary>{_table(starts[-1] if starts else {})}</details>
</html>
"""
    write_whole(folder / "results.json", json.dumps(results, indent=1))
    write_whole(folder / "report.html", page.encode(errors="backslashreplace").decode())  # paths needn't be UTF-8
    return folder / "report.html"


def smooth(values: Sequence[float], window: int) -> Float[np.ndarray, " N"]:
    """The mean of each value and up to `window - 1` before it."""
    padded = np.concatenate([np.zeros(window), values])
    sums = np.lib.stride_tricks.sliding_window_view(padded, window)[1:].sum(axis=1)
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def _curves(lines: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]]) -> str:
    """Loss, learning rate and throughput against the step, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if not lines:
        return "<p>No step was taken.</p>"
    steps = [line["step"] for line in lines]
    window = max(1, len(lines) // 50)

    def loss(axes: Any) -> None:
        bits = [line.get("loss", math.nan) / math.log(2) for line in lines]
        axes.plot(steps, bits, color="0.8", linewidth=0.7)
        axes.plot(steps, smooth(bits, window), label="training, bits per token")
        heldout = [(line["step"] - 1, line["heldout"]) for line in lines if "heldout" in line]
        if heldout:
            axes.plot(*zip(*heldout, strict=True), "o-", markersize=3, label="held out, bits per byte")
        finite = [b for b in bits if np.isfinite(b)] or [1.0]  # of a run that diverged, what came before
        axes.set_ylim(0, 1.05 * np.quantile(finite, 0.98) + 0.1)
        axes.legend(frameon=False)

    def rate(axes: Any) -> None:
        axes.plot(steps, [line.get("learning_rate", math.nan) for line in lines])
        axes.set_ylim(0)

    def throughput(axes: Any) -> None:
        seconds = {line["step"]: line["seconds"] for line in timing if "seconds" in line}
        timed = [line for line in lines if line["step"] in seconds]
        spent = smooth([seconds[line["step"]] for line in timed], window)
        weights = smooth([line.get("weight", math.nan) for line in timed], window)
        axes.plot([line["step"] for line in timed], weights / spent)
        axes.set_ylim(0)

    waited, taken = (sum(line.get(name, 0.0) for line in timing) for name in ("waited", "seconds"))
    waiting = waited / (taken or 1)
    panels: dict[str, Callable[[Any], None]] = {
        "Loss": loss,
        "Learning rate": rate,
        f"Throughput: predicted real tokens per second ({waiting:.2%} of the time it waited for data)": throughput,
    }
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "axes.spines.top": False}):
        figure = Figure(figsize=(9, 9), layout="constrained")
        all_axes = figure.subplots(len(panels), sharex=True, height_ratios=(2, 1, 1))
        for axes, (title, draw) in zip(all_axes, panels.items(), strict=True):
            draw(axes)
            axes.set_title(title, loc="left")
            axes.grid(color="0.92")
            axes.spines["right"].set_visible(False)
        all_axes[-1].set_xlabel("step")
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _table(rows: Mapping[str, Any]) -> str:
    cells = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"
