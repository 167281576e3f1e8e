"""The papers' equations in float64 NumPy, one leaf at a time: what `jaxlm.optim` is measured against.

A rule maps a gradient and its parameter to a direction, un-negated, and keeps its own state: `u = rule(g, x)`. Zeros at
the start are plain 0.0, which broadcast. `descend` then makes the step `x <- x - lr (u + wd x)` that the rules share.
A stacked leaf is as many leaves, each with a rule of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

F64 = np.float64
Array = Any  # np.ndarray, or the 0.0 that a state begins with
Rule = Callable[[Array, Array], Array]
Value = float | Callable[[int], float]


def at(value: Value, count: int) -> float:
    """A hyperparameter at the update with this number, counted from 0."""
    return value(count) if callable(value) else value


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def norm(x: Array) -> float:
    return float(np.sqrt(np.sum(np.square(x))))


def descend(
    rule: Rule, x: Array, grads: Iterable[Array], learning_rate: Value, decay: float = 0.0, *, cautious: bool = False
) -> Iterator[Array]:
    """The parameter after each gradient, with decoupled decay times the learning rate.

    Decay: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, Algorithm 2 line 12, with
    its schedule multiplier and step size as one learning rate, as all implementations have it. Cautious: Chen et al.,
    "Cautious Weight Decay", arXiv 2510.12402, Algorithm 1: coordinates decay where u x >= 0.
    """
    x = np.asarray(x, F64)
    for count, g in enumerate(grads):
        u = rule(np.asarray(g, F64), x)
        decays = decay * (u * x >= 0) if cautious else decay
        x = x - at(learning_rate, count) * (u + decays * x)
        yield x


@dataclass
class Adam:
    """Kingma & Ba, "Adam", arXiv 1412.6980, Algorithm 1 (epsilon outside the root, after bias correction)."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    bias_correction: bool = True
    t: int = 0
    m: Array = 0.0
    v: Array = 0.0

    def __call__(self, g: Array, _: Array) -> Array:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        c1, c2 = (1 - self.b1**self.t, 1 - self.b2**self.t) if self.bias_correction else (1.0, 1.0)
        return (self.m / c1) / (np.sqrt(self.v / c2) + self.eps)


