from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxlm.grads import accumulate, data_parallel, leaf_norms
from jaxlm.losses import next_token
from jaxlm.models import functional
from jaxlm.optim import skip_nonfinite
from jaxlm.sharding import by_rows, lay_out, mesh, replicated
from jaxlm.train import (
    LossSpikeError,
    compile_step,
    fit,
    keep_programs,
    make_step,
    start,
    stop_at_spikes,
    with_learning_rate,
)
from jaxlm.types import Aux, Batch, Params, TrainState

KEY = jax.random.key(0)


def squares(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    """The weighted squared errors of a linear model."""
    del key
    errors = batch["x"] @ params["w"] - batch["y"]
    sums = [jnp.sum(batch["weight"] * x) for x in (errors**2, jnp.ones_like(errors), jnp.abs(errors))]
    return sums[0], Aux(sums[1], {"absolute": sums[2]})


def noisy_squares(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    return squares(params, {**batch, "x": batch["x"] * jax.random.bernoulli(key, 0.5, batch["x"].shape)}, key)


def linear_batches(count: int, *, rows: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {"x": (count, rows, 3), "y": (count, rows), "weight": (count, rows)}
    drawn = {name: rng.uniform(0.5, 2, size=shape).astype(np.float32) for name, shape in arrays.items()}
    return [{name: x[i] for name, x in drawn.items()} for i in range(count)]


def linear_params() -> dict[str, jax.Array]:
    return {"w": jnp.array([0.5, -1.0, 2.0])}


grads_of_squares = jax.value_and_grad(squares, has_aux=True)


def copy(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def test_steps_are_those_of_float64_numpy():
    rate, w = 0.05, np.array([0.5, -1.0, 2.0])
    optimizer = optax.sgd(rate)
    step, state = jax.jit(make_step(grads_of_squares, optimizer, KEY)), start(linear_params(), optimizer)
    for i, batch in enumerate(linear_batches(3)):
        x, y, weight = (batch[name].astype(np.float64) for name in ("x", "y", "weight"))
        errors = x @ w - y
        gradient = 2 * x.T @ (weight * errors) / weight.sum()
        expected = {
            "loss": weight @ errors**2 / weight.sum(),
            "absolute": weight @ np.abs(errors) / weight.sum(),
            "grad_norm": np.linalg.norm(gradient),
            "weight": weight.sum(),
        }
        w = w - rate * gradient
        state, metrics = step(state, batch)
        assert copy(metrics) == pytest.approx(expected, rel=1e-5)
        assert state.step == i + 1
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_a_batch_without_weight_changes_the_step_alone(optimizer: optax.GradientTransformation):
    (batch,) = linear_batches(1)
    step, state = make_step(grads_of_squares, optimizer, KEY), start(linear_params(), optimizer)
    after, metrics = jax.jit(step)(state, batch | {"weight": np.zeros(4, np.float32)})
    assert copy(metrics) == {"loss": 0, "absolute": 0, "grad_norm": 0, "weight": 0}
    assert after.step == 1
    np.testing.assert_array_equal(after.params["w"], state.params["w"])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after.opt_state))


@pytest.mark.parametrize("weight", [np.nan, -1.0])
def test_a_weight_that_is_none_is_skipped_and_counted(weight: float):
    optimizer = skip_nonfinite(optax.adamw(0.1))
    step, state = make_step(grads_of_squares, optimizer, KEY), start(linear_params(), optimizer)
    after, metrics = jax.jit(step)(state, linear_batches(1)[0] | {"weight": np.full(4, weight, np.float32)})
    assert (metrics["skipped"], bool(np.isfinite(metrics["loss"]))) == (1, False)
    np.testing.assert_array_equal(after.params["w"], state.params["w"])


def test_bfloat16_parameters_and_moments_stay_bfloat16():
    params, optimizer = {"w": jnp.ones(3, jnp.bfloat16)}, optax.adam(0.1)
    state = start(params, optimizer)
    after, _ = jax.eval_shape(make_step(grads_of_squares, optimizer, KEY), state, linear_batches(1)[0])
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_the_optimizer_is_told_the_mean_loss():
    def update(updates: Params, state: jax.Array, params: Any = None, *, value: jax.Array, **extra: Any) -> Any:
        del state, params, extra
        return updates, value

    optimizer = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(()), update)
    step = jax.jit(make_step(grads_of_squares, optimizer, KEY))
    state, metrics = step(start(linear_params(), optimizer), linear_batches(1)[0])
    assert state.opt_state == metrics["loss"] > 0


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 9)))],
    ids=["sgd", "clipped adamw"],
)
@pytest.mark.parametrize("devices", [1, 8])
def test_nothing_is_compiled_after_the_first_step(optimizer: optax.GradientTransformation, devices: int):
    layout = lay_out(linear_params(), mesh(devices=jax.devices()[:devices]))
    step = jax.jit(make_step(data_parallel(grads_of_rows, layout), optimizer, KEY), donate_argnums=0)
    state = jax.device_put(start(linear_params(), optimizer), replicated(layout.mesh))
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    for batch in linear_batches(3, rows=8):
        state, _ = step(state, jax.device_put(batch | {"tokens": batch["x"]}, by_rows(layout.mesh)))
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == before


