"""Experiments on cache methods that the literature leaves open: `python -m` this package.

Each is a module with the same two functions: `run` answers items with a `Bench` and says what came
out, as plain values for a JSON file; `section` makes of such a file its part of docs/accuracy.md.
Some have a third one, `draw`, which makes a plot of it.
"""
