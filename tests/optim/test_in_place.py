"""Updates are written in place: with a temporary as large as all parameters they take 2 to 4 times as long on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxlm import optim

PARAMS = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(512, 1024), (1024, 512), (2048, 256), (512,)]]
IN_PLACE = {
    "lion": optim.lion(1e-3, weight_decay=0.1),
    "lamb": optim.lamb(1e-3, weight_decay=0.1),
    "adafactor": optim.adafactor(1e-3, weight_decay=0.1),
    "adafactor_momentum": optim.adafactor(1e-3, momentum=0.9),
    "clip_adamw": optax.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_no_temporary_is_of_the_size_of_a_leaf(name: str):
    tx = IN_PLACE[name]

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, PARAMS)
    memory = jax.jit(update, donate_argnums=(0, 1)).lower(PARAMS, state, PARAMS).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 512 * 1024 / 10
