"""Ends a small real run again and again, at random moments, and compares what it leaves with an undisturbed run's.

A script: it prints a line of JSON per kill, and one at the end. Runs are forked from a process in which JAX has not
begun, so that they needn't import everything anew; to each it is as if somebody had typed the same command again.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jaxlm.checkpoint import _folder

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 60, 10
SMALL: dict[str, Any] = {"layers": 1, "width": 16, "row_lengths": (64,), "tokens_per_batch": 256}
SIGNALS = [signal.SIGTERM] + [signal.SIGKILL] * 4  # in turn
PATIENCE = 120  # seconds for a whole run


class Kill(NamedTuple):
    """What is done to a run: a signal, some seconds after it began, or after it began to save for the n-th time."""

    number: signal.Signals
    save: int | None
    seconds: float


def import_pretrain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "experiments" / "pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["pretrain"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def begin(pretrain: ModuleType, folder: Path, text: Path, **options: Any) -> int:
    """Forks a run, or with `join` a process of one, whose folder is `folder/runs/pretrain`."""
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(folder)
        out = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        settings = {"text": str(text), "steps": STEPS, "save_every": SAVE_EVERY, **SMALL, **options}
        pretrain.distributed.start(options.get("join"))
        with pretrain.distributed.leaving_together():
            pretrain.main(pretrain.Config(**settings))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def end(child: int, kill: Kill | None, run: Path) -> tuple[int, float]:
    """Waits for a run, and kills it in time; its exit code, negative for a signal, and the seconds from that on."""
    begun = killed = time.monotonic()
    saves, seen, since = 0, set(unfinished(run)), None if kill is None or kill.save else begun
    while time.monotonic() - begun < PATIENCE:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - killed
        new = set(unfinished(run)) - seen
        saves, seen = saves + len(new), seen | new
        if kill and kill.save and saves == kill.save and since is None:
            since = time.monotonic()
        if kill and since is not None and time.monotonic() - since > kill.seconds:
            os.kill(child, kill.number)
            kill, killed = None, time.monotonic()
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    raise TimeoutError((run.parents[1] / "said").read_text()[-2000:])


def unfinished(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").glob("*.unfinished")]


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint; 0 if there is none."""
    return max(_folder.whole(run / "checkpoints"), default=0)


def lines(path: Path) -> list[str]:
    """Those that are whole."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def result(run: Path) -> tuple[str, Any, Any]:
    """What must be the same: the metrics of all steps, the results, and the fingerprints of the last state."""
    manifest = json.loads((run / "checkpoints" / str(newest(run)) / "jaxlm.json").read_text())
    return (run / "metrics.jsonl").read_text(), json.loads((run / "results.json").read_text()), manifest["leaves"]


def draw(rng: random.Random, number: signal.Signals, seconds: float) -> Kill:
    """Half of them during a save, others at any time."""
    if rng.random() < 0.5:
        return Kill(number, rng.randint(1, 5), rng.uniform(0, 0.05))
    return Kill(number, None, rng.uniform(0, seconds))


def prepare() -> None:
    os.environ["JAX_PLATFORMS"], os.environ["COLUMNS"] = "cpu", "200"
    os.environ.setdefault("JAXLM_CACHE", str(ROOT / ".cache"))


def write_text(folder: Path) -> Path:
    folder.mkdir()
    for i in range(80):
        (folder / f"{i}.txt").write_text("".join(f"{i * j % 17} times {j} " for j in range(i % 30 + 5)))
    return folder


def main(kills: int, seed: int, folder: Path) -> None:
    prepare()
    pretrain, rng, text = import_pretrain(), random.Random(seed), write_text(folder / "text")
    for name in ("first", "straight"):  # the first one compiles
        (folder / name).mkdir()
        run = folder / name / "runs" / "pretrain"
        code, seconds = end(begin(pretrain, folder / name, text), None, run)
        assert code == 0, (folder / name / "said").read_text()
    expected, done, finished = result(run), 0, 0
    while done < kills:
        where = folder / f"run-{finished}"
        run, saved, before = where / "runs" / "pretrain", 0, list[str]()
        where.mkdir()
        code = 1
        while code:
            kill = draw(rng, SIGNALS[done % len(SIGNALS)], seconds) if done < kills else None
            had = len(lines(run / "metrics.jsonl"))
            code, took = end(begin(pretrain, where, text), kill, run)
            told = (where / "said").read_text()
            assert code in (0, 75, -signal.SIGKILL, -signal.SIGTERM), told
            # What a checkpoint was whole for is never computed again: its line of the clock is still the same.
            assert lines(run / "timing.jsonl")[:saved] == before, (kill, saved)
            assert newest(run) >= saved, (kill, saved)
            saved = newest(run)
            before = lines(run / "timing.jsonl")[:saved]
            assert len(before) == saved, (kill, saved, len(before))
            lost = len(lines(run / "metrics.jsonl")) - saved
            if code == 75:
                assert lost == 0, (kill, lost)
            if code == -signal.SIGTERM:  # before the first step of this start, or after all was saved
                assert lost == 0 or lost + saved <= had, (kill, lost, saved, had)
            if code:
                assert kill is not None, told
                done += 1
                asked = {"signal": kill.number.name, "during_save": kill.save is not None, "seconds": round(took, 3)}
                print(json.dumps({"kill": done, **asked, "code": code, "saved": saved, "lost": lost}), flush=True)
        assert result(run) == expected, where
        finished += 1
        shutil.rmtree(where)
    print(
        json.dumps({"seed": seed, "kills": done, "runs": finished, "seconds_of_a_run": round(seconds, 2)}), flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(options.kills, options.seed, Path(temporary))
