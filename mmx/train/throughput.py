"""Model FLOPs utilisation: FLOPs counted from the configuration, over the device's published peak."""

import numpy as np

from mmx.config import ModelConfig, training_flops
from pallas_kernels.platform import one_spelling

# Dense bf16 FLOP/s of one JAX device, by device kind. TPU: cloud.google.com/tpu/docs system architecture pages (a v7x
# chip is two devices); NVIDIA: data sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def document_lengths(segment_ids_BS: np.ndarray) -> list[int]:
    """Lengths of the documents' parts in packed rows, padding (id 0) left out."""
    lengths = []
    for row in segment_ids_BS:
        ids, counts = np.unique(row, return_counts=True)
        lengths += counts[ids > 0].tolist()
    return lengths


def utilisation(model: ModelConfig, lengths: list[int], seconds: float, device_kind: str, devices: int) -> float | None:
    """Share of the devices' peak that a step over the given documents reached; None if the peak is not known."""
    peak = PEAK_FLOPS.get(one_spelling(device_kind))
    return None if peak is None else training_flops(model, lengths) / (seconds * devices * peak)
