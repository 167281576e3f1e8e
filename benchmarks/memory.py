"""Measures what saves memory, and what time it takes: accumulation, cross-entropy in chunks, and rematerialization.

All contestants of a table do the same work, and must agree on its loss. They take turns in random order; ratios are
taken within a round. Memory is the compiler's own account. See README.md beside this file.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from summary import quiet_rounds, spread

from jaxlm import grads, losses, models, optim, precision, train

HERE: Final = Path(__file__).parent
PACKAGES: Final = ("jax", "jaxlib", "optax", "flax", "numpy")
KEY: Final = jax.random.key(0)


@dataclasses.dataclass
class Contestant:
    """One way to do a table's work."""

    name: str
    program: Any
    """What was compiled, for its memory."""
    turn: Callable[[], Any]
    """Does the work once and returns its loss."""
    seconds: list[float] = dataclasses.field(default_factory=list[float])
    foreign_cores: list[float] = dataclasses.field(default_factory=list[float])

    def take(self) -> float:
        """Does the work, keeps its time, and returns its loss."""
        busy, cpu, begun = machine.busy_seconds(), sum(os.times()[:2]), time.perf_counter()
        loss = float(self.turn())
        seconds, cpu = time.perf_counter() - begun, sum(os.times()[:2]) - cpu
        self.seconds.append(seconds)
        self.foreign_cores.append(max(0.0, (machine.busy_seconds() - busy - cpu) / seconds))
        return loss

    @property
    def temporaries(self) -> int:
        return self.program.memory_analysis().temp_size_in_bytes

    @property
    def held(self) -> int:
        """Arguments, results that don't overwrite them, and temporaries."""
        found = self.program.memory_analysis()
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def accumulation(smoke: bool) -> Iterable[Contestant]:
    """One optimizer step from the same batch, in one piece and in k; `optax.MultiSteps` sees k pieces one by one."""
    vocab, width, layers, rows, length = (64, 16, 1, 16, 8) if smoke else (4096, 256, 4, 32, 128)
    init, apply = models.transformer(models.TransformerConfig(vocab=vocab, layers=layers, width=width, heads=4))
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, length), np.int32)
    grad_fn = jax.value_and_grad(losses.next_token(apply), has_aux=True)
    adamw = optim.adamw(1e-3)

    def contestant(name: str, grad_fn: Any, optimizer: Any, pieces: int) -> Contestant:
        state = train.start(jax.jit(init)(KEY), optimizer)
        batches = [{"tokens": jnp.asarray(x)} for x in np.split(tokens, pieces)]
        step = jax.jit(train.make_step(grad_fn, optimizer, KEY), donate_argnums=0).lower(state, batches[0]).compile()

        def turn() -> jax.Array:
            nonlocal state
            means: list[jax.Array] = []
            for batch in batches:
                state, metrics = step(state, batch)
                means.append(metrics["loss"])
            jax.block_until_ready(state)
            return sum(means, jnp.zeros(())) / pieces

        return Contestant(name, step, turn)

    yield contestant("whole batch", grad_fn, adamw, 1)
    for k in (4, 16):
        yield contestant(f"grads.accumulate, k={k}", grads.accumulate(grad_fn, k), adamw, 1)
        yield contestant(f"optax.MultiSteps, k={k}", grad_fn, optax.MultiSteps(adamw, k).gradient_transformation(), k)


def cross_entropy_of(dtype: Any, chunk: int | None) -> Callable[..., Any]:
    """The loss of the last hidden states and the output matrix, and its gradients, with logits in float32."""
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def apply(params: Any, tokens: Any, head: Any = product) -> Any:
        del tokens
        return head(params["hidden"], params["matrix"])

    return jax.value_and_grad(precision.compute_in(dtype, losses.next_token(apply, chunk=chunk)), has_aux=True)


