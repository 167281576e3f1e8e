"""Attention by blocks against dense attention on this machine: time, operations and memory, forward and backward.

In each round every program has one turn, in random order; ratios are taken within a round. A program's products are
counted in what is traced, with loops as often as they run, which the compiler's own count leaves out; without loops the
two must agree. See README.md beside this file.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import machine
import numpy as np
from rich.console import Console
from rich.table import Table
from summary import spread

from jaxlm.models import masks
from jaxlm.models.attention import attention, blockwise, cudnn, dense
from jaxlm.models.blockwise import BLOCK

HERE: Final = Path(__file__).parent
WIDTH: Final = 64
SMOKE, LENGTHS = (256, 512), (1024, 2048, 4096, 8192, 16384, 32768)
WINDOW: Final = 512
DENSE_UP_TO: Final = 16384
"""Beyond, its scores alone are 8 GB, several times over."""
TURN: Final = 0.02
"""Seconds that a turn lasts at least."""
TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far a gradient may be from dense attention's, of its norm."""
MASKS: Final[dict[str, Callable[[int], masks.Mask]]] = {
    "causal": lambda _: masks.causal,
    f"window {WINDOW}": lambda _: masks.window(WINDOW),
    "strided": lambda length: masks.strided(128, max(2, round((length / 128) ** 0.5))),
    "bigbird": lambda _: masks.bigbird(128, window=3, first=1, random=2),
}


class Contestant:
    """One program: the gradient of a sum over attention's output."""

    def __init__(self, name: str, mask: masks.Mask, implementation: Callable[..., Any], arrays: list[jax.Array]):
        self.name, self.arrays, self.times = name, arrays, 1
        self.seconds, self.foreign_cores = list[float](), list[float]()

        def total(*arrays: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(attention(*arrays, mask=mask, implementation=implementation)), dtype=jnp.float32)

        gradient = jax.grad(total, (0, 1, 2))
        self.operations = products(jax.make_jaxpr(gradient)(*arrays).jaxpr)
        begun = time.perf_counter()
        self.run = jax.jit(gradient).lower(*arrays).compile()
        self.compile_seconds = time.perf_counter() - begun
        costs: Any = self.run.cost_analysis()
        self.compilers_operations: float = costs["flops"]
        memory: Any = self.run.memory_analysis()
        self.temporary_bytes: int = memory.temp_size_in_bytes

    def take(self) -> Any:
        """A turn, and how many cores other processes kept busy meanwhile."""
        busy, cpu, begun = machine.busy_seconds(), sum(os.times()[:2]), time.perf_counter()
        found: Any = None
        for _ in range(self.times):
            found = self.run(*self.arrays)
        jax.block_until_ready(found)
        seconds, cpu = time.perf_counter() - begun, sum(os.times()[:2]) - cpu
        self.seconds.append(seconds / self.times)
        self.foreign_cores.append(max(0.0, (machine.busy_seconds() - busy - cpu) / seconds))
        return found

    def calibrate(self) -> None:
        """Warms up, and chooses how often a turn runs the program."""
        self.take()
        self.take()
        self.times = math.ceil(TURN / self.seconds[-1])
        self.seconds.clear()
        self.foreign_cores.clear()


def on_gpu() -> bool:
    """Whether cuDNN's kernels can run."""
    return jax.default_backend() == "gpu"


def heads() -> int:
    """So many that a GPU is busy."""
    return 8 if on_gpu() else 2


def dtype() -> str:
    """What training would compute in."""
    return "bfloat16" if on_gpu() else "float32"


def products(program: Any) -> int:
    """Operations of all matrix products of a traced program: 2 for each term, as often as its loops run."""
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = [equation.invars[0].aval.shape[i] for i in contracted]
            total += 2 * int(np.prod([*equation.outvars[0].aval.shape, *terms], dtype=np.int64))
        values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        inner = sum(products(x) for x in values if hasattr(x, "eqns"))
        total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
    return total


