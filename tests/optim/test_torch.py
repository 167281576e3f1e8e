"""The same 100 steps in float64 as PyTorch's optimizers and those of other packages, which know nothing of JAX.

What is no oracle, because it differs from its paper: timm's Adafactor, bitsandbytes' Lion, LAMB and Adafactor of
pytorch-optimizer; timm's LAMB unless it always adapts and doesn't clip.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import optim

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

STEPS = 100
SHAPES = {"scalar": (), "vector": (7,), "wide": (4, 9), "tall": (8, 5), "cube": (2, 4, 5)}
MATRICES = ("wide", "tall")
Make = Callable[[list[Any]], Any]  # of parameters, a torch optimizer


def leaves(names: Iterable[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    params = {name: 0.05 * rng.normal(size=SHAPES[name]) for name in names}
    return params, {name: rng.normal(size=(STEPS, *SHAPES[name])) for name in names}


def flipped(x: np.ndarray) -> np.ndarray:
    """Kernels are [in, out] here and [out, in] there."""
    return np.swapaxes(x, -1, -2) if x.ndim >= 2 else x


def in_torch(make: Make, params: dict[str, np.ndarray], grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters after each gradient."""
    leaves = {name: torch.nn.Parameter(torch.tensor(flipped(x).copy())) for name, x in params.items()}
    optimizer = make(list(leaves.values()))
    out = {name: np.empty((STEPS, *x.shape)) for name, x in params.items()}
    for t in range(STEPS):
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(flipped(grads[name][t]).copy())
        optimizer.step()
        for name, leaf in leaves.items():
            out[name][t] = flipped(leaf.detach().numpy())
    return out


def in_jax(tx: optax.GradientTransformation, params: Any, grads: Any) -> dict[str, np.ndarray]:
    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    double = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
    return jax.tree.map(np.asarray, run(double(params), double(grads)))


def assert_same(make_tx: Callable[[], Any], make: Make, names: Iterable[str] = SHAPES) -> None:
    """To 1e-12 of the way gone, at every step."""
    params, grads = leaves(names)
    with jax.enable_x64(True):
        got = in_jax(make_tx(), params, grads)
    wanted = in_torch(make, params, grads)
    for name, x in params.items():
        axes = tuple(range(1, x.ndim + 1))
        way = np.cumsum(np.max(np.abs(np.diff(wanted[name], axis=0, prepend=x[None])), axis=axes))
        error = np.max(np.abs(got[name] - wanted[name]), axis=axes)
        assert np.all(error <= 1e-12 * way), f"{name}: {np.max(error / way):.1e}"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay: float) -> None:
    assert_same(
        lambda: optim.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=decay),
        lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.95), weight_decay=decay),
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_of_torch(decay: float) -> None:
    """Its step is min(lr, 1/sqrt(t)), its eps1 a floor instead of a term, its decay times lr."""
    assert_same(
        lambda: optim.adafactor(min_factored=1, weight_decay=decay),
        lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(1e-30, 1e-3), weight_decay=decay),
    )


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactor_of_transformers(momentum: float | None) -> None:
    """Its momentum is of the scaled update, which is the same as long as the relative step doesn't change."""
    hf = pytest.importorskip("transformers.optimization")
    assert_same(
        lambda: optim.adafactor(min_factored=1, momentum=momentum),
        lambda p: hf.Adafactor(p, scale_parameter=True, relative_step=True, warmup_init=False, beta1=momentum),
    )


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_lion(decay: float) -> None:
    lion = pytest.importorskip("lion_pytorch")
    assert_same(
        lambda: optim.lion(1e-4, b1=0.95, b2=0.98, weight_decay=decay),
        lambda p: lion.Lion(p, lr=1e-4, betas=(0.95, 0.98), weight_decay=decay),
    )


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_lamb(decay: float, bias_correction: bool) -> None:
    timm = pytest.importorskip("timm.optim")
    assert_same(
        lambda: optim.lamb(1e-2, weight_decay=decay, bias_correction=bias_correction),
        lambda p: timm.Lamb(
            p, lr=1e-2, weight_decay=decay, bias_correction=bias_correction, always_adapt=True, max_grad_norm=None
        ),
    )


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("scale", "adjust"), [(optim.spectral, "original"), (optim.match_adamw, "match_rms_adamw")])
def test_muon(monkeypatch: pytest.MonkeyPatch, scale: Any, adjust: str, nesterov: bool) -> None:
    """torch orthogonalises in bfloat16 always: here it is kept from it. Its eps is a floor under the norm."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    assert_same(
        lambda: optax.chain(
            optim.scale_by_muon(
                nesterov=nesterov, scale=scale, orthogonalize=optim.newton_schulz(dtype=jnp.float64, eps=1e-37)
            ),
            optim.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(1e-3),
        ),
        lambda p: torch.optim.Muon(p, lr=1e-3, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust),
        MATRICES,
    )
