"""How fast a model runs beside what the device allows: `python -m benchmarks.speed`.

The programs are those of `vlcache_jax.generate.Generate`; the weights, the prompts and the cached
rows are random, which changes no time. Every way to keep a cache is timed in turns with the full
cache, in one run.

    cases     models, sizes, prompts, the division of a budget over the layers
    limit     what the device can do, measured in the same run, and a stage's floor on it
    decoding  a decode step, from a cache of random rows: no prefill is needed
    prompts   prefill, what a method adds to it, and a whole answer as one program
    run       cases one after the other, and the stages of each
    presets   the paper's five rows, and the bar of a CPU
    profile   where the time goes, by the stages' named scopes
"""
