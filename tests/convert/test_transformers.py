"""Against transformers' own classes: what they save is read, what is written they load."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vlcache_jax
from convert.program import convert
from tests import hf
from tests.model_files import SPELLINGS, read_tensors, respell, same_bits, write_model
from tests.tiny import picture, tiny_processor
from vlcache_jax.checkpoints.checkpoint import open_checkpoint
from vlcache_jax.checkpoints.weights import parameter_shapes, tensors_of
from vlcache_jax.models.llava.names import LLAVA
from vlcache_jax.running.programs import Programs

MODELS = [
    ("llava", "llama", {"num_key_value_heads": 4}),
    ("llava_next", "mistral", {"num_key_value_heads": 2}),
    (
        "llava_next",
        "llama",
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    ("llava_next", "llama", {"tie_word_embeddings": True}),
    ("llava_onevision", "qwen2", {"num_key_value_heads": 2}),
    ("llava_onevision", "qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
]
IDS = ["llava-mha", "next-mistral", "next-g7", "next-tied", "onevision", "onevision-tied"]


def _state(model):
    """The values of a model, as raw bits."""
    size = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return {
        name: tensor.contiguous().view(size[tensor.dtype]).numpy()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize(("family", "kind", "text"), MODELS, ids=IDS)
def test_saved_by_transformers_and_loaded_by_it_again(family, kind, text, tmp_path):
    model = hf.hf_model(family, kind, text).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    stored = read_tensors(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2

    config = open_checkpoint(tmp_path / "hf").config
    expected = {
        tensor: shape
        for name, whole in parameter_shapes(config).items()
        for tensor, shape in tensors_of(LLAVA, name, whole).items()
    }
    assert {LLAVA.own(name): array.shape for name, array in stored.items()} == expected

    there = convert(tmp_path / "hf", tmp_path / "orbax")
    back = convert(there, tmp_path / "back", to_hf=True)
    renamed = {LLAVA.own(name): array for name, array in stored.items()}
    assert same_bits(read_tensors(back), renamed)

    loaded, info = type(model).from_pretrained(back, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert loaded.dtype == torch.bfloat16
    assert same_bits(_state(loaded), _state(model))


def test_the_model_itself_reads_what_transformers_saved(tmp_path):
    """One number of each fused kernel, found through the module that transformers made."""
    model = hf.hf_model("llava_next", "llama", {"num_key_value_heads": 2})
    model.save_pretrained(tmp_path)
    params = open_checkpoint(tmp_path).load()
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


@pytest.mark.full
def test_every_spelling_and_the_conversion_generate_the_same_tokens(tmp_path):
    model = hf.hf_model("llava_next", "mistral", {"num_key_value_heads": 2})
    image, prompt = picture(90, 40), "<image> what?"
    theirs = hf.hf_inputs("llava_next", [image], prompt)
    with torch.no_grad():
        out = model.generate(**theirs, max_new_tokens=32, do_sample=False, pad_token_id=3)
    expected = out[0, theirs["input_ids"].shape[1] :].tolist()

    saved = hf.save(model, tmp_path / "saved", "llava_next", max_shard_size="60KB")
    assert len(list(saved.glob("*.safetensors"))) > 2
    stored = {LLAVA.own(name): array for name, array in read_tensors(saved).items()}
    config = json.loads((saved / "config.json").read_text())
    directories = [saved, convert(saved, tmp_path / "converted")]
    for number, spelling in enumerate(SPELLINGS):
        named = {respell(name, spelling): array for name, array in stored.items()}
        path = write_model(tmp_path / str(number), config, named, shards=3)
        (path / "tokenizer.model").unlink()
        tiny_processor("llava_next").save_pretrained(path)
        directories += [path, convert(path, tmp_path / f"{number} converted")]

    programs = Programs()
    for path in directories:
        vlm = vlcache_jax.load(path)
        vlm.stop_ids = ()
        vlm.programs = programs  # the models are equal but for their parameters: compiled once
        answer = vlm.generate(image, prompt, max_new_tokens=32, raw_prompt=True)
        assert answer.tokens == expected, path
