"""Against transformers' own classes: what they save is read, what is written they load."""

import numpy as np
import pytest

from convert.program import convert
from tests.checkpoints import read_tensors, same_bits, transformers_model
from vlcache_jax.checkpoint import load_params
from vlcache_jax.config import LlavaConfig
from vlcache_jax.weights import hub_name, parameter_shapes, tensors_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

MODELS = [
    ("llava", "llama", {"num_key_value_heads": 4}),
    ("llava_next", "mistral", {}),
    (
        "llava_next",
        "llama",
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    ("llava_next", "llama", {"tie_word_embeddings": True}),
]
IDS = ["llava-mha", "next-mistral", "next-g7", "next-tied"]


def _state(model):
    """The values of a model, as raw bits."""
    size = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return {
        name: tensor.contiguous().view(size[tensor.dtype]).numpy()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize(("family", "kind", "text"), MODELS, ids=IDS)
def test_saved_by_transformers_and_loaded_by_it_again(family, kind, text, tmp_path):
    model = transformers_model(family, kind, torch.bfloat16, **text)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    stored = read_tensors(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2

    config = LlavaConfig.from_file(tmp_path / "hf")
    expected = {
        tensor: shape
        for name, whole in parameter_shapes(config).items()
        for tensor, shape in tensors_of(name, whole).items()
    }
    assert {hub_name(name): array.shape for name, array in stored.items()} == expected

    there = convert(tmp_path / "hf", tmp_path / "orbax")
    back = convert(there, tmp_path / "back", to_hf=True)
    renamed = {hub_name(name): array for name, array in stored.items()}
    assert same_bits(read_tensors(back), renamed)

    loaded, info = type(model).from_pretrained(back, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert loaded.dtype == torch.bfloat16
    assert same_bits(_state(loaded), _state(model))


def test_the_model_itself_reads_what_transformers_saved(tmp_path):
    """One number of each fused kernel, found through the module that transformers made."""
    model = transformers_model("llava_next", "llama", torch.float32)
    model.save_pretrained(tmp_path)
    params = load_params(tmp_path)
    decoder = model.model.language_model.layers[1]
    for k, g in ((0, 0), (0, 1), (1, 0), (1, 1)):
        query = decoder.self_attn.q_proj.weight[8 * (2 * k + g) + 3, 5].item()
        assert params["layers"][1]["qkv"][5, k, g, 3] == np.float32(query)
        out = decoder.self_attn.o_proj.weight[5, 8 * (2 * k + g) + 3].item()
        assert params["layers"][1]["out"][k, g, 3, 5] == np.float32(out)
    value = decoder.self_attn.v_proj.weight[8 + 3, 5].item()
    assert params["layers"][1]["qkv"][5, 1, -1, 3] == np.float32(value)
    tower = model.model.vision_tower.encoder.layers[0]
    key = tower.self_attn.k_proj
    assert params["vision"]["layers"][0]["qkv"][7, 1, 1, 2] == np.float32(key.weight[18, 7].item())
    assert params["vision"]["layers"][0]["qkv_bias"][1, 1, 2] == np.float32(key.bias[18].item())
