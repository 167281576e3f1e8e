"""The whole decoder against two others: Hugging Face's, and one in float64 NumPy written from the papers."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.models import TransformerConfig, transformer
from jaxlm.tree import named_leaves

CONFIG = TransformerConfig(vocab=29, layers=2, width=16, heads=4, kv_heads=2, hidden=24, rope_theta=500.0)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, (2, 9))

# float32 rounds by 6e-8, and logits (of size 1) are sums of sums over some hundred products.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def random_params(config: TransformerConfig) -> Any:
    """Normal numbers, of a size that keeps all activations near 1; scales are random too."""
    rng = np.random.default_rng(1)

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        kernel = jax.tree_util.keystr(path).endswith("['kernel']")
        values = rng.normal(size=shape.shape) * (shape.shape[-2] ** -0.5 if kernel else 1)
        return values.astype(np.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(transformer(config)[0], jax.random.key(0)))


def our_logits(config: TransformerConfig, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(transformer(config)[1])(params, TOKENS))


def decoder(config: TransformerConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits of one row, `[T V]`."""
    p = {name: leaf.astype(np.float64) for name, leaf in named_leaves(params).items()}
    length, width, half = len(tokens), config.head_width, config.head_width // 2

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon) * scale

    def turn(x: np.ndarray) -> np.ndarray:  # [T H]
        y = np.empty_like(x)
        for t in range(length):
            for i in range(half):
                c, s = (
                    np.cos(t * config.rope_theta ** (-2 * i / width)),
                    np.sin(t * config.rope_theta ** (-2 * i / width)),
                )
                y[t, i], y[t, i + half] = c * x[t, i] - s * x[t, i + half], s * x[t, i] + c * x[t, i + half]
        return y

    def head(x: np.ndarray, block: dict[str, np.ndarray], n: int) -> np.ndarray:
        m = n // (config.heads // config.key_heads)
        q = x @ block["attention/q/kernel"][:, n * width : (n + 1) * width]
        k = x @ block["attention/k/kernel"][:, m * width : (m + 1) * width]
        v = x @ block["attention/v/kernel"][:, m * width : (m + 1) * width]
        if config.qk_norm:
            q, k = norm(q, block["attention/q_norm/scale"]), norm(k, block["attention/k_norm/scale"])
        weights = np.tril(np.exp(turn(q) @ turn(k).T / np.sqrt(width)))
        return weights / weights.sum(axis=-1, keepdims=True) @ v

    x = p["embed"][tokens]
    for layer in range(config.layers):
        block = {name.removeprefix("blocks/"): leaf[layer] for name, leaf in p.items() if name.startswith("blocks/")}
        y = norm(x, block["attention_norm/scale"])
        x = x + np.concatenate([head(y, block, n) for n in range(config.heads)], -1) @ block["attention/o/kernel"]
        y = norm(x, block["feed_forward_norm/scale"])
        up = y @ block["feed_forward/up/kernel"]
        if config.activation == "swiglu":
            gate = y @ block["feed_forward/gate/kernel"]
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            hidden = np.maximum(up, 0) ** 2
        x = x + hidden @ block["feed_forward/down/kernel"]
    return norm(x, p["norm/scale"]) @ (p["embed"].T if config.tied else p["head/kernel"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": None, "norm_epsilon": 0.1},
        {"kv_heads": 1, "activation": "relu2"},
        {"qk_norm": True, "tied": True},
        {"qk_norm": True, "activation": "relu2", "layers": 3},
    ],
    ids=str,
)
def test_logits_are_those_of_float64_numpy(options: dict[str, Any]):
    config = dataclasses.replace(CONFIG, **options)
    params = random_params(config)
    expected = np.stack([decoder(config, params, row) for row in TOKENS])
    np.testing.assert_allclose(our_logits(config, params), expected, **TOLERANCE)


@pytest.mark.slow  # importing the two takes 10 s
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_hugging_face(tied: bool):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, tied=tied)
    params = random_params(config)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.hidden_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_heads,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=tied,
        )
    ).eval()
    weights = {name: torch.from_numpy(w) for name, w in hugging_face_weights(params).items()}
    assert not model.load_state_dict(weights, strict=not tied).unexpected_keys
    model.tie_weights()
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(our_logits(config, params), expected, **TOLERANCE)


def hugging_face_weights(params: Any) -> dict[str, np.ndarray]:
    """Matrices transposed, layers apart, names translated."""
    names = {
        "attention_norm/scale": "input_layernorm",
        "feed_forward_norm/scale": "post_attention_layernorm",
        **{f"attention/{x}/kernel": f"self_attn.{x}_proj" for x in "qkvo"},
        **{f"feed_forward/{x}/kernel": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    p = named_leaves(params)
    weights = {"model.embed_tokens.weight": p["embed"], "model.norm.weight": p["norm/scale"]}
    if "head/kernel" in p:
        weights["lm_head.weight"] = p["head/kernel"].T
    for ours, theirs in names.items():
        for layer, leaf in enumerate(p[f"blocks/{ours}"]):
            weights[f"model.layers.{layer}.{theirs}.weight"] = leaf.T
    return {name: np.ascontiguousarray(w) for name, w in weights.items()}
