"""Makers of `LossFn`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from jaxlm import tree
from jaxlm.numbers import is_whole
from jaxlm.types import Aux, Batch, LossFn, Metrics, Params


def next_token(
    apply: Callable[..., Any],
    *,
    chunk: int | None = None,
    z_loss: float | int = 0.0,
    label_smoothing: float | int = 0.0,
) -> LossFn:
    r"""Cross-entropy of each token given those before it in its document, in nats.

    $$\sum_{b,t} w_{bt} \left(\log Z_{bt} - (1-\epsilon) z_{bt,y_{bt}} - \frac{\epsilon}{V} \sum_v z_{btv}
    + \zeta \log^2 Z_{bt}\right), \qquad Z_{bt} = \sum_v e^{z_{btv}}, \quad y_{bt} = x_{b,t+1}$$

    with $w_{bt} = 1$ where position t and the next hold tokens of one document, else 0.

    In chunks, `[B T V]` never exists: the loss is made of the last hidden states and the output matrix, and its
    gradient along with it, as Liger does (https://arxiv.org/abs/2410.10989, section 3.2). The matrix's gradient adds up
    in float32, and is read and written once a chunk: on GPUs and TPUs use some thousand tokens.

    Args:
        apply: `apply(params, tokens [B T]) -> logits [B T V]`; for batches with `segments` it is called as
            `apply(params, tokens, segments=segments)` and must keep documents from seeing each other. Rows with
            `lengths` need no such thing: a causal model sees the padding at a row's end from no real position. For
            batches with `window` it gets `window=`, an int.
            For chunks it is called with `head=`, a function to return the result of in place of logits:
            `head(hidden [B T D], matrix [D V])`, as `models.transformer` does.
        chunk: the most tokens whose logits exist at a time on a device; None: all.
        z_loss: $\zeta$, which keeps log Z near 0: 1e-4 in PaLM (https://arxiv.org/abs/2204.02311, section 5).
        label_smoothing: $\epsilon$, what all tokens together get of the target's probability
            (https://arxiv.org/abs/1512.00567, section 7).

    Returns:
        A loss function; its metrics hold `accuracy`, and `z_loss`, that term's part of the loss, if there is one.

    Raises:
        ValueError: a chunk below 1, a negative `z_loss`, a `label_smoothing` outside 0 to 1, or (when traced) a chunk
            of more tokens than the batch has, or tokens that aren't integers.
    """
    if chunk is not None and not is_whole(chunk):
        raise ValueError(f"next_token: chunk is {chunk}; use a whole number of tokens, or None for all at once")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"next_token: z_loss is {z_loss}; use 0 or more, such as 1e-4")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"next_token: label_smoothing is {label_smoothing}; use 0 <= label_smoothing < 1")
    sums = partial(_sums, z_loss=z_loss, label_smoothing=label_smoothing)

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        del key
        inputs = _ids(batch, "inputs" if "inputs" in batch else "tokens")
        context = {"segments": batch["segments"]} if "segments" in batch else {}
        context |= {"window": batch["window"].value} if "window" in batch else {}
        targets, weights = next_tokens(batch)

        def known(vocab: int) -> Int[Array, "B T"]:
            """The targets, and no token where the input is none: a model takes that for its last."""
            return jnp.where(inputs < vocab, targets, inputs)

        if chunk is None:
            logits = apply(params, inputs, **context).astype(jnp.float32)
            loss_sum, metrics = sums(logits, known(logits.shape[-1]), weights)
        else:
            head = partial(_in_chunks, sums, chunk, known, weights)
            loss_sum, metrics = apply(params, inputs, head=head, **context)
        return loss_sum, Aux(jnp.sum(weights), metrics)

    return loss_fn


def _ids(batch: Batch, name: str) -> Int[Array, "B T"]:
    if not jnp.issubdtype(batch[name].dtype, jnp.integer):
        raise ValueError(f"next_token: {name} are of {batch[name].dtype}, and token ids of an integer type")
    return _in_int32(batch[name])


def _in_int32(ids: Any) -> Int[Array, "*axes"]:
    """Ids as int32, and those that are negative beyond any vocabulary: else they would count from its end."""
    found, of = jnp.asarray(ids, jnp.int32), jnp.iinfo(ids.dtype)
    return found if of.min == 0 and of.max < 2**31 else jnp.where(found < 0, 2**31 - 1, found)


def _sums(
    logits: Float[Array, "*axes V"],
    targets: Integer[Array, "*axes"],
    weights: Float[Array, "*axes"],
    *,
    z_loss: float | int,
    label_smoothing: float | int,
) -> tuple[Float[Array, ""], Metrics]:
    # The largest is that which accuracy needs anyway: on a GPU the time of this is that of passes over the logits.
    likeliest, picked = jnp.argmax(logits, axis=-1), _pick(logits, targets)
    largest = jax.lax.stop_gradient(_pick(logits, likeliest))
    log_z = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    losses = log_z - picked
    if label_smoothing:
        losses = losses + label_smoothing * (picked - jnp.mean(logits, axis=-1))
    terms = {"loss": losses, "accuracy": (likeliest == targets).astype(jnp.float32)}
    if z_loss:
        z_losses = z_loss * jnp.square(log_z)
        terms |= {"loss": losses + z_losses, "z_loss": z_losses}
    # Where nothing is predicted, not 0 times the loss: padding may hold any number, and its loss be NaN.
    metrics = {name: jnp.sum(jnp.where(weights > 0, x, 0)) for name, x in terms.items()}
    return metrics.pop("loss"), metrics


def _in_chunks(
    sums: Callable[..., tuple[jax.Array, Metrics]],
    chunk: int,
    targets_of: Callable[[int], Int[Array, "B T"]],
    weights: Float[Array, "B T"],
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "D V"],
) -> tuple[jax.Array, Metrics]:
    """`sums` of the logits `hidden @ matrix`; of metrics there is no gradient."""
    targets = targets_of(matrix.shape[1])
    tokens = targets.size
    if chunk > tokens:
        raise ValueError(f"next_token: chunk is {chunk}, but a device has {tokens} tokens at a time; use at most these")
    chunks = -(-tokens // chunk)
    size = -(-tokens // chunks)
    # float16 has no numbers below 6e-8, as most probabilities are. Powers of two change no digit.
    raised = 2.0**12 if matrix.dtype == jnp.float16 else 1.0

    def cut(x: jax.Array) -> jax.Array:
        flat = x.reshape(tokens, *x.shape[2:])
        padding = [(0, chunks * size - tokens)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(chunks, size, *flat.shape[1:])

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    def total(parts: Any) -> Any:
        return jax.tree.map(partial(jnp.sum, axis=0), parts)

    @jax.custom_vjp
    def of_all(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        def of_chunk(_: None, part: Any) -> tuple[None, Any]:
            hidden, targets, weights = part
            return None, sums(product(hidden, matrix), targets, weights)

        return total(jax.lax.scan(of_chunk, None, (cut(hidden), cut(targets), cut(weights)))[1])

    def forward(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        def of_chunk(matrix_grad: jax.Array, part: Any) -> tuple[jax.Array, Any]:
            hidden, targets, weights = part
            found, grad = jax.value_and_grad(sums, has_aux=True)(product(hidden, matrix), targets, weights)
            grad = (raised * grad).astype(matrix.dtype)  # as fast products take it
            return matrix_grad + product(hidden.T, grad) / raised, (found, product(grad, matrix.T) / raised)

        zeros = tree.vary_like(jnp.zeros(matrix.shape, jnp.float32), jax.typeof(matrix))
        matrix_grad, (parts, hidden_grad) = jax.lax.scan(of_chunk, zeros, (cut(hidden), cut(targets), cut(weights)))
        hidden_grad = hidden_grad.reshape(-1, hidden.shape[-1])[:tokens].reshape(hidden.shape)
        return total(parts), (hidden_grad, matrix_grad)

    def backward(grads: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, Metrics]) -> Any:
        scaled = (cotangents[0] * grad for grad in grads)
        return *(x.astype(like.dtype) for x, like in zip(scaled, (hidden, matrix), strict=True)), None, None

    of_all.defvjp(forward, backward)
    return of_all(hidden, tree.vary_like(matrix, jax.typeof(hidden)), targets, weights)


def next_tokens(batch: Batch) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The targets of a batch and their weights: 0 where there is no next token of the same document, else 1.

    Raises:
        ValueError: the batch has both `segments` and `lengths`.
    """
    if "segments" in batch and "lengths" in batch:
        raise ValueError("next_tokens: the batch has both segments and lengths; give one of them")
    tokens = _ids(batch, "tokens")
    last = tokens.shape[1] - 1
    position = jnp.arange(tokens.shape[1])[None]
    if "segments" in batch:
        segments = batch["segments"]
        weights = (segments == jnp.roll(segments, -1, axis=1)) & (segments > 0) & (position < last)
    else:
        lengths = batch["lengths"][:, None] if "lengths" in batch else jnp.full((tokens.shape[0], 1), last + 1)
        weights = (position + 1 < lengths) & (position < last)
    return jnp.roll(tokens, -1, axis=1), weights.astype(jnp.float32)


def cross_entropy(logits: Float[Array, "B T V"], targets: Integer[Array, "B T"]) -> Float[Array, "B T"]:
    """Minus the log-probability of each target, in nats; NaN for a target that has no logit."""
    return jax.nn.logsumexp(logits, axis=-1) - _pick(logits, _in_int32(targets))


@jax.custom_vjp
def _pick(logits: Float[Array, "*axes V"], targets: Integer[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Each target's logit. The gradient is written as a comparison: a gather's scatters into zeros first."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _pick_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    tokens = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return _pick(logits, targets), (tokens, targets)


def _pick_backward(tokens_and_targets: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None]:
    tokens, targets = tokens_and_targets
    return jnp.where(tokens == targets[..., None], grad[..., None], 0), None


_pick.defvjp(_pick_forward, _pick_backward)
