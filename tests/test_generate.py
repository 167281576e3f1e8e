"""Sampling with a cache equals running the whole text through the model for each token."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import checkpoint, data, generate, models, train

CONFIG = models.TransformerConfig(vocab=258, layers=2, width=16, heads=4, kv_heads=2, qk_norm=True)
INIT, APPLY = models.transformer(CONFIG)


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return jax.jit(INIT)(jax.random.key(0))


def test_the_likeliest_tokens_are_those_found_without_a_cache(params: dict[str, jax.Array]) -> None:
    prompt = jax.random.randint(jax.random.key(1), (3, 5), 0, CONFIG.vocab)
    drawn = generate.generate(CONFIG, params, prompt, jax.random.key(2), length=6, temperature=0.0)
    text = prompt
    for _ in range(6):
        logits = APPLY(params, text)
        text = jnp.concatenate([text, jnp.argmax(logits[:, -1:], axis=-1)], axis=1)
    np.testing.assert_array_equal(drawn, text[:, 5:])


@pytest.mark.parametrize("wrong", [-1, CONFIG.vocab, 2**33 + 66])
def test_a_prompt_of_ids_that_the_model_does_not_know_is_refused(params: dict[str, jax.Array], wrong: int) -> None:
    with pytest.raises(ValueError, match=f"prompt has the id {wrong}; the model knows those below 258"):
        generate.generate(CONFIG, params, np.array([[1, wrong]]), jax.random.key(0), length=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length is 0; use a whole number"),
        ({"temperature": -1.0}, "temperature is -1.0; use 0 or more"),
        ({"temperature": np.float32("nan")}, "temperature is nan"),
        ({"prompt": np.ones((1, 0), np.int32)}, "the prompt is empty"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_cannot_be_drawn_is_refused(params: dict[str, jax.Array], options: dict[str, Any], message: str) -> None:
    options = {"prompt": np.ones((1, 1), np.int32), "key": jax.random.key(0), "length": 1, **options}
    with pytest.raises(ValueError, match=message):
        generate.generate(CONFIG, params, **options)


def test_draws_follow_the_distribution_at_the_temperature(params: dict[str, jax.Array]) -> None:
    prompt = jnp.tile(jnp.asarray([[3, 1, 4]]), (20_000, 1))
    drawn = generate.generate(CONFIG, params, prompt, jax.random.key(0), length=1, temperature=0.5)
    expected = jax.nn.softmax(APPLY(params, prompt[:1])[0, -1] / 0.5)
    found = np.bincount(drawn[:, 0], minlength=CONFIG.vocab) / len(drawn)
    np.testing.assert_allclose(found, expected, atol=5 * (0.25 / len(drawn)) ** 0.5)


def test_the_same_seed_gives_the_same_text_and_another_gives_another(params: dict[str, jax.Array]) -> None:
    tokenizer = data.ByteTokenizer()
    texts = [generate.complete(CONFIG, params, tokenizer, "ab", length=20, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("ab") for text in texts)


def test_the_text_stops_at_the_end_of_the_document(params: dict[str, jax.Array]) -> None:
    tokenizer = data.ByteTokenizer()
    ending = params | {"head": {"kernel": jnp.zeros((16, 258))}}  # all ids alike: the end comes once in 258 tokens
    lengths = {len(generate.complete(CONFIG, ending, tokenizer, "", length=200, seed=seed)) for seed in range(5)}
    assert min(lengths) < 100


def test_a_model_is_loaded_by_path_alone(params: dict[str, jax.Array], tmp_path: Path) -> None:
    about = {"model": dataclasses.asdict(CONFIG), "tokenizer": "bytes", "data": "none"}
    with checkpoint.Checkpoints(tmp_path, about) as checkpoints:
        checkpoints.save(train.start(params, optax.sgd(0.1)))
    config, loaded, tokenizer = generate.load_model(tmp_path)
    assert config == CONFIG
    assert isinstance(tokenizer, data.ByteTokenizer)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_checkpoint_without_a_known_model_is_refused(params: dict[str, jax.Array], tmp_path: Path) -> None:
    with checkpoint.Checkpoints(tmp_path, {"model": {"depth": 3}, "tokenizer": "bytes"}) as checkpoints:
        checkpoints.save(train.start(params, optax.sgd(0.1)))
    with pytest.raises(ValueError, match="no model of this version"):
        generate.load_model(tmp_path)


def test_a_model_is_loaded_with_the_tokenizer_that_was_saved_beside_it(
    params: dict[str, jax.Array], tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = data.train_bpe([data.Document("a", b"some words, some words")], 258)
    for name, folder in ((tokenizer.name, tmp_path / "one"), ("bytes", tmp_path / "other")):
        data.save_tokenizer(tokenizer, folder)
        with checkpoint.Checkpoints(folder, {"model": dataclasses.asdict(CONFIG), "tokenizer": name}) as checkpoints:
            checkpoints.save(train.start(params, optax.sgd(0.1)))
    config, loaded, found = generate.load_model(tmp_path / "one")
    assert found == tokenizer
    assert isinstance(generate.complete(config, loaded, found, "some", length=5), str)
    with pytest.raises(ValueError, match=rf"has the tokenizer {tokenizer.name}, and its model learnt with bytes"):
        generate.load_model(tmp_path / "other")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    small = dataclasses.replace(CONFIG, vocab=257)
    params = models.transformer(small)[0](jax.random.key(0))
    with checkpoint.Checkpoints(tmp_path, {"model": dataclasses.asdict(small), "tokenizer": "bytes"}) as checkpoints:
        checkpoints.save(train.start(params, optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"has a tokenizer of 258 ids, and a model of 257"):
        generate.load_model(tmp_path)
