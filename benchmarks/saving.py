"""How much later a step ends when `Checkpoints.save` comes before it, of the time that a save takes."""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import machine

from jaxlm import checkpoint, sharding
from jaxlm.types import TrainState

HERE: Final = Path(__file__).parent
SIZES: Final = (300_000, 30_000_000, 300_000_000, 960_000_000)
LEAVES: Final = 30


@partial(jax.jit, donate_argnums=0)
def step(state: TrainState) -> TrainState:
    """Writes all of a state anew, in its place: it can't begin before the state is safe to donate."""
    return jax.tree.map(lambda x: x + 1, state)


def measure(size: int, devices: int, saves: int) -> dict[str, Any]:
    """Saves a state of so many bytes, divided over devices, again and again, and takes a step meanwhile."""
    rows = sharding.by_rows(sharding.mesh(devices=jax.devices()[:devices]))
    arrays = [jax.random.normal(jax.random.key(i), (size // LEAVES // 4,)) for i in range(LEAVES)]
    params = {f"w{i}": jax.device_put(x, rows) for i, x in enumerate(arrays)}
    state = TrainState(jnp.zeros((), jnp.int32), params, {"m": jnp.zeros(1)})
    held, whole, returns = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(Path(folder) / "c", {}) as checkpoints:
        state = step(step(state))
        checkpoints.restore(state)  # compiles what saves need
        for _ in range(saves):
            begun = time.perf_counter()
            state = jax.block_until_ready(step(state))
            alone = time.perf_counter() - begun
            begun = time.perf_counter()
            checkpoints.save(state)
            returns.append(time.perf_counter() - begun)
            state = jax.block_until_ready(step(state))
            held.append(time.perf_counter() - begun - alone)
            checkpoints.wait()
            begun = time.perf_counter()
            checkpoints.save(state)
            checkpoints.wait()
            whole.append(time.perf_counter() - begun)
    share = statistics.median(a / b for a, b in zip(held, whole, strict=True))
    print(
        f"{size / 1e6:,.1f} MB on {devices}: the next step ends {1e3 * statistics.median(held):.1f} ms later, "
        f"{share:.1%} of a save of {statistics.median(whole):.2f} s; "
        f"save returns in {1e3 * statistics.median(returns):.1f} ms",
        flush=True,
    )
    return {
        "bytes": size,
        "devices": devices,
        "returns": returns,
        "delay_of_next_step": held,
        "seconds": whole,
        "share": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=7, help="of each size (default: 7)")
    parser.add_argument("--smoke", action="store_true", help="show that it works: one small state")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    if options.smoke:
        measure(300_000, 1, 1)
        return
    record = {
        **machine.about(machine.processor(), ("jax", "jaxlib", "orbax-checkpoint", "tensorstore")),
        "sizes": [measure(size, devices, options.saves) for devices in (1, 2)[: jax.device_count()] for size in SIZES],
    }
    out = HERE / "results" / f"saving-{machine.file_name(machine.processor())}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
