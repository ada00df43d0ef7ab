"""Checkpoints, configurations and data are data: reading a stranger's never runs code and never leaves its folder."""

import ast
import contextlib
import functools
import json
import os
import pickle
import shutil

import jax
import numpy as np
import pytest

from mmx.config import CheckpointConfig, ConfigError, DataConfig, OptimizerConfig, Run, load_json, save_json
from mmx.convert.source import open_directory
from mmx.data.corpus import Corpus
from mmx.data.loader import PreparedData, Share
from mmx.data.tokenizer import Tokenizer
from mmx.train.checkpoint import Checkpoints, Progress, load_params
from mmx.train.checksums import CHECKSUMS, write_checksums
from mmx.train.optimizer import build_optimizer
from mmx.train.step import abstract_state, init_state
from tests.test_imports import FILES, REPOSITORY
from tests.tiny import tiny
from tests.words import prepare_words

# Modules that run what they read.
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "imp", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "compile"}
MODEL = tiny(num_layers=2, layer_pattern=("lightning", "softmax"))
OPTIMIZER = build_optimizer(OptimizerConfig())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_is_unpickled_or_evaluated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in FORBIDDEN
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS
            assert not name.startswith("yaml.") or name == "yaml.safe_load"
            keywords = {keyword.arg for keyword in node.keywords}
            assert "allow_pickle" not in keywords
            assert name != "torch.load"


@pytest.fixture
def attack(tmp_path):
    """A pickle that makes a file when it is read, and that file."""
    canary = tmp_path / "code was run"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    payload = pickle.dumps(Attack())
    pickle.loads(payload)
    assert canary.exists()
    canary.rmdir()
    return payload, canary


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with one checkpoint, without checksums: a stranger's would be right anyway."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig(), print)
    state = jax.jit(functools.partial(init_state, MODEL, OPTIMIZER, 0))()
    checkpoints.save(MODEL, state, Progress(step=1, tokens=10, data={"next": 1}))
    checkpoints.close()
    (folder / "1" / CHECKSUMS).unlink()
    return folder


def restore(folder):
    with contextlib.closing(Checkpoints(folder, CheckpointConfig(), lambda _: None)) as checkpoints:
        return checkpoints.restore(MODEL, lambda _: abstract_state(MODEL, OPTIMIZER))


def test_malicious_checkpoint(checkpoint, tmp_path, attack):
    """Each file of a checkpoint in turn is a pickle; it is refused or of no consequence, and never run."""
    payload, canary = attack
    names = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    assert len(names) > 8
    for number, name in enumerate(names):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(checkpoint, folder)
        (folder / name).write_bytes(payload)
        write_checksums(folder / "1")
        restore(folder)
        assert not canary.exists(), name


def test_malicious_metadata(checkpoint, tmp_path, attack):
    """What names a handler, a type or a class in a checkpoint's metadata is not imported and called."""
    _, canary = attack
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
        folder = tmp_path / name.replace("/", "-") / "checkpoints"
        shutil.copytree(checkpoint, folder)
        content = json.loads((folder / "1" / name).read_text())

        def poison(value):
            if isinstance(value, dict):
                return {key: poison(entry) for key, entry in value.items()}
            return f"os.mkdir({str(canary)!r})" if isinstance(value, str) else value

        (folder / "1" / name).write_text(json.dumps(poison(content)))
        restore(folder)
        assert not canary.exists()


def test_checksums_do_not_lead_outside(checkpoint, tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoint, folder)
    files = {"../../secret": {"bytes": 1, "sha256": "0" * 64}}
    (folder / "1" / CHECKSUMS).write_text(json.dumps({"files": files}))
    with pytest.raises(ConfigError, match=r"names a file outside, ../../secret"):
        load_params(folder)


def test_malicious_config_and_tokenizer(tmp_path, attack):
    payload, canary = attack
    save_json(Run(), tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    values["data"]["path"] = "__import__('os').mkdir('code was run')"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_json(tmp_path / "config.json").data.path == values["data"]["path"]
    for name, read in (("config.json", load_json), ("tokenizer.json", Tokenizer.load)):
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(Exception):  # noqa: B017, PT011
            read(tmp_path / name)
    assert not canary.exists()


def test_malicious_huggingface_directory(tmp_path, attack):
    payload, canary = attack
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(payload)
        with pytest.raises(ConfigError):
            open_directory(folder)
    assert not canary.exists()


@pytest.fixture
def prepared(tmp_path):
    return prepare_words(tmp_path / "words")


def test_pickled_lengths(prepared, attack):
    _, canary = attack

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    path = prepared / "words" / "train" / "document_lengths.npy"
    np.save(path, np.array([Attack()], object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"document_lengths.npy holds no lengths"):
        Corpus(prepared / "words" / "train")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../shard", "/etc/passwd", "..", "", "a/b", 7], ids=str)
def test_an_index_does_not_lead_out_of_its_folder(prepared, name):
    index = prepared / "words" / "train" / "index.json"
    content = json.loads(index.read_text())
    content["shards"][0]["name"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"index.json names .*, which is not directly in"):
        Corpus(prepared / "words" / "train")


def test_a_source_does_not_lead_out_of_its_folder(prepared):
    report = json.loads((prepared / "dataset.json").read_text())
    report["sources"] = {"../elsewhere": report["sources"]["words"]}
    (prepared / "dataset.json").write_text(json.dumps(report))
    with pytest.raises(ConfigError, match=r"dataset.json names '../elsewhere'"):
        PreparedData(DataConfig(path=str(prepared))).training_batches(0, Share())
