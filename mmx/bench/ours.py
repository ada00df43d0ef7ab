"""mmx as a contestant: the train step and the engine that users run."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmx.bench.workload import DECODE, DECODE_TOKENS, MODEL, TRAIN
from mmx.config import OptimizerConfig
from mmx.generate.engine import prefill_and_step
from mmx.model.text import init_params
from mmx.train.loss import Batch
from mmx.train.optimizer import build_optimizer
from mmx.train.step import init_state, train_step


class Ours:
    """See ``mmx.bench.workload.Contestant``."""

    def __init__(self) -> None:
        self._optimizer = build_optimizer(OptimizerConfig())
        step = functools.partial(train_step, MODEL, self._optimizer, 1.0, 1)
        self._step = jax.jit(step, donate_argnums=0)
        self._state = None
        self._params = None

    def describe(self) -> str:
        """Name and version."""
        return f"mmx (jax {jax.__version__})"

    def run(self, work: str, length: int) -> float:
        """Seconds of one piece of work."""
        tokens = np.random.default_rng(length).integers(0, MODEL.vocab_size, (1, length + 1), dtype=np.int32)
        if work == TRAIN:
            return self._train(tokens)
        return self._generate(tokens[:, :length], DECODE_TOKENS if work == DECODE else 0)

    def _train(self, tokens: np.ndarray) -> float:
        self._params = None
        if self._state is None:
            self._state = jax.jit(functools.partial(init_state, MODEL, self._optimizer, 0))()
        length = tokens.shape[1] - 1
        batch = Batch(
            *(jnp.asarray(x) for x in (tokens[:, :-1], tokens[:, 1:], np.ones((1, length), np.int32))),
            positions_BS=jnp.arange(length, dtype=jnp.int32)[None],
            weights_BS=jnp.ones((1, length), jnp.float32),
        )
        started = time.perf_counter()
        self._state, metrics = jax.block_until_ready(self._step(self._state, batch, jnp.float32(1e-4)))
        seconds = time.perf_counter() - started
        if not np.isfinite(metrics.loss):
            raise RuntimeError("the loss is not finite")
        return seconds

    def _generate(self, prompt: np.ndarray, new_tokens: int) -> float:
        self._state = None
        if self._params is None:
            self._params = jax.jit(functools.partial(init_params, MODEL))(jax.random.key(0))
        prefill, step = prefill_and_step(MODEL)
        padding, slots = jnp.zeros(1, jnp.int32), prompt.shape[1] + DECODE_TOKENS
        started = time.perf_counter()
        logits, cache = jax.block_until_ready(prefill(self._params, jnp.asarray(prompt), padding, slots))
        if not new_tokens:
            return time.perf_counter() - started
        started = time.perf_counter()
        for n in range(new_tokens):
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            logits, cache = step(self._params, token, cache, jnp.int32(prompt.shape[1] + n), padding)
        jax.block_until_ready(logits)
        return time.perf_counter() - started
