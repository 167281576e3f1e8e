"""Devices that aren't here, to compile for: H100s and TPUs. `make audit` installs what that takes."""

import os
from pathlib import Path
from typing import Any

# Before jax starts: nothing here runs on an accelerator, and kernels can't be timed to choose among them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}

from jax.experimental import topologies


def h100s(hosts: int, each: int = 8) -> list[Any]:
    """So many hosts with so many H100s each."""
    description = (Path(__file__).parent / "devices" / "h100.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=description, topology=f"1x{hosts}x{each}"
    ).devices


def tpus(topology: str) -> list[Any]:
    """A slice, such as `v5e:2x4` or `v5p:8x8x16`."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
