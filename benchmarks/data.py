"""Measures jaxlm's plans and loader, against grain's own packers.

Each method makes batches of the same documents. jaxlm's are planned from lengths, gathered from the memory-mapped
corpus, and handed over by a thread; grain packs a sample of the documents as they come. Rates are per core: by the
processor's time of all threads, which other processes disturb less than the clock. See README.md beside this file.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import html
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import grain
import jax
import machine
import numpy as np
from rich.console import Console
from rich.table import Table
from summary import spread

from jaxlm import data

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("JAXLM_CACHE", "~/.cache/jaxlm")).expanduser()
PACKAGES = ("jax", "grain", "numpy")
WHEEL: Final = "botocore==1.44.5"
BATCHES: Final = 600
"""Gathered in each round, at most: a botocore epoch of packed rows."""
BINS: Final = 64
"""Rows that grain's packers keep open."""
GRAIN: Final = {
    "grain, first fit": functools.partial(grain.experimental.FirstFitPackIterDataset, num_packing_bins=BINS),
    "grain, best fit": functools.partial(grain.experimental.BestFitPackIterDataset, num_packing_bins=BINS),
    "grain, concat": grain.experimental.ConcatThenSplitIterDataset,
}
REFERENCE: Final = "grain, first fit"


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus, and the size of batches."""

    name: str
    corpus: data.Corpus
    row_lengths: Sequence[int]
    tokens_per_batch: int


@dataclasses.dataclass
class Turns:
    """What each round took, by what was done, in seconds."""

    cpu: dict[str, list[float]] = dataclasses.field(default_factory=dict[str, list[float]])
    wall: dict[str, list[float]] = dataclasses.field(default_factory=dict[str, list[float]])
    foreign_cores: dict[str, list[float | None]] = dataclasses.field(default_factory=dict[str, list[float | None]])
    """How many cores other processes kept busy meanwhile; None where the system doesn't tell."""

    def take(self, what: str, function: Callable[[], Any]) -> None:
        """Calls it, and keeps the times."""
        busy, cpu, begun = machine.busy_seconds(), time.process_time(), time.perf_counter()
        function()
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        others = max(0.0, machine.busy_seconds() - busy - cpu) / wall if busy else None
        self.cpu.setdefault(what, []).append(cpu)
        self.wall.setdefault(what, []).append(wall)
        self.foreign_cores.setdefault(what, []).append(others)


