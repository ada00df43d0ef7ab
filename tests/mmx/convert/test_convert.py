"""Whole conversions: exact there and back, in whatever way a checkpoint is spelt; interrupted ones go on."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

import mmx
from mmx.config import CheckpointConfig, ConfigError, MeshConfig, OptimizerConfig, load_json
from mmx.convert import safetensors
from mmx.convert.checkpoint import CheckpointReader
from mmx.convert.conversion import convert, parse_size
from mmx.convert.load import load_huggingface
from mmx.convert.names import FUSED, tensors
from mmx.convert.safetensors import INDEX, UNFINISHED, Directory
from mmx.convert.shards import ShardWriter
from mmx.convert.transfer import tensor_values
from mmx.data.tokenizer import Tokenizer
from mmx.parallel import build_mesh
from mmx.train.checkpoint import Checkpoints, Progress, load_initial
from mmx.train.optimizer import build_optimizer
from mmx.train.step import abstract_state, start_state
from pallas_kernels.lightning_attention import layer_slopes
from tests.mmx.convert.checkpoints import BF16, edit_config, read_all, same_bytes, write_directory, write_tensors
from tests.tiny import TINY, params, tiny, tokens


def run(source, target, layout=None, shard_bytes=30_000, dtype=None, verify=False, dry_run=False) -> list[str]:
    said = []
    convert(
        source,
        target,
        layout=layout,
        shard_bytes=shard_bytes,
        dtype=dtype,
        verify=verify,
        dry_run=dry_run,
        say=said.append,
    )
    return said


@pytest.fixture(autouse=True)
def without_twin(monkeypatch):
    """The comparison of logits costs seconds each time; test_twin.py makes it."""
    monkeypatch.setattr("mmx.convert.conversion.can_compare", lambda _: "not in this test")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "released"
    write_directory(folder)
    return folder


@pytest.fixture(scope="module")
def ours(original, tmp_path_factory):
    """The same, imported."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    run(original, folder)
    return folder


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def test_there_and_back_is_byte_identical(original, ours, tmp_path):
    said = run(ours, tmp_path / "back")
    assert "wrote 135 tensors in 6 shards" in said[0]
    assert same_bytes(read_all(tmp_path / "back"), read_all(original))
    for name in ("generation_config.json", "vocab.json"):
        assert (tmp_path / "back" / name).read_bytes() == (original / name).read_bytes()
    fields, back = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "back"))
    # The directory was written from a model that has the report's auxiliary loss, so it does not say this.
    assert back == fields | {"router_aux_loss_coef": 0.001}
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in read_all(original).values())
    assert not (tmp_path / "back" / UNFINISHED).exists()


def test_loads_directly_and_from_what_it_became(original, ours):
    model, converted = mmx.load(original), mmx.load(ours)
    assert model.config == converted.config == dataclasses.replace(BF16, **explicit(BF16))
    jax.tree.map(np.testing.assert_array_equal, model.params, converted.params)
    gate = model.params["runs"]["0_lightning"]["experts"]["router"]["gate"]
    assert gate.dtype == np.float32
    assert model.params["embedding"].dtype == ml_dtypes.bfloat16
    ids = tokens(1, 20)
    np.testing.assert_array_equal(model.logits(ids), converted.logits(ids))
    assert load_json(ours / "config.json").model == model.config


def explicit(config) -> dict:
    """What a config.json says in numbers."""
    alphas = {f"{branch}_alpha": config.alpha(branch) for branch in ("lightning", "softmax", "experts")}
    return alphas | {"aux_loss_form": "released", "aux_loss_coefficient": 0.001}


def test_onto_a_mesh_each_device_its_own_part(original, monkeypatch):
    read = []
    read_box = safetensors.read_box

    def counting(*arguments):
        values = read_box(*arguments)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(safetensors, "read_box", counting)
    _, whole = load_huggingface(original)
    bytes_of_one, read[:] = sum(read), []
    with jax.set_mesh(build_mesh(MeshConfig(replica=2, fsdp=2, expert_tensor=2))):
        _, split = load_huggingface(original)
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    down = split["runs"]["0_lightning"]["experts"]["down"]
    assert {shard.data.shape[-2:] for shard in down.addressable_shards} == {(10, 12)}
    # Parts and replicas on eight devices of one process: every value is read once.
    assert sum(read) == bytes_of_one


