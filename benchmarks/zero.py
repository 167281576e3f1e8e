"""What ZeRO's stages send and hold on H100s and TPUs: the training step compiled for them here, not run.

`contract`: what each program sends, next to what `sharding.describe` says. `memory`: what devices hold, next to the
paper's formula. `scaling`: what each device sends, on more and more of them.
"""

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import ahead
import jax
import machine
import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table
from zero_step import Case, Compiled, Sent, compiled

from jaxlm.models import TransformerConfig

HERE: Final = Path(__file__).parent
PICTURE: Final = HERE.parent / "docs" / "zero-scaling.png"
SMALL: Final = TransformerConfig(vocab=32768, layers=4, width=1024, heads=8)
SIZES: Final = {
    "124M": TransformerConfig(vocab=50304, layers=12, width=768, heads=12, tied=True),
    "1.3B": TransformerConfig(vocab=50304, layers=24, width=2048, heads=16, tied=True),
    "7B": TransformerConfig(vocab=32000, layers=32, width=4096, heads=32, hidden=11008),
}
MEMORY: Final = {"h100": 80 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30}
SLICES: Final = {  # of TPUs
    "v5e": {8: "2x4", 64: "8x8", 256: "16x16"},
    "v5p": {
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
        512: "8x8x8",
        1024: "8x8x16",
    },
}
PACKAGES: Final = ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "optax", "flax")
KINDS: Final = ("all-gather", "reduce-scatter", "all-reduce")
Entry = dict[str, Any]


def topology(chip: str, devices: int) -> str:
    """H100s come in hosts of 8."""
    return f"{devices // 8}x8" if chip == "h100" else SLICES[chip][devices]


def devices(case: Case) -> list[Any]:
    """What to compile for."""
    if case.chip == "h100":
        hosts, each = case.topology.split("x")
        return ahead.h100s(int(hosts), int(each))
    return ahead.tpus(f"{case.chip}:{case.topology}")


def contract() -> Iterable[Case]:
    for chip, where in (("h100", "1x8"), ("v5e", "2x4")):
        for optimizer in ("adamw", "muon"):
            for microbatches in (1, 4):
                for zero in range(4):
                    yield Case(chip, where, zero, SMALL, optimizer, microbatches)


def memory() -> Iterable[Case]:
    for devices in (8, 64, 256):
        for name, model in SIZES.items():
            for chip in ("h100", "v5p" if name == "7B" else "v5e"):
                for zero in range(4):
                    yield Case(chip, topology(chip, devices), zero, model, remat=True)


def scaling() -> Iterable[Case]:
    for chip in ("h100", "v5p"):
        for devices in SLICES["v5p"]:
            for zero in range(4):
                yield Case(chip, topology(chip, devices), zero, SMALL)


def sent_by_kind(program: Compiled) -> dict[str, dict[str, float]]:
    """The bytes that `sharding.describe` says each device sends, and those of the program."""
    sums: dict[str, dict[str, float]] = {kind: {"described": 0.0, "compiled": 0.0} for kind in KINDS}
    for t in program.description.transfers:
        sums[t.kind]["described"] += t.sent
    for s in program.sent:
        sums.setdefault(s.kind, {"described": 0.0, "compiled": 0.0})["compiled"] += s.sent
    return sums


def otherwise(case: Case, program: Compiled) -> list[str]:
    """Where the compiler does something else than was described, by more than 1 % of what is sent."""
    notes: list[str] = []
    total = sum(t.sent for t in program.description.transfers)
    for kind, of in sent_by_kind(program).items():
        if abs(more := of["compiled"] - of["described"]) > 0.01 * total:
            notes.append(f"{kind}: {more / total:+.1%} of all that is described")
    for kind, dtype in (("all-gather", "bf16"), ("reduce-scatter", "f32")):
        if wrong := {s.dtype for s in program.sent if s.kind == kind and s.sent > 0.01 * total} - {dtype}:
            notes.append(f"{kind} in {', '.join(sorted(wrong))}")
    in_loop = {s.kind for s in program.sent if s.in_loop and s.sent > 0.01 * total}
    if case.zero < 2 and in_loop:
        notes.append(f"in a loop: {', '.join(sorted(in_loop))}")
    return notes


