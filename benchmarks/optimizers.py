"""Measures jaxlm's optimizers against optax's, and both against the bandwidth of the machine's memory.

What is timed is what a training step does after the gradient: update and apply, compiled, with parameters and state
donated, on the parameters of a GPT-2. Each optimizer's contestants alternate in short turns, with a turn of plain
streaming through memory among them. What counts are ratios within a round. See README.md beside this file.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import machine
from optimizer_pairs import (
    CHECKED_STEPS,
    SCALES,
    SMOKE,
    TREES,
    Contestant,
    Group,
    Tree,
    disagreement,
    groups,
    least_bytes,
    normal,
    select,
    size_in_bytes,
    step_of,
)
from rich.console import Console
from rich.table import Table
from summary import quiet_rounds, spread

HERE = Path(__file__).parent
PACKAGES = ("jax", "jaxlib", "optax", "numpy")
STREAM: Final = 2**27
"""Elements of each of the two arrays that are streamed through: 1 GiB together, more than any cache."""
STREAM_SMOKE: Final = 2**20


@dataclasses.dataclass
class Turns:
    """One contestant's part in a run."""

    steps: int = 1
    """Taken in each round."""
    seconds: list[float] = dataclasses.field(default_factory=list[float])
    """Each round's."""
    foreign_cores: list[float | None] = dataclasses.field(default_factory=list[float | None])
    """How many cores other processes kept busy meanwhile; None where the system doesn't tell."""

    def take(self, step: Callable[[Any], Any], start: Any) -> None:
        """Takes one round's steps and keeps what was measured. One step before them isn't."""
        state = jax.block_until_ready(step(start))
        busy, cpu, begun = machine.busy_seconds(), sum(os.times()[:2]), time.perf_counter()
        for _ in range(self.steps):
            state = step(state)
        jax.block_until_ready(state)
        seconds, cpu = time.perf_counter() - begun, sum(os.times()[:2]) - cpu
        others = machine.busy_seconds() - busy - cpu
        self.seconds.append(seconds)
        self.foreign_cores.append(max(0.0, others / seconds) if busy else None)

    def calibrate(self, step: Callable[[Any], Any], start: Any, seconds: float, period: int) -> None:
        """Chooses how many steps take about so many seconds."""
        self.steps = period
        self.take(step, start)
        self.steps = period * max(1, round(seconds / self.seconds.pop()))
        self.foreign_cores.pop()


class Runner:
    """An optimizer compiled: `step((params, state), grads)`, which overwrites what it is given."""

    def __init__(self, contestant: Contestant, params: Any):
        self.contestant, self.turns = contestant, Turns()
        tx = contestant.make()

        def start(params: Any) -> tuple[Any, Any]:
            return jax.tree.map(jnp.copy, params), tx.init(params)

        self.start = start  # not compiled, or XLA would take its time to work out the zeros in it
        shapes = jax.eval_shape(start, params)
        begun = time.perf_counter()
        self.step = jax.jit(step_of(tx), donate_argnums=0).lower(shapes, params).compile()
        self.compile_seconds = time.perf_counter() - begun
        self.state_bytes = size_in_bytes(shapes[1])
        memory: Any = self.step.memory_analysis()
        self.temporary_bytes: int = memory.temp_size_in_bytes
        self.differs_by: float | None = None


def check(group: Group, runners: Sequence[Runner], params: Any, gradients: Sequence[Any]) -> None:
    """Exits unless ours go where the reference goes; without a reference, unless they go somewhere."""

    def arrive(runner: Runner, before: Callable[[Any, Any], None] | None = None) -> Any:
        at = runner.start(params)
        for grads in gradients:
            if before:
                before(at[1], grads)
            at = runner.step(at, grads)
        return at[0]

    undecided = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), params)

    def collect(state: Any, grads: Any) -> None:
        nonlocal undecided
        assert group.undecided
        undecided = jax.tree.map(jnp.logical_or, undecided, group.undecided(state, grads))

    compare = jax.jit(disagreement)
    expected = arrive(runners[0], collect if group.undecided else None)
    if not group.reference:
        if not 0 < float(compare(params, expected, params, undecided)) < float("inf"):
            sys.exit(f"{group.name}: {runners[0].contestant.label}'s parameters didn't move, or aren't finite")
        return
    for runner in runners[1:]:
        runner.differs_by = float(compare(arrive(runner), expected, params, undecided))
        if not runner.differs_by <= runner.contestant.tolerance:
            sys.exit(
                f"{group.name}: {runner.contestant.label} doesn't do what {runners[0].contestant.label} does: after "
                f"{CHECKED_STEPS} steps it is off by {runner.differs_by:.2g} of the way, "
                f"more than {runner.contestant.tolerance:.2g}"
            )


