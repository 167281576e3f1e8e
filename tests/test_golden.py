"""The first steps of one fixed run. It tells that something changed, not whether it is right."""

import json
from pathlib import Path

import jax
import numpy as np
import optax

from jaxlm.losses import next_token
from jaxlm.models import TransformerConfig, transformer
from jaxlm.train import fit, make_step, start

GOLDEN = Path(__file__).with_name("golden.json")

HOW_TO_UPDATE = f"""The loss or the gradient norm of the first steps is not what it was.

If you did not mean to change the numbers (a refactoring, a faster kernel), this is a bug that you have just made: find
it. If you did (another default, a fixed bug), say so in the commit message, and put the new numbers into {GOLDEN.name}
in the same commit:

    {{}}
"""


def first_steps() -> dict[str, list[float]]:
    config = TransformerConfig(vocab=17, layers=2, width=16, heads=4, kv_heads=2, hidden=32, qk_norm=True)
    init, apply = transformer(config)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01))
    step = make_step(jax.value_and_grad(next_token(apply), has_aux=True), optimizer, jax.random.key(1))
    batches = [
        {"tokens": (np.arange(4)[:, None] * 5 + np.arange(12) ** 2 + i) % 17, "lengths": np.array([12, 7, 3, 12])}
        for i in range(3)
    ]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda s: (rng.normal(size=s.shape) / 3).astype(np.float32), shapes)
    metrics = [metrics for _, metrics in fit(step, start(params, optimizer), batches)]
    return {name: [float(m[name]) for m in metrics] for name in ("loss", "grad_norm")}


def test_first_steps_are_what_they_were():
    found, golden = first_steps(), json.loads(GOLDEN.read_text())
    # Processors and versions of XLA add in different orders, which float32 shows in the seventh digit.
    same = all(np.allclose(found[name], golden[name], rtol=1e-5, atol=0) for name in found)
    assert same, HOW_TO_UPDATE.format(json.dumps(found))
