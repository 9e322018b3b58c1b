"""One program on many devices: a mesh, the rules by which arrays are split, and what crosses it.

mesh.py          `--mesh model=4,data=2` → devices, and functions that run on all of them
rules.py         the one table: which axis of which array is split
collectives.py   what a device asks of the others, for models and cache methods
weights.py       parameters as each device holds them
"""
