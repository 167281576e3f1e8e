"""Text from a model."""

import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer

from jaxlm.checkpoint import load_params
from jaxlm.data.tokenizers import ByteTokenizer, Tokenizer, tokenizer_of
from jaxlm.models import TransformerConfig, empty_cache, masks, transformer
from jaxlm.numbers import check_whole, known
from jaxlm.tree import named_leaves
from jaxlm.types import Params


def generate(
    config: TransformerConfig,
    params: Params,
    prompt: Integer[Array | np.ndarray, "B T"],
    key: jax.Array,
    *,
    length: int,
    temperature: float | Float[Array, ""] = 1.0,
    mask: masks.Mask = masks.causal,
) -> Integer[Array, "B length"]:
    """Samples `length` tokens after each prompt, keeping keys and values of what came before.

    Args:
        config: the model's shape.
        params: its parameters; the cache has their dtype.
        prompt: rows of ids, all of one length.
        key: for the draws.
        length: how many tokens to draw.
        temperature: divides the logits, 0 or more; 0 takes the likeliest token always.
        mask: the one that the model was made with.

    Returns:
        The drawn ids, int32.

    Raises:
        ValueError: a length below 1, an empty prompt, an id in it that the model doesn't know, or a temperature that
            isn't 0 or more.
    """
    check_whole("generate", length=length)
    if not prompt.shape[1]:
        raise ValueError("generate: the prompt is empty; begin with one token at least")
    if (divisor := known(temperature)) is not None and not 0 <= divisor < math.inf:
        raise ValueError(f"generate: temperature is {temperature}; use 0 or more")
    if not isinstance(prompt, Tracer):
        ids = np.asarray(prompt)
        if (wrong := ids[(ids < 0) | (ids >= config.vocab)]).size:
            raise ValueError(f"generate: the prompt has the id {wrong[0]}; the model knows those below {config.vocab}")
    return _generate(config, params, prompt, key, length, temperature, mask)


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def _generate(
    config: TransformerConfig,
    params: Params,
    prompt: Integer[Array, "B T"],
    key: jax.Array,
    length: int,
    temperature: float | Float[Array, ""],
    mask: masks.Mask,
) -> Integer[Array, "B length"]:
    _, apply = transformer(config, mask=mask)
    rows, prompt_length = prompt.shape
    cache = empty_cache(config, rows, prompt_length + length, params["embed"].dtype)

    def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        token, cache = carry
        logits, cache = apply(params, token[:, None], cache=cache)
        token = draw(logits[:, -1], key)
        return (token, cache), token

    keys = jax.random.split(key, length)
    logits, cache = apply(params, prompt, cache=cache)
    first = draw(logits[:, -1], keys[0])
    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def complete(
    config: TransformerConfig,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    *,
    length: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """A text and `length` more tokens of it, or fewer if the document ends before."""
    prompt = tokenizer.encode(text.encode())[:-1]  # without the end
    ids = generate(
        config,
        params,
        prompt.astype(np.int32)[None],
        jax.random.key(seed),
        length=length,
        temperature=temperature,
    )
    drawn = np.asarray(ids[0])
    ends = np.flatnonzero(drawn == tokenizer.end)
    return text + tokenizer.decode(drawn[: ends[0]] if len(ends) else drawn).decode(errors="replace")


def load_model(folder: str | os.PathLike[str]) -> tuple[TransformerConfig, Params, Tokenizer]:
    """The newest model in a folder of checkpoints, and the tokenizer that was saved there: all that `complete` needs.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        RuntimeError: there are checkpoints, but none that isn't damaged.
        ValueError: its model or its tokenizer is unknown to this version, or its parameters aren't those of its model.
    """
    params, about = load_params(folder)
    try:
        config, name = TransformerConfig(**about["model"]), about["tokenizer"]
        init, apply = transformer(config)
        expected = jax.eval_shape(init, jax.random.key(0))
        found, wanted = ({n: leaf.shape for n, leaf in named_leaves(tree).items()} for tree in (params, expected))
        for leaf in {**wanted, **found}:
            if found.get(leaf) != wanted.get(leaf):
                raise ValueError(f"its {leaf} has the shape {found.get(leaf)}, and not {wanted.get(leaf)}")
        with np.errstate(over="raise"):
            jax.eval_shape(apply, expected, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} has no model of this version: {type(error).__name__}: {error!s:.300}") from None
    tokenizer = tokenizer_of(folder) if (Path(folder) / "tokenizer.json").is_file() else ByteTokenizer()
    if tokenizer.name != name:
        raise ValueError(f"{folder} has the tokenizer {tokenizer.name}, and its model learnt with {name!s:.80}")
    if tokenizer.vocab > config.vocab:
        raise ValueError(f"{folder} has a tokenizer of {tokenizer.vocab} ids, and a model of {config.vocab}")
    return config, params, tokenizer
