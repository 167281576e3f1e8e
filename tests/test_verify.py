"""The contract holds of a small model, and each defect that is planted is caught where it is."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import checkpoint, data, losses, models, optim, sharding, verify
from jaxlm.types import Aux, LossFn, Params, TrainState
from jaxlm.verify import _check, _ways

D, VOCAB = 8, 258
Make = Callable[..., verify.Contract]


def model(*, heeds_segments: bool = True, causal: bool = True, factor: float = 1.0) -> Any:
    """Each position's embedding and the mean of those before it in its document; defects are options."""

    def init(key: jax.Array) -> Params:
        shapes = {"embed": (VOCAB, D), "head": (D, VOCAB), "mix": (D, D)}
        keys = jax.random.split(key, len(shapes))
        return {name: jax.random.normal(k, s) / 3 for k, (name, s) in zip(keys, shapes.items(), strict=True)}

    def apply(params: Params, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        x, length = params["embed"][tokens], tokens.shape[1]
        seen = jnp.tril(jnp.ones((length, length), bool))[None] | (not causal)
        if segments is not None and heeds_segments:
            seen = seen & (segments[:, :, None] == segments[:, None, :])
        share = seen / jnp.sum(seen, axis=-1, keepdims=True).astype(x.dtype)
        mean = jnp.einsum("bts,bsd->btd", jnp.broadcast_to(share, (len(tokens), length, length)).astype(x.dtype), x)
        return (x + jnp.tanh(factor * mean @ params["mix"])) @ params["head"]

    return init, apply


def loss(apply: Any, *, factor: float = 1.0) -> LossFn:
    loss_fn = losses.next_token(apply, z_loss=1e-3)

    def scaled(params: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, Aux]:
        loss_sum, aux = loss_fn(params, batch, key)
        return factor * loss_sum, aux

    return scaled


@pytest.fixture(scope="module")
def make(corpus_path: Path) -> Make:
    """A contract of two steps of SGD on 16 rows of 64 packed tokens, for four devices, some parts replaced."""
    corpus = data.open_corpus(corpus_path)
    batches = data.Batches(corpus, data.pack(corpus.lengths, [128], 16 * 128), count=2)

    def made(**parts: Any) -> verify.Contract:
        given: dict[str, Any] = {"model": model, "loss": loss, "optimizer": optax.sgd(0.1), "batches": batches}
        given |= {"key": jax.random.key(0), "mesh": sharding.mesh(devices=jax.devices()[:4]), "stacked": None}
        return verify.Contract(**{**given, "model_options": {}, "loss_options": {}, **parts})

    return made


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[verify.Result]]:
    """Of the promises these alone."""
    every = _ways.promises

    def found(contract: verify.Contract, *names: str) -> list[verify.Result]:
        monkeypatch.setattr(_check, "promises", lambda contract: [p for p in every(contract) if p.name in names])
        results = list(verify.check(contract))
        assert [r.name for r in results] == list(names)
        return results

    return found


@pytest.fixture
def failures(check: Callable[..., list[verify.Result]]) -> Callable[..., dict[str, str | None]]:
    """Of these promises those that fail, and the first leaf of each."""
    return lambda contract, *names: {r.name: r.first for r in check(contract, *names) if not r.passed}


ZERO = [f"4 devices, ZeRO {zero}" for zero in range(2)] + ["4 devices, ZeRO 2, 4 microbatches"]


def test_the_contract_holds_of_a_plain_function(make: Make) -> None:
    results = list(verify.check(make()))
    ways = ["4 microbatches", *ZERO, "one document a row", "one document a row, in buckets"]
    assert [r.name for r in results] == [*ways, "saved, stopped and resumed", "float16 with loss scaling"]
    assert [str(r) for r in results if not r.passed] == []
    assert {r.within: r.allowed["gradient"] == 0 for r in results} == {
        "rounding": False,
        "float16": False,
        "exact": True,
    }
    assert 0 < max(r.found["gradient"] for r in results[:-2]) < 1e-5
    for r in results:
        line = f"{r.found['loss']:.1e}  {r.allowed['loss']:.1e}"
        assert line in str(r)
        assert len(str(r)) <= 120


