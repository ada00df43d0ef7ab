"""The TPUs that kernels are compiled and tuned for, and what their makers say they can do."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation: a chip, or half of one on TPU7x.

    Rates are the published peaks. The clock is the one that makes peak FLOP/s equal to the matrix units' size times
    their number: inferred, not published.
    """

    name: str
    topology: str  # the smallest, as ``jax.experimental.topologies`` spells it
    device_kind: str
    clock: float  # Hz
    flops: float  # bf16 FLOP/s
    bandwidth: float  # HBM bytes/s
    cores: int  # programs of a parallel grid that run side by side

    def memory_seconds(self, num_bytes: float) -> float:
        """What moving bytes takes at full bandwidth."""
        return num_bytes / self.bandwidth

    def seconds(self, cycles: float, num_bytes: float) -> float:
        """Predicted time of a kernel: the compiler's cycles, or the memory's time where that is longer.

        The compiler's model reads faster than HBM can and overlaps reads with writes for free, so its cycles alone
        promise too much of a kernel that is bound by memory.
        """
        return max(cycles / self.clock, self.memory_seconds(num_bytes))


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4:1x1x1", "TPU v4", 1.05e9, 275e12, 1.228e12, 2),
        Chip("v5e", "v5e:1x1", "TPU v5 lite", 1.5e9, 197e12, 0.819e12, 1),
        Chip("v5p", "v5p:1x1x1", "TPU v5", 1.75e9, 459e12, 2.765e12, 2),
        Chip("v6e", "v6e:1x1", "TPU v6 lite", 1.75e9, 918e12, 1.64e12, 1),
        Chip("tpu7x", "tpu7x:1x1x1", "TPU7x", 2.2e9, 2307e12 / 2, 7.38e12 / 2, 1),
    )
}
