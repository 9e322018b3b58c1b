"""The one command for a machine with a GPU: `python -m benchmarks.gpu_suite`.

In the order of their worth: what the GPU can do, whether every kernel is right, how fast each one
is, and which block sizes are best. Each stage is a function that gives a dict, saved as a file of
its own as soon as it ends, so that a run that is cut off is gone on with by the same command. The
stages run in a process of their own: a crash or a hang costs one of them.

`--dry-run` runs all of it on a CPU in tiny sizes: a typo is found where no GPU is.
"""
