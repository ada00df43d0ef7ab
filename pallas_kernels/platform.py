"""The platform that code is being traced for: "cpu", "gpu" or "tpu".

Implementations and block sizes depend on where the program will run, which need not be this host: a step is
compiled for a TPU topology on a laptop. The mesh in scope says it; without one, JAX's default device does.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator

import jax

# Kinds of device that JAX spells in two ways.
_SAME_KIND = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
_NAMES = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("target_platform", default=None)


def target_platform() -> str:
    """The platform of ``compile_for``, else of the mesh in scope, else of the default device."""
    forced = _forced.get()
    if forced is not None:
        return forced
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return _NAMES[mesh.abstract_device.platform]
    device = jax.config.jax_default_device
    if device is not None:
        return _NAMES[device if isinstance(device, str) else device.platform]
    return _NAMES[jax.default_backend()]


def target_device_kind() -> str | None:
    """The kind of device that code is traced for, in one spelling ("TPU v5 lite"), where mesh or host tells."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return one_spelling(mesh.abstract_device.device_kind)
    if target_platform() != _NAMES[jax.default_backend()]:
        return None
    return one_spelling(jax.devices()[0].device_kind)


def one_spelling(device_kind: str) -> str:
    """Of a kind of device for which JAX has several, the one that tables are keyed by."""
    return _SAME_KIND.get(device_kind, device_kind)


def unsplit() -> bool:
    """Whether arrays here are one device's own: no mesh of several devices, or a ``shard_map`` over all of its axes.

    Kernels need it: the compiler cannot split them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def no_tpu_kernel_here() -> str | None:
    """Why no TPU kernel can run at this place of the program, or None."""
    if target_platform() != "tpu":
        return f"the code is traced for {target_platform()}; 'tpu_interpret' simulates the kernel on a CPU"
    if not unsplit():
        return "the arrays are split over a mesh: call it in a shard_map over all of the mesh's axes"
    return None


@functools.cache
def say_once(message: str) -> None:
    """Logs a warning the first time that a process has it to give: which form an operation fell back to, and why."""
    logging.getLogger("pallas_kernels").warning(message)


@contextlib.contextmanager
def compile_for(platform: str) -> Iterator[None]:
    """Traces the code inside for ``platform``, for lowering where neither mesh nor default device tells."""
    if platform not in _NAMES:
        raise ValueError(f"platform {platform!r} is not one of {', '.join(sorted(_NAMES))}")
    token = _forced.set(_NAMES[platform])
    try:
        yield
    finally:
        _forced.reset(token)
