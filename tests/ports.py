"""Where processes of a test can meet, and what they have around them."""

import os
import socket

LAUNCHERS = ("OMPI_", "SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_", "JAX_")


def clean_environment(**variables: str) -> dict[str, str]:
    """This process' own, without what a launcher or `conftest` says, on CPUs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith((*LAUNCHERS, "NPROC"))}
    return kept | {"JAX_PLATFORMS": "cpu"} | variables


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]