@pytest.mark.slow
def test_the_contract_holds_of_a_transformer(make: Make) -> None:
    config = models.TransformerConfig(vocab=VOCAB, layers=2, width=16, heads=2, kv_heads=1)
    contract = make(
        model=functools.partial(models.transformer, config),
        loss=functools.partial(losses.next_token, label_smoothing=0.1),
        optimizer=optax.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-3)),
        stacked=models.stacked,
        model_options=verify.MODEL_OPTIONS,
        loss_options=verify.LOSS_OPTIONS,
    )
    results = list(verify.check(contract))
    assert len(results) == 14
    assert [str(r) for r in results if not r.passed] == []


def test_a_mean_of_means_is_caught(make: Make, failures: Any) -> None:
    def mean(apply: Any) -> LossFn:
        def of_slice(params: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, Aux]:
            loss_sum, aux = loss(apply)(params, batch, key)
            weight = jnp.maximum(aux.weight_sum, 1)
            return loss_sum / weight, Aux(jnp.ones(()), jax.tree.map(lambda x: x / weight, aux.metrics))

        return of_slice

    found = failures(make(loss=mean), "4 microbatches", *ZERO[:2], "one document a row", "saved, stopped and resumed")
    assert found == dict.fromkeys(["4 microbatches", *ZERO[:2]], "gradient of embed")


def test_documents_that_see_each_other_are_caught(make: Make, failures: Any) -> None:
    careless = functools.partial(model, heeds_segments=False)
    assert failures(make(model=careless), "4 microbatches", "one document a row") == {
        "one document a row": "gradient of embed"
    }


def test_options_that_change_something_are_caught(make: Make, failures: Any) -> None:
    """A mask that an implementation of attention drops, and a layer that is computed again with another constant."""
    options = {"drops the mask": {"causal": False}, "another constant": {"factor": 1.001}, "same": {"factor": 1.0}}
    found = failures(make(model_options=options), *options)
    assert found == {"drops the mask": "gradient of embed", "another constant": "gradient of embed"}


def test_a_leaf_that_is_nothing_but_rounding_hides_nothing(make: Make, failures: Any) -> None:
    def with_shift(slope: float = 0.0, **options: Any) -> Any:
        """Softmax cancels what is added to all of its scores, as the bias of keys in attention is."""
        init, apply = model(**options)

        def shifted(params: Params, *given: Any, **options: Any) -> jax.Array:
            shift, values = params["shift"], jnp.arange(8, dtype=params["shift"].dtype)
            mean = jax.nn.softmax(values / 4 + shift) @ values + slope * (shift - jax.lax.stop_gradient(shift))
            return apply(params, *given, **options) * mean / 4

        return lambda key: {**init(key), "shift": jnp.full((), 0.1)}, shifted

    options = {"twice": {"factor": 2.0}, "another slope": {"slope": 1e-3}, "same": {}}
    contract = make(model=with_shift, optimizer=optax.adam(1e-3), model_options=options)
    found = failures(contract, "4 microbatches", *ZERO[:2], *options, "float16 with loss scaling")
    assert found == {"twice": "gradient of embed", "another slope": "gradient of shift"}


def test_a_run_that_overflows_fails(make: Make, failures: Any) -> None:
    init, apply = model()

    def large(*given: Any, **options: Any) -> jax.Array:
        return jnp.log(jnp.exp(apply(*given, **options) + 12))

    found = failures(make(model=lambda: (init, large)), "4 microbatches", "float16 with loss scaling")
    assert [*found] == ["float16 with loss scaling"]
    assert found["float16 with loss scaling"].startswith("fit: the loss or gradient of steps 1 to 20 is")


