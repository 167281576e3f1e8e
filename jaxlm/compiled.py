"""Functions of a batch, compiled ahead of time for each shape of batch that will come."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxlm.types import Batch, Static


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A function of `(first, batch)` that exists for some shapes of batch and no other."""

    programs: Mapping[str, Callable[[Any, Batch], Any]]

    def __call__(self, first: Any, batch: Batch, /) -> Any:
        program = self.programs.get(signature(batch))
        if program is None:
            raise ValueError(
                f"nothing was compiled for a batch of {signature(batch)}, only for {sorted(self.programs)}"
            )
        return program(first, batch)


def compile_for(
    function: Callable[[Any, Batch], Any],
    first: Any,
    batches: Iterable[Batch],
    *,
    donate: bool = False,
) -> Compiled:
    """Compiles `function(first, batch)` for every shape of batch, so that nothing is compiled later.

    Args:
        function: a pure function.
        first: its first argument, or the shapes and shardings of it.
        batches: one batch of each shape, or its shapes and shardings.
        donate: let the results overwrite `first`; the first of two is like it, and comes to lie on devices as it does.
    """
    jitted = donating(function, first) if donate else jax.jit(function)
    return Compiled({signature(batch): jitted.lower(first, batch).compile() for batch in batches})


def donating(function: Callable[[Any, Batch], Any], first: Any) -> Any:
    """`function` jitted such that its results overwrite its first argument; the first result lies as that does."""
    shardings = jax.tree.map(lambda x: x.sharding if getattr(x, "committed", True) else None, first)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, None))


def signature(batch: Batch) -> str:
    """What programs are told apart by, and what a message shows: `lengths int32[16], tokens uint16[16,256]`."""
    return ", ".join(
        f"{name} {x}" if isinstance(x, Static) else f"{name} {x.dtype.name}{list(x.shape)}"
        for name, x in sorted(batch.items())
    )
