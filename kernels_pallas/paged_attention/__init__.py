"""Ragged paged attention. Empty on purpose: `work` and `tiling` must be importable without jax."""
