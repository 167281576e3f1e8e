"""The same decoder and training step as one writes them first in JAX: one file, no thought of how it compiles.

Products of `[B T D]` with matrices, a Python list of layers, attention by einsum with a mask of minus infinities,
optax's cross-entropy and chain, `jax.jit` without donation.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

MATRICES = {
    "wq": "attention/q/kernel",
    "wk": "attention/k/kernel",
    "wv": "attention/v/kernel",
    "wo": "attention/o/kernel",
    "w_gate": "feed_forward/gate/kernel",
    "w_up": "feed_forward/up/kernel",
    "w_down": "feed_forward/down/kernel",
    "norm1": "attention_norm/scale",
    "norm2": "feed_forward_norm/scale",
}


def load_params(weights: Mapping[str, np.ndarray], layers: int) -> dict[str, Any]:
    blocks = [{k: jnp.asarray(weights[f"blocks/{name}"][i]) for k, name in MATRICES.items()} for i in range(layers)]
    embed, norm, head = (jnp.asarray(weights[name]) for name in ("embed", "norm/scale", "head/kernel"))
    return {"embed": embed, "blocks": blocks, "norm": norm, "head": head}


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 / jnp.sqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-6)
    return normed.astype(x.dtype) * scale


def rotary(x: jax.Array) -> jax.Array:
    length, width = x.shape[1], x.shape[3]
    angles = jnp.arange(length)[:, None] * 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(p: dict[str, jax.Array], x: jax.Array, heads: int) -> jax.Array:
    batch, length, width = x.shape
    q, k, v = ((x @ p[name]).reshape(batch, length, heads, width // heads) for name in ("wq", "wk", "wv"))
    q, k = rotary(q), rotary(k)
    scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) / jnp.sqrt(width // heads)
    mask = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(mask[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, width) @ p["wo"]


def feed_forward(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ p["w_gate"]) * (x @ p["w_up"])) @ p["w_down"]


def model(params: dict[str, Any], tokens: jax.Array, heads: int) -> jax.Array:
    x = params["embed"][tokens]
    for p in params["blocks"]:
        x = x + attention(p, rms_norm(x, p["norm1"]), heads)
        x = x + feed_forward(p, rms_norm(x, p["norm2"]))
    return (rms_norm(x, params["norm"]) @ params["head"]).astype(jnp.float32)


def loss_fn(params: dict[str, Any], tokens: jax.Array, heads: int, dtype: str) -> jax.Array:
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    logits = model(params, tokens, heads)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def make_step(optimizer: optax.GradientTransformation, heads: int, dtype: str) -> Callable[..., Any]:
    @jax.jit
    def step(params: Any, opt_state: optax.OptState, tokens: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(partial(loss_fn, heads=heads, dtype=dtype))(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, optax.global_norm(grads)

    return step


def train(workload: Any, hyper: Any, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[Any, Any]]:
    """Yields the loss and the norm of the gradient of each step."""
    params = load_params(weights, workload.layers)
    decayed = jax.tree.map(lambda p: p.ndim == 2, {**params, "embed": params["norm"]})
    optimizer = optax.chain(
        optax.clip_by_global_norm(hyper.max_norm),
        optax.adamw(
            hyper.learning_rate, hyper.b1, hyper.b2, hyper.epsilon, weight_decay=hyper.weight_decay, mask=decayed
        ),
    )
    step, opt_state = make_step(optimizer, workload.heads, workload.dtype), optimizer.init(params)
    for tokens in workload.batches():
        params, opt_state, loss, grad_norm = step(params, opt_state, jnp.asarray(tokens, jnp.int32))
        yield loss, grad_norm
