"""Muon: momentum with all its singular values made one."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm import tree
from jaxlm.numbers import check_whole
from jaxlm.optim._adam import adamw
from jaxlm.optim._decay import add_decayed_weights
from jaxlm.optim._leaves import (
    TINY,
    Mask,
    Scalar,
    at,
    average,
    bounded,
    check_range,
    flags,
    layers,
    map_leaves,
    next_count,
    scale_by_learning_rate,
    transformation,
    wide_zeros,
    zeros_without,
)

POLAR_EXPRESS: Final = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""The best quintics in turn for singular values of 0.001 to 1 (https://arxiv.org/abs/2505.16932, algorithm 1)."""


@dataclasses.dataclass(frozen=True)
class Orthogonalize:
    r"""Brings the singular values of matrices close to 1 by odd polynomials, $a x + b x x^T x + c (x x^T)^2 x$."""

    coefficients: tuple[tuple[float, float, float], ...]
    """$(a, b, c)$ of each step."""
    dtype: Any
    """What the products are computed in."""
    eps: float
    """Added to the Frobenius norm, by which a matrix is divided first."""

    def __post_init__(self):
        check_range("Orthogonalize", TINY, float("inf"), eps=self.eps)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of matrices `[... R C]`, R at most C; also of zeros, which stay."""
        x = x.astype(self.dtype)
        wide = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        norm = jnp.sqrt(jnp.sum(jnp.square(wide), (-2, -1), keepdims=True))
        x = (wide / (norm + self.eps)).astype(self.dtype)

        def step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
            gram = x @ jnp.matrix_transpose(x)
            return abc[0] * x + (abc[1] * gram + abc[2] * (gram @ gram)) @ x, None

        return jax.lax.scan(step, x, jnp.array(self.coefficients, self.dtype))[0]


def newton_schulz(
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    *,
    dtype: Any = jnp.bfloat16,
    eps: float = 1e-7,
) -> Orthogonalize:
    """Muon's own way: one quintic, steep at 0, which brings singular values to between 0.7 and 1.2."""
    check_whole("newton_schulz", steps=steps)
    return Orthogonalize((coefficients,) * steps, dtype, eps)


def polar_express(steps: int = 5, *, dtype: Any = jnp.bfloat16, eps: float = 1e-7) -> Orthogonalize:
    """The Polar Express: the best quintic at each step, so that the same steps come closer to 1.

    All but the last divide by 1.01 first, lest rounding to bfloat16 leave singular values that grow.
    """
    check_whole("polar_express", steps=steps)
    table = [*POLAR_EXPRESS[:steps], *POLAR_EXPRESS[-1:] * (steps - len(POLAR_EXPRESS))]
    safe = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in table[:-1]]
    return Orthogonalize((*safe, *table[-1:]), dtype, eps)


def match_adamw(inputs: int, outputs: int) -> float:
    """Updates with the root mean square that AdamW's have, so that both take one learning rate.

    https://arxiv.org/abs/2502.16982, equation 4.
    """
    return 0.2 * max(inputs, outputs) ** 0.5


def spectral(inputs: int, outputs: int) -> float:
    """Updates whose effect on activations doesn't depend on the widths; for learning rates of about 0.02."""
    return max(1.0, outputs / inputs) ** 0.5


