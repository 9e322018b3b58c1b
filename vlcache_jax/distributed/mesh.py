"""A mesh of devices: `data` splits the requests, `model` the heads, the MLP and the vocabulary.

    --mesh model=4,data=2        device  0 1 2 3   first half of the requests
                                         4 5 6 7   second half

`model` is one axis for users and two within: of m devices gcd(K, m) share the kv heads, and where m
has more, the others share the query heads of each, with copies of its keys and values.

    K = 2, N = 8, model=4        device  0         1         2         3
                                 heads   0: q0 q1  0: q2 q3  1: q4 q5  1: q6 q7
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.tree_util import DictKey

from vlcache_jax.distributed.collectives import DATA, GROUP, HEADS, MODEL
from vlcache_jax.distributed.rules import axes_of, partition
from vlcache_jax.errors import short
from vlcache_jax.models.config import TextConfig

AXES = ("data", "model")
"""Those that users name."""

MeshLike = str | Mapping[str, int] | Mesh | None
"""What a mesh is given as: "model=4,data=2", the same as a dict, or a mesh of JAX's own."""

_FORM = "a mesh is written model=4,data=2, each axis a whole number from 1 on"

WRITES = ("build_into", "admit")
"""Functions that put some sequences into the rows of others: their first argument and result are
the whole batch's, and split; every device has the rest whole."""

RESULTS = {"see": "tables", "fold_layers": "params"}
"""Names of results that have none, by the function; others have their sequences first."""


def parse(mesh: MeshLike) -> dict[str, int]:
    """The sizes of both axes.

    Raises:
        ValueError: there is no such axis, one is given twice, or a size is no whole number.
    """
    if isinstance(mesh, Mesh):
        pairs = list(mesh.shape.items())
    elif isinstance(mesh, str):
        parts = (part.partition("=") for part in mesh.split(","))
        pairs = [(name.strip(), number.strip()) for name, _, number in parts]
    elif isinstance(mesh, Mapping):
        pairs = list(mesh.items())
    else:
        raise ValueError(f"mesh={short(repr(mesh))}: {_FORM}")
    sizes: dict[str, int] = {}
    for name, given in pairs:
        size: Any = given
        if isinstance(given, str):
            size = int(given) if re.fullmatch("[0-9]{1,9}", given) else 0
        elif isinstance(given, bool) or not isinstance(given, int | np.integer):
            size = 0
        if name not in AXES or name in sizes or size < 1:
            raise ValueError(f"mesh {short(f'{name}={given}')!r}: {_FORM}")
        sizes[name] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


