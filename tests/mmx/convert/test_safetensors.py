"""Our reader and writer of the format against the library's, and what is refused."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from mmx.config import ConfigError
from mmx.convert.safetensors import INDEX, UNFINISHED, Directory, read_header
from mmx.convert.shards import ShardWriter, Spec, plan_shards
from mmx.convert.transfer import permuted_copy

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.standard_normal((5, 7)).astype(np.float32),
    "b": RNG.standard_normal((3, 4, 2)).astype(ml_dtypes.bfloat16),
    "c": RNG.standard_normal(11).astype(np.float16),
    "d": RNG.standard_normal((60, 30_000)).astype(np.float32),  # with runs long enough to be read one by one
}


@pytest.fixture
def folder(tmp_path):
    specs = [Spec(name, array.dtype, array.shape) for name, array in TENSORS.items()]
    writer = ShardWriter(tmp_path / "out", plan_shards(specs, 150), "test")
    writer.begin()
    writer.write(lambda spec: TENSORS[spec.name], 1 << 20, lambda _: None)
    writer.finish()
    return tmp_path / "out"


def test_boxes(folder):
    directory = Directory(folder)
    assert set(directory.names()) == set(TENSORS)
    for _ in range(200):
        name = RNG.choice(list(TENSORS))
        array = TENSORS[name]
        view = (6, 10, 300, 100) if name == "d" and RNG.random() < 0.5 else array.shape
        starts = [int(RNG.integers(0, n)) if RNG.random() < 0.6 else 0 for n in view]
        stops = [
            int(RNG.integers(start + 1, n + 1)) if RNG.random() < 0.6 else n
            for start, n in zip(starts, view, strict=True)
        ]
        box = tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
        got = directory.read(name, view, box)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array.reshape(view)[box])


def test_only_the_bytes_of_a_box_are_read(folder, monkeypatch):
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, buffers, at: read.append(len(buffers[0])) or preadv(f, buffers, at))
    columns = (slice(0, 60), slice(1500, 21_500))
    np.testing.assert_array_equal(Directory(folder).read("d", (60, 30_000), columns), TENSORS["d"][columns])
    assert read == [20_000 * 4] * 60


def test_the_library_reads_what_we_write(folder):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    for name, file in index["weight_map"].items():
        assert min(entry.offset for entry in read_header(folder / file).values()) % 8 == 0
        if TENSORS[name].dtype != ml_dtypes.bfloat16:
            np.testing.assert_array_equal(numpy.load_file(folder / file)[name], TENSORS[name])


def test_we_read_what_the_library_writes(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    plain = {name: array for name, array in TENSORS.items() if array.dtype != ml_dtypes.bfloat16}
    numpy.save_file(plain, tmp_path / "model.safetensors")
    directory = Directory(tmp_path)
    for name, array in plain.items():
        whole = tuple(slice(0, n) for n in array.shape)
        np.testing.assert_array_equal(directory.read(name, array.shape, whole), array)


def test_permuted_copy():
    for shape, order in (((3, 40, 5), (2, 0, 1)), ((70, 33), (1, 0)), ((2, 3, 4, 5), (0, 3, 1, 2)), ((4,), (0,))):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            array = RNG.standard_normal(shape).astype(dtype)
            got = permuted_copy(array, order)
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got, array.transpose(order))


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[1]


def truncate(folder):
    os.truncate(shard(folder), shard(folder).stat().st_size - 1)


def truncate_header(folder):
    os.truncate(shard(folder), 20)


def empty(folder):
    shard(folder).write_bytes(b"")


def wrong_header(folder):
    shard(folder).write_bytes(struct.pack("<Q", 4) + b"{no}")


def wrong_offsets(folder):
    header = json.dumps({"b": {"dtype": "BF16", "shape": [3, 4, 2], "data_offsets": [0, 4]}}).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(header)) + header + b"0000")


def unknown_dtype(folder):
    header = json.dumps({"b": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(header)) + header + b"0000")


def remove_shard(folder):
    shard(folder).unlink()


def remove_index(folder):
    (folder / INDEX).unlink()


def outside(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a"] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def pickled(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def moved(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a"] = index["weight_map"]["b"]
    (folder / INDEX).write_text(json.dumps(index))


def no_index(folder):
    (folder / INDEX).write_text("[]")


def unfinished(folder):
    (folder / UNFINISHED).write_text("")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, r"model-00002-of-00003.safetensors is truncated: it has \d+ bytes and its header speaks of \d+"),
        (truncate_header, "is no safetensors file, or is truncated"),
        (empty, "is no safetensors file, or is truncated"),
        (wrong_header, "has a header that cannot be read"),
        (wrong_offsets, r"'b' of shape \(3, 4, 2\) does not fit its bytes 0..4"),
        (unknown_dtype, "'b' has dtype F8_E4M3, which is not read"),
        (remove_shard, "model-00002-of-00003.safetensors is missing: model.safetensors.index.json puts tensors in it"),
        (remove_index, "has 3 safetensors files and no model.safetensors.index.json"),
        (outside, r"names '../secret.safetensors', which is no safetensors file in"),
        (pickled, "holds PyTorch pickles, which can run any code and are never read"),
        (moved, "says that model-00002-of-00003.safetensors has 'a', which it has not"),
        (no_index, "is no index of tensors"),
        (unfinished, "is an unfinished export"),
    ],
)
def test_damage_is_named(folder, damage, sentence):
    damage(folder)
    with pytest.raises(ConfigError, match=sentence):
        Directory(folder)


def test_plan_fills_shards_in_order():
    half = np.dtype(ml_dtypes.bfloat16)
    plan = plan_shards([Spec(str(n), half, (n,)) for n in (10, 20, 5, 100, 5, 5)], 70)
    assert [[spec.name for spec in one.specs] for one in plan] == [["10", "20", "5"], ["100"], ["5", "5"]]
    assert plan[0].file == "model-00001-of-00003.safetensors"
    assert plan_shards([Spec("a", half, (3,))], 70)[0].file == "model.safetensors"
