"""The example of docs/models.md: a family in the table works in everything behind the prompt."""

import re
from pathlib import Path

import numpy as np
import pytest

import vlcache_jax
from convert.program import convert
from tests.model_files import decoder_json, read_tensors, same_bits, write_tiny
from tests.tiny import CHAT_TEMPLATE, IMAGE_TOKEN_ID, picture, tiny_tokenizer
from vlcache_jax import AKVQ, SnapKV, VLCache
from vlcache_jax.models.families import FAMILIES

GUIDE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def example():
    [code] = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.M | re.S)
    assert code.count("\n") < 200
    known = set(FAMILIES)
    exec(code, {"__name__": "example"})
    [new] = set(FAMILIES) - known
    yield new
    del FAMILIES[new]


@pytest.fixture(scope="module")
def directory(example, tmp_path_factory):
    text = decoder_json() | {"vocab_size": 264, "max_position_embeddings": 1024}
    config = {"model_type": example, "image_token_id": IMAGE_TOKEN_ID, "text_config": text}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return write_tiny(tmp_path_factory.mktemp("family") / "tiny", config, tokenizer)


def test_it_answers_compresses_and_shows(directory, tmp_path):
    vlm = vlcache_jax.load(directory)
    images = [[picture(40, 30)], None, [picture(9, 90), picture(50, 50)]]
    texts = ["what colour?", "only text", "<image> or <image>?"]
    asked = {"cache": VLCache(0.4, quantize=AKVQ()), "max_new_tokens": 6}
    batch = vlm.generate(images, texts, **asked)
    for answer, pictures, text in zip(batch, images, texts, strict=True):
        assert answer.visual_tokens == 16 * len(pictures or ())
        assert answer.tokens == vlm.generate(pictures, text, **asked).tokens
    other = vlm.generate(picture(40, 30, seed=1), "what colour?", **asked)
    assert other.tokens != batch[0].tokens
    found = vlcache_jax.inspect(vlm, images[0], texts[0], methods=[SnapKV("9tok")])
    assert len(found.pictures[0].rectangles) == 16
    found.save(tmp_path / "page.html")


def test_it_is_converted_and_back(directory, tmp_path):
    there = convert(directory, tmp_path / "orbax")
    back = convert(there, tmp_path / "back", to_hf=True)
    assert same_bits(read_tensors(back), read_tensors(directory))
    tokens = [
        vlcache_jax.load(path).generate(picture(20, 20), "what?", max_new_tokens=4).tokens
        for path in (directory, there)
    ]
    assert tokens[0] == tokens[1]
    assert np.ptp(tokens[0]) > 0
