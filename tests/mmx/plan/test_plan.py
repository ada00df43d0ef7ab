"""Plans: of the report's stages, which must go on fitting, of GPUs, searches, and what is said when nothing works."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs import text_1b
from mmx.config import HYBRID_PERIOD, ConfigError, DataConfig, MeshConfig, ModelConfig, Run
from mmx.plan import calibration
from mmx.plan.machine import parse_machine
from mmx.plan.out_of_memory import one_sentence
from mmx.plan.page import page
from mmx.plan.pictures import draw
from mmx.plan.report import LEAST_FREE, compiled_plan, counted_plan
from mmx.plan.search import lines, search
from mmx.plan.stages import STAGES, record, stage, table, unchanged

README = (Path(__file__).parents[3] / "README.md").read_text()
GiB = 2**30
# What each stage may take of a v5p's 95.7 GiB, as the compiler lays it out: what it takes, and 2 to 3 GiB.
CEILINGS = {"pretrain_8k": 59, "extend_128k": 54, "extend_512k": 60, "extend_1m": 59, "sft_1m": 67}


@pytest.mark.parametrize("name", STAGES)
def test_compiled_stages_leave_memory(name):
    row = record()[name]
    assert unchanged(name), "the plan changed: renew the record by python -m launch.plan --stages=all"
    assert row["share_free"] >= LEAST_FREE
    assert row["bytes_used"] <= CEILINGS[name] * GiB


def test_readme_has_the_table_of_the_record():
    assert table() in README


@pytest.mark.parametrize("name", STAGES)
def test_stages_fit_on_paper(name):
    topology, run = stage(name)
    plan = counted_plan(run, parse_machine(topology))
    assert plan.parameters == 456_089_655_296
    assert plan.fits
    # What is called with is exact on paper too; the rest is less than what the compiler takes.
    assert plan.used < record()[name]["bytes_used"]
    assert plan.memory_counted.parameters + plan.memory_counted.optimizer == pytest.approx(
        12 * 456.09e9 / 1024, rel=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_8k", "sft_1m"])
def test_stages_compile_within_their_ceilings(name):
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu")
    topology, run = stage(name)
    plan = compiled_plan(run, parse_machine(topology))
    assert plan.fits
    assert plan.used <= CEILINGS[name] * GiB
    assert f"{456_089_655_296:,}" in page(plan)


def small(**changes) -> Run:
    """A hybrid that compiles in seconds."""
    model = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        num_layers=16,
        layer_pattern=HYBRID_PERIOD * 2,
        num_heads=4,
        head_dim=128,
        rotary_dim=64,
        num_experts=8,
        expert_hidden_size=256,
        capacity_factor=1.25,
        dtype="bfloat16",
        remat="full",
    )
    run = Run(model=model, mesh=MeshConfig(fsdp=-1), data=DataConfig(sequence_length=1024, batch_size=16))
    return dataclasses.replace(run, **changes)


@pytest.mark.slow
def test_count_and_compiler_agree_on_flops_and_state():
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu")
    run = small(mesh=MeshConfig(fsdp=4, expert=2))
    plan = compiled_plan(run, parse_machine("v5p:2x2x2"))
    counted = sum(part.matrix_units for part in plan.counted.values()) * plan.machine.part.flops
    # Full rematerialisation; a causal kernel's whole blocks and the router's padding make the difference.
    assert plan.program_flops == pytest.approx(counted, rel=0.1)
    assert plan.compiler_flops < plan.program_flops
    assert plan.memory.parameters == plan.memory_counted.parameters
    # Beside the layers' inputs, what the loops report of each layer.
    assert plan.memory.saved_activations == pytest.approx(plan.memory_counted.saved_activations, rel=0.1)
    assert plan.memory.total < plan.memory_available
    exchange = [m for m in plan.messages if m.kind == "all-to-all"]
    assert {m.axes for m in exchange} == {"expert"}
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["compiled"]
    assert read["fits"]
    assert read["predicted_step_seconds"] > 0


def test_gpus_are_counted_and_say_so():
    run = text_1b.get_config()
    run.mesh = MeshConfig(fsdp=8)
    run.data.batch_size = 32
    plan = counted_plan(run, parse_machine("h100:8"))
    assert "NOT COMPILED" in page(plan)
    assert not plan.to_dict()["compiled"]
    assert 0 < plan.predicted_mfu < 1
    # A network between nodes makes what NVLink hid a wait.
    run.data.batch_size = 64
    run.mesh = MeshConfig(fsdp=16)
    wide = counted_plan(run, parse_machine("h100:16"))
    assert wide.predicted_mfu < plan.predicted_mfu


def test_pictures_are_drawn(tmp_path):
    written = draw(counted_plan(small(), parse_machine("v5p:2x2x2")), tmp_path / "new")
    assert [path.name for path in written] == ["memory.png", "step.png", "prefill.png"]
    assert all(path.stat().st_size > 10_000 for path in written)


def test_search_prunes_and_gives_reasons():
    found, lost = search(small(), parse_machine("v5p:2x2x2"), best=3)
    assert len(found) == 3
    assert not found[0].reason
    assert all(candidate.reason for candidate in found[1:])
    seconds = [candidate.plan.step_seconds / candidate.plan.tokens for candidate in found]
    assert seconds == sorted(seconds)
    assert lost["slower on paper"] > 0
    assert len(lines(found, lost)) == 4
    large = small(model=dataclasses.replace(small().model, num_experts=4096, expert_hidden_size=65536))
    with pytest.raises(ConfigError, match="no mesh of v5e:2x2"):
        search(large, parse_machine("v5e:2x2"))


def test_honesty_is_printed_with_every_prediction():
    steps = {step["name"]: step for step in calibration.honesty()}
    assert steps["Mixtral-8x7B"]["published_mfu"] == 0.526
    assert steps["Llama-2-70B"]["published_mfu"] == 0.654
    for step in steps.values():
        assert step["ratio"] == pytest.approx(step["published_mfu"] / step["predicted_mfu"], abs=1e-3)
    plan = counted_plan(small(), parse_machine("v5p:2x2x2"))
    assert f"Honesty factor {calibration.factor():.2f}" in page(plan)


# As the compiler writes it, shortened.
OUT_OF_MEMORY = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.38G of 15.75G hbm. Exceeded hbm capacity by 1.63G.

Total hbm usage >= 17.90G:
    reserved        530.00M
    program          13.05G

  Largest program allocations in hbm:

  1. Size: 4.58G
     Operator: op_name="jit(train_step)/jvp()/shard_map/while" source_file="/any/pallas_kernels/cross_entropy/blocked.py" source_line=46
     Shape: f32[200064,6144]{1,0:T(8,128)}
     Unpadded size: 4.58G
     XLA label: fusion.1
     ==========================

  2. Size: 2.29G
     Operator: op_name="jit(train_step)/jvp()/gather" source_file="/any/mmx/model/text.py" source_line=231
     Shape: bf16[200064,6144]{1,0:T(8,128)(2,1)}
     ==========================

  3. Size: 1.31G
     Operator: op_name="jit(train_step)/jvp()/while"
     Shape: bf16[7,2,8192,6144]{3,2,1,0:T(8,128)(2,1)}
     ==========================

  4. Size: 1.00G
     Shape: f32[1,32768,8192]{2,1,0:T(8,128)}
"""  # noqa: E501


def test_out_of_memory_is_one_sentence():
    plan = counted_plan(small(), parse_machine("v5p:2x2x2"))
    sentence = str(one_sentence(RuntimeError(OUT_OF_MEMORY), plan.machine, plan.memory_counted))
    assert sentence.startswith(
        "out of memory: a device of v5p:2x2x2 needs 17.38GiB and has 15.75GiB; the largest buffers are "
        "f32[200064,6144] of 4.58GiB from pallas_kernels/cross_entropy/blocked.py:46, "
        "bf16[200064,6144] of 2.29GiB from mmx/model/text.py:231, "
        "bf16[7,2,8192,6144] of 1.31GiB from while: use more devices"
    )
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (137.53G) exceeds "
        "available HBM (95.74G)."
    )
    sentence = str(one_sentence(RuntimeError(early), plan.machine, plan.memory_counted))
    assert "needs 137.53GiB and has 95.74GiB; the compiler lists no buffers, on paper" in sentence
    other = ValueError("something else")
    assert one_sentence(other, plan.machine, plan.memory_counted) is other
