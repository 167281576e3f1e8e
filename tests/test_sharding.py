"""Meshes and layouts: what is divided and what isn't, the state of any chain, and what is refused."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxlm import models, optim, sharding, tree
from jaxlm.types import Params

STACKED = optim.by_name({"blocks/.*": True, ".*": False})
P = PartitionSpec


def shapes(**sizes: tuple[int, ...]) -> Params:
    """Parameters' shapes; `blocks_w` is `blocks/w`."""
    leaves: Params = {"blocks": {}}
    for name, size in sizes.items():
        branch = leaves["blocks"] if name.startswith("blocks_") else leaves
        branch[name.removeprefix("blocks_")] = jax.ShapeDtypeStruct(size, jnp.float32)
    return leaves


def specs(layout: sharding.Layout) -> dict[str, PartitionSpec]:
    return tree.named_leaves(layout.specs)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((), {"data": 8}),
        ((1, 8, 1), {"data": 8}),
        ((2,), {"replica": 2, "data": 4}),
        ((1, -1, 2), {"data": 4, "model": 2}),
        ((2, 2, 2), {"replica": 2, "data": 2, "model": 2}),
        ((1, 1, 8), {"data": 1, "model": 8}),
        ((1, (2, 4)), {"data0": 2, "data1": 4}),
        ((2, (2, 2)), {"replica": 2, "data0": 2, "data1": 2}),
        ((1, (2, 1, 2), 2), {"data0": 2, "data1": 2, "model": 2}),
        ((1, (1, 8)), {"data": 8}),
    ],
)
def test_a_mesh_has_the_axes_that_are_longer_than_1(sizes: tuple[int, ...], shape: dict[str, int]):
    assert sharding.mesh(*sizes).shape == shape


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `mesh` asks of a TPU."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0
    device_kind: str = "TPU v5"
    platform: str = "tpu"
    process_index: int = 0


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5 lite"])  # the latter JAX orders in rings
@pytest.mark.parametrize(
    ("box", "sizes", "shape"),
    [
        ((2, 2, 2), (), {"data0": 2, "data1": 2, "data2": 2}),
        ((4, 4, 1), (), {"data0": 4, "data1": 4}),
        ((2, 4, 1), (), {"data0": 2, "data1": 4}),
        ((1, 8, 1), (), {"data": 8}),
        ((1, 1, 1), (), {"data": 1}),
        ((4, 4, 4), (1, -1, 4), {"data0": 4, "data1": 4, "model": 4}),
        ((4, 4, 4), (1, -1, 16), {"data": 4, "model": 16}),
        ((4, 4, 1), (1, -1, 2), {"data0": 2, "data1": 4, "model": 2}),
        ((4, 4, 1), (2,), {"replica": 2, "data0": 4, "data1": 2}),
    ],
)
def test_on_tpus_data_is_an_axis_for_each_dimension_of_the_box_that_it_fills(
    box: tuple[int, int, int], sizes: tuple[Any, ...], shape: dict[str, int], kind: str
):
    chips = [Chip(place, device_kind=kind) for place in itertools.product(*map(range, box))]
    mesh = sharding.mesh(*sizes, devices=chips)
    assert mesh.shape == shape
    assert {*mesh.devices.flat} == {*chips}
    places = np.array([chip.coords for chip in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    for axis in sharding.data_axes(mesh):
        steps = np.diff(places, axis=mesh.axis_names.index(axis)).reshape(-1, 3)
        assert np.count_nonzero(steps.any(axis=0)) == (mesh.shape[axis] > 1)  # all go along one dimension


@pytest.mark.parametrize(("data", "shape"), [((2, 4), {"data0": 2, "data1": 4}), ((8,), {"data": 8})])
def test_on_tpus_too_data_is_the_axes_that_are_given(data: tuple[int, ...], shape: dict[str, int]):
    chips = [Chip(place) for place in itertools.product(range(2), range(2), range(2))]
    assert sharding.mesh(1, data, devices=chips).shape == shape


def test_on_slices_of_tpus_each_replica_is_one():
    chips = [Chip(place, slice_index=n) for n in range(2) for place in itertools.product(range(2), range(4), range(1))]
    mesh = sharding.mesh(2, devices=chips)
    assert mesh.shape == {"replica": 2, "data0": 2, "data1": 4}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]


def test_tpus_that_do_not_fill_a_box_are_one_axis():
    """On eight v5e chips JAX puts neighbours along `model` next to each other in a ring around the slice."""
    chips = [Chip((x, y, 0), device_kind="TPU v5 lite") for x in range(2) for y in range(4)]
    assert sharding.mesh(1, -1, 2, devices=chips).shape == {"data": 4, "model": 2}


@pytest.mark.parametrize(
    "sizes", [(3,), (1, 3), (1, -1, 16), (0,), (1, 0), (1, -1, -1), (1, -2), (1, (2, 3)), (1, (-2, -4)), (1, ())]
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes: tuple[int, ...]):
    with pytest.raises(ValueError, match="isn't the number of devices, 8; choose sizes of 1 or more"):
        sharding.mesh(*sizes)


@pytest.mark.parametrize(
    ("sizes", "copies"), [((), 1), ((2,), 1), ((1, -1, 2), 2), ((1, (2, 4)), 1), ((1, (2, 2), 2), 2)]
)
def test_rows_are_divided_in_order_over_all_but_the_model_s_axis(sizes: tuple[int, ...], copies: int):
    mesh = sharding.mesh(*sizes)
    batch = {"tokens": np.arange(32).reshape(16, 2), "lengths": np.arange(16)}
    placed = sharding.place(batch, sharding.by_rows(mesh))
    for name, x in placed.items():
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start)[::copies]
        np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), batch[name])
        assert {len(shard.data) for shard in shards} == {16 * copies // 8}


@pytest.mark.parametrize(
    ("sizes", "own", "expected"),
    [
        ((1, 8, 1), [0, 1, 2, 3], ((0, 1, 2, 3), 8)),
        ((1, 8, 1), [7, 2], ((2, 7), 8)),
        ((2, 4, 1), [4, 5, 6, 7], ((4, 5, 6, 7), 8)),
        ((1, 4, 2), [4, 5], ((2,), 4)),
        ((1, 2, 4), [2, 3], ((0,), 2)),  # another process has the same rows, for the other half of the model
        ((1, 2, 4), [0, 4], ((0,), 1)),
        ((1, 8, 1), list(range(8)), ((0,), 1)),
    ],
)
def test_a_process_has_the_rows_of_its_devices(
    sizes: tuple[int, int, int], own: list[int], expected: tuple[tuple[int, ...], int]
):
    rows = sharding.by_rows(sharding.mesh(*sizes))
    assert sharding.share(rows, [rows.mesh.devices.flat[i] for i in own]) == expected


def test_what_is_replicated_lies_whole_on_each_device_and_all_comes_back_to_the_host():
    mesh = sharding.mesh(devices=jax.devices()[:2])
    x = jax.device_put(jnp.arange(4.0), sharding.replicated(mesh))
    assert [shard.data.shape for shard in x.addressable_shards] == [(4,), (4,)]
    found = sharding.to_host({"x": x, "y": jax.device_put(jnp.arange(4.0), sharding.by_rows(mesh))})
    assert all(isinstance(one, np.ndarray) for one in found.values())
    jax.tree.map(lambda one: np.testing.assert_array_equal(one, np.arange(4.0)), found)


def test_matrices_are_divided_along_the_first_dimension_that_can_be_and_vectors_not():
    params = shapes(
        blocks_w=(16, 24, 64),
        blocks_v=(8, 20, 64),
        blocks_scale=(8, 64),
        embed=(50257, 64),
        bias=(8,),
        gain=(),
        cube=(4, 8, 16),
    )
    layout = sharding.lay_out(params, sharding.mesh(), zero=1, stacked=STACKED)
    assert specs(layout) == {
        "blocks/w": P(None, "data"),
        "blocks/v": P(None, None, "data"),
        "blocks/scale": P(),
        "embed": P(None, "data"),
        "bias": P(),
        "gain": P(),
        "cube": P(None, "data"),
    }
    assert sharding.undivided(layout) == {"blocks/scale": 2048, "bias": 32, "gain": 4}


def test_stage_0_divides_nothing():
    layout = sharding.lay_out(shapes(w=(16, 16)), sharding.mesh())
    assert specs(layout) == {"w": P()}


def test_rules_go_first_and_divide_nothing_where_there_is_no_such_axis():
    config = models.TransformerConfig(vocab=32, layers=2, width=16, heads=2)
    init, _ = models.transformer(config)
    params = jax.eval_shape(init, jax.random.key(0))
    rules = models.tensor_parallel(config)
    divided = specs(sharding.lay_out(params, sharding.mesh(1, 4, 2), zero=1, rules=rules, stacked=models.stacked))
    assert divided["blocks/attention/q/kernel"] == P(None, "data", "model")
    assert divided["blocks/attention/o/kernel"] == P(None, "model", "data")
    assert divided["blocks/feed_forward/down/kernel"] == P(None, "model", "data")
    assert divided["head/kernel"] == P("data", "model")
    assert divided["embed"] == P("data")
    without = sharding.lay_out(params, sharding.mesh(), zero=1, rules=rules, stacked=models.stacked)
    assert without.specs == sharding.lay_out(params, sharding.mesh(), zero=1, stacked=models.stacked).specs


def test_where_data_is_several_axes_dimensions_are_divided_over_all_of_them():
    params = shapes(blocks_w=(4, 20, 64), blocks_v=(4, 16, 64), head=(16, 64), scale=(8,))
    rules = {"head": P("model", "data"), ".*": P()}
    mesh, data = sharding.mesh(1, (2, 2), 2), ("data0", "data1")
    layout = sharding.lay_out(params, mesh, zero=3, rules=rules, stacked=STACKED)
    assert specs(layout) == {
        "blocks/w": P(None, data),
        "blocks/v": P(None, data),
        "head": P("model", data),
        "scale": P(),
    }
    assert tree.named_leaves(layout.by_layer) == {"blocks/w": True, "blocks/v": True, "head": False, "scale": False}
    assert layout.banks.spec == P(data)
    assert sharding.undivided(layout) == {"scale": 32}
    lies = tree.named_leaves(layout.state(optim.adafactor(0.1, stacked=STACKED, min_factored=8)).opt_state)
    assert lies["0/nu/blocks/w/row"].spec == P(None, data)
    with pytest.raises(ValueError, match="whose 6 data 4 doesn't divide"):
        sharding.lay_out(shapes(w=(6, 16)), mesh, rules={".*": P("data")})


def test_only_stage_3_brings_parameters_together_by_layer():
    params = shapes(blocks_w=(4, 16, 16), blocks_scale=(4, 16), head=(16, 16))
    for zero in range(4):
        layout = sharding.lay_out(params, sharding.mesh(), zero=zero, stacked=STACKED)
        assert tree.named_leaves(layout.by_layer) == {"blocks/w": zero == 3, "blocks/scale": False, "head": False}


W = shapes(w=(16, 24))
WHOLE = {".*": P()}
REFUSED: list[tuple[Any, Params, dict[str, Any], str]] = [
    ({}, W, {"zero": 4}, "zero is 4; use 0, 1, 2 or 3"),
    ({}, W, {"zero": 3}, "say which are stacked"),
    ({}, W, {"rules": {"v": P()}}, "no pattern matches the leaf 'w'"),
    ({}, W, {"rules": WHOLE | {"v": P()}}, r"no leaf takes its value from \['v'\]"),
    (
        {},
        W,
        {"rules": {".*": P("rows")}},
        r"the rule P.* of w has the axis 'rows'; use 'data' or 'model'",
    ),
    ({}, W, {"rules": {".*": P("replica")}}, "has the axis 'replica'"),
    ({}, W, {"rules": {".*": P(None, None, "data")}}, r"w has the shape \(16, 24\), but its rule .* has 3 dimensions"),
    ({"data": 1, "model": 8}, shapes(w=(12, 16)), {"rules": {".*": P("model")}}, "12 model 8 doesn't divide"),
    (
        {},
        shapes(w=(12, 20), v=(8, 8)),
        {"zero": 1},
        "79% of the parameters can't be divided over 8 devices, .* w; choose",
    ),
    ({}, shapes(w=(8, 8), v=(800,)), {"zero": 2}, "largest being v; .* or a tolerance above 0.05"),
]


@pytest.mark.parametrize(("sizes", "params", "options", "message"), REFUSED, ids=[case[-1][:30] for case in REFUSED])
def test_layouts_that_cannot_be_are_refused_by_name(
    sizes: dict[str, int], params: Params, options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        sharding.lay_out(params, sharding.mesh(**sizes), **options)


def test_a_mesh_with_other_axes_is_refused():
    mesh = Mesh(np.asarray(jax.devices()), ("rows",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=re.escape("the mesh has axes ['rows']; use data")):
        sharding.lay_out(W, mesh)


def test_what_stays_whole_may_be_tolerated():
    layout = sharding.lay_out(shapes(w=(12, 20)), sharding.mesh(), zero=1, tolerance=1.0)
    description = sharding.describe(layout, optax.sgd(0.1))
    assert description.whole == {"w": "no dimension that 8 divides is free"}


CHAINS: dict[str, tuple[optax.GradientTransformation, dict[str, PartitionSpec]]] = {
    "factored": (
        optax.adafactor(0.1, min_dim_size_to_factor=8),
        {"0/v_row/blocks/w": P(None, "data"), "0/v_col/blocks/w": P(None, None), "0/v/blocks/w": P(None)},
    ),
    "ours, factored": (
        optim.adafactor(0.1, stacked=STACKED, min_factored=8, momentum=0.9),
        {"0/nu/blocks/w/row": P(None, "data"), "0/mu/blocks/w": P(None, "data", None)},
    ),
    "partitioned, masked, clipped": (
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition({True: optax.masked(optax.adam(0.1), True), False: optax.sgd(0.1)}, STACKED),
        ),
        {"1/inner_states/True/inner_state/inner_state/0/mu/blocks/w": P(None, "data", None)},
    ),
    "accumulating": (
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        {"acc_grads/blocks/w": P(None, "data", None), "inner_opt_state/0/nu/head": P("data", None)},
    ),
    "int8": (
        optim.adamw_int8(0.1),
        {"inner/0/mu/blocks/w/codes": P(None, "data", None), "inner/0/mu/blocks/w/scales": P(None, "data", None)},
    ),
    "layer by layer": (optim.per_layer(optax.lamb(0.1), STACKED), {"0/mu/blocks/w/0": P("data", None)}),
    "guarded": (optim.skip_nonfinite(optim.weight_ema(0.9)), {"inner/weights/blocks/w": P(None, "data", None)}),
    "schedule-free": (optax.contrib.schedule_free(optim.adamw(0.1), 0.1), {"z/blocks/w": P(None, "data", None)}),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_state_of_any_chain_lies_as_its_parameters_do(name: str):
    params = shapes(blocks_w=(3, 16, 1024), blocks_scale=(3, 16), head=(16, 1024))
    layout = sharding.lay_out(params, sharding.mesh(), zero=1, stacked=STACKED)
    optimizer, expected = CHAINS[name]
    state = layout.state(optimizer)
    found = {key: value.spec for key, value in tree.named_leaves(state.opt_state).items()}
    assert {key: found[key] for key in expected} == expected
    made = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(made)
    for key, x in tree.named_leaves(made).items():
        if x.size >= 16 * 1024:  # a matrix or more; what is divided is divided by 8
            sharding_ = tree.named_leaves(state.opt_state)[key]
            assert np.prod(sharding_.shard_shape(x.shape)) * 8 == x.size, key


def test_where_types_do_not_fit_names_and_shapes_say_how_state_lies():
    """Codes divided within a block of 256, whose scale comes from all its devices; a vector of everything."""
    layout = sharding.lay_out(shapes(w=(20, 512)), sharding.mesh(), zero=1)
    assert layout.specs["w"] == P(None, "data")
    lies = {k: s.spec for k, s in tree.named_leaves(layout.state(optim.lion_int8(0.1)).opt_state).items()}
    assert lies["inner/0/mu/w/codes"] == P(None, "data")
    assert lies["inner/0/mu/w/scales"] == P()
    flat = layout.state(optax.flatten(optax.sgd(0.1, momentum=0.9)))
    assert {s.spec for s in jax.tree.leaves(flat.opt_state)} == {P()}


def test_an_optimizer_that_fails_says_so_itself():
    def init(_: Params) -> Any:
        raise OSError("no such thing")

    layout = sharding.lay_out(W, sharding.mesh())
    with pytest.raises(OSError, match="no such thing"):
        layout.state(optax.GradientTransformation(init, lambda *_: None))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bytes_are_those_of_the_paper(zero: int, devices: int):
    """ZeRO, https://arxiv.org/abs/1910.02054, figure 1, with masters, gradients and Adam's moments in float32, and
    parameters in bfloat16 where they are used: 12 bytes a parameter and 4, a share of them where it is divided."""
    config = models.TransformerConfig(vocab=512, layers=4, width=256, heads=4)
    init, _ = models.transformer(config)
    params = jax.eval_shape(init, jax.random.key(0))
    mesh = sharding.mesh(devices=jax.devices()[:devices])
    layout = sharding.lay_out(params, mesh, zero=zero, stacked=models.stacked)
    found = sharding.describe(layout, optim.adamw(1e-3), dtype=jnp.bfloat16).nbytes
    size, blocks = tree.size(params), tree.size(params["blocks"])
    share = devices if zero else 1
    assert found["parameters"] + found["optimizer state"] == pytest.approx(12 * size / share, rel=0.02)
    one_layer_at_a_time = size - blocks + blocks / config.layers
    in_use = 2 * (one_layer_at_a_time if zero == 3 and devices > 1 else size)
    assert found["parameters in use"] == pytest.approx(in_use, rel=0.02)
    assert found["gradients, at most"] == pytest.approx(in_use + 4 * size / share, rel=0.02)


@pytest.mark.parametrize(("zero", "share"), [(0, 1), (1, 1), (2, 8), (3, 8)])
def test_from_stage_2_on_several_microbatches_have_divided_sums(zero: int, share: int):
    params = shapes(blocks_w=(4, 16, 64), head=(16, 64))
    layout = sharding.lay_out(params, sharding.mesh(), zero=zero, stacked=STACKED)
    found = sharding.describe(layout, optax.sgd(0.1), microbatches=4).nbytes["gradients, at most"]
    made = 2 * 4096 if zero == 3 else 5 * 4096  # a layer and the head, or all
    assert found == made + 5 * 4096 // share


def test_a_description_is_a_table_to_read():
    params = shapes(blocks_w=(4, 256, 512), blocks_scale=(4, 256), head=(256, 512))
    layout = sharding.lay_out(params, sharding.mesh(2), zero=3, stacked=STACKED)
    found = str(sharding.describe(layout, optim.adamw(0.1), dtype=jnp.bfloat16, microbatches=2))
    assert found.splitlines() == [
        "656,384 parameters, 8 devices (replica 2 x data 4), ZeRO 3; on each:",
        "  parameters                   659.46 kB",
        "  optimizer state                1.32 MB",
        "  parameters in use            526.34 kB",
        "  gradients, at most             1.19 MB",
        "  all-gather                   262.14 kB  of 1 arrays: 196.61 kB sent",
        "  all-gather                     1.05 MB  4 times of 1 arrays: 3.15 MB sent",
        "  reduce-scatter               524.29 kB  2 times of 1 arrays: 786.43 kB sent",
        "  reduce-scatter                 2.10 MB  2 times of 1 arrays: 3.15 MB sent",
        "  all-reduce                     4.10 kB  of 1 arrays: 7.17 kB sent",
        "  all-reduce                   655.36 kB  of 2 arrays: 655.36 kB sent",
        "  whole, a vector: blocks/scale",
    ]
