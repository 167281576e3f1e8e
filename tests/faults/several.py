"""What each of two processes does: HOST:PORT, how many, which, a folder, what happens.

`damaged`: they save, a checkpoint is damaged, they restore. `misread TIMES`: one of them reads it wrong so often.
`full`: there is no room for one, then there is. `fails ERROR`: the system fails one of them in the middle of a save.
`differs`: one of them has another copy of what is replicated. `often`: they save and exchange something in turn.
`call PROCESS NUMBER ERROR`: the system fails that process so at that call of its save (0: SIGKILL); needs shim.c.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import checkpoint, distributed, files, sharding
from jaxlm.checkpoint import _checkpoints
from jaxlm.fingerprint import fingerprints
from jaxlm.types import TrainState


def state_at(step: int, mesh: jax.sharding.Mesh) -> TrainState:
    def make() -> TrainState:
        w, m = jax.random.normal(jax.random.key(step), (2, 512, 64))
        return TrainState(jnp.asarray(step, jnp.int32), {"w": w}, {"m": m})

    whole, divided = sharding.replicated(mesh), NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(make, out_shardings=TrainState(whole, {"w": divided}, {"m": divided}))()


def changed(x: jax.Array, on: jax.Device | None = None) -> jax.Array:
    """The same array, but for a number on this device, or on all of this process."""
    arrays = [shard.data.at[3, 5].add(on in (None, shard.device)) for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, arrays)


def full(path: Path) -> None:
    """A save that there is no room for is left out, and training goes on."""
    mesh = sharding.mesh()
    with checkpoint.Checkpoints(path, {}) as checkpoints:
        checkpoints.save(state_at(1, mesh))
        with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=2**20)):
            checkpoints.save(state_at(2, mesh))
        checkpoints.save(state_at(3, mesh))
    print(json.dumps(sorted(file.name for file in path.iterdir())))


def fails(path: Path, code: str) -> None:
    """The others wait for one that can't write, unless it ends them."""
    mesh, failed = sharding.mesh(), mock.Mock(side_effect=OSError(int(code), os.strerror(int(code))))
    with checkpoint.Checkpoints(path, {}) as checkpoints:
        checkpoints.save(state_at(1, mesh))
        checkpoints.wait()
        if not distributed.first():
            checkpoint._writing.ocp.save_checkpointables_async = failed
        checkpoints.save(state_at(2, mesh))
        checkpoints.save(state_at(3, mesh))


def differs(path: Path) -> None:
    mesh = sharding.mesh()
    state = jax.device_put(state_at(1, mesh), sharding.replicated(mesh))
    with checkpoint.Checkpoints(path, {}) as checkpoints:
        checkpoints.save(state._replace(params={"w": changed(state.params["w"], jax.devices()[-1])}))


def call(path: Path, victim: str, number: str, error: str) -> None:
    mesh, shim = sharding.mesh(), ctypes.CDLL(os.environ["LD_PRELOAD"])
    with checkpoint.Checkpoints(path, {}) as checkpoints:
        checkpoints.save(state_at(1, mesh))
        checkpoints.wait()
        if jax.process_index() == int(victim):
            shim.fault(str(path).encode(), ctypes.c_long(int(number)), ctypes.c_long(int(number)), int(error), -1)
        checkpoints.save(state_at(2, mesh))
        saved = checkpoints.latest == 2
        calls = shim.counted()
        shim.fault(b"", ctypes.c_long(0), ctypes.c_long(0), 0, -1)
        checkpoints.save(state_at(3, mesh))
    print(json.dumps([saved, calls]))


def misread(path: Path, times: str) -> None:
    """Nothing is wrong with what lies on the disk, nor with what one of them has read."""
    mesh, load, left = sharding.mesh(), _checkpoints.load, iter(range(0 if distributed.first() else int(times)))

    def wrongly(*given: Any) -> Any:
        loaded = load(*given)
        return loaded if next(left, None) is None else {**loaded, "params": {"w": changed(loaded["params"]["w"])}}

    with checkpoint.Checkpoints(path, {}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(jax.device_put(state_at(step, mesh), sharding.replicated(mesh)))
        with mock.patch.object(_checkpoints, "load", wrongly):
            state = checkpoints.restore(jax.device_put(state_at(0, mesh), sharding.replicated(mesh)))
        print(json.dumps([state and int(state.step), sorted(file.name for file in path.iterdir())]))


def damaged(path: Path) -> None:
    mesh = sharding.mesh()
    with checkpoint.Checkpoints(path, {}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_at(step, mesh))
    if distributed.first():
        for file in (path / "2" / "params" / "ocdbt.process_1" / "d").iterdir():  # what the other process wrote
            file.write_bytes(bytes(file.stat().st_size))
        manifest = path / "2" / "jaxlm.json"
        content = json.loads(manifest.read_text())
        content["files"] = {}  # so that it is only seen when it is loaded
        del content["checksum"]
        manifest.write_text(files.signed(content))
    distributed.exchange("damaged")
    with checkpoint.Checkpoints(path, {}) as checkpoints:
        state = checkpoints.restore(state_at(0, mesh))
        assert state is not None
        print(json.dumps([int(state.step), fingerprints(state) == fingerprints(state_at(1, mesh))]))
        checkpoints.save(state_at(2, mesh))
    print(json.dumps(sorted(file.name for file in path.iterdir())))


def often(path: Path) -> None:
    """Right after a save they exchange something, which doesn't wait for it as a step that takes the state does."""
    mesh = sharding.mesh()
    with checkpoint.Checkpoints(path, {}) as checkpoints:
        for step in range(1, 61):
            checkpoints.save(state_at(step, mesh))
            assert distributed.exchange(step) == [step, step]


def main(where: str, processes: str, process: str, folder: str, what: str, *about: str) -> None:
    distributed.start((where, int(processes), int(process)))
    does = {f.__name__: f for f in (damaged, misread, full, fails, differs, often, call)}
    with distributed.leaving_together():
        does[what](Path(folder), *about)


if __name__ == "__main__":
    main(*sys.argv[1:])
