from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.hlo import Collective, collectives

MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
BOTH = ("data", "model")
EACH: dict[str, Callable[[jax.Array, Any], jax.Array]] = {
    "all-reduce": lax.psum,
    "reduce-scatter": lambda x, axis: lax.psum_scatter(x, axis, tiled=True),
    "all-gather": lambda x, axis: lax.all_gather(x, axis, axis=1, tiled=True),
    "all-to-all": lambda x, axis: lax.all_to_all(x, axis, 0, 0, tiled=True),
    "collective-permute": lambda x, axis: lax.ppermute(x, axis, rotation(lax.axis_size(axis))),
}


def rotation(devices: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % devices) for i in range(devices)]


def compiled(function: Callable[..., Any], *args: Any) -> list[Collective]:
    """What is found in a function that all devices run on the same arguments."""
    mapped = jax.shard_map(function, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)
    return collectives(jax.jit(mapped).lower(*args).compile().as_text())


def x_of(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def without_names(found: list[Collective]) -> list[Collective]:
    return [one._replace(operation="") for one in found]


@pytest.mark.parametrize("in_loop", [False, True])
@pytest.mark.parametrize(("axis", "devices"), [("data", 2), ("model", 4), (BOTH, 8)])
@pytest.mark.parametrize("kind", EACH)
def test_each_kind_is_found_with_its_shape_and_group(kind: str, axis: Any, devices: int, in_loop: bool):
    # Every device has a whole x, and an all-to-all takes one piece of it for each.
    whole = {"all-gather": (16, 8 * devices), "all-to-all": (devices, 16 // devices, 8)}.get(kind, (16, 8))

    def body(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y = EACH[kind](2 * x, axis)
        return jnp.sin(x) + jnp.sum(y), y

    def run(x: jax.Array) -> Any:
        return lax.scan(body, x, None, length=3) if in_loop else body(x, None)

    found = compiled(run, x_of(16, 8))
    assert without_names(found) == [Collective(kind, "f32", whole, devices, in_loop, False, "")]


def test_a_scan_that_is_unrolled_is_no_loop():
    def run(x: jax.Array) -> Any:
        return lax.scan(lambda x, _: (jnp.sin(lax.psum(x, "data")), None), x, None, length=3, unroll=True)

    assert [one.in_loop for one in compiled(run, x_of(4))] == [False] * 3


def test_a_conditional_in_a_loop_in_a_loop_and_a_loop_s_condition_are_in_a_loop():
    def branch(x: jax.Array) -> jax.Array:
        return lax.psum(x, "data")

    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return lax.cond(jnp.sum(x) > 0, branch, jnp.sin, x), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return lax.scan(inner, x, None, length=3)[0], None

    def run(x: jax.Array) -> jax.Array:
        x = lax.scan(outer, x, None, length=3)[0]
        x = lax.while_loop(lambda x: jnp.any(lax.pmax(x, "model") < 9), lambda x: 2 * x, x)
        return lax.all_gather(x, BOTH)

    found = compiled(run, x_of(4))
    assert {(one.kind, one.devices, one.in_loop) for one in found} == {
        ("all-reduce", 2, True),
        ("all-reduce", 4, True),
        ("all-gather", 8, False),
    }


def test_arrays_of_a_combined_operation_share_its_name():
    shapes = [(8, 4), (3,), ()]
    found = compiled(lambda xs: [lax.psum(2 * x, "model") for x in xs], [x_of(*shape) for shape in shapes])
    assert sorted(one.shape for one in found) == sorted(shapes)
    assert len({one.operation for one in found}) == 1
    assert sum(one.nbytes for one in found) == 4 * (32 + 3 + 1)


def test_dtypes_are_those_that_are_sent():
    def run(x: jax.Array, y: jax.Array, z: jax.Array) -> Any:
        return lax.psum(x, "data"), lax.all_gather(y, "data"), lax.all_gather(z, "data")

    found = compiled(run, x_of(4, dtype=jnp.bfloat16), x_of(4, dtype=jnp.int8), x_of(4, dtype=bool))
    # The CPU adds bfloat16 in float32.
    assert {(one.dtype, one.nbytes) for one in found} == {("f32", 16), ("s8", 8), ("pred", 8)}


def test_gradients_of_annotated_data_parallelism_are_all_reduced():

    def on(spec: P, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x @ w))

    grad = jax.jit(jax.grad(loss), out_shardings=NamedSharding(MESH, P()))
    [found] = collectives(grad.lower(on(P(), 16, 24), on(P("data"), 8, 16)).compile().as_text())
    assert (found.kind, found.dtype, sorted(found.shape), found.devices) == ("all-reduce", "f32", [16, 24], 2)


def test_groups_of_one_device_are_left_out():
    def run(x: jax.Array) -> Any:
        return lax.psum(x, "one"), lax.ppermute(x, "one", [(0, 0)]), lax.all_gather(x, "many")

    mesh = jax.make_mesh((1, 8), ("one", "many"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = collectives(jax.jit(mapped).lower(x_of(4)).compile().as_text())
    assert [(one.kind, one.devices) for one in found] == [("all-gather", 8)]


@pytest.mark.parametrize(
    ("kind", "times"),
    [("all-reduce", 2), ("reduce-scatter", 1), ("all-gather", 1), ("all-to-all", 1)],
)
def test_the_ring_sends_all_but_one_part(kind: str, times: int):
    one = Collective(kind, "bf16", (6, 10), 3, False, False, "")
    assert one.nbytes == 120
    assert one.sent == pytest.approx(times * 80)
    # A scalar isn't divisible among them: this is what it comes to if many are sent together.
    assert one._replace(shape=()).sent == pytest.approx(times * 4 / 3)


def test_a_permutation_sends_everything():
    assert Collective("collective-permute", "f32", (5,), 2, False, False, "").sent == 20


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [("pred", 15), ("s4", 8), ("u8", 15), ("f8e4m3fn", 15), ("bf16", 30), ("f32", 60), ("s64", 120), ("c128", 240)],
)
def test_bytes_follow_from_the_dtype_s_name(dtype: str, nbytes: int):
    assert Collective("all-gather", dtype, (3, 5), 8, False, False, "").nbytes == nbytes


# The forms of a group, as XLA's own parser takes and prints them.
@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups={{0,3,5},{1,2}}", 3),
        ("replica_groups={{0},{1}}", None),
        ("replica_groups={}", 8),
        ("channel_id=1", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", 2),
        ("replica_groups=[8,1]<=[8]", None),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=1] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,2,2]T(0,2,1)) {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=8], device_ids=(7,6,5,4,3,2,1,0) {'axis_0':(2)4}", 4),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_1'}", None),
        ("source_target_pairs={{0,1},{2,3},{1,0},{3,2}}", 2),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", 4),
        ("source_target_pairs={{3,4},{0,1},{2,3},{1,2}}", 5),
        ("source_target_pairs={{0,0},{1,1}}", None),
    ],
)
def test_groups_are_read_in_every_form(groups: str, devices: int | None):
    kind = "collective-permute" if "pairs" in groups else "all-gather"
    program = f"""HloModule m, replica_count=2, num_partitions=4

ENTRY %main (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0), metadata={{op_name="told of: all-reduce(%p)"}}
  ROOT %g = f32[8]{{0}} {kind}(%p), {groups}, dimensions={{0}}, metadata={{op_name="all-reduce(%p)"}}
}}
"""
    assert [one.devices for one in collectives(program)] == ([] if devices is None else [devices])


