"""What is computed again is the same, and takes less memory."""

import types
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import grads, losses, models, sharding, tree
from jaxlm.types import GradFn

KEY = jax.random.key(0)
CONFIG = models.TransformerConfig(vocab=48, layers=4, width=32, heads=2)
NAMES = ["none", "dots", "blocks", "offload", "full"]
BATCH = {"tokens": np.random.default_rng(0).integers(0, CONFIG.vocab, (16, 24), np.int32)}
PARAMS = models.transformer(CONFIG)[0](KEY)


def gradient(**options: Any) -> GradFn:
    _, apply = models.transformer(CONFIG, **options)
    return jax.value_and_grad(losses.next_token(apply), has_aux=True)


def assert_same(found: Any, expected: Any):
    """To float32's rounding: XLA fuses what is computed again in another way."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.max(abs(b))), found, expected)


@pytest.fixture(scope="module")
def expected() -> Any:
    return jax.device_get(jax.jit(gradient())(PARAMS, BATCH, KEY))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same(name: str, unroll: bool, expected: Any):
    assert_same(jax.jit(gradient(wrap_layer=models.remat(name), unroll=unroll))(PARAMS, BATCH, KEY), expected)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("name", "zero"), [*((name, 3) for name in NAMES), *(("blocks", zero) for zero in range(3))])
def test_gradients_are_the_same_on_devices(name: str, zero: int, expected: Any):
    layout = sharding.lay_out(PARAMS, sharding.mesh(), zero=zero, stacked=models.stacked)
    policy = models.remat_policy(name)
    wrap = grads.gather_layers(layout, "blocks", policy=policy) if zero == 3 else models.remat(name)
    grad_fn = jax.jit(grads.data_parallel(gradient(wrap_layer=wrap), layout))
    assert_same(jax.device_get(grad_fn(jax.device_put(PARAMS, layout.params), BATCH, KEY)), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("unroll", [False, True])
def test_temporaries_are_in_order(unroll: bool):
    def temporaries(name: str) -> int:
        grad_fn = gradient(wrap_layer=models.remat(name), unroll=unroll)
        return jax.jit(grad_fn).lower(PARAMS, BATCH, KEY).compile().memory_analysis().temp_size_in_bytes

    none, dots, blocks, offload, full = map(temporaries, NAMES)
    assert none > dots >= blocks >= offload >= full
    if not unroll:  # XLA:CPU orders what isn't in a loop for speed, and begins all layers' backward passes at once
        assert none > 1.5 * dots > 2 * full
        assert blocks > full


def kept(wrap_layer: Any, layout: sharding.Layout | None = None) -> list[tuple[int, ...]]:
    """The shapes of what the scan over layers stacks for the backward pass, a layer's."""
    grad_fn = gradient(wrap_layer=wrap_layer)
    grad_fn = grads.data_parallel(grad_fn, layout) if layout else grad_fn
    found: list[tuple[int, ...]] = []

    def body(scan: Any) -> list[Any]:
        return getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"]).outvars

    def walk(jaxpr: Any):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan" and not equation.params["reverse"]:
                shapes = [(x.aval.shape, y.aval.shape) for x, y in zip(equation.outvars, body(equation), strict=True)]
                found.extend(shape for whole, shape in shapes if whole == (CONFIG.layers, *shape))
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.jit(grad_fn).trace(PARAMS, BATCH, KEY).jaxpr.jaxpr)
    return found


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize(("name", "streams"), [("full", 1), ("blocks", 2), ("offload", 2)])
def test_what_is_kept_is_what_the_name_says(name: str, streams: int, zero: int):
    layout = sharding.lay_out(PARAMS, sharding.mesh(), zero=zero, stacked=models.stacked)
    if zero == 3:
        found = kept(grads.gather_layers(layout, "blocks", policy=models.remat_policy(name)), layout)
        assert found == [(2, 24, CONFIG.width)] * streams
    else:
        assert kept(models.remat(name)) == [(16, 24, CONFIG.width)] * streams


def test_dots_keeps_products_with_weights_and_no_weights():
    layout = sharding.lay_out(PARAMS, sharding.mesh(), zero=3, stacked=models.stacked)
    found = kept(grads.gather_layers(layout, "blocks", policy=models.remat_policy("dots")), layout)
    rows = [shape for shape in found if shape[0] == 2 * 24]
    assert sorted(rows) == sorted([(48, 32)] * 4 + [(48, CONFIG.hidden_width)] * 2)  # q, k, v, o; gate, up
    assert set(found) - set(rows) == {(2, 24, 32)}  # the layer's input
    weights = {shape.shape[1:] for shape in tree.named_leaves(PARAMS["blocks"]).values()}
    assert not set(found) & weights


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown name 'all'; use one of none, dots, blocks, offload, full"):
        models.remat("all")


def test_offloading_needs_pinned_host_memory(monkeypatch: pytest.MonkeyPatch):
    memory = types.SimpleNamespace(kind="device")
    device = types.SimpleNamespace(platform="metal", addressable_memories=lambda: [memory])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(ValueError, match=r"metal has only \['device'\]; use 'blocks'"):
        models.remat("offload")
