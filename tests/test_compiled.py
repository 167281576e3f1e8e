from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compiled import Compiled, compile_for
from jaxlm.types import Batch


def batch_of(rows: int, dtype: Any = np.int32, name: str = "tokens") -> dict[str, np.ndarray]:
    return {name: np.arange(3 * rows, dtype=dtype).reshape(rows, 3)}


def count(first: jax.Array, batch: Batch) -> jax.Array:
    return first + jnp.sum(batch["tokens"])


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile_for(count, jnp.zeros((), int), [batch_of(1), batch_of(2)])


@pytest.mark.parametrize("rows", [1, 2])
def test_each_shape_runs_its_own_program(compiled: Compiled, rows: int):
    host = batch_of(rows)
    for batch in (host, jax.device_put(host)):
        assert compiled(jnp.asarray(4), batch) == 4 + host["tokens"].sum()


@pytest.mark.parametrize(
    "other",
    [batch_of(3), batch_of(1, np.uint16), batch_of(1, name="ids"), batch_of(1) | {"lengths": np.ones(1, np.int32)}, {}],
    ids=["shape", "dtype", "name", "more", "nothing"],
)
def test_other_batches_are_refused(compiled: Compiled, other: dict[str, np.ndarray]):
    with pytest.raises(ValueError, match=r"only for \['tokens int32\[1, 3\]', 'tokens int32\[2, 3\]'\]"):
        compiled(jnp.asarray(4), other)


def test_the_message_tells_what_came(compiled: Compiled):
    with pytest.raises(ValueError, match=r"for a batch of lengths int32\[1\], tokens uint16\[5, 3\],"):
        compiled(jnp.asarray(4), batch_of(5, np.uint16) | {"lengths": np.ones(1, np.int32)})


def test_the_function_is_traced_once_for_each_shape():
    traced = []

    def function(first: jax.Array, batch: Batch) -> jax.Array:
        traced.append(batch["tokens"].shape)
        return count(first, batch)

    program = compile_for(function, jnp.zeros((), int), iter([batch_of(1), batch_of(2)]))
    for rows in (1, 2, 1):
        program(jnp.asarray(rows), batch_of(rows))
    assert traced == [(1, 3), (2, 3)]


def test_shapes_suffice_to_compile():
    first, batch = jax.eval_shape(lambda: (jnp.zeros((), int), {"tokens": jnp.zeros((1, 3), int)}))
    assert compile_for(count, first, [batch])(jnp.asarray(4), batch_of(1)) == 7


@pytest.mark.parametrize("donate", [False, True])
def test_the_first_argument_is_donated_if_asked(donate: bool):
    first = jnp.zeros((), int)
    batch = jax.tree.map(jnp.asarray, batch_of(1))
    compile_for(lambda first, batch: (count(first, batch), None), first, [batch], donate=donate)(first, batch)
    assert (first.is_deleted(), batch["tokens"].is_deleted()) == (donate, False)
