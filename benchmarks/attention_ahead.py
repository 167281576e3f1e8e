"""What attention's implementations become on H100s and TPUs that aren't here: compiled for 8 of them, not run.

Each is compiled forward and backward inside `jax.shard_map`, as `grads.data_parallel` calls a model, with one row on
each device. Counted are its kernels and the compiler's account of temporary memory, where T x T scores show.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import ahead
import jax
import jax.numpy as jnp
import machine
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from jaxlm.models import masks
from jaxlm.models.attention import attention, blockwise, cudnn, dense, splash

OUT: Final = Path(__file__).parent / "results" / "attention-ahead.json"
LENGTH: Final = 4096
HEADS, KEY_HEADS, WIDTH = 8, 2, 128
WINDOW: Final = masks.window(1024)
KERNELS: Final = {
    "h100": r"custom_call_target=\"__cudnn\$fmha[A-Za-z]*\"",
    "v5e": r"custom_call_target=\"tpu_custom_call\"",
}
Case = tuple[str, str, Callable[..., Any], dict[str, Any]]
CASES: Final[list[Case]] = [
    *[
        (chip, name, implementation, options)
        for chip, own, more in (
            ("v5e", splash, {"segments": {"segments": True}, "soft cap": {"softcap": 50.0}}),
            ("h100", cudnn, {}),
        )
        for implementation in (dense, blockwise, own)
        for name, options in {
            "causal": {},
            "window": {"mask": WINDOW},
            **({"bigbird": {"mask": masks.bigbird(128)}} if implementation is blockwise else {}),
            **(more if implementation is own else {}),
        }.items()
    ]
]


def compiled(devices: list[Any], implementation: Callable[..., Any], options: dict[str, Any]) -> Any:
    """The sum of outputs, and its gradient."""
    mesh = Mesh(np.array(devices), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    q, k, v = (
        jax.ShapeDtypeStruct((len(devices), LENGTH, heads, WIDTH), jnp.bfloat16, sharding=rows)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    numbers = jax.ShapeDtypeStruct((len(devices), LENGTH), jnp.int32, sharding=rows)
    packed = "segments" in options

    def local(q: Any, k: Any, v: Any, segments: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            found: dict[str, Any] = options | {"segments": segments if packed else None}
            y = attention(q, k, v, implementation=implementation, **found)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        value, grads = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
        return value[None], grads

    spec = PartitionSpec("data")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)).lower(q, k, v, numbers).compile()


def main() -> None:
    lines = Table(title=f"attention over {LENGTH} positions, forward and backward, compiled ahead of time")
    for column in ("for", "by", "what", "kernels", "temporaries"):
        lines.add_column(column, justify="left" if column in ("for", "by", "what") else "right")
    devices = {"h100": functools.cache(lambda: ahead.h100s(1)), "v5e": functools.cache(lambda: ahead.tpus("v5e:2x4"))}
    record: list[dict[str, Any]] = []
    for chip, name, implementation, options in CASES:
        program = compiled(devices[chip](), implementation, options)
        kernels: list[str] = re.findall(KERNELS[chip], program.as_text())
        temporary = program.memory_analysis().temp_size_in_bytes
        by = implementation.__name__
        if (by in ("cudnn", "splash")) != bool(kernels):
            raise SystemExit(f"{by}, {name}, for {chip}: {len(kernels)} calls of a fused kernel")
        record.append(
            {"chip": chip, "by": by, "what": name, "kernels": len(kernels), "temporary_bytes": temporary},
        )
        print(f"{chip}, {by}, {name}: {len(kernels)} kernels, {temporary / 2**20:,.0f} MiB", flush=True)
        lines.add_row(chip, by, name, str(len(kernels)), f"{temporary / 2**20:,.0f} MiB")
    Console().print(lines)
    shape = {"rows_per_device": 1, "length": LENGTH, "heads": HEADS, "key_heads": KEY_HEADS, "width": WIDTH}
    about = {
        "command": "python benchmarks/attention_ahead.py",
        "versions": machine.versions(("jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cudnn-cu12", "libtpu")),
        "shape": shape | {"dtype": "bfloat16", "window": 1024},
    }
    OUT.write_text(json.dumps(about | {"programs": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
