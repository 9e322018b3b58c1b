"""Tiny GGUF files, written with the package `gguf` as llama.cpp's own converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>'"
    " }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
WORDS = ["th", "the", "Ġt", "Ġth", "Ġthe", "in", "er", "on", "ĠĠ"]
HEADS, KV_HEADS, HEAD_DIM, WIDTH, MLP, LAYERS = 4, 2, 16, 64, 96, 2


def byte_level() -> dict[str, Any]:
    """Metadata of a byte-level tokenizer: four special tokens, the bytes and a few words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = SPECIAL + letters + WORDS
    merges = ["Ġ t", "t h", "Ġt h", "th e", "Ġth e", "i n", "e r", "o n", "Ġ Ġ"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece() -> dict[str, Any]:
    """Metadata of a tokenizer as sentencepiece makes them: scores, no merges, byte fallback."""
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "th", "i", "n", "in", "▁in", "<mark>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(words) - 1) + [4],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(words))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages[-1]['content'] }}",
    }


def chat() -> dict[str, Any]:
    """Metadata of a byte-level tokenizer with the special tokens that SmolLM2's chat has."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    return byte_level() | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def metadata(**changes: Any) -> dict[str, Any]:
    """What a file says of a Llama; `changes` by the key behind "llama.", dots as "__"."""
    found = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {f"llama.{key}": value for key, value in found.items() if value is not None}


def hub_tensors(vocab: int, *, tied: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of the decoder under Hugging Face's names, float32."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (WIDTH,),
            f"{at}self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            f"{at}self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{at}self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{at}self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            f"{at}post_attention_layernorm.weight": (WIDTH,),
            f"{at}mlp.gate_proj.weight": (MLP, WIDTH),
            f"{at}mlp.up_proj.weight": (MLP, WIDTH),
            f"{at}mlp.down_proj.weight": (WIDTH, MLP),
        }
    shapes |= {"model.norm.weight": (WIDTH,)}
    shapes |= {} if tied else {"lm_head.weight": (vocab, WIDTH)}
    rng = np.random.default_rng(seed)
    return {
        name: 0.3 * rng.standard_normal(shape, np.float32) + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def file_name(name: str) -> str:
    """llama.cpp's name of one of `hub_tensors`, by the package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    found = table.get_name(name, try_suffixes=(".weight",))
    assert found is not None
    return found


def permuted(name: str, tensor: np.ndarray) -> np.ndarray:
    """Rows of a query or key as llama.cpp's converter stores them (`LlamaModel.permute`)."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    keys: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    *,
    kind: str = "F32",
    arch: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a file: `tensors` by their names at Hugging Face, matrices quantised as `kind`.

    Args:
        path: the file.
        tensors: as `hub_tensors` makes them.
        keys: those of the model, `metadata()` by default.
        tokenizer: its keys, `byte_level()` by default.
        kind: of `gguf.GGMLQuantizationType`.
        arch: general.architecture.
        extra: further tensors by their names in the file, as they are.
    """
    writer = gguf.GGUFWriter(path, arch)
    keys = metadata() if keys is None else keys
    for key, value in (keys | (byte_level() if tokenizer is None else tokenizer)).items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        type_ = quantised if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(permuted(name, tensor), type_)
        writer.add_tensor(file_name(name), data, raw_dtype=type_)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(tensors: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """What `write` leaves of tensors: matrices quantised and dequantised, unpermuted."""
    type_ = gguf.GGMLQuantizationType[kind]
    return {
        name: gguf.dequantize(gguf.quantize(tensor, type_), type_) if tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }
