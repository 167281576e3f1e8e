"""Compares what attention sees, at equal time: everything, windows, windows with some full layers, sparse blocks.

A model learns Python's standard library, bytes in long rows, for as many seconds with each; then held-out files are
coded: bits per byte by position in the row. It takes 20 minutes on two CPU cores, and writes runs/attention/.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jaxlm import data, files, losses, metrics, models, optim, report, train

CACHE = Path(os.environ.get("JAXLM_CACHE", "~/.cache/jaxlm")).expanduser()
BINS = 8


@dataclasses.dataclass(frozen=True)
class Config:
    seconds: float = 280.0
    """How long each trains, without compiling."""
    layers: int = 4
    width: int = 128
    row_length: int = 4096
    window: int = 256
    """Keys; BigBird's blocks are a quarter of it."""
    rows_evaluated: int = 48
    learning_rate: float = 4e-3
    smoke: bool = False
    """Only show that everything works: two steps of a tiny model, in a temporary folder."""


def main(config: Config) -> None:
    folder = Path("runs/attention")
    if config.smoke:
        tiny = {"layers": 2, "width": 16, "row_length": 128, "window": 16, "rows_evaluated": 2}
        config = dataclasses.replace(config, seconds=0.0, **tiny)
        folder = Path(tempfile.mkdtemp())
    if config.row_length % BINS or config.rows_evaluated < 1:
        raise ValueError(f"use a row_length that is a multiple of {BINS}, and 1 or more rows_evaluated: {config}")
    folder.mkdir(parents=True, exist_ok=True)
    train.keep_programs()
    path = data.python_library_corpus(CACHE, data.ByteTokenizer())
    corpus, heldout = data.open_corpus(path), data.open_corpus(path, "heldout")
    rows = [config.row_length], config.row_length, 0
    batches = data.Batches(corpus, data.bucket(corpus.lengths, *rows), count=100_000)
    unseen = data.Batches(heldout, data.bucket(heldout.lengths, *rows), count=10_000)
    # Rows of one long document, so that each position of a row has as many before it.
    full = [b for b in (unseen[i] for i in range(len(unseen))) if int(b["lengths"][0]) == config.row_length]
    evaluated = (full or [unseen[i] for i in range(config.rows_evaluated)])[: config.rows_evaluated]
    sizes: dict[str, Any] = {"vocab": corpus.vocab, "layers": config.layers, "width": config.width, "heads": 2}
    shape = functools.partial(models.TransformerConfig, qk_norm=True, **sizes)
    contestants: dict[str, tuple[models.TransformerConfig, dict[str, Any]]] = {
        "dense": (shape(), {"implementation": models.attention.dense}),
        f"window {config.window}": (shape(windows=(config.window,)), {}),
        "window, window, ..., full": (shape(windows=(*[config.window] * (config.layers - 1), None)), {}),
        "bigbird": (shape(), {"mask": models.masks.bigbird(config.window // 4, window=3, first=1, random=2)}),
    }
    results = metrics.provenance(config=dataclasses.asdict(config), data=batches.fingerprint) | {"masks": {}}
    for name, (model, options) in contestants.items():
        found = results["masks"][name] = learn(model, options, batches, evaluated, config)
        files.write_whole(folder / "results.json", json.dumps(results))
        print(f"{name}: {found['bits_per_byte']:.3f} bits per byte after {found['steps']} steps")
    Console(width=160).print(table(results["masks"], config))
    draw(results["masks"], config, folder / "attention.png")
    print(f"Look at {folder / 'attention.png'}")


def learn(model: Any, options: dict[str, Any], batches: Any, evaluated: list[Any], config: Config) -> dict[str, Any]:
    """Trains for so many seconds, its learning rate falling by the time that is left, and codes held-out rows."""
    init, apply = models.transformer(model, unroll=True, **options)

    def optimizer(progress: Any) -> optax.GradientTransformation:
        def rate(step: Any) -> Any:
            return config.learning_rate * jnp.minimum(1, (step + 1) / 50) * (1 - progress)

        return optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, b2=0.95, weight_decay=0.1))

    grad_fn = jax.value_and_grad(losses.next_token(apply), has_aux=True)

    def advance(state: Any, batch: Any, progress: Any) -> Any:
        return train.make_step(grad_fn, optimizer(progress), jax.random.key(0))(state, batch)

    state = jax.jit(lambda: train.start(init(jax.random.key(0)), optimizer(0.0)))()
    step = jax.jit(advance, donate_argnums=0).lower(state, batches[0], jnp.float32(0)).compile()
    curve, begun, spent = list[float](), time.perf_counter(), 0.0
    while spent < config.seconds or len(curve) < 2:
        state, measured = step(state, batches[len(curve)], jnp.float32(min(1.0, spent / max(config.seconds, 1e-9))))
        curve.append(float(measured["loss"]) / math.log(2))
        spent = time.perf_counter() - begun

    @jax.jit
    def by_position(params: Any, batch: Any) -> Any:
        targets, weights = losses.next_tokens(batch)
        logits = apply(params, batch["tokens"].astype(jnp.int32)).astype(jnp.float32)
        lost = jnp.where(weights > 0, losses.cross_entropy(logits, targets), 0)
        return tuple(jnp.sum(x.reshape(len(x), BINS, -1), axis=(0, 2)) for x in (lost, weights))

    sums = np.sum([by_position(state.params, batch) for batch in evaluated], axis=0, dtype=float)
    bits = sums[0] / np.maximum(sums[1], 1) / math.log(2)
    about = {"steps": len(curve), "seconds_per_step": spent / len(curve), "bits_by_position": bits.tolist()}
    return about | {"bits_per_byte": float(bits @ sums[1] / sum(sums[1])), "losses": curve}


def table(found: dict[str, Any], config: Config) -> Table:
    """A line for each mask."""
    lines = Table(title=f"held-out bits per byte by position, after {config.seconds:.0f} s of training each")
    edges = np.linspace(0, config.row_length, BINS + 1).astype(int)
    for column in ("sees", "steps", "s/step", "all", *(f"{a}-{b}" for a, b in itertools.pairwise(edges))):
        lines.add_column(column, justify="left" if column == "sees" else "right", no_wrap=True)
    for name, one in found.items():
        bits = (f"{x:.3f}" for x in (one["bits_per_byte"], *one["bits_by_position"]))
        lines.add_row(name, str(one["steps"]), f"{one['seconds_per_step']:.2f}", *bits)
    return lines


def draw(found: dict[str, Any], config: Config, path: Path) -> None:
    """Training loss over time, and held-out bits by position."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, one in found.items():
        seconds = np.arange(1, one["steps"] + 1) * one["seconds_per_step"]
        left.plot(seconds, report.smooth(one["losses"], 20), label=f"{name}: {one['steps']} steps")
        at, bits = (np.arange(BINS) + 0.5) * config.row_length / BINS, one["bits_by_position"]
        right.plot(at, bits, marker="o", label=f"{name}  {one['bits_per_byte']:.3f}")
    left.set(xlabel="seconds", title="Training loss, bits per byte")
    right.set(xlabel="position in the row", title="Held-out bits per byte")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
