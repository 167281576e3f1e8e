"""Lets the system fail at every call of a save, damages checkpoints in every way, kills runs; counts what comes of it.

What counts is that no trial goes wrong; of processes that are lost also how soon the others are gone. See tests/faults,
whose scripts it runs.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import machine
from rich.console import Console
from rich.table import Table

HERE: Final = Path(__file__).parent
SCRIPTS: Final = HERE.parent / "tests" / "faults"
PACKAGES: Final = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")
CALLS: Final = ("kill", "ENOSPC", "EIO", "full")


def lines(script: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """What a script of tests/faults prints, as it comes; exits if it fails."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
        if process.wait():
            said.seek(0)
            sys.exit(said.read())


def calls(kind: str, trials: int, seed: int, console: Console) -> dict[str, Any]:
    """SIGKILL or an error at calls of a save: how many trials, from which step the run went on, and what was wrong."""
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    for line in lines("saving", kind, f"--trials={trials}", f"--seed={seed}"):
        if "call" in line:
            outcomes[f"went on from step {line['step']}"] += 1
            wrong += [f"{line['call']}: {line['wrong']}"] if line["wrong"] else []
            if console.is_terminal:
                console.print(f"{kind}: {outcomes.total()} trials, {len(wrong)} wrong", end="\r")
    return {"fault": kind, "trials": outcomes.total(), "outcomes": outcomes, "wrong": wrong}


def damage(trials: int, seed: int, *options: str) -> Iterator[dict[str, Any]]:
    """Damage to the newest checkpoint: how often the older one was used, or the newest with every bit right."""
    for line in lines("corrupting", f"--trials={trials}", f"--seed={seed}", *options):
        how = "checksums of files" if line.pop("checksums") else "fingerprints of leaves alone"
        if "wrong" in line:
            sys.exit(f"{how}: {line}")
        kind = line.pop("kind")
        yield {"fault": f"{kind}, {how}", "trials": sum(line.values()), "outcomes": line, "wrong": []}


def killed(kills: int, seed: int, console: Console) -> Iterator[dict[str, Any]]:
    """A real run, ended again and again, that is in the end as if it had never been: from where it went on."""
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    slowest: dict[str, float] = collections.defaultdict(float)
    for line in lines("kills", f"--kills={kills}", f"--seed={seed}"):
        if "signal" in line:
            fault = f"{line['signal']} at random moments of a run"
            saved = "it saved at once" if line["code"] == 75 else "from the newest checkpoint"
            outcomes[fault][saved if line["saved"] else "before the first checkpoint"] += 1
            slowest[fault] = max(slowest[fault], line["seconds"])
            if console.is_terminal:
                console.print(f"{sum(map(collections.Counter.total, outcomes.values()))} kills", end="\r")
    for fault, counts in outcomes.items():
        yield {
            "fault": fault,
            "trials": counts.total(),
            "outcomes": counts,
            "wrong": [],
            "slowest_seconds": slowest[fault],
        }


def lost(trials: int, seed: int) -> Iterator[dict[str, Any]]:
    """One process of several killed, stopped or hanging: how the others end, and after how many seconds (lost.py)."""
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    codes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in lines("lost", f"--trials={trials}", f"--seed={seed}"):
        seconds[line["fault"]].append(line["seconds"])
        codes[line["fault"]].update(f"left with {code if code > 0 else 128 - code}" for code in line["codes"])
    for fault, found in seconds.items():
        yield {
            "fault": fault,
            "trials": len(found),
            "outcomes": codes[fault],
            "wrong": [f"{fault}: {max(found)} s"] if max(found) > (15 if "stopped" in fault else 5) else [],
            "median_seconds": statistics.median(found),
            "slowest_seconds": max(found),
        }


def soaked(minutes: float, processes: int, seed: int, console: Console) -> Iterator[dict[str, Any]]:
    """Runs of several processes under all faults by turns: what became of each kind of fault, and what was kept."""
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    who = f"{processes} processes"
    for line in lines("soak", f"--minutes={minutes}", f"--processes={processes}", f"--seed={seed}"):
        if "fault" in line:
            codes = set(line["codes"])
            ended = "it was done" if codes == {0} else "left together" if codes == {75} else "ended"
            outcomes[line["fault"]][f"{ended}, {'no' if line['lost'] == 0 else 'some'} steps taken again"] += 1
            if console.is_terminal:
                console.print(f"{sum(map(collections.Counter.total, outcomes.values()))} faults", end="\r")
        else:
            yield from (
                {"fault": f"{who}: {kind}", "trials": counts.total(), "outcomes": counts, "wrong": list[str]()}
                for kind, counts in sorted(outcomes.items())
            )
            kept = {name: line[name] for name in ("minutes", "steps_kept", "time_kept")}
            same = {"as an undisturbed run": line["runs"]}
            little = [f"{who}: kept {line['time_kept']:.0%} of the time"] if line["time_kept"] < 0.8 else []
            yield {
                "fault": f"{who}: all runs, in the end",
                "trials": line["runs"],
                "outcomes": same,
                "wrong": little,
                **kept,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=("calls", "damage", "kills", "lost", "soak"), help="leave the other rows as they are"
    )
    parser.add_argument("--kills", type=int, default=250, help="a fifth of them by SIGTERM")
    parser.add_argument("--minutes", type=float, default=30, help="for which several processes suffer everything")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="show that it works: a few trials of each")
    options = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=130)
    smoke, seed, results = options.smoke, options.seed, list[dict[str, Any]]()
    if options.only in (None, "calls"):
        results += [calls(kind, 1 if smoke else 0, seed, console) for kind in CALLS]
    if options.only in (None, "damage"):
        results += damage(4 if smoke else 1000, seed, *([] if smoke else ["--each"]))
    if options.only in (None, "kills"):
        results += killed(1 if smoke else options.kills, seed, console)
    if options.only in (None, "lost"):
        results += lost(1 if smoke else 50, seed)
    if options.only in (None, "soak") and not smoke:
        results += soaked(options.minutes, options.processes, seed, console)
    shown = Table("fault", "trials", "what became of it", "wrong", title=f"Checkpoints under faults, seed {seed}")
    for r in results:
        outcomes = ", ".join(f"{name}: {count}" for name, count in sorted(r["outcomes"].items()))
        shown.add_row(r["fault"], str(r["trials"]), outcomes, str(len(r["wrong"])))
    console.print(shown)
    device = machine.processor()
    if not smoke:
        record = {
            **machine.about(device, PACKAGES),
            "seed": seed,
            "results": results,
        }
        out = HERE / "results" / f"faults-{machine.file_name(device)}.json"
        if options.only and out.exists():  # its rows say for themselves how they were made
            new = {r["fault"]: {**r, **{name: record[name] for name in record if name != "results"}} for r in results}
            record = json.loads(out.read_text())
            record["results"] = [r for r in record["results"] if r["fault"] not in new] + [*new.values()]
        out.write_text(json.dumps(record, indent=1) + "\n")
    if any(r["wrong"] for r in results):
        sys.exit("\n".join(line for r in results for line in r["wrong"]))


if __name__ == "__main__":
    main()
