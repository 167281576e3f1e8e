"""Saves a checkpoint while the system fails, and looks at what is left. A script: it prints a line of JSON per trial.

A trial goes on from the same two checkpoints in a process of its own, forked before JAX has begun: SIGKILL or an error
at the k-th call that changes something in the folder. Another process then goes on from what is there.
"""

import argparse
import ctypes
import errno
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ABOUT = {"model": "tiny", "data": "none"}
KINDS = {"kill": 0, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "full": errno.ENOSPC}
LAST = 5


def compile_shim(folder: Path) -> Path:
    library = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", HERE / "shim.c", "-o", library, "-ldl"], check=True)
    return library


def forked(work: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """Calls a function in a process of its own: how that ended, and what the function returned, by JSON."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(work(*arguments)).encode())
        except BaseException as error:
            os.write(write, json.dumps({"raised": f"{type(error).__name__}: {error}"}).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(said) if said else None


def begun() -> Any:
    """The state before the first step: of several dtypes, in parameters and in the optimizer's state."""
    params = {"w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8), "b": jnp.ones(3, jnp.bfloat16)}
    return TrainState(jnp.zeros((), jnp.int32), params, {"key": jax.random.key(0), "m": jnp.zeros((8, 8))})


@functools.cache
def step() -> Callable[[Any], Any]:
    def one(state: Any) -> Any:
        key, draw = jax.random.split(state.opt_state["key"])
        m = 0.9 * state.opt_state["m"] + jax.random.normal(draw, (8, 8))
        params = {"w": state.params["w"] - 0.1 * m, "b": state.params["b"] * 1.01}
        return TrainState(state.step + 1, params, {"key": key, "m": m})

    return jax.jit(one)


def digest(state: Any) -> str:
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        raw = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        whole.update(np.asarray(raw).tobytes())
    return whole.hexdigest()[:16]


def straight(folder: Path) -> dict[str, str]:
    """Saves the first two, and leaves something unfinished; the digests of all steps of a run without faults."""
    state, digests = begun(), {}
    with checkpoint.Checkpoints(folder, ABOUT) as checkpoints:
        for i in range(1, LAST + 1):
            state = step()(state)
            digests[str(i)] = digest(state)
            if i <= 2:
                checkpoints.save(state)
    shutil.copytree(folder / "2" / "params" / "d", folder / "9.unfinished")
    return digests


def save(shim: Any, folder: Path, first: int, last: int, code: int, log: int = -1) -> Any:
    """Restores step 2 and saves step 3, with faults from before the folder is opened; then step 4 without."""

    def fault(within: str) -> None:
        shim.fault(within.encode(), ctypes.c_long(first), ctypes.c_long(last), code, log)

    found: dict[str, Any] = {}
    fault(str(folder))
    try:
        checkpoints = checkpoint.Checkpoints(folder, ABOUT)
    except OSError as error:
        return {"refused": str(error), "calls": shim.counted()}
    state = step()(checkpoints.restore(begun()))
    checkpoints.save(state)
    found["third"] = checkpoints.latest == 3
    found["calls"] = shim.counted()
    fault("")
    found["left"] = sorted(path.name for path in folder.iterdir())
    with checkpoints:
        checkpoints.save(step()(state))
    return found


def look(folder: Path) -> Any:
    """What is there afterwards, and where a run goes that goes on from it."""
    whole = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    for each in whole:
        checkpoint.load_params(folder, each)
    with checkpoint.Checkpoints(folder, ABOUT) as checkpoints:
        state = checkpoints.restore(begun())
        found = {"whole": sorted(whole), "step": int(state.step), "state": digest(state)}
        while int(state.step) < LAST:
            state = step()(state)
        checkpoints.save(state)
    with checkpoint.Checkpoints(folder, ABOUT) as checkpoints:
        again = checkpoints.restore(begun())
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return {**found, "last": digest(again), "left": left}


def judge(kind: str, ours: bool, stays: bool, ended: int, saved: Any, found: Any, digests: dict[str, str]) -> str:
    """What is wrong; nothing, if it is as it should be.

    Where `ours`, the call is jaxlm's own, which writes and syncs what Orbax has written: after that fails nothing may
    count. What can't be removed `stays` until the next save.
    """
    if found is None or "raised" in found:
        return f"could not go on: {found}"
    if kind == "kill":
        wrong = ended != -9 or found["step"] not in (2, 3)
    elif "refused" in saved:
        wrong = found["step"] != 2
    else:
        wrong = "raised" in saved or found["step"] != 4
        wrong |= not stays and any("unfinished" in name for name in saved["left"])
        wrong |= ours and saved.get("third", False)
    wrong |= found["step"] != max(found["whole"]) or found["state"] != digests[str(found["step"])]
    wrong |= found["last"] != digests[str(LAST)] or any(not name.isdecimal() for name in found["left"])
    return f"{ended} {saved} {found}" if wrong else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--trials", type=int, default=0, help="how many calls to draw; 0: each in turn; -1: none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    with tempfile.TemporaryDirectory() as scratch:
        base, trial, log = (Path(scratch).resolve() / name for name in ("base", "trial", "log"))
        _, digests = forked(straight, base)
        shutil.copytree(base, trial)
        with log.open("w") as lines:
            _, counted = forked(save, shim, trial, 0, -1, 0, lines.fileno())
        calls = log.read_text().splitlines()[: counted["calls"]]
        print(json.dumps({"calls": calls, "seed": options.seed}), flush=True)
        points = range(1, len(calls) + 1)
        if options.kind in ("ENOSPC", "full"):  # what is full can be emptied
            points = [k for k in points if calls[k - 1].split()[1] != "remove"]
        if options.trials:
            points = sorted(random.Random(options.seed).sample(points, max(0, options.trials)))
        manifest = next(k for k, call in enumerate(calls, 1) if call.endswith(f"/3.unfinished/{_folder.MANIFEST}"))
        for k in points:
            ours = k >= manifest and "/3.unfinished" in calls[k - 1]
            shutil.rmtree(trial)
            shutil.copytree(base, trial)
            last = 10**9 if options.kind == "full" else k
            ended, saved = forked(save, shim, trial, k, last, KINDS[options.kind])
            _, found = forked(look, trial)
            stays = options.kind == "EIO" and calls[k - 1].split()[1] == "remove"
            wrong = judge(options.kind, ours, stays, ended, saved, found, digests)
            print(json.dumps({"call": calls[k - 1], "step": found and found.get("step"), "wrong": wrong}), flush=True)


if __name__ == "__main__":
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory() as made:
            library = compile_shim(Path(made))
            done = subprocess.run(
                [sys.executable, *sys.argv], env=os.environ | {"LD_PRELOAD": str(library)}, check=False
            )
        sys.exit(done.returncode)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm import checkpoint
    from jaxlm.checkpoint import _folder
    from jaxlm.train import keep_programs
    from jaxlm.types import TrainState

    keep_programs()
    main()
