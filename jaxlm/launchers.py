"""Who starts the processes of a run, as far as JAX finds that out by itself, and where those of one machine listen."""

import functools
import os
from typing import Any

import jax

# What JAX's own detection reads of each launcher.
OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")  # the second one is an indexed job's alone


def started_with_others() -> bool:
    """Whether JAX will find a launcher that started more than this one process."""
    has = os.environ.keys()
    if has >= set(OPEN_MPI):
        return int(os.environ["OMPI_COMM_WORLD_SIZE"]) > 1
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        raise ValueError("start: JAX doesn't find the others under this Open MPI; give join")
    if has >= set(SLURM):  # an interactive shell has the tasks of its whole job, but is alone in its step
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ["SLURM_NTASKS"])) > 1
    if "TPU_ML_PLATFORM" in has:  # JAX sets it where it sees TPUs
        hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
        if hosts is None:
            return "TPU_SKIP_MDS_QUERY" not in has
        return "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES", 1)) > 1
    return has >= set(KUBERNETES)


def let_collectives_listen_on(address: str, client: Any) -> None:
    """Keeps Gloo and NCCL inside this machine, where JAX would let them listen where the machine's name leads.

    It has no setting for that, and so this is private to it.

    Args:
        address: of this machine.
        client: JAX's connection to the service in process 0.
    """
    from jax._src import xla_bridge  # pyright: ignore[reportPrivateUsage]
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    config: Any = jax.config
    if config.jax_cpu_collectives_implementation == "gloo":
        gloo = _jax.make_gloo_tcp_collectives(distributed_client=client, hostname=address)
        make = functools.partial(xla_bridge.make_cpu_client, collectives=gloo)
        xla_bridge.register_backend_factory("cpu", make, priority=0, fail_quietly=False)
