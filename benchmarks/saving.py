"""How long `Checkpoints.save` holds up a loop, of the time that saving takes; the rest happens in the background."""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import machine

from jaxlm import checkpoint
from jaxlm.types import TrainState

HERE: Final = Path(__file__).parent
SIZES: Final = (30_000_000, 300_000_000, 960_000_000)
LEAVES: Final = 30


def measure(size: int, saves: int) -> dict[str, Any]:
    """Saves a state of so many bytes again and again."""
    arrays = [jax.random.normal(jax.random.key(i), (size // LEAVES // 4,)) for i in range(LEAVES)]
    state = TrainState(jnp.zeros((), jnp.int32), {f"w{i}": x for i, x in enumerate(arrays)}, {"m": jnp.zeros(1)})
    held, whole = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(Path(folder) / "c", {}) as checkpoints:
        checkpoints.restore(state)
        for step in range(1, saves + 1):
            begun = time.perf_counter()
            checkpoints.save(state._replace(step=jnp.asarray(step, jnp.int32)))
            held.append(time.perf_counter() - begun)
            checkpoints.wait()
            whole.append(time.perf_counter() - begun)
    share = statistics.median(a / b for a, b in zip(held, whole, strict=True))
    print(
        f"{size / 1e6:,.0f} MB: held up {1e3 * statistics.median(held):.0f} ms, {share:.1%} of what saving takes",
        flush=True,
    )
    return {"bytes": size, "held_up_seconds": held, "seconds": whole, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=7, help="of each size (default: 7)")
    parser.add_argument("--smoke", action="store_true", help="show that it works: one small state")
    options = parser.parse_args()
    if options.smoke:
        measure(300_000, 1)
        return
    record = {
        **machine.about(machine.processor(), ("jax", "jaxlib", "orbax-checkpoint", "tensorstore")),
        "sizes": [measure(size, options.saves) for size in SIZES],
    }
    out = HERE / "results" / f"saving-{machine.file_name(machine.processor())}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
