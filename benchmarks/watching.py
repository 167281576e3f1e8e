"""What it costs to watch a run: steps with everything on that looks after it, against the same steps in a bare loop.

On are: `optim.skip_nonfinite`, `train.fit`'s look at losses and gradients, `train.stop_at_spikes`, the watchdog, the
record of metrics and times. The model is that of `experiments/pretrain.py`. Both have a turn in each round.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import machine
import numpy as np
import optax
from summary import quiet_rounds, spread

from jaxlm import grads, losses, metrics, models, optim, train
from jaxlm.types import Batch
from jaxlm.watchdog import watching

HERE: Final = Path(__file__).parent
TURN: Final = 1.0
"""Seconds, about."""


class Contestant:
    """A run of its own."""

    def __init__(self, optimizer: optax.GradientTransformation, *, watched: bool, smoke: bool):
        rows, length = (8, 32) if smoke else (8, 256)
        config = models.TransformerConfig(vocab=258, layers=1 if smoke else 4, width=16 if smoke else 128, heads=2)
        init, apply = models.transformer(config, unroll=True)
        grad_fn = grads.accumulate(jax.value_and_grad(losses.next_token(apply), has_aux=True), 2)
        self.watched, self.state = watched, train.start(jax.jit(init)(jax.random.key(0)), optimizer)
        tokens = np.random.default_rng(0).integers(0, 258, (16, rows, length), np.uint16)
        self.batches = [{"tokens": jax.device_put(x)} for x in tokens]
        self.step = train.compile_step(
            train.make_step(grad_fn, optimizer, jax.random.key(1)), self.state, self.batches[:1]
        )
        self.steps, self.seconds, self.foreign_cores = 2, list[float](), list[float]()
        self.take()
        self.take()
        self.steps = 2 if smoke else math.ceil(TURN / self.seconds[-1])
        self.seconds.clear()
        self.foreign_cores.clear()

    def take(self) -> None:
        """A turn of so many steps; keeps the seconds of each."""
        batches = list(itertools.islice(itertools.cycle(self.batches), self.steps))
        busy, cpu = machine.busy_seconds(), sum(os.times()[:2])
        seconds = (self._watched if self.watched else self._bare)(batches)
        cpu = sum(os.times()[:2]) - cpu
        self.seconds.append(seconds / self.steps)
        self.foreign_cores.append(max(0.0, (machine.busy_seconds() - busy - cpu) / seconds))

    def _bare(self, batches: Sequence[Batch]) -> float:
        begun = time.perf_counter()
        for batch in batches:
            self.state, _ = self.step(self.state, batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - begun

    def _watched(self, batches: Sequence[Batch]) -> float:
        with (
            tempfile.TemporaryDirectory() as folder,
            metrics.Log(Path(folder), 0, steps=self.steps) as log,
            watching(Path(folder) / "stacks.txt", seconds=600) as watch,
        ):
            time.sleep(0.5)  # in which the second process starts, once in a run
            begun = time.perf_counter()
            taken = train.fit(self.step, self.state, watch.batches(log.timed(batches)))
            for i, (self.state, measured) in enumerate(train.stop_at_spikes(taken, 0)):
                log.write(i + 1, measured)
            log.flush()
            jax.block_until_ready(self.state)
            return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="how many turns each has (default: 40)")
    parser.add_argument("--smoke", action="store_true", help="show that it works: a tiny model, on the CPU")
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    machine.restart(on_cpu=options.smoke)
    device = machine.device()
    adamw = optim.adamw(1e-3)
    bare = Contestant(adamw, watched=False, smoke=options.smoke)
    watched = Contestant(optim.skip_nonfinite(adamw), watched=True, smoke=options.smoke)
    for i in range(options.rounds):
        for one in random.Random(i).sample([bare, watched], 2):
            one.take()
    counted = quiet_rounds([bare.foreign_cores, watched.foreign_cores])
    ratio = spread([watched.seconds[i] / bare.seconds[i] for i in counted])
    quartiles = "{median:.3f} ({lower_quartile:.3f} to {upper_quartile:.3f})".format(**ratio)
    print(f"a watched step takes {quartiles} of a bare one's {1e3 * np.median(bare.seconds):.1f} ms on {device}")
    if options.smoke:
        return
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "cores": os.cpu_count(),
        "versions": machine.versions(("jax", "jaxlib", "optax", "numpy")),
        "times_bare": ratio,
        "counted_rounds": counted,
        "rounds": {
            name: {"seconds": one.seconds, "foreign_cores": one.foreign_cores}
            for name, one in (("bare", bare), ("watched", watched))
        },
    }
    out = HERE / "results" / f"watching-{machine.file_name(device)}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
