"""Speed and memory of launch.convert beside what reading and writing the same files with safetensors takes.

Each piece of work is a process of its own, and they take turns, so that what disturbs the machine disturbs all alike.
Files stay in the page cache between turns; everything written is synced to the disk before the clock stops.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mmx.config import ModelConfig
from mmx.convert.config import CONFIG, RELEASED, to_huggingface
from mmx.convert.conversion import convert
from mmx.convert.names import tensors
from mmx.convert.shards import ShardWriter, Spec, plan_shards
from mmx.convert.source import tensor_dtype

IMPORT, EXPORT, SAFETENSORS = "import", "export", "safetensors"
# 1.9 billion parameters, in shards of a gigabyte.
MODEL = ModelConfig(
    vocab_size=32_768,
    hidden_size=2048,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    rotary_dim=64,
    num_experts=16,
    expert_hidden_size=2048,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
SHARD_BYTES = 10**9


def measure(turns: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every piece of work ``turns`` times; gigabytes a second (medians) and the most memory of its process."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # For the processes to come, before they start.
    works = [IMPORT, EXPORT]
    if importlib.util.find_spec(SAFETENSORS):
        works.append(SAFETENSORS)
    else:
        say("safetensors is not installed: launch.convert is measured alone")
    with tempfile.TemporaryDirectory(prefix="conversion") as name:
        folder = Path(name)
        total = _write_model(folder / "hf")
        say(f"{total / 1e9:.2f} GB of weights in bf16; in turns, {turns} of each")
        found: dict[str, list[tuple[float, int]]] = {work: [] for work in works}
        for _ in range(turns):
            for work in works:
                found[work].append(_in_process(work, folder))
            for written in ("run", "exported", "saved"):
                shutil.rmtree(folder / written, ignore_errors=True)
    results = {}
    for work, measured in found.items():
        seconds, peaks = zip(*measured, strict=True)
        results[work] = {"gb_per_second": total / statistics.median(seconds) / 1e9, "peak_bytes": max(peaks)}
        say(f"{work}: {results[work]['gb_per_second']:.2f} GB/s, at most {max(peaks) / 1e9:.2f} GB of memory")
    return results


def _in_process(work: str, folder: Path) -> tuple[float, int]:
    """Seconds of a piece of work, and bytes of memory at most."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, folder, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _run(work: str, folder: Path, sender: Connection) -> None:
    arguments = {"shard_bytes": SHARD_BYTES, "dtype": None, "verify": False, "dry_run": False, "say": lambda _: None}
    started = time.perf_counter()
    if work == IMPORT:
        convert(folder / "hf", folder / "run", layout=None, **arguments)
    elif work == EXPORT:
        convert(folder / "run", folder / "exported", layout=RELEASED, **arguments)
    else:
        _load_and_save(folder / "hf", folder / "saved")
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    sender.send((seconds, int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024))


def _load_and_save(source: Path, target: Path) -> None:
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def _write_model(folder: Path) -> int:
    """Writes made-up weights; returns their bytes."""
    noise = 0.02 * np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)
    specs = [Spec(t.name, tensor_dtype(t.name, MODEL.param_dtype), t.shape) for t in tensors(MODEL)]
    writer = ShardWriter(folder, plan_shards(specs, SHARD_BYTES), "measurement")
    writer.begin()
    (folder / CONFIG).write_text(json.dumps(to_huggingface(MODEL, RELEASED, MODEL.param_dtype)))
    writer.write(lambda spec: np.resize(noise, spec.shape).astype(spec.dtype), 1 << 28, lambda _: None)
    writer.finish()
    return sum(spec.nbytes for spec in specs)
