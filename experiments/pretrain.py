"""Trains a language model on text, on all devices of this machine, or of many (experiments/launch): CPU, GPUs or TPUs.

With no arguments it learns Python from the sources of Python's own standard library, in about three minutes on two CPU
cores. It writes runs/NAME/: metrics, checkpoints, and report.html to look at. Ctrl-C saves; the same command goes on.
"""

import dataclasses
import itertools
import lzma
import shlex
import sys
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxlm import checkpoint, data, distributed, grads, losses, metrics, models, optim, schedules, sharding, train
from jaxlm.evaluate import compile_eval, evaluate
from jaxlm.files import redacted, within
from jaxlm.generate import complete
from jaxlm.nans import first_nan
from jaxlm.output import say
from jaxlm.precision import compute_in, product_in
from jaxlm.report import write_report
from jaxlm.watchdog import watching

GLANCE = 16  # held-out batches evaluated during the run; at its end, all
SPIKE = 100  # steps before and after a spike of the loss whose batches are left out, as in PaLM
LEAST = {"steps": 1, "save_every": 1, "tokens_per_batch": 1, "debug_nans": 1, "learning_rate": 0, "seed": 0}
FREE = ("save_every", "microbatches", "zero", "mesh", "patience")  # what may change when a run goes on


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "pretrain"
    """The run is kept in runs/NAME."""
    text: str | None = None
    """A folder of text to learn (.txt, .md, .py), or a corpus of prepare.py; without it, Python's standard library."""
    heldout: float = 0.04
    """The share of its files to hold out, which the model never learns from; a corpus has its own."""
    layers: int = 4
    width: int = 128
    heads: int = 2
    row_lengths: tuple[int, ...] = (64, 256)
    """Documents are cut into pieces of at most the longest; each goes into the shortest row that holds it."""
    tokens_per_batch: int = 2048
    microbatches: int = 0
    """Cut each batch into so many, for the same result in less memory; 0: 2 on a single CPU, whose cache likes it."""
    steps: int = 1000
    learning_rate: float = 8e-3
    """The highest, reached after a twentieth of the steps; then it falls to 0 along a cosine."""
    save_every: int = 100
    """Steps between two checkpoints; held-out text is evaluated as often."""
    seed: int = 0
    zero: int = 1
    """ZeRO's stage, 0 to 3: what is divided over devices rather than whole on each (docs/zero.md)."""
    mesh: tuple[int, int, int] = (1, -1, 1)
    """Devices along replica, data and model; -1: all that are left."""
    products: Literal["int8", "float8_e4m3fn"] | None = None
    """Operands of 8 bits in two of three products of each layer, where the device has such (docs/techniques.md)."""
    spikes: float = 0.0
    """Where the loss is so many standard deviations (such as 6) above those before: go back, leave out 200 batches."""
    patience: float = 1800.0
    """Seconds without progress after which a process that hangs is ended, and says where it was."""
    debug_nans: int | None = None
    """Only take this step of the run again, and say which operation makes the first NaN in its loss or gradient."""
    join: tuple[str, int, int] | None = None
    """HOST:PORT of process 0, how many there are, and which this is, where no launcher tells (experiments/launch)."""
    smoke: bool = False
    """Only show that everything works: two steps of a tiny model, in a temporary folder."""


