"""The quickstart's training on the GPU and on the host's CPU: the same losses, and a sample from the result."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from mmx.train.metrics import read_metrics

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

STEPS = 200
# Rounding grows with training: the first steps must agree closely, the curves on average.
EARLY, LARGEST_EARLY, LARGEST_MEAN = 20, 1e-3, 2e-2


def train_on_cpu(sink: Sink) -> None:
    """Prepares the data and trains on the CPU, products in full fp32."""
    _run("prepare", f"--output={sink.folder / 'data'}")
    _train("cpu", sink)


def compare(sink: Sink) -> None:
    """Trains on the GPU from the same seed and data, and continues a prompt with the result on both."""
    losses, on_cpu = _train("cuda", sink), _losses(read_metrics(sink.folder / "cpu"))
    difference = np.abs(losses - on_cpu) / on_cpu
    agrees = difference[:EARLY].max() <= LARGEST_EARLY and difference.mean() <= LARGEST_MEAN
    sink.result(
        f"{'agree' if agrees else 'DIFFER'}: relative difference of the loss at most "
        f"{difference[:EARLY].max():.1e} in the first {EARLY} steps, {difference.mean():.1e} on average "
        f"over {len(difference)}, at most {difference.max():.1e}",
        verdict="agree" if agrees else "DIFFER",
    )
    continued = [f"--checkpoint={sink.folder / 'cuda'}", "--prompt=def main(", "--max_new_tokens=40"]
    with ThreadPoolExecutor() as pool:
        on_gpu, on_cpu = pool.map(lambda platform: _run("generate", *continued, platform=platform), ("cuda", "cpu"))
    verdict = "agree" if on_gpu == on_cpu else "DIFFER"
    sink.result(
        f"generation on GPU and CPU: {verdict}; {on_gpu!r}", verdict=verdict, generated_gpu=on_gpu, generated_cpu=on_cpu
    )


def _train(platform: str, sink: Sink) -> np.ndarray:
    """Trains, reports, and returns each step's loss."""
    changes = {
        "data.path": sink.folder / "data",
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.eval_every": STEPS,
    }
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    workdir = sink.folder / platform
    _run("pretrain", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags, platform=platform)
    rows = read_metrics(workdir)
    losses = _losses(rows)
    speed = float(np.median([row["tokens_per_second"] for row in rows if "loss" in row]))
    bits = [row["heldout_bits_per_byte"] for row in rows if "heldout_bits_per_byte" in row]
    cores = len(os.sched_getaffinity(0))
    sink.result(
        f"{platform}: loss {losses[0]:.4f} to {losses[-1]:.4f}, held-out bits a byte {bits[0]:.3f} to {bits[-1]:.3f}, "
        f"{speed:,.0f} tokens/s" + (f" on {cores} cores" if platform == "cpu" else ""),
        platform=platform,
        losses=losses.tolist(),
        heldout_bits_per_byte=bits,
        tokens_per_second=speed,
        cores=cores,
    )
    return losses


def _losses(rows: list[dict]) -> np.ndarray:
    return np.asarray([row["loss"] for row in rows if "loss" in row])


def _run(program: str, *arguments: str, platform: str = "cpu") -> str:
    """Output of a program, products in full fp32; raises with the end of its messages if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{program}", *arguments],
        env=os.environ | {"JAX_PLATFORMS": platform, "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise RuntimeError(f"launch.{program} on {platform} failed: {done.stderr[-1000:]}")
    return done.stdout
