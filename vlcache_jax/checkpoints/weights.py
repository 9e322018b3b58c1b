"""Weights: Hugging Face's tensors to this library's parameters, and back.

A tensor is copied into its view of the parameter, or out of it, as the family's table has it
(`models.names`): the directions are each other's exact inverse.

A parameter's name is its path in the tree of `abstract_params`, joined by dots: `layers.3.qkv`. A
tensor's name is spelled as the family's table has it; other spellings are translated first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import short
from vlcache_jax.fields import one_of, shown
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.families import abstract_params
from vlcache_jax.models.names import IGNORED, Names, Shape

DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}
"""The number types that parameters may have."""

DTYPE = one_of(*DTYPES)._replace(error=ValueError)
"""A field of a file that names one of them."""

FLOAT_KINDS: dict[str, np.dtype] = dict(zip(("F32", "BF16", "F16"), DTYPES.values(), strict=True))
"""The same by the name that safetensors gives them."""

_REPORT = 380  # characters of a report; a wholly foreign checkpoint has hundreds of problems
_BLOCK_BYTES = 1 << 20  # of a transposed copy: what stays in a core's cache


def parse_dtype(dtype: Any) -> np.dtype:
    """A number type by name or by object.

    Raises:
        ValueError: it is not float32, bfloat16 or float16.
    """
    try:
        name = jnp.dtype(dtype).name
    except (TypeError, ValueError, SyntaxError):  # of numpy's own little language of types
        name = dtype
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype={shown(name)} is not supported: expected {', '.join(DTYPES)}")
    return DTYPES[name]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every parameter, in the order of the pieces of a checkpoint."""
    order = ("vision", "projector", "embed", "layers", "head")
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    leaves.sort(key=lambda leaf: order.index(leaf[0][0].key))
    return {parameter_name(path): leaf.shape for path, leaf in leaves}


def parameter_name(path: Iterable[Any]) -> str:
    """The dotted name of a leaf of the parameter tree, from its path of dict keys."""
    return ".".join(str(entry.key) for entry in path)


def piece_of(name: str) -> tuple[str, str]:
    """The piece of a checkpoint that holds a parameter, and the parameter's name inside it.

    The pieces are vision, projector, embed, layer_000..., head.
    """
    piece, leaf = name.split(".", 1)
    if piece == "layers":
        layer, leaf = leaf.split(".", 1)
        piece = f"layer_{int(layer):03d}"
    return piece, leaf


def tensors_of(names: Names, name: str, shape: Shape) -> dict[str, Shape]:
    """Names and shapes of the tensors that make up a parameter, as a family calls them."""
    nothing = np.broadcast_to(np.uint8(0), shape)  # a shape without memory
    return {tensor: view.reshape(own).shape for tensor, view, own in names.parts_of(name, nothing)}


