"""The weight table: names, layouts, and the report of what does not fit."""

import ml_dtypes
import numpy as np
import pytest

from tests.model_files import SPELLINGS, config_json, random_tensors, respell
from tests.tiny_qwen import qwen_json
from vlcache_jax.checkpoints.weights import (
    cast,
    join,
    join_part,
    match,
    parameter_shapes,
    parse_dtype,
    piece_of,
    split,
    tensors_of,
)
from vlcache_jax.errors import short
from vlcache_jax.models.families import family_of, read_config
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.models.llava.names import LLAVA

SHAPES = (
    config_json("llava", heads=4, kv_heads=4),
    config_json("llava_next", heads=4, kv_heads=2),
    config_json("llava_next", heads=7, kv_heads=1),
    config_json("llava", tied=True),
)


def _stored(tensors):
    return [(name, "F32", array.shape) for name, array in tensors.items()]


@pytest.mark.parametrize("config", SHAPES, ids=["mha", "gqa", "g7", "tied"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_split_is_the_inverse_of_join_on_every_bit_pattern(config, dtype):
    rng = np.random.default_rng(0)
    for name, shape in parameter_shapes(LlavaConfig.from_hf(config)).items():
        shapes = tensors_of(LLAVA, name, shape)
        raw = np.dtype(f"u{np.dtype(dtype).itemsize}")
        tensors = {
            tensor: rng.integers(0, np.iinfo(raw).max, size, raw, endpoint=True).view(dtype)
            for tensor, size in shapes.items()
        }
        array = join(LLAVA, name, shape, np.dtype(dtype), tensors.values())
        assert (array.shape, array.dtype) == (shape, dtype)
        back = dict(split(LLAVA, name, array))
        assert back.keys() == tensors.keys()
        for tensor, values in back.items():
            assert values.shape == shapes[tensor]
            assert values.tobytes() == tensors[tensor].tobytes(), tensor


def test_layouts_give_the_products_of_the_tensors():
    """Each fused kernel against plain `x @ weight.T` products of Hugging Face's modules."""
    config = config_json("llava_next", heads=6, kv_heads=2)
    given = random_tensors(config)
    shapes = parameter_shapes(LlavaConfig.from_hf(config))
    kernels = {
        name: join(
            LLAVA,
            name,
            shape,
            np.dtype(np.float32),
            [given[t] for t in tensors_of(LLAVA, name, shape)],
        )
        for name, shape in shapes.items()
    }
    x = np.random.default_rng(1).standard_normal((5, 48)).astype(np.float32)
    layer = "language_model.model.layers.1."

    qkv = np.einsum("td,dkch->tkch", x, kernels["layers.1.qkv"])  # [T, K, G + 2, H]
    query = (x @ given[layer + "self_attn.q_proj.weight"].T).reshape(5, 6, 8)
    for head in range(6):
        np.testing.assert_allclose(qkv[:, head // 3, head % 3], query[:, head], atol=1e-4)
    for place, kind in ((-2, "k"), (-1, "v")):
        plain = (x @ given[f"{layer}self_attn.{kind}_proj.weight"].T).reshape(5, 2, 8)
        np.testing.assert_allclose(qkv[:, :, place], plain, atol=1e-4)
    out = np.einsum("tkgh,kghd->td", x.reshape(5, 2, 3, 8), kernels["layers.1.out"])
    plain = x @ given[layer + "self_attn.o_proj.weight"].T
    np.testing.assert_allclose(out, plain, atol=1e-4)
    both = np.einsum("td,dcf->ctf", x, kernels["layers.1.gate_up"])
    for found, kind in zip(both, ("gate", "up"), strict=True):
        plain = x @ given[f"{layer}mlp.{kind}_proj.weight"].T
        np.testing.assert_allclose(found, plain, atol=1e-4)

    y = x[:, :32]
    tower = "vision_tower.vision_model."
    first = tower + "encoder.layers.0."
    qkv = np.einsum("td,dcnh->ctnh", y, kernels["vision.layers.0.qkv"])
    qkv = (qkv + kernels["vision.layers.0.qkv_bias"][:, None]).reshape(3, 5, 32)
    for found, kind in zip(qkv, "qkv", strict=True):
        weight, bias = (given[f"{first}self_attn.{kind}_proj.{x}"] for x in ("weight", "bias"))
        np.testing.assert_allclose(found, y @ weight.T + bias, atol=1e-4)
    out = np.einsum("tnh,nhd->td", y.reshape(5, 2, 16), kernels["vision.layers.0.out"])
    plain = y @ given[first + "self_attn.out_proj.weight"].T
    np.testing.assert_allclose(out, plain, atol=1e-4)
    tile = np.random.default_rng(2).standard_normal((3, 14, 14)).astype(np.float32)
    patch = np.einsum("cpq,cpqd->d", tile, kernels["vision.patch_embedding"])
    convolution = given[tower + "embeddings.patch_embedding.weight"]
    np.testing.assert_allclose(patch, (convolution * tile).sum((1, 2, 3)), atol=1e-3)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling):
    for name in random_tensors(config_json()):
        assert LLAVA.own(name) == name
        assert LLAVA.own(respell(name, spelling)) == name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "model.language_model.layers.3.mlp.up_proj.weight",
            "language_model.model.layers.3.mlp.up_proj.weight",
        ),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.image_newline", "image_newline"),
        (
            "model.vision_tower.embeddings.class_embedding",
            "vision_tower.vision_model.embeddings.class_embedding",
        ),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("model.mm_projector.0.weight", "model.mm_projector.0.weight"),
    ],
)
def test_names(given, expected):
    assert LLAVA.own(given) == expected


