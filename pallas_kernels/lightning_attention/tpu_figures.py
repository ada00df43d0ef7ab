"""Figures of the TPU kernels: predicted by the compiler for any chip, or measured on the chip that is here.

The unit is nanoseconds a token and head; of decoding, a call.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Chip, ProfileError, static_cycles
from pallas_kernels.lightning_attention import tpu_cases
from pallas_kernels.lightning_attention.tpu_backward import NAME as BACKWARD
from pallas_kernels.lightning_attention.tpu_decode import NAME as DECODE
from pallas_kernels.lightning_attention.tpu_forward import NAME as FORWARD
from pallas_kernels.lightning_attention.tpu_plan import Tiles
from pallas_kernels.timing import median_seconds

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
        compiled = jax.jit(function).lower(*arguments).compile()
        return 1e9 * median_seconds(lambda: compiled(*arguments), repetitions) / self.token_heads


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """The decode kernel at one size.

    By default the heads that one program works on, so that blocks of several tokens lie in one piece: the static
    profiler counts no cycles where they do not.
    """

    tokens: int
    batch: int = 32
    heads: int = 16
    key: int = 128
    value: int = 128
    dtype: str = "bfloat16"

    @property
    def states(self) -> int:
        """States that are updated."""
        return self.batch * self.heads

    @property
    def bytes_moved(self) -> int:
        """Bytes that must cross the HBM: each state in and out, and the tokens."""
        channels = 2 * self.key + 2 * self.value
        return self.states * (8 * self.key * self.value + self.tokens * channels * jnp.dtype(self.dtype).itemsize)

    def cycles(self, chip: Chip, timeout: float = 300) -> int:
        """The compiler's static count for a call.

        Raises:
          ProfileError: if the kernel does not compile or cannot be profiled.
        """
        case = f"{tpu_cases.__name__}:decode"
        cycles = static_cycles(chip, case, dataclasses.asdict(self), timeout)[DECODE]
        if not cycles:
            raise ProfileError(f"{case} on {chip.name}: the profiler counts no cycles")
        return cycles

    def measure(self, repetitions: int = 10) -> float:
        """Seconds of a call on the TPU that is here, each taking the state that the one before left."""
        function, shapes = tpu_cases.decode(**dataclasses.asdict(self))
        *operands, state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        compiled = function.lower(*operands, state).compile()

        def call():
            nonlocal state
            _, state = compiled(*operands, state)
            return state

        return median_seconds(call, repetitions)