def main(config: Config) -> None:
    folder, first, by_first = within(Path("runs"), config.name), distributed.first(), distributed.by_first
    distributed.agree(**dataclasses.asdict(dataclasses.replace(config, join=None)))
    if config.smoke:
        config = dataclasses.replace(config, layers=1, width=16, steps=2)
        folder = Path(by_first(tempfile.mkdtemp)) / "smoke"
    for option, least in LEAST.items():
        value, end = getattr(config, option), {"seed": 2**32, "debug_nans": config.steps + 1}.get(option, jnp.inf)
        if value is not None and not least <= value < end:
            raise ValueError(f"{option} is {value}; use {least} <= {option} < {end}")
    config, debug = dataclasses.replace(config, join=None, debug_nans=None), config.debug_nans
    by_first(lambda: str(metrics.open_run(folder, dataclasses.asdict(config), __file__, free=FREE)))
    train.keep_programs()
    home = given if (given := Path(config.text or folder)).joinpath("manifest.json").exists() else folder / "corpus"
    texts = data.python_library if config.text is None else partial(data.text_files, config.text)
    path = by_first(lambda: str(data.cached_corpus(home, texts, data.ByteTokenizer(), heldout=config.heldout)))
    corpus, heldout, tokenizer = data.open_corpus(path), data.open_corpus(path, "heldout"), data.tokenizer_of(path)
    cpu, mesh, warmup = jax.default_backend() == "cpu", sharding.mesh(*config.mesh), config.steps // 20
    by_rows, rows = sharding.by_rows(mesh), (config.row_lengths, config.tokens_per_batch, config.seed)
    share, place = sharding.share(by_rows), partial(sharding.place, rows=by_rows)
    skips = by_first(lambda: data.read_skips(folder / "skips.json"))
    batches = data.Batches(corpus, data.pack(corpus.lengths, *rows), config.steps, skip=skips, share=share)
    unseen = data.Batches(heldout, data.bucket(heldout.lengths, *rows, passes=1), share=share)
    distributed.agree(data=batches.fingerprint)
    shape = models.TransformerConfig(
        vocab=corpus.vocab, layers=config.layers, width=config.width, heads=config.heads, qk_norm=True
    )
    dtype, slices = jnp.float32 if cpu else jnp.bfloat16, config.microbatches or 1 + (cpu and mesh.size == 1)
    product = product_in(config.products) if config.products else jnp.matmul
    init, apply = models.transformer(shape, unroll=True, product=product)
    alone = jax.value_and_grad(compute_in(dtype, losses.next_token(apply)), has_aux=True)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    rules, shapes = models.tensor_parallel(shape), jax.eval_shape(init, init_key)
    layout = sharding.lay_out(shapes, mesh, zero=config.zero, rules=rules, stacked=models.stacked)
    if config.zero == 3:
        gathered = grads.gather_layers(layout, "blocks", dtype=dtype)
        _, apply = models.transformer(shape, wrap_layer=gathered, product=product)
    loss_fn = losses.next_token(apply)
    grad_fn = grads.data_parallel(jax.value_and_grad(loss_fn, has_aux=True), layout, dtype=dtype, microbatches=slices)
    schedule = schedules.warmup(schedules.cosine(config.learning_rate, 0.0, config.steps - warmup), warmup)
    muon = partial(optim.muon, matrices=models.matrices, stacked=models.stacked, bank_sharding=layout.banks)
    muon = muon(schedule, orthogonalize=optim.newton_schulz(dtype=dtype), weight_decay=0.1)
    optimizer = optim.skip_nonfinite(optax.chain(optim.clip_by_global_norm(1.0), muon))
    if first:
        summary = corpus.summary, data.describe(batches.plan, min(config.steps, 1000))
        say(*summary, sharding.describe(layout, optimizer, dtype=dtype, microbatches=slices), sep="\n\n")
    start = jax.jit(lambda: train.start(init(init_key), optimizer), out_shardings=layout.state(optimizer))
    like = start.eval_shape()
    step = train.with_learning_rate(train.make_step(grad_fn, optimizer, step_key), schedule)
    step = train.compile_step(step, like, batches.specs(by_rows))
    eval_fn = compile_eval(grads.parallel_loss(loss_fn, layout, dtype=dtype), like.params, unseen.specs(by_rows))
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in (*FREE, "name", "text")}
    about = {"model": dataclasses.asdict(shape), "tokenizer": tokenizer.name, "data": batches.fingerprint, "run": kept}
    by_first(lambda: data.save_tokenizer(tokenizer, folder / "checkpoints"))
    pauses, keep = range(0, config.steps, config.save_every), 2 + bool(config.spikes) * SPIKE // config.save_every
    saved = checkpoint.Checkpoints(folder / "checkpoints", about, keep=keep)
    with watching(folder / f"stacks-{jax.process_index()}.txt", seconds=jnp.inf if debug else config.patience) as watch:

        def bits_per_byte(params: object, count: int) -> float:
            some = watch.each("evaluating on held-out batch", range(min(count, len(unseen))))
            return heldout.bits_per_byte(evaluate(eval_fn, params, (place(unseen[i]) for i in some))["loss"])

        if debug is not None:
            with saved as checkpoints:
                state = checkpoints.restore(like, until=debug - 1, watch=watch) or start()
            for i in watch.each("taking again the step on batch", range(int(state.step), debug - 1)):
                state, _ = step(state, place(batches[i]))
            batch = dataclasses.replace(batches, share=((0,), 1))[debug - 1]
            found = first_nan(alone, sharding.to_host(state.params), batch, jax.random.fold_in(step_key, debug - 1))
            by_first(lambda: say(f"Step {debug}, which takes batch {batches.planned(debug - 1)}: {found or 'no NaN'}"))
            return
        with distributed.stop_signals() as stop, saved as checkpoints:
            state = checkpoints.restore(like, watch=watch) or start()
            done = int(state.step)
            by_first(lambda: metrics.note_start(folder, done, data=batches.fingerprint, skips=skips))
            glance = {"heldout": bits_per_byte(state.params, GLANCE)} if done in pauses else {}
            if glance and done:  # where it was interrupted before it was said
                checkpoints.score(done, glance["heldout"])
            given = data.iterate(batches, start=done, place=place)
            with closing(given), metrics.Log(folder if first else None, done, steps=config.steps) as log:
                until_told = itertools.takewhile(lambda _: not stop(), log.timed(given))
                taken = train.fit(step, state, watch.batches(until_told, done))
                if config.spikes:
                    before = by_first(lambda: [line["loss"] for line in metrics.read_log(folder / "metrics.jsonl")])
                    taken = train.stop_at_spikes(taken, done, before=before, deviations=config.spikes)
                try:
                    for state, measured in taken:
                        log.write(done + 1, {**measured, **glance})
                        done, glance = done + 1, {}
                        if done in pauses:
                            watch(f"saving step {done}")
                            checkpoints.save(state, after=log.sync)
                            glance = {"heldout": bits_per_byte(state.params, GLANCE)}
                            checkpoints.score(done, glance["heldout"])
                            log.restart_clock()
                except train.LossSpikeError as spike:
                    back = checkpoints.rewind(spike.step - SPIKE)
                    skips = batches.without(back, spike.step + SPIKE).skip
                    by_first(lambda: data.write_skips(folder / "skips.json", skips))
                    say(f"{spike}: back to step {back}, without the batches {skips}. The same command goes on")
                    sys.exit(distributed.RESTART)
            watch(f"saving step {done}")
            checkpoints.save(state)
        if done < config.steps:
            say(f"Stopped after step {done} and saved. To go on: {redacted(shlex.join([sys.executable, *sys.argv]))}")
            sys.exit(distributed.RESTART)
        found, params = bits_per_byte(state.params, len(unseen)), sharding.to_host(state.params)
    if first:
        text = heldout.text(tokenizer, most=2**26)  # other processes wait, and xz takes a second for a megabyte
        results = {
            "held-out bits per byte": f"{found:.3f}",
            f"xz -9 on the first {len(text):,} bytes": f"{8 * len(lzma.compress(text, preset=9)) / len(text):.3f}",
            "sample": complete(shape, params, tokenizer, "def ", length=max(6, *config.row_lengths) - 5),
        }
        say(*(f"{a}: {b}\n" for a, b in results.items()), f"Look at {write_report(folder, results)}", sep="\n")


if __name__ == "__main__":
    options = tyro.cli(Config, description=__doc__)
    distributed.start(options.join)
    with distributed.leaving_together():
        main(options)