def test_pieces_come_in_the_order_of_the_model():
    names = parameter_shapes(LlavaConfig.from_hf(config_json()))
    pieces = list(dict.fromkeys(piece_of(name)[0] for name in names))
    assert pieces == ["vision", "projector", "embed", "layer_000", "layer_001", "head"]
    assert piece_of("layers.12.qkv") == ("layer_012", "qkv")
    assert piece_of("vision.layers.0.up.kernel") == ("vision", "layers.0.up.kernel")


def test_one_report_names_every_problem():
    config = config_json()
    stored = _stored(random_tensors(config))
    gone = stored.pop(0)[0]
    bent, kind, shape = stored.pop(0)
    coded = stored.pop(0)
    stored += [
        (bent, kind, (*shape, 2)),
        (coded[0], "I8", coded[2]),
        ("language_model.model.layers.2.mlp.up_proj.weight", "F32", (40, 32)),
        (f"model.{stored[0][0]}", "F32", stored[0][2]),
    ]
    with pytest.raises(ValueError, match="5 problems") as error:
        match(LlavaConfig.from_hf(config), LLAVA, stored)
    head, *parts = str(error.value).split("; ")
    assert head == "the checkpoint does not fit its config.json: 5 problems"
    expected = {
        f"missing: {gone} [32]",
        f"different: {bent} is {[*shape, 2]}, expected {list(shape)}",
        f"wrong type: {coded[0]} is I8, expected F32 or BF16 or F16",
        "unknown: language_model.model.layers.2.mlp.up_proj.weight [40, 32]",
        f"given twice: {stored[0][0]} and model.{stored[0][0]}",
    }
    cut = {f"{kind}: {short(text, 72)}" for kind, text in (each.split(": ") for each in expected)}
    assert set(parts) - cut == {"and 1 more"}
    assert len(parts) == 5
    assert len(str(error.value)) <= 400


def test_a_long_report_is_cut_but_counted():
    config = config_json()
    count = len(random_tensors(config))
    with pytest.raises(ValueError, match=f"{count + 1} problems") as error:
        match(LlavaConfig.from_hf(config), LLAVA, [("transformer.wte", "F32", (64, 32))])
    text = str(error.value)
    assert "unknown: transformer.wte" in text
    assert "missing: vision_tower" in text
    shown = text.count("missing: ") + 1
    assert text.endswith(f"; and {count + 1 - shown} more")
    assert "\n" not in text
    assert 300 < len(text) <= 400


def test_constant_buffers_and_a_tied_projection_are_left_out():
    config = config_json(tied=True)
    tensors = random_tensors(config)
    assert "language_model.lm_head.weight" not in tensors
    stored = [
        *_stored(tensors),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (4,)),
        ("model.language_model.rotary_emb.inv_freq", "F32", (4,)),
        ("vision_tower.vision_model.embeddings.position_ids", "I64", (1, 5)),
        ("model.vision_tower.embeddings.position_ids", "I64", (1, 5)),
        ("lm_head.weight", "F32", (64, 32)),
    ]
    sources = match(LlavaConfig.from_hf(config), LLAVA, stored)
    assert sorted(name for names in sources.values() for name in names) == sorted(tensors)


def test_number_types():
    assert parse_dtype("bfloat16") == parse_dtype(ml_dtypes.bfloat16) == ml_dtypes.bfloat16
    assert parse_dtype(np.float32) == parse_dtype(np.dtype("float32")) == np.float32
    for wrong in ("int8", "float64", "bf16", "nonsense", np.int32):
        with pytest.raises(ValueError, match="is not supported: expected float32, bfloat16"):
            parse_dtype(wrong)


def test_a_value_beyond_float16_is_refused():
    values = np.array([1.0, 70000.0], np.float32)
    with pytest.raises(ValueError, match=r"layers\.0\.down has values beyond the range of float16"):
        cast(values, np.dtype(np.float16), "layers.0.down")
    stored_infinity = np.array([1.0, np.inf], np.float32)
    assert np.isinf(cast(stored_infinity, np.dtype(np.float16), "x")[1])
    assert cast(values, np.dtype(np.float32), "x") is values


class Sliced:
    """A tensor that is read by slices, and tells how much was."""

    def __init__(self, array):
        self.array, self.read = array, 0

    def get_shape(self):
        return list(self.array.shape)

    def __getitem__(self, index):
        found = self.array[index]
        self.read += found.size
        return found


@pytest.mark.parametrize(
    "config", [*SHAPES, qwen_json("qwen2_5_vl")], ids=["mha", "gqa", "g7", "tied", "qwen"]
)
def test_a_part_of_a_parameter_is_read_alone(config):
    model = read_config(config)
    names, rng = family_of(model).names, np.random.default_rng(1)
    for name, shape in parameter_shapes(model).items():
        tensors = [
            rng.standard_normal(own, np.float32) for own in tensors_of(names, name, shape).values()
        ]
        whole = join(names, name, shape, np.dtype(np.float32), iter(tensors))
        for number in range(3):
            starts = [size * number // 3 for size in shape]
            stops = [max(start + 1, size * (number + 1) // 3)
                     for start, size in zip(starts, shape, strict=True)]  # fmt: skip
            index = tuple(map(slice, starts, stops))
            sliced = [Sliced(tensor) for tensor in tensors]
            found = join_part(names, name, shape, np.dtype(np.float32), sliced, index)
            np.testing.assert_array_equal(found, whole[index], err_msg=f"{name} {index}")
        # Along the first axis alone nothing is read that is not wanted.
        index = tuple(map(slice, (0,) * len(shape), (1, *shape[1:])))
        sliced = [Sliced(tensor) for tensor in tensors]
        join_part(names, name, shape, np.dtype(np.float32), sliced, index)
        assert sum(each.read for each in sliced) == whole[index].size
