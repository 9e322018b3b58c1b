"""The files of a checkpoint's processor, in the forms in which they are found."""

import json

import jax
import numpy as np
import pytest

from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax.requests.processing import Processor


@pytest.fixture
def directory(tmp_path):
    """A directory of processor files, to be changed."""
    tiny_processor("llava").save_pretrained(tmp_path)
    return tmp_path


def change(file, **values):
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, **values}))


def read_saved(path):
    return Processor.from_pretrained(path, tiny_config("llava"))


def test_a_tokenizer_saved_with_truncation_or_padding_does_neither_here(directory):
    words = "a question of many bytes " * 4
    expected = read_saved(directory)(None, words)
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 500}, "direction": "Left", "pad_to_multiple_of": None,
               "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    change(directory / "tokenizer.json", truncation=truncation, padding=padding)
    change(directory / "tokenizer_config.json", truncation=True, padding="max_length", max_length=8,
           model_max_length=16, padding_side="left", truncation_side="left")  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, read_saved(directory)(None, words), expected)


@pytest.mark.parametrize("form", ["text", "list"])
def test_a_template_in_tokenizer_config_is_found(form, directory):
    expected = read_saved(directory)(None, "what?")
    file = directory / "chat_template.jinja"
    template = file.read_text()
    file.unlink()
    with pytest.raises(ValueError, match="no chat template"):
        read_saved(directory)(None, "what?")
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
    change(directory / "tokenizer_config.json", chat_template=template if form == "text" else named)
    jax.tree.map(np.testing.assert_array_equal, read_saved(directory)(None, "what?"), expected)


def test_a_directory_with_only_preprocessor_config_works(directory):
    image = picture(80, 40)
    expected = read_saved(directory)(image, "what?")
    processor = json.loads((directory / "processor_config.json").read_text())
    (directory / "processor_config.json").unlink()
    (directory / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    jax.tree.map(np.testing.assert_array_equal, read_saved(directory)(image, "what?"), expected)


def test_a_tokenizer_of_sentencepiece_names_its_package(directory, monkeypatch):
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\n\x05\n\x03abc")
    monkeypatch.setattr("vlcache_jax.requests.packing.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vlcache-jax\[sentencepiece\]'"):
        read_saved(directory)


def test_settings_that_the_processor_cannot_take_are_refused_in_one_line(directory):
    processor = json.loads((directory / "processor_config.json").read_text())
    processor["image_processor"]["image_mean"] = "x"
    (directory / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="processor") as error:
        read_saved(directory)(picture(80, 40), "what?")
    assert "\n" not in str(error.value)
