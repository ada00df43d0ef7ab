"""Checkpoints to and from PyTorch: one table of names, read and written by streaming."""
