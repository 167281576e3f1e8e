"""How long a run that was killed takes until its first new step, and for what: the main job, as it is.

It is started, killed after its first checkpoint, and started again, round after round; what its parts take is noted in
the process itself. What it compiles was compiled before, by the first start. See README.md beside this file.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import machine
from rich.console import Console
from rich.table import Table

HERE: Final = Path(__file__).parent
SCRIPT: Final = HERE.parent / "experiments" / "pretrain.py"
OPTIONS: Final = ["--save-every=10", "--steps=100000"]
PACKAGES: Final = ("jax", "jaxlib", "orbax-checkpoint", "grain", "numpy")


def inside(begun: float) -> None:
    """The main job, which says what it has spent its time on as soon as a step is taken, and ends."""
    sys.path.insert(0, str(SCRIPT.parent))
    import pretrain  # pyright: ignore[reportMissingImports]
    import tyro

    spent = collections.defaultdict[str, float](float, {"Python and its packages": time.time() - begun})

    def timed(name: str, of: Any, attribute: str) -> None:
        work: Callable[..., Any] = getattr(of, attribute)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            before = time.time()
            try:
                return work(*arguments, **options)
            finally:
                spent[name] += time.time() - before

        setattr(of, attribute, wrapped)

    def written(*line: Any) -> None:
        pretrain.jax.block_until_ready(line)  # the step's metrics
        spent["in all"] = time.time() - begun
        print(json.dumps(spent), flush=True)
        os._exit(0)

    timed("corpus and plan", pretrain.data, "cached_corpus")
    timed("corpus and plan", pretrain.data, "pack")
    timed("the step's program", pretrain.train, "compile_step")
    timed("the evaluation's program", pretrain, "compile_eval")
    timed("the checkpoint", pretrain.checkpoint.Checkpoints, "restore")
    timed("evaluation", pretrain, "evaluate")
    pretrain.metrics.Log.write = written
    pretrain.main(tyro.cli(pretrain.Config, args=OPTIONS))


def start(folder: Path, to: Any, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=to, text=True)


def measure(rounds: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder, found = Path(temporary), list[dict[str, float]]()
        with (folder / "said").open("w") as file, start(folder, file, str(SCRIPT), *OPTIONS) as process:
            while not (folder / "runs/pretrain/checkpoints/10").exists() and process.poll() is None:
                time.sleep(0.1)
            process.kill()
        for _ in range(rounds):
            with start(folder, subprocess.PIPE, __file__, "--inside", repr(time.time())) as process:
                said, _ = process.communicate()
            found.append(json.loads(said.splitlines()[-1]))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="show that it works: one restart")
    parser.add_argument("--inside", type=float, metavar="TIME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside)
        return
    rounds = measure(1 if options.smoke else options.rounds)
    parts = {part: statistics.median(one[part] for one in rounds) for part in rounds[0]}
    whole = parts.pop("in all")
    parts["all else"] = whole - sum(parts.values())
    device = machine.processor()
    lines = Table("until the first new step", "seconds", title=f"a run that goes on, on {device}")
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        lines.add_row(part, f"{seconds:.2f}")
    lines.add_row("in all", f"{whole:.2f}")
    (Console() if Console().is_terminal else Console(width=130)).print(lines)
    if not options.smoke:
        record = {
            **machine.about(device, PACKAGES),
            "rounds": rounds,
        }
        out = HERE / "results" / f"restart-{machine.file_name(device)}.json"
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
