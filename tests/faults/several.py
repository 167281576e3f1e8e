"""What each of two processes does: HOST:PORT, how many, which, a folder. They save, one is damaged, they restore."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import checkpoint, distributed, sharding
from jaxlm.fingerprint import fingerprints
from jaxlm.types import TrainState


def state_at(step: int, mesh: jax.sharding.Mesh) -> TrainState:
    def make() -> TrainState:
        w, m = jax.random.normal(jax.random.key(step), (2, 512, 64))
        return TrainState(jnp.asarray(step, jnp.int32), {"w": w}, {"m": m})

    whole, divided = sharding.replicated(mesh), NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(make, out_shardings=TrainState(whole, {"w": divided}, {"m": divided}))()


def main(where: str, processes: str, process: str, folder: str) -> None:
    distributed.start((where, int(processes), int(process)))
    with distributed.leaving_together():
        mesh, path = sharding.mesh(), Path(folder)
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
            manifest.write_text(checkpoint._folder._dump(content))
        distributed.exchange("damaged")
        with checkpoint.Checkpoints(path, {}) as checkpoints:
            state = checkpoints.restore(state_at(0, mesh))
            assert state is not None
            print(json.dumps([int(state.step), fingerprints(state) == fingerprints(state_at(1, mesh))]))
            checkpoints.save(state_at(2, mesh))
        print(json.dumps(sorted(file.name for file in path.iterdir())))


if __name__ == "__main__":
    main(*sys.argv[1:])
