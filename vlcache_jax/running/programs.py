"""Compiled programs: those of this process, and where they are kept from one run to the next."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax

from vlcache_jax.distributed.mesh import DeviceMesh
from vlcache_jax.files import cache_folder

PROGRAMS = 128
"""Programs that are kept at a time, by default."""


def keep_programs() -> None:
    """Keep compiled programs in the user's cache folder.

    A folder that JAX was told of already (JAX_COMPILATION_CACHE_DIR) stays.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Programs:
    """Functions compiled for the shapes of their arguments; the one used longest ago goes first.

    Args:
        most: programs that are kept.
        mesh: devices that run them together, each on its part of the arrays; None for one device.

    Attributes:
        mesh: as given.
        compile_s: seconds that compiling has taken so far.
    """

    def __init__(self, most: int = PROGRAMS, mesh: DeviceMesh | None = None):
        self._most, self.mesh = most, mesh
        self.compile_s = 0.0
        self._compiled: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock, self._locks = threading.Lock(), dict[Hashable, threading.Lock]()

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._compiled)

    def ready(
        self,
        name: Hashable,
        function: Callable[..., Any],
        *args: Any,
        donate: tuple[int, ...] = (),
    ) -> tuple[Callable[..., Any], float]:
        """The program for arguments like these, and the seconds that compiling it took just now.

        Calling it runs it and waits for the result.

        Args:
            name: what tells the function from others; the same name is the same program.
            function: what is compiled.
            args: its arguments, pytrees of arrays.
            donate: numbers of those that are given up.
        """
        compiled, seconds = self._compile(name, function, args, donate)
        program, shardings = compiled
        mesh = self.mesh
        if mesh is None:
            return lambda *args: jax.block_until_ready(program(*args)), seconds
        return lambda *args: jax.block_until_ready(program(*mesh.place(args, shardings))), seconds

    def shapes(
        self,
        name: Hashable,
        function: Callable[..., Any],
        *args: Any,
        donate: tuple[int, ...] = (),
    ) -> Any:
        """What the program would give, as shapes: it is made ready, and not run.

        Args:
            name: as of `ready`.
            function: as of `ready`.
            args: as of `ready`; shapes will do.
            donate: as of `ready`.
        """
        (compiled, _), _ = self._compile(name, function, args, donate)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), compiled.out_info
        )

    def zeros(self, make: Callable[[], Any]) -> Any:
        """What a function makes, all of it zeros, where the programs' arrays lie."""
        return make() if self.mesh is None else self.mesh.zeros(make)

    def _compile(
        self, name: Hashable, function: Callable[..., Any], args: Any, donate: tuple[int, ...]
    ) -> tuple[Any, float]:
        leaves, tree = jax.tree.flatten(args)
        key = name, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        began, seconds = time.perf_counter(), 0.0
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # one thread compiles it; another one may compile something else meanwhile
            compiled = self._compiled.get(key)
            if compiled is None:
                shardings = None
                if self.mesh is None:
                    jitted = jax.jit(function, donate_argnums=donate)
                else:
                    jitted, shardings = self.mesh.program(function, args, donate)
                compiled = jitted.lower(*args).compile(), shardings
                seconds = time.perf_counter() - began
            with self._lock:
                self._locks.pop(key, None)
                self.compile_s += seconds
                self._compiled[key] = compiled
                self._compiled.move_to_end(key)
                if len(self._compiled) > self._most:
                    self._compiled.popitem(last=False)
        return compiled, seconds
