"""Which arrays are computed in which precision, as wrappers of `LossFn` and as the product of a model's layers.

| array                                                                  | dtype                        |
|------------------------------------------------------------------------|------------------------------|
| parameters, their gradients outside the loss, optimizer state          | float32 (masters)            |
| matrix products: operands                                              | the compute dtype            |
| residual stream, activations between layers                            | the compute dtype            |
| embedding lookup, so that gradients of a frequent token add up         | float32                      |
| norms, rotary angles and turns                                         | float32                      |
| attention's scores, softmax and its sums                               | float32                      |
| logits, log Z, loss, weights, metrics; the output matrix's gradient    | float32                      |
| scalars: learning rate, loss scale, norms, a router's scores if any    | float32                      |
| sums over microbatches and devices, norms of gradients                 | float32                      |

This is what jaxlm's models and losses do of themselves when their parameters come in the compute dtype. With
`product_in` two of the three products of each linear layer have operands of 8 bits; all else is as above.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import tree
from jaxlm.optional import optional
from jaxlm.types import Aux, Batch, LossFn, Params


def compute_in(dtype: jax.typing.DTypeLike, loss_fn: LossFn) -> LossFn:
    """Computes a loss with its parameters rounded to `dtype`; their masters and gradients keep their own precision.

    What is float32 all the same is in the table of this module. float16 comes with `scale_loss`.

    Args:
        dtype: `jnp.bfloat16` or, where there is none, `jnp.float16`; `jnp.float32` changes nothing.
        loss_fn: any loss function.

    Raises:
        ValueError: another type.
    """
    allowed = jnp.float32, jnp.bfloat16, jnp.float16
    if jnp.dtype(dtype) not in map(jnp.dtype, allowed):
        raise ValueError(
            f"compute_in: {jnp.dtype(dtype).name} is none of {', '.join(jnp.dtype(x).name for x in allowed)}; use one"
        )

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def computed(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        return loss_fn(jax.tree.map(cast, params), batch, key)

    return scale_loss(computed) if jnp.dtype(dtype) == jnp.float16 else computed


def scale_loss(loss_fn: LossFn) -> LossFn:
    """Computes gradients times a scale, lest they underflow float16 (https://arxiv.org/abs/1710.03740, section 3.2).

    Only between the loss and the parameters: what comes out are the true loss and, for parameters in float32, true
    gradients, divided as soon as they are float32. Those of parameters that come in float16 stay scaled, for
    `grads.data_parallel(..., dtype=jnp.float16)` to divide. Scales are powers of two, which change no digit.

    Returns:
        A loss function that takes the scale as a fourth argument. `train.make_step` gives it what the optimizer has
        found, `optim.dynamic_loss_scale`. For a loss alone there is no need of it.

    Raises:
        ValueError: when traced: the gradient is asked for without a scale.
    """

    def scaled(
        params: Params, batch: Batch, key: jax.Array, loss_scale: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        def true(x: jax.Array) -> jax.Array:
            wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != jnp.float16
            return _gradient_times(x, None if loss_scale is None else 1 / loss_scale) if wide else x

        loss_sum, aux = loss_fn(jax.tree.map(true, params), batch, key)
        return _gradient_times(loss_sum, loss_scale), aux

    return scaled


@jax.custom_vjp
def _gradient_times(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    del factor
    return x


def _gradient_times_forward(x: jax.Array, factor: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if factor is None:
        raise ValueError(
            "scale_loss: a gradient in float16 without a loss scale; wrap the optimizer in optim.dynamic_loss_scale, "
            "from which train.make_step passes it on, or compute in bfloat16"
        )
    return x, factor


def _gradient_times_backward(factor: jax.Array, grad: jax.Array) -> tuple[Any, None]:
    return (grad * factor).astype(grad.dtype), None


_gradient_times.defvjp(_gradient_times_forward, _gradient_times_backward)


def product_in(dtype: jax.typing.DTypeLike) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A product of 8-bit operands for linear layers, `models.transformer(config, product=product_in(jnp.int8))`.

    As in SwitchBack (https://arxiv.org/abs/2304.13013, algorithm 1) the output and the input's gradient are products
    of 8 bits, the kernel's gradient, a sum over all tokens, is not. Each token's vector has a scale of its own, its
    largest magnitude, and so has each row or column of the kernel. So what comes out for a token doesn't depend on the
    others in its batch, and sums stay what they are however batches are cut. float8 takes gradients in `float8_e5m2`
    (https://arxiv.org/abs/2209.05433, section 3). Quantized by qwix, of the extra `quantized`.

    Args:
        dtype: of operands, `jnp.int8` or `jnp.float8_e4m3fn`. CPUs take both, and gain nothing.

    Returns:
        `product(x [N I], kernel [I O]) -> [N O]`, of `x`'s type, to be used like `jnp.matmul`.

    Raises:
        ValueError: another type, or float8 where the default device has no products of it.
        ImportError: qwix isn't installed.
    """
    gradients = {jnp.dtype(jnp.int8): jnp.int8, jnp.dtype(jnp.float8_e4m3fn): jnp.float8_e5m2}
    if jnp.dtype(dtype) not in gradients:
        names = " or ".join(x.name for x in gradients)
        raise ValueError(f"product_in: {jnp.dtype(dtype).name} is not {names}; use one, or compute_in for wider types")
    if jnp.dtype(dtype) == jnp.float8_e4m3fn and not _has_float8(jax.devices()[0]):
        raise ValueError(f"product_in: {jax.devices()[0].device_kind} has no products in float8; use jnp.int8")
    qwix = optional("qwix", "quantized")

    # In int8 the largest becomes 127. Left alone, qwix makes it 127.5, and its last digit decides which way it goes.
    largest = "absmax" if jnp.issubdtype(dtype, jnp.floating) else f"absmax,{127.5 / 127}"

    def quantized(x: jax.Array, to: jax.typing.DTypeLike, axis: int) -> Any:
        """With a scale for each index along `axis`."""
        return qwix.quantize(x.astype(jnp.float32), to, channelwise_axes=[axis], calibration_method=largest)

    def output(x: jax.Array, kernel: jax.Array) -> jax.Array:
        operands = quantized(x, dtype, 0), quantized(kernel, dtype, 1)
        return qwix.dot_general(*operands, (((1,), (0,)), ((), ()))).astype(x.dtype)

    def backward(operands: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = operands
        narrow = quantized(grad, gradients[jnp.dtype(dtype)], 0), quantized(kernel, dtype, 0)
        input_grad = qwix.dot_general(*narrow, (((1,), (1,)), ((), ())))
        return input_grad.astype(x.dtype), (x.T @ grad).astype(kernel.dtype)

    product = jax.custom_vjp(output)
    product.defvjp(lambda x, kernel: (output(x, kernel), (x, kernel)), backward)
    return lambda x, kernel: product(*tree.vary_alike(x, kernel))


def _has_float8(device: Any) -> bool:
    """GPUs have from Ada (8.9) on, TPUs from the seventh generation on; CPUs convert, which is enough for tests."""
    if device.platform == "gpu":
        return tuple(map(int, re.findall(r"\d+", device.compute_capability))) >= (8, 9)
    return device.platform != "tpu" or int(re.findall(r"\d+", device.device_kind)[0]) >= 7
