"""Lets all that can go wrong happen to runs of several processes, at random, for as long as it is given.

One or all processes are killed, or one is told to end; all are killed and the newest checkpoint is damaged; the disk,
of a few MB, is full for a while. Each time all must end by themselves, and are started again, as a supervisor would do
it. What a run leaves in the end is compared with what an undisturbed one does.

A script: it prints a line of JSON per fault, and one at the end. Its disk is mounted in a namespace of its own.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corrupting
import kills
from filling import fill, in_namespace, mount

sys.path.insert(0, str(kills.ROOT / "tests"))
from ports import free_port

from jaxlm.checkpoint import _folder

STEPS, SAVE_EVERY = 2000, 25
SIZE = 16 * 2**20
PATIENCE = 90  # seconds for all processes to end after a fault
WHOLE = 900  # seconds for a run that nothing happens to
FAULTS = ["kill one", "kill all", "tell one", "damage", "fill"]


class Run:
    """A run of several processes, in a folder of its own on the disk."""

    def __init__(self, pretrain: Any, processes: int, disk: Path, text: Path, name: str):
        self.pretrain, self.processes, self.text, self.where = pretrain, processes, text, disk / name
        self.where.mkdir()
        self.folder, self.told = self.where / "runs" / "pretrain", disk.with_name(f"said-{name}")
        self.told.touch()
        (self.where / "said").symlink_to(self.told)
        self.children: list[int] = []

    def start(self) -> None:
        join = f"127.0.0.1:{free_port()}"
        options = {"steps": STEPS, "save_every": SAVE_EVERY, "tokens_per_batch": 512, "microbatches": 1}
        self.children = [
            kills.begin(self.pretrain, self.where, self.text, **options, join=(join, self.processes, i))
            for i in range(self.processes)
        ]

    def steps(self) -> int:
        """Taken and recorded."""
        return len(kills.lines(self.folder / "metrics.jsonl"))

    def starts(self) -> list[int]:
        """From which steps it went on."""
        return [json.loads(line)["step"] for line in kills.lines(self.folder / "starts.jsonl")]

    def until(self, holds: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Waits; whether all processes have ended before that."""
        begun = time.monotonic()
        while not holds() and time.monotonic() - begun < seconds:
            if all(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in self.children):
                return True
            time.sleep(0.002)
        return False

    def codes(self, seconds: float) -> list[int]:
        """The exit codes of all processes, which end by themselves within so long."""
        if not self.until(lambda: False, seconds):
            self.kill(signal.SIGABRT)  # says where it is
            time.sleep(1)
            stacks = "".join(path.read_text() for path in sorted(self.folder.glob("stacks-*.txt")))
            raise TimeoutError(self.told.read_text()[-4000:] + stacks)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]

    def kill(self, number: signal.Signals, which: int | None = None) -> None:
        """Sends a signal to one of the processes, or to all."""
        for child in self.children if which is None else [self.children[which]]:
            os.kill(child, number)


def suffer(run: Run, fault: str, rng: random.Random) -> str:
    """Does what the fault's name says to a run; what exactly."""
    if fault == "kill one" or fault == "tell one":
        number = signal.SIGKILL if fault == "kill one" else rng.choice([signal.SIGTERM, signal.SIGINT])
        which = rng.randrange(run.processes)
        run.kill(number, which)
        return f"{number.name} to {which}"
    if fault == "fill":
        ballast = run.where.parent / "ballast"
        fill(ballast, rng.randrange(0, 2**17, 2**12))
        told = run.told.stat().st_size
        run.until(lambda: b"was not saved" in run.told.read_bytes()[told:], rng.uniform(0.5, 5))
        ballast.unlink()
        return "the disk full for a while"
    run.kill(signal.SIGKILL)
    return "SIGKILL to all"


