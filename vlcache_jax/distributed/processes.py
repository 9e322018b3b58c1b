"""Several processes, on one host or on many, that run one program together: JAX's own runtime.

    host 0   vlcache generate ... --mesh model=8 --coordinator a:9000 --processes 2 --process-id 0
    host 1   vlcache generate ... --mesh model=8 --coordinator a:9000 --processes 2 --process-id 1

All of them are given the same command, and the first one speaks.
"""

import re

import jax

from vlcache_jax.errors import short

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost, and the others end."""

JOINING = 120
"""Seconds in which all processes have to come together."""


def check(coordinator: str, process_id: int, processes: int) -> None:
    """Refuse what `join` cannot take.

    Raises:
        ValueError: it is out of range.
    """
    if not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator):
        raise ValueError(f"coordinator {short(coordinator)!r} is written HOST:PORT")
    if not 0 <= process_id < processes:
        raise ValueError(f"{process_id=} must be from 0 to processes - 1, of {processes=}")


def join(coordinator: str, process_id: int, processes: int) -> None:
    """Become one of several processes, before anything else is asked of JAX.

    Args:
        coordinator: HOST:PORT at which the first process is found.
        process_id: the number of this one, from 0 on.
        processes: how many there are.

    Raises:
        ValueError: one of them is out of range.
    """
    check(coordinator, process_id, processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        initialization_timeout=JOINING,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )
