"""Comparisons of ways to split the work over devices, on virtual CPU devices; ``python -m launch.bench --parallel``."""
