"""Many requests at once on one model: slots over one pool, without HTTP."""

from vlcache_jax.serving.engine import Engine, Load
from vlcache_jax.serving.slots import SlotGroup
from vlcache_jax.serving.ticket import QueueFull, Ticket

__all__ = ["Engine", "Load", "QueueFull", "SlotGroup", "Ticket"]
