"""What a training step moves and keeps on an H100 in each precision: compiled for it here, not run.

A decoder of about 124M parameters with AdamW, 8 rows of 1,024 tokens. Each kernel reads its operands and writes its
results once: see `traffic.py`.
"""

import json
from pathlib import Path
from typing import Any, Final

import ahead
import jax
import jax.numpy as jnp
import machine
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table
from traffic import moved_bytes

from jaxlm import losses, models, optim, precision, train, tree

OUT: Final = Path(__file__).parent / "results" / "precision-h100.json"
MODEL: Final = models.TransformerConfig(vocab=50304, layers=12, width=768, heads=12, tied=True)
ROWS, LENGTH = 8, 1024
CASES: Final[list[tuple[Any, Any]]] = [
    (jnp.float32, models.attention.dense),
    (jnp.bfloat16, models.attention.dense),
    (jnp.float16, models.attention.dense),
    (jnp.bfloat16, models.attention.cudnn),
]


def compiled(dtype: Any, implementation: Any, sharding: SingleDeviceSharding) -> tuple[Any, int]:
    """The step, with its state donated, and the number of its parameters."""
    init, apply = models.transformer(MODEL, unroll=True, implementation=implementation)
    optimizer = optim.adamw(1e-3)
    optimizer = optim.dynamic_loss_scale(optimizer) if dtype == jnp.float16 else optimizer
    grad_fn = jax.value_and_grad(precision.compute_in(dtype, losses.next_token(apply)), has_aux=True)
    state = jax.eval_shape(lambda: train.start(init(jax.random.key(0)), optimizer))
    batch = {"tokens": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.uint16)}
    at = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, batch))
    step = jax.jit(train.make_step(grad_fn, optimizer, jax.random.key(0)), donate_argnums=0)
    return step.lower(*at).compile(), tree.size(state.params)


def main() -> None:
    sharding, parameters = SingleDeviceSharding(ahead.h100s(1, 1)[0]), 0
    lines = Table("precision", "attention", title=f"a step of {ROWS} x {LENGTH} tokens compiled for an H100")
    lines.add_column("moved", justify="right")
    lines.add_column("temporaries", justify="right")
    record: list[dict[str, Any]] = []
    for dtype, implementation in CASES:
        program, parameters = compiled(dtype, implementation, sharding)
        moved, temporary = moved_bytes(program.as_text()), program.memory_analysis().temp_size_in_bytes
        names = {"precision": jnp.dtype(dtype).name, "attention": implementation.__name__}
        record.append({**names, "moved_bytes": moved, "temporary_bytes": temporary})
        lines.add_row(*names.values(), f"{moved / 1e9:.1f} GB", f"{temporary / 1e9:.1f} GB")
    Console().print(lines)
    about = {
        "command": "python benchmarks/precision_ahead.py",
        "versions": machine.versions(("jax", "jaxlib", "jax-cuda12-plugin")),
        "parameters": parameters,
    }
    OUT.write_text(json.dumps(about | {"steps": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
