"""Ways of computing what must be the same."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import checkpoint, data, grads, optim, precision, sharding, train
from jaxlm.types import Batch, GradFn, Metrics, Params, Step, TrainState
from jaxlm.verify._contract import Contract, Run, emptied, follow, gradient_of

Within = Literal["rounding", "float16", "exact"]


class Promise(NamedTuple):
    """Something that must come out as the plain run does."""

    name: str
    run: Callable[[], Run]
    within: Within
    """How much it may differ: see `check`."""


def promises(contract: Contract) -> Iterator[Promise]:
    """All that the contract says."""
    k, devices, lengths = contract.microbatches, contract.mesh.size, [b["tokens"].shape[1] for b in contract.given]
    longest = max(lengths)
    yield Promise(f"{k} microbatches", partial(accumulated, contract, k), "rounding")
    for zero in range(4 if contract.stacked else 3):
        slices = k if zero > 1 else 1
        name = f"{devices} devices, ZeRO {zero}" + (f", {k} microbatches" if zero > 1 else "")
        yield Promise(name, partial(divided, contract, zero, slices), "rounding")
    if not contract.batches.augment:
        yield Promise("one document a row", partial(one_a_row, contract, [longest]), "rounding")
        buckets = [-(-longest // 2), longest]
        yield Promise("one document a row, in buckets", partial(one_a_row, contract, buckets), "rounding")
    for name, options in contract.loss_options.items():
        yield Promise(name, partial(alone, contract, gradient_of(contract.loss_fn(**options))), "rounding")
    for name, options in contract.model_options.items():
        yield Promise(name, partial(alone, contract, gradient_of(contract.loss_fn(options))), "rounding")
    yield Promise("saved, stopped and resumed", partial(resumed, contract), "exact")
    yield Promise("float16 with loss scaling", partial(in_float16, contract), "float16")


def plain(contract: Contract) -> Callable[[Params], Run]:
    """The run that all are compared with, from any parameters: one device, whole batches, as the plan has them."""
    return lambda params: _run(contract.plain_step, contract.start(params, contract.chain()), contract.given)


def resumed(contract: Contract) -> Run:
    """Saved half-way, and gone on with from nothing but the checkpoint and its step."""
    step, half = contract.plain_step, len(contract.batches) // 2
    fresh = partial(contract.start, contract.params, contract.chain())

    def taken(folder: str) -> Iterator[tuple[TrainState, Metrics]]:
        with checkpoint.Checkpoints(folder, {}) as checkpoints:
            state = fresh()
            for state, metrics in train.fit(step, state, contract.given[:half]):
                yield state, metrics
            checkpoints.save(state)
        with checkpoint.Checkpoints(folder, {}) as checkpoints:
            state = checkpoints.restore(fresh())
        assert state is not None
        with closing(data.iterate(contract.batches, start=int(state.step), place=emptied)) as rest:
            yield from train.fit(step, state, rest)

    with TemporaryDirectory() as folder:
        return follow(fresh(), taken(folder))


def alone(contract: Contract, grad_fn: GradFn, batches: Sequence[Batch] | None = None) -> Run:
    """On one device."""
    optimizer = contract.chain()
    state = contract.start(contract.params, optimizer)
    return _run(contract.step(grad_fn, optimizer), state, batches or contract.given)


def accumulated(contract: Contract, microbatches: int) -> Run:
    """In microbatches."""
    return alone(contract, grads.accumulate(gradient_of(contract.loss_fn()), microbatches))


def divided(contract: Contract, zero: int, microbatches: int) -> Run:
    """On all devices of the mesh, with a stage of ZeRO."""
    params = contract.params
    layout = sharding.lay_out(
        params, contract.mesh, zero=zero, rules=contract.rules, stacked=contract.stacked, tolerance=1.0
    )
    options = {"wrap_layer": grads.gather_layers(layout, contract.layers)} if zero == 3 else {}
    grad_fn = grads.data_parallel(gradient_of(contract.loss_fn(options)), layout, microbatches=microbatches)
    optimizer, rows = contract.chain(layout), sharding.by_rows(contract.mesh)
    state = jax.jit(lambda params: train.start(params, optimizer), out_shardings=layout.state(optimizer))(params)
    placed = [sharding.place(batch, rows) for batch in contract.given]
    return _run(contract.step(grad_fn, optimizer), state, placed)


def one_a_row(contract: Contract, row_lengths: Sequence[int]) -> Run:
    """Every document alone in the shortest of the rows that holds it, straight from the corpus."""
    steps = [contract.documents(i) for i in range(len(contract.given))]
    found: list[dict[int, list[np.ndarray]]] = []
    for texts in steps:
        rows = data.one_a_row(np.array([len(text) for text in texts]), row_lengths).row_lengths
        found.append({length: [t for t, n in zip(texts, rows, strict=True) if n == length] for length in row_lengths})
    counts = {length: max(len(of_length[length]) for of_length in found) for length in row_lengths}
    batches: list[Batch] = []
    for of_length, batch in zip(found, contract.given, strict=True):
        also = {"window": batch["window"]} if "window" in batch else {}
        batches.append({str(n): _rows(of_length[n], count, n) | also for n, count in counts.items() if count})
    return alone(contract, _over_batches(gradient_of(contract.loss_fn())), batches)


def in_float16(contract: Contract) -> Run:
    """Computed in float16, with a scale of the loss that is found on the way."""
    optimizer = optim.dynamic_loss_scale(contract.chain())
    step = contract.step(gradient_of(precision.compute_in(jnp.float16, contract.loss_fn())), optimizer)
    state = contract.start(contract.params, optimizer)

    def taken() -> Iterator[tuple[TrainState, Metrics]]:
        """Steps that weren't skipped; those that were are taken again, with the scale that they left."""
        waiting, skipped = deque(contract.given), 0
        # `fit` asks for a batch only after what became of the one before has been seen here.
        for after, metrics in train.fit(step, state, iter(lambda: waiting[0] if waiting else None, None)):
            if metrics["skipped"] > skipped:
                skipped += 1
            else:
                waiting.popleft()
                yield after, metrics

    return follow(state, taken())


def _run(step: Step, state: TrainState, batches: Sequence[Batch]) -> Run:
    return follow(state, train.fit(step, state, batches))


def _rows(texts: Sequence[np.ndarray], count: int, length: int) -> dict[str, Any]:
    tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], lengths[row] = text, len(text)
    return {"tokens": tokens, "lengths": lengths}


def _over_batches(grad_fn: GradFn) -> GradFn:
    """Adds up what is found of several batches, by any names."""

    def summed(params: Params, batches: Mapping[str, Any], key: jax.Array) -> Any:
        first, *others = (grad_fn(params, batch, key) for batch in batches.values())
        return jax.tree.map(lambda *x: sum(x[1:], x[0]), first, *others)

    return summed