@dataclass
class Lion:
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Algorithm 2.

    `margin` is the least |c| seen on each coordinate, relative to the terms of c (infinite where these are zero): where
    it is of the order of rounding, the sign of c is not determined.
    """

    b1: Value = 0.9
    b2: Value = 0.99
    t: int = 0
    m: Array = 0.0
    margin: Array = np.inf

    def __call__(self, g: Array, _: Array) -> Array:
        b1, b2 = at(self.b1, self.t), at(self.b2, self.t)
        c = b1 * self.m + (1 - b1) * g
        size = b1 * np.abs(self.m) + (1 - b1) * np.abs(g)
        self.margin = np.minimum(
            self.margin, np.divide(np.abs(c), size, where=size > 0, out=np.full_like(size, np.inf))
        )
        self.m = b2 * self.m + (1 - b2) * g
        self.t += 1
        return np.sign(c)


@dataclass
class Lamb:
    """You et al., "Large Batch Optimization for Deep Learning", arXiv 1904.00962v5, Algorithm 2.

    phi is the identity there and in the authors' code, which has no bias correction (the paper allows that), and a
    ratio of 1 where either norm is 0. `adapt=False`: no ratio, as that code has it for biases and layer norms.
    `clip` bounds the ratio (DeepSpeed's max_coeff and min_coeff).
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    bias_correction: bool = True
    decay: float = 0.0
    adapt: bool = True
    clip: tuple[float, float] = (0.0, np.inf)
    adam: Adam = field(init=False)

    def __post_init__(self) -> None:
        self.adam = Adam(self.b1, self.b2, self.eps, self.bias_correction)

    def __call__(self, g: Array, x: Array) -> Array:
        u = self.adam(g, x) + self.decay * x
        if not self.adapt:
            return u
        ratio = norm(x) / norm(u) if norm(x) > 0 and norm(u) > 0 else 1.0
        return np.clip(ratio, *self.clip) * u


@dataclass
class Adafactor:
    """Shazeer & Stern, "Adafactor", arXiv 1804.04235: Algorithms 4 (matrices) and 5 (vectors), 6 for the constants.

    Without its step size rho_t, which is `relative_step`. V = R C / (1^T R) with the paper's sums; axes
    beyond two, which the paper doesn't have, are independent matrices over the two largest. `cap` and `momentum` (an
    average without bias correction, before the learning rate): Zhai et al., "Scaling Vision Transformers",
    arXiv 2106.04560, section 3.4. `offset`: the step at which fine-tuning began, for b2 alone.
    """

    decay: float = 0.8
    cap: float = 1.0
    offset: int = 0
    eps1: float = 1e-30
    eps2: float = 1e-3
    clip: float | None = 1.0
    parameter_scale: bool = True
    min_factored: int = 128
    momentum: float | None = None
    t: int = 0
    r: Array = 0.0
    c: Array = 0.0
    v: Array = 0.0
    m: Array = 0.0

    def __call__(self, g: Array, x: Array) -> Array:
        self.t += 1
        b2 = min(1 - max(self.t - self.offset, 1.0) ** -self.decay, self.cap)
        square = g**2 + self.eps1
        row, column = sorted(np.argsort(g.shape, kind="stable")[-2:]) if g.ndim >= 2 else (0, 0)
        if g.ndim >= 2 and min(g.shape[row], g.shape[column]) >= self.min_factored:
            self.r = b2 * self.r + (1 - b2) * square.sum(column, keepdims=True)
            self.c = b2 * self.c + (1 - b2) * square.sum(row, keepdims=True)
            v = self.r * self.c / self.r.sum(row, keepdims=True)
        else:
            v = self.v = b2 * self.v + (1 - b2) * square
        u = g / np.sqrt(v)
        if self.clip is not None:
            u = u / max(1.0, rms(u) / self.clip)
        if self.parameter_scale:
            u = max(self.eps2, rms(x)) * u
        if self.momentum is not None:
            u = self.m = self.momentum * self.m + (1 - self.momentum) * u
        return u


def relative_step(count: int) -> float:
    """rho_t of arXiv 1804.04235, Algorithm 6, with t = 1 at the first update."""
    return min(1e-2, (count + 1) ** -0.5)


def iterated(x: Array, coefficients: Iterable[tuple[float, float, float]]) -> Array:
    """X <- a X + (b A + c A^2) X with A = X X^T: an odd polynomial of the singular values."""
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def newton_schulz(g: Array, steps: int = 5, eps: float = 1e-7) -> Array:
    """Jordan et al., "Muon", kellerjordan.github.io/posts/muon, NewtonSchulz5."""
    return iterated(g / (norm(g) + eps), [(3.4445, -4.7750, 2.0315)] * steps)


POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]


def polar_express(g: Array, steps: int = 5, eps: float = 1e-7) -> Array:
    """Amsel et al., "The Polar Express", arXiv 2505.16932, the polynomials of Algorithm 1 as section 4.4 has them.

    There all iterations but the last divide by 1.01. Algorithm 1 itself also does so in the last one up to the seventh
    (a scale of about 1.01 on the result), and in the norm.
    """
    polynomials = (POLAR_EXPRESS + [(1.875, -1.25, 0.375)] * steps)[:steps]
    safe = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in polynomials[:-1]]
    return iterated(g / (norm(g) + eps), [*safe, polynomials[-1]])


def match_adamw(rows: int, columns: int) -> float:
    """Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, equation 4."""
    return 0.2 * np.sqrt(max(rows, columns))


def spectral(rows: int, columns: int) -> float:
    """The factor in Jordan's code, of a kernel [in, out]: out/in where that is more than 1."""
    return np.sqrt(max(1.0, columns / rows))


