"""What was measured, as numbers for JSON and as a table."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.table import Table
from workloads import Workload, matmul_size, peak_flops

CEILING: Final = "matmul.train"
LABELS: Final = {
    "jaxlm_step.train": "jaxlm",
    "jaxlm_step.train_in_microbatches": "jaxlm, 4 microbatches",
    "baselines.naive_jax.train": "naive JAX",
    "baselines.torch_eager.train": "PyTorch",
}
"""The contestants' functions, and what tables call them."""
BASELINES: Final = [name for name in LABELS if name.startswith("baselines.")]

QUIET: Final = 0.2
"""Cores: with more than that taken away, a turn tells how well a contestant gets on with others. PyTorch's threads,
which wait for one another at each operation, then lose several times what XLA's."""
FEWEST: Final = 3
"""Quiet rounds; with less of them, all rounds count."""


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

    def step_seconds(self, rounds: Sequence[int]) -> float:
        """The median over some rounds."""
        return statistics.median(self.seconds[i] for i in rounds) / self.steps


def quiet_rounds(foreign_cores: Sequence[Sequence[float | None]]) -> list[int]:
    """The rounds in which no contestant was disturbed; all rounds if these are too few to tell anything.

    Args:
        foreign_cores: of each contestant, how many cores other processes kept busy in each round.
    """
    rounds = range(len(foreign_cores[0]))
    quiet = [i for i in rounds if all((cores[i] or 0.0) <= QUIET for cores in foreign_cores)]
    return quiet if len(quiet) >= FEWEST else list(rounds)


def ratios(one: Measured, other: Measured, rounds: Sequence[int]) -> list[float]:
    """How many times as fast as the other one is, round by round."""
    return [(other.seconds[i] / other.steps) / (one.seconds[i] / one.steps) for i in rounds]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, with the first and the third quartile."""
    lower, middle, upper = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": middle, "lower_quartile": lower, "upper_quartile": upper}


def numbers(workload: Workload, measured: Mapping[str, Measured], failed: Sequence[str], device: str) -> dict[str, Any]:
    """Everything about one model, contestant by contestant."""
    rounds, peak = quiet_rounds([m.foreign_cores for m in measured.values()]), peak_flops(device)
    reached = 2 * matmul_size(workload.dtype) ** 3 / measured[CEILING].step_seconds(rounds)
    contestants: dict[str, Any] = {}
    for name, m in measured.items():
        if name == CEILING:
            continue
        step_seconds = m.step_seconds(rounds)
        flops = workload.flops / step_seconds
        contestants[LABELS[name]] = {
            "step_seconds": step_seconds,
            "tokens_per_second": workload.tokens / step_seconds,
            "flops_per_second": flops,
            "model_flops_utilization": flops / peak if peak else None,
            "share_of_matmul": flops / reached,
            "compile_seconds": max(0.0, m.seconds_to_first_step - step_seconds),
            "times_as_fast_as": {
                LABELS[other]: spread(ratios(m, measured[other], rounds)) for other in BASELINES if other in measured
            },
            "rounds": dataclasses.asdict(m),
        }
    return {
        "workload": {**dataclasses.asdict(workload), "tokens": workload.tokens, "flops": workload.flops},
        "peak_flops_per_second": peak,
        "matmul": {"flops_per_second": reached, "rounds": dataclasses.asdict(measured[CEILING])},
        "counted_rounds": rounds,
        "contestants": contestants,
        "failed": [LABELS[name] for name in failed],
    }


def table(models: Sequence[Mapping[str, Any]], device: str) -> Table:
    """A line for each contestant on each model."""
    of_peak = models[0]["peak_flops_per_second"] is not None
    lines = Table(title=f"train step on {device}", caption=_caption(models, of_peak=of_peak))
    for column in ("model", "contestant"):
        lines.add_column(column, no_wrap=True)
    for column in ("step", "tokens/s", "FLOP/s", "MFU" if of_peak else "of matmul", "compile"):
        lines.add_column(column, justify="right", no_wrap=True)
    for name in BASELINES:
        lines.add_column(f"times {LABELS[name]}", justify="right", no_wrap=True)
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
    for model in models:
        counted, foreign = model["counted_rounds"], model["matmul"]["rounds"]["foreign_cores"]
        parts.append(f"{model['workload']['name']}: {len(counted)} of {len(foreign)} rounds")
        contestants = model["contestants"].values()
        busiest = max(c["rounds"]["foreign_cores"][i] or 0.0 for c in contestants for i in counted)
        parts[-1] += f", others on at most {busiest:.1f} cores"
    return "; ".join(parts)