class MuonState(NamedTuple):
    """Muon's momentum, and NorMuon's second moments, float32 or wider."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any
    """For each matrix `[in out]` (or `[L in out]`) an array `[out]` (or `[L out]`), or None."""


def scale_by_muon(
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    orthogonalize: Orthogonalize | None = None,
    scale: Callable[[int, int], float] = match_adamw,
    variance_b2: Scalar | None = None,
    stacked: Mask = None,
    bank_sharding: jax.sharding.Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon (https://kellerjordan.github.io/posts/muon), for matrices `[in out]` alone.

    $$B = \mu B + G, \qquad O = \operatorname{orthogonalize}(G + \mu B), \qquad
    \text{update} = \operatorname{scale}(in, out) \, O$$

    Matrices of one shape, and their transposes, are orthogonalised together as a bank `[K R C]`: one batched product
    where there were many, and whole matrices for each device to work on.

    Args:
        momentum: at least 0 and below 1; a schedule is called with the number of updates so far.
        nesterov: look one step ahead, as above; otherwise O is that of B.
        orthogonalize: how; None: `newton_schulz()`.
        scale: the update's factor from the numbers of inputs and outputs.
        variance_b2: divide each output's weights by the root of an average, with this decay, of their mean square,
            and bring the matrix back to its norm (NorMuon, https://arxiv.org/abs/2510.05491); None: don't.
        stacked: which leaves are `[L in out]`, L matrices; None: none.
        bank_sharding: how banks lie on devices while they are orthogonalised: divided over the first axis, each
            device works on whole matrices of its own, for two all-to-alls in `orthogonalize`'s dtype.

    Raises:
        ValueError: a number out of range; at init a leaf that is no matrix.
    """
    check_range("scale_by_muon", 0.0, 1.0, momentum=momentum, variance_b2=variance_b2)
    orthogonalize = newton_schulz() if orthogonalize is None else orthogonalize

    def init(params: Any) -> MuonState:
        split = tree.named_leaves(layers(stacked, params))
        for name, leaf in tree.named_leaves(params).items():
            if len(leaf.shape) != 2 + split[name]:
                raise ValueError(
                    f"scale_by_muon: the leaf {name!r} has shape {leaf.shape}, so isn't "
                    f"{'a stack of matrices' if split[name] else 'a matrix'}; give it to AdamW (`matrices` of `muon`)"
                    f"{'' if split[name] else ', or mark it in `stacked` if its first axis is that of layers'}"
                )
        nu = None if variance_b2 is None else jax.tree.map(lambda p: zeros_without(p, -2), params)
        return MuonState(jnp.zeros((), jnp.int32), wide_zeros(params), nu)

    def update(updates: Any, state: MuonState, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params, extra
        decay = at(momentum, state.count)

        def leaf(grad: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
            grad = bounded(grad, mu.dtype)
            mu = (decay * mu + grad).astype(mu.dtype)
            return ((grad + decay * mu).astype(mu.dtype) if nesterov else mu), mu

        directions, mu = map_leaves(leaf, 2, updates, state.mu)
        directions = _in_banks(lambda bank: _laid_out(orthogonalize, bank, bank_sharding), directions)
        directions, nu = jax.tree.map(lambda x, m: x.astype(m.dtype), directions, mu), None
        if variance_b2 is not None:
            b2 = at(variance_b2, state.count)
            directions, nu = map_leaves(lambda x, v: _even_outputs(x, v, b2), 2, directions, state.nu)
        updates = jax.tree.map(lambda x: scale(*x.shape[-2:]) * x, directions)
        return updates, MuonState(next_count(state.count), mu, nu)

    return transformation(init, update)


def muon(
    learning_rate: Scalar,
    matrices: Mask,
    *,
    weight_decay: float = 0.0,
    decay_mask: Mask = None,
    cautious: bool = False,
    adamw_learning_rate: Scalar | None = None,
    adamw_b1: Scalar = 0.9,
    adamw_b2: Scalar = 0.95,
    adamw_eps: float = 1e-10,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices, AdamW for all else: embeddings, the output matrix, vectors.

    Args:
        learning_rate: a number or a schedule: with the default `scale`, what AdamW would get.
        matrices: which leaves Muon gets: True or False for every leaf, e.g.
            `by_name({"blocks/.*/kernel": True, ".*": False})`.
        weight_decay: of both.
        decay_mask: which leaves decay; None: all.
        cautious: decay only where the update goes the same way; see `add_decayed_weights`. Of Muon's part alone.
        adamw_learning_rate: None: the same.
        adamw_b1: see `adamw`.
        adamw_b2: see `adamw`.
        adamw_eps: see `adamw`.
        options: those of `scale_by_muon`; `stacked` among them, for `[L in out]`.
    """

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda is_matrix: "muon" if is_matrix else "adamw", flags(matrices, params, default=False))

    return optax.partition(
        {
            "muon": optax.chain(
                scale_by_muon(**options),
                add_decayed_weights(weight_decay, decay_mask, cautious=cautious),
                scale_by_learning_rate("muon", learning_rate),
            ),
            "adamw": adamw(
                learning_rate if adamw_learning_rate is None else adamw_learning_rate,
                b1=adamw_b1,
                b2=adamw_b2,
                eps=adamw_eps,
                weight_decay=weight_decay,
                decay_mask=decay_mask,
            ),
        },
        labels,
    )


def _laid_out(orthogonalize: Orthogonalize, bank: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The bank orthogonalised, each matrix whole on one device while that is done."""
    if sharding is None:
        return orthogonalize(bank)
    # Behind the barrier, lest the conversion be moved past the all-to-all, which would then carry twice the bytes.
    narrow = jax.lax.optimization_barrier(bank.astype(orthogonalize.dtype))
    return jax.lax.with_sharding_constraint(orthogonalize(jax.lax.with_sharding_constraint(narrow, sharding)), sharding)


def _in_banks(function: Callable[[jax.Array], jax.Array], matrices: Any) -> Any:
    """A function of `[K R C]`, R at most C, of all matrices of a shape and its transpose together."""
    leaves, structure = jax.tree.flatten(matrices)
    banks: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(leaves):
        banks.setdefault(tuple(sorted(x.shape[-2:])), []).append(i)
    out = list(leaves)
    for members in banks.values():
        wide = [_wide(leaves[i]).reshape(-1, *sorted(leaves[i].shape[-2:])) for i in members]
        bank = function(wide[0] if len(wide) == 1 else jnp.concatenate(wide))
        ends = itertools.accumulate((len(x) for x in wide), initial=0)
        for i, start, x in zip(members, ends, wide, strict=False):
            like = leaves[i]
            part = bank[start : start + len(x)].reshape(_wide(like).shape)
            out[i] = part if like.shape[-2] <= like.shape[-1] else jnp.matrix_transpose(part)
    return structure.unflatten(out)


def _wide(x: jax.Array) -> jax.Array:
    """The matrices, or their transposes if these have fewer rows than columns."""
    return x if x.shape[-2] <= x.shape[-1] else jnp.matrix_transpose(x)


def _even_outputs(direction: jax.Array, nu: jax.Array, b2: Any) -> tuple[jax.Array, jax.Array]:
    """NorMuon: each output's weights divided by the root of their average mean square, the matrix's norm kept."""

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True))

    nu = average(nu, jnp.mean(jnp.square(direction), -2), b2)
    even = direction / (jnp.sqrt(nu)[..., None, :] + 1e-10)
    return even * (norm(direction) / jnp.maximum(norm(even), 1e-10)), nu