@dataclass
class Muon:
    """Jordan et al., "Muon", kellerjordan.github.io/posts/muon: B = mu B + G; U = G + mu B (Nesterov); O = NS(U).

    `variance_b2`: Li et al., "NorMuon", arXiv 2510.05491, Algorithm 1, whose rows are output neurons: columns
    here, where kernels are [in, out]. Without bias correction, and the length afterwards that of O, as in the authors'
    code.
    """

    momentum: float = 0.95
    nesterov: bool = True
    orthogonalize: Callable[[Array], Array] = newton_schulz
    scale: Callable[[int, int], float] = match_adamw
    variance_b2: float | None = None
    eps: float = 1e-10
    b: Array = 0.0
    v: Array = 0.0

    def __call__(self, g: Array, _: Array) -> Array:
        self.b = self.momentum * self.b + g
        o = self.orthogonalize(g + self.momentum * self.b if self.nesterov else self.b)
        if self.variance_b2 is not None:
            self.v = self.variance_b2 * self.v + (1 - self.variance_b2) * np.mean(o**2, axis=0)
            normalized = o / (np.sqrt(self.v)[None] + self.eps)
            o = normalized * norm(o) / norm(normalized) if norm(o) > 0 else o
        return self.scale(*g.shape) * o


@dataclass
class Soap:
    """Vyas et al., "SOAP", arXiv 2409.11321, Algorithms 3 and 4, in the order of the authors' code (nikhilvyas/SOAP).

    Where the code differs from the paper, the code: the first gradient only makes the bases, by eigh, and moves
    nothing; the bases of a step don't know its gradient; epsilon is added to the root of the uncorrected v; before the
    power iteration a basis is reordered by its estimated eigenvalues, and v with it. The momentum is kept in the
    original space, as in the paper: the code keeps it rotated, and turns it at every change of basis, which is the
    same. Vectors and axes longer than `largest` are not rotated.
    """

    b1: float = 0.95
    b2: float = 0.95
    shampoo_b2: float = 0.95
    eps: float = 1e-8
    every: int = 10
    largest: int = 10_000
    t: int = -1
    m: Array = 0.0
    v: Array = 0.0
    covariances: dict[int, Array] = field(default_factory=dict)
    bases: dict[int, Array] = field(default_factory=dict)

    def rotate(self, g: Array, transposed: bool = False) -> Array:
        """Q_L^T g Q_R for matrices, likewise for every rotated axis."""
        for axis, q in self.bases.items():
            g = np.moveaxis(np.moveaxis(g, axis, -1) @ (q.T if transposed else q), -1, axis)
        return g

    def accumulate(self, g: Array) -> None:
        """Algorithm 3 lines 14 and 15: L <- b L + (1 - b) G G^T, and so for every rotated axis."""
        for axis in range(g.ndim) if g.ndim >= 2 else ():
            if g.shape[axis] <= self.largest:
                rows = np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)
                old = self.covariances.get(axis, 0.0)
                self.covariances[axis] = self.shampoo_b2 * old + (1 - self.shampoo_b2) * rows @ rows.T

    def __call__(self, g: Array, _: Array) -> Array:
        self.t += 1
        if self.t == 0:
            self.accumulate(g)
            self.bases = {axis: np.linalg.eigh(c)[1][:, ::-1] for axis, c in self.covariances.items()}
            return np.zeros_like(g)
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * self.rotate(g) ** 2
        correction = np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        u = self.rotate(correction * self.rotate(self.m) / (np.sqrt(self.v) + self.eps), transposed=True)
        self.accumulate(g)
        if self.t % self.every == 0:  # Algorithm 4: one step of power iteration, then QR
            for axis, c in self.covariances.items():
                q = self.bases[axis]
                order = np.argsort(-np.diag(q.T @ c @ q), kind="stable")
                self.v = np.take(self.v, order, axis)
                self.bases[axis] = np.linalg.qr(c @ q[:, order])[0]
        return u
