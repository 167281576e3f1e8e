"""One contestant, in a process of its own: takes orders from `train_step.py` on stdin, answers on stdout in JSON.

python contestant.py device
python contestant.py weights WORKLOAD FILE     writes the weights that all contestants start from
python contestant.py FUNCTION WORKLOAD FILE    trains: each line on stdin is a number of steps to take
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
from workloads import CHECKED_STEPS, Hyperparameters, Workload


def device() -> dict[str, str]:
    """What JAX computes on."""
    import jax

    return {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind}


def write_weights(workload: Workload, path: str) -> None:
    """Writes initial weights for all."""
    from jaxlm_step import initial_weights

    np.savez(path, **initial_weights(workload))  # pyright: ignore[reportArgumentType]: numpy's stub is too narrow


def serve(function: str, workload: Workload, path: str, answer: Callable[[dict[str, object]], None]) -> None:
    """Takes the steps that are checked, then as many as each line of stdin asks for."""
    module, _, name = function.rpartition(".")
    source = getattr(importlib.import_module(module), name)
    with np.load(path) as file:
        weights = dict(file)

    # only reading a metric waits for its step
    begun = time.perf_counter()
    steps = source(workload, Hyperparameters(), weights)
    metrics = [_read(next(steps))]
    to_first_step = time.perf_counter() - begun
    metrics += [_read(next(steps)) for _ in range(CHECKED_STEPS - 1)]
    answer({"to_first_step": to_first_step, "metrics": metrics})
    for order in sys.stdin:
        begun, cpu = time.perf_counter(), sum(os.times()[:2])
        for _ in range(int(order) - 1):
            next(steps)
        last = _read(next(steps))
        seconds, cpu_seconds = time.perf_counter() - begun, sum(os.times()[:2]) - cpu
        answer({"seconds": seconds, "cpu_seconds": cpu_seconds, "last": last})


def _read(metrics: tuple[float, float]) -> tuple[float, float]:
    return float(metrics[0]), float(metrics[1])


def main() -> None:
    # what libraries print must not get among the answers
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)

    def answer(values: dict[str, object]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    what = sys.argv[1]
    if what == "device":
        answer(dict(device()))
        return
    workload, path = Workload(**json.loads(sys.argv[2])), sys.argv[3]
    if what == "weights":
        write_weights(workload, path)
    else:
        serve(what, workload, path, answer)


if __name__ == "__main__":
    main()
