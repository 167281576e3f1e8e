"""What a training step moves and keeps on an H100 in each precision: compiled for it here, not run; and on TPUs.

A decoder of about 124M parameters with AdamW, 8 rows of 1,024 tokens. Each kernel reads its operands and writes its
results once: see `traffic.py`. Of the products in the program those are counted whose operands both have 8 bits: two
of three for each of 7 in a layer, a few of which XLA merges; TPUs run the layers in a loop.
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
from rich.progress import track
from rich.table import Table
from traffic import moved_bytes

from jaxlm import losses, models, optim, precision, train, tree

OUT: Final = Path(__file__).parent / "results" / "precision-ahead.json"
MODEL: Final = models.TransformerConfig(vocab=50304, layers=12, width=768, heads=12, tied=True)
ROWS, LENGTH = 8, 1024
CASES: Final[list[tuple[str, Any, Any, Any]]] = [
    ("H100", jnp.float32, models.attention.dense, None),
    ("H100", jnp.bfloat16, models.attention.dense, None),
    ("H100", jnp.float16, models.attention.dense, None),
    ("H100", jnp.bfloat16, models.attention.cudnn, None),
    ("H100", jnp.bfloat16, models.attention.cudnn, jnp.int8),
    ("H100", jnp.bfloat16, models.attention.cudnn, jnp.float8_e4m3fn),
    ("v5e", jnp.bfloat16, models.attention.splash, None),
    ("v5e", jnp.bfloat16, models.attention.splash, jnp.int8),
    ("v6e", jnp.bfloat16, models.attention.splash, None),
    ("v6e", jnp.bfloat16, models.attention.splash, jnp.int8),
]


def compiled(
    chip: str, dtype: Any, implementation: Any, product: Any, sharding: SingleDeviceSharding
) -> tuple[Any, int]:
    """The step, with its state donated, and the number of its parameters."""
    options: dict[str, Any] = {"product": precision.product_in(product)} if product else {}
    options |= {"unroll": chip == "H100", "implementation": implementation}  # TPUs' compiler takes minutes to unroll
    init, apply = models.transformer(MODEL, **options)
    optimizer = optim.adamw(1e-3)
    optimizer = optim.dynamic_loss_scale(optimizer) if dtype == jnp.float16 else optimizer
    grad_fn = jax.value_and_grad(precision.compute_in(dtype, losses.next_token(apply)), has_aux=True)
    state = jax.eval_shape(lambda: train.start(init(jax.random.key(0)), optimizer))
    batch = {"tokens": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.uint16)}
    at = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, batch))
    step = jax.jit(train.make_step(grad_fn, optimizer, jax.random.key(0)), donate_argnums=0)
    return step.lower(*at).compile(), tree.size(state.params)


def narrow_products(program: str) -> int:
    """Those of two operands of 8 bits, in a compiled program."""
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", program))
    operands = re.findall(r" (?:dot|convolution)\(%([\w.\-]+), %([\w.\-]+)\)", program)
    return sum({types[a], types[b]} <= {"s8", "f8e4m3fn", "f8e5m2"} for a, b in operands)


def main() -> None:
    chips = {"H100": ahead.h100s(1, 1)[0], "v5e": ahead.tpus("v5e:2x2")[0], "v6e": ahead.tpus("v6e:2x2")[0]}
    lines, parameters = Table(title=f"a step of {ROWS} x {LENGTH} tokens, compiled"), 0
    for column in ("for", "precision", "attention", "layers' products", "of 8 bits", "moved", "temporaries"):
        lines.add_column(column, justify="left" if column in ("for", "precision", "attention") else "right")
    record: list[dict[str, Any]] = []
    for chip, dtype, implementation, product in track(CASES, "compiling"):
        program, parameters = compiled(chip, dtype, implementation, product, SingleDeviceSharding(chips[chip]))
        text, temporary = program.as_text(), program.memory_analysis().temp_size_in_bytes
        names = [chip, jnp.dtype(dtype).name, implementation.__name__, jnp.dtype(product or dtype).name]
        moved = moved_bytes(text) if chip == "H100" else None  # TPUs' programs are more than kernels one after another
        keys = "device", "precision", "attention", "products"
        numbers = {"narrow_products": narrow_products(text), "moved_bytes": moved, "temporary_bytes": temporary}
        record.append(dict(zip(keys, names, strict=True)) | numbers)
        traffic = f"{moved / 1e9:.1f} GB" if moved else ""
        lines.add_row(*names, str(numbers["narrow_products"]), traffic, f"{temporary / 1e9:.1f} GB")
    Console().print(lines)
    about = {
        "command": "python benchmarks/precision_ahead.py",
        "versions": machine.versions(("jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "qwix")),
        "parameters": parameters,
    }
    OUT.write_text(json.dumps(about | {"steps": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
