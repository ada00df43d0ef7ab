"""What a wrong call prints: one sentence that says what to change, and status 1."""

import json

import pytest

from tests.launch.programs import REPOSITORY, mistake, run

QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.trian.steps=3", "unknown field 'trian.steps': config has no 'trian'; did you mean 'train'?"),
        ("--config.train.stpes=3", "unknown field 'train.stpes': train has no 'stpes'; did you mean 'steps'?"),
        ("--config.train.steps=many", "flag --config.train.steps=many: invalid literal for int()"),
        ("--config.train.steps", "write the value behind an equals sign, as in --config.train.steps=VALUE"),
        ("--config.model.num_heads=3", "model.num_heads=3 is not a multiple of model.num_kv_heads=2"),
        ("--config.mesh.fsdp=2", "the mesh has fsdp 2 = 2 devices and this run has 1"),
        ("--config.data.path=nowhere", "nowhere holds no prepared data: run python -m launch.prepare"),
        ("--workdri=x", "Unknown command line flag 'workdri'. Did you mean: workdir ?"),
        ("400", "'400' is not a flag: write it as --name=value"),
    ],
)
def test_pretrain(tmp_path, override, sentence):
    assert sentence in mistake("pretrain", QUICKSTART, f"--workdir={tmp_path / 'run'}", override)
    assert not (tmp_path / "run").exists()


def test_pretrain_without_what_it_needs(tmp_path):
    assert mistake("pretrain", QUICKSTART) == "--workdir is missing"
    assert "--config is missing" in mistake("pretrain", "--workdir=x")
    assert "configs/none.py: no such file; there are configs/" in mistake("pretrain", "--config=configs/none.py")


def test_prepare(tmp_path):
    output = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"text": "fine"}) + "\n{not json\n")
    for sources, sentence in (
        (["--source=web"], "write NAME=PATH"),
        ([f"--source=web={tmp_path / 'none.jsonl'}"], "none.jsonl"),
        ([f"--source=web={empty}"], "empty"),
        ([f"--source=web={broken}"], "broken.jsonl"),
        ([f"--source=web={broken}", "--join=folder"], "value should be one of <package|both>"),
        ([f"--source=web={broken}", "--long_qa=wb"], "--long_qa=wb: no source of that name; did you mean 'web'?"),
        (["--long_qa=python", "--long_qa_lengths=9"], "--long_qa_lengths=9: give two numbers of tokens"),
    ):
        assert sentence in mistake("prepare", f"--output={output}", *sources)
        assert not output.exists()
    assert "exists: remove it" in mistake("prepare", f"--output={empty}")


def test_generate(tmp_path):
    assert "is not a directory" in mistake("generate", f"--checkpoint={tmp_path / 'none'}")
    assert "holds no checkpoints" in mistake("generate", f"--checkpoint={tmp_path}")


def test_report(tmp_path):
    assert "does not exist" in mistake("report", f"--workdir={tmp_path}")


def test_convert(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text('{"model_type": "minimax_m1"}')
    (pickles / "pytorch_model.bin").write_bytes(b"")
    target = f"--target={tmp_path / 'out'}"
    for flags, sentence in (
        ([], "--source is missing"),
        ([f"--source={empty}"], "--target is missing"),
        ([f"--source={tmp_path / 'none'}", target], "is not a directory"),
        ([f"--source={empty}", target], "holds no checkpoints"),
        ([f"--source={pickles}", target], "lacks 'vocab_size'"),
        ([f"--source={empty}", target, "--shard_size=five"], "'five' is no size: write it as in 5GB"),
        ([f"--source={empty}", target, "--layout=torch"], "should be one of <released|transformers>"),
    ):
        assert sentence in mistake("convert", *flags), flags
    assert not (tmp_path / "out").exists()


def test_bench():
    assert "choose one thing to measure" in mistake("bench")
    assert "no figures of 'v5f'; did you mean" in mistake("bench", "--kernels", "--chips=v5f")
    assert "no section 'atention'; did you mean 'attention'?" in mistake("bench", "--gpu", "--sections=atention")


@pytest.mark.parametrize("program", ["prepare", "pretrain", "generate", "convert", "report", "bench"])
def test_help(program):
    result = run(program, "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    assert f"python -m launch.{program}" in text
    assert "launch.program" not in text


def test_every_program_is_listed():
    programs = {path.stem for path in (REPOSITORY / "launch").glob("*.py")} - {"__init__", "program"}
    readme = (REPOSITORY / "README.md").read_text()
    assert [name for name in sorted(programs) if f"launch.{name}" not in readme] == []
