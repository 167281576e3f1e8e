"""Checks that a small experiment comes out the same however it is computed, and prints a table.

Microbatches, all devices at every stage of ZeRO, packed rows and one document a row, cross-entropy in chunks, layers
unrolled or computed again, kinds of attention, a resumed run, float16: each is held against one plain run on one device
(jaxlm.verify). It takes a minute on two CPU cores, eight devices simulated; it fails if anything differs.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxlm import data, losses, models, optim, sharding, train, verify

CACHE = Path(os.environ.get("JAXLM_CACHE", "~/.cache/jaxlm")).expanduser()


@dataclasses.dataclass(frozen=True)
class Config:
    text: str | None = None
    """A corpus of prepare.py; without it, paragraphs of the sources of Python's standard library."""
    layers: int = 2
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    optimizer: Literal["adamw", "lion", "lamb", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    row_length: int = 64
    tokens_per_batch: int = 2048
    """A multiple of the rows that devices and microbatches take together."""
    packed: bool = True
    """Several documents a row; otherwise one."""
    steps: int = 4
    microbatches: int = 4
    mesh: tuple[int, int, int] = (1, -1, 1)
    """Devices along replica, data and model; -1: all that are left."""
    seed: int = 0
    smoke: bool = False
    """Only show that everything works: two steps of a tiny model."""


def paragraphs() -> Iterator[data.Document]:
    """What blank lines separate in the library's sources: documents of very different lengths."""
    for name, text in data.python_library():
        yield from (data.Document(f"{name}:{i}", part) for i, part in enumerate(text.split(b"\n\n")) if part)


def main(config: Config) -> None:
    if config.smoke:
        config = dataclasses.replace(config, layers=1, width=16, steps=2, row_length=32, tokens_per_batch=1024)
    train.keep_programs()
    path = Path(config.text or CACHE / f"paragraphs-{sys.version_info.major}.{sys.version_info.minor}")
    corpus = data.open_corpus(data.cached_corpus(path, paragraphs, data.ByteTokenizer()))
    make_plan = data.pack if config.packed else data.bucket
    plan = make_plan(corpus.lengths, [config.row_length], config.tokens_per_batch, config.seed)
    shape = models.TransformerConfig(
        vocab=corpus.vocab,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        qk_norm=True,
    )

    def optimizer(layout: sharding.Layout | None) -> optax.GradientTransformation:
        rate, stacked, exact = config.learning_rate, models.stacked, optim.newton_schulz(dtype=jnp.float32)
        muon = partial(optim.muon, matrices=models.matrices, stacked=stacked, orthogonalize=exact)
        known: dict[str, Callable[..., optax.GradientTransformation]] = {
            "adamw": optim.adamw,
            "lion": optim.lion,
            "lamb": partial(optim.lamb, stacked=stacked),
            "adafactor": partial(optim.adafactor, stacked=stacked),
            "muon": partial(muon, bank_sharding=layout and layout.banks),
        }
        return optax.chain(optim.clip_by_global_norm(1.0), known[config.optimizer](rate, weight_decay=0.1))

    contract = verify.Contract(
        model=partial(models.transformer, shape),
        loss=partial(losses.next_token, z_loss=1e-3, label_smoothing=0.1),
        optimizer=optimizer,
        batches=data.Batches(corpus, plan, count=config.steps),
        key=jax.random.key(config.seed),
        mesh=sharding.mesh(*config.mesh),
        microbatches=config.microbatches,
        rules=models.tensor_parallel(shape),
    )
    begun, passed = time.perf_counter(), True
    print(verify.HEADER)
    for result in verify.check(contract):
        print(result, flush=True)
        passed = passed and result.passed
    print(f"\n{verify.origin(contract)}\n{time.perf_counter() - begun:.0f} s")
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    options = tyro.cli(Config, description=__doc__)
    os.environ.setdefault("NPROC", "64")  # threads, in which simulated devices wait for each other
    jax.config.update("jax_num_cpu_devices", 8)
    main(options)