# What follows is cut from programs compiled ahead of time, each text from one to three of them, and shortened: most
# lines, tuples' further elements, metadata.

H100 = """HloModule jit_fsdp, is_scheduled=true, num_partitions=8

%region_2.5_spmd.clone (loop_peel_param: (s32[], bf16[32,512])) -> (s32[], bf16[32,512]) {
  %reduce-scatter-start = ((bf16[512,2048]{1,0}, bf16[2048,512]{1,0}), (bf16[64,2048]{1,0}, bf16[256,512]{1,0})) reduce-scatter-start(%get-tuple-element.155, %get-tuple-element.156), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%region_3.3.clone, backend_config={"collective_backend_config":{"is_sync":false,"is_pipelined":true}}
  %reduce-scatter-done = (bf16[64,2048]{1,0}, bf16[256,512]{1,0}) reduce-scatter-done(%reduce-scatter-start), backend_config={"collective_backend_config":{"is_sync":false,"is_pipelined":true}}
  %collective-permute-start = (f32[64,256]{1,0}, f32[64,256]{1,0}) collective-permute-start(%get-tuple-element.6), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, backend_config={"collective_backend_config":{"is_sync":true,"is_pipelined":false}}
  %collective-permute-done = f32[64,256]{1,0} collective-permute-done(%collective-permute-start)
  %all-to-all-start.1 = ((bf16[32,8,256]{2,0,1}), bf16[32,8,256]{2,0,1}) all-to-all-start(%bitcast.107.0), channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={1}
  %all-to-all-done.1 = bf16[32,8,256]{2,0,1} all-to-all-done(%all-to-all-start.1)
}

ENTRY %main.10_spmd (param.7: f32[6,64,2048], param.9: bf16[32,512]) -> (f32[6,64,2048], f32[]) {
  %all-gather-start.2 = ((bf16[256,512]{1,0}, bf16[64,2048]{1,0}), (bf16[2048,512]{1,0}, bf16[512,2048]{1,0})) all-gather-start(%wrapped_convert, %wrapped_convert.1), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, backend_config={"collective_backend_config":{"is_sync":false,"is_pipelined":false}}
  %all-gather-done.2 = (bf16[2048,512]{1,0}, bf16[512,2048]{1,0}) all-gather-done(%all-gather-start.2)
  %all-gather-start = (f32[64,256]{1,0}, f32[256,256]{1,0}) all-gather-start(%get-tuple-element.8), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, use_global_device_ids=true, backend_config={"collective_backend_config":{"is_sync":false,"is_pipelined":false}}
  %while.26 = (s32[], bf16[32,512]{1,0}) while(%tuple.31), condition=%region_5.6_spmd.clone, body=%region_2.5_spmd.clone, backend_config={"known_trip_count":{"n":"5"}}
  %all-gather-done = f32[256,256]{1,0} all-gather-done(%all-gather-start)
  %all-reduce-start = f32[] all-reduce-start(%loop_multiply_fusion), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%region_7.8, backend_config={"collective_backend_config":{"is_sync":true,"is_pipelined":false}}
  %all-reduce-done = f32[] all-reduce-done(%all-reduce-start), backend_config={"collective_backend_config":{"is_sync":false,"is_pipelined":false}}
}
"""  # noqa: E501

