"""How far apart runs are, how far they may be, and the table of it."""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import jax
import numpy as np

from jaxlm.types import Params
from jaxlm.verify._contract import Contract, Leaves, Run
from jaxlm.verify._ways import plain, promises

QUANTITIES: Final[tuple[str, ...]] = "loss", "gradient", "parameters"
FACTOR: Final = 4
"""How many times as much as the trials found is allowed."""
TRIALS: Final = 3


class Result(NamedTuple):
    """What came of one promise. `str` makes a line of a table of it, under `HEADER`."""

    name: str
    """What was compared with the plain run."""
    found: dict[str, float]
    """The largest relative difference of a loss, of a leaf of the first gradient, and of how a parameter moved."""
    allowed: dict[str, float]
    within: str
    """Where that comes from: `rounding`, `float16` or `exact`, see `origin`."""
    first: str | None
    """The first leaf that differs by more: of the gradient, else of the parameters, else the step whose loss does."""

    @property
    def passed(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        numbers = "".join(f"{self.found[q]:>10.1e}{self.allowed[q]:>9.1e}" for q in QUANTITIES)
        return f"{self.name:<34}{numbers}  {self.within:<9} " + (f"FAIL: {self.first}" if self.first else "pass")


HEADER: Final = (
    f"{'relative difference of':<34}" + "".join(f"{q:>19}" for q in QUANTITIES) + "\n"
    f"{'from one device, whole batches':<34}" + len(QUANTITIES) * f"{'found':>10}{'allowed':>9}" + "  because of"
)


def check(contract: Contract) -> Iterator[Result]:
    """Computes in every way what must be the same, and compares, one after another.

    Each difference is the mean absolute one of a leaf, over the mean absolute value in the plain run. In another order
    sums round otherwise, and what that leads to is the experiment's own: an optimizer that takes signs makes much of
    little. So it's tried out, see `origin`. Products of matrices are computed in float32 proper, also where the default
    is less.

    Raises:
        ValueError: the plain run itself isn't finite; what a way refuses, such as rows that devices don't divide.
    """
    with jax.default_matmul_precision("highest"):
        run, params = plain(contract), contract.params
        expected = run(params)
    if not np.isfinite(expected.losses).all():
        raise ValueError(f"verify: the losses of the plain run are {expected.losses}; lower the learning rate")
    allowed: dict[str, dict[str, float]] = {"exact": dict.fromkeys(QUANTITIES, 0.0)}
    for name, size in _sizes(contract).items():
        allowed[name] = _sensitivity(run, params, expected, size)
    for promise in promises(contract):
        with jax.default_matmul_precision("highest"):
            found = promise.run()
        # Exact is all of the state, not only the parameters.
        pair = (_whole(found), _whole(expected)) if promise.within == "exact" else (found, expected)
        yield _compare(promise.name, *pair, allowed[promise.within], promise.within)


def origin(contract: Contract) -> str:
    """What the words in the table's last column but one mean."""
    rounding, float16 = _sizes(contract).values()
    return (
        f"rounding: every parameter is changed by ±{rounding:.1e} of itself, the error to expect of a float32 sum of\n"
        f"  {contract.positions:,} terms, as gradients are over a batch; {FACTOR} times the most that {TRIALS} such "
        "changes lead to is allowed.\n"
        f"float16: the same by {float16:.1e}, what a number loses in float16.\n"
        "exact: every bit of parameters, optimizer state and losses."
    )


def _sizes(contract: Contract) -> dict[str, float]:
    """float32 rounds by 2**-24; n roundings in random directions come to the square root of n."""
    return {"rounding": contract.positions**0.5 * 2**-24, "float16": 2**-11}


@jax.jit
def _changed(params: Params, key: jax.Array, size: jax.typing.ArrayLike) -> Params:
    """Every parameter by so much of itself more or less."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return structure.unflatten([(x * (1 + size * sign)).astype(x.dtype) for x, sign in zip(leaves, signs, strict=True)])


def _sensitivity(run: Callable[[Params], Run], params: Params, expected: Run, size: float) -> dict[str, float]:
    """What is allowed: so many times the largest differences that changes of the parameters lead to."""
    with jax.default_matmul_precision("highest"):
        trials = [_differences(run(_changed(params, jax.random.key(i), size)), expected) for i in range(TRIALS)]
    return {q: FACTOR * max(size, *(max(trial[q].values()) for trial in trials)) for q in QUANTITIES}


def _compare(name: str, found: Run, expected: Run, allowed: dict[str, float], within: str) -> Result:
    differences = _differences(found, expected)
    beyond = [
        f"{quantity} of {leaf}"
        for quantity in ("gradient", "parameters", "loss")
        for leaf, difference in differences[quantity].items()
        if not difference <= allowed[quantity]
    ]
    largest = {quantity: float(np.max(list(differences[quantity].values()))) for quantity in QUANTITIES}
    return Result(name, largest, allowed, within, beyond[0] if beyond else None)


def _differences(found: Run, expected: Run) -> dict[str, dict[str, float]]:
    def of(a: Leaves, b: Leaves) -> dict[str, float]:
        return {name: _relative(a[name], b[name]) for name in b}

    losses = ({f"step {i}": np.array(x) for i, x in enumerate(run.losses, 1)} for run in (found, expected))
    return {
        "loss": of(*losses),
        "gradient": of(found.gradient, expected.gradient),
        "parameters": of(found.moved, expected.moved),
    }


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """The mean absolute difference over the mean absolute value."""
    if a.shape != b.shape:
        return np.inf
    apart, size = np.abs(a - b).sum(), np.abs(b).sum()
    return float(apart / size) if size else (np.inf if apart else 0.0)


def _whole(run: Run) -> Run:
    return run._replace(moved=run.state)
