"""What a layer keeps for the backward pass; the rest is computed again."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax
from jax import checkpoint_policies as policies

T = TypeVar("T")

BLOCKS: Final = "attention", "feed_forward"
"""The names that a block gives to what its two parts return."""


def remat(name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Computes a layer again for the backward pass, but for what the name says (https://arxiv.org/abs/1604.06174).

    | name        | kept of each layer, beside its input                                                         |
    |-------------|----------------------------------------------------------------------------------------------|
    | `"none"`    | all that its derivatives need: nothing is computed again                                     |
    | `"dots"`    | the outputs of products with weights; attention's own products are computed again            |
    | `"blocks"`  | what attention returns (and feed-forward, where it is needed: in a sum, as here, it isn't)   |
    | `"offload"` | the same, in pinned host memory                                                              |
    | `"full"`    | nothing                                                                                      |

    XLA:CPU has one memory, where `"offload"` is `"blocks"`. It also orders unrolled layers for speed, not memory:
    there, unrolled, none of them saves much.

    Args:
        name: one of these.

    Returns:
        A wrapper of the function `layer(params, *args)`: what `models.transformer` takes as `wrap_layer`.

    Raises:
        ValueError: another name, or `"offload"` where the default backend has no pinned host memory.

    >>> int(remat("full")(lambda params, x: params * x)(2, 3))
    6
    """
    policy = remat_policy(name)
    return (lambda layer: layer) if policy is None else (lambda layer: jax.checkpoint(layer, policy=policy))


def remat_policy(name: str) -> Callable[..., Any] | None:
    """The same for `grads.gather_layers(..., policy=)`, which then keeps no gathered parameters either.

    Args:
        name: as for `remat`.

    Raises:
        ValueError: as `remat` does.
    """
    known: dict[str, Callable[..., Any] | None] = {
        "none": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "blocks": policies.save_only_these_names(*BLOCKS),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(BLOCKS),
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "full": policies.nothing_saveable,
    }
    if name not in known:
        raise ValueError(f"remat: unknown name {name!r}; use one of {', '.join(known)}")
    if name == "offload":
        device = jax.local_devices()[0]
        kinds = [memory.kind for memory in device.addressable_memories()]
        if "pinned_host" not in kinds:
            raise ValueError(
                f"remat: 'offload' needs pinned_host memory, but {device.platform} has only {kinds}; use 'blocks'"
            )
    return known[name]
