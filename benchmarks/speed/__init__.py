"""How fast a model runs beside what the device allows: `python -m benchmarks.speed`.

The programs are those of `vlcache_jax.Generate`; the weights, the prompts and the cached rows are
random, which changes no time. Every way to keep a cache is timed in turns with the full cache, in
one run.
"""