def grads_of_rows(params: Params, batch: Batch, key: jax.Array) -> Any:
    return grads_of_squares(params, batch, key)


def test_a_compiled_step_donates_its_state_and_refuses_other_shapes():
    optimizer = optax.adam(0.1)
    small, large = linear_batches(1, rows=2)[0], linear_batches(1, rows=4)[0]
    state = start(linear_params(), optimizer)
    step = compile_step(make_step(grads_of_squares, optimizer, KEY), state, [small, large])
    for batch in (large, small, large):
        before, (state, metrics) = state, step(state, batch)
        assert np.isfinite(metrics["loss"])
        assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state)))
    with pytest.raises(ValueError, match=r"weight float32\[3\], x float32\[3, 3\].* only for .*x float32\[2, 3\]"):
        step(state, linear_batches(1, rows=3)[0])
    assert state.step == 3  # the refused step has taken nothing


@pytest.mark.parametrize("ahead", [False, True], ids=["jitted", "compiled"])
def test_fit_yields_each_state_until_the_next(ahead: bool):
    optimizer, batches = optax.adam(0.1), linear_batches(3)
    step, state = make_step(grads_of_squares, optimizer, KEY), start(linear_params(), optimizer)
    steps, yielded = [], []
    for state, _ in fit(compile_step(step, state, batches[:1]) if ahead else step, state, iter(batches)):
        assert all(old.params["w"].is_deleted() for old in yielded)
        yielded.append(state)
        steps.append(int(state.step))
    assert steps == [1, 2, 3]


def test_fit_takes_a_batch_only_when_it_is_asked():
    batches = iter(linear_batches(3))
    loop = fit(make_step(grads_of_squares, optax.sgd(0.1), KEY), start(linear_params(), optax.sgd(0.1)), batches)
    next(loop)
    loop.close()
    assert len(list(batches)) == 2


@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.1), optax.contrib.dog()], ids=["adam", "dog keeps the first params"]
)
def test_the_parameters_given_to_start_outlive_donation(optimizer: optax.GradientTransformation):
    params = linear_params()
    for _ in fit(make_step(grads_of_squares, optimizer, KEY), start(params, optimizer), linear_batches(2)):
        pass
    assert not params["w"].is_deleted()
    np.testing.assert_array_equal(params["w"], linear_params()["w"])


def last(states: Iterator[tuple[TrainState, Any]]) -> TrainState:
    *_, (state, _) = states
    return state


def test_a_resumed_run_equals_a_straight_one_bitwise():
    optimizer, batches = optax.adam(0.05), linear_batches(20)
    grad_fn = jax.value_and_grad(noisy_squares, has_aux=True)

    def begin() -> TrainState:
        return start(linear_params(), optimizer)

    step = compile_step(make_step(grad_fn, optimizer, KEY), begin(), batches[:1])
    straight = copy(last(fit(step, begin(), batches)))
    saved = copy(last(fit(step, begin(), batches[:10])))
    resumed = copy(last(fit(step, jax.tree.map(jnp.asarray, saved), batches[10:])))
    assert resumed.step == 20
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    again = jax.tree.map(jnp.asarray, saved)._replace(step=jnp.zeros((), jnp.int32))  # draws other noise
    assert np.any(copy(last(fit(step, again, batches[10:]))).params["w"] != straight.params["w"])


VOCAB = 7


def plain() -> tuple[Params, Callable[..., jax.Array]]:
    params = {"embed": jax.random.normal(KEY, (VOCAB, 8)), "head": jnp.zeros((8, VOCAB))}
    return params, lambda params, tokens: params["embed"][tokens] @ params["head"]


def of_linen() -> tuple[Params, Callable[..., jax.Array]]:
    class Bigrams(linen.Module):
        @linen.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            return linen.Dense(VOCAB)(linen.Embed(VOCAB, 8)(tokens))

    return Bigrams().init(KEY, jnp.zeros((1, 2), int)), Bigrams().apply


