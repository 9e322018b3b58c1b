"""Names and layouts of the weights: Hugging Face's tensors and this library's parameters.

One table says for each parameter which tensors it holds and where they lie in it. Both directions
read the same table: a tensor is copied into its view of the parameter, or out of it, so that each
direction is the exact inverse of the other.

A parameter's name is its path in the tree of `abstract_params`, joined by dots: `layers.3.qkv`. A
tensor's name is spelled as on the Hugging Face hub; the other spellings are translated first.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from vlcache_jax.config import LlavaConfig
from vlcache_jax.models.llava import abstract_params

Shape = tuple[int, ...]

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The number types that parameters may have."""

FLOAT_KINDS = {"F32": DTYPES["float32"], "BF16": DTYPES["bfloat16"], "F16": DTYPES["float16"]}
"""The same by the name that safetensors gives them."""

LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"

_REPORTED = 8  # problems of one kind listed in full; a wholly foreign checkpoint has hundreds
_BLOCK_BYTES = 1 << 20  # of a transposed copy: what stays in a core's cache


def parse_dtype(dtype: Any) -> np.dtype:
    """A number type by name or by object.

    Raises:
        ValueError: it is not float32, bfloat16 or float16.
    """
    try:
        name = np.dtype(DTYPES.get(dtype, dtype)).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not supported: expected {', '.join(DTYPES)}")
    return DTYPES[name]


class Part(NamedTuple):
    """One tensor inside a parameter.

    Attributes:
        view: the elements of the parameter that are the tensor's, in the tensor's order.
        shape: the tensor's own shape, which merges axes of the view; -1 for what is left.
    """

    view: np.ndarray
    shape: Shape


def _same(x: np.ndarray) -> list[Part]:
    return [Part(x, x.shape)]


def _transposed(x: np.ndarray) -> list[Part]:
    return [Part(x.T, x.T.shape)]


def _patches(x: np.ndarray) -> list[Part]:
    """[3, p, p, D]: the kernel of a convolution, [D, 3, p, p]."""
    kernel = x.transpose(3, 0, 1, 2)
    return [Part(kernel, kernel.shape)]


def _grouped_qkv(x: np.ndarray) -> list[Part]:
    """[D, K, G + 2, H]: q [K * G * H, D] (query head n = k * G + g), k and v [K * H, D]."""
    heads = x.transpose(1, 2, 3, 0)  # [K, G + 2, H, D]
    return [Part(heads[:, rows], (-1, x.shape[0])) for rows in (slice(-2), -2, -1)]


def _qkv(x: np.ndarray) -> list[Part]:
    """[D, 3, N, H]: q, k and v [N * H, D]."""
    return [Part(x[:, i].transpose(1, 2, 0), (-1, x.shape[0])) for i in range(3)]


def _qkv_bias(x: np.ndarray) -> list[Part]:
    """[3, N, H]: three times [N * H]."""
    return [Part(x[i], (-1,)) for i in range(3)]


def _out(x: np.ndarray) -> list[Part]:
    """[heads ..., H, D]: [D, heads * H]."""
    return [Part(np.moveaxis(x, -1, 0), (x.shape[-1], -1))]


