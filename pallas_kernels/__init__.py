"""Attention operations on plain arrays: one folder per operation, one file per backend.

This package knows arrays, not models, and imports nothing but jax. Each operation is called
through its public function, which checks shapes and picks the backend; `reference.py` beside it
is the dense float32 version that the tests compare every backend with.
"""
