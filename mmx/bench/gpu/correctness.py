"""The model's numbers on the GPU against the same numbers on the host's CPU."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ModelConfig
from mmx.generate import generate
from mmx.model.text import Params, bind, init_params
from mmx.train.loss import Batch, loss_sums
from pallas_kernels.softmax_attention import softmax_attention

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

MODEL = ModelConfig(vocab_size=512, hidden_size=256, num_heads=4, head_dim=64, rotary_dim=32, expert_hidden_size=384)
# Fresh bf16 weights and activations round differently on the two devices: eight layers deep, this much is rounding.
LARGEST_DIFFERENCE = {"float32": 1e-4, "float32, TF32 products": 3e-2, "bfloat16": 6e-2}
# Tokens that are generated after each of two prompts, one of which is padded.
NEW_TOKENS, PROMPTS = 32, (40, 17)


def compute_on_cpu(sink: Sink) -> None:
    """Parameters, what the CPU makes of them, and its continuations of the prompts."""
    params = jax.jit(functools.partial(init_params, MODEL))(jax.random.key(0))
    _save(sink.folder / "params.npz", params)
    _save(sink.folder / "float32.npz", _evaluate(MODEL, params, "highest"))
    _save(sink.folder / "bfloat16.npz", _evaluate(_bf16(), params, "default"))
    _save(sink.folder / "tokens.npz", _continuations(params))


def compare(sink: Sink) -> None:
    """Logits, and gradients of the loss, of a small hybrid on packed rows; and greedy generation."""
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    params = jax.tree.map(
        jnp.asarray, jax.tree.unflatten(jax.tree.structure(shapes), _load(sink.folder / "params.npz"))
    )
    for name, model, precision, file in (
        ("float32", MODEL, "highest", "float32.npz"),
        ("float32, TF32 products", MODEL, "default", "float32.npz"),
        ("bfloat16", _bf16(), "default", "bfloat16.npz"),
    ):
        got = _evaluate(model, params, precision)
        expected = jax.tree.unflatten(jax.tree.structure(got), _load(sink.folder / file))
        differences = {part: _difference(got[part], expected[part]) for part in got}
        verdict = "agree" if max(differences.values()) <= LARGEST_DIFFERENCE[name] else "DIFFER"
        text = ", ".join(f"{part} {value:.1e}" for part, value in differences.items())
        sink.result(f"{name}: {verdict}; relative differences {text}", name=name, verdict=verdict, **differences)

    pairs = zip(_continuations(params), _load(sink.folder / "tokens.npz"), strict=True)
    same = [int(np.sum(np.cumprod(got == expected))) for got, expected in pairs]
    verdict = "agree" if min(same) == NEW_TOKENS else "DIFFER"
    sink.result(
        f"greedy generation: {verdict}; of {NEW_TOKENS} tokens the first {' and '.join(map(str, same))} are the CPU's",
        name="generation",
        verdict=verdict,
        same=same,
    )


def _bf16() -> ModelConfig:
    return dataclasses.replace(MODEL, dtype="bfloat16")


def _evaluate(model: ModelConfig, params: Params, precision: str) -> dict[str, Any]:
    with jax.default_matmul_precision(precision):

        @jax.jit
        def run(params, batch):
            bound = bind(model, params)
            logits = bound.logits(bound(batch.tokens_BS, segment_ids_BS=batch.segment_ids_BS)[0])
            objective = lambda params: loss_sums(model, params, batch, dropless=True)[0]  # noqa: E731
            return {"logits": logits, "gradients": jax.grad(objective)(params)}

        return jax.device_get(run(params, _batch()))


def _batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (2, 513), dtype=np.int32)
    segments = 1 + np.cumsum(rng.random((2, 512)) < 0.01, axis=1, dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, _positions(segments), np.ones((2, 512), np.float32))


def _continuations(params: Params) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, MODEL.vocab_size, length).tolist() for length in PROMPTS]
    with jax.default_matmul_precision("highest"):
        return [np.asarray(row) for row in generate(MODEL, params, prompts, max_new_tokens=NEW_TOKENS)]


def _save(path: Path, tree: Any) -> None:
    np.savez(path, *jax.tree.leaves(tree))


def _load(path: Path) -> list[np.ndarray]:
    """The leaves that ``_save`` was given."""
    with np.load(path) as arrays:
        return [arrays[f"arr_{n}"] for n in range(len(arrays))]


def _difference(got: Any, expected: Any) -> float:
    """Largest over the arrays of the difference's norm relative to the array's."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in pairs)


def compare_cudnn(sink: Sink) -> None:
    """cuDNN's softmax attention behind our op against the reference, values and gradients."""
    shapes = ((2, 300, 8, 64), (2, 300, 2, 64), (2, 300, 2, 64), (2, 300, 8, 64))
    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, do = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))

    def evaluate(implementation):
        o, back = jax.vjp(functools.partial(softmax_attention, implementation=implementation), *qkv)
        return [np.asarray(x, np.float32) for x in (o, *back(do))]

    difference = _difference(evaluate("cudnn"), evaluate("reference"))
    verdict = "agree" if difference < 2e-2 else "DIFFER"
    sink.result(
        f"cuDNN's softmax attention: {verdict}; output and gradients {difference:.1e}",
        name="cudnn",
        verdict=verdict,
        difference=difference,
    )


def _positions(segments: np.ndarray) -> np.ndarray:
    index = np.arange(segments.shape[1])
    starts = np.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)