def attempt(run: Run, rng: random.Random | None) -> dict[str, Any]:
    """Starts a run, which goes on from what is there, and lets it suffer if `rng` is there."""
    starts, fault, what, size = len(run.starts()), None, None, run.told.stat().st_size
    run.start()
    ended = run.until(lambda: len(run.starts()) > starts)
    begun, after = run.starts()[-1], 0 if rng is None else rng.randrange(1, STEPS // 4)
    ended = ended or run.until(lambda: run.steps() <= begun)  # what it takes again is no longer in the record
    training = time.monotonic()
    if not ended and rng is not None and not run.until(lambda: run.steps() >= begun + after, WHOLE):
        several = len(_folder.whole(run.folder / "checkpoints")) > 1
        fault = rng.choice([f for f in FAULTS if several or f != "damage"])
        what = suffer(run, fault, rng)
        if fault == "fill" and not run.until(lambda: False, rng.uniform(0, 5)):
            run.kill(signal.SIGTERM, 0)  # it has gone on meanwhile
    codes = run.codes(PATIENCE if fault else WHOLE)
    seconds, told = time.monotonic() - training, run.told.read_bytes()[size:].decode(errors="replace")
    assert fault or set(codes) == {0}, (codes, told[-4000:])
    allowed = {0, 75, -signal.SIGKILL}
    allowed |= {-signal.SIGABRT} if fault == "kill one" and what == "SIGKILL to 0" else set()  # which all hear through
    over = f"{STEPS}/{STEPS}" in told  # all is saved, and signals are held back no more
    if over and fault in ("fill", "tell one"):
        allowed |= {-signal.SIGTERM, -signal.SIGABRT}
    assert set(codes) <= allowed, (fault, what, codes, told[-4000:])
    assert fault != "tell one" or set(codes) in ({75}, {0}) or over, (codes, told[-4000:])
    return {"fault": fault, "what": what, "codes": codes, "from": begun, "seconds": round(seconds, 2)}


def main(minutes: float, processes: int, seed: int, folder: Path) -> None:
    kills.prepare()
    pretrain, rng, text = kills.import_pretrain(), random.Random(seed), kills.write_text(folder / "text")
    disk = mount(folder / "disk", SIZE)
    straight = Run(pretrain, processes, disk, text, "straight")
    undisturbed = attempt(straight, None)
    expected = kills.result(straight.folder)
    shutil.rmtree(straight.where)
    begun, finished, faults, computed, spent = time.monotonic(), 0, 0, 0, 0.0
    while time.monotonic() - begun < 60 * minutes or not finished:
        run, kept = Run(pretrain, processes, disk, text, f"run-{finished}"), 0
        done: dict[str, Any] = {}
        while set(done.get("codes", [1])) != {0}:
            done = attempt(run, rng if time.monotonic() - begun < 60 * minutes else None)
            assert done["from"] >= kept, (done, kept)  # what a checkpoint was whole for is never lost, but to damage
            computed, spent = computed + run.steps() - done["from"], spent + done["seconds"]
            kept = damage(run, rng, done) if done["fault"] == "damage" else kills.newest(run.folder)
            lost = run.steps() - kept
            assert done["fault"] != "tell one" or lost == 0, (done, lost)
            if done["fault"]:
                faults += 1
                print(json.dumps({"run": finished, **done, "saved": kept, "lost": lost}), flush=True)
        assert kills.result(run.folder) == expected, run.where
        shutil.rmtree(run.where)
        finished += 1
    last = {
        "seed": seed,
        "faults": faults,
        "runs": finished,
        "minutes": (time.monotonic() - begun) / 60,
        "steps_kept": STEPS * finished / computed,
        "time_kept": finished * undisturbed["seconds"] / spent,
    }
    print(json.dumps(last), flush=True)


def damage(run: Run, rng: random.Random, done: dict[str, Any]) -> int:
    """Damages the newest checkpoint; the step of the one before."""
    *_, before, newest = _folder.whole(run.folder / "checkpoints")
    folder = run.folder / "checkpoints" / str(newest)
    path = rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size])
    how = rng.choice(sorted(corrupting.DAMAGE))
    corrupting.DAMAGE[how](path, rng)
    done["what"] += f", then {how} {path.relative_to(folder.parent)}"
    return before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--processes", type=int, default=2)
    with in_namespace(parser) as (options, temporary):
        main(options.minutes, options.processes, options.seed, temporary)
