"""Training: objective, step, loop, checkpoints, metrics."""
