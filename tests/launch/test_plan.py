"""launch.plan as a user calls it: a page, JSON, and one sentence for each mistake."""

import json

import pytest

from tests.launch.programs import mistake, run

TEXT_01 = "--config=configs/minimax_text_01.py"


def test_prints_json_of_a_count():
    result = run("plan", TEXT_01, "--topology=v5p:8x8x16", "--nocompile", "--output=json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["parameters"], plan["chips"], plan["compiled"]) == (456_089_655_296, 1024, False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((TEXT_01,), "--topology is missing"),
        (("--topology=v5p:2x2x2",), "--config is missing"),
        ((TEXT_01, "--topology=v9:2x2x2"), "v5p:4x4x8"),
        ((TEXT_01, "--topology=v5p:8x8x16", "--config.mesh.fsdp=3"), "96 devices and this run has 1024"),
        ((TEXT_01, "--topology=h100:64", "--work=decode"), "give a TPU slice"),
        (("--stages=pretrain",), "did you mean 'pretrain_8k'"),
        (("--config=configs/long_context.py", "--topology=h100:8"), "which has 128K, 512K, 1M"),
        ((TEXT_01, "--topology=h100:8", "--stage=1M"), "which has none"),
    ],
)
def test_mistakes_are_one_sentence(arguments, says):
    assert says in mistake("plan", *arguments)
