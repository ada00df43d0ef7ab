"""Checks and measurements on one GPU, each section in a process of its own; ``python -m launch.bench --gpu``."""
