"""From a gradient function and an optimizer to a step, and from a step to a loop."""

import collections
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import preflight, tree
from jaxlm.compiled import Compiled, donating
from jaxlm.grads import takes_loss_scale
from jaxlm.numbers import check_whole
from jaxlm.optim import loss_scaling, skipped
from jaxlm.types import Batch, GradFn, Metrics, Params, Step, TrainState


def keep_programs(folder: Path | None = None) -> None:
    """Keeps what is compiled in a folder, so that another run needn't compile the same program again.

    Nobody else may write to it, for whoever can chooses what this process runs. If others could put something there, or
    it can't be made, nothing is kept, and a warning says so.

    Args:
        folder: where; None: `xla` in what the environment variable JAXLM_CACHE names, or else in ~/.cache/jaxlm.
    """
    folder = folder or Path(os.environ.get("JAXLM_CACHE", "~/.cache/jaxlm")).expanduser() / "xla"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise PermissionError("it is another user's")
        if found.st_mode & 0o022:
            if any(folder.iterdir()):
                raise PermissionError("others can write to it, and what is in it may be theirs")
            folder.chmod(found.st_mode & 0o755)
    except OSError as error:
        warnings.warn(
            f"compiled programs are not kept in {folder} ({error}); name another folder in JAXLM_CACHE", stacklevel=2
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def start(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. It is a copy, so the caller's parameters outlive its donation."""
    return jax.tree.map(jnp.copy, TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)))


def make_step(grad_fn: GradFn, optimizer: optax.GradientTransformation, key: jax.Array) -> Step:
    """A training step: gradient, division by the batch's weight, optimizer update.

    Randomness in step n comes from `fold_in(key, n)`, so a resumed run draws what an uninterrupted one draws. A batch
    without a single weight has zero gradients and losses; one whose weights sum to less than nothing has NaN.

    Args:
        grad_fn: sums of losses and their gradient. It gets the scale of the loss as a fourth argument, if the optimizer
            has an `optim.dynamic_loss_scale`.
        optimizer: any optax transformation; those that take extra arguments get `value`, the mean loss.
        key: the key of the run.

    Returns:
        A pure function, for `jax.jit`, `fit` or `compile_step`. Its metrics: `loss` and the loss function's
        own, averaged over the batch's weight; `grad_norm`, the global norm of the mean's gradient; `weight`, the sum;
        where the loss is scaled, `loss_scale`, that of the next step; where steps may be skipped, `skipped`, how many
        were.

    Raises:
        ValueError: when traced: gradients in float16, or only one of `grad_fn` and optimizer that scales the loss.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        scaling = loss_scaling(state.opt_state)
        if scaling and not takes_loss_scale(grad_fn):
            raise ValueError(
                "make_step: the optimizer has a dynamic_loss_scale, but grad_fn takes no loss scale; wrap the loss in "
                "precision.scale_loss or compute_in(jnp.float16, ...)"
            )
        scale = (scaling.loss_scale,) if scaling else ()
        (loss_sum, aux), grads = grad_fn(state.params, batch, jax.random.fold_in(key, state.step), *scale)
        if any(g.dtype == jnp.float16 for g in jax.tree.leaves(grads)):
            raise ValueError(
                "make_step: gradients in float16, whose range is too small for them; keep parameters in float32, and "
                "compute in float16 by precision.compute_in"
            )
        weight = aux.weight_sum
        # The root is 0 of 0, and NaN of what is no weight, but of no other, where it would mislead `jax_debug_nans`.
        one_over_weight = jnp.where(weight > 0, 1 / weight, jnp.sqrt(weight))
        grads, means = jax.tree.map(
            lambda x: (x * one_over_weight).astype(x.dtype), (grads, {"loss": loss_sum, **aux.metrics})
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=means["loss"])
        params = optax.apply_updates(state.params, updates)
        metrics = {**means, "grad_norm": tree.norm(grads), "weight": weight}
        if scaling := loss_scaling(opt_state):
            metrics["loss_scale"] = scaling.loss_scale
        if (count := skipped(opt_state)) is not None:
            metrics["skipped"] = count
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def with_learning_rate(step: Step, schedule: optax.Schedule) -> Step:
    """The same step with a further metric, `learning_rate`: what the schedule is at where the optimizer has it.

    Steps that were skipped (`optim.skip_nonfinite`, `optim.dynamic_loss_scale`) haven't advanced it.

    Args:
        step: what `make_step` returns.
        schedule: the one that the optimizer was given.
    """

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        count = skipped(state.opt_state)
        rate = schedule(state.step if count is None else state.step - count)
        state, metrics = step(state, batch)
        return state, {**metrics, "learning_rate": jnp.float32(rate)}

    return run


def compile_step(
    step: Step,
    state: TrainState,
    batches: Iterable[Batch],
) -> Compiled:
    """Compiles a step for every shape of batch, so that nothing is compiled once the run has begun.

    Args:
        step: what `make_step` returns.
        state: the state, or its shapes and shardings.
        batches: one batch of each shape, or its shapes and shardings.

    Returns:
        A step that donates the state which it is given, and refuses batches of another shape.

    Raises:
        MemoryError: it needs more memory than a device has; `preflight.memory` says what takes it, and what would help.
    """
    return preflight.compile_to_fit(step, state, [*batches])


def fit(
    step: Step, state: TrainState, batches: Iterable[Batch], *, patience: int = 20
) -> Iterator[tuple[TrainState, Metrics]]:
    """Yields the state and the metrics after each batch.

    The state is donated: `fit` owns the one passed in, and one that it has yielded is valid until the next is asked
    for. Nothing here waits for the step that has just begun; the metrics of the one before are looked at while it is
    under way, so the device always has something to do.

    Args:
        step: a step, to be jitted here, or a compiled one.
        state: what `start` returned, or a restored one.
        batches: an iterator of batches, on host or device; the loop ends with it.
        patience: after how many steps in a row whose loss or gradient isn't finite to give up; where several models
            are trained at once (`jax.vmap`), those of none. What becomes of the parameters meanwhile is the
            optimizer's: see `optim.skip_nonfinite`.

    Raises:
        FloatingPointError: that many steps weren't finite, or gradients overflow at the smallest loss scale again and
            again. It names the steps; the batch of step n is that with the index n - 1.
        ValueError: `patience` is below 1, or a batch of NumPy's has integers beyond 32 bits, which JAX would cut off.
    """
    check_whole("fit", patience=patience)
    run = step if isinstance(step, Compiled) else donating(step, state)
    taken, in_a_row, before = int(state.step), 0, Metrics()
    with preflight.explained():
        for batch in batches:
            tree.check_integers(batch)
            state, metrics = run(state, batch)
            in_a_row = _check_finite(before, taken, in_a_row, patience)
            taken, before = taken + 1, metrics
            yield state, metrics
        _check_finite(before, taken, in_a_row, patience)


def _check_finite(metrics: Metrics, step: int, in_a_row: int, patience: int) -> int:
    """How many steps in a row weren't finite, up to this one, whose metrics these are."""
    if "loss_scale" in metrics and np.all(metrics["loss_scale"] == 0):
        raise FloatingPointError(
            f"fit: gradients overflow float16 even at the smallest loss scale, and {metrics['skipped']} steps were "
            "skipped; look for NaN in parameters and data, lower the learning rate, or compute in bfloat16"
        )
    looked_at = jax.device_get([metrics[name] for name in ("loss", "grad_norm") if name in metrics])
    if all(np.isfinite(x).any() for x in looked_at):
        return 0
    first, in_a_row = step - in_a_row, in_a_row + 1
    if in_a_row == patience:
        raise FloatingPointError(
            f"fit: the loss or gradient of steps {first} to {step} isn't finite; their batches have the indices "
            f"{first - 1} to {step - 1}. Look at these, find where step {first} makes a NaN by nans.first_nan, or "
            "lower the learning rate; a few such steps, optim.skip_nonfinite leaves out"
        )
    return in_a_row


