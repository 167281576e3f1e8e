"""Compares what to do about documents of unequal length: how much a model learns with each in the same time.

Documents are the functions and methods of Python's standard library. What a step takes is measured first, by length of
row, and gives each method the steps that fit. Runs take turns of some seconds, so that what else the machine does hits
all alike. It takes 20 minutes on two CPU cores, and writes runs/lengths/: results.json, lengths.md and lengths.png.
"""

import ast
import dataclasses
import itertools
import json
import os
import random
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from jaxlm import data, losses, metrics, models, optim, stages, train
from jaxlm.evaluate import compile_eval, evaluate
from jaxlm.types import Batch

CACHE = Path(os.environ.get("JAXLM_CACHE", "~/.cache/jaxlm")).expanduser()
ABOUT = """
Bits per byte of the same held-out functions, mean ± standard deviation over seeds. Shows a small model early in its
training on short documents, on a device with dense attention; not long training, long documents or other kernels.
"""


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 128
    row_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    tokens_per_batch: int = 4096
    learning_rate: float = 4e-3
    """The highest, after a twentieth of the steps; then it falls to 0 on a straight line."""
    seconds: float = 45.0
    """Of training, for each run."""
    rounds: int = 6
    seeds: int = 3
    evaluated: int = 24
    smoke: bool = False
    """Only show that everything works: two steps of a tiny model, in a temporary folder."""


def functions() -> Iterator[data.Document]:
    """Functions and methods, each with its decorators, moved to the left edge."""
    for name, text in data.python_library():
        lines, nodes = text.decode(errors="replace").splitlines(keepends=True), ast.parse(text).body
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.ClassDef):
                nodes += node.body
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                source = textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
                yield data.Document(f"{name}:{first}", source.encode())


def step_seconds(step: Callable[..., Any], state: Any, specs: Sequence[Batch]) -> Mapping[int, float]:
    """The median over some steps, for each length of row."""
    taken: dict[int, list[float]] = {}
    for spec in (spec for _ in range(7) for spec in random.sample(specs, len(specs))):
        batch, begun = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), spec), time.perf_counter()
        state = jax.block_until_ready(step(state, batch)[0])
        taken.setdefault(spec["tokens"].shape[1], []).append(time.perf_counter() - begun)
    return {length: float(np.median(each)) for length, each in taken.items()}