@pytest.mark.parametrize("change", ["fused", "bf16 gates", "decay buffers", "all of it", "one file"])
def test_other_spellings(copy, ours, change, tmp_path):
    values = read_all(copy)
    if change in ("fused", "all of it"):
        read = CheckpointReader(ours / "checkpoints").read
        values = {tensor.name: tensor_values(tensor, read) for tensor in tensors(mmx.load(ours).config, FUSED)}
    if change in ("bf16 gates", "all of it"):
        values = {name: array.astype(ml_dtypes.bfloat16) for name, array in values.items()}
    if change in ("decay buffers", "all of it"):
        values |= decay_buffers(block=32)
    shutil.rmtree(copy)
    write_tensors(copy, values, 1 << 30 if change == "one file" else 40_000)
    fields = json.loads((ours / "huggingface" / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(fields))

    run(copy, tmp_path / "run", verify=change == "all of it")
    got, want = mmx.load(tmp_path / "run"), mmx.load(ours)
    assert got.config == want.config

    def same(path, a, b):
        rounded = "bf16" in change or change == "all of it"
        b = b.astype(ml_dtypes.bfloat16).astype(b.dtype) if rounded else b
        np.testing.assert_array_equal(a, b, err_msg=str(path))

    jax.tree_util.tree_map_with_path(same, got.params, want.params)
    run(tmp_path / "run", tmp_path / "back")
    assert not any("decay" in name for name in Directory(tmp_path / "back").names())
    assert read_all(tmp_path / "back")["model.layers.0.block_sparse_moe.gate.weight"].dtype == np.float32


def decay_buffers(block: int, rule: str = "released") -> dict[str, np.ndarray]:
    """What Transformers stores beside a lightning layer's weights."""
    found = {}
    for number, kind in enumerate(BF16.layer_pattern):
        if kind == "lightning":
            at, H = f"model.layers.{number}.self_attn.", BF16.num_heads
            slopes = layer_slopes(H, number, BF16.num_layers, rule)
            found[at + "slope_rate"] = slopes.reshape(H, 1, 1).astype(ml_dtypes.bfloat16)
            found[at + "query_decay"] = np.ones((H, block, 1), ml_dtypes.bfloat16)
            found[at + "key_decay"] = np.ones((H, block, 1), ml_dtypes.bfloat16)
            found[at + "diagonal_decay"] = np.ones((1, H, block, block), ml_dtypes.bfloat16)
    return found


def test_dtype_on_request(original, tmp_path):
    run(original, tmp_path / "wide", dtype="float32", verify=True)
    assert mmx.load(tmp_path / "wide").config.param_dtype == "float32"
    run(tmp_path / "wide", tmp_path / "back", dtype="bfloat16", verify=True)
    assert same_bytes(read_all(tmp_path / "back"), read_all(original))
    run(original, tmp_path / "direct", layout="released", dtype="float32")
    got = read_all(tmp_path / "direct")["model.norm.weight"]
    np.testing.assert_array_equal(got, read_all(original)["model.norm.weight"].astype(np.float32))


def test_verification_finds_one_wrong_bit(ours, tmp_path, monkeypatch):
    target = tmp_path / "out"
    finish = ShardWriter.finish

    def finish_and_damage(writer):
        finish(writer)
        path = sorted(target.glob("*.safetensors"))[2]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(ShardWriter, "finish", finish_and_damage)
    with pytest.raises(ConfigError, match=r"the conversion is not exact: model\.\S+ differ"):
        run(ours, target, verify=True)


class Killed(Exception):
    """Stands for the end of the process."""


def test_interrupted_export_goes_on(ours, tmp_path, monkeypatch):
    target = tmp_path / "out"
    written, write = [], os.write

    def dying_write(descriptor, data):
        written.append(len(data))
        if sum(written) > 70_000:
            raise Killed
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", dying_write)
        with pytest.raises(Killed):
            run(ours, target)
    assert (target / UNFINISHED).exists()
    assert not (target / INDEX).exists()
    with pytest.raises(ConfigError, match="is an unfinished export: run the same"):
        mmx.load(target)
    with pytest.raises(ConfigError, match="holds an unfinished export of something else"):
        run(ours, target, shard_bytes=20_000)
    whole = sorted(target.glob("*.safetensors"))
    assert len(whole) == 2
    times = [path.stat().st_mtime_ns for path in whole]

    run(ours, target)
    assert [path.stat().st_mtime_ns for path in whole] == times
    run(ours, tmp_path / "at once")
    assert same_bytes(read_all(target), read_all(tmp_path / "at once"))
    assert sorted(path.name for path in target.iterdir()) == sorted(p.name for p in (tmp_path / "at once").iterdir())
    with pytest.raises(ConfigError, match="is not empty"):
        run(ours, target)


def test_interrupted_import_starts_again(original, tmp_path, monkeypatch):
    target = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.Directory, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(original, target)
    assert not (target / "checkpoints").exists()
    (target / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)  # What a kill leaves.
    run(original, target)
    assert mmx.load(target).config.param_dtype == "bfloat16"
    with pytest.raises(ConfigError, match="is not empty"):
        run(original, target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        run(original, tmp_path / "mine")


def test_full_disk(original, ours, tmp_path, monkeypatch):
    write = os.write

    def full(descriptor, data):
        if len(data) > 10_000:
            write(descriptor, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            run(ours, tmp_path / "out", shard_bytes=10**9)
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    assert (tmp_path / "out" / UNFINISHED).exists()
    run(ours, tmp_path / "out", shard_bytes=10**9)
    assert same_bytes(read_all(tmp_path / "out"), read_all(original))

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for source, target in ((original, tmp_path / "new"), (ours, tmp_path / "other")):
        with pytest.raises(ConfigError, match="the disk is full"):
            run(source, target)
        assert not target.exists()


def test_dry_run_writes_nothing(original, ours, tmp_path):
    assert "would write 23 arrays" in run(original, tmp_path / "a", dry_run=True)[-1]
    assert "would write 135 tensors in 6 shards" in run(ours, tmp_path / "b", dry_run=True)[-1]
    with pytest.raises(ConfigError, match="computes other decay slopes for 6 heads"):
        run(ours, tmp_path / "c", layout="transformers", dry_run=True)
    assert not list(tmp_path.iterdir())


def remove_tensor(folder, name):
    values = read_all(folder)
    del values[name]
    rewrite(folder, values)


def remove_from_index(folder, name):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


def reshape_tensor(folder, name):
    values = read_all(folder)
    values[name] = values[name].T.copy()
    rewrite(folder, values)


def add_tensor(folder, name):
    rewrite(folder, read_all(folder) | {name: np.zeros(3, np.float32)})


def wrong_slopes(folder, rule):
    rewrite(folder, read_all(folder) | decay_buffers(32, rule))


def rewrite(folder, values):
    fields = (folder / "config.json").read_text()
    shutil.rmtree(folder)
    write_tensors(folder, values)
    (folder / "config.json").write_text(fields)


QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
    ("damage", "argument", "sentence"),
    [
        (remove_tensor, QKV, f"lacks {QKV}: is a shard or an entry of its index missing?"),
        (remove_from_index, QKV, f"lacks {QKV}: is a shard or an entry of its index missing?"),
        (reshape_tensor, QKV, rf"{QKV} has shape \[24, 144\] and its config asks for \[144, 24\]"),
        (add_tensor, "model.layers.6.extra", "has tensors that its config does not speak of: model.layers.6.extra"),
        (wrong_slopes, "transformers", "layers.0.self_attn.slope_rate contradicts the slopes of the 'released' rule"),
        (lambda folder, _: (folder / "config.json").unlink(), None, "holds no checkpoint: it has no config.json"),
        (lambda folder, _: edit_config(folder, model_type="llama"), None, "model_type 'llama', which is not of the"),
        (lambda folder, _: edit_config(folder, rotary=1), None, "unknown field 'rotary'"),
        (lambda folder, _: edit_config(folder, tie_word_embeddings=True), None, "contradicts an lm_head.weight other"),
    ],
)
def test_wrong_checkpoints(copy, tmp_path, damage, argument, sentence):
    damage(copy, argument)
    with pytest.raises(ConfigError, match=sentence):
        run(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_head_may_be_written_out(tmp_path):
    config = tiny(tie_embeddings=True, param_dtype="bfloat16")
    values = write_directory(tmp_path / "hf", config)
    rewrite(tmp_path / "hf", values | {"lm_head.weight": values["model.embed_tokens.weight"]})
    assert "head" not in mmx.load(tmp_path / "hf").params


def test_not_checkpoints(ours, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, sentence in (
        (tmp_path / "none", "is not a directory"),
        (tmp_path / "empty", "holds no checkpoints"),
        (ours / "checkpoints" / "7", "is not a directory"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            run(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="is the source itself"):
        run(ours, ours)
    with pytest.raises(ConfigError, match="is not empty"):
        run(ours, tmp_path)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "2GiB", "500 MB", "1.5K", "7")] == [
        5 * 10**9,
        2 << 30,
        500 * 10**6,
        1500,
        7,
    ]
    for text in ("", "GB", "-1GB", "5XB", "0", "1.2.3GB"):
        with pytest.raises(ConfigError, match="is no size: write it as in 5GB"):
            parse_size(text)


def test_what_training_saved_is_exported_and_started_from(tmp_path):
    """From a checkpoint with an optimizer, written on a mesh; the converted parameters then start another run."""
    optimizer = build_optimizer(OptimizerConfig())
    tree = params(TINY)
    state = jax.jit(lambda: start_state(optimizer, tree))()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(), print)
    checkpoints.save(TINY, state, Progress(3, 30, {}))
    checkpoints.close()
    Tokenizer.train(["some text of a few words"] * 3, 280).save(tmp_path / "run" / "tokenizer.json")
    run(tmp_path / "run", tmp_path / "hf", verify=True)
    loaded = mmx.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tree)
    begin, end = loaded.tokenizer.begin_of_document, loaded.tokenizer.end_of_document
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}
    entries = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (entries["bos_token"], entries["eos_token"]) == ("<begin_of_document>", "<end_of_document>")

    run(tmp_path / "hf", tmp_path / "again")
    with jax.set_mesh(build_mesh(MeshConfig(fsdp=8))):
        start = load_initial(tmp_path / "again", TINY)
    jax.tree.map(np.testing.assert_array_equal, start, tree)
    assert start["runs"]["0_lightning"]["attention"]["query"].sharding.shard_shape((2, 2, 24, 4, 8))[2] == 3
    with pytest.raises(ConfigError, match=r"model\.slope_rule='released' and this run has 'transformers'"):
        load_initial(tmp_path / "again", tiny(slope_rule="transformers"))
    again = Checkpoints(tmp_path / "again" / "checkpoints", CheckpointConfig(), print)
    with pytest.raises(ConfigError, match="holds converted parameters and no run: train in another workdir"):
        again.restore(TINY, lambda _: abstract_state(TINY, optimizer))
    again.close()


def test_foreign_tokenizer_is_copied_and_left_out_with_a_warning(copy, tmp_path):
    (copy / "tokenizer.json").write_text("{}")
    run(copy, tmp_path / "run")
    run(tmp_path / "run", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "back" / "tokenizer_config.json").exists()
    with pytest.warns(UserWarning, match="loaded without a tokenizer"):
        assert mmx.load(copy).tokenizer is None
