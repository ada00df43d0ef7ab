"""Reading collectives off a scheduled program: loops, fusions, asynchronous pairs and what runs beside them."""

from mmx.plan.collectives import collectives, moved

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_gather (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %inner = bf16[8,8]{1,0} all-gather(%p), dimensions={0}, metadata={op_name="jit(step)/gather"}
}

%fused_product (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %conv = bf16[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (t: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %t = (s32[], bf16[8,8]{1,0}) parameter(0)
  %x = bf16[8,8]{1,0} get-tuple-element(%t), index=1
  %send = (bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x),
    source_target_pairs={{0,1}}, metadata={op_name="jit(step)/while/body/ppermute"}
  %product = bf16[8,8]{1,0} fusion(%x, %x), kind=kOutput, calls=%fused_product
  %came = bf16[8,8]{1,0} collective-permute-done(%send)
  %late = bf16[8,8]{1,0} fusion(%came, %came), kind=kOutput, calls=%fused_product
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %out = (s32[], bf16[8,8]{1,0}) tuple(%i, %late)
}

%condition (t.1: (s32[], bf16[8,8])) -> pred[] {
  %t.1 = (s32[], bf16[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> f32[2] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %whole = bf16[8,8]{1,0} fusion(%x.1), kind=kCustom, calls=%fused_gather
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,8]{1,0}) tuple(%zero, %whole)
  %loop = (s32[], bf16[8,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %sum = (f32[2]{0}, f32[3]{0}) all-reduce(%loop, %loop), to_apply=%add
}
"""


def test_counts_turns_bytes_and_what_runs_meanwhile():
    gather, hop, total = collectives(PROGRAM)
    assert (gather.kind, gather.size, gather.times, gather.is_async) == ("all-gather", 8 * 8 * 2, 1, False)
    assert gather.source == "jit(step)/gather"
    assert (hop.kind, hop.size, hop.times) == ("collective-permute", 8 * 8 * 2, 7)
    assert (hop.is_async, hop.overlapped) == (True, 1)  # The second product comes after the data.
    assert hop.source.endswith("ppermute")
    assert (total.kind, total.size, total.times) == ("all-reduce", (2 + 3) * 4, 1)


def test_moved_adds_up_by_kind():
    assert moved(collectives(PROGRAM)) == {
        "all-gather": (1, 128),
        "collective-permute": (7, 7 * 128),
        "all-reduce": (1, 20),
    }
