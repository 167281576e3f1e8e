"""Kills one process of several again and again, stops it, or lets it hang: how long do the others take to be gone?

A script: it prints a line of JSON per trial, with the seconds from the end of one to that of the last, or from where it
hangs. The processes and what they do are those of tests/processes.py.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import HANGING, HANGS, several


def lost(processes: int, victim: int, wait: float, number: signal.Signals, folder: Path) -> dict[str, object]:
    with several(processes, "endless", folder) as running:
        for one in running:
            one.wait_for("a step")
        time.sleep(wait)
        since = time.monotonic()
        os.kill(running[victim].process.pid, number)
        codes = [one.end().code for one in running if one is not running[victim]]
        seconds = time.monotonic() - since
    assert set(codes) <= {75, -signal.SIGABRT}, codes
    how = "killed" if number == signal.SIGKILL else "stopped, heartbeat 10 s"
    return {"fault": f"one of {processes} {how}", "codes": codes, "seconds": round(seconds, 3)}


def hanging(how: str, victim: int, folder: Path) -> dict[str, object]:
    with several(2, "hanging", folder, also={"HANG": f"{victim} {how}"}) as running:
        running[victim].wait_for("hangs")
        since = time.monotonic()
        codes = [one.end().code for one in running]
        seconds = time.monotonic() - since
    assert set(codes) <= {75, -signal.SIGABRT, -signal.SIGKILL}, codes
    assert how == "SIGSTOP" or (folder / f"stacks-{victim}.txt").stat().st_size
    return {"fault": f"one of 2 hangs: {how}", "codes": codes, "seconds": round(seconds - HANGING, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for i in range(options.trials):
        with tempfile.TemporaryDirectory() as folder:
            processes = rng.choice([2, 2, 4])
            victim, wait = rng.randrange(processes), rng.random()
            line = lost(processes, victim, wait, signal.SIGKILL, Path(folder))
            print(json.dumps({"trial": i, "victim": victim, **line}), flush=True)
    for i in range(min(10, options.trials)):
        with tempfile.TemporaryDirectory() as folder:
            print(
                json.dumps({"trial": i, "victim": i % 2, **lost(2, i % 2, 0.0, signal.SIGSTOP, Path(folder))}),
                flush=True,
            )
    for i, how in enumerate([*HANGS][: options.trials]):
        for victim in (0, 1)[: options.trials]:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps({"trial": i, "victim": victim, **hanging(how, victim, Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
