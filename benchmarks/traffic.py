"""How many bytes an optimizer's kernels move on an H100, jaxlm's against optax's: compiled for it here, not run.

A GPU's memory is pooled and its arithmetic is plenty, so that an elementwise update takes the time of its traffic. Each
kernel of the compiled program reads its operands and writes its results once; their sizes are added up.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

import ahead
import jax
import machine
from jax.sharding import SingleDeviceSharding
from optimizer_pairs import TREES, Contestant, groups, least_bytes, size_in_bytes, step_of
from rich.console import Console
from rich.table import Table

OUT: Final = Path(__file__).parent / "results" / "optimizers-traffic-h100.json"
BYTES: Final = {
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
}
LOOP: Final = re.compile(r"body=(%[\w.\-]+).*known_trip_count\":{\"n\":\"(\d+)\"}")
INSTRUCTION: Final = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:,|$)(.*)")


def moved_bytes(program: str) -> int:
    """The sizes of the operands and results of all kernels in a compiled program, those in loops each time."""
    computations = {
        lines[0].split(" (")[0]: lines for text in program.split("\n\n") if (lines := text.strip().splitlines())
    }
    (entry,) = (name for name in computations if name.startswith("ENTRY"))
    return _moved(computations, entry)


def _moved(computations: dict[str, list[str]], computation: str) -> int:
    sizes: dict[str, int] = {}
    alias: dict[str, str] = {}
    tuples: dict[str, list[str]] = {}
    total = 0
    for line in computations[computation]:
        if not (found := INSTRUCTION.match(line)):
            continue
        name, shape, op, arguments, rest = found.groups()
        written: list[str] = re.findall(r"%([\w.\-]+)", arguments)
        operands = [alias.get(operand, operand) for operand in written]
        sizes[name] = _size(shape)
        if op == "bitcast":
            alias[name] = operands[0]
        elif op == "tuple":
            tuples[name] = operands
        elif op == "opt-barrier":
            tuples[name] = tuples[operands[0]]
        elif op == "get-tuple-element":
            if operands[0] in tuples:
                alias[name] = tuples[operands[0]][int(rest.partition("index=")[2].split(",")[0])]
        elif op == "while":
            body, trips = LOOP.findall(rest)[0]
            total += int(trips) * _moved(computations, body)
        elif "dynamic-update-slice" in name or "dynamic_update_slice" in name:  # in place
            total += 2 * (sum(map(sizes.__getitem__, set(operands))) - sizes[name])
        elif "dynamic-slice" in name or "dynamic_slice" in name:
            total += 2 * sizes[name]
        elif op not in ("parameter", "constant"):
            total += sizes[name] + sum(sizes[operand] for operand in set(operands))
    return total


def compiled(contestant: Contestant, params: Any, sharding: SingleDeviceSharding) -> tuple[Any, int]:
    """Update and apply, with parameters and state donated, and the bytes of its state."""
    tx = contestant.make()
    at = params, jax.eval_shape(tx.init, params)
    on_device = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (at, params))
    return jax.jit(step_of(tx), donate_argnums=0).lower(*on_device).compile(), size_in_bytes(at[1])


def main() -> None:
    sharding = SingleDeviceSharding(ahead.h100s(1, 1)[0])
    params = TREES["124M"].shapes(stacked=False)
    lines = Table(title="optimizer steps compiled for an H100, 124M parameters")
    for column in ("optimizer", "by", "moved", "times the floor", "temporaries"):
        lines.add_column(column, justify="left" if column in ("optimizer", "by") else "right")
    record: list[dict[str, Any]] = []
    for group in groups(stacked=False, tensor_cores=True):
        if group.name == "soap":  # its decompositions are loops, and no reference is there
            continue
        for contestant in group.contestants:
            program, state_bytes = compiled(contestant, params, sharding)
            moved, floor = moved_bytes(program.as_text()), least_bytes(params, state_bytes, clips=group.clips)
            temporary = program.memory_analysis().temp_size_in_bytes
            record.append(
                {
                    "optimizer": group.name,
                    "by": contestant.label,
                    "moved_bytes": moved,
                    "least_bytes": floor,
                    "temporary_bytes": temporary,
                }
            )
            row = f"{moved / 1e9:.2f} GB", f"{moved / floor:.2f}", f"{temporary / 1e6:,.1f} MB"
            lines.add_row(group.name, contestant.label, *row)
        lines.add_section()
    Console().print(lines)
    versions = machine.versions(("jax", "jaxlib", "optax"))
    OUT.write_text(
        json.dumps({"command": "python benchmarks/traffic.py", "versions": versions, "optimizers": record}, indent=1)
        + "\n"
    )


def _size(shape: str) -> int:
    total = 0
    for dtype, sides in re.findall(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\]", shape):
        elements = 1
        for side in filter(None, sides.split(",")):
            elements *= int(side)
        total += BYTES[dtype] * elements
    return total


if __name__ == "__main__":
    main()
