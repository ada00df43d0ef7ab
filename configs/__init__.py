"""Recipes: each file has ``get_config()`` and says how to run it."""