class Stream:
    """Reads two arrays and writes over one of them: what memory can do, for steps to be held against."""

    def __init__(self, elements: int):
        shape = jax.ShapeDtypeStruct((elements,), jnp.float32)
        self.step = jax.jit(lambda x, y: 0.9 * x + y, donate_argnums=0).lower(shape, shape).compile()
        self.ones, self.bytes = jnp.ones(elements), 3 * 4 * elements

    def take(self, turns: Turns) -> None:
        """A turn of it."""
        turns.take(lambda x: self.step(x, self.ones), jnp.copy(self.ones))


def measure(
    wanted: Sequence[Group], params: Any, elements: int, rounds: int, seconds: float
) -> list[tuple[Group, list[Runner], Turns]]:
    """Gives each contestant a turn of so many seconds in each round, those of an optimizer one after another.

    Parameters and state are made anew for each turn, so that memory holds one contestant's at a time.
    """
    gradients = [normal(params, seed=1 + i, scale=scale) for i, scale in enumerate(SCALES)]
    measured: list[tuple[Group, list[Runner], Turns]] = []
    for group in wanted:
        runners = [Runner(contestant, params) for contestant in group.contestants]
        check(group, runners, params, gradients)
        measured.append((group, runners, Turns()))
    grads = gradients[0]
    del gradients

    stream = Stream(elements)
    take_stream = Turns()
    take_stream.calibrate(lambda x: stream.step(x, stream.ones), jnp.copy(stream.ones), seconds / 2, 1)
    for group, runners, streaming in measured:
        streaming.steps = take_stream.steps
        for runner in runners:
            runner.turns.calibrate(lambda at, r=runner: r.step(at, grads), runner.start(params), seconds, group.period)
    for _ in range(rounds):
        for _, runners, streaming in random.sample(measured, len(measured)):
            for runner in random.sample([*runners, None], len(runners) + 1):
                if runner:
                    runner.turns.take(lambda at, r=runner: r.step(at, grads), runner.start(params))
                else:
                    stream.take(streaming)
    return measured


def numbers(
    group: Group, runners: Sequence[Runner], streaming: Turns, params: Any, stream_bytes: int
) -> dict[str, Any]:
    """Everything about one optimizer, contestant by contestant."""
    everybody = [*(runner.turns for runner in runners), streaming]
    counted = quiet_rounds([turns.foreign_cores for turns in everybody])
    bandwidth = [stream_bytes * streaming.steps / streaming.seconds[i] for i in counted]

    def step_seconds(runner: Runner) -> list[float]:
        return [runner.turns.seconds[i] / runner.turns.steps for i in counted]

    contestants: dict[str, Any] = {}
    for runner in runners:
        taken = step_seconds(runner)
        floor = least_bytes(params, runner.state_bytes, clips=group.clips)
        is_reference = runner.contestant is group.reference
        contestants[runner.contestant.label] = {
            "step_seconds": statistics.median(taken),
            "times_as_fast_as_optax": None
            if is_reference or not group.reference
            else spread([theirs / own for theirs, own in zip(step_seconds(runners[0]), taken, strict=True)]),
            "least_bytes": floor,
            "times_the_floor": spread([own / (floor / b) for own, b in zip(taken, bandwidth, strict=True)]),
            "temporary_bytes": runner.temporary_bytes,
            "state_bytes_per_parameter": runner.state_bytes / (size_in_bytes(params) / 4),
            "compile_seconds": runner.compile_seconds,
            "differs_by": runner.differs_by,
            "tolerance": None if is_reference else runner.contestant.tolerance,
            "rounds": dataclasses.asdict(runner.turns),
        }
    return {
        "optimizer": group.name,
        "counted_rounds": counted,
        "stream": {
            "bytes_per_second": statistics.median(bandwidth),
            "bytes_per_step": stream_bytes,
            "rounds": dataclasses.asdict(streaming),
        },
        "contestants": contestants,
    }