class Planned:
    """One of jaxlm's plans. Its batches are looked through once before anything is timed."""

    def __init__(self, text: Text, make: Callable[..., data.Plan], most: int):
        self.text, self.make, self.turns = text, make, Turns()
        plan = make(text.corpus.lengths)
        described = data.describe(plan)
        self.real, self.tokens_planned = described.real, int(text.corpus.lengths.sum())
        self.batches = data.Batches(text.corpus, plan, min(described.batches, most))
        self.tokens, self.compiles = look_through(self.batches)
        expected = sum(int(plan.batch(i).pieces["length"].sum()) for i in range(len(self.batches)))
        if self.tokens != expected:
            sys.exit(f"{text.name}: the batches hold {self.tokens} tokens, and by the plan {expected}")
        self.passes = max(1, most // len(self.batches))  # so that a turn on a small text isn't over at once
        self.tokens *= self.passes
        with closing(data.iterate(self.batches)) as iterator:
            next(iterator)
            self.state_bytes = len(json.dumps(iterator.get_state()))

    def take_turns(self) -> None:
        """Plans each document once, gathers batches, iterates over them, waits for a new plan's first."""
        lengths, fresh = self.text.corpus.lengths, self.make(self.text.corpus.lengths)
        self.turns.take("plan", lambda: self.make(lengths, passes=1).count)
        self.turns.take("gather", lambda: [self.gather() for _ in range(self.passes)])
        with closing(data.iterate(self.batches)) as iterator:
            self.turns.take("iterate", lambda: [self.iterate(iterator) for _ in range(self.passes)])
        with contextlib.ExitStack() as stack:

            def first() -> None:
                batches = data.Batches(self.text.corpus, fresh, len(self.batches))
                next(stack.enter_context(closing(data.iterate(batches))))

            self.turns.take("first batch", first)

    def gather(self) -> None:
        """Gathers all batches, one after another."""
        for _ in self.batches:
            pass

    def iterate(self, iterator: grain.DatasetIterator[Any]) -> None:
        """Has its thread gather them."""
        iterator.set_state({"next_index": 0})
        for _ in iterator:
            pass

    def seconds_per_token(self) -> list[float]:
        """From lengths to batches, round by round."""
        planned, iterated = self.turns.cpu["plan"], self.turns.cpu["iterate"]
        return [p / self.tokens_planned + i / self.tokens for p, i in zip(planned, iterated, strict=True)]


class Packed:
    """One of grain's packers, on a sample of the documents, cut to fit a row."""

    def __init__(self, text: Text, packer: Callable[..., grain.IterDataset[Any]], sample: int):
        self.turns, self.compiles = Turns(), 1
        longest = text.row_lengths[-1]
        plan = data.pad(text.corpus.lengths, longest, text.tokens_per_batch, passes=1)
        pieces = itertools.chain.from_iterable(plan.batch(i).pieces.tolist() for i in range(plan.count or 0))
        tokens = np.asarray(text.corpus.tokens)
        cut = [{"tokens": tokens[start : start + n]} for _, n, start in itertools.islice(pieces, sample)]
        self.documents, self.tokens = len(cut), sum(len(piece["tokens"]) for piece in cut)
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        packed = packer(grain.MapDataset.source(cut).to_iter_dataset(reading), length_struct={"tokens": longest})
        self.dataset = packed.batch(text.tokens_per_batch // longest)
        held = [np.asarray(batch["tokens_segment_ids"]) > 0 for batch in self._epoch()]
        self.real = float(np.mean([rows.mean() for rows in held]))
        with closing(iter(self.dataset)) as iterator:
            next(iterator)
            self.state_bytes = len(json.dumps(iterator.get_state(), default=str))

    def _epoch(self) -> Iterator[Any]:
        with closing(iter(self.dataset)) as iterator:
            yield from iterator

    def take_turns(self) -> None:
        """Packs the sample, waits for a first batch."""
        self.turns.take("iterate", lambda: sum(1 for _ in self._epoch()))
        with closing(iter(self.dataset)) as iterator:
            self.turns.take("first batch", lambda: next(iterator))

    def seconds_per_token(self) -> list[float]:
        """From documents to batches, round by round."""
        return [seconds / self.tokens for seconds in self.turns.cpu["iterate"]]


def look_through(batches: data.Batches) -> tuple[int, int]:
    """Counts the real tokens of all batches, and how often a function of a batch is compiled for them."""
    compiled: list[int] = []

    @jax.jit
    def function(batch: Any) -> jax.Array:
        compiled.append(1)
        return batch["tokens"][0, 0]

    tokens = 0
    for batch in batches:
        function(batch)
        tokens += int(np.count_nonzero(batch["segments"])) if "segments" in batch else int(batch["lengths"].sum())
    return tokens, len(compiled)


def botocore() -> Iterator[data.Document]:
    """What cloud services are documented with: short texts, each once. The wheel is downloaded, not installed."""
    folder = CACHE / "wheels"
    if not list(folder.glob("botocore-*.whl")):
        command = ["pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", str(folder), WHEEL]
        subprocess.run([sys.executable, "-m", *command], check=True, timeout=300)
    found: dict[str, None] = {}  # in order, each once
    with zipfile.ZipFile(next(folder.glob("botocore-*.whl"))) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith("botocore/data/") and name.endswith("/service-2.json.gz"):
                for text in documentation(json.loads(gzip.decompress(wheel.read(name)))):
                    found[" ".join(html.unescape(re.sub("<[^>]+>", " ", text)).split())] = None
    return (data.Document(f"{i}", text.encode()) for i, text in enumerate(found))


def documentation(node: Any) -> Iterator[str]:
    """The values of that name in a tree of JSON."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == "documentation" and isinstance(child, str):
            yield child
        else:
            yield from documentation(child)


def texts(*, smoke: bool) -> list[Text]:
    """Long documents, and short ones where they can be had."""
    tokenizer = data.ByteTokenizer()
    library = data.open_corpus(data.python_library_corpus(CACHE, tokenizer))
    found = [Text("standard library", library, [2048, 8192, 32768], 262_144)]
    if not smoke:
        try:
            path = data.cached_corpus(CACHE / "botocore-1.44.5-bytes", botocore, tokenizer, heldout=0.0)
            found.append(Text("botocore", data.open_corpus(path), [256, 512, 1024, 2048], 65_536))
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{WHEEL} can't be had ({error}), so only the standard library is measured")
    return found


def contestants(text: Text, most: int, sample: int) -> dict[str, Planned | Packed]:
    """All of them, by name."""
    longest, budget = text.row_lengths[-1], text.tokens_per_batch
    best = data.best_row_lengths(text.corpus.lengths, 4, multiple=max(64, longest // 512), longest=longest)
    plans = {
        "pad": functools.partial(data.pad, row_length=longest, tokens_per_batch=budget),
        f"bucket, {len(best)} lengths": functools.partial(data.bucket, row_lengths=best, tokens_per_batch=budget),
        "concat": functools.partial(data.concat, row_length=longest, tokens_per_batch=budget),
        f"pack, {len(text.row_lengths)} lengths": functools.partial(
            data.pack, row_lengths=text.row_lengths, tokens_per_batch=budget
        ),
        "pack, 1 length": functools.partial(data.pack, row_lengths=[longest], tokens_per_batch=budget),
    }
    ours = {name: Planned(text, plan, most) for name, plan in plans.items()}
    return {**ours, **{name: Packed(text, packer, sample) for name, packer in GRAIN.items()}}


def numbers(text: Text, found: dict[str, Planned | Packed]) -> dict[str, Any]:
    """Everything about one text, contestant by contestant."""
    reference = found[REFERENCE].seconds_per_token()
    each: dict[str, Any] = {}
    for name, one in found.items():
        cpu = {what: statistics.median(seconds) for what, seconds in one.turns.cpu.items()}
        planned = isinstance(one, Planned)
        own = one.seconds_per_token()
        each[name] = {
            "real_tokens": one.real,
            "documents_planned_per_second_per_core": len(text.corpus) / cpu["plan"] if planned else None,
            "tokens_gathered_per_second_per_core": one.tokens / cpu["gather"] if planned else None,
            "tokens_iterated_per_second_per_core": one.tokens / cpu["iterate"],
            "times_as_fast_as_grain": spread([theirs / mine for theirs, mine in zip(reference, own, strict=True)]),
            "seconds_to_first_batch": statistics.median(one.turns.wall["first batch"]),
            "processor_seconds_to_first_batch": cpu["first batch"],
            "state_bytes": one.state_bytes,
            "compiles": one.compiles,
            "rounds": dataclasses.asdict(one.turns),
        }
    return {
        "text": text.name,
        "documents": len(text.corpus),
        "tokens": int(text.corpus.lengths.sum()),
        "row_lengths": list(text.row_lengths),
        "tokens_per_batch": text.tokens_per_batch,
        "documents_for_grain": {name: one.documents for name, one in found.items() if isinstance(one, Packed)},
        "contestants": each,
    }


def table(result: dict[str, Any], device: str) -> Table:
    """A line for each contestant."""
    rounds = next(iter(result["contestants"].values()))["rounds"]
    foreign = [one["rounds"]["foreign_cores"]["iterate"] for one in result["contestants"].values()]
    millions_of_tokens = f"{result['tokens'] / 1e6:.1f} M tokens"
    lines = Table(
        title=f"{result['text']}: {result['documents']:,} documents, {millions_of_tokens}, on {device}",
        caption=f"rates per core, medians of {len(rounds['wall']['iterate'])} rounds, with quartiles; "
        f"others on at most {max(x or 0.0 for each in foreign for x in each):.1f} cores",
    )
    lines.add_column("", no_wrap=True)
    for column in (
        "real",
        "documents planned/s",
        "gathered/s",
        "iterated/s",
        "times grain",
        "first batch",
        "state",
        "compiles",
    ):
        lines.add_column(column, justify="right")

    def millions(rate: float | None) -> str:
        return "" if rate is None else f"{rate / 1e6:,.2f} M" if rate < 1e7 else f"{rate / 1e6:,.0f} M"

    for name, one in result["contestants"].items():
        lines.add_row(
            name,
            f"{one['real_tokens']:.2%}",
            millions(one["documents_planned_per_second_per_core"]),
            millions(one["tokens_gathered_per_second_per_core"]),
            millions(one["tokens_iterated_per_second_per_core"]),
            "{median:.0f} ({lower_quartile:.0f}-{upper_quartile:.0f})".format(**one["times_as_fast_as_grain"]),
            "{:.0f} ({:.0f}) ms".format(*(1e3 * one[f"{clock}seconds_to_first_batch"] for clock in ("", "processor_"))),
            f"{one['state_bytes']} B",
            f"{one['compiles']}",
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how many turns each contestant has (default: 7)")
    parser.add_argument("--sample", type=int, default=2000, help="documents for grain's packers (default: 2000)")
    parser.add_argument("--output", type=Path, help="where to write JSON; by default into benchmarks/results/")
    parser.add_argument("--smoke", action="store_true", help="show that it works: two batches, and no download")
    options = parser.parse_args()
    machine.restart(on_cpu=True)
    most = BATCHES
    if options.smoke:
        options.rounds, options.sample, most = 1, 50, 2
    measured = [(text, contestants(text, most, options.sample)) for text in texts(smoke=options.smoke)]
    for _ in range(options.rounds):
        for _, found in measured:
            for one in random.sample(list(found.values()), len(found)):
                one.take_turns()
    device, console = machine.processor(), Console()
    results = [numbers(text, found) for text, found in measured]
    for result in results:
        (console if console.is_terminal else Console(width=140)).print(table(result, device))
    if options.smoke and not options.output:
        return
    out: Path = options.output or HERE / "results" / f"data-{machine.file_name(device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **machine.about(device, PACKAGES),
        "malloc": machine.HUGE_PAGES["GLIBC_TUNABLES"],
        "texts": results,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
