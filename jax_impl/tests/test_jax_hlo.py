# ruff: noqa: E501
"""Reading compiled programs: loops, collectives, products, and the ways in which a TPU's compiler writes them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diptych_jax import hlo

# A collective that a TPU runs beside other work: start, progress and end are fusions with a copy of it each.
ASYNC = """\
HloModule jit_f, is_scheduled=true

%start.1 (p: bf16[16,128]) -> bf16[256,128] {
  %p = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %begun = u32[] custom-call(), custom_call_target="AsyncCollectiveStart"
  ROOT %all-gather.1 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=16,'axis_2'=2], device_ids=([2,16]T(1,0)) {'axis_1'}, dimensions={0}, use_global_device_ids=true
}

%done.1 (q: bf16[16,128]) -> bf16[256,128] {
  %q = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=5, replica_groups=[2,16]<=[2,16], dimensions={0}, use_global_device_ids=true
}

%all-reduce-scatter.1 (r: bf16[256,128]) -> bf16[16,128] {
  %r = bf16[256,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[256,128]{1,0} all-reduce(%r), channel_id=6, replica_groups=[2,16]<=[32], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = bf16[16,128]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,128}
}, execution_thread="sparsecore"

%condition (c: (s32[], bf16[16,128])) -> pred[] {
  %c = (s32[], bf16[16,128]{1,0}) parameter(0)
  %limit = s32[] constant(7)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%body (b: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %b = (s32[], bf16[16,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[16,128]{1,0} get-tuple-element(%b), index=1
  %kernel = bf16[16,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"text": "
}}"}, metadata={op_name="a(b)/while" source_line=3}
  %async-collective-start = bf16[256,128]{1,0} fusion(%x), kind=kCustom, calls=%start.1
  %async-collective-done = bf16[256,128]{1,0} fusion(%x), kind=kCustom, calls=%done.1
  %scattered = bf16[16,128]{1,0} fusion(%async-collective-done), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], bf16[16,128]{1,0}) tuple(%i, %scattered)
}

ENTRY %main (a: bf16[16,128]) -> (s32[], bf16[16,128]) {
  %a = bf16[16,128]{1,0} parameter(0)
  %start = s32[] constant(0)
  %packed = (s32[], bf16[16,128]{1,0}) tuple(%start, %a)
  ROOT %loop = (s32[], bf16[16,128]{1,0}) while(%packed), condition=%condition, body=%body
}
"""


def test_a_collective_beside_other_work_counts_once_for_each_turn_of_its_loop():
    found = {(one.kind, len(one.group)): one for one in hlo.work(ASYNC).collectives}
    assert set(found) == {("all-gather", 16), ("reduce-scatter", 16)}
    size = 256 * 128 * 2
    for one in found.values():
        assert one.times == 7
        assert one.payload == size
        assert one.sent == 7 * size * 15 / 16


def test_a_loop_that_counts_in_steps_runs_that_much_less_often():
    body = """  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], bf16[16,128]{1,0}) tuple(%next, %scattered)"""
    text = ASYNC.replace("  ROOT %out = (s32[], bf16[16,128]{1,0}) tuple(%i, %scattered)", body)
    assert {one.times for one in hlo.work(text).collectives} == {4}  # 0, 2, 4, 6
    late = text.replace("%start = s32[] constant(0)", "%start = s32[] constant(3)")
    assert {one.times for one in hlo.work(late).collectives} == {2}  # 3, 5


def test_canary_its_start_counts_where_it_is_not_known_as_one():
    text = ASYNC.replace("AsyncCollectiveStart", "Other")
    assert sum(one.times for one in hlo.work(text).collectives if one.kind == "all-gather") == 14


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, x", (0, 2, 4, 6)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("source_target_pairs={{3,1},{1,3}}", (3, 1)),
    ],
)
def test_groups_in_every_spelling(text, group):
    assert hlo._first_group(text) == group


def test_an_unknown_spelling_of_groups_is_an_error():
    with pytest.raises(ValueError, match="not known"):
        hlo._first_group("replica_groups=new_form(8)")


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_products_in_a_scan_count_as_often_as_they_run():
    def stack(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x, weights = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    assert hlo.work(compiled(stack, x, weights)).flops == 5 * 2 * 8 * 16 * 16


def test_a_loop_of_unknown_length_runs_as_often_as_it_is_said():
    def decode(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e9, lambda x: x @ w, x)

    text = compiled(decode, jnp.ones((8, 16)), jnp.ones((16, 16)))
    assert hlo.work(text, unknown_trips=3.0).flops == 3 * 2 * 8 * 16 * 16


def test_products_as_a_tpu_writes_them():
    line = (
        "ENTRY %main (a: f32[2,8,4,16], b: f32[2,8,4,32]) -> f32[2,4,16,32] {{\n"
        "  %a = bf16[{a}]{{1,0}} parameter(0)\n  %b = bf16[{b}]{{1,0}} parameter(1)\n"
        "  ROOT %c = bf16[{out}]{{1,0}} convolution(%a, %b), {how}\n}}\n"
    )
    plain = line.format(a="64,128", b="128,32", out="64,32", how="dim_labels=bf_io->bf")
    assert hlo.work(plain).flops == 2 * 64 * 128 * 32
    # A window over padding: an output meets only the one real position of its kernel that lies under it.
    padded = line.format(
        a="16,64,1,256", b="16,64,4,256", out="4,64,1,64",
        how="window={size=1x4 pad=0_0x0_3}, dim_labels=f0b1_0i1o->b0f1",
    )  # fmt: skip
    with pytest.raises((ValueError, IndexError)):  # labels that do not belong to the shapes are no silent zero
        hlo.work(padded.replace("f0b1_0i1o->b0f1", "bf_i0o->0bf"))
    assert hlo._window_pairs(out=4, kernel=4, image=1, stride=1, kernel_dilation=1, image_dilation=1, low=3) == 4
    assert hlo._window_pairs(out=4, kernel=4, image=4, stride=1, kernel_dilation=1, image_dilation=1, low=0) == 10


def test_a_sharded_sum_is_an_all_reduce_of_the_shard():
    devices = jax.devices()[:4]
    if len(devices) < 4:
        pytest.skip("needs four devices")
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    whole = NamedSharding(mesh, P())
    text = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole).lower(x).compile().as_text()
    (found,) = hlo.work(text).collectives
    assert (found.kind, found.payload, len(found.group)) == ("all-reduce", 32 * 4, 4)
    assert found.sent == pytest.approx(2 * 32 * 4 * 3 / 4)


def test_memory_of_a_slice_is_that_of_the_slice():
    def pick(x, at):
        return jax.lax.dynamic_slice_in_dim(x, at, 1) * 2

    text = compiled(pick, jnp.ones((1000, 8)), jnp.asarray(3))
    assert hlo.work(text).moved < 1000 * 8 * 4 / 10
