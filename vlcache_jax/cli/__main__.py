"""`python -m vlcache_jax.cli`."""

from vlcache_jax.cli import main

main()