# A reduce-scatter of two arrays is a fusion, and two scalars are added at once.
V5E = """HloModule jit_zero, is_scheduled=true, num_partitions=8

%all-reduce-scatter.2.clone.1 (input_0.2: bf16[512,2048], input_1.2: bf16[2048,512]) -> (bf16[64,2048], bf16[256,512]) {
  %input_0.2 = bf16[512,2048]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %input_1.2 = bf16[2048,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-reduce.13 = (bf16[512,2048]{1,0:T(8,128)(2,1)}, bf16[2048,512]{1,0:T(8,128)(2,1)}) all-reduce(%input_0.2, %input_1.2), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add.1.clone
  %get-tuple-element.394 = bf16[512,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.13), index=0
  %dynamic-slice.39 = bf16[64,2048]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%get-tuple-element.394, %multiply.17, %constant.172), dynamic_slice_sizes={64,2048}
  %get-tuple-element.395 = bf16[2048,512]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.13), index=1
  %dynamic-slice.40 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%get-tuple-element.395, %multiply.18, %constant.172), dynamic_slice_sizes={256,512}
  ROOT %tuple.55 = (bf16[64,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%dynamic-slice.39, %dynamic-slice.40)
}

%wide.region_2.3_spmd.sunk (wide.param.5: (s32[], bf16[32,512])) -> (s32[], bf16[32,512]) {
  %fusion.84 = (bf16[64,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}) fusion(%fusion.82, %fusion.83), kind=kCustom, calls=%all-reduce-scatter.2.clone.1
}

ENTRY %main.8_spmd (param.4: f32[6,512,2048]) -> (f32[6,64,2048], f32[]) {
  %collective-permute-start = (f32[64,256]{1,0:T(8,128)S(1)}, f32[64,256]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.5), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}
  %reduce_scatter.28 = f32[64,256]{1,0:T(8,128)} reduce-scatter(%get-tuple-element.18), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%region_4.0
  %collective-permute-done = f32[64,256]{1,0:T(8,128)S(1)} collective-permute-done(%collective-permute-start)
  %all-to-all-start = ((f32[16,4,256]{2,1,0:T(4,128)}), f32[16,4,256]{2,1,0:T(4,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) all-to-all-start(%all_to_all.14), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
  %all-to-all-done = f32[16,4,256]{2,1,0:T(4,128)S(1)} all-to-all-done(%all-to-all-start)
  %while.37 = (s32[]{:T(128)}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.64), condition=%wide.region_3.4_spmd, body=%wide.region_2.3_spmd.sunk
  %all-reduce.10 = (f32[]{:T(128)}, f32[]{:T(128)}) all-reduce(%add.42, %get-tuple-element.281), channel_id=8, replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_0','axis_1','axis_2'}, use_global_device_ids=true, to_apply=%region_4.5.clone
}
"""  # noqa: E501

