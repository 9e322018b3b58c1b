"""The benchmark's parts: its random checkpoint is a model, its memory meter measures."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest

from benchmarks.conversion import make_checkpoint, model_config, report_load, tensor_shapes, watch
from benchmarks.environment import environment
from tests.model_files import read_tensors


def test_the_true_shapes_are_those_of_llava_15_7b():
    shapes = tensor_shapes(model_config(tiny=False))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 7_063_427_072
    assert shapes["language_model.model.layers.31.mlp.gate_proj.weight"] == (11008, 4096)


def test_a_random_checkpoint_is_a_model(tmp_path, capsys):
    config = model_config(tiny=True)
    done = []
    make_checkpoint(tmp_path / "model", config, 10_000_000, done.append)
    tensors = read_tensors(tmp_path / "model")
    assert {name: array.shape for name, array in tensors.items()} == tensor_shapes(config)
    assert sum(done) == sum(array.nbytes for array in tensors.values())
    values = np.abs(tensors["language_model.lm_head.weight"].astype(np.float32))
    assert values.min() >= 2**-7
    assert values.max() < 2**-3
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    report_load(str(tmp_path / "model"))
    report = json.loads(capsys.readouterr().out)
    assert report["parameter_bytes"] == sum(done)
    assert len(report["crc32"]) == len(set(report["crc32"].values()))
    assert tensors["language_model.lm_head.weight"].dtype == ml_dtypes.bfloat16


def test_watch_sees_the_memory_of_a_program():
    code = "import time; x = b'x' * 200_000_000; time.sleep(0.3); print(len(x))"
    measured, output = watch([sys.executable, "-c", code], lambda now: None)
    assert output == "200000000\n"
    assert 200e6 < measured["peak_rss_anon_bytes"] < 260e6
    with pytest.raises(RuntimeError, match="NameError"):
        watch([sys.executable, "-c", "nothing"], lambda now: None)


def test_environment_says_what_was_run():
    facts = environment()
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "jaxlib", "numpy"} <= facts["versions"].keys()
    assert facts["machine"]["cores"] >= 1
    assert facts["commit"]
