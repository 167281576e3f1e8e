"""Compares optimizers on one small language model, each with its best learning rate out of four.

All learning rates and seeds of an optimizer train at once, as one compiled program: `jax.vmap` over a population. Seeds
differ in the initial weights, not in batches. It takes half an hour on two CPU cores, and writes runs/optimizers/.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.progress import track

from jaxlm import data, files, losses, metrics, models, optim, report, schedules, train, tree
from jaxlm.evaluate import evaluate, make_eval

CACHE = Path(os.environ.get("JAXLM_CACHE", "~/.cache/jaxlm")).expanduser()
MATRICES = optim.by_name({"blocks/.*/kernel": True, ".*": False})
STACKED = optim.by_name({"blocks/.*": True, ".*": False})
DECAYS = optim.by_name({".*kernel|embed": True, ".*": False})
DECAY: dict[str, Any] = {"weight_decay": 0.1, "decay_mask": DECAYS}
MORE: dict[str, Any] = {"weight_decay": 1.0, "decay_mask": DECAYS}  # for Lion, whose learning rate is a tenth
Make = Callable[[Any], optax.GradientTransformation]
OPTIMIZERS: dict[str, tuple[float, Make]] = {  # the lowest of four learning rates, each twice the one before
    "AdamW": (1e-3, lambda rate: optim.adamw(rate, b2=0.95, **DECAY)),
    "AdamW int8": (1e-3, lambda rate: optim.adamw_int8(rate, b2=0.95, **DECAY)),
    "Adafactor": (1e-2, lambda rate: optim.adafactor(rate, stacked=STACKED, **DECAY)),
    "Adafactor bf16": (1e-2, lambda rate: optim.adafactor_bf16(rate, stacked=STACKED, **DECAY)),
    "Lion": (1.5e-4, lambda rate: optim.lion(rate, b2=0.98, **MORE)),
    "Lion int8": (1.5e-4, lambda rate: optim.lion_int8(rate, b2=0.98, **MORE)),
    "LAMB": (5e-3, lambda rate: optim.lamb(rate, b2=0.95, adapt_mask=DECAYS, stacked=STACKED, **DECAY)),
    "Muon": (2e-3, lambda rate: optim.muon(rate, MATRICES, stacked=STACKED, **DECAY)),
    "SOAP": (1e-3, lambda rate: optim.soap(rate, largest=256, stacked=STACKED, **DECAY)),
    "NorMuon": (2e-3, lambda rate: optim.muon(rate, MATRICES, stacked=STACKED, variance_b2=0.95, **DECAY)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = tuple(OPTIMIZERS)
    layers: int = 4
    width: int = 128
    row_length: int = 256
    tokens_per_batch: int = 512
    steps: int = 300
    seeds: int = 2
    smoke: bool = False
    """Only show that everything works: two steps of a tiny model, in a temporary folder."""


def main(config: Config) -> None:
    folder = Path("runs/optimizers")
    if config.smoke:
        config = dataclasses.replace(config, layers=1, width=16, row_length=32, tokens_per_batch=64, steps=2, seeds=2)
        folder = Path(tempfile.mkdtemp())
    if unknown := {*config.only} - {*OPTIMIZERS}:
        raise ValueError(f"only names {unknown}; use some of {[*OPTIMIZERS]}")
    folder.mkdir(parents=True, exist_ok=True)
    train.keep_programs()
    path = data.python_library_corpus(CACHE, data.ByteTokenizer())
    corpus, heldout = data.open_corpus(path), data.open_corpus(path, "heldout")
    layout = [config.row_length], config.tokens_per_batch, 0
    batches = data.Batches(corpus, data.bucket(corpus.lengths, *layout), count=config.steps)
    evaluated = data.Batches(heldout, data.bucket(heldout.lengths, *layout, passes=1), count=2 if config.smoke else 64)
    sizes: dict[str, Any] = {"layers": config.layers, "width": config.width, "heads": 2}
    init, apply = models.transformer(models.TransformerConfig(vocab=corpus.vocab, qk_norm=True, **sizes), unroll=True)
    loss_fn = losses.next_token(apply)
    grad_fn, eval_fn = jax.value_and_grad(loss_fn, has_aux=True), jax.jit(make_eval(loss_fn))

    def sweep(name: str, lowest: float, make: Make) -> dict[str, Any]:
        """Trains at four learning rates from every seed."""
        rates, warmup = lowest * 2.0 ** np.arange(4), config.steps // 20
        members = np.repeat(rates, config.seeds), np.tile(np.arange(config.seeds), len(rates))

        def optimizer(rate: Any) -> optax.GradientTransformation:
            schedule = schedules.warmup(schedules.cosine(rate, 0.0, config.steps - warmup), warmup)
            return optax.chain(optim.clip_by_global_norm(1.0), make(schedule))

        def start(rate: Any, seed: Any) -> train.TrainState:
            return train.start(init(jax.random.key(seed)), optimizer(rate))

        def step(rate: Any, state: Any, batch: Any) -> Any:
            return train.make_step(grad_fn, optimizer(rate), jax.random.key(0))(state, batch)

        # All count alike; with one count for all, what is done every few steps isn't computed in each.
        one = jax.eval_shape(start, *(x[0] for x in members))
        axes = jax.tree.map(lambda x: None if x.dtype == jnp.int32 else 0, one)
        step_all = jax.vmap(step, in_axes=(0, axes, None), out_axes=(axes, 0))
        state = jax.jit(jax.vmap(start, out_axes=axes))(*members)
        steps = train.fit(lambda state, batch: step_all(members[0], state, batch), state, data.iterate(batches))
        trained, curve = state.params, list[jax.Array]()
        for after, measured in track(steps, name, config.steps):
            trained = after.params
            curve.append(measured["loss"])
        each = (jax.tree.map(lambda x, i=i: x[i], trained) for i in range(len(members[0])))
        found = [evaluate(eval_fn, p, (evaluated[i] for i in range(len(evaluated))))["loss"] for p in each]
        bits = np.reshape([heldout.bits_per_byte(loss) for loss in found], (len(rates), -1))
        return {
            "learning_rates": rates.tolist(),
            "bits_per_byte": bits.tolist(),
            "state_bytes_per_parameter": tree.nbytes(one.opt_state) / tree.size(one.params),
            "losses": np.reshape(curve, (len(curve), len(rates), -1)).mean(2).T.tolist(),
        }

    results = metrics.provenance(config=dataclasses.asdict(config), data=batches.fingerprint) | {"optimizers": {}}
    for name in config.only:
        found = results["optimizers"][name] = sweep(name, *OPTIMIZERS[name])
        files.write_whole(folder / "results.json", json.dumps(results))
        bits, _, spread, rate = best_of(found)
        print(f"{name}: {bits:.3f} ± {spread:.3f} bits per byte at a learning rate of {rate:.1e}")
    draw(results["optimizers"], folder / "optimizers.png")
    print(f"Look at {folder / 'optimizers.png'}")


def best_of(found: dict[str, Any]) -> tuple[float, int, float, float]:
    """At the best learning rate: the mean over seeds, which rate it is, the standard deviation, the rate."""
    bits = np.array(found["bits_per_byte"])
    best = int(np.argmin(bits.mean(1)))
    return bits[best].mean(), best, bits[best].std(ddof=1), found["learning_rates"][best]


def draw(optimizers: dict[str, Any], path: Path) -> None:
    """Held-out bits per byte over the learning rate, and the best ones' training curves."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, found) in enumerate(optimizers.items()):
        bits, best, spread, _ = best_of(found)
        style: dict[str, Any] = {"color": f"C{number}", "label": f"{name}  {bits:.3f} ± {spread:.3f}"}
        each = np.array(found["bits_per_byte"])
        left.errorbar(found["learning_rates"], each.mean(1), each.std(1, ddof=1), marker="o", markersize=3, **style)
        right.plot(report.smooth([loss / math.log(2) for loss in found["losses"][best]], 10), **style)
    low = min(best_of(found)[0] for found in optimizers.values())
    left.set(xscale="log", xlabel="highest learning rate", title="Held-out bits per byte", ylim=(low - 0.05, low + 1))
    right.set(xlabel="step", title="Training loss at the best rate, bits per token", ylim=(low - 0.2, low + 3))
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
