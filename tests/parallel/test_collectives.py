"""Collectives of programs whose arrays and loops are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from diffjax.parallel.collectives import Traffic, shape_bytes, traffic
from diffjax.parallel.mesh import make_mesh


def compiled_text(function, *shapes, mesh):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_sum_over_devices_in_a_loop_counts_as_often_as_it_runs():
    mesh = make_mesh(data=2, fsdp=4)

    def run(x):
        def body(carry, _):
            return jax.lax.psum(carry, "fsdp") / 4.0 + 1.0, None

        local = lambda x: jax.lax.scan(body, x, length=7)[0]  # noqa: E731
        return jax.shard_map(
            local, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False
        )(x)

    # Each device holds 8 x 5 floats; a ring of four sends three quarters of them twice.
    found = traffic(compiled_text(run, (32, 5), mesh=mesh))
    assert found == {"all-reduce": Traffic(7, 7 * 2 * 8 * 5 * 4 * 3 // 4)}


@pytest.mark.parametrize(
    ("kind", "function", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp"), 7 * 4 * 6 * 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True), 4 * 6 * 4 * 7 // 8),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]),
            4 * 6 * 4,
        ),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), 4 * 6 * 4 * 7 // 8),
    ],
)
def test_bytes_of_each_kind(kind, function, sent):
    rows = 8 if kind in ("all-to-all", "reduce-scatter") else 4
    run = lambda x: jax.shard_map(  # noqa: E731
        function, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False
    )(x)
    found = traffic(compiled_text(run, (8 * rows, 6), mesh=make_mesh(fsdp=8)))
    assert found == {kind: Traffic(1, sent * rows // 4)}


# As the TPU compiler writes it: no trip counts, a counter that goes by two, one collective in two fusions, a
# reduce-scatter as a fusion, an axis of a named mesh.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=16

%all-reduce-scatter.1 (p.1: bf16[64,32]) -> bf16[16,32] {
  %p.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %sum.1 = bf16[64,32]{1,0} all-reduce(%p.1), channel_id=1, replica_groups=mesh['a'=4,'b'=4] {'b'}
}

%body (s: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %two = u32[]{:T(128)} constant(2)
  %s = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=2
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (u32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%next, %done)
}

%condition (s.1: (u32[], bf16[4,8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %s.1 = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%begin (p.2: bf16[2,8]) -> bf16[32,8] {
  %p.2 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,8]{1,0} all-gather(%p.2), channel_id=3, replica_groups=[1,16]<=[16]
}

%end (p.3: bf16[2,8]) -> bf16[32,8] {
  %p.3 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,8]{1,0} all-gather(%p.3), channel_id=3, replica_groups=[1,16]<=[16]
}

ENTRY %main (a: bf16[64,32], b: bf16[2,8]) -> bf16[16,32] {
  %a = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[2,8]{1,0} parameter(1)
  %f.1 = bf16[32,8]{1,0} fusion(%b), kind=kCustom, calls=%begin
  %f.2 = bf16[32,8]{1,0} fusion(%b), kind=kCustom, calls=%end
  %state = (u32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%a, %b)
  %loop = (u32[]{:T(128)}, bf16[4,8]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %f.3 = bf16[16,32]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_the_text_of_a_tpu_program():
    assert traffic(TPU) == {
        "all-gather": Traffic(1, 32 * 8 * 2 * 15 // 16),
        "reduce-scatter": Traffic(1, 64 * 32 * 2 * 3 // 4),
        "collective-permute": Traffic(4, 4 * 4 * 8 * 2),
    }


GPU = """HloModule jit_step, num_partitions=8

ENTRY %main (w: f32[8,32], g: f32[64,32]) -> f32[8,32] {
  %w = f32[8,32]{1,0} parameter(0)
  %g = f32[64,32]{1,0} parameter(1)
  %gs = (f32[8,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=mesh['a'=8] {'a'}
  %gd = f32[64,32]{1,0} all-gather-done(%gs)
  %ss = ((f32[64,32]), f32[8,32]) reduce-scatter-start(%g), channel_id=2, replica_groups=mesh['a'=8] {'a'}
  ROOT %sd = f32[8,32]{1,0} reduce-scatter-done(%ss)
}
"""


def test_the_text_of_a_gpu_program():
    sent = 64 * 32 * 4 * 7 // 8
    assert traffic(GPU) == {"all-gather": Traffic(1, sent), "reduce-scatter": Traffic(1, sent)}


def test_a_loop_that_nobody_knows_the_length_of_is_an_error_where_something_is_sent():
    with pytest.raises(ValueError, match="start is in a loop of unknown length"):
        traffic(TPU.replace("add(%i, %two)", "multiply(%i, %two)"))
    with pytest.raises(ValueError, match="no text of a compiled program"):
        traffic("nothing")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("(bf16[4]{0}, /*index=1*/pred[3]{0:T(8)})", 11),
        ("u32[]", 4),
        ("s4[6]", 3),
        ("f8e4m3fn[5]", 5),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size
