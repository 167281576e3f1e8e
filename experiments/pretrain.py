"""Trains a language model on text, on all devices of this machine: CPU, GPUs or TPUs.

With no arguments it learns Python from the sources of Python's own standard library, in about three minutes on two CPU
cores. It writes runs/NAME/: metrics, checkpoints, and report.html to look at. Ctrl-C saves; the same command goes on.
"""

import dataclasses
import itertools
import lzma
import math
import os
import shlex
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxlm import checkpoint, data, grads, losses, metrics, models, optim, precision, schedules, sharding, train, tree
from jaxlm.compiled import compile_for
from jaxlm.evaluate import evaluate, make_eval
from jaxlm.generate import complete
from jaxlm.report import write_report

CACHE = Path(os.environ.get("JAXLM_CACHE", "~/.cache/jaxlm")).expanduser()
GLANCE = 16  # held-out batches evaluated during the run; at its end, all


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "pretrain"
    """The run is kept in runs/NAME."""
    text: str | None = None
    """A folder of text to learn (.txt, .md, .py); without it, Python's standard library."""
    heldout: float = 0.04
    """The share of that folder's files to hold out, which the model never learns from."""
    layers: int = 4
    width: int = 128
    heads: int = 2
    row_lengths: tuple[int, ...] = (64, 256)
    """Documents are cut into pieces of at most the longest; each goes into the shortest row that holds it."""
    tokens_per_batch: int = 2048
    microbatches: int = 0
    """Cut each batch into so many, for the same result in less memory; 0: 2 on a CPU, whose cache likes it, else 1."""
    steps: int = 1000
    learning_rate: float = 8e-3
    """The highest, reached after a twentieth of the steps; then it falls to 0 along a cosine."""
    save_every: int = 100
    """Steps between two checkpoints; held-out text is evaluated as often."""
    seed: int = 0
    smoke: bool = False
    """Only show that everything works: two steps of a tiny model, in a temporary folder."""


def main(config: Config) -> None:
    folder = Path("runs") / config.name
    if config.smoke:
        config = dataclasses.replace(config, layers=1, width=16, steps=2)
        folder = Path(tempfile.mkdtemp()) / "smoke"
    if min(config.steps, config.save_every, config.tokens_per_batch) < 1:
        raise ValueError(f"steps, save-every and tokens-per-batch must be 1 or more: {config}")
    metrics.open_run(folder, dataclasses.asdict(config), __file__)
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    tokenizer = data.ByteTokenizer()
    if config.text is None:
        path = data.python_library_corpus(CACHE, tokenizer)
    else:
        path = data.cached_corpus(
            folder / "corpus", lambda: data.text_files(str(config.text)), tokenizer, heldout=config.heldout
        )
    corpus, heldout = data.open_corpus(path), data.open_corpus(path, "heldout")
    layout = config.row_lengths, config.tokens_per_batch, config.seed
    batches = data.Batches(corpus, data.bucket(corpus.lengths, *layout), count=config.steps)
    eval_batches = data.Batches(heldout, data.bucket(heldout.lengths, *layout))

    shape = models.TransformerConfig(
        vocab=corpus.vocab, layers=config.layers, width=config.width, heads=config.heads, qk_norm=True
    )
    init, apply = models.transformer(shape, unroll=True)
    mesh, cpu = sharding.data_mesh(), jax.default_backend() == "cpu"
    by_rows = sharding.by_rows(mesh)
    warmup, dtype = config.steps // 20, jnp.float32 if cpu else jnp.bfloat16
    loss_fn = precision.compute_in(dtype, losses.next_token(apply))
    grad_fn = grads.accumulate(jax.value_and_grad(loss_fn, has_aux=True), config.microbatches or (2 if cpu else 1))
    schedule = schedules.warmup(schedules.cosine(config.learning_rate, 0.0, config.steps - warmup), warmup)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    muon = optim.muon(
        schedule,
        matrices=optim.by_name({"blocks/.*/kernel": True, ".*": False}),
        stacked=optim.by_name({"blocks/.*": True, ".*": False}),
        orthogonalize=optim.newton_schulz(dtype=dtype),
        weight_decay=0.1,
    )
    optimizer = optax.chain(optim.clip_by_global_norm(1.0), muon)
    state = jax.jit(lambda: train.start(init(init_key), optimizer), out_shardings=sharding.replicated(mesh))()
    begun = time.perf_counter()
    step = train.make_step(grads.data_parallel(grad_fn, mesh), optimizer, step_key)
    step = train.compile_step(step, state, batches.specs(by_rows))
    eval_fn = compile_for(make_eval(loss_fn), state.params, eval_batches.specs(by_rows))
    print(
        f"{corpus.manifest['train']['bytes']:,} bytes (not UTF-8: {corpus.manifest['not_utf8_names'] or 'none'}), "
        f"{tree.size(state.params):,} parameters, {mesh.size} devices, compiled in {time.perf_counter() - begun:.1f} s"
    )

    def bits_per_byte(params: object, count: int) -> float:
        some = (jax.device_put(eval_batches[i], by_rows) for i in range(min(count, len(eval_batches))))
        return evaluate(eval_fn, params, some)["loss"] / math.log(2) * heldout.predicted_tokens_per_byte

    about = {"model": dataclasses.asdict(shape), "tokenizer": tokenizer.name, "data": batches.fingerprint}
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(config.steps)))
    with checkpoint.Checkpoints(folder / "checkpoints", about) as checkpoints, train.stop_signals() as stopped:
        state = checkpoints.restore(state) or state
        done = int(state.step)
        glance = {"heldout": bits_per_byte(state.params, GLANCE)} if done % config.save_every == 0 else {}
        with (
            closing(data.iterate(batches, start=done, place=lambda batch: jax.device_put(batch, by_rows))) as iterator,
            metrics.Log(folder, done, steps=config.steps, note=f"padding {1 - batches.plan.real_share:.1%}") as log,
        ):
            for state, measured in train.fit(step, state, itertools.takewhile(lambda _: not stopped(), iterator)):
                log.write(done + 1, {**measured, "learning_rate": rates[done], **glance})
                done, glance = done + 1, {}
                if done % config.save_every == 0 and done < config.steps:
                    log.flush()
                    checkpoints.save(state)
                    glance = {"heldout": bits_per_byte(state.params, GLANCE)}
                    log.restart_clock()
        checkpoints.save(state)
    if done < config.steps:
        print(f"Stopped after step {done} and saved. To go on: {shlex.join([sys.executable, *sys.argv])}")
        sys.exit(75)

    text = heldout.text(tokenizer)
    results = {
        "held-out bits per byte": f"{bits_per_byte(state.params, len(eval_batches)):.3f}",
        "xz -9 on the same bytes": f"{8 * len(lzma.compress(text, preset=9)) / len(text):.3f}",
        "sample": complete(shape, state.params, tokenizer, "def ", length=config.row_lengths[-1] - 5),
    }
    print(*(f"{name}: {result}\n" for name, result in results.items()), sep="\n")
    print(f"Look at {write_report(folder, results)}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