def test_an_optimizer_that_looks_at_its_part_alone_is_caught(make: Make, failures: Any) -> None:
    def clip(layout: sharding.Layout | None) -> optax.GradientTransformation:
        def clipped(updates: Any) -> Any:
            norm = optax.tree.norm(updates)
            return jax.tree.map(lambda x: x * jnp.minimum(1, 0.01 / norm), updates)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            del params
            if layout is None:
                return clipped(updates), state
            specs = (layout.specs,)
            local = jax.shard_map(clipped, mesh=layout.mesh, in_specs=specs, out_specs=layout.specs, check_vma=False)
            return local(updates), state

        return optax.chain(optax.GradientTransformation(lambda _: optax.EmptyState(), update), optax.sgd(0.1))

    assert failures(make(optimizer=clip), *ZERO[:2]) == {ZERO[1]: "parameters of embed"}


def test_a_resume_that_forgets_its_step_is_caught(make: Make, failures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = checkpoint.Checkpoints.restore

    def forgetful(self: checkpoint.Checkpoints, like: TrainState) -> TrainState | None:
        state = restore(self, like)
        return state and state._replace(step=like.step)

    contract = make(optimizer=optax.adam(1e-3))
    assert failures(contract, "saved, stopped and resumed") == {}
    monkeypatch.setattr(checkpoint.Checkpoints, "restore", forgetful)
    first = failures(contract, "saved, stopped and resumed")["saved, stopped and resumed"]
    assert first == "parameters of params/embed"


def test_steps_that_overflow_are_taken_again(make: Make, failures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    high = functools.partial(optim.dynamic_loss_scale, initial=2.0**18)
    monkeypatch.setattr(optim, "dynamic_loss_scale", high)
    contract, seen = make(), list[Any]()
    follow = _ways.follow
    monkeypatch.setattr(_ways, "follow", lambda state, taken: seen.append(follow(state, taken)) or seen[-1])
    assert failures(contract, "float16 with loss scaling") == {}
    assert len(seen[-1].losses) == 2
    (skipped,) = (x for name, x in seen[-1].state.items() if name.endswith("skipped"))
    assert skipped > 0


def test_ten_times_what_is_allowed_fails_and_a_tenth_does_not(make: Make, check: Any, failures: Any) -> None:
    """A loss times a factor: its gradient, and what SGD makes of it, are as far off as it is."""
    (result,) = check(make(loss_options={"same": {}}), "same")
    tight, loose = sorted([result.allowed["loss"], result.allowed["gradient"]])
    options = {f"{x * 100:.4%}": {"factor": 1 + x} for x in (10 * tight, tight / 10, 10 * loose)}
    large, small, larger = options
    found = failures(make(loss_options=options), *options)
    assert found.keys() == {large, larger}
    assert found[larger] == "gradient of embed"
    assert small not in found


def test_exact_is_every_bit_and_nan_is_never_the_same() -> None:
    def run(x: float | np.ndarray) -> _check.Run:
        leaves = {"a": np.ones(3), "b": np.array([1.0, float(x)])}
        return _check.Run([1.0], leaves, leaves, leaves)

    def first(found: _check.Run, allowed: float) -> str | None:
        of_each = {quantity: {"a": allowed, "b": allowed} for quantity in _check.QUANTITIES}
        return _check._compare("", found, run(1), of_each if allowed else {}, "").first

    assert first(run(1), 0.0) is None
    assert first(run(np.nextafter(1, 2)), 0.0) == "gradient of b"
    assert first(run(1)._replace(moved={"a": np.ones(3), "b": np.array([1, 1 + 1e-9])}), 0.0) == "parameters of b"
    assert first(run(1)._replace(losses=[1 + 1e-9]), 0.0) == "loss of step 1"
    assert first(run(float("nan")), 1.0) == "gradient of b"


def test_what_cannot_be_checked_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="1 batches; use 2 or more"):
        make(batches=data.Batches(make().batches.corpora, make().batches.plan, count=1))
    with pytest.raises(ValueError, match=r"losses of the plain run are .*nan.*; lower the learning rate"):
        list(verify.check(make(optimizer=optax.sgd(float("nan")))))
