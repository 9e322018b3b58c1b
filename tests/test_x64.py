"""With JAX_ENABLE_X64=1 all of it works, and the answers are the same: JAX's types are no setting.

`answers` is run in this process, and in another one that has the flag.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vlcache_jax
from convert.program import convert
from tests.cli import program
from tests.tiny import picture
from vlcache_jax import AKVQ, KIVI, RTN, Custom, FullCache, Generate, RandomKV, VLCache
from vlcache_jax.cache.methods import METHODS, make_method
from vlcache_jax.models.families import abstract_params

pytestmark = pytest.mark.full

RUN = (
    VLCache("9tok", renormalize=True),
    VLCache(0.3, quantize=AKVQ(tsa_layers=(0,))),
    RandomKV(0.3, seed=-5),
    RTN(bits=4, residual=16),
)
TRACED = (
    *(make_method(name) for name in METHODS),
    *(FullCache(quantize=each) for each in (AKVQ(), RTN(bits=8), KIVI(residual=32))),
    Custom("9tok", score="snapkv", allocation="pyramid", shared_heads=True),
)


def answers(model, folder):
    """What every part of the library says of a model, as plain values."""
    photo = Path(folder) / "photo.png"
    picture(70, 40).save(photo)
    converted = convert(model, Path(folder) / "converted")
    vlm = vlcache_jax.load(converted)
    ask = {"images": photo, "text": "what is this?", "max_new_tokens": 20}
    found = {}
    for cache in RUN:
        answer = vlm.generate(**ask, cache=cache, trace=True)
        kept = answer.trace.kept.tolist()
        found[repr(cache)] = [answer.tokens, answer.cache.layer_budgets, kept]
    drawn = vlm.generate(**ask, temperature=1.5, top_k=40, top_p=0.9, seed=7, cache=RUN[0])
    found["sampled"] = drawn.tokens
    found["streamed"] = "".join(vlm.stream(**ask, cache=RUN[0]))
    texts = {"text": ["one", "two and more", "3"], "max_new_tokens": 2}
    found["batch"] = [a.tokens for a in vlm.generate(**texts, cache=RUN[0], prefill_batch=2)]
    calibration = vlcache_jax.calibrate(vlm, images=[photo], text=["what?"])
    found["calibrated"] = np.round(calibration.text_shares, 4).tolist()
    inspection = vlcache_jax.inspect(vlm, photo, "what?", methods=[RUN[0]], max_new_tokens=2)
    found["inspected"] = json.loads(json.dumps(inspection.as_json()))["outcomes"][0]["kept"]
    whole = Generate(vlm.config, RUN[0], 3)
    inputs = vlm.processor([photo], "what?")
    output = jax.jit(lambda *args: whole(*args))(vlm.params, inputs, jax.random.key(0))
    found["one program"] = output.tokens.tolist()
    asked = model, "--image", photo, "--prompt", "what?", "--kv-budget", "9tok", "--json"
    result = program.run("generate", *asked, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    found["command line"] = json.loads(result.stdout)["text"]
    return found


def wide_leaves(model):
    """Of every method: what its stages hand on that has more than 32 bits, or float64 inside."""
    vlm = vlcache_jax.load(model, lazy=True)
    inputs = vlm.processor([picture(70, 40)], "what is this?")
    params = abstract_params(vlm.config)
    wide = []
    for method in TRACED:
        generate = Generate(vlm.config, method, 20, trace=True)
        stages, settings = generate.stages, generate.settings(1)

        def run(params, stages=stages, settings=settings):
            pool, state, trace = stages.begin(params, inputs, settings)
            if stages.residual:
                pool, state = stages.spill(pool, state)
            return pool, stages.decode_chunk(params, pool, state), trace

        program, shapes = jax.make_jaxpr(run, return_shape=True)(params)
        leaves = jax.tree.leaves(shapes)
        wide += [f"{method}: {leaf}" for leaf in leaves if leaf.dtype.itemsize > 4]
        # Numbers of Python stand there as `0.5:f64[]`; arrays, `f64[2,3]`, have none.
        wide += [f"{method}: {array}" for array in re.findall(r"f64\[\d[\d,]*\]", str(program))]
    return wide


@pytest.fixture(scope="module")
def with_x64(model_dir, tmp_path_factory):
    """What the other process says."""
    folder = tmp_path_factory.mktemp("x64")
    script = (
        "import json, jax; from tests.test_x64 import answers, wide_leaves; "
        "assert jax.config.jax_enable_x64; "
        f"print(json.dumps([answers({str(model_dir)!r}, {str(folder)!r}), "
        f"wide_leaves({str(model_dir)!r})]))"
    )
    env = os.environ | {"JAX_ENABLE_X64": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
def test_everything_is_the_same_with_x64(with_x64, model_dir, tmp_path):
    theirs = with_x64[0]
    ours = answers(model_dir, tmp_path)
    assert ours.keys() == theirs.keys()
    for name, own in ours.items():
        assert own == theirs[name], name


def test_no_program_is_of_64_bits_with_x64(with_x64):
    assert with_x64[1] == []
