"""Figures of the TPU kernels: predicted by the compiler for any chip, or measured on the chip that is here.

The unit is nanoseconds a token and head.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Chip, static_cycles
from pallas_kernels.lightning_attention import tpu_cases
from pallas_kernels.lightning_attention.tpu_backward import NAME as BACKWARD
from pallas_kernels.lightning_attention.tpu_block import Tiles
from pallas_kernels.lightning_attention.tpu_forward import NAME as FORWARD

KERNELS = {"forward": FORWARD, "backward": BACKWARD}


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel at one size."""

    kernel: str  # "forward" or "backward"
    tokens: int
    heads: int
    tiles: Tiles
    key: int = 128
    value: int = 128
    dtype: str = "bfloat16"
    documents: bool = True
    keep_states: bool = False

    @property
    def case(self) -> str:
        """As ``static_cycles`` takes it."""
        return f"{tpu_cases.__name__}:{self.kernel}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What the case is called with."""
        arguments = dataclasses.asdict(self)
        del arguments["kernel"]
        if self.kernel == "backward":
            del arguments["keep_states"]
        return arguments

    @property
    def token_heads(self) -> int:
        """Tokens times heads."""
        return self.tokens * self.heads

    @property
    def bytes_moved(self) -> int:
        """Bytes that must cross the HBM: operands, results and states, without the few of the documents."""
        K, V = self.key, self.value
        channels = 2 * K + 2 * V if self.kernel == "forward" else 4 * K + 3 * V
        blocks = -(-self.tokens // self.tiles.block) if self.kernel == "backward" or self.keep_states else 0
        return jnp.dtype(self.dtype).itemsize * channels * self.token_heads + 4 * blocks * self.heads * K * V

    def predict(self, chip: Chip, timeout: float = 300) -> tuple[int, float]:
        """The compiler's cycles, and nanoseconds a token and head: of the cycles, or of the memory where that is more.

        Raises:
          ProfileError: if the kernel does not compile or cannot be profiled.
        """
        cycles = static_cycles(chip, self.case, self.arguments, timeout)[KERNELS[self.kernel]]
        return cycles, 1e9 * chip.seconds(cycles, self.bytes_moved) / self.token_heads

    def measure(self, repetitions: int = 10) -> float:
        """Nanoseconds a token and head on the TPU that is here, the median of several runs of several calls each."""
        function, shapes = getattr(tpu_cases, self.kernel)(**self.arguments)
        arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        calls = 10
        compiled = jax.jit(function).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        times = []
        for _ in range(repetitions):
            started = time.perf_counter()
            results = [compiled(*arguments) for _ in range(calls)]
            jax.block_until_ready(results)
            times.append((time.perf_counter() - started) / calls)
        return 1e9 * statistics.median(times) / self.token_heads
