"""Damages the newest of three checkpoints in every way, and restores. A script: it prints a line of JSON per kind."""

import argparse
import collections
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import checkpoint, files
from jaxlm.checkpoint import _folder
from jaxlm.tree import named_leaves
from jaxlm.types import TrainState

ABOUT = {"model": {"width": 32}, "data": "none"}
NEWEST = 3


def state_at(step: int) -> Any:
    w, m = jax.random.normal(jax.random.key(step), (2, 48, 32))
    params = {"blocks": {"w": w, "b": jnp.full(5, step, jnp.bfloat16)}, "mask": jnp.arange(7) % 2 == 0}
    return TrainState(jnp.asarray(step, jnp.int32), params, {"m": m, "key": jax.random.key(step)})


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def empty(path: Path, draw: random.Random) -> None:
    del draw
    path.write_bytes(b"")


def zero(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    begin = draw.randrange(len(content))
    size = len(content[begin : begin + 4096])
    path.write_bytes(content[:begin] + bytes(size) + content[begin + size :])


def scramble(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(path.stat().st_size))


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def delete(path: Path, draw: random.Random) -> None:
    del draw
    path.unlink()


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    f.__name__: f for f in (flip, truncate, empty, zero, scramble, lengthen, delete)
}


def mutate(path: Path, draw: random.Random) -> None:
    """Changes something in JSON, with a checksum that fits if it is the manifest."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return scramble(path, draw)
    content.pop("checksum", None)
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            places.append((part, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(content)
    part, key = draw.choice(places)
    values = [None, True, -1, 0, 2**31, 1e308, "", "../../x", "/etc/passwd", [], {}, [[]], {"a": None}, "float99", "\0"]
    choice = draw.randrange(len(values) + 2)
    if choice == len(values):
        del part[key]
    elif choice == len(values) + 1 and isinstance(part, dict):
        part["../" + str(key)] = part.pop(key)
    else:
        part[key] = values[choice % len(values)]
    manifest = path.name == _folder.MANIFEST
    path.write_text(files.signed(content) if manifest else json.dumps(content))
    return None


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def same(state: Any, step: int) -> bool:
    one, other = named_leaves(state), named_leaves(state_at(step))
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


def bits(x: Any) -> tuple[str, tuple[int, ...], bytes]:
    raw = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return str(x.dtype), x.shape, np.asarray(raw).tobytes()


def restored(folder: Path) -> tuple[str, str]:
    """What became of it, and what was said: older, newest (with every bit right), refused, or wrong."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            with checkpoint.Checkpoints(folder, ABOUT) as checkpoints:
                state = checkpoints.restore(state_at(0))
        except (ValueError, RuntimeError) as error:
            return "refused", str(error)
        except BaseException as error:
            return "wrong", f"{type(error).__name__}: {error}"
    step = None if state is None else int(state.step)
    aside = (folder / f"{NEWEST}.damaged-1").exists()
    if step == NEWEST and same(state, NEWEST) and not aside:
        return "newest", said.getvalue()
    if step == NEWEST - 1 and same(state, NEWEST - 1) and aside:
        return "older", said.getvalue()
    return "wrong", f"step {step}, set aside: {aside}; {said.getvalue()}"


def read_well(folder: Path) -> bool:
    """Whether the parameters alone are right, or refused with an error of ours."""
    for name in (NEWEST, NEWEST - 1):  # under the names from before
        if (aside := folder / f"{name}.damaged-1").exists():
            aside.rename(folder / str(name))
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            params, _ = checkpoint.load_params(folder)
        except (ValueError, RuntimeError):
            return True
        except BaseException:
            return False
    found = {name: bits(leaf) for name, leaf in named_leaves(params).items()}
    return any(
        found.items() <= {n: bits(x) for n, x in named_leaves(state_at(s).params).items()}.items() for s in (2, 3)
    )


def names_it(said: str, folder: Path) -> bool:
    """Whether a message has the name of a leaf or of a file of the checkpoint."""
    leaves = named_leaves({"params": state_at(0).params, "rest": state_at(0)._asdict()})
    places = [path.relative_to(folder).as_posix() for path in files_of(folder)]
    inner = [name.partition("/")[2].replace("/", ".") for name in leaves]
    return any(
        name in said for name in [*leaves, *inner, *places, *(place.partition("/")[2] or place for place in places)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="of random damage, and as many of random JSON")
    parser.add_argument("--each", action="store_true", help="also every kind of damage to every file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        for checksums in (True, False):
            base, trial = Path(scratch) / f"base{checksums}", Path(scratch) / "trial"
            # Without checksums of files the fingerprints of leaves have to find it, as in large files.
            small = mock.patch.object(_folder, "SMALL", _folder.SMALL if checksums else -1)
            with small, checkpoint.Checkpoints(base, ABOUT) as checkpoints:
                for step in (NEWEST - 1, NEWEST):
                    checkpoints.save(state_at(step))
            each = [
                (path, kind)
                for path in files_of(base / str(NEWEST))
                for kind in DAMAGE
                if path.stat().st_size or kind in ("lengthen", "delete")
            ]
            some = [*draw.choices(each, k=options.trials // 2), *(each if options.each else [])]
            texts = [path for path in files_of(base / str(NEWEST)) if is_text(path)]
            fuzzed = [(path, "mutate") for path in draw.choices(texts, k=options.trials // 2)]
            counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
            wrong: list[str] = []
            for path, kind in some + fuzzed:
                shutil.rmtree(trial, ignore_errors=True)
                shutil.copytree(base, trial)
                name = path.relative_to(base / str(NEWEST))
                before = path.read_bytes()
                (mutate if kind == "mutate" else DAMAGE[kind])(trial / str(NEWEST) / name, draw)
                damaged = trial / str(NEWEST) / name
                changed = not damaged.exists() or damaged.read_bytes() != before
                outcome, said = restored(trial)
                if kind == "mutate" and not read_well(trial):
                    outcome = "wrong"
                counts[kind][outcome] += 1
                if checksums and kind != "mutate":
                    names = name.as_posix() in said
                else:  # of what Orbax says of its own descriptions, which are small and have checksums, not
                    names = names_it(said, base / str(NEWEST)) or (is_text(path) and not checksums)
                bad = outcome == "wrong" or (outcome == "older" and not names)
                other_run = name.name == _folder.MANIFEST and ("but this run has" in said or "is of format" in said)
                bad |= outcome == "refused" and not (kind == "mutate" and other_run)
                bad |= kind != "mutate" and checksums and changed and outcome != "older"
                if bad:
                    wrong.append(f"{kind} {name}: {outcome}: {said}"[:400])
            for kind, outcomes in counts.items():
                print(json.dumps({"checksums": checksums, "kind": kind, **outcomes}), flush=True)
            if wrong:
                print(json.dumps({"checksums": checksums, "wrong": wrong[:5], "count": len(wrong)}), flush=True)


def is_text(path: Path) -> bool:
    return path.name in ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", _folder.MANIFEST, "process_0")


if __name__ == "__main__":
    sys.exit(main())
