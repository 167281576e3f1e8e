"""How far apart runs are, how far they may be, and the table of it."""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import jax
import numpy as np

from jaxlm.types import Params
from jaxlm.verify._contract import Contract, Leaves, Run
from jaxlm.verify._ways import plain, promises

QUANTITIES: Final[tuple[str, ...]] = "loss", "gradient", "parameters"
Differences = dict[str, dict[str, float]]
"""Relative ones, by quantity and leaf."""
FACTOR: Final = 4
"""How many times as much as the trials found is allowed."""
NOISE: Final = 100
"""A leaf whose gradient differs so many times as much as that of the median leaf is nothing but rounding."""
TRIALS: Final = 3


class Result(NamedTuple):
    """What came of one promise. `str` makes a line of a table of it, under `HEADER`."""

    name: str
    """What was compared with the plain run."""
    found: dict[str, float]
    """The relative difference of a loss, of a leaf of the first gradient, and of how a parameter moved: of those that
    come nearest to what is allowed of them, or are the furthest beyond. NaN where the run itself failed."""
    allowed: dict[str, float]
    """Of that loss and of these leaves."""
    within: str
    """Where that comes from: `rounding`, `float16` or `exact`, see `origin`."""
    first: str | None
    """The first leaf that differs by more: of the gradient, else of the parameters, else the step whose loss does. Or
    how the run failed."""

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
    little. So it's tried out, see `origin`. Of a leaf whose gradient is nothing but rounding, as that of a bias of keys
    is, only the gradient is looked at. Products of matrices are computed in float32 proper, also where the default is
    less.

    Raises:
        ValueError: the plain run itself isn't finite; what a way refuses, such as rows that devices don't divide.
    """
    with jax.default_matmul_precision("highest"):
        run, params = plain(contract), contract.params
        expected = run(params)
    if not np.isfinite(expected.losses).all():
        raise ValueError(f"verify: the losses of the plain run are {expected.losses}; lower the learning rate")
    allowed: dict[str, Differences] = {"exact": {}}
    for name, size in _sizes(contract).items():
        allowed[name] = _sensitivity(run, params, expected, size)
    for promise in promises(contract):
        try:
            with jax.default_matmul_precision("highest"):
                found = promise.run()
        except FloatingPointError as error:
            none: dict[str, float] = dict.fromkeys(QUANTITIES, np.nan)
            yield Result(promise.name, none, none, promise.within, str(error))
            continue
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


def _sensitivity(run: Callable[[Params], Run], params: Params, expected: Run, size: float) -> Differences:
    """What is allowed: so many times the largest differences that changes of the parameters lead to.

    A leaf whose gradient is nothing but rounding, as that of a bias of keys is, counts for nothing in it. That gradient
    may differ by as much of the whole one's norm, and where the optimizer then goes is anyone's guess.
    """
    with jax.default_matmul_precision("highest"):
        trials = [_differences(run(_changed(params, jax.random.key(i), size)), expected) for i in range(TRIALS)]
    most = {q: {leaf: max(trial[q][leaf] for trial in trials) for leaf in trials[0][q]} for q in QUANTITIES}
    gradient = most["gradient"]
    noise = {x for x in gradient if gradient[x] > NOISE * max(size, float(np.median([*gradient.values()])))}
    usual = {q: FACTOR * max(size, *(x for leaf, x in most[q].items() if leaf not in noise)) for q in QUANTITIES}
    allowed = {q: dict.fromkeys(most[q], usual[q]) for q in QUANTITIES}
    norm, scales = _norm(expected.gradient), _scales(expected.gradient)
    for leaf in noise:
        allowed["gradient"][leaf] *= norm / scales[leaf]
        allowed["parameters"][leaf] = np.inf
    return allowed


def _compare(name: str, found: Run, expected: Run, allowed: Differences, within: str) -> Result:
    """What isn't in `allowed` must be the same."""
    result, beyond = Result(name, {}, {}, within, None), list[str]()
    for quantity, differences in _differences(found, expected).items():
        limits = {leaf: allowed.get(quantity, {}).get(leaf, 0.0) for leaf in differences}
        beyond += [f"{quantity} of {leaf}" for leaf, apart in differences.items() if not apart <= limits[leaf]]
        ratios = [apart / limits[leaf] if limits[leaf] else apart for leaf, apart in differences.items()]
        nearest = [*differences][int(np.argmax(ratios))]
        result.found[quantity], result.allowed[quantity] = differences[nearest], limits[nearest]
    return result._replace(first=beyond[0] if beyond else None)


def _differences(found: Run, expected: Run) -> Differences:
    losses = ({f"step {i}": np.array(x) for i, x in enumerate(run.losses, 1)} for run in (found, expected))
    return {
        "gradient": _apart(found.gradient, expected.gradient),
        "parameters": _apart(found.moved, expected.moved),
        "loss": _apart(*losses),
    }


def _apart(a: Leaves, b: Leaves) -> dict[str, float]:
    scales = _scales(b)
    sums = {name: float(np.abs(a[name] - b[name]).sum()) if a[name].shape == b[name].shape else np.inf for name in b}
    return {name: apart / scales[name] if apart else 0.0 for name, apart in sums.items()}


def _scales(leaves: Leaves) -> dict[str, float]:
    """What a leaf's differences are relative to: its values, or, of one without, what float32 may lose of all."""
    least = max(2**-24 * _norm(leaves), np.finfo(float).tiny)
    return {name: np.abs(leaf).sum() or least for name, leaf in leaves.items()}


def _norm(leaves: Leaves) -> float:
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves.values())))


def _whole(run: Run) -> Run:
    return run._replace(moved=run.state)