def table(results: Sequence[dict[str, Any]], title: str) -> Table:
    """A line for each contestant."""
    rates = [result["stream"]["bytes_per_second"] / 1e9 for result in results]
    rounds = [len(result["counted_rounds"]) for result in results]
    foreign = [
        turns["foreign_cores"][i] or 0.0
        for result in results
        for turns in (result["stream"]["rounds"], *(c["rounds"] for c in result["contestants"].values()))
        for i in result["counted_rounds"]
    ]
    taken = len(results[0]["stream"]["rounds"]["seconds"])
    lines = Table(
        title=title,
        caption=f"medians of {min(rounds)} to {max(rounds)} of {taken} rounds, with quartiles; "
        f"memory streams at {min(rates):,.1f} to {max(rates):,.1f} GB/s; others on at most {max(foreign):.1f} cores",
    )
    for column in ("optimizer", "by"):
        lines.add_column(column, no_wrap=True)
    for column in ("step", "times optax", "times the floor", "temporaries", "state/parameter"):
        lines.add_column(column, justify="right", no_wrap=True)
    for result in results:
        for label, c in result["contestants"].items():
            faster, slower = (
                "" if t is None else "{median:.2f} ({lower_quartile:.2f}-{upper_quartile:.2f})".format(**t)
                for t in (c["times_as_fast_as_optax"], c["times_the_floor"])
            )
            lines.add_row(
                result["optimizer"],
                label,
                f"{1e3 * c['step_seconds']:,.2f} ms",
                faster,
                slower,
                f"{c['temporary_bytes'] / 1e6:,.1f} MB",
                f"{c['state_bytes_per_parameter']:.2f} B",
            )
        lines.add_section()
    return lines


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [group.name for group in groups(stacked=False, tensor_cores=False)]
    parser.add_argument("--size", choices=TREES, default="124M", help="of the model (default: 124M)")
    parser.add_argument("--stacked", action="store_true", help="each kind of leaf of all layers is one array")
    parser.add_argument("--optimizers", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--all", action="store_true", help="also those that take minutes on a CPU: muon and soap")
    parser.add_argument("--rounds", type=int, default=12, help="how many turns each contestant has (default: 12)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a turn is, about (default: 1)")
    parser.add_argument("--output", type=Path, help="where to write JSON; by default into benchmarks/results/")
    parser.add_argument("--smoke", action="store_true", help="show that it works: a tiny tree, on the CPU")
    parser.add_argument("--no-huge-pages", action="store_true", help="leave malloc as it is")
    return parser.parse_args()


def main() -> None:
    options = _options()
    if options.smoke:
        options.rounds, options.seconds, options.all = 1, 0.0, True
    machine.restart(on_cpu=options.smoke, huge_pages=not options.no_huge_pages)
    tree: Tree = SMOKE if options.smoke else TREES[options.size]
    platform = jax.default_backend()
    device = machine.device()
    wanted = select(
        options.optimizers, groups(stacked=options.stacked, tensor_cores=platform != "cpu"), slow=options.all
    )
    params = normal(tree.shapes(stacked=options.stacked), seed=0, scale=0.02)
    elements = STREAM_SMOKE if options.smoke else STREAM
    measured = measure(wanted, params, elements, options.rounds, options.seconds)
    results = [numbers(*group, params, 3 * 4 * elements) for group in measured]
    console = Console()
    title = f"optimizer steps on {device}, {tree.name} parameters{', stacked' if options.stacked else ''}"
    (console if console.is_terminal else Console(width=140)).print(table(results, title))
    if options.smoke and not options.output:
        return
    variant = [tree.name, *["stacked"] * options.stacked, *["small pages"] * options.no_huge_pages]
    out: Path = options.output or HERE / "results" / f"optimizers-{machine.file_name(*variant, device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **machine.about(device, PACKAGES),
        "platform": platform,
        "malloc": None if options.no_huge_pages else machine.HUGE_PAGES["GLIBC_TUNABLES"],
        "tree": {
            **dataclasses.asdict(tree),
            "stacked": options.stacked,
            "leaves": len(jax.tree.leaves(params)),
            "parameters": size_in_bytes(params) // 4,
        },
        "optimizers": results,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
