"""Tokenizers of GGUF files give the ids that transformers' own reading of the same file gives."""

import json
import random
from pathlib import Path

import pytest

for package in ("gguf", "torch"):
    pytest.importorskip(package, reason=f"needs {package}")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import vlcache_jax
from tests.gguf_files import SPECIAL, byte_level, hub_tensors, sentencepiece, write

TEXT = "\n".join(
    file.read_text(encoding="utf-8")
    for file in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
)
UNUSUAL = [
    "",
    " ",
    "  a",
    "日本語 🙂",
    "naïve\u00a0café",
    "I'LL don't",
    "x=1234567;\n\n\ty",
    "a\x00b",
]


def trained_sentencepiece():
    """A vocabulary of pairs as they were found, the first of the best score, then the letters."""
    first = sentencepiece()["tokenizer.ggml.tokens"][:259]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    others = sorted((token for token, _ in vocab[259:]), key=lambda token: len(token) == 1)
    return sentencepiece() | {
        "tokenizer.ggml.tokens": first + others,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(others),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(others))],
    }


def trained_byte_level(pre):
    """A vocabulary with merges; whether a text is begun is said, as transformers wants it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return byte_level() | {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.token_type": [3] * len(SPECIAL)
        + [1] * (len(model["vocab"]) - len(SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.add_bos_token": pre == "llama-bpe",
    }


@pytest.mark.parametrize("kind", ["llama", "gpt-2", "llama-bpe", "tekken"])
def test_the_same_ids_and_texts(kind, tmp_path):
    keys = trained_sentencepiece() if kind == "llama" else trained_byte_level(kind)
    write(tmp_path / "tiny.gguf", hub_tensors(len(keys["tokenizer.ggml.tokens"])), tokenizer=keys)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    ours = vlcache_jax.load(tmp_path / "tiny.gguf", lazy=True).processor.tokenizer
    rng = random.Random(0)
    starts = [rng.randrange(len(TEXT) - 400) for _ in range(200)]
    texts = [*(TEXT[at : at + rng.randint(1, 400)] for at in starts), *UNUSUAL]
    special = keys["tokenizer.ggml.tokens"][1:3]
    for text in [*texts, f"{special[0]} the{special[1]}x"]:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
