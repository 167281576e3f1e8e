"""Fills a real disk of a few MB while a small real run saves, and frees it again; compares with an undisturbed run.

A script: it prints a line of JSON per trial. It mounts the disk in a namespace of its own, which `unshare` makes.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import kills

from jaxlm.checkpoint import _folder

SIZE = 4 * 2**20
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


@contextlib.contextmanager
def in_namespace(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Namespace, Path]]:
    """Starts the script again in a namespace of its own, where it may mount disks; its options, and a folder."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help="of such a namespace")
    options = parser.parse_args()
    if not options.inside:
        os.execvp(UNSHARE[0], [*UNSHARE, sys.executable, *sys.argv, "--inside"])
    # What is mounted there, and still is, goes with the namespace.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        yield options, Path(temporary)


def mount(disk: Path, size: int) -> Path:
    """An empty disk of so many bytes, where there was nothing."""
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    return disk


def fill(ballast: Path, free: int) -> None:
    """Writes until no byte more fits but `free`, in pages."""
    with ballast.open("wb", 0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**12)):
            pass
    os.truncate(ballast, ballast.stat().st_size - free)


def trial(pretrain: kills.ModuleType, disk: Path, text: Path, free: int) -> tuple[int, int]:
    """A run on the disk, which is full from after step 20 until a save has failed: how many did, how often it ended."""
    run, ballast, told = disk / "runs" / "pretrain", disk / "ballast", disk.with_name(f"{disk.name}-said")
    told.touch()
    (disk / "said").symlink_to(told)
    child, begun, whole = kills.begin(pretrain, disk, text), time.monotonic(), 0
    while "was not saved" not in told.read_text():
        assert time.monotonic() - begun < kills.PATIENCE, told.read_text()
        if not whole and (whole := kills.newest(run)):
            fill(ballast, free)
        time.sleep(0.001)
    os.kill(child, signal.SIGSTOP)
    for step in _folder.whole(run / "checkpoints"):
        _folder.read(run / "checkpoints", step)
    assert kills.newest(run) >= whole > 0
    ballast.unlink()
    os.kill(child, signal.SIGCONT)
    ended = 0
    while code := kills.end(child, None, run)[0]:  # three saves in a row have failed, before this has freed the disk
        assert code == 75, told.read_text()
        assert "No space left" in told.read_text()
        child, ended = kills.begin(pretrain, disk, text), ended + 1
        assert ended < 3, told.read_text()
    return told.read_text().count("was not saved"), ended


def main(trials: int, seed: int, folder: Path) -> None:
    kills.prepare()
    pretrain, text, draw = kills.import_pretrain(), kills.write_text(folder / "text"), random.Random(seed)
    (folder / "straight").mkdir()
    straight = folder / "straight" / "runs" / "pretrain"
    assert kills.end(kills.begin(pretrain, folder / "straight", text), None, straight)[0] == 0
    expected = kills.result(straight)
    for number in range(trials):
        disk = mount(folder / f"disk-{number}", SIZE)
        free = draw.randrange(0, 2**17, 2**12) if number else 0
        failed, ended = trial(pretrain, disk, text, free)
        same = kills.result(disk / "runs" / "pretrain") == expected
        left = [path.name for path in (disk / "runs/pretrain/checkpoints").glob("*.unfinished")]
        print(json.dumps({"free": free, "failed": failed, "ended": ended, "same": same, "left": left}), flush=True)
        subprocess.run(["umount", "-l", disk], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    with in_namespace(parser) as (options, temporary):
        main(options.trials, options.seed, temporary)
