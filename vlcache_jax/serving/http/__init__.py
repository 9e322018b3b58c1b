"""An OpenAI-compatible server above the engine; needs the extra "serve"."""

from vlcache_jax.serving.http.app import create_app
from vlcache_jax.serving.http.logs import JsonLines
from vlcache_jax.serving.http.pictures import Pictures
from vlcache_jax.serving.http.service import ServerSettings

__all__ = ["JsonLines", "Pictures", "ServerSettings", "create_app"]
