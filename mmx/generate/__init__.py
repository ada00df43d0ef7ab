"""Sampling text: prefill, decode with a cache, choice of the next token."""

from mmx.generate.engine import generate

__all__ = ["generate"]
