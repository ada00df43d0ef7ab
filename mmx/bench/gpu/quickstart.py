"""The quickstart's training on the GPU and on the host's CPU: the same losses, and a sample from the result."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmx.train.metrics import read_metrics

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

STEPS = 200
# Rounding grows with training: the first steps must agree closely, the curves on average.
EARLY, LARGEST_EARLY, LARGEST_MEAN = 20, 1e-3, 2e-2


def compare_with_cpu(sink: Sink) -> None:
    """Trains on both at once from the same seed and data, products in full fp32 on both."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        _run("prepare", f"--output={data}")
        processes = {platform: _train(platform, data, f"{folder}/{platform}") for platform in ("cuda", "cpu")}
        losses = {}
        for platform, process in processes.items():
            output, _ = process.communicate()
            if process.returncode:
                sink.result(f"training on {platform} failed: {output[-300:]}", failed=output[-300:])
                return
            rows = read_metrics(Path(folder) / platform)
            steps = [row for row in rows if "loss" in row]
            losses[platform] = np.asarray([row["loss"] for row in steps])
            speed = float(np.median([row["tokens_per_second"] for row in steps]))
            bits = [row["heldout_bits_per_byte"] for row in rows if "heldout_bits_per_byte" in row]
            sink.result(
                f"{platform}: loss {losses[platform][0]:.4f} to {losses[platform][-1]:.4f}, held-out bits a byte "
                f"{bits[0]:.3f} to {bits[-1]:.3f}, {speed:,.0f} tokens/s",
                platform=platform,
                losses=losses[platform].tolist(),
                heldout_bits_per_byte=bits,
                tokens_per_second=speed,
            )
        difference = np.abs(losses["cuda"] - losses["cpu"]) / losses["cpu"]
        agrees = difference[:EARLY].max() <= LARGEST_EARLY and difference.mean() <= LARGEST_MEAN
        sink.result(
            f"{'agree' if agrees else 'DIFFER'}: relative difference of the loss at most "
            f"{difference[:EARLY].max():.1e} in the first {EARLY} steps, {difference.mean():.1e} on average "
            f"over {len(difference)}, at most {difference.max():.1e}",
            verdict="agree" if agrees else "DIFFER",
        )
        sample = _run("generate", f"--checkpoint={folder}/cuda", "--prompt=def main(", "--max_new_tokens=40")
        sink.result(f"a sample, generated on the GPU: {sample!r}", sample=sample)


def _train(platform: str, data: str, workdir: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.pretrain", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    changes = {"data.path": data, "train.steps": STEPS, "train.log_every": 1, "train.eval_every": STEPS}
    return subprocess.Popen(
        command + [f"--config.{name}={value}" for name, value in changes.items()],
        env=os.environ | {"JAX_PLATFORMS": platform, "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"launch.{program}", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