# One all-gather is in a fusion that starts it, in another that computes meanwhile, and in one that awaits it. The other
# could not be hidden.
V5E_FUSED = """HloModule jit_fsdp, is_scheduled=true, num_partitions=8

%fused_computation.26 (param_0.95: bf16[256,512]) -> (bf16[256,512], bf16[2048,512], s32[2], u32[]) {
  %param_0.95 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.23 = bf16[2048,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.95), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.2 = (bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,512]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.23), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.64 (param_0.98: bf16[256,512], param_1.83: bf16[2048,512], param_2.41: s32[2], param_3.13: u32[]) -> (bf16[32,2048], bf16[256,512], bf16[2048,512]) {
  %convolution.39 = bf16[32,2048]{1,0:T(8,128)(2,1)} convolution(%fusion.68, %fusion.67), dim_labels=bf_io->bf
  %all-gather.25 = bf16[2048,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.98), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%fused_computation.29 (param_0.102: bf16[256,512], param_1.87: bf16[2048,512], param_2.46: s32[2], param_3.18: u32[]) -> bf16[2048,512] {
  %all-gather.29 = bf16[2048,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.102), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %custom-call.4 = bf16[2048,512]{1,0:T(8,128)(2,1)S(1)} custom-call(%param_0.102, %param_1.87, %all-gather.29, %param_2.46, %param_3.18), custom_call_target="AsyncCollectiveDone"
}

%wide.region_2.5_spmd.sunk (wide.param.5: (s32[], bf16[32,512])) -> (s32[], bf16[32,512]) {
  %all-gather.32 = bf16[512,2048]{1,0:T(8,128)(2,1)S(1)} all-gather(%dynamic-slice_bitcast_fusion.7), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={async_collective_name="all-gather-start.2"}
  %fusion.60 = (bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,512]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%dynamic-slice_bitcast_fusion.8), kind=kCustom, calls=%fused_computation.26
  %fusion.64 = (bf16[32,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,512]{1,0:T(8,128)(2,1)S(1)}) fusion(%get-tuple-element.338, %get-tuple-element.339), kind=kOutput, calls=%async_collective_fusion.64
  %fusion.70 = bf16[2048,512]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.358, %get-tuple-element.359), kind=kCustom, calls=%fused_computation.29
}

ENTRY %main.10_spmd (param.9: bf16[32,512]) -> f32[] {
  %while.31 = (s32[]{:T(128)}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.70), condition=%wide.region_5.6_spmd, body=%wide.region_2.5_spmd.sunk
}
"""  # noqa: E501

# A core of its own runs them.
V6E = """HloModule jit_loop, is_scheduled=true, num_partitions=16

%called_computation (param_0.14: f32[64,256], param_1.24: f32[64,256], param_2.2: token[]) -> (f32[64,256], f32[64,256]) {
  %param_2.2 = token[] parameter(2)
  ROOT %all-reduce.5 = (f32[64,256]{1,0:T(8,128)}, f32[64,256]{1,0:T(8,128)}) all-reduce(%param_0.14, %param_1.24), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, use_global_device_ids=true, to_apply=%region_1.0.clone
}, execution_thread="sparsecore"

%wide.region_0.8_spmd.sunk (wide.param.2: (s32[], f32[64,256])) -> (s32[], f32[64,256]) {
  %all-reduce.6.cloned.1.call-start = ((f32[64,256]{1,0:T(8,128)}, f32[64,256]{1,0:T(8,128)}, token[]), (f32[64,256]{1,0:T(8,128)}, f32[64,256]{1,0:T(8,128)})) call-start(%copy-done, %get-tuple-element.59, %prepare_done_all-reduce.6.cloned.1.call-start), async_execution_thread="sparsecore", to_apply=%called_computation
  %all-reduce.6.cloned.1.call-done = (f32[64,256]{1,0:T(8,128)}, f32[64,256]{1,0:T(8,128)}) call-done(%all-reduce.6.cloned.1.call-start)
}

ENTRY %main.11_spmd (param.3: f32[64,256]) -> (f32[64,256], f32[7]) {
  %while.12 = (s32[]{:T(128)}, f32[64,256]{1,0:T(8,128)S(1)}) while(%tuple.31), condition=%wide.region_8.9_spmd, body=%wide.region_0.8_spmd.sunk
}
"""  # noqa: E501