def join(
    names: Names, name: str, shape: Shape, dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> np.ndarray:
    """A parameter from its tensors, in the order of `tensors_of`.

    Only one tensor is held at a time if `tensors` is a generator.

    Raises:
        ValueError: a finite value is beyond the range of float16.
    """
    array = np.empty(shape, dtype)
    for (_, view, _), tensor in zip(names.parts_of(name, array), tensors, strict=True):
        _copy(cast(tensor, dtype, name).reshape(view.shape), view)
    return array


def join_part(
    names: Names,
    name: str,
    shape: Shape,
    dtype: np.dtype,
    tensors: Iterable[Any],
    index: Sequence[slice],
) -> np.ndarray:
    """`join` of a part of a parameter, of which no more is read than the part's rows and columns.

    Args:
        names: as of `join`.
        name: the parameter's.
        shape: of the whole parameter.
        dtype: the number type.
        tensors: what is read by slices, as `safetensors` gives it.
        index: the part: a slice for each axis, with a start and a stop.

    Raises:
        ValueError: as `join`.
    """
    starts = [each.start for each in index]
    made = np.empty([each.stop - each.start for each in index], dtype)
    # Along one axis of the parameter each: where in it a place of a tensor lies.
    places = [
        np.broadcast_to(np.arange(size).reshape(size, *[1] * (len(shape) - at - 1)), shape)
        for at, size in enumerate(shape)
    ]
    views = [names.parts_of(name, place) for place in places]
    for number, tensor in enumerate(tensors):
        own = [view[number][1] for view in views]  # [...] in the order of the tensor's axes
        source: list[slice] = [slice(0, size) for size in own[0].shape]
        target: list[Any] = [0] * len(shape)
        order: list[int] = []
        for at, view in enumerate(own):
            # The axis of the tensor that this axis of the parameter is; none where it has one row.
            along = next((axis for axis, step in enumerate(view.strides) if step), None)
            line = np.array([view.flat[0]]) if along is None else _line(view, along)
            inside = np.flatnonzero((line >= index[at].start) & (line < index[at].stop))
            if not len(inside):
                break
            first = int(line[inside[0]]) - starts[at]
            target[at] = first if along is None else slice(first, first + len(inside))
            if along is not None:
                source[along] = slice(int(inside[0]), int(inside[-1]) + 1)
                order.append(along)
        else:
            found = cast(_read(tensor, own[0].shape, source), dtype, name)
            single = [axis for axis in range(found.ndim) if axis not in order]
            found = found.transpose(*single, *order)
            made[tuple(target)] = found.reshape(found.shape[len(single) :])
    return made


def _line(view: np.ndarray, along: int) -> np.ndarray:
    """What stands along one axis."""
    return view[tuple(slice(None) if axis == along else 0 for axis in range(view.ndim))]


def _read(tensor: Any, shape: Shape, index: Sequence[slice]) -> np.ndarray:
    """A part of a tensor in its view [...], whose neighbouring axes may be one of the tensor's."""
    wanted, taken, rows = [], [], list(tensor.get_shape())
    left = list(zip(shape, index, strict=True))
    for size in rows:
        count, first, last, inner = 1, 0, 1, []
        while count < size or (left and left[0][0] == 1):
            width, each = left.pop(0)
            count *= width
            inner.append((width, each))
        # The rows between the first and the last that is wanted: of the outermost axis no others.
        for width, each in inner:
            first, last = first * width + each.start, (last - 1) * width + each.stop
        wanted.append(slice(first, last))
        taken.append(inner)
    found = tensor[tuple(wanted)]
    for at, inner in enumerate(taken):
        numbers = np.zeros(1, np.int64)
        for width, each in inner:
            numbers = (numbers[:, None] * width + np.arange(each.start, each.stop)).reshape(-1)
        if len(numbers) < found.shape[at]:
            found = np.take(found, numbers - wanted[at].start, axis=at)
    return found.reshape([each.stop - each.start for each in index])


def split(names: Names, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a parameter, contiguous, with their names: the inverse of `join`."""
    for tensor, view, own in names.parts_of(name, array):
        whole = view
        if not whole.flags.c_contiguous:
            whole = np.empty(view.shape, array.dtype)
            _copy(np.moveaxis(view, -1, 0), np.moveaxis(whole, -1, 0))
        yield tensor, whole.reshape(own)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in another number type; itself when it already has it.

    Raises:
        ValueError: a finite value is beyond the range of float16.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    if dtype == np.float16 and np.isinf(result).sum() > np.isinf(array).sum():
        raise ValueError(f"{name} has values beyond the range of float16: use bfloat16 or float32")
    return result


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy by blocks of the first axis, which must be the slowest in the source's memory.

    A transposed copy of 90 MB takes a fifth of the time that it takes in one piece.
    """
    step = max(1, _BLOCK_BYTES * len(source) // max(source.nbytes, 1))
    for start in range(0, len(source), step):
        target[start : start + step] = source[start : start + step]


def match(
    config: ModelConfig, names: Names, stored: Sequence[tuple[str, str, Shape]]
) -> dict[str, tuple[str, ...]]:
    """Find the tensors of every parameter in a checkpoint, and check that nothing else is there.

    Args:
        config: the model.
        names: what its tensors are called.
        stored: name, type (as safetensors spells it) and shape of each tensor of the checkpoint.

    Returns:
        For each parameter the checkpoint's own names of its tensors, in the order of `join`.

    Raises:
        ValueError: tensors are missing, unknown, doubled, misshapen or not of a float type.
    """
    shapes = parameter_shapes(config)
    tensors = {name: tensors_of(names, name, whole) for name, whole in shapes.items()}
    expected = {key: list(shape) for shapes in tensors.values() for key, shape in shapes.items()}
    given: dict[str, str] = {}
    found: dict[str, list[int]] = {}
    problems: dict[str, list[str]] = {"given twice": [], "wrong type": []}
    for name, kind, shape in stored:
        tensor = names.own(name)
        if IGNORED.fullmatch(tensor) or (config.text.tie_embeddings and tensor == names.head):
            continue
        if tensor in given:
            problems["given twice"].append(f"{given[tensor]} and {name}")
            continue
        given[tensor] = name
        found[tensor if tensor in expected else name] = list(shape)
        if tensor in expected and kind not in FLOAT_KINDS:
            problems["wrong type"].append(f"{name} is {kind}, expected {' or '.join(FLOAT_KINDS)}")
    refuse_differences("the checkpoint does not fit its config.json", expected, found, problems)
    return {name: tuple(given[key] for key in shapes) for name, shapes in tensors.items()}


def refuse_differences(
    what: str,
    expected: Mapping[str, object],
    found: Mapping[str, object],
    problems: Mapping[str, list[str]] | None = None,
) -> None:
    """Refuse a checkpoint whose arrays are not the expected ones.

    Args:
        what: how the error begins.
        expected: shape, or type and shape, of each array by its name.
        found: the same of the arrays that are there.
        problems: what else is wrong, by the kind of problem.

    Raises:
        ValueError: in one line how much is wrong and, as far as it has room, what.
    """
    problems = {
        "missing": [f"{name} {expected[name]}" for name in expected if name not in found],
        "unknown": [f"{name} {found[name]}" for name in found if name not in expected],
        "different": [
            f"{name} is {found[name]}, expected {spec}"
            for name, spec in expected.items()
            if found.get(name, spec) != spec
        ],
        **(problems or {}),
    }
    count = sum(map(len, problems.values()))
    if not count:
        return
    report, left = f"{what}: {count} problem{'s' if count > 1 else ''}", count
    # The first of each kind before the second of any.
    for rank in zip_longest(*([(kind, each) for each in problems[kind]] for kind in problems)):
        for kind, problem in filter(None, rank):
            text = f"; {kind}: {short(problem, 72)}"
            if len(report) + len(text) <= _REPORT:
                report, left = report + text, left - 1
    raise ValueError(report + (f"; and {left} more" if left else ""))
