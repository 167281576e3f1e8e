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
from jaxlm.fingerprint import begin_fingerprints, copies_agree, read_fingerprints


def begin(path: Path, parts: Json) -> Callable[[], dict[str, str]]:
    """Begins to write arrays into a folder, which may be donated then.

    Where all lies in the host's memory on one device, it takes a copy and leaves the rest, which takes longer, to what
    it returns. Elsewhere not: collectives that two threads begin have no order.

    Returns:
        What waits until they are written, and returns their fingerprints. It may be called in another thread.
    """
    copy = _copied_alone(parts)
    if copy is None:
        return _begin(path, parts)
    copies = [copy]
    return lambda: _begin(path, copies.pop())()  # which needs it no longer once it has begun


def _begin(path: Path, parts: Json) -> Callable[[], dict[str, str]]:
    sums = begin_fingerprints(parts)
    context = ocp.Context()
    # Writes into the folder itself: what it is worth is told by its name.
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    with context:
        response = ocp.save_checkpointables_async(str(path), parts)

    def end() -> dict[str, str]:
        _wait(response)
        return read_fingerprints(sums)

    return end


def _copied_alone(parts: Json) -> Json | None:
    leaves = jax.tree.leaves(parts)
    if jax.process_count() > 1 or not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return None
    devices = set[jax.Device]().union(*(leaf.devices() for leaf in leaves))
    return _copied(parts) if [device.platform for device in devices] == ["cpu"] else None


@jax.jit
def _copied(parts: Json) -> Json:
    return jax.tree.map(jnp.copy, parts)


def compile_ahead(parts: Json) -> None:
    """Compiles what would hold up the first save, but for fingerprints."""
    copies_agree(parts)
    _copied_alone(parts)


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
