"""The TPUs that kernels and whole programs are compiled for, GPUs beside them, and what their makers say they can do.

Sources, read in 2025: TPU v4, arXiv 2304.01433 and cloud.google.com/tpu/docs/v4; the others, the pages of
cloud.google.com/tpu/docs named v5e, v5p, v6e and tpu7x (there, interconnect is given a chip, over all links; a torus of
two dimensions has four of them, of three six). H100, H200: NVIDIA's data sheets of the SXM modules, without sparsity;
the network of their nodes is that of DGX and HGX reference designs, one 400 Gbit/s port a GPU. The memory that programs
get is not published: it is what libtpu 0.0.52's compiler answers to a program that is too large, and VMEM what 0.0.42's
and 0.0.50's answer to a kernel; a GPU's memory is the data sheet's.
"""

import dataclasses

MiB, GiB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation: a chip, or half of one on TPU7x and v4.

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
    memory: float  # HBM bytes that a program may use
    vmem: float  # VMEM bytes that a kernel gets where it does not ask for more
    dimensions: int  # of the torus that chips of a slice form
    link: float  # bytes/s of one of a chip's links in one direction; a chip has two links a dimension

    def memory_seconds(self, num_bytes: float) -> float:
        """What moving bytes takes at full bandwidth."""
        return num_bytes / self.bandwidth

    def seconds(self, cycles: float, num_bytes: float) -> float:
        """Predicted time of a kernel: the compiler's cycles, or the memory's time where that is longer.

        The compiler's model reads faster than HBM can and overlaps reads with writes for free, so its cycles alone
        promise too much of a kernel that is bound by memory.
        """
        return max(cycles / self.clock, self.memory_seconds(num_bytes))


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU in a node of ``node`` of them. Rates are the published peaks, links in one direction."""

    name: str
    device_kind: str
    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # HBM bytes/s
    memory: float  # bytes
    node: int  # GPUs that NVLink joins
    nvlink: float  # bytes/s of one GPU
    network: float  # bytes/s of one GPU to other nodes


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4:1x1x1", "TPU v4", 1.05e9, 275e12 / 2, 1.228e12 / 2, 1, 15.25 * GiB, 16 * MiB, 3, 50e9),
        Chip("v5e", "v5e:1x1", "TPU v5 lite", 1.5e9, 197e12, 0.819e12, 1, 15.75 * GiB, 16 * MiB, 2, 50e9),
        Chip("v5p", "v5p:1x1x1", "TPU v5", 1.75e9, 459e12, 2.765e12, 2, 95.74 * GiB, 16 * MiB, 3, 100e9),
        Chip("v6e", "v6e:1x1", "TPU v6 lite", 1.75e9, 918e12, 1.64e12, 1, 31.25 * GiB, 32 * MiB, 2, 100e9),
        Chip("tpu7x", "tpu7x:1x1x1", "TPU7x", 2.2e9, 2307e12 / 2, 7.38e12 / 2, 1, 94.75 * GiB, 32 * MiB, 3, 100e9),
    )
}
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "NVIDIA H100 80GB HBM3", 989e12, 3.35e12, 80e9, 8, 450e9, 50e9),
        Gpu("h200", "NVIDIA H200", 989e12, 4.8e12, 141e9, 8, 450e9, 50e9),
    )
}