def cross_entropy(vocab: int, smoke: bool) -> Iterable[Contestant]:
    """The loss and its gradients by the last hidden states and the output matrix."""
    if smoke:
        vocab, width, tokens, dtype, parts = 512, 8, 64, jnp.float32, (4, 16, 32)
    elif jax.default_backend() == "cpu":
        width, tokens, dtype, parts = 256, 1024, jnp.float32, (4, 16, 32)
    else:  # enough to do in a chunk
        width, tokens, dtype, parts = 2048, 65536, jnp.bfloat16, (16, 32, 64)
    rng = np.random.default_rng(0)
    params = {
        "hidden": jnp.asarray(rng.normal(size=(1, tokens, width)), jnp.float32),
        "matrix": jnp.asarray(rng.normal(size=(width, vocab)) * width**-0.5, jnp.float32),
    }
    batch = {"tokens": jnp.asarray(rng.integers(0, vocab, (1, tokens)))}
    for chunk in (None, *(tokens // part for part in parts)):
        program = jax.jit(cross_entropy_of(dtype, chunk)).lower(params, batch, KEY).compile()

        def turn(program: Any = program) -> jax.Array:
            (loss, aux), found = jax.block_until_ready(program(params, batch, KEY))
            del found
            return loss / aux.weight_sum

        yield Contestant(f"chunks of {chunk} tokens" if chunk else f"all {tokens} tokens", program, turn)


def remat(smoke: bool) -> Iterable[Contestant]:
    """The loss of a decoder and its gradients, with each policy, its layers in a loop and one after another."""
    vocab, width, layers, rows, length = (64, 16, 2, 4, 8) if smoke else (4096, 256, 4, 8, 256)
    config = models.TransformerConfig(vocab=vocab, layers=layers, width=width, heads=4)
    params = jax.jit(models.transformer(config)[0])(KEY)
    batch = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, vocab, (rows, length), np.int32))}
    for unroll in (False, True):
        for name in ("none", "dots", "blocks", "offload", "full"):
            _, apply = models.transformer(config, wrap_layer=models.remat(name), unroll=unroll)
            grad_fn = jax.value_and_grad(losses.next_token(apply), has_aux=True)
            program = jax.jit(grad_fn).lower(params, batch, KEY).compile()

            def turn(program: Any = program) -> jax.Array:
                (loss, aux), found = jax.block_until_ready(program(params, batch, KEY))
                del found
                return loss / aux.weight_sum

            yield Contestant(f"{name}, {'unrolled' if unroll else 'scanned'}", program, turn)


TABLES: Final[Mapping[str, Callable[[bool], Iterable[Contestant]]]] = {
    "accumulation": accumulation,
    "cross-entropy, V=50304": partial(cross_entropy, 50304),
    "cross-entropy, V=128256": partial(cross_entropy, 128256),
    "remat": remat,
}
"""The first contestant of each is what the others are held against."""


def measure(contestants: list[Contestant], rounds: int) -> list[dict[str, Any]]:
    """Lets them take turns; exits unless their first losses agree."""
    first = [c.take() for c in contestants]
    if not np.allclose(first, first[0], rtol=1e-5):
        sys.exit(f"the losses differ: {dict(zip((c.name for c in contestants), first, strict=True))}")
    for c in contestants:
        c.seconds.clear()
        c.foreign_cores.clear()
    for i in range(rounds):
        for c in random.Random(i).sample(contestants, len(contestants)):
            c.take()
    counted = quiet_rounds([c.foreign_cores for c in contestants])
    base = contestants[0]
    return [
        {
            "name": c.name,
            "seconds": statistics.median(c.seconds[i] for i in counted),
            "time": spread([c.seconds[i] / base.seconds[i] for i in counted]),
            "temporary_bytes": c.temporaries,
            "held_bytes": c.held,
            "temporaries": c.temporaries / base.temporaries,
            "rounds": {"seconds": c.seconds, "foreign_cores": c.foreign_cores, "counted": counted},
        }
        for c in contestants
    ]


def table(title: str, results: list[dict[str, Any]]) -> Table:
    """A line for each contestant."""
    shown = Table(title=title)
    for column in ("", "seconds", "time, of the first's", "temporaries, MB", "of the first's", "held in all, MB"):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for r in results:
        of = r["time"]
        time = f"{of['median']:.2f} ({of['lower_quartile']:.2f} to {of['upper_quartile']:.2f})"
        sizes = f"{r['temporary_bytes'] / 1e6:,.0f}", f"{r['temporaries']:.1%}", f"{r['held_bytes'] / 1e6:,.0f}"
        shown.add_row(r["name"], f"{r['seconds']:.3f}", time, *sizes)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=TABLES, help="one of the tables")
    parser.add_argument("--rounds", type=int, default=7, help="how many turns each contestant has (default: 7)")
    parser.add_argument("--smoke", action="store_true", help="show that it works: tiny sizes, on the CPU")
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    machine.restart(on_cpu=options.smoke)
    device = machine.device()
    console = Console() if Console().is_terminal else Console(width=130)
    for title, make in TABLES.items():
        if options.only not in (None, title):
            continue
        results = measure(list(make(options.smoke)), options.rounds)
        console.print(table(f"{title}, on {device}", results))
        if options.smoke:
            continue
        record = {
            **machine.about(device, PACKAGES),
            "malloc": machine.HUGE_PAGES["GLIBC_TUNABLES"],
            "contestants": results,
        }
        out = HERE / "results" / f"memory-{machine.file_name(title, device)}.json"
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