def of_nnx() -> tuple[Params, Callable[..., jax.Array]]:
    class Bigrams(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed, self.head = nnx.Embed(VOCAB, 8, rngs=rngs), nnx.Linear(8, VOCAB, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.head(self.embed(tokens))

    init, apply = functional(Bigrams)
    return init(KEY), apply


@pytest.mark.parametrize("model", [plain, of_linen, of_nnx], ids=["functions", "linen", "nnx"])
def test_any_kind_of_model_learns(model: Callable[[], tuple[Params, Callable[..., jax.Array]]]):
    params, apply = model()
    optimizer = optax.adam(0.1)
    step = make_step(jax.value_and_grad(next_token(apply), has_aux=True), optimizer, KEY)
    counting = (np.arange(4)[:, None] + np.arange(8)) % VOCAB  # each token is the one before plus one
    batches = [{"tokens": counting.astype(np.uint8)}] * 30
    losses = [float(metrics["loss"]) for _, metrics in fit(step, start(params, optimizer), batches)]
    assert losses[0] > 0.7 * np.log(VOCAB)
    assert losses[-1] < 0.05


def with_nan_in(batches: list[dict[str, np.ndarray]], *indices: int) -> list[dict[str, np.ndarray]]:
    """In a single element of each of these batches."""
    for index in indices:
        batches[index]["y"][1] = np.nan
    return batches


@pytest.mark.usefixtures("unchecked_types")
def test_a_run_stops_once_so_many_steps_in_a_row_are_not_finite_and_names_them():
    optimizer = skip_nonfinite(optax.sgd(0.01))
    step, taken = make_step(grads_of_squares, optimizer, KEY), list[int]()
    batches = with_nan_in(linear_batches(12), 2, 3, 6, 7, 8, 9)  # twice is bearable, three times isn't

    def run() -> None:
        for state, _ in fit(step, start(linear_params(), optimizer), batches, patience=3):
            taken.append(int(state.step))
            assert np.isfinite(state.params["w"]).all()

    with pytest.raises(FloatingPointError, match=r"steps 7 to 9 isn't finite; .* indices 6 to 8\. .* step 7 makes"):
        run()
    with pytest.raises(FloatingPointError, match="steps 3 to 4"):
        list(fit(step, start(linear_params(), optimizer), batches[:4], patience=2))  # also if it is the last
    resumed = start(linear_params(), optimizer)._replace(step=jnp.asarray(40, jnp.int32))
    with pytest.raises(FloatingPointError, match=r"steps 43 to 44 .* indices 42 to 43"):
        list(fit(step, resumed, batches, patience=2))
    for patience in (0, 2.5):  # which no count of steps would ever be
        with pytest.raises(ValueError, match=f"patience is {patience}"):
            next(fit(step, resumed, [], patience=patience))  # pyright: ignore[reportArgumentType]


def test_the_learning_rate_is_that_of_the_update_where_steps_were_skipped():
    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return jnp.asarray([0.1, 0.2, 0.3, 0.4])[count]

    optimizer = skip_nonfinite(optax.sgd(schedule))
    step = with_learning_rate(make_step(jax.value_and_grad(squares, has_aux=True), optimizer, KEY), schedule)
    state, rates = start({"w": jnp.zeros(3)}, optimizer), []
    for batch in with_nan_in(linear_batches(4), 1):
        (gradient, aux), before = jax.grad(squares, has_aux=True)(state.params, batch, KEY), state.params["w"]
        state, metrics = jax.jit(step)(state, batch)
        rates.append(float(metrics["learning_rate"]))
        if len(rates) != 2:
            moved = (before - state.params["w"]) / (gradient["w"] / aux.weight_sum)
            np.testing.assert_allclose(moved, rates[-1], rtol=1e-5)
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.2, 0.3])


def test_of_a_population_some_may_diverge():
    axes, rates = TrainState(None, 0, 0), jnp.array([0.01, jnp.inf])  # type: ignore[arg-type]

    def advance(rate: Any, state: TrainState, batch: Any) -> Any:
        return make_step(grads_of_squares, optax.sgd(rate), KEY)(state, batch)

    begin = jax.vmap(lambda _: start(linear_params(), optax.sgd(0.1)), out_axes=axes)
    advance_both = partial(jax.vmap(advance, in_axes=(0, axes, None), out_axes=(axes, 0)), rates)
    *_, (_, metrics) = fit(advance_both, begin(rates), linear_batches(6), patience=2)
    assert np.isfinite(metrics["loss"]).tolist() == [True, False]
    with pytest.raises(FloatingPointError, match="steps 2 to 3"):
        list(fit(partial(advance_both.func, rates.at[0].set(jnp.inf)), begin(rates), linear_batches(6), patience=2))