class LossSpikeError(Exception):
    """A loss far above the ones before it."""

    def __init__(self, step: int, loss: float, recent: Sequence[float]):
        super().__init__(
            f"the loss of step {step} is {loss:.4g}; that of the {len(recent)} steps before is {np.mean(recent):.4g} "
            f"with a standard deviation of {np.std(recent):.2g}"
        )
        self.step = step


def stop_at_spikes(
    taken: Iterator[tuple[TrainState, Metrics]],
    start: int,
    *,
    before: Iterable[float] = (),
    deviations: float | int = 6,
    window: int = 128,
) -> Iterator[tuple[TrainState, Metrics]]:
    """Yields what `fit` does, until a loss is more than so many standard deviations above the mean of the last ones.

    What PaLM did then (https://arxiv.org/abs/2204.02311, section 5.1): go back to a checkpoint about 100 steps before,
    and leave out 200 to 500 batches, by `data.Batches(skip=...)`. Losses are looked at a step late, as `fit` does.

    Args:
        taken: what `fit` returns.
        start: the number of steps taken before the first of them.
        before: losses of earlier steps, the last one last, so that an interrupted run finds what a straight one does.
        deviations: how many.
        window: how many losses to compare with; with fewer, early in a run, nothing is a spike. Only finite ones enter.

    Raises:
        LossSpikeError: there was one, or a loss that isn't finite. It knows the `step`.
        ValueError: `deviations` isn't above 0, or the window is less than 2.
    """
    if not deviations > 0 or window < 2:
        raise ValueError(f"stop_at_spikes: {deviations} deviations in a window of {window}; use above 0, 2 or more")
    recent = collections.deque(filter(math.isfinite, before), maxlen=window)

    def check(step: int, loss: float) -> None:
        if len(recent) == window and not loss <= np.mean(recent) + deviations * np.std(recent):
            raise LossSpikeError(step, loss, recent)
        if math.isfinite(loss):
            recent.append(loss)

    last: jax.Array | None = None
    for start, (state, metrics) in enumerate(taken, start):
        if last is not None:
            check(start, float(last))
        last = metrics["loss"]
        yield state, metrics
    if last is not None:
        check(start + 1, float(last))
