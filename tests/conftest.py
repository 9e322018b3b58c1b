"""Fixtures that several parts of the suite share."""

import pytest

from tests.checkpoints import config_json, random_tensors, write_model
from tests.tiny import tiny_pinpoints, tiny_processor


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny LLaVA-NeXT directory with random weights and a processor; made without torch."""
    config = config_json()
    config["text_config"] |= {"vocab_size": 264, "max_position_embeddings": 1024}
    config["vision_config"] |= {"image_size": 56}
    config["image_grid_pinpoints"] = [list(pair) for pair in tiny_pinpoints()]
    tensors = {
        name: 1 + 0.3 * array if "norm" in name else 0.4 * array  # so that answers are varied
        for name, array in random_tensors(config).items()
    }
    path = write_model(tmp_path_factory.mktemp("model") / "tiny", config, tensors)
    (path / "tokenizer.model").unlink()
    (path / "generation_config.json").unlink()
    tiny_processor("llava_next").save_pretrained(path)
    return path