def measure(length: int, rounds: int, dense_up_to: int) -> list[dict[str, Any]]:
    """All masks at one length."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, length, heads(), WIDTH)), dtype()) for _ in range(3)]
    made = [Contestant(name, mask(length), blockwise, arrays) for name, mask in MASKS.items()]
    if on_gpu():
        made += [Contestant(f"cudnn, {name}", MASKS[name](length), cudnn, arrays) for name in list(MASKS)[:2]]
    whole = [Contestant("dense", masks.causal, dense, arrays)] * (length <= dense_up_to)
    for one in (*made, *whole):
        one.calibrate()
    if whole:
        right = whole[0].run(*arrays)
        for one in (one for one in made if one.name.endswith("causal")):
            for mine, expected in zip(one.run(*arrays), right, strict=True):
                apart = float(jnp.linalg.norm(mine - expected) / jnp.linalg.norm(expected))
                if not apart < TOLERANCE[dtype()]:
                    sys.exit(f"{one.name} at {length}: a gradient is {apart:.2g} off dense attention's")
        ratio = whole[0].compilers_operations / whole[0].operations
        if not on_gpu() and not 1 <= ratio < 1.2:  # elementwise operations come on top
            sys.exit(f"dense at {length}: the compiler counts {ratio:.2f} times the operations that we do")
    for _ in range(rounds):
        for one in random.sample([*made, *whole], len(made) + len(whole)):
            one.take()
    return [
        {
            "length": length,
            "by": one.name,
            "seconds": statistics.median(one.seconds),
            "times_as_fast_as_dense": spread([d / s for d, s in zip(whole[0].seconds, one.seconds, strict=True)])
            if whole
            else None,
            "operations": one.operations or None,  # those of cuDNN's kernels aren't known
            "dense_operations": 12 * heads() * WIDTH * length**2,
            "temporary_bytes": one.temporary_bytes,
            "compile_seconds": one.compile_seconds,
            "rounds": {"seconds": one.seconds, "foreign_cores": one.foreign_cores},
        }
        for one in (*whole, *made)
    ]


def table(found: list[dict[str, Any]], title: str) -> Table:
    """A line for each program."""
    foreign = [cores for one in found for cores in one["rounds"]["foreign_cores"]]
    caption = f"{heads()} heads of {WIDTH}, one row, {dtype()}; medians, with quartiles; "
    caption += f"others on {statistics.median(foreign):.1f} cores"
    lines = Table(title=title, caption=caption)
    for column in ("T", "by", "time", "times dense", "operations", "dense over these", "temporaries"):
        lines.add_column(column, justify="left" if column == "by" else "right", no_wrap=True)
    for i, one in enumerate(found):
        faster = one["times_as_fast_as_dense"]
        lines.add_row(
            str(one["length"]),
            one["by"],
            f"{1e3 * one['seconds']:,.1f} ms",
            "" if faster is None else "{median:.2f} ({lower_quartile:.2f}-{upper_quartile:.2f})".format(**faster),
            f"{one['operations'] / 1e9:,.2f} G" if one["operations"] else "",
            f"{one['dense_operations'] / one['operations']:.1f}" if one["operations"] else "",
            f"{one['temporary_bytes'] / 2**20:,.0f} MiB",
            end_section=one is found[-1] or one["length"] != found[i + 1]["length"],
        )
    return lines


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of rows")
    parser.add_argument("--rounds", type=int, default=5, help="how many turns each program has (default: 5)")
    parser.add_argument("--dense-up-to", type=int, default=DENSE_UP_TO, help="longest row of dense attention")
    parser.add_argument("--output", type=Path, help="where to write JSON; by default into benchmarks/results/")
    parser.add_argument("--smoke", action="store_true", help="show that it works: short rows")
    return parser.parse_args()


def main() -> None:
    options = _options()
    if options.smoke:
        options.lengths, options.rounds = SMOKE, 1
    machine.restart(on_cpu=options.smoke)
    found: list[dict[str, Any]] = []
    for length in options.lengths:
        measured = measure(length, options.rounds, options.dense_up_to)
        for one in measured:
            print(f"{length}, {one['by']}: {1e3 * one['seconds']:,.1f} ms", flush=True)
        found += measured
    device = machine.device()
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table(found, f"attention on {device}"))
    if options.smoke and not options.output:
        return
    out: Path = options.output or HERE / "results" / f"attention-{machine.file_name(device)}.json"
    record = {
        **machine.about(device, ("jax", "jaxlib", "numpy")),
        "shape": {"rows": 1, "heads": heads(), "width": WIDTH, "dtype": dtype()},
        "block": BLOCK,
        "programs": found,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