# Neither compiler writes this today; XLA's parser takes it and prints it so.
GENERIC = """HloModule m, num_partitions=8

%wrapped (p.1: f32[8,4]) -> f32[1,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  ROOT %x.1 = f32[1,4]{1,0} reduce-scatter(%p.1), channel_id=2, replica_groups={}, use_global_device_ids=true, dimensions={0}, to_apply=%add
}

ENTRY %e (p.2: f32[8,4], q.1: f32[16,4]) -> f32[8,4] {
  %ars = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-reduce-start(%p.2, %q.1), channel_id=3, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%add
  %ard = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-reduce-done(%ars)
  %s = ((f32[8,4]{1,0}, f32[16,4]{1,0}), (f32[2,4]{1,0}, f32[4,4]{1,0}), u32[]) reduce-scatter-start(%p.2, %q.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%add
  %u = ((f32[8,4]{1,0}, f32[16,4]{1,0}), (f32[2,4]{1,0}, f32[4,4]{1,0}), u32[]) reduce-scatter-update(%s)
  %d = (f32[2,4]{1,0}, f32[4,4]{1,0}) reduce-scatter-done(%u)
  %start = ((f32[8,4]{1,0}), f32[1,4]{1,0}, u32[]) async-start(%p.2), calls=%wrapped
  %update = ((f32[8,4]{1,0}), f32[1,4]{1,0}, u32[]) async-update(%start), calls=%wrapped
  %done = f32[1,4]{1,0} async-done(%update), calls=%wrapped
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            H100,
            [
                Collective("reduce-scatter", "bf16", (512, 2048), 8, True, True, "reduce-scatter-start"),
                Collective("reduce-scatter", "bf16", (2048, 512), 8, True, True, "reduce-scatter-start"),
                Collective("collective-permute", "f32", (64, 256), 4, True, False, "collective-permute-start"),
                Collective("all-to-all", "bf16", (32, 8, 256), 8, True, True, "all-to-all-start.1"),
                Collective("all-gather", "bf16", (2048, 512), 8, False, True, "all-gather-start.2"),
                Collective("all-gather", "bf16", (512, 2048), 8, False, True, "all-gather-start.2"),
                Collective("all-gather", "f32", (256, 256), 4, False, True, "all-gather-start"),
                Collective("all-reduce", "f32", (), 8, False, False, "all-reduce-start"),
            ],
        ),
        (
            V5E,
            [
                Collective("reduce-scatter", "bf16", (512, 2048), 8, True, False, "all-reduce.13"),
                Collective("reduce-scatter", "bf16", (2048, 512), 8, True, False, "all-reduce.13"),
                Collective("collective-permute", "f32", (64, 256), 8, False, True, "collective-permute-start"),
                Collective("reduce-scatter", "f32", (512, 256), 8, False, False, "reduce_scatter.28"),
                Collective("all-to-all", "f32", (16, 4, 256), 16, False, True, "all-to-all-start"),
                Collective("all-reduce", "f32", (), 8, False, False, "all-reduce.10"),
                Collective("all-reduce", "f32", (), 8, False, False, "all-reduce.10"),
            ],
        ),
        (
            V5E_FUSED,
            [
                Collective("all-gather", "bf16", (2048, 512), 8, True, True, "all-gather.23"),
                Collective("all-gather", "bf16", (512, 2048), 8, True, False, "all-gather.32"),
            ],
        ),
        (V6E, [Collective("all-reduce", "f32", (64, 256), 16, True, True, "all-reduce.5")] * 2),
        (
            GENERIC,
            [
                Collective("reduce-scatter", "f32", (8, 4), 8, False, True, "x.1"),
                Collective("all-reduce", "f32", (8, 4), 8, False, True, "ars"),
                Collective("all-reduce", "f32", (16, 4), 8, False, True, "ars"),
                Collective("reduce-scatter", "f32", (8, 4), 4, False, True, "s"),
                Collective("reduce-scatter", "f32", (16, 4), 4, False, True, "s"),
            ],
        ),
    ],
    ids=["h100", "v5e", "v5e fused", "v6e", "generic"],
)
def test_accelerators_programs_are_read(program: str, expected: list[Collective]):
    assert collectives(program) == expected


def test_a_program_without_any_and_a_text_that_is_none():
    assert collectives(jax.jit(jnp.sin).lower(np.ones(3, np.float32)).compile().as_text()) == []
    for text in ("", "module @jit_sin {\n  func.func public @main() {\n  }\n}\n"):
        with pytest.raises(ValueError, match=r"no computation in .*; give what `compile"):
            collectives(text)
