"""FLOPs, bytes, memory and time read off a small scheduled program that is written out here."""

import numpy as np
import pytest

from mmx.plan.collectives import collectives
from mmx.plan.hlo import arrays, parse
from mmx.plan.kernels import kernel_seconds
from mmx.plan.links import Torus
from mmx.plan.memory import carried, largest_buffers
from mmx.plan.schedule import play
from mmx.plan.work import kernel, part, work
from pallas_kernels.aot.chips import CHIPS
from pallas_kernels.grouped_matmul import tpu_tiles
from pallas_kernels.lightning_attention.tpu_tiles import TABLE
from pallas_kernels.size_table import read_rows
from pallas_kernels.softmax_attention.tpu_blocks import share_of_peak
from tests.mmx.plan.test_machine import Device

# A scan of ten layers: a product of 2 * 128 * 256 * 256 FLOPs at 1,750,000 cycles beside a gather of four devices, and
# an activation of each layer kept. Then a loop whose turns the data decide.
PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/any/mmx/model/linear.py"
2 "/any/mmx/model/lightning.py"
3 "/any/mmx/model/text.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=20 end_line=20 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=30 end_line=30 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=40 end_line=40 column=1 end_column=2}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}

%fused_product (a: bf16[128,256], b: bf16[256,256]) -> bf16[128,256] {
  %a = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = bf16[128,256]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%fused_update (s: bf16[10,128,256], x.2: bf16[128,256], i.2: s32[]) -> bf16[10,128,256] {
  %s = bf16[10,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x.2 = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(1)
  %i.2 = s32[] parameter(2)
  %one = bf16[1,128,256]{2,1,0:T(8,128)(2,1)} bitcast(%x.2)
  ROOT %dus = bf16[10,128,256]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%s, %one, %i.2)
}

%body (t: (s32[], bf16[128,256], bf16[10,128,256], bf16[10,256,6])) -> (s32[], bf16[128,256], bf16[10,128,256], bf16[10,256,6]) {
  %t = (s32[], bf16[128,256]{1,0}, bf16[10,128,256]{2,1,0}, bf16[10,256,6]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[128,256]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %kept = bf16[10,128,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %weights = bf16[10,256,6]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=3
  %w = bf16[256,256]{1,0:T(8,128)(2,1)} copy(%x)
  %start = (bf16[64,256], bf16[256,256]) all-gather-start(%w), replica_groups=[1,4]<=[4], metadata={stack_frame_id=3}
  %product = bf16[128,256]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused_product, metadata={op_name="jit(step)/jvp()/while/dot" stack_frame_id=3}, backend_config={"estimated_cycles":"1750000"}
  %gathered = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  %more = bf16[10,128,256]{2,1,0:T(8,128)(2,1)} fusion(%kept, %product, %i), kind=kLoop, calls=%fused_update, metadata={stack_frame_id=1}
  ROOT %out = (s32[], bf16[128,256]{1,0}, bf16[10,128,256]{2,1,0}, bf16[10,256,6]{2,1,0}) tuple(%i, %product, %more, %weights)
}

%condition (t.1: (s32[])) -> pred[] {
  %t.1 = (s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %end = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

%open_body (u: (s32[], bf16[128,256])) -> (s32[], bf16[128,256]) {
  %u = (s32[], bf16[128,256]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%u), index=0
  %y = bf16[128,256]{1,0:T(8,128)(2,1)} get-tuple-element(%u), index=1
  %z = bf16[128,256]{1,0:T(8,128)(2,1)} fusion(%y, %y), kind=kLoop, calls=%fused_product, backend_config={"estimated_cycles":"1750"}
  ROOT %next = (s32[], bf16[128,256]{1,0}) tuple(%n, %z)
}

%open_condition (u.1: (s32[], s32[])) -> pred[] {
  %u.1 = (s32[], s32[]) parameter(0)
  %n.1 = s32[] get-tuple-element(%u.1), index=0
  %bound = s32[] get-tuple-element(%u.1), index=1
  ROOT %less.1 = pred[] compare(%n.1, %bound), direction=LT
}

ENTRY %main (x.1: bf16[128,256]) -> bf16[128,256] {
  %x.1 = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = (s32[], bf16[128,256]{1,0}, bf16[10,128,256]{2,1,0:T(8,128)(2,1)}, bf16[10,256,6]{2,1,0:T(8,128)(2,1)}) while(%x.1), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp()/while" stack_frame_id=1}
  %sum = bf16[128,256]{1,0:T(8,128)(2,1)} all-reduce(%x.1), replica_groups={{0,1,2,3}}, metadata={op_name="jit(step)/sum" stack_frame_id=2}
  ROOT %open = (s32[], bf16[128,256]{1,0}) while(%sum), condition=%open_condition, body=%open_body
}
"""  # noqa: E501
PRODUCT = 2 * 128 * 256 * 256


@pytest.fixture(scope="module")
def program():
    return parse(PROGRAM)


def named(program, name):
    return next(i for body in program.computations.values() for i in body if i.name == name)


def body(program, name):
    return {i.name: i for i in program.body(name)}


def test_arrays_take_whole_tiles():
    [wide] = arrays("f32[10,6,64,128]{1,3,2,0:T(8,128)}")
    assert wide.size == 10 * 6 * 64 * 128 * 4
    assert wide.padded_size == 10 * 128 * 64 * 128 * 4  # Its last dimension in memory has 6 numbers.
    assert not arrays("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}")[0].in_hbm


def test_products_are_counted_by_their_dimensions(program):
    assert work(program, body(program, "body"), named(program, "product")).flops == PRODUCT


@pytest.mark.parametrize(
    ("window", "flops"),
    [
        # A batch of 4 as a spatial dimension of both sides: each output meets one input.
        ("size=4 stride=3 pad=0_0 lhs_dilate=4", 2 * 4 * 8 * 16 * 32),
        # A sum over 4 positions that leaves one.
        ("size=4", 2 * 4 * 8 * 16 * 32),
    ],
)
def test_batch_dimensions_are_spatial_ones(window, flops):
    out = 4 if "stride" in window else 1
    text = f"""HloModule x

ENTRY %main (a: bf16[4,8,16], b: bf16[4,16,32]) -> bf16[{out},8,32] {{
  %a = bf16[4,8,16]{{2,1,0}} parameter(0)
  %b = bf16[4,16,32]{{2,1,0}} parameter(1)
  ROOT %c = bf16[{out},8,32]{{2,1,0}} convolution(%a, %b), window={{{window}}}, dim_labels=0bf_0io->0bf
}}
"""
    read = parse(text)
    assert work(read, body(read, "main"), named(read, "c")).flops == flops


def test_a_slice_that_is_written_counts_not_its_array(program):
    done = work(program, body(program, "body"), named(program, "more"))
    assert done.bytes == 2 * 128 * 256 * 2 + 4  # Written, its source read, and where it goes.


def test_frames_name_the_part_of_the_model(program):
    assert part(program, named(program, "product")) == "lightning attention"
    assert program.source(named(program, "product"))[0] == ("/any/mmx/model/linear.py", 20)


def test_groups_are_read_in_every_spelling(program):
    gather, reduce = collectives(program)
    assert (gather.group, gather.times, reduce.group) == ((0, 1, 2, 3), 10, (0, 1, 2, 3))
    mesh = PROGRAM.replace("{{0,1,2,3}}", "mesh['axis_0'=2,'axis_1'=2] {'axis_1'}")
    assert collectives(mesh)[1].group == (0, 1)


def test_carried_arrays_are_told_apart(program):
    saved, gradients, copies = carried(program)
    assert [a.shape for a in saved] == [(10, 128, 256)]
    assert [a.shape for a in copies] == [(10, 256, 6)]
    assert not gradients
    assert copies[0].padded_size == 10 * 256 * 128 * 2
    assert largest_buffers(program, 1)[0].type == "bf16[10,128,256]"


SPLASH = """HloModule x

ENTRY %main (q: bf16[4,8192,128], k: bf16[2,8192,128], q2: bf16[2,2,8192,128], k2: bf16[2,1,8192,128], l: f32[2,2,8,8192], t: s8[1,8,4]) -> bf16[2,8192,128] {
  %q = bf16[4,8192,128]{2,1,0} parameter(0)
  %k = bf16[2,8192,128]{2,1,0} parameter(1)
  %q2 = bf16[2,2,8192,128]{3,2,1,0} parameter(2)
  %k2 = bf16[2,1,8192,128]{3,2,1,0} parameter(3)
  %l = f32[2,2,8,8192]{3,2,1,0} parameter(4)
  %t = s8[1,8,4]{2,1,0} parameter(5)
  %splash_mha_fwd_segmented_residuals.1 = (bf16[4,8192,128]{2,1,0}, f32[4,8192,128]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={source_file="/any/softmax_attention/tpu.py" source_line=3}
  %splash_mha_fwd_segmented_residuals.2 = (bf16[4,8192,128]{2,1,0}, f32[4,8192,128]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={source_file="/any/parallel/ring.py" source_line=3}
  %splash_mha_dkv_segmented_no_residuals.3 = (bf16[2,8192,128]{2,1,0}, bf16[2,8192,128]{2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"
  %splash_mha_dkv_segmented_no_residuals.5 = (bf16[2,4,2,8192,128]{4,3,2,1,0}, bf16[2,1,8192,128]{3,2,1,0}, bf16[2,1,8192,128]{3,2,1,0}) custom-call(%t, %q2, %k2, %k2, %l), custom_call_target="tpu_custom_call"
  ROOT %splash_mha_dkv_segmented_no_residuals.4 = (bf16[2,1,8192,128]{3,2,1,0}, bf16[2,1,8192,128]{3,2,1,0}) custom-call(%q2, %k2, %k2, %l), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_splash_attention_is_half_of_the_pairs_at_the_share_of_peak_that_was_counted():
    read, chip, tokens = parse(SPLASH), CHIPS["v5p"], 8192
    names = body(read, "main")
    of_row, of_ring, one_core, halved, fused = (
        kernel(read, names, names[f"splash_mha_{name}"])
        for name in (
            "fwd_segmented_residuals.1",
            "fwd_segmented_residuals.2",
            "dkv_segmented_no_residuals.3",
            "dkv_segmented_no_residuals.4",
            "dkv_segmented_no_residuals.5",
        )
    )
    pairs = 4 * tokens * (tokens + 1) / 2
    assert of_row.flops == of_ring.flops == 2 * 2 * 128 * pairs
    assert one_core.flops == halved.flops == 4 * 2 * 128 * pairs
    # That which gives dq too, in four shares.
    assert fused.flops == 5 * 2 * 128 * pairs
    seconds = kernel_seconds(chip)
    for call, name in ((of_ring, "fwd"), (halved, "dkv"), (fused, "fused")):
        share = share_of_peak(chip.device_kind, name, tokens, whole_row=False)
        assert 0.2 < share < 1
        assert seconds(call) == pytest.approx(call.flops / chip.flops / share)
    assert seconds(one_core) == pytest.approx(2 * seconds(halved))
    # Blocks on the diagonal of a row are computed whole.
    assert 1.05 < seconds(of_row) / seconds(of_ring) < 1.3
    # A chip that was not counted is taken at its peak.
    assert kernel_seconds(CHIPS["v4"])(of_row) == of_row.flops / CHIPS["v4"].flops


def test_experts_products_at_the_share_of_peak_that_was_counted():
    read = parse("""HloModule x

ENTRY %main (x: bf16[4096,512], w: bf16[4,512,1024], y: bf16[4096,1024]) -> bf16[4,512,1024] {
  %x = bf16[4096,512]{1,0} parameter(0)
  %w = bf16[4,512,1024]{2,1,0} parameter(1)
  %y = bf16[4096,1024]{1,0} parameter(2)
  %gmm.1 = bf16[4096,1024]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call"
  ROOT %tgmm.2 = bf16[4,512,1024]{2,1,0} custom-call(%x, %y), custom_call_target="tpu_custom_call"
}
""")
    names = body(read, "main")
    for name in ("gmm", "tgmm"):
        call = kernel(read, names, next(i for i in names.values() if i.name.startswith(name)))
        assert call.flops == 2 * 4096 * 512 * 1024
        for chip in (CHIPS["v5p"], CHIPS["tpu7x"]):
            share = tpu_tiles.share_of_peak(chip.device_kind, name, 4096, 4)
            assert 0.3 < share < 1
            assert kernel_seconds(chip)(call) == pytest.approx(call.flops / chip.flops / share)


def test_schedule_adds_up(program):
    chip = CHIPS["v5p"]
    torus = Torus(chip, [Device(c) for c in np.ndindex(4, 1, 1)], {"fsdp": 4})
    schedule = play(program, chip, torus, lambda kernel: 0.0, open_turns=3)
    products = 10 * 1750e3 / chip.clock + 3 * 1750 / chip.clock
    assert schedule.work.flops == 10 * PRODUCT + 3 * PRODUCT
    # A line of four: the gather hides behind the product, the sum does not.
    reduce = 2 * 128 * 256 * 2 * 3 / 4 / 100e9
    assert sum(p.waiting for p in schedule.parts.values()) == pytest.approx(reduce)
    gather = schedule.traffic["all-gather", ("fsdp",), "ICI x 4 of 4"]
    assert (gather.times, gather.overlapped, gather.waiting) == (10, 10, 0)
    assert schedule.seconds == pytest.approx(products + reduce, rel=1e-3)  # Copies and updates are small beside it.
    longer = play(program, chip, torus, lambda kernel: 0.0, open_turns=1003)
    assert longer.seconds - schedule.seconds == pytest.approx(1000 * 1750 / chip.clock, rel=1e-3)


def test_schedule_counts_kernels_calls(program):
    # The open loop's product as a call of the backward kernel: 4 heads of 128 x 128, 1,024 tokens.
    ours = "bf16[1,1024,512]{2,1,0:T(8,128)(2,1)}"
    call = (
        f"%lightning_attention_backward.7 = ({', '.join([ours] * 3)}, f32[1,4,128,128]{{3,2,1,0:T(8,128)}}) "
        'custom-call(%y), custom_call_target="tpu_custom_call", metadata={stack_frame_id=2}'
    )
    text = PROGRAM.replace("  ROOT %next", f"  {call}\n  ROOT %next")
    chip = CHIPS["v5p"]
    torus = Torus(chip, [Device(c) for c in np.ndindex(4, 1, 1)], {"fsdp": 4})
    schedule = play(parse(text), chip, torus, kernel_seconds(chip), open_turns=3)
    without = play(program, chip, torus, kernel_seconds(chip), open_turns=3)
    assert not without.kernels
    (found,) = schedule.kernels.items()
    assert found[0] == "lightning_attention_backward"
    assert found[1].times == 3
    _, backward = next(r for r in read_rows(TABLE) if r["device"] == chip.device_kind)["ns_per_token_and_head"]
    assert found[1].seconds == pytest.approx(3 * 4 * 1024 * backward * 1e-9)
    assert schedule.seconds - without.seconds == pytest.approx(found[1].seconds)
