"""What is measured: jaxlm's own step, as an experiment puts it together."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from workloads import Hyperparameters, Workload

from jaxlm import grads, losses, models, precision, tree
from jaxlm import train as training

MICROBATCHES = 4


def model(workload: Workload) -> tuple[Any, Any]:
    """The model as `(init, apply)`."""
    fields = {field.name for field in dataclasses.fields(models.TransformerConfig)}
    shape = {name: value for name, value in dataclasses.asdict(workload).items() if name in fields}
    return models.transformer(models.TransformerConfig(**shape), unroll=True)


def initial_weights(workload: Workload) -> dict[str, np.ndarray]:
    """The weights that all contestants start from, by name."""
    init, _ = model(workload)
    return {name: np.asarray(leaf) for name, leaf in tree.named_leaves(init(jax.random.key(0))).items()}


def train_in_microbatches(
    workload: Workload, hyper: Hyperparameters, weights: Mapping[str, np.ndarray]
) -> Iterator[tuple[Any, Any]]:
    """The same, with each batch cut into pieces whose gradients add up: less memory, and on a CPU more of it cached."""
    return train(workload, hyper, weights, MICROBATCHES)


def train(
    workload: Workload, hyper: Hyperparameters, weights: Mapping[str, np.ndarray], microbatches: int = 1
) -> Iterator[tuple[Any, Any]]:
    """Yields the loss and the norm of the gradient of each step."""
    init, apply = model(workload)
    shapes = jax.eval_shape(init, jax.random.key(0))
    leaves = [jnp.asarray(weights[name]) for name in tree.named_leaves(shapes)]
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    loss_fn = precision.compute_in(workload.dtype, losses.next_token(apply))
    grad_fn = grads.accumulate(jax.value_and_grad(loss_fn, has_aux=True), microbatches)
    optimizer = optax.chain(
        optax.clip_by_global_norm(hyper.max_norm),
        optax.adamw(
            hyper.learning_rate,
            hyper.b1,
            hyper.b2,
            hyper.epsilon,
            weight_decay=hyper.weight_decay,
            mask=tree.labels(params, {".*kernel": True, ".*": False}),
        ),
    )
    state = training.start(params, optimizer)
    lengths = np.full(workload.rows, workload.length, np.int32)
    spec = {
        "tokens": jax.ShapeDtypeStruct((workload.rows, workload.length), jnp.uint16),
        "lengths": jax.ShapeDtypeStruct(lengths.shape, lengths.dtype),
    }
    step = training.compile_step(training.make_step(grad_fn, optimizer, jax.random.key(1)), state, [spec])
    batches = ({"tokens": tokens, "lengths": lengths} for tokens in workload.batches())
    for _, metrics in training.fit(step, state, batches):
        yield metrics["loss"], metrics["grad_norm"]
