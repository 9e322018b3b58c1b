"""Many requests at once on one model: slots over one pool; `http` is the server above it."""

from vlcache_jax.serving.engine import METHODS, Engine
from vlcache_jax.serving.slots import Load, SlotGroup
from vlcache_jax.serving.ticket import QueueFull, Ticket

__all__ = ["METHODS", "Engine", "Load", "QueueFull", "SlotGroup", "Ticket"]
