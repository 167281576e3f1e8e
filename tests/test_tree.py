from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.tree import labels, named_leaves, nbytes, norm, size


class Pair(NamedTuple):
    mean: Any
    scale: Any


TREE = {"embed": 1, "blocks": [{"kernel": 2}, {"kernel": 3}], "norm": Pair(4, {"scale": 5})}


def test_leaves_are_named_by_their_paths():
    expected = {"blocks/0/kernel": 2, "blocks/1/kernel": 3, "embed": 1, "norm/mean": 4, "norm/scale/scale": 5}
    assert named_leaves(TREE) == expected
    assert named_leaves({}) == {}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({".*": 0}, {"embed": 0, "head": {"kernel": 0, "scale": 0}}),
        ({".*kernel": 1, ".*": 0}, {"embed": 0, "head": {"kernel": 1, "scale": 0}}),
        ({"head/.*": "a", "embed": None}, {"embed": None, "head": {"kernel": "a", "scale": "a"}}),
        ({"head/kernel": 1, "head/.*": 2, "e.*d": 3}, {"embed": 3, "head": {"kernel": 1, "scale": 2}}),
    ],
)
def test_a_leaf_takes_the_value_of_the_first_pattern_that_matches(patterns: dict[str, Any], expected: Any):
    assert labels({"embed": 0.5, "head": {"kernel": 0.5, "scale": 0.5}}, patterns) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"embed": 0}, "no pattern matches the leaf 'head/kernel'"),
        # The whole name must match.
        ({"embed": 0, "kernel": 0}, "no pattern matches the leaf 'head/kernel'"),
        ({"embed": 0, "head": 0}, "no pattern matches the leaf 'head/kernel'"),
        ({".*": 0, "embed": 1}, r"no leaf takes its value from \['embed'\]; the leaves are \['embed', 'head/kernel'\]"),
        ({".*": 0, "embde": 1}, "no leaf takes its value from"),
    ],
)
def test_leaves_and_patterns_without_a_partner_are_refused(patterns: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        labels({"embed": 1, "head": {"kernel": 2}}, patterns)


def test_labels_are_what_optax_takes():
    params = {"embed": jnp.ones(2), "head": {"kernel": jnp.ones((2, 2))}}
    names = labels(params, {".*kernel": "fast", ".*": "slow"})
    optimizer = optax.partition({"fast": optax.sgd(10.0), "slow": optax.sgd(1.0)}, names)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert (updates["embed"][0], updates["head"]["kernel"][0, 0]) == (-1, -10)


@pytest.mark.parametrize("shapes", [False, True])
def test_size_counts_elements(shapes: bool):
    tree = {"a": jnp.ones((2, 3)), "b": [jnp.ones(()), jnp.ones((0, 4))]}
    assert size(jax.eval_shape(lambda: tree) if shapes else tree) == 7


def test_nbytes_and_norm_are_those_of_all_leaves_and_the_norm_is_float32():
    tree = {"a": jnp.full((300, 300), 1.0, jnp.bfloat16), "b": jnp.array(4.0)}
    assert nbytes(tree) == nbytes(jax.eval_shape(lambda: tree)) == 300 * 300 * 2 + 4
    assert norm(tree).dtype == jnp.float32
    assert float(norm(tree)) == pytest.approx((300 * 300 + 16) ** 0.5, rel=1e-6)
    assert norm({}) == 0
    np.testing.assert_array_equal(jax.grad(lambda x: norm({"a": x}))(jnp.zeros(3)), np.zeros(3))


def test_patterns_may_be_without_a_leaf_only_where_that_is_said():
    assert labels({"a": 1}, {"a": True, "b": False}, unused=True) == {"a": True}