def test_without_a_guard_the_first_step_that_was_not_finite_is_named():
    step = make_step(grads_of_squares, optax.sgd(0.01), KEY)
    with pytest.raises(FloatingPointError, match="steps 2 to 5"):
        list(fit(step, start(linear_params(), optax.sgd(0.01)), with_nan_in(linear_batches(9), 1), patience=4))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_norms_of_leaves_are_those_of_the_mean_gradient(microbatches: int):
    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
        loss, aux = squares({"w": params["w"] + params["b"]}, batch, key)
        return loss, aux

    params, batch = linear_params() | {"b": jnp.ones(())}, {"tokens": np.zeros((4, 1), int), **linear_batches(1)[0]}
    grad_fn = accumulate(jax.value_and_grad(loss_fn, has_aux=True), microbatches)
    (_, aux), grads = grad_fn(params, batch, KEY)
    step = make_step(leaf_norms(grad_fn), optax.sgd(0.01), KEY)
    _, metrics = step(start(params, optax.sgd(0.01)), batch)
    for name in ("w", "b"):
        norm = np.linalg.norm(np.asarray(grads[name], np.float64) / float(aux.weight_sum))
        np.testing.assert_allclose(metrics[f"norm/{name}"], norm, rtol=1e-6)
    together = np.sqrt(sum(float(metrics[f"norm/{name}"]) ** 2 for name in ("w", "b")))
    np.testing.assert_allclose(metrics["grad_norm"], together, rtol=1e-6)


def outcomes(losses: Sequence[float]) -> Iterator[tuple[TrainState, Any]]:
    """What `fit` would yield."""
    for loss in losses:
        yield TrainState(jnp.zeros(()), None, None), {"loss": jnp.asarray(loss)}


def spike_in(losses: Sequence[float], start: int = 0, **options: Any) -> int | None:
    """The step that is found to be one."""
    try:
        for _ in stop_at_spikes(outcomes(losses), start, window=20, **options):
            pass
    except LossSpikeError as spike:
        return spike.step
    return None


def test_a_loss_far_above_the_last_ones_is_a_spike_and_is_named():
    losses = (3 + 0.1 * np.random.default_rng(0).standard_normal(60)).tolist()
    assert spike_in(losses) is None
    for i in (20, 40, 59):
        assert spike_in([*losses[:i], 5.0, *losses[i + 1 :]]) == i + 1
        assert spike_in([*losses[:i], np.nan, *losses[i + 1 :]]) == i + 1
    assert spike_in([*losses[:19], 5.0, *losses[20:]]) is None  # not enough of them to compare with
    assert spike_in([*losses[:30], 3.5, *losses[31:]], deviations=2) == 31
    # A run that goes on finds what a straight one does.
    assert spike_in([*losses[45:50], 5.0], 45, before=[*losses[:3], np.nan, *losses[3:45]]) == 51
    with pytest.raises(LossSpikeError, match=r"step 31 is 9; that of the 20 steps before is 2\.978 with a standard"):
        list(stop_at_spikes(outcomes([*losses[:30], 9.0]), 0, window=20))


@pytest.mark.parametrize("options", [{"deviations": 0}, {"window": 1}], ids=str)
def test_spikes_of_nothing_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match="use above 0, 2 or more"):
        next(stop_at_spikes(outcomes([]), 0, **options))


def test_compiled_programs_are_kept_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "new"))
    for _ in range(2):
        keep_programs()
    assert told["jax_compilation_cache_dir"] == str(tmp_path / "new" / "xla")
    assert (tmp_path / "new" / "xla").stat().st_mode & 0o777 == 0o700
    for mode in (0o700, 0o755, 0o775, 0o707, 0o777):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        keep_programs(folder)
        assert folder.stat().st_mode & 0o777 == mode & 0o755
        assert told.pop("jax_compilation_cache_dir") == str(folder)
    (tmp_path / "775" / "planted").touch()
    keep_programs(tmp_path / "775")  # since others could no longer write to it
    assert told.pop("jax_compilation_cache_dir") == str(tmp_path / "775")
    (tmp_path / "775").chmod(0o775)
    with pytest.warns(UserWarning, match="others can write to it, and what is in it may be theirs"):
        keep_programs(tmp_path / "775")
    assert "jax_compilation_cache_dir" not in told
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"are not kept in .*/file \(.*exists.*name another folder in JAXLM_CACHE"):
        keep_programs(tmp_path / "file")
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="another user's"):
        keep_programs(tmp_path / "755")
    assert "jax_compilation_cache_dir" not in told
