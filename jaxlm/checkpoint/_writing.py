"""How arrays are written while a run goes on, and how Orbax tells that the disk fails."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxlm import files
from jaxlm.checkpoint._folder import Json
from jaxlm.checkpoint._reading import causes
from jaxlm.fingerprint import begin_fingerprints, compile_fingerprints, read_fingerprints
from jaxlm.tree import named_leaves


def begin(path: Path, parts: Json) -> Callable[[], dict[str, str]]:
    """Begins to write arrays into a folder, which may be donated then.

    Where all are arrays on CPUs of this process alone, it takes a copy and leaves Orbax, which takes longer, to what it
    returns. Of several processes not: Orbax has collectives then, and those that two threads begin have no order; so
    have fingerprints of several devices.

    Returns:
        What waits until they are written, and returns their fingerprints; it raises a FloatingPointError if a parameter
        isn't finite. It may be called in another thread.
    """
    devices = _host_devices(parts)
    copies = [_copied(parts) if devices else parts]
    sums = _sums(copies[0]) if len(devices) != 1 else ()

    def write() -> tuple[Any, Any]:
        own = copies.pop()  # which goes as soon as Orbax has begun
        context = ocp.Context()
        # Writes into the folder itself: what it is worth is told by its name.
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        with context:
            return ocp.save_checkpointables_async(str(path), own), sums or _sums(own)

    begun = None if devices else write()

    def end() -> dict[str, str]:
        response, (prints, finite) = begun or write()
        _wait(response)
        if wrong := [name for name, fine in jax.device_get(finite).items() if not fine]:
            raise FloatingPointError(f"{len(wrong)} of the parameters aren't finite, {wrong[0]} first")
        return read_fingerprints(prints)

    return end


def _sums(parts: Json) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The fingerprints of all leaves, and whether parameters are finite, as arrays that devices have yet to compute."""
    return begin_fingerprints(parts), _finite(parts["params"])


@jax.jit
def _finite(params: Any) -> dict[str, jax.Array]:
    floats = {n: x for n, x in named_leaves(params).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    # Not by the largest of them, which is faster: the maximum over several devices forgets NaN.
    return {name: jnp.isfinite(x).all() for name, x in floats.items()}


def _host_devices(parts: Json) -> set[Any]:
    """The devices that hold them, where all is in the memory of this process alone; else none."""
    shardings: list[Any] = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(parts)]
    if jax.process_count() > 1 or None in shardings:
        return set()
    devices = {device for sharding in shardings for device in sharding.device_set}
    return devices if {device.platform for device in devices} == {"cpu"} else set()


@jax.jit
def _copied(parts: Json) -> Json:
    return jax.tree.map(jnp.copy, parts)


def compile_ahead(parts: Json) -> None:
    """Compiles what would hold up the first save of a state, or of shapes with shardings, as `parts` is."""
    compile_fingerprints(parts)
    _finite.lower(parts["params"]).compile()
    if _host_devices(parts):
        _copied.lower(parts).compile()


def _wait(response: Any) -> None:
    """Waits for Orbax. Of several processes one that fails must say so: Orbax would first wait for the others."""
    saved = getattr(getattr(response, "_thread_runner", None), "_future", None)  # private: nothing else tells
    if jax.process_count() > 1 and saved is not None and (error := saved.exception()):
        raise error
    response.result()


def disk_error(error: BaseException) -> OSError | None:
    """What the disk has to do with an error, which Orbax and TensorStore tell in many ways; None: nothing."""
    for cause in causes(error):
        if isinstance(cause, OSError) and not isinstance(cause, TimeoutError | ConnectionError):
            code = cause.errno or errno.EIO
            return OSError(code, os.strerror(code))
        for code, text in files.DISK_ERRORS.items():
            if text in str(cause):
                return OSError(code, text)
    return None
