"""Plans to look at. It needs matplotlib, from the extra `experiments`, and only when it draws."""

from typing import Any

import numpy as np

from jaxlm.data.describe import describe
from jaxlm.data.plan import Plan


def plot(plan: Plan, count: int | None = None) -> Any:
    """Draws what the first batches of a plan hold: how long documents are, how many rows there are, how full.

    Args:
        plan: any.
        count: how many batches, as in `describe`.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    described = describe(plan, count)
    lengths = {name: documents["length"] for name, documents in plan.documents.items()}
    longest = max(int(each.max()) for each in lengths.values())
    edges = np.geomspace(2, max(longest, *described.rows) + 1, 60)
    names, rows = [f"{length:,}" for length in described.rows], described.rows.values()
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif"}):
        figure = Figure(figsize=(12, 3.5), layout="constrained")
        documents, counts, real = figure.subplots(1, 3, width_ratios=[2, 1, 1])
        documents.hist(list(lengths.values()), edges, label=list(lengths), stacked=True)
        documents.set(xscale="log", xlabel="tokens", title="Documents; lines: row lengths")
        for length in sorted({length for stage in plan.stages for length in stage.row_lengths}):
            documents.axvline(length, color="black", linewidth=1, linestyle=":")
        if len(lengths) > 1:
            documents.legend(frameon=False)
        counts.bar_label(counts.bar(names, [row["rows"] for row in rows]), fmt="{:,.0f}")
        counts.set(xlabel="row length", title=f"Rows in {described.batches:,} batches")
        real.bar_label(real.bar(names, [100 * row["real"] for row in rows]), fmt="{:.1f}", label_type="center")
        real.axhline(100 * described.real, color="black", linewidth=1, linestyle=":")
        real.set(xlabel="row length", ylim=(0, 100), title=f"Real tokens, %: {100 * described.real:.2f} of all")
    return figure
