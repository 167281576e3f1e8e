"""Which arrays are computed in which precision, as wrappers of `LossFn`."""

import jax
import jax.numpy as jnp

from jaxlm.types import Aux, Batch, LossFn, Params


def compute_in(dtype: jax.typing.DTypeLike, loss_fn: LossFn) -> LossFn:
    """Computes a loss with its parameters rounded to `dtype`; their masters and gradients keep their own precision.

    jaxlm's models compute in the dtype of their parameters, but for norms, rotary positions, softmax, logits and the
    loss, which are float32 always.

    Args:
        dtype: `jnp.bfloat16` on accelerators. float16 needs loss scaling, which this doesn't do.
        loss_fn: any loss function.

    Raises:
        ValueError: float16 or no floating point type.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise ValueError(f"compute_in: {jnp.dtype(dtype).name} is neither bfloat16 nor float32; use one of these")

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def computed(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        return loss_fn(jax.tree.map(cast, params), batch, key)

    return computed
