"""mmx: MiniMax-01 in JAX. ``mmx.load(directory)`` gives a trained model."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the configuration alone must not start JAX.
    if name == "load":
        from mmx.pretrained import load

        return load
    raise AttributeError(f"module 'mmx' has no attribute {name!r}")
