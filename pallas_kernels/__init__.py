"""One folder per operation; each folder's ``op.py`` chooses the implementation. Imports jax and nothing of ours."""
