"""Names and layouts of the weights: Hugging Face's tensors and this library's parameters.

One table says for each parameter which tensors it holds and where they lie in it. A tensor is
copied into its view of the parameter, or out of it: the directions are each other's exact inverse.

A parameter's name is its path in the tree of `abstract_params`, joined by dots: `layers.3.qkv`. A
tensor's name is spelled as on the Hugging Face hub; the other spellings are translated first.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import short
from vlcache_jax.fields import one_of, shown
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.models.llava.model import abstract_params

Shape = tuple[int, ...]

DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}
"""The number types that parameters may have."""

DTYPE = one_of(*DTYPES)._replace(error=ValueError)
"""A field of a file that names one of them."""

FLOAT_KINDS: dict[str, np.dtype] = dict(zip(("F32", "BF16", "F16"), DTYPES.values(), strict=True))
"""The same by the name that safetensors gives them."""

LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"

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


Parts: TypeAlias = list[tuple[np.ndarray, Shape]]
"""The tensors inside a parameter: of each its view, and its own shape, which merges axes of that
(-1 for what is left)."""


def _same(x: np.ndarray) -> Parts:
    return [(x, x.shape)]


def _kernel(x: np.ndarray) -> Parts:
    """[in ..., out]: [out, in]."""
    return [(np.moveaxis(x, -1, 0), (x.shape[-1], -1))]


def _stacked(x: np.ndarray) -> Parts:
    """[in, n, out ...]: n times [out, in]."""
    return [(np.moveaxis(x[:, i], 0, -1), (-1, x.shape[0])) for i in range(x.shape[1])]


def _stacked_bias(x: np.ndarray) -> Parts:
    """[n, out ...]: n times [out]."""
    return [(x[i], (-1,)) for i in range(x.shape[0])]


def _grouped_qkv(x: np.ndarray) -> Parts:
    """[D, K, G + 2, H]: q [K * G * H, D] (query head n = k * G + g), k and v [K * H, D]."""
    heads = np.moveaxis(x, 0, -1)  # [K, G + 2, H, D]
    return [(heads[:, rows], (-1, x.shape[0])) for rows in (slice(-2), -2, -1)]


def _patches(x: np.ndarray) -> Parts:
    """[3, p, p, D]: the kernel of a convolution, [D, 3, p, p]."""
    return _same(np.moveaxis(x, -1, 0))


_TOWER = "vision_tower.vision_model."
_TOWER_LAYER = _TOWER + "encoder.layers.{}."
_LAYER = "language_model.model.layers.{}."


def _qkv_names(layer: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{layer}self_attn.{name}_proj.{kind}" for name in "qkv")


# Parameters, the layout of each and its tensors; `{}` stands for the layer.
_TABLE: dict[str, tuple[Callable[[np.ndarray], Parts], *tuple[str, ...]]] = {
    "vision.patch_embedding": (_patches, _TOWER + "embeddings.patch_embedding.weight"),
    "vision.class_embedding": (_same, _TOWER + "embeddings.class_embedding"),
    "vision.position_embedding": (_same, _TOWER + "embeddings.position_embedding.weight"),
    "vision.layers.{}.qkv": (_stacked, *_qkv_names(_TOWER_LAYER, "weight")),
    "vision.layers.{}.qkv_bias": (_stacked_bias, *_qkv_names(_TOWER_LAYER, "bias")),
    "vision.layers.{}.out": (_kernel, _TOWER_LAYER + "self_attn.out_proj.weight"),
    "vision.layers.{}.out_bias": (_same, _TOWER_LAYER + "self_attn.out_proj.bias"),
    "projector.newline": (_same, "image_newline"),
    "embed.embedding": (_same, EMBEDDING),
    "layers.{}.qkv": (_grouped_qkv, *_qkv_names(_LAYER, "weight")),
    "layers.{}.out": (_kernel, _LAYER + "self_attn.o_proj.weight"),
    "layers.{}.gate_up": (_stacked, _LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    "layers.{}.down": (_kernel, _LAYER + "mlp.down_proj.weight"),
}
# Norms (scale and bias) and linear layers (kernel and bias).
_MODULES = {
    "vision.pre_norm": _TOWER + "pre_layrnorm",
    "vision.post_norm": _TOWER + "post_layernorm",
    "vision.layers.{}.attention_norm": _TOWER_LAYER + "layer_norm1",
    "vision.layers.{}.mlp_norm": _TOWER_LAYER + "layer_norm2",
    "vision.layers.{}.up": _TOWER_LAYER + "mlp.fc1",
    "vision.layers.{}.down": _TOWER_LAYER + "mlp.fc2",
    "projector.linear_1": "multi_modal_projector.linear_1",
    "projector.linear_2": "multi_modal_projector.linear_2",
    "layers.{}.attention_norm": _LAYER + "input_layernorm",
    "layers.{}.mlp_norm": _LAYER + "post_attention_layernorm",
    "head.norm": "language_model.model.norm",
    "head": "language_model.lm_head",
}
for _ours, _theirs in _MODULES.items():
    _TABLE[f"{_ours}.scale"] = _same, f"{_theirs}.weight"
    _TABLE[f"{_ours}.kernel"] = _kernel, f"{_theirs}.weight"
    _TABLE[f"{_ours}.bias"] = _same, f"{_theirs}.bias"

# Applied in this order; each leaves the hub's spelling as it is.
_SPELLINGS = (
    (r"^model\.(?=(?:language_model|vision_tower|multi_modal_projector)\.|image_newline$)", ""),
    (r"^vision_tower\.(?!vision_model\.)", _TOWER),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
)

# Buffers that older versions of transformers saved: constants, not weights.
_IGNORED = re.compile(r".*\.(?:rotary_emb\.inv_freq|embeddings\.position_ids)")


def hub_name(name: str) -> str:
    """A tensor's name in the hub's spelling, from any spelling that transformers has written.

    Those are the hub's own (`language_model.model.layers.0...`, `vision_tower.vision_model...`),
    the same behind `model.`, and that of transformers 5 (`model.language_model.layers.0...`,
    `lm_head.weight`, no `vision_model.`), in any mixture.
    """
    for pattern, spelling in _SPELLINGS:
        name = re.sub(pattern, spelling, name)
    return name


def parameter_shapes(config: LlavaConfig) -> dict[str, Shape]:
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


def _parts(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray, Shape]]:
    """The tensors inside a parameter: hub name of each, its view and its own shape."""
    layer = r"(?<=layers\.)\d+"
    layout, *tensors = _TABLE[re.sub(layer, "{}", name)]
    names = [tensor.format(*re.findall(layer, name)) for tensor in tensors]
    return [(tensor, *part) for tensor, part in zip(names, layout(array), strict=True)]


def tensors_of(name: str, shape: Shape) -> dict[str, Shape]:
    """Hub names and shapes of the tensors that make up a parameter."""
    nothing = np.broadcast_to(np.uint8(0), shape)  # a shape without memory
    return {tensor: view.reshape(own).shape for tensor, view, own in _parts(name, nothing)}


def join(name: str, shape: Shape, dtype: np.dtype, tensors: Iterable[np.ndarray]) -> np.ndarray:
    """A parameter from its tensors, in the order of `tensors_of`.

    Only one tensor is held at a time if `tensors` is a generator.

    Raises:
        ValueError: a finite value is beyond the range of float16.
    """
    array = np.empty(shape, dtype)
    for (_, view, _), tensor in zip(_parts(name, array), tensors, strict=True):
        _copy(cast(tensor, dtype, name).reshape(view.shape), view)
    return array


def split(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a parameter, contiguous, with their hub names: the inverse of `join`."""
    for tensor, view, own in _parts(name, array):
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
    config: LlavaConfig, stored: Sequence[tuple[str, str, Shape]]
) -> dict[str, tuple[str, ...]]:
    """Find the tensors of every parameter in a checkpoint, and check that nothing else is there.

    Args:
        config: the model.
        stored: name, type (as safetensors spells it) and shape of each tensor of the checkpoint.

    Returns:
        For each parameter the checkpoint's own names of its tensors, in the order of `join`.

    Raises:
        ValueError: tensors are missing, unknown, doubled, misshapen or not of a float type.
    """
    tensors = {name: tensors_of(name, whole) for name, whole in parameter_shapes(config).items()}
    expected = {key: list(shape) for shapes in tensors.values() for key, shape in shapes.items()}
    given: dict[str, str] = {}
    found: dict[str, list[int]] = {}
    problems: dict[str, list[str]] = {"given twice": [], "wrong type": []}
    for name, kind, shape in stored:
        tensor = hub_name(name)
        if _IGNORED.fullmatch(tensor) or (config.text.tie_embeddings and tensor == LM_HEAD):
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
