"""What cross-entropy in chunks takes on an H100 and a TPU, of that with all logits: compiled for them here, not run.

The loss of the last hidden states and the output matrix of a decoder 2,048 wide with Llama 3's vocabulary, and its
gradients, in bfloat16. What kernels move is counted as in `traffic.py`, for the H100 alone.
"""

import json
from pathlib import Path
from typing import Any, Final

import ahead
import jax
import jax.numpy as jnp
import machine
from jax.sharding import SingleDeviceSharding
from memory import cross_entropy_of
from rich.console import Console
from rich.table import Table
from traffic import moved_bytes

OUT: Final = Path(__file__).parent / "results" / "cross-entropy-ahead.json"
VOCAB, WIDTH, TOKENS = 128256, 2048, 65536


def compiled(chunk: int | None, sharding: SingleDeviceSharding) -> Any:
    shapes = {"hidden": (1, TOKENS, WIDTH), "matrix": (WIDTH, VOCAB)}
    params = {name: jax.ShapeDtypeStruct(x, jnp.float32, sharding=sharding) for name, x in shapes.items()}
    batch = {"tokens": jax.ShapeDtypeStruct((1, TOKENS), jnp.int32, sharding=sharding)}
    grad_fn = cross_entropy_of(jnp.bfloat16, chunk)
    return jax.jit(lambda params, batch: grad_fn(params, batch, jax.random.key(0))).lower(params, batch).compile()


def main() -> None:
    lines = Table(title=f"cross-entropy of {TOKENS:,} tokens and its gradients, V = {VOCAB:,}, compiled")
    for column in ("for", "chunks of", "temporaries", "of all at once", "moved", "of all at once"):
        lines.add_column(column, justify="left" if column == "for" else "right")
    record: list[dict[str, Any]] = []
    for chip, device in (("H100", ahead.h100s(1, 1)[0]), ("v5p", ahead.tpus("v5p:2x2x1")[0])):
        for chunk in (None, 8192, 4096, 2048, 1024):
            program = compiled(chunk, SingleDeviceSharding(device))
            temporary = program.memory_analysis().temp_size_in_bytes
            moved = moved_bytes(program.as_text()) if chip == "H100" else None
            record.append({"device": chip, "chunk": chunk, "temporary_bytes": temporary, "moved_bytes": moved})
            whole = record[-1] if chunk is None else next(r for r in record if r["device"] == chip)
            traffic = [f"{moved / 1e9:,.0f} GB", f"{moved / whole['moved_bytes']:.2f}"] if moved else []
            share = f"{temporary / whole['temporary_bytes']:.1%}"
            lines.add_row(chip, f"{chunk or TOKENS:,}", f"{temporary / 1e9:.2f} GB", share, *traffic)
    Console().print(lines)
    about = {
        "command": "python benchmarks/cross_entropy_ahead.py",
        "versions": machine.versions(("jax", "jaxlib", "jax-cuda12-plugin", "libtpu")),
    }
    sizes = {"vocab": VOCAB, "width": WIDTH, "tokens": TOKENS}
    OUT.write_text(json.dumps(about | sizes | {"losses": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
