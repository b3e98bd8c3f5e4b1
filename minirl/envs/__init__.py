"""Environments: preprocessing and many at once. Nothing in here imports torch."""
