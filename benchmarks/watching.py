"""What it costs to watch a run: steps with everything on that looks after it, against the same steps in a bare loop.

On are `train.fit`'s look at losses and gradients, `train.stop_at_spikes`, the watchdog, the record of metrics and
times; for one of two contestants also `optim.skip_nonfinite`. The model is that of `experiments/pretrain.py`, and all
clip gradients. In each round each has a turn, and the bare loop a second one, of a contestant of its own: how far
that is from the first is chance.
"""

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
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
STEPS: Final = 4
"""In a turn."""


def bare(step: Any, state: Any, batches: Iterator[Batch]) -> Iterator[Any]:
    """Yields the state after each step."""
    for batch in batches:
        state, _ = step(state, batch)
        yield state


def watched(step: Any, state: Any, batches: Iterator[Batch]) -> Iterator[Any]:
    """The same, looked after as `experiments/pretrain.py` does."""
    with (
        tempfile.TemporaryDirectory() as folder,
        metrics.Log(Path(folder), 0, steps=10**6) as log,
        watching(Path(folder) / "stacks.txt", seconds=600) as watch,
    ):
        taken = train.fit(step, state, watch.batches(log.timed(batches)))
        for i, (state, measured) in enumerate(train.stop_at_spikes(taken, 0)):
            log.write(i + 1, measured)
            yield state


class Contestant:
    """A run of its own, which goes on from turn to turn."""

    def __init__(self, optimizer: optax.GradientTransformation, run: Any, *, smoke: bool):
        rows, length = (8, 32) if smoke else (8, 256)
        config = models.TransformerConfig(vocab=258, layers=1 if smoke else 4, width=16 if smoke else 128, heads=2)
        init, apply = models.transformer(config, unroll=True)
        grad_fn = grads.accumulate(jax.value_and_grad(losses.next_token(apply), has_aux=True), 2)
        state = train.start(jax.jit(init)(jax.random.key(0)), optimizer)
        tokens = np.random.default_rng(0).integers(0, 258, (16, rows, length), np.uint16)
        batches = [{"tokens": jax.device_put(x)} for x in tokens]
        step = train.compile_step(train.make_step(grad_fn, optimizer, jax.random.key(1)), state, batches[:1])
        self.running = run(step, state, itertools.cycle(batches))
        self.seconds, self.foreign_cores = list[float](), list[float]()

    def take(self) -> None:
        """A turn; keeps its seconds by step."""
        busy, cpu, begun = machine.busy_seconds(), sum(os.times()[:2]), time.perf_counter()
        jax.block_until_ready([next(self.running) for _ in range(STEPS)][-1])
        seconds, cpu = time.perf_counter() - begun, sum(os.times()[:2]) - cpu
        self.seconds.append(seconds / STEPS)
        self.foreign_cores.append(max(0.0, (machine.busy_seconds() - busy - cpu) / seconds))


def summary(ratios: Any) -> dict[str, float]:
    """With the standard error of the median, as of a normal distribution."""
    return {**spread([*ratios]), "standard_error": 1.2533 * float(np.std(ratios)) / len(ratios) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="how many turns each has (default: 300)")
    parser.add_argument("--smoke", action="store_true", help="show that it works: a tiny model, on the CPU")
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    machine.restart(on_cpu=options.smoke)
    device = machine.device()
    optimizer = optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    contestants = {
        "bare": Contestant(optimizer, bare, smoke=options.smoke),
        "bare again": Contestant(optimizer, bare, smoke=options.smoke),
        "watched": Contestant(optimizer, watched, smoke=options.smoke),
        "watched, skips NaN": Contestant(optim.skip_nonfinite(optimizer), watched, smoke=options.smoke),
    }
    for i in range(-2, options.rounds):
        for one in random.Random(i).sample([*contestants.values()], len(contestants)):
            one.take()
            if i < 0:  # the second process starts, and memory is taken for the first time
                one.seconds.clear()
                one.foreign_cores.clear()
    counted = quiet_rounds([one.foreign_cores for one in contestants.values()])
    taken = {name: np.array(one.seconds)[counted] for name, one in contestants.items()}
    alone = (taken["bare"] + taken["bare again"]) / 2
    ratios = {name: summary(seconds / alone) for name, seconds in taken.items() if not name.startswith("bare")}
    ratios["bare again"] = summary(taken["bare again"] / taken["bare"])
    print(f"on {device}, of a bare step's {1e3 * np.median(alone):.1f} ms:")
    for name, ratio in ratios.items():
        quartiles = "(quartiles {lower_quartile:.3f} to {upper_quartile:.3f})".format(**ratio)
        print(f"  {name}: {ratio['median']:.3f} ± {ratio['standard_error']:.3f} {quartiles}")
    if options.smoke:
        return
    record: dict[str, Any] = {
        **machine.about(device, ("jax", "jaxlib", "optax", "numpy")),
        "times_bare": ratios,
        "counted_rounds": counted,
        "rounds": {
            name: {"seconds": one.seconds, "foreign_cores": one.foreign_cores} for name, one in contestants.items()
        },
    }
    out = HERE / "results" / f"watching-{machine.file_name(device)}.json"
    out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
