"""Measures jaxlm's training step against the same step written plainly in JAX, and in PyTorch where it is installed.

Each contestant trains in a process of its own, in short turns that alternate, so that whatever else the machine does
falls on all of them alike. What counts is the ratio within a round. See README.md beside this file.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from rich.console import Console
from summary import CEILING, LABELS, Measured, numbers, table
from workloads import CHECKED_STEPS, ON_CPU, ON_GPU, SMOKE, Workload

HERE = Path(__file__).parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


class ContestantError(Exception):
    """A contestant ended before its time."""


class Contestant:
    """A child process that trains on order. Construction waits until its first steps are done."""

    def __init__(self, name: str, workload: Workload, folder: Path, environment: dict[str, str]):
        self.name, self.log = name, folder / f"{workload.name}-{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*_command(name), json.dumps(dataclasses.asdict(workload)), str(_weights(folder, workload))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        first = self._answer()
        self.measured = Measured(first["metrics"], first["to_first_step"])

    def turn(self, steps: int) -> dict[str, Any]:
        """Takes steps; returns the seconds that they took."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        return self._answer()

    def measured_turn(self) -> None:
        """Takes one round's steps and keeps what was measured."""
        busy, measured = machine.busy_seconds(), self.measured
        answer = self.turn(measured.steps)
        measured.seconds.append(answer["seconds"])
        measured.cpu_seconds.append(answer["cpu_seconds"])
        others = machine.busy_seconds() - busy - answer["cpu_seconds"]
        measured.foreign_cores.append(max(0.0, others / answer["seconds"]) if busy else None)

    def end(self) -> None:
        """Ends the process, in the middle of a step if need be."""
        self.process.terminate()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise ContestantError(f"{self.name}: exit code {self.process.wait()}\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


def measure(
    workload: Workload, names: Sequence[str], folder: Path, environment: dict[str, str], rounds: int, seconds: float
) -> tuple[dict[str, Measured], list[str]]:
    """Gives each contestant a turn of so many seconds in each round; the second result: who failed.

    On a GPU each takes all its turns before the next one begins: their memory together would not fit.
    """
    measured: dict[str, Measured] = {}
    failed: list[str] = []
    groups = [[name] for name in names] if workload.dtype == "bfloat16" else [names]
    for group in groups:
        with contextlib.ExitStack() as stack:
            contestants: list[Contestant] = []
            for name in group:
                try:
                    contestants.append(Contestant(name, workload, folder, environment))
                except ContestantError as error:
                    if name == CEILING:
                        raise
                    print(error, file=sys.stderr)
                    failed.append(name)
                    continue
                stack.callback(contestants[-1].end)
                measured[name] = contestants[-1].measured
                check(name, measured, TOLERANCE[workload.dtype])
            for contestant in contestants:
                contestant.measured.steps = max(2, round(seconds / (contestant.turn(2)["seconds"] / 2)))
            for _ in range(rounds):
                for contestant in random.sample(contestants, len(contestants)):
                    contestant.measured_turn()
    return measured, failed


def check(name: str, measured: dict[str, Measured], tolerance: float) -> None:
    """Exits unless a contestant computes what the first one does, which is jaxlm unless that failed.

    The first step's loss and gradient come from the same weights. The losses of the steps after it tell whether the
    optimizer does the same; Adam enlarges rounding errors at first, so they may differ by more.
    """
    first = next(iter(measured))
    if name in (first, CEILING):
        return
    for i in range(CHECKED_STEPS):
        rtol = tolerance if i == 0 else 10 * tolerance
        pairs = zip(measured[first].first_steps[i], measured[name].first_steps[i], strict=True)
        for what, (expected, found) in zip(("loss", "grad_norm"), pairs, strict=True):
            if not abs(found - expected) <= rtol * abs(expected):
                sys.exit(
                    f"{LABELS[name]} doesn't compute what {LABELS[first]} does: "
                    f"{what} of step {i} is {found}, not {expected} (rtol {rtol})"
                )


def _command(what: str) -> list[str]:
    return [sys.executable, str(HERE / "contestant.py"), what]


def _weights(folder: Path, workload: Workload) -> Path:
    return folder / f"{workload.name}.npz"


def _environment(*, huge_pages: bool) -> dict[str, str]:
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9", **machine.environment(huge_pages=huge_pages)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="how many turns each contestant has (default: 12)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a turn is, about (default: 2)")
    parser.add_argument("--models", nargs="+", help="which models; by default all that are meant for the device")
    parser.add_argument("--out", type=Path, help="where to write JSON; by default into benchmarks/results/")
    parser.add_argument("--smoke", action="store_true", help="show that it works: a tiny model, on the CPU")
    parser.add_argument("--no-huge-pages", action="store_true", help="leave malloc as it is, for all contestants")
    return parser.parse_args()


def main() -> None:
    options = _options()
    environment = _environment(huge_pages=not options.no_huge_pages)
    if options.smoke:
        options.rounds, options.seconds, environment["JAX_PLATFORMS"] = 1, 0.0, "cpu"
    told = json.loads(subprocess.run(_command("device"), env=environment, check=True, stdout=subprocess.PIPE).stdout)
    on_cpu = told["platform"] == "cpu"
    device = machine.processor() if on_cpu else told["device"]
    models = {model.name: model for model in ((SMOKE,) if options.smoke else ON_CPU if on_cpu else ON_GPU)}
    if unknown := set(options.models or ()) - set(models):
        sys.exit(f"--models: no {sorted(unknown)} here; use some of {list(models)}")
    names = [name for name in (*LABELS, CEILING) if "torch" not in name or importlib.util.find_spec("torch")]
    results: list[dict[str, Any]] = []
    for model in (models[name] for name in options.models or models):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [json.dumps(dataclasses.asdict(model)), str(_weights(Path(folder), model))]
            subprocess.run([*_command("weights"), *arguments], env=environment, check=True)
            measured, failed = measure(model, names, Path(folder), environment, options.rounds, options.seconds)
        results.append(numbers(model, measured, failed, device))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table(results, device))
    if options.smoke and not options.out:
        return
    out: Path = options.out or HERE / "results" / f"train_step-{machine.file_name(device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **machine.about(device, PACKAGES),
        "platform": told["platform"],
        "malloc": None if options.no_huge_pages else machine.HUGE_PAGES["GLIBC_TUNABLES"],
        "models": results,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