def _gate_up(x: np.ndarray) -> list[Part]:
    """[D, 2, F]: gate and up [F, D]."""
    return [Part(x[:, i].T, (-1, x.shape[0])) for i in range(2)]


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        parameter: regular expression of the parameter's name; its group is the layer.
        tensors: names of the tensors that the parameter holds; `{}` stands for the layer.
        parts: the tensors' places in the parameter, in the same order.
    """

    parameter: str
    tensors: tuple[str, ...]
    parts: Callable[[np.ndarray], list[Part]]


_TOWER = "vision_tower.vision_model."
_TOWER_LAYER = _TOWER + "encoder.layers.{}."
_LAYER = "language_model.model.layers.{}."


def _qkv_names(layer: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{layer}self_attn.{name}_proj.{kind}" for name in "qkv")


TABLE: tuple[Rule, ...] = (
    Rule(r"vision\.patch_embedding", (_TOWER + "embeddings.patch_embedding.weight",), _patches),
    Rule(r"vision\.class_embedding", (_TOWER + "embeddings.class_embedding",), _same),
    Rule(r"vision\.position_embedding", (_TOWER + "embeddings.position_embedding.weight",), _same),
    Rule(r"vision\.pre_norm\.scale", (_TOWER + "pre_layrnorm.weight",), _same),
    Rule(r"vision\.pre_norm\.bias", (_TOWER + "pre_layrnorm.bias",), _same),
    Rule(r"vision\.post_norm\.scale", (_TOWER + "post_layernorm.weight",), _same),
    Rule(r"vision\.post_norm\.bias", (_TOWER + "post_layernorm.bias",), _same),
    Rule(
        r"vision\.layers\.(\d+)\.attention_norm\.scale",
        (_TOWER_LAYER + "layer_norm1.weight",),
        _same,
    ),
    Rule(
        r"vision\.layers\.(\d+)\.attention_norm\.bias", (_TOWER_LAYER + "layer_norm1.bias",), _same
    ),
    Rule(r"vision\.layers\.(\d+)\.mlp_norm\.scale", (_TOWER_LAYER + "layer_norm2.weight",), _same),
    Rule(r"vision\.layers\.(\d+)\.mlp_norm\.bias", (_TOWER_LAYER + "layer_norm2.bias",), _same),
    Rule(r"vision\.layers\.(\d+)\.qkv", _qkv_names(_TOWER_LAYER, "weight"), _qkv),
    Rule(r"vision\.layers\.(\d+)\.qkv_bias", _qkv_names(_TOWER_LAYER, "bias"), _qkv_bias),
    Rule(r"vision\.layers\.(\d+)\.out", (_TOWER_LAYER + "self_attn.out_proj.weight",), _out),
    Rule(r"vision\.layers\.(\d+)\.out_bias", (_TOWER_LAYER + "self_attn.out_proj.bias",), _same),
    Rule(r"vision\.layers\.(\d+)\.up\.kernel", (_TOWER_LAYER + "mlp.fc1.weight",), _transposed),
    Rule(r"vision\.layers\.(\d+)\.up\.bias", (_TOWER_LAYER + "mlp.fc1.bias",), _same),
    Rule(r"vision\.layers\.(\d+)\.down\.kernel", (_TOWER_LAYER + "mlp.fc2.weight",), _transposed),
    Rule(r"vision\.layers\.(\d+)\.down\.bias", (_TOWER_LAYER + "mlp.fc2.bias",), _same),
    Rule(r"projector\.linear_1\.kernel", ("multi_modal_projector.linear_1.weight",), _transposed),
    Rule(r"projector\.linear_1\.bias", ("multi_modal_projector.linear_1.bias",), _same),
    Rule(r"projector\.linear_2\.kernel", ("multi_modal_projector.linear_2.weight",), _transposed),
    Rule(r"projector\.linear_2\.bias", ("multi_modal_projector.linear_2.bias",), _same),
    Rule(r"projector\.newline", ("image_newline",), _same),
    Rule(r"embed\.embedding", (EMBEDDING,), _same),
    Rule(r"layers\.(\d+)\.attention_norm\.scale", (_LAYER + "input_layernorm.weight",), _same),
    Rule(r"layers\.(\d+)\.qkv", _qkv_names(_LAYER, "weight"), _grouped_qkv),
    Rule(r"layers\.(\d+)\.out", (_LAYER + "self_attn.o_proj.weight",), _out),
    Rule(r"layers\.(\d+)\.mlp_norm\.scale", (_LAYER + "post_attention_layernorm.weight",), _same),
    Rule(
        r"layers\.(\d+)\.gate_up",
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        _gate_up,
    ),
    Rule(r"layers\.(\d+)\.down", (_LAYER + "mlp.down_proj.weight",), _transposed),
    Rule(r"head\.norm\.scale", ("language_model.model.norm.weight",), _same),
    Rule(r"head\.kernel", (LM_HEAD,), _transposed),
)

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
    shapes = {
        parameter_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    order = ("vision", "projector", "embed", "layers", "head")
    return {
        name: shapes[name] for name in sorted(shapes, key=lambda n: order.index(n.split(".")[0]))
    }


def parameter_name(path: Iterable[Any]) -> str:
    """The dotted name of a leaf of the parameter tree, from its path of dict keys."""
    return ".".join(str(entry.key) for entry in path)


def piece_of(name: str) -> tuple[str, str]:
    """The piece of a checkpoint that holds a parameter, and the parameter's name inside it.

    The pieces are vision, projector, embed, layer_000..., head.
    """
    piece, leaf = name.split(".", 1)
    if piece != "layers":
        return piece, leaf
    layer, leaf = leaf.split(".", 1)
    return f"layer_{int(layer):03d}", leaf


def _rule(name: str) -> tuple[Rule, tuple[str, ...]]:
    """The rule of a parameter and the names of its tensors."""
    for rule in TABLE:
        found = re.fullmatch(rule.parameter, name)
        if found:
            return rule, tuple(tensor.format(*found.groups()) for tensor in rule.tensors)
    raise NotImplementedError(f"no rule in the weight table for the parameter {name!r}")


def tensors_of(name: str, shape: Shape) -> dict[str, Shape]:
    """Hub names and shapes of the tensors that make up a parameter."""
    rule, names = _rule(name)
    nothing = np.broadcast_to(np.zeros((), np.uint8), shape)  # a shape without memory
    shapes = {}
    for tensor, part in zip(names, rule.parts(nothing), strict=True):
        rest = part.view.size // int(np.prod([size for size in part.shape if size != -1]))
        shapes[tensor] = tuple(rest if size == -1 else size for size in part.shape)
    return shapes


def join(name: str, shape: Shape, dtype: np.dtype, tensors: Iterable[np.ndarray]) -> np.ndarray:
    """A parameter from its tensors, in the order of `tensors_of`.

    Only one tensor is held at a time if `tensors` is a generator.

    Raises:
        ValueError: a finite value is beyond the range of float16.
    """
    rule, _ = _rule(name)
    array = np.empty(shape, dtype)
    for part, tensor in zip(rule.parts(array), tensors, strict=True):
        _copy(cast(tensor, dtype, name).reshape(part.view.shape), part.view)
    return array


def split(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a parameter, contiguous, with their hub names: the inverse of `join`."""
    rule, names = _rule(name)
    for tensor, part in zip(names, rule.parts(array), strict=True):
        whole = part.view
        if not whole.flags.c_contiguous:
            whole = np.empty(part.view.shape, array.dtype)
            _copy(np.moveaxis(part.view, -1, 0), np.moveaxis(whole, -1, 0))
        yield tensor, whole.reshape(part.shape)


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
        ValueError: tensors are missing, unknown, doubled, misshapen or not of a float type. One
            message lists all problems, up to a bound, with their number.
    """
    expected = {
        tensor: (name, shape)
        for name, whole in parameter_shapes(config).items()
        for tensor, shape in tensors_of(name, whole).items()
    }
    problems: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for given, kind, shape in stored:
        tensor = hub_name(given)
        if _IGNORED.fullmatch(tensor) or (config.text.tie_embeddings and tensor == LM_HEAD):
            continue
        if tensor not in expected:
            problems.setdefault("unknown", []).append(f"{given} {list(shape)}")
            continue
        if tensor in found:
            problems.setdefault("given twice", []).append(f"{found[tensor]} and {given}")
            continue
        found[tensor] = given
        right = expected[tensor][1]
        if shape != right:
            problems.setdefault("wrong shape", []).append(
                f"{given} is {list(shape)}, expected {list(right)}"
            )
        if kind not in FLOAT_KINDS:
            problems.setdefault("wrong type", []).append(
                f"{given} is {kind}, expected {' or '.join(FLOAT_KINDS)}"
            )
    for tensor, (_, shape) in expected.items():
        if tensor not in found:
            problems.setdefault("missing", []).append(f"{tensor} {list(shape)}")
    refuse(problems, "the checkpoint does not fit its config.json")
    sources: dict[str, list[str]] = {}
    for tensor, (name, _) in expected.items():
        sources.setdefault(name, []).append(found[tensor])
    return {name: tuple(names) for name, names in sources.items()}


def refuse(problems: Mapping[str, Sequence[str]], what: str) -> None:
    """Raise one ValueError that lists the problems of every kind, if there are any."""
    count = sum(map(len, problems.values()))
    if not count:
        return
    lines = [f"{what}: {count} problem{'s' if count > 1 else ''}"]
    for kind, listed in problems.items():
        lines += [f"  {kind}: {problem}" for problem in listed[:_REPORTED]]
        if len(listed) > _REPORTED:
            lines.append(f"  {kind}: and {len(listed) - _REPORTED} more")
    raise ValueError("\n".join(lines))
