"""What is said of a step's memory is what the compiler and arithmetic say, and what knobs save is what they save."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm import grads, losses, models, optim, precision, preflight, sharding, train
from jaxlm.compiled import donating
from jaxlm.preflight import _memory
from jaxlm.types import Batch, Metrics, Step, TrainState

KEY = jax.random.key(0)
L, D, ROWS, LENGTH = 3, 32, 32, 32


def make(
    *,
    vocab: int = 64,
    rows: int = ROWS,
    microbatches: int = 1,
    chunk: int | None = None,
    remat: str = "none",
    zero: int | None = None,
    lean: bool = False,
    bfloat16: bool = False,
) -> tuple[Step, TrainState, Batch]:
    """A training step of a small transformer, and the shapes of what it takes."""
    config = models.TransformerConfig(vocab=vocab, layers=L, width=D, heads=2, hidden=96)
    init, _ = models.transformer(config)
    optimizer = optim.adamw_int8(1e-3) if lean else optim.adamw(1e-3)
    state = jax.eval_shape(lambda: train.start(init(KEY), optimizer))
    layout = sharding.lay_out(state.params, sharding.mesh(), zero=zero or 0, stacked=models.stacked)
    policy = models.remat_policy(remat)
    wrap = grads.gather_layers(layout, "blocks", policy=policy) if zero == 3 else models.remat(remat)
    _, apply = models.transformer(config, wrap_layer=wrap)
    loss_fn = losses.next_token(apply, chunk=chunk)
    loss_fn = precision.compute_in(jnp.bfloat16, loss_fn) if bfloat16 else loss_fn
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    batch = {"tokens": jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)}
    if zero is None:
        return train.make_step(grads.accumulate(grad_fn, microbatches), optimizer, KEY), state, batch
    grad_fn = grads.data_parallel(grad_fn, layout, microbatches=microbatches)
    state, batch = (
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
        for tree, shardings in ((state, layout.state(optimizer)), (batch, {"tokens": sharding.by_rows(layout.mesh)}))
    )
    return train.make_step(grad_fn, optimizer, KEY), state, batch


@functools.cache
def memory(**options: Any) -> preflight.Memory:
    step, state, batch = make(**options)
    return preflight.memory(step, state, [batch])


def knob(found: preflight.Memory, name: str) -> int:
    return next(k.saves for k in found.knobs if k.name.startswith(name))


def names(found: preflight.Memory) -> str:
    return " ".join(k.name for k in found.knobs)


def test_sizes_are_those_of_arithmetic_and_of_the_compiler():
    found = memory(remat="full")
    params = 2 * 64 * D + D + L * (4 * D * D + 3 * D * 96 + 2 * D)
    assert found.nbytes["parameters"] == 4 * params
    assert found.nbytes["optimizer state"] == 8 * params + 4  # the count of updates
    assert found.nbytes["batch"] == 4 * ROWS * LENGTH
    assert found.parts["gradients"] == 4 * params
    assert found.parts["logits and their gradient"] == 2 * 4 * ROWS * LENGTH * 64
    assert found.parts["activations kept for the backward pass"] == 4 * L * ROWS * LENGTH * D
    step, state, batch = make(remat="full")
    compiled = donating(step, state).lower(state, batch).compile().memory_analysis()
    assert found.nbytes["temporaries"] == compiled.temp_size_in_bytes == sum(found.parts.values())
    results = compiled.output_size_in_bytes - compiled.alias_size_in_bytes
    assert found.total == compiled.argument_size_in_bytes + results + compiled.temp_size_in_bytes


def test_on_devices_each_has_its_share():
    alone, divided = memory(remat="full"), memory(zero=1)
    scales = 4 * (D + L * 2 * D)
    lasting = alone.nbytes["parameters"]
    assert divided.nbytes["parameters"] == (lasting - scales) // 8 + scales
    assert divided.nbytes["batch"] == alone.nbytes["batch"] // 8
    assert divided.parts["logits and their gradient"] == alone.parts["logits and their gradient"] // 8
    assert divided.parts["parameters in use"] == lasting - scales


TURNED = [
    ({}, 'wrap_layer=models.remat("full")', {"remat": "full"}),
    ({}, "2 microbatches", {"microbatches": 2}),
    ({"microbatches": 2}, "4 microbatches", {"microbatches": 4}),
    ({"remat": "full"}, "optim.lean", {"lean": True}),
    ({"vocab": 4096}, "losses.next_token(chunk=128)", {"chunk": 128}),
    ({"vocab": 4096, "remat": "full"}, "losses.next_token(chunk=128)", {"chunk": 128}),
    ({"zero": 0, "remat": "full"}, "zero=1", {"zero": 1}),
    ({"zero": 0, "remat": "full"}, "zero=3", {"zero": 3}),
    ({"zero": 1, "remat": "full"}, "zero=3", {"zero": 3}),
    ({"zero": 0, "microbatches": 4}, "zero=2", {"zero": 2}),
    ({"zero": 1, "microbatches": 4}, "zero=2", {"zero": 2}),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("before", "name", "turned"), TURNED, ids=[f"{n}, {b}" for b, n, _ in TURNED])
def test_a_knob_saves_what_is_said(before: dict[str, Any], name: str, turned: dict[str, Any]):
    found, then = memory(**before), memory(**before | turned)
    assert found.total - then.total == pytest.approx(knob(found, name), rel=0.1)


def test_parts_follow_the_knobs():
    found, kept = memory(), "activations kept for the backward pass"
    assert memory(microbatches=2).parts[kept] == pytest.approx(found.parts[kept] / 2, rel=1e-3)
    assert memory(remat="full").parts[kept] == found.parts[kept] - knob(found, "wrap_layer")
    assert memory(remat="offload").parts[kept] == memory(remat="full").parts[kept]
    logits = "logits and their gradient"
    assert memory(vocab=4096, chunk=128).parts[logits] == memory(vocab=4096).parts[logits] // 8
    assert found.parts[kept] - memory(bfloat16=True).parts[kept] <= knob(found, "compute in bfloat16") * 1.1


@pytest.mark.slow
def test_only_what_applies_is_listed():
    assert "zero" not in names(memory())  # one device
    assert "remat" not in names(memory(remat="full"))
    assert "chunk" not in names(memory())  # the peak is in a layer
    assert "chunk" not in names(memory(vocab=4096, chunk=128))
    assert "zero" not in names(memory(zero=3))
    assert "zero=2" not in names(memory(zero=1))  # without microbatches it is the same
    assert "bfloat16" not in names(memory(bfloat16=True))
    assert "lean" not in names(memory(remat="full", lean=True))
    assert "microbatches" not in names(memory(zero=0, rows=24))  # three rows on each device


def test_layers_may_be_scanned_in_groups():
    params = {"embed": jnp.zeros((64, D)), "layers": jnp.zeros((4, D, D))}

    def two(x: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(jnp.tanh(x @ pair[0]) @ pair[1]), None

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(two, params["embed"][tokens], params["layers"].reshape(2, 2, D, D))
        return x @ params["embed"].T

    grad_fn = grads.accumulate(jax.value_and_grad(losses.next_token(apply), has_aux=True), 2)
    optimizer = optim.adamw(1e-3)
    batch = {"tokens": jnp.zeros((ROWS, LENGTH), jnp.int32)}
    step = train.make_step(grad_fn, optimizer, KEY)
    parts = preflight.memory(step, train.start(params, optimizer), [batch]).parts
    assert parts["gradients"] == 4 * (64 * D + 4 * D * D) + 4 * 4 * D * D  # the sums, and the layers' of a microbatch
    assert parts["logits and their gradient"] == 2 * 4 * ROWS // 2 * LENGTH * 64
    assert parts["activations kept for the backward pass"] >= 4 * 4 * ROWS // 2 * LENGTH * D


def test_the_most_demanding_batch_counts():
    step, state, batch = make(remat="full")
    small = {"tokens": jax.ShapeDtypeStruct((ROWS // 4, LENGTH), jnp.int32)}
    found = preflight.memory(step, state, [small, batch, small])
    assert found == memory(remat="full")
    assert "a batch of 32 x 32 tokens" in found.title


def test_a_limit_says_whether_it_fits_and_what_would():
    step, state, batch = make()
    whole = memory()
    assert whole.limit is None
    assert whole.fits is None
    fits = preflight.memory(step, state, [batch], limit=whole.total)
    assert fits.fits
    assert "then" not in str(fits)
    tight = preflight.memory(step, state, [batch], limit=whole.total - knob(whole, "2 microbatches"))
    assert tight.fits is False
    lines = {line.split("  ")[1]: line for line in str(tight).splitlines() if line.startswith("  ")}
    assert lines["total"].endswith("does not fit")
    assert lines["2 microbatches"].endswith("; then it should fit")
    assert lines["compute in bfloat16, at most"].endswith("softmax stay in float32")  # saves less


def test_logits_are_known_by_the_number_of_token_ids():
    step, state, batch = make(remat="full")
    assert preflight.memory(step, state, [batch], vocab=65).parts["logits and their gradient"] == 0


def test_what_a_compiler_refuses_is_estimated(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 17G of 16G hbm\nmore")

    step, state, batch = make(remat="full")
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    found = preflight.memory(step, state, [batch])
    assert found.fits is False
    assert found.nbytes["temporaries"] == sum(found.parts.values()) > 0
    assert "Used 17G of 16G hbm" in str(found)
    assert "more" not in found.refused


def test_other_errors_of_the_compiler_are_raised(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    step, state, batch = make(remat="full")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        preflight.memory(step, state, [batch])


@pytest.mark.parametrize(
    ("kind", "stats", "limit"),
    [
        ("NVIDIA H100 80GB HBM3", {"bytes_limit": 7}, 7),
        ("NVIDIA H100 80GB HBM3", None, 80 * 2**30),
        ("TPU v5 lite", None, 16 * 2**30),
        ("TPU v5", None, 95 * 2**30),
        ("NVIDIA A100-SXM4-40GB", None, 40 * 2**30),
        ("cpu", None, None),
    ],
)
def test_limits_are_the_device_s_own_or_known(kind: str, stats: Any, limit: int | None):
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)
    assert _memory._limit(device) == limit


@pytest.mark.parametrize("limit", [100, 10**4])
def test_a_step_that_needs_more_memory_than_there_is_is_refused_with_what_would_help(
    limit: int, monkeypatch: pytest.MonkeyPatch
):
    step, state, batch = make()
    needs = preflight.memory(step, state, [batch]).total
    monkeypatch.setattr(_memory, "_own_limit", lambda _: needs)
    train.compile_step(step, state, [batch])
    monkeypatch.setattr(_memory, "_own_limit", lambda _: needs - limit)
    with pytest.raises(
        MemoryError, match=r"(?s)not enough memory for the step\n.*optimizer state.*does not fit.*would save"
    ):
        train.compile_step(step, state, [batch])


def test_a_device_without_an_account_of_its_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch):
    step, state, batch = make()
    monkeypatch.setattr(_memory, "_own_limit", lambda _: 1)
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda _: None)
    train.compile_step(step, state, [batch])


def test_a_step_on_other_things_than_tokens_is_refused_without_a_table(monkeypatch: pytest.MonkeyPatch):
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return state, {"loss": batch["pixels"].sum()}

    monkeypatch.setattr(_memory, "_own_limit", lambda _: 1)
    state = TrainState(jnp.zeros((), jnp.int32), jnp.ones(8), ())
    with pytest.raises(MemoryError, match=r"not enough memory for the step$"):
        train.compile_step(step, state, [{"pixels": jnp.ones((2, 2))}])


def test_a_step_that_a_compiler_refuses_for_its_memory_is_explained(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 17G of 16G hbm\nmore")

    step, state, batch = make()
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(MemoryError, match=r"(?s)Used 17G of 16G hbm.*would save"):
        train.compile_step(step, state, [batch])


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_that_is_full_at_a_step_is_explained(compiled: bool):
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        del batch
        much = jnp.sort(jnp.cumsum(jnp.broadcast_to(state.params.sum(), (2**46,))))  # 256 TiB, beyond any address
        return TrainState(state.step + 1, state.params + much[7], state.opt_state), {"loss": much[5]}

    state, batch = TrainState(jnp.zeros((), jnp.int32), jnp.ones(8), ()), {"tokens": jnp.zeros((2, 2), jnp.int32)}
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        list(train.fit(train.compile_step(step, state, [batch]) if compiled else step, state, [batch]))
    assert "preflight.memory(step, state, batches) says" in caught.value.__notes__[0]


def test_a_compiled_step_and_no_batch_are_refused():
    step, state, batch = make(remat="full")
    with pytest.raises(ValueError, match="the step has been compiled"):
        preflight.memory(train.compile_step(step, state, []), state, [batch])
    with pytest.raises(ValueError, match="no batches"):
        preflight.memory(step, state, [])
