"""What was measured, as numbers for JSON and as a table."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.table import Table
from workloads import Workload, matmul_size, peak_flops

OWN: Final = "jaxlm_step.train"
CEILING: Final = "matmul.train"
LABELS: Final = {
    OWN: "jaxlm",
    "jaxlm_step.train_in_microbatches": "jaxlm, 4 microbatches",
    "baselines.naive_jax.train": "naive JAX",
    "baselines.torch_eager.train": "PyTorch",
}
"""The contestants' functions, and what tables call them."""
BASELINES: Final = [name for name in LABELS if name.startswith("baselines.")]


@dataclasses.dataclass
class Measured:
    """One contestant's part in a run."""

    first_steps: list[tuple[float, float]]
    """Loss and norm of the gradient of each."""
    seconds_to_first_step: float
    steps: int = 0
    """Taken in each round."""
    seconds: list[float] = dataclasses.field(default_factory=list[float])
    """Each round's."""
    cpu_seconds: list[float] = dataclasses.field(default_factory=list[float])
    foreign_cores: list[float | None] = dataclasses.field(default_factory=list[float | None])
    """How many cores other processes kept busy meanwhile; None where the system doesn't tell."""

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds) / self.steps


def ratios(one: Measured, other: Measured) -> list[float]:
    """How many times as fast as the other one is, round by round."""
    pairs = zip(one.seconds, other.seconds, strict=True)
    return [(theirs / other.steps) / (ours / one.steps) for ours, theirs in pairs]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, with the first and the third quartile."""
    lower, middle, upper = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": middle, "lower_quartile": lower, "upper_quartile": upper}


def numbers(workload: Workload, measured: Mapping[str, Measured], failed: Sequence[str], device: str) -> dict[str, Any]:
    """Everything about one model, contestant by contestant."""
    ceiling, peak = measured[CEILING], peak_flops(device)
    reached = 2 * matmul_size(workload.dtype) ** 3 / ceiling.step_seconds
    contestants: dict[str, Any] = {}
    for name, m in measured.items():
        if name == CEILING:
            continue
        flops = workload.flops / m.step_seconds
        contestants[LABELS[name]] = {
            "step_seconds": m.step_seconds,
            "tokens_per_second": workload.tokens / m.step_seconds,
            "flops_per_second": flops,
            "model_flops_utilization": flops / peak if peak else None,
            "share_of_matmul": flops / reached,
            "compile_seconds": max(0.0, m.seconds_to_first_step - m.step_seconds),
            "times_as_fast_as": {
                LABELS[other]: spread(ratios(m, measured[other])) for other in BASELINES if other in measured
            },
            "rounds": dataclasses.asdict(m),
        }
    return {
        "workload": {**dataclasses.asdict(workload), "tokens": workload.tokens, "flops": workload.flops},
        "peak_flops_per_second": peak,
        "matmul": {"flops_per_second": reached, "rounds": dataclasses.asdict(ceiling)},
        "contestants": contestants,
        "failed": [LABELS[name] for name in failed],
    }


def table(models: Sequence[Mapping[str, Any]], device: str) -> Table:
    """A line for each contestant on each model."""
    of_peak = models[0]["peak_flops_per_second"] is not None
    lines = Table(title=f"train step on {device}", caption=_caption(models, of_peak=of_peak))
    for column in ("model", "contestant"):
        lines.add_column(column)
    for column in ("step", "tokens/s", "FLOP/s", "MFU" if of_peak else "of matmul", "compile"):
        lines.add_column(column, justify="right")
    for name in BASELINES:
        lines.add_column(f"times {LABELS[name]}", justify="right")
    for model in models:
        for label, c in model["contestants"].items():
            times = [c["times_as_fast_as"].get(LABELS[name]) if LABELS[name] != label else None for name in BASELINES]
            lines.add_row(
                model["workload"]["name"],
                label,
                f"{1e3 * c['step_seconds']:.1f} ms",
                f"{c['tokens_per_second']:,.0f}",
                f"{c['flops_per_second'] / 1e9:,.0f} G",
                f"{c['model_flops_utilization'] if of_peak else c['share_of_matmul']:.0%}",
                f"{c['compile_seconds']:.1f} s",
                *(
                    "" if t is None else "{median:.2f} ({lower_quartile:.2f}-{upper_quartile:.2f})".format(**t)
                    for t in times
                ),
            )
        for label in model["failed"]:
            lines.add_row(model["workload"]["name"], label, "failed")
        lines.add_section()
    return lines


def _caption(models: Sequence[Mapping[str, Any]], *, of_peak: bool) -> str:
    parts = ["medians of rounds, with quartiles"]
    if not of_peak:
        reached = ", ".join(f"{m['matmul']['flops_per_second'] / 1e9:,.0f}" for m in models)
        parts.append(f"large products alone: {reached} GFLOP/s")
    contestants = [c for model in models for c in model["contestants"].values()]
    foreign = [cores for c in contestants for cores in c["rounds"]["foreign_cores"] if cores is not None]
    if foreign:
        parts.append(f"other processes: {statistics.median(foreign):.2f} cores")
    return "; ".join(parts)
