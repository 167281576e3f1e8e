#!/usr/bin/env python3
"""Starts a run again, from its last checkpoint, when it was preempted, killed, or ended by its watchdog.

Start: experiments/launch/supervise.py runs/pretrain -- python experiments/pretrain.py --steps 100000
On several machines start it on each, or let SLURM or Kubernetes do the same (docs/reliability.md).

A run that exits with 0 is done. With 75, or ended by a signal, it is started again; with anything else it failed with
an error that it would meet again. Three starts in a row without a new checkpoint end it too, and the waits between
them grow. A signal to this program is passed on, and the run then not started again; that of a terminal which is closed
(SIGHUP) as SIGTERM, unless nohup keeps it away.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESTART = 75
WAITS = 1, 10, 60  # seconds, by the number of starts in a row without a new checkpoint, of which there may be no more


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # it may go into a file on a full disk
        os.write(2, f"{text}\n".encode())


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max((int(path.name) for path in run.glob("checkpoints/*") if path.name.isdecimal()), default=0)


def supervise(run: Path, command: list[str]) -> int:
    asked: list[int] = []
    passed: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: Any) -> None:
        del frame
        number = signal.SIGTERM if number == signal.SIGHUP else number
        asked.append(number)
        if child is not None:
            passed.append(number)
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, pass_on)
    fruitless, before, starts = 0, newest(run), 0
    while True:
        child, starts = subprocess.Popen(command, start_new_session=True), starts + 1
        if asked and not passed:  # it came while the run was being started; twice would end that at once
            child.send_signal(asked[0])
        code, after = child.wait(), newest(run)
        child = None
        # A shell gives 128 + N for signal N.
        again = code == RESTART or code < 0 or 128 < code < 160
        fruitless = 0 if after > before else fruitless + 1
        what = f"supervise: start {starts} ended with exit code {code}, its newest checkpoint is that of step {after}"
        if code == 0 or asked or not again or fruitless == len(WAITS):
            why = "without a new checkpoint three times in a row; " if again and not asked and code else ""
            say(f"{what}; {why}not started again")
            return code if code >= 0 else 128 - code
        wait, before = WAITS[fruitless], after
        say(f"{what}; started again in {wait} s")
        until = time.monotonic() + wait
        while not asked and time.monotonic() < until:
            time.sleep(0.1)
        if asked:
            return RESTART


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit("usage: supervise.py RUN_FOLDER -- COMMAND ...")
    sys.exit(supervise(Path(sys.argv[1]), sys.argv[3:]))
