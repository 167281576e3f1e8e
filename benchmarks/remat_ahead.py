"""What each rematerialization policy keeps on an H100 and a TPU, and computes again: compiled for them here, not run.

The loss and gradients of a decoder of about 124M parameters, bfloat16, 8 rows of 1,024 tokens, cross-entropy in chunks.
Operations are those of matrix products, by the compiler's count, without fused attention's.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

import ahead
import jax
import jax.numpy as jnp
import machine
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from jaxlm import losses, models, precision

OUT: Final = Path(__file__).parent / "results" / "remat-ahead.json"
MODEL: Final = models.TransformerConfig(vocab=50304, layers=12, width=768, heads=12, tied=True)
ROWS, LENGTH, CHUNK = 8, 1024, 1024


def compiled(name: str, implementation: Any, sharding: SingleDeviceSharding) -> Any:
    options: dict[str, Any] = {"wrap_layer": models.remat(name), "implementation": implementation}
    init, apply = models.transformer(MODEL, **options)
    loss_fn = precision.compute_in(jnp.bfloat16, losses.next_token(apply, chunk=CHUNK))
    shapes = jax.eval_shape(init, jax.random.key(0)), {"tokens": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.uint16)}
    at = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    return jax.jit(lambda params, batch: grad_fn(params, batch, jax.random.key(0))).lower(*at).compile()


def main() -> None:
    chips = {
        "H100": (ahead.h100s(1, 1)[0], models.attention.cudnn),
        "v5e": (ahead.tpus("v5e:2x2")[0], models.attention.splash),
    }
    lines = Table(title=f"loss and gradients of {ROWS} x {LENGTH} tokens, compiled")
    for column in ("for", "keeps", "temporaries", "in host memory", "attention kernels"):
        lines.add_column(column, justify="left" if column in ("for", "keeps") else "right")
    record: list[dict[str, Any]] = []
    for chip, (device, implementation) in chips.items():
        for name in ("none", "dots", "blocks", "offload", "full"):
            program = compiled(name, implementation, SingleDeviceSharding(device))
            memory = program.memory_analysis()
            kernels = len(re.findall(r'custom_call_target="(?:__cudnn\$fmha\w*|tpu_custom_call)"', program.as_text()))
            sizes = memory.temp_size_in_bytes, memory.host_temp_size_in_bytes
            lines.add_row(chip, name, *(f"{size / 1e6:,.0f} MB" for size in sizes), str(kernels))
            numbers = dict(zip(("temporary_bytes", "host_bytes"), sizes, strict=True))
            record.append({"device": chip, "keeps": name, **numbers, "attention_kernels": kernels})
    Console().print(lines)
    about = {
        "command": "python benchmarks/remat_ahead.py",
        "versions": machine.versions(("jax", "jaxlib", "jax-cuda12-plugin", "libtpu")),
    }
    OUT.write_text(json.dumps(about | {"policies": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
