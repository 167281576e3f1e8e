import dataclasses
import functools
import json
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.grads import data_parallel
from jaxlm.losses import next_token
from jaxlm.models import TransformerConfig, empty_cache, masks, transformer
from jaxlm.models.attention import blockwise, dense
from jaxlm.models.layers import rotary
from jaxlm.tree import named_leaves, size

CONFIG = TransformerConfig(vocab=23, layers=2, width=16, heads=4, kv_heads=2, hidden=24, qk_norm=True)
ROWS, LENGTH = 2, 8
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, (ROWS, LENGTH))
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 3, 3]])

init, eager = transformer(CONFIG)
apply = jax.jit(eager)


@pytest.fixture(scope="module")
def params() -> Any:
    """Scales as well as kernels are random."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) / 3).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def logits(params: Any) -> np.ndarray:
    return np.asarray(apply(params, TOKENS))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab": 0}, "vocab is 0; use a whole number, 1 or more"),
        ({"layers": 0}, "layers is 0"),
        ({"width": 0}, "width is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"kv_heads": 0}, "heads is 0"),
        ({"hidden": -1}, "hidden"),
        ({"heads": 3}, "width 16 is not divisible by 3 heads"),
        ({"kv_heads": 3}, "4 heads are not divisible by 3 kv_heads"),
        ({"heads": 16, "kv_heads": 16}, "even head width"),
        ({"windows": ()}, "windows are \\(\\)"),
        ({"windows": (0,)}, "windows are .*; use whole numbers of 1 or more, or None"),
        ({"windows": (2, None)}, "1 layers are not divisible by the 2 of windows"),
        ({"softcap": 0.0}, "softcap is 0.0; use a number above 0, or None"),
        ({"softcap": math.inf}, "softcap is inf"),
        ({"layers": True}, "layers is True"),
        ({"heads": 4.0}, "heads is 4.0"),
        ({"windows": (1.5,)}, "windows are"),
        ({"windows": (math.nan,)}, "windows are"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0; use a number above 0"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"norm_epsilon": -1.0}, "norm_epsilon is -1.0"),
        ({"norm_epsilon": math.inf}, "norm_epsilon is inf"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_config_refuses_impossible_shapes(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{"vocab": 8, "layers": 1, "width": 16, "heads": 4} | wrong)


@pytest.mark.parametrize(
    ("activation", "width", "hidden"), [("swiglu", 96, 256), ("swiglu", 100, 288), ("relu2", 96, 384)]
)
def test_hidden_width_follows_from_width(activation: Any, width: int, hidden: int):
    config = TransformerConfig(vocab=8, layers=1, width=width, heads=2, activation=activation)
    assert config.hidden_width == hidden


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_parameters_are_these(tied: bool, qk_norm: bool, activation: Any):
    config = TransformerConfig(
        vocab=23, layers=3, width=16, heads=4, kv_heads=2, tied=tied, qk_norm=qk_norm, activation=activation
    )
    hidden = config.hidden_width
    expected = {
        "embed": (23, 16),
        "norm/scale": (16,),
        "blocks/attention_norm/scale": (3, 16),
        "blocks/feed_forward_norm/scale": (3, 16),
        "blocks/attention/q/kernel": (3, 16, 16),
        "blocks/attention/k/kernel": (3, 16, 8),
        "blocks/attention/v/kernel": (3, 16, 8),
        "blocks/attention/o/kernel": (3, 16, 16),
        "blocks/feed_forward/up/kernel": (3, 16, hidden),
        "blocks/feed_forward/down/kernel": (3, hidden, 16),
    }
    if activation == "swiglu":
        expected["blocks/feed_forward/gate/kernel"] = (3, 16, hidden)
    if qk_norm:
        expected |= {f"blocks/attention/{x}_norm/scale": (3, 4) for x in "qk"}
    if not tied:
        expected["head/kernel"] = (16, 23)
    shapes = jax.eval_shape(transformer(config)[0], jax.random.key(0))
    assert {name: p.shape for name, p in named_leaves(shapes).items()} == expected
    assert size(shapes) == sum(math.prod(shape) for shape in expected.values())
    assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_kernels_are_drawn_by_depth_and_differ_between_layers():
    config = TransformerConfig(vocab=64, layers=8, width=64, heads=2, hidden=128)
    drawn = jax.tree.map(np.asarray, jax.jit(transformer(config)[0])(jax.random.key(0)))
    drawn, inner, out = named_leaves(drawn), 64**-0.5, (2 * 8) ** -0.5
    expected = {
        "embed": inner,
        "head/kernel": inner,
        **{f"blocks/attention/{x}/kernel": inner for x in "qkv"},
        "blocks/attention/o/kernel": out * inner,
        **{f"blocks/feed_forward/{x}/kernel": inner for x in ("gate", "up")},
        "blocks/feed_forward/down/kernel": out * 128**-0.5,
    }
    assert {name: np.std(drawn[name]) for name in expected} == pytest.approx(expected, rel=0.04)
    kernels = [drawn[name] for name in expected.keys() - {"embed", "head/kernel"}]
    assert all(len(np.unique(kernel[:, 0, 0])) == config.layers for kernel in kernels)
    assert len({kernel[0, 0, 0] for kernel in kernels}) == len(kernels)


def test_logits_are_float32_for_any_type_of_token(params: Any, logits: np.ndarray):
    assert (logits.shape, logits.dtype) == ((ROWS, LENGTH, CONFIG.vocab), np.float32)
    np.testing.assert_array_equal(apply(params, TOKENS.astype(np.uint16)), logits)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document a row", "segments"])
def test_a_token_changes_later_logits_of_its_document_and_no_other(params: Any, segments: np.ndarray | None):
    numbers = np.ones_like(TOKENS) if segments is None else segments
    before = np.asarray(apply(params, TOKENS, segments=segments))
    for t in range(LENGTH):
        changed = TOKENS.copy()
        changed[:, t] = (TOKENS[:, t] + 1) % CONFIG.vocab
        after = np.asarray(apply(params, changed, segments=segments))
        seen = (numbers == numbers[:, t : t + 1]) & (np.arange(LENGTH) >= t)
        np.testing.assert_array_equal(np.any(after != before, axis=-1), seen)


def test_a_packed_document_has_the_logits_it_has_alone(params: Any):
    packed = np.asarray(apply(params, TOKENS, segments=SEGMENTS))
    for row, begin, end in ((0, 0, 3), (0, 3, 7), (1, 0, 1), (1, 1, 6), (1, 6, 8)):
        document = np.zeros_like(TOKENS)
        document[0, : end - begin] = TOKENS[row, begin:end]
        alone = np.asarray(apply(params, document))[0, : end - begin]
        np.testing.assert_allclose(packed[row, begin:end], alone, rtol=1e-5, atol=1e-5)


def test_positions_restart_with_each_document(params: Any, monkeypatch: pytest.MonkeyPatch):
    seen = []  # from logits it can't be told: only distances count within a document

    def record(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
        seen.append(np.asarray(positions))
        return rotary(x, positions, theta)

    monkeypatch.setattr(sys.modules["jaxlm.models.transformer"], "rotary", record)
    eager(params, jnp.asarray(TOKENS), segments=jnp.asarray(SEGMENTS))
    assert len(seen) == 2  # queries and keys
    for positions in seen:
        np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 2, 3, 4, 0, 1]])


def test_unrolled_layers_have_the_same_parameters_and_logits(params: Any, logits: np.ndarray):
    unrolled_init, unrolled = transformer(CONFIG, unroll=True)
    assert jax.eval_shape(unrolled_init, jax.random.key(0)) == jax.eval_shape(init, jax.random.key(0))
    np.testing.assert_allclose(jax.jit(unrolled)(params, TOKENS), logits, rtol=1e-5, atol=1e-5)
    loops = [jax.jit(f).lower(params, TOKENS).as_text().count("stablehlo.while") for f in (eager, unrolled)]
    assert loops == [1, 0]


def test_cached_logits_are_those_of_the_whole(params: Any, logits: np.ndarray):
    cache, begin, pieces = empty_cache(CONFIG, ROWS, LENGTH + 2), 0, []
    for end in (3, 4, 5, 8):
        piece, cache = apply(params, TOKENS[:, begin:end], cache=cache)
        pieces.append(piece)
        begin = end
        assert cache.length == end
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), logits, rtol=1e-5, atol=1e-5)


def test_a_cache_keeps_its_dtype(params: Any):
    empty = empty_cache(CONFIG, ROWS, LENGTH, jnp.bfloat16)
    assert empty.k.shape == (CONFIG.layers, ROWS, LENGTH, CONFIG.key_heads, CONFIG.head_width)
    piece, cache = jax.eval_shape(lambda cache: apply(params, TOKENS, cache=cache), empty)
    assert piece.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(lambda x: (x.shape, x.dtype), empty)


def test_tokens_that_do_not_fit_in_the_cache_are_refused_or_undefined(params: Any):
    with pytest.raises(ValueError, match=f"{LENGTH} tokens for a cache of {LENGTH - 1}"):
        apply(params, TOKENS, cache=empty_cache(CONFIG, ROWS, LENGTH - 1))
    logits, cache = apply(params, TOKENS[:, :5], cache=empty_cache(CONFIG, ROWS, LENGTH))
    assert np.isfinite(logits).all()
    logits, _ = apply(params, TOKENS[:, 5:], cache=cache)
    assert np.isfinite(logits).all()
    logits, _ = apply(params, TOKENS[:, : LENGTH - 4], cache=cache)  # one more than is left
    assert np.isnan(logits).all()


def test_a_cache_and_segments_exclude_each_other(params: Any):
    with pytest.raises(ValueError, match="segments"):
        jax.eval_shape(lambda x: apply(params, x, segments=x, cache=empty_cache(CONFIG, ROWS, LENGTH)), TOKENS)


def test_bfloat16_parameters_give_close_float32_logits(params: Any, logits: np.ndarray):
    rounded = np.asarray(apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), TOKENS))
    assert rounded.dtype == np.float32
    # Each of some 20 products and sums on the way is rounded by at most 2**-8, in any direction.
    assert 2**-10 < np.std(rounded - logits) / np.std(logits) < 20**0.5 * 2**-8


def test_in_bfloat16_the_gradients_of_the_logits_are_multiplied_in_bfloat16(params: Any):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def gradient(params: Any) -> Any:
        batch = {"tokens": TOKENS.astype(np.uint16)}
        return jax.grad(lambda p: next_token(apply)(p, batch, jax.random.key(0))[0])(params)

    pairs = re.findall(r"dot_general.*: \((.*?)\) ->", jax.jit(gradient).lower(narrow).as_text())
    of_logits = [pair for pair in pairs if f"x{CONFIG.vocab}x" in pair]
    assert len(of_logits) == 3
    assert not any("f32" in pair for pair in of_logits)
    found, expected = named_leaves(gradient(narrow)), named_leaves(gradient(params))
    for name in ("head/kernel", "embed"):
        error = np.linalg.norm(np.float32(found[name]) - expected[name]) / np.linalg.norm(expected[name])
        assert 2**-10 < error < 40**0.5 * 2**-8, name  # some 20 products and sums on the way, twice


def test_every_parameter_has_a_gradient(params: Any):
    grads = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, TOKENS) ** 2)))(params)
    for name, grad in named_leaves(jax.tree.map(np.asarray, grads)).items():
        assert np.all(np.isfinite(grad)), name
        used = grad[np.unique(TOKENS)] if name == "embed" else grad
        assert np.all(np.any(used != 0, axis=-1)), name


def windowed(**options: Any) -> tuple[Any, Any]:
    """Four layers, every second of which sees all, with a soft cap."""
    config = dataclasses.replace(CONFIG, layers=4, windows=(3, None), softcap=2.0)
    return config, transformer(config, **options)[1]


@pytest.fixture(scope="module")
def four_layers() -> Any:
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(transformer(windowed()[0])[0], jax.random.key(0))
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) / 3).astype(np.float32), shapes)


def test_each_layer_has_its_window(four_layers: Any, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def record(q: jax.Array, *_: Any, mask: Any, softcap: Any, **__: Any) -> jax.Array:
        asked.append((mask, softcap))
        return q

    monkeypatch.setattr(sys.modules["jaxlm.models.transformer"], "attention", record)
    for options, expected in (
        ({}, [masks.window(3), masks.causal]),
        ({"window": 2}, [masks.window(2), masks.window(2)]),
        ({"window": 5}, [masks.window(3), masks.window(5)]),
    ):
        asked.clear()
        jax.eval_shape(functools.partial(windowed()[1], **options), four_layers, TOKENS)
        assert asked == [(mask, 2.0) for mask in expected]


def test_a_pattern_of_windows_runs_the_layers_in_their_order(four_layers: Any):
    """One period of the pattern after another, each the model of two layers with its parameters."""
    _, whole = windowed()
    expected = jax.jit(whole)(four_layers, TOKENS)
    changed = jax.tree.map(np.copy, four_layers)
    for leaf in jax.tree.leaves(changed["blocks"]):
        leaf[[0, 2]] = leaf[[2, 0]]
    assert np.abs(np.asarray(jax.jit(whole)(changed, TOKENS)) - expected).max() > 1e-3
    _, unrolled = windowed(unroll=True)
    np.testing.assert_allclose(jax.jit(unrolled)(four_layers, TOKENS), expected, rtol=1e-5, atol=1e-5)
    loops = [jax.jit(f).lower(four_layers, TOKENS).as_text().count("stablehlo.while") for f in (whole, unrolled)]
    assert loops == [1, 0]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_token_is_seen_as_far_as_windows_reach(layers: int):
    """Through two windows of 3, a token sees 2 positions back by each."""
    config = dataclasses.replace(CONFIG, layers=layers, windows=(3,))
    make, run = transformer(config)
    params, jitted = jax.jit(make)(jax.random.key(0)), jax.jit(run, static_argnames="window")
    narrow, wide = ({"window": 2}, 1 * layers), ({}, 2 * layers)
    for options, reach in (narrow, wide):
        before = np.asarray(jitted(params, TOKENS, **options))
        changed = TOKENS.copy()
        changed[:, 1] = (TOKENS[:, 1] + 1) % CONFIG.vocab
        differs = np.any(np.asarray(jitted(params, changed, **options)) != before, axis=-1)
        at = np.arange(LENGTH)
        np.testing.assert_array_equal(differs, np.broadcast_to((at >= 1) & (at <= 1 + reach), differs.shape))


def test_windows_and_masks_hold_with_a_cache(four_layers: Any):
    config, run = windowed(mask=masks.fixed(2, 2))
    run = jax.jit(run)
    expected = run(four_layers, TOKENS)
    cache, begin, pieces = empty_cache(config, ROWS, LENGTH + 2), 0, []
    for end in (3, 4, 8):
        piece, cache = run(four_layers, TOKENS[:, begin:end], cache=cache)
        pieces.append(piece)
        begin = end
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(jax.jit(windowed()[1])(four_layers, TOKENS)) - expected).max() > 1e-3


def test_implementations_give_the_same_model(four_layers: Any):
    small = functools.partial(blockwise, block=4)
    logits = [
        jax.jit(windowed(implementation=implementation)[1])(four_layers, TOKENS, segments=SEGMENTS)
        for implementation in (dense, small)
    ]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["checkpoint", "data_parallel"])
def test_windowed_layers_may_be_wrapped_and_divided_over_devices(four_layers: Any, wrap: str):
    small = functools.partial(blockwise, block=4)
    batch = {"tokens": np.tile(TOKENS, (4, 1)), "segments": np.tile(SEGMENTS, (4, 1))}

    def gradient(**options: Any) -> Any:
        return jax.value_and_grad(next_token(windowed(implementation=small, **options)[1]), has_aux=True)

    (expected, _), grads = jax.jit(gradient())(four_layers, batch, jax.random.key(0))
    if wrap == "checkpoint":
        (loss, _), found = jax.jit(gradient(wrap_layer=jax.checkpoint))(four_layers, batch, jax.random.key(0))
    else:
        layout = sharding.lay_out(four_layers, sharding.mesh(), zero=1)
        params = jax.jit(lambda: four_layers, out_shardings=layout.params)()
        placed = sharding.place(batch, sharding.by_rows(layout.mesh))
        (loss, _), found = jax.jit(data_parallel(gradient(), layout))(params, placed, jax.random.key(0))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, grads)


def test_a_configuration_comes_back_from_json():
    config, _ = windowed()
    again = TransformerConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)
