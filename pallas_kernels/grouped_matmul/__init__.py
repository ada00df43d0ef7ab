"""Product of rows, sorted by group, with their group's matrix."""

from pallas_kernels.grouped_matmul.op import IMPLEMENTATIONS, grouped_matmul

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]