def contract_entry(case: Case, program: Compiled) -> Entry:
    sent = [s._asdict() for s in program.sent if s.nbytes > 1024]
    return {"sent": sent, "by_kind": sent_by_kind(program), "otherwise": otherwise(case, program)}


def memory_entry(case: Case, program: Compiled) -> Entry:
    """The paper's formula with float32 masters and two moments, a bfloat16 copy, and float32 gradients."""
    params, n, found, described = program.params, program.devices, program.memory, program.description.nbytes
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    total += found.output_size_in_bytes - found.alias_size_in_bytes
    batch = case.tokens * 2 + 4
    lasting = described["parameters"] + described["optimizer state"]
    paper = 12 * params / (n if case.zero else 1)
    return {
        "arguments": found.argument_size_in_bytes - batch,
        "paper": paper,
        "over_paper": (found.argument_size_in_bytes - batch) / paper - 1,
        "described": lasting,
        "over_described": (found.argument_size_in_bytes - batch) / lasting - 1,
        "temporaries": found.temp_size_in_bytes,
        "paper_during_step": (2 / (n if case.zero > 2 else 1) + 4 / (n if case.zero > 1 else 1)) * params,
        "described_during_step": described["parameters in use"] + described["gradients, at most"],
        "peak": found.peak_memory_in_bytes or None,
        "total": total,
        "fits": max(total, found.peak_memory_in_bytes) <= MEMORY[case.chip],
    }


def scaling_entry(case: Case, program: Compiled) -> Entry:
    del case
    described = sum(t.sent for t in program.description.transfers)
    sent = sum(s.sent for s in program.sent)
    return {"sent": sent, "sent_per_param": sent / program.params, "described_per_param": described / program.params}


def contract_table(entries: list[Entry]) -> Table:
    table = _table("What a step sends", "program", "kind", "dtype", "in loop", "async", "arrays", "whole", "sent")
    table.add_column("described", justify="right")
    for e in entries:
        title, described = e["program"], {kind: of["described"] for kind, of in e.get("by_kind", {}).items()}
        for s in (Sent(**s) for s in e.get("sent", [])):
            said = _size(described.pop(s.kind, 0)) if s.nbytes > 1e6 else ""
            flags = ("yes" if s.in_loop else "", "yes" if s.asynchronous else "")
            table.add_row(title, s.kind, s.dtype, *flags, str(s.arrays), _size(s.nbytes), _size(s.sent), said)
            title = ""
        for note in [*e.get("otherwise", []), *filter(None, [e.get("error")])]:
            table.add_row(title, f"[red]{note}")
        table.add_section()
    return table


def memory_table(entries: list[Entry]) -> Table:
    columns = "held", "paper", "more", "more than described", "temporaries", "paper: during step", "peak", "fits"
    table = _table("What each device holds, GB", "program", "params", *columns)
    for e in entries:
        if "error" in e:
            table.add_row(e["program"], _model(e), *[""] * 7, f"no: {e['error']}")
            continue
        sizes = [f"{e[k] / 1e9:.2f}" if e[k] else "" for k in ("temporaries", "paper_during_step", "peak")]
        held = f"{e['arguments'] / 1e9:.3f}", f"{e['paper'] / 1e9:.3f}"
        more = f"{e['over_paper']:+.2%}", f"{e['over_described']:+.3%}"
        table.add_row(e["program"], _model(e), *held, *more, *sizes, "yes" if e["fits"] else "no")
    return table


def scaling_table(entries: list[Entry]) -> Table:
    table = _table("What each device sends, bytes per parameter", "program", "devices", "compiled", "described")
    for e in entries:
        numbers = (f"{e[k]:.3f}" if k in e else "" for k in ("sent_per_param", "described_per_param"))
        table.add_row(e["program"], str(e["devices"]), *numbers)
    return table


