"""Where a computation first makes a NaN."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

CALLED: Final = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""The parameters of operations that hold a function to call."""
WHOLE: Final = "scan", "shard_map", "pallas_call"
"""Operations that aren't looked into in `_evaluate`, though they hold such a function."""
OURS: Final = ("/jax/", "/jaxlib/")
"""Parts of the paths of JAX's own files, which say nothing about where a user's line is."""


def first_nan(function: Callable[..., Any], *arguments: Any) -> str | None:
    """The first operation that makes a NaN of numbers that are none; None if the results have none.

    Unlike `jax.debug_nans` it finds the place inside loops, and everything is compiled. Where a NaN that `jnp.where`
    leaves out comes first, that is what is found: its gradient may be the NaN in the results.

    Args:
        function: pure, such as `jax.value_and_grad(...)`. What it calls in `jax.shard_map`, `jax.lax.while_loop` and
            `cond`, or in a kernel of Pallas's, counts as one operation.
        arguments: what to call it with.

    Returns:
        The operation, the iterations of the loops (`jax.lax.scan`) that it is in, and the line of the program that
        asked for it, as in "log, iteration 3 of 12, model.py:50".

    >>> first_nan(lambda x: jnp.sum(jnp.sqrt(x)), jnp.array([1.0, -1.0])).partition(",")[0]
    'sqrt'
    """
    program = jax.make_jaxpr(function)(*arguments)
    return _first(program, jax.tree.leaves(arguments), "")


def _first(program: ClosedJaxpr, values: Sequence[Any], where: str) -> str | None:
    if _any_nan(values):
        return f"{where.removeprefix(', ')} begins with a NaN" if where else "the arguments have a NaN"
    if not _any_nan(jax.jit(jaxpr_as_fun(program))(*values)):
        return None
    operations: list[Any] = []

    @jax.jit
    def look(values: Sequence[Any]) -> tuple[jax.Array, list[list[Any]]]:
        """Which operations made a NaN, and what the loops among them were given."""
        operations.clear()
        made: list[jax.Array] = []
        given: list[list[Any]] = []

        def note(operation: Any, made_one: jax.Array, inputs: list[Any]) -> None:
            operations.append(operation)
            made.append(made_one)
            given.append(inputs if operation.primitive.name == "scan" else [])

        _evaluate(program, values, [_any_nan([x]) for x in values], note)
        return jnp.stack(made), given

    made, given = look(values)
    index = int(made.argmax())
    operation = operations[index]
    name = operation.primitive.name
    return _in_loop(operation, given[index], where) if name == "scan" else f"{name}{where}{_line(operation)}"


def _in_loop(operation: Any, values: Sequence[Any], where: str) -> str | None:
    body: Any = operation.params["jaxpr"]
    length: int = operation.params["length"]
    # What is stacked has a dimension more outside than in the body. Names of the numbers differ among JAX's versions.
    end = sum(x.ndim == aval.ndim for x, aval in zip(values, body.in_avals, strict=True))
    carried = sum(x.aval.ndim == aval.ndim for x, aval in zip(operation.outvars, body.out_avals, strict=True))
    consts, carry, xs = values[: end - carried], values[end - carried : end], values[end:]
    step = jax.jit(jaxpr_as_fun(body))
    for index in reversed(range(length)) if operation.params["reverse"] else range(length):
        inputs = [*consts, *carry, *(x[index] for x in xs)]
        outputs = step(*inputs)
        if _any_nan(outputs):
            return _first(body, inputs, f"{where}, iteration {index} of {length}")
        carry = outputs[:carried]
    return None


def _evaluate(
    program: ClosedJaxpr, values: Sequence[Any], nans: Sequence[jax.Array], note: Callable[..., None]
) -> tuple[list[Any], list[jax.Array]]:
    """The results of a traced program and whether each has a NaN.

    `note(operation, whether it made a NaN, inputs)` is called for each operation.
    """
    jaxpr, no = program.jaxpr, jnp.zeros((), bool)
    known = dict(zip(jaxpr.constvars, ((x, no) for x in program.consts), strict=True))
    known |= zip(jaxpr.invars, zip(values, nans, strict=True), strict=True)

    def read(x: Any) -> tuple[Any, jax.Array]:
        return (x.val, no) if hasattr(x, "val") else known[x]

    for operation in jaxpr.eqns:
        inputs, before = _columns(map(read, operation.invars))
        name = operation.primitive.name
        inner = next((operation.params[x] for x in CALLED if x in operation.params), None)
        if inner is not None and name not in WHOLE and _takes(inner, inputs):
            inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            outputs, after = _evaluate(inner, inputs, before, note)
        else:
            parameters = operation.primitive.get_bind_params(operation.params)
            outputs = operation.primitive.bind(*inputs, **parameters)
            outputs = outputs if operation.primitive.multiple_results else [outputs]
            after = [_any_nan([x]) for x in outputs]
            note(operation, _any(after) & ~_any(before), inputs)
        known |= zip(operation.outvars, zip(outputs, after, strict=True), strict=True)
    return _columns(map(read, jaxpr.outvars))


def _takes(program: Any, values: Sequence[Any]) -> bool:
    """Whether it is called with just these, as that of a kernel, which is called with parts of them, isn't."""
    inputs = getattr(program, "jaxpr", program).invars
    return [(x.shape, x.dtype) for x in map(jax.typeof, values)] == [(x.aval.shape, x.aval.dtype) for x in inputs]


def _columns(pairs: Iterable[tuple[Any, jax.Array]]) -> tuple[list[Any], list[jax.Array]]:
    rows = list(pairs)
    return [value for value, _ in rows], [nan for _, nan in rows]


def _any(flags: Sequence[jax.Array]) -> jax.Array:
    return jnp.any(jnp.stack(flags)) if flags else jnp.zeros((), bool)


def _any_nan(values: Sequence[Any]) -> jax.Array:
    return _any([jnp.any(jnp.isnan(x)) for x in values if jnp.issubdtype(jnp.result_type(x), jnp.inexact)])


def _line(operation: Any) -> str:
    traced = operation.source_info
    frames = traced.traceback.frames if traced.traceback else []
    own = [f"{frame.file_name}:{frame.line_num}" for frame in frames if not any(x in frame.file_name for x in OURS)]
    backward = ["in the backward pass"] if "transpose" in str(traced.name_stack) else []
    return "".join(f", {part}" for part in [*backward, *own[:1]])
