"""Compiling for chips that are not there, and reading what their compiler says of a kernel."""

from pallas_kernels.aot.chips import CHIPS, Chip
from pallas_kernels.aot.compile import compile_for_chip, compiler_version, missing_compiler, on_chip
from pallas_kernels.aot.profile import ProfileError, static_cycles

__all__ = [
    "CHIPS",
    "Chip",
    "ProfileError",
    "compile_for_chip",
    "compiler_version",
    "missing_compiler",
    "on_chip",
    "static_cycles",
]