def draw(entries: list[Entry]) -> None:
    """Bytes sent per parameter over the number of devices."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    markers = {0: "o", 1: "s", 2: "x", 3: "^"}
    for ax, (chip, label) in zip(axes, (("h100", "H100s, 8 a host"), ("v5p", "TPU v5p")), strict=True):
        for zero, marker in markers.items():
            of = [e for e in entries if e["chip"] == chip and e["zero"] == zero and "sent_per_param" in e]
            points = [e["devices"] for e in of], [e["sent_per_param"] for e in of]
            ax.plot(*points, marker=marker, fillstyle="none", label=f"ZeRO {zero}", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("devices")
        ax.set_xticks(list(SLICES["v5p"]))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0)
    axes[0].set_ylabel("bytes each device sends\nper step and parameter")
    axes[1].legend(frameon=False, loc="lower right")
    figure.savefig(PICTURE, dpi=130)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i > 2 else "left", no_wrap=i == 0)
    return table


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.2f} MB" if nbytes else ""


def _model(entry: Entry) -> str:
    """Which of SIZES it is."""
    return next(name for name, model in SIZES.items() if model == _case(entry).model)


def _case(entry: Entry) -> Case:
    """What was compiled, also where models had fewer fields then: those were as they are by default."""
    fields: dict[str, Any] = {**entry["case"], "model": TransformerConfig(**entry["case"]["model"])}
    return Case(**fields)


SECTIONS: Final[dict[str, tuple[Callable[[], Iterable[Case]], Any, Any]]] = {
    "contract": (contract, contract_entry, contract_table),
    "memory": (memory, memory_entry, memory_table),
    "scaling": (scaling, scaling_entry, scaling_table),
}


def measure(section: str, chips: list[str], sizes: list[int]) -> None:
    """Compiles a section's programs one after another, but those that its file has from the same versions."""
    cases, make_entry, table = SECTIONS[section]
    out, versions = HERE / "results" / f"zero-{section}.json", machine.versions(PACKAGES)
    before: Entry = json.loads(out.read_text()) if out.exists() else {}
    same = before.get("versions") == versions
    kept = {_case(e): e for e in before.get("programs", ()) if same}
    wanted = list(dict.fromkeys(cases()))
    for i, case in enumerate(wanted, 1):
        if case in kept or case.chip not in chips or case.devices not in sizes:
            continue
        start = time.perf_counter()
        try:
            program = compiled(case, devices(case))
            found = {"parameters": program.params, **make_entry(case, program)}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):  # a TPU's compiler refuses what its memory doesn't hold
                raise
            found = {"error": str(error).partition("\n")[0][:200]}
        seconds = time.perf_counter() - start
        print(f"{section} {i}/{len(wanted)}: {case.title}: {seconds:.0f} s", file=sys.stderr, flush=True)
        about = {
            "program": case.title,
            "chip": case.chip,
            "devices": case.devices,
            "zero": case.zero,
            "seconds": round(seconds, 1),
        }
        kept[case] = {**about, **found, "case": dataclasses.asdict(case)}
        record = {
            "command": f"python benchmarks/zero.py --only {section}",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions,
            "missing": [case.title for case in wanted if case not in kept],
            "programs": [kept[case] for case in wanted if case in kept],
        }
        out.write_text(json.dumps(record, indent=1) + "\n")
    entries = [kept[case] for case in wanted if case in kept]
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table(entries))
    if section == "scaling":
        draw(entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one of the three parts")
    parser.add_argument("--chips", nargs="+", default=list(MEMORY), choices=MEMORY, help="which devices")
    parser.add_argument("--devices", nargs="+", type=int, default=list(SLICES["v5p"]), help="how many")
    options = parser.parse_args()
    for section in SECTIONS:
        if options.only in (None, section):
            measure(section, options.chips, options.devices)


if __name__ == "__main__":
    main()
