"""Experiments on cache methods that the literature leaves open: `python -m` this package.

Each is an `Experiment` of common.py: which methods answer the items, and what its part of
docs/accuracy.md says. Those that are no more than that are in compared.py, and sections.py has the
list.
"""
