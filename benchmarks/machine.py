"""The machine that a benchmark runs on: what it is, what else it does, how it hands out memory."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

HUGE_PAGES: Final = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Transparent huge pages for what malloc hands out: XLA's CPU client asks for its temporary memory anew each step."""


def environment(*, huge_pages: bool) -> dict[str, str]:
    """This process's variables, with huge pages or with malloc left alone."""
    variables = {name: value for name, value in os.environ.items() if name not in HUGE_PAGES}
    return variables | HUGE_PAGES if huge_pages else variables


def restart(*, on_cpu: bool, huge_pages: bool = True) -> None:
    """Starts this program again, if its environment is another: malloc and JAX read theirs when a process starts."""
    variables = environment(huge_pages=huge_pages) | ({"JAX_PLATFORMS": "cpu"} if on_cpu else {})
    if variables != dict(os.environ):
        os.execve(sys.executable, sys.orig_argv, variables)


def device() -> str:
    """The name of what JAX computes on."""
    import jax  # not where the module begins: some of what imports it leaves JAX to other processes

    return processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def busy_seconds() -> float:
    """What all processes together have used of all cores; 0 where the system doesn't tell."""
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, ticks[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def about(device: str, packages: Sequence[str]) -> dict[str, Any]:
    """How and where figures are measured, to be kept with them."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "cores": os.cpu_count(),
        "versions": versions(packages),
    }


def file_name(*parts: str) -> str:
    """Parts joined to a name in small letters, digits and hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in " ".join(parts).lower()).split())