class DeviceMesh:
    """Devices that run one program.

    Args:
        sizes: of the axes `data` and `model`.
        text: the decoder that is split.
        devices: as many as that, those of a `model` axis side by side; the first ones by default.

    Attributes:
        mesh: JAX's, with the axes data, heads and group.

    Raises:
        ValueError: there are not so many devices, or the query heads cannot be shared so.
    """

    def __init__(self, sizes: Mapping[str, int], text: TextConfig, devices: Any = None):
        data, model = (sizes[axis] for axis in AXES)
        there = jax.devices() if devices is None else list(np.asarray(devices).flat)
        if data * model > len(there):
            raise ValueError(
                f"mesh data={data},model={model} takes {data * model} devices, and there "
                f"{'is' if len(there) == 1 else 'are'} {len(there)}: make the mesh smaller"
            )
        used = there[: data * model]
        if len({device.process_index for device in used}) < jax.process_count():
            raise ValueError(
                f"mesh data={data},model={model} leaves out devices of some of the "
                f"{jax.process_count()} processes: it must take all {len(there)}"
            )
        heads = math.gcd(text.num_kv_heads, model)
        check_fits(text, model, len(there))
        shape = data, heads, model // heads
        self._ready: dict[Any, Any] = {}
        names = DATA + HEADS + GROUP
        kinds = (AxisType.Auto,) * len(names)
        self.mesh = Mesh(np.asarray(used).reshape(shape), names, axis_types=kinds)

    @classmethod
    def of(cls, mesh: MeshLike, text: TextConfig) -> "DeviceMesh | None":
        """A mesh for a decoder; None for a single device.

        Raises:
            ValueError: as `parse`, and as the class.
        """
        if mesh is None:
            return None
        sizes, devices = parse(mesh), None
        if isinstance(mesh, Mesh):
            order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
            devices = mesh.devices.transpose(order)
        found = cls(sizes, text, devices)
        return None if devices is None and found.mesh.size == 1 else found

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"model={self.model},data={self.data}"

    def size(self, axes: tuple[str, ...]) -> int:
        """How many parts these axes make."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def data(self) -> int:
        """Parts that the requests are split into."""
        return self.size(DATA)

    @property
    def model(self) -> int:
        """Parts that each layer is split into."""
        return self.size(MODEL)

    def check_slots(self, counts: Iterable[int]) -> None:
        """Refuse numbers of slots that the requests' devices do not divide.

        Raises:
            ValueError: one is no multiple of `data`.
            NotImplementedError: the devices are those of several hosts.
        """
        if jax.process_count() > 1:
            raise NotImplementedError("an engine on several hosts: serve on each of them by itself")
        for count in counts:
            if count % self.data:
                raise ValueError(f"{count} slots are no multiple of data={self.data}: give others")

    def sharding(self, path: Any, ndim: int, split_batch: bool = True) -> NamedSharding:
        """How an array is split over the devices, by its path in a tree; see `axes_of`."""
        return NamedSharding(self.mesh, partition(axes_of(path, ndim), split_batch=split_batch))

    def zeros(self, make: Callable[[], Any]) -> Any:
        """What a function makes, all of it zeros: each device makes its own part alone."""
        shapes = jax.eval_shape(make)

        def one(path: Any, leaf: Any) -> NamedSharding:
            axes = axes_of(path, leaf.ndim)
            batch = (leaf.shape[at] for at, axis in enumerate(axes) if axis == "batch")
            split = all(size % self.data == 0 for size in batch)
            return self.sharding(path, leaf.ndim, split)

        shardings = jax.tree_util.tree_map_with_path(one, shapes)

        def blank() -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return jax.jit(blank, out_shardings=shardings)()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function as `program` makes it; it is kept for arguments of the same tree."""
        key = function, jax.tree.structure(args)
        if key not in self._ready:
            self._ready[key] = self.program(function, args)
        program, shardings = self._ready[key]
        return program(*self.place(args, shardings))

    def program(
        self, function: Callable[..., Any], args: Any, donate: tuple[int, ...] = ()
    ) -> tuple[Callable[..., Any], Any]:
        """A function as one program of all devices, each running it on its part of the arrays.

        The sequences are split where `data` divides them; else every device runs all of them.

        Args:
            function: of arrays, named as `rules` knows them; pure.
            args: its arguments, or shapes of them.
            donate: numbers of those that are given up.

        Returns:
            What is to be compiled, and the shardings of the arguments.
        """
        name, named = _name(function), dict(zip(_names(function), args, strict=False))
        first = split = self._splits(named)
        if name in WRITES:
            first, split = self._splits(dict([next(iter(named.items()))])), False
        placed = tuple(
            self._shardings(arg, at, split if number else first)
            for number, (at, arg) in enumerate(named.items())
        )
        specs = jax.tree.map(lambda sharding: sharding.spec, placed)
        run = partial(jax.shard_map, function, mesh=self.mesh, in_specs=specs, check_vma=False)
        # What comes out is known by its names: run once without arrays, to see them.
        made, called = jax.eval_shape(run(out_specs=partition(())), *args), RESULTS.get(name, "")
        if type(made) is tuple:
            out = tuple(
                self._shardings(part, called, split if number else first)
                for number, part in enumerate(made)
            )
        else:
            out = self._shardings(made, called, first)
        results = jax.tree.map(lambda sharding: sharding.spec, out)
        jitted = jax.jit(
            run(out_specs=results), in_shardings=placed, out_shardings=out, donate_argnums=donate
        )
        return jitted, placed

    def _shardings(self, tree: Any, name: str, split: bool) -> Any:
        """Those of all arrays of an argument or a result of this name."""

        def one(path: Any, leaf: Any) -> NamedSharding:
            return self.sharding((DictKey(name), *path), np.ndim(leaf), split)

        return jax.tree_util.tree_map_with_path(one, tree)

    def _splits(self, named: dict[str, Any]) -> bool:
        """Whether the sequences of these arguments are split."""
        return all(
            leaf.shape[at] % self.data == 0
            for path, leaf in jax.tree_util.tree_leaves_with_path(named)
            for at, axis in enumerate(axes_of(path, np.ndim(leaf)))
            if axis == "batch"
        )

    def place(self, args: Any, shardings: Any) -> Any:
        """Arguments on the devices; those that are there already stay as they are.

        Of several processes each is given all of what comes from the host.
        """

        def one(leaf: Any, sharding: NamedSharding) -> Any:
            if isinstance(leaf, jax.Array):
                if leaf.sharding == sharding:
                    return leaf
                if jax.process_count() == 1 or not leaf.is_fully_addressable:
                    return jax.device_put(leaf, sharding)
            elif jax.process_count() == 1:
                return jax.device_put(leaf, sharding)
            array = np.asarray(leaf)
            return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        return jax.tree.map(one, args, shardings)


def fetched(tree: Any) -> Any:
    """Arrays on the host; of several processes, each has all of them."""

    def one(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


def fits(text: TextConfig, model: int) -> bool:
    """Whether so many devices can share a decoder's heads."""
    return text.group_size % (model // math.gcd(text.num_kv_heads, model)) == 0


def check_fits(text: TextConfig, model: int, devices: int) -> None:
    """Refuse devices that cannot share a decoder's heads.

    Raises:
        ValueError: they cannot; which numbers, of so many devices, can.
    """
    if not fits(text, model):
        possible = [str(n) for n in range(1, devices + 1) if fits(text, n)]
        raise ValueError(
            f"model={model} cannot divide {text.num_heads} query heads with {text.num_kv_heads} kv "
            f"heads: of {devices} devices model={', '.join(possible)} fits"
        )


def _name(function: Any) -> str:
    """The name of a function, or of that which a partial one calls."""
    return getattr(getattr(function, "func", function), "__name__", "")


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)