def main(config: Config) -> None:
    folder = Path("runs/lengths")
    if config.smoke:
        config = dataclasses.replace(config, layers=1, width=16, seconds=0.0, rounds=1, seeds=2, evaluated=2)
        config = dataclasses.replace(config, row_lengths=(32, 64), tokens_per_batch=128)
        folder = Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    train.keep_programs()
    path = data.python_library_corpus(CACHE, data.ByteTokenizer())
    path = data.cached_corpus(CACHE / f"functions-{path.name}", functions, data.ByteTokenizer())
    corpus, heldout = data.open_corpus(path), data.open_corpus(path, "heldout")
    lengths, rows, longest, budget = corpus.lengths, config.row_lengths, config.row_lengths[-1], config.tokens_per_batch
    model = models.TransformerConfig(
        vocab=corpus.vocab, layers=config.layers, width=config.width, heads=2, qk_norm=True
    )
    init, apply = models.transformer(model, unroll=True)
    loss_fn = losses.next_token(apply)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def optimizer(steps: Any) -> optax.GradientTransformation:
        def schedule(step: Any) -> Any:
            return config.learning_rate * jnp.minimum((step + 1) / (steps / 20 + 1), 1 - step / steps)

        return optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(schedule, b2=0.95, weight_decay=0.1))

    def start(steps: float, seed: int) -> Any:
        return jnp.float32(steps), train.start(init(jax.random.key(seed)), optimizer(steps))

    def step(at: Any, batch: Any) -> Any:  # the number of steps is data, so that all methods share programs
        state, measured = train.make_step(grad_fn, optimizer(at[0]), jax.random.key(0))(at[1], batch)
        return (at[0], state), measured

    def compile_for(*plans: data.Plan) -> tuple[Callable[..., Any], list[Batch]]:
        specs = {str(spec): spec for plan in plans for spec in data.Batches(corpus, plan, 0).specs()}
        return train.compile_step(step, start(1, 0), specs.values()), list(specs.values())

    alone, packed = data.bucket(lengths, [longest // 16, *rows], budget), data.pack(lengths, rows, budget)
    seconds = [step_seconds(compiled, start(1, 0), specs) for compiled, specs in map(compile_for, (alone, packed))]
    costs = [data.row_cost(each, budget) for each in seconds]
    best = data.best_row_lengths(lengths, 4, multiple=longest // 32, longest=longest, cost=costs[False])

    def steps_for(plan: data.Plan) -> int:
        each = (rows.num_rows * costs[plan.packed](rows.row_length) for rows in map(plan.batch, itertools.count()))
        return 2 + sum(1 for _ in itertools.takewhile(lambda spent: spent < config.seconds, itertools.accumulate(each)))

    shorter_first = stages.length_warmup(rows, budget, max(len(rows), steps_for(packed) // 3) * budget)
    plans: dict[str, Callable[..., data.Plan]] = {
        "pad": partial(data.pad, lengths, longest, budget),
        "bucket": partial(data.bucket, lengths, best, budget),
        "concat": partial(data.concat, lengths, longest, budget),
        "pack": partial(data.pack, lengths, rows, budget),
        "pack, short first": partial(data.make_plan, lengths, shorter_first, data.best_fit),
    }
    compiled, _ = compile_for(*(plan() for plan in plans.values()))
    unseen = data.Batches(heldout, data.bucket(heldout.lengths, rows, budget, passes=1))
    held = [unseen[i] for i in range(min(config.evaluated, len(unseen)))]
    eval_fn = compile_eval(loss_fn, start(1, 0)[1].params, unseen.specs())
    runs: list[dict[str, Any]] = []
    for (name, plan), seed in itertools.product(plans.items(), range(config.seeds)):
        run = {"method": name, "steps": steps_for(plan()), "seconds": [], "predicted": 0.0, "bits": []}
        run |= {"state": start(run["steps"], seed), "batches": data.Batches(corpus, plan(seed=seed), run["steps"])}
        runs.append(run)
    for turn in range(config.rounds):
        for run in random.sample(runs, len(runs)):
            state, weights, begun = run["state"], list[jax.Array](), time.perf_counter()
            for i in range(*(run["steps"] * k // config.rounds for k in (turn, turn + 1))):
                state, measured = compiled(state, run["batches"][i])
                weights.append(measured["weight"])
            run["state"] = jax.block_until_ready(state)
            run["seconds"].append(time.perf_counter() - begun)
            run["predicted"] += float(sum(weights))
            run["bits"].append(heldout.bits_per_byte(evaluate(eval_fn, state[1].params, held)["loss"]))
    results = [{name: x for name, x in run.items() if name not in ("state", "batches")} for run in runs]
    about = {"config": dataclasses.asdict(config), "versions": metrics.versions(), "step_seconds": seconds}
    metrics.write_whole(folder / "results.json", json.dumps({**about, "bucket": best, "runs": results}))
    report(results, folder)


def report(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """A table, and bits per byte over time."""
    lines = ["| method | steps | seconds | tokens predicted/s | bits per byte |", "|---|---|---|---|---|"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == name]
        bits, seconds = (np.array([run[what] for run in own]) for what in ("bits", "seconds"))
        mean, spread = bits.mean(0), bits.std(0, ddof=1)
        rate = sum(run["predicted"] for run in own) / seconds.sum()
        final = f"{mean[-1]:.3f} ± {spread[-1]:.3f}"
        lines.append(f"| {name} | {own[0]['steps']} | {seconds.sum(1).mean():.1f} | {rate:,.0f} | {final} |")
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "label": f"{name}  {final}"}
        axes.errorbar(seconds.mean(0).cumsum(), mean, spread, **style)
    axes.set(xlabel="seconds of training", title="Held-out bits per byte of functions")
    axes.legend(frameon=False)
    figure.savefig(folder / "lengths.png", dpi=120)
    metrics.write_whole(folder / "lengths.md", "\n".join([*lines, ABOUT]))
    print(*lines, ABOUT, f"Look at {folder / 'lengths.png'}", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
