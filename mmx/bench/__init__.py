"""Measurements, side by side with other implementations; ``python -m launch.bench`` runs them."""
