"""Compares what to do about documents of unequal length: how much a model learns with each in the same time.

Documents are the functions and methods of Python's library. Runs take turns, so that what else the machine does hits
all alike; the learning rate follows the time that a run has used. Bits per byte are those of the same held-out
functions, mean ± standard deviation over seeds: of a small model early in its training, on short documents, on a CPU
with dense attention. After each turn it writes what it found to runs/lengths/: results.json, lengths.md, lengths.png.
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from jaxlm import data, files, losses, metrics, models, optim, stages, train
from jaxlm.evaluate import compile_eval, evaluate

CACHE = Path(os.environ.get("JAXLM_CACHE", "~/.cache/jaxlm")).expanduser()
MOST, EVALUATED = 10**6, 12  # batches of a run, more than it has time for, and held-out ones


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 2
    width: int = 128
    row_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    tokens_per_batch: int = 4096
    learning_rate: float = 4e-3  # the highest, after a twentieth of the time; then it falls to 0 on a straight line
    seconds: float = 30.0  # of training, for each run
    rounds: int = 3
    seeds: int = 3
    smoke: bool = False  # only show that everything works: a step of a tiny model, in a temporary folder


def functions() -> Iterator[data.Document]:
    """Functions and methods, moved to the left edge."""
    for name, text in data.python_library():
        lines = text.decode(errors="replace").splitlines(keepends=True)
        for parent in ast.walk(ast.parse(text)):
            for node in parent.body if isinstance(parent, ast.Module | ast.ClassDef) else []:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                    yield data.Document(f"{name}:{node.lineno}", source.encode())


def main(config: Config) -> None:
    folder = Path("runs/lengths")
    if config.smoke:
        config = dataclasses.replace(
            config, layers=1, row_lengths=(32, 64), tokens_per_batch=128, seconds=1e-3, rounds=1
        )
        folder = Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    train.keep_programs()
    path = data.python_library_corpus(CACHE, data.ByteTokenizer())
    path = data.cached_corpus(CACHE / f"functions-{path.name}", functions, data.ByteTokenizer())
    corpus, heldout = data.open_corpus(path), data.open_corpus(path, "heldout")
    lengths, rows, longest, budget = corpus.lengths, config.row_lengths, config.row_lengths[-1], config.tokens_per_batch
    sizes: dict[str, Any] = {"layers": config.layers, "width": config.width, "heads": 2}
    init, apply = models.transformer(models.TransformerConfig(vocab=corpus.vocab, qk_norm=True, **sizes), unroll=True)
    grad_fn = jax.value_and_grad(loss_fn := losses.next_token(apply), has_aux=True)

    def optimizer(rate: Any) -> optax.GradientTransformation:
        return optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(lambda _: rate, b2=0.95, weight_decay=0.1))

    def step(at: Any, batch: Any) -> Any:  # the share of time that has gone is data: all methods share programs
        rate = config.learning_rate * jnp.minimum((at[0] + 0.001) / 0.05, 1 - at[0])
        state, measured = train.make_step(grad_fn, optimizer(rate), jax.random.key(0))(at[1], batch)
        return (at[0], state), measured

    def start(seed: int) -> Any:
        return jnp.zeros(()), train.start(init(jax.random.key(seed)), optimizer(0.0))

    def compiled_for(*plans: data.Plan) -> Callable[..., Any]:
        specs = {str(spec): spec for plan in plans for spec in data.Batches(corpus, plan, 0).specs()}
        return train.compile_step(step, start(0), specs.values())

    measured = data.bucket(lengths, [longest // 16, *rows], budget)
    compiled, state, taken = compiled_for(measured), start(0), dict[int, list[float]]()
    for spec in 8 * data.Batches(corpus, measured, 0).specs():
        batch, begun = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), spec), time.perf_counter()
        state = jax.block_until_ready(compiled(state, batch)[0])
        taken.setdefault(batch["tokens"].shape[1], []).append(time.perf_counter() - begun)
    cost = data.row_cost({length: float(np.median(seconds[1:])) for length, seconds in taken.items()}, budget)
    best = data.best_row_lengths(lengths, 4, multiple=longest // 32, longest=longest, cost=cost)
    a_third = config.seconds / 3 / float(cost(longest)) * longest  # of the tokens, or less, as shorter rows take less
    shorter_first = stages.length_warmup(rows, budget, max(int(a_third), len(rows) * budget))
    plans: dict[str, Callable[..., data.Plan]] = {
        "pad": partial(data.pad, lengths, longest, budget),
        "bucket": partial(data.bucket, lengths, best, budget),
        "concat": partial(data.concat, lengths, longest, budget),
        "pack": partial(data.pack, lengths, rows, budget),
        "pack, short first": partial(data.make_plan, lengths, shorter_first, data.best_fit),
    }
    compiled = compiled_for(*(plan() for plan in plans.values()))
    unseen = data.Batches(heldout, data.bucket(heldout.lengths, rows, budget, passes=1), EVALUATED)
    eval_fn = compile_eval(loss_fn, state[1].params, unseen.specs())
    runs: list[dict[str, Any]] = []
    for (name, plan), seed in itertools.product(plans.items(), range(config.seeds)):
        runs.append({"method": name, "seed": seed, "plan": plan(seed=seed), "state": start(seed)})
        runs[-1] |= {"steps": 0, "predicted": 0.0, "seconds": [0.0], "bits": []}
    about = metrics.provenance(config=dataclasses.asdict(config), data=corpus.fingerprint)
    about |= {"step_seconds": taken, "bucket": best}
    for turn in range(config.rounds):
        for run in random.sample(runs, len(runs)):
            batches, spent = data.Batches(corpus, run["plan"], MOST), run["seconds"][-1]
            while spent < config.seconds * (turn + 1) / config.rounds:
                begun = time.perf_counter()
                at = jnp.float32(spent / config.seconds), run["state"][1]
                run["state"], measured = jax.block_until_ready(compiled(at, batches[run["steps"]]))
                spent, run["steps"] = spent + time.perf_counter() - begun, run["steps"] + 1
                run["predicted"] += float(measured["weight"])
            run["seconds"].append(spent)
            run["bits"].append(heldout.bits_per_byte(evaluate(eval_fn, run["state"][1].params, unseen)["loss"]))
        results = [{name: x for name, x in run.items() if name not in ("state", "plan")} for run in runs]
        files.write_whole(folder / "results.json", json.dumps({**about, "runs": results}))
        lines = ["| method | steps | seconds | tokens predicted/s | bits per byte |", "|---|---|---|---|---|"]
        axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
        for name in plans:
            columns = ("bits", "seconds", "steps", "predicted")
            bits, seconds, steps, tokens = (np.array([r[x] for r in runs if r["method"] == name]) for x in columns)
            spent, final = seconds[:, -1], f"{bits[:, -1].mean():.3f} ± {bits[:, -1].std(ddof=1):.3f}"
            speed = f"{steps.mean():.0f} | {spent.mean():.1f} | {tokens.sum() / spent.sum():,.0f}"
            lines.append(f"| {name} | {speed} | {final} |")
            axes.errorbar(seconds.mean(0)[1:], bits.mean(0), bits.std(0, ddof=1), marker="o", label=f"{name}  {final}")
        axes.set(xlabel="seconds of training", title="Held-out bits per byte of functions")
        axes.legend(frameon=False)
        figure.savefig(folder / "lengths.png", dpi=120)
        files.write_whole(folder / "lengths.md", "\n".join([__doc__ or "", *lines, ""]))
        print(*lines, f"Look at {folder / 'lengths.png'}", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
