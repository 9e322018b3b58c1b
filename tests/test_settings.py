"""Settings that a model cannot take, lists in place of tuples, and values of the wrong type."""

from typing import Any

import huggingface_hub
import numpy as np
import pytest

import vlcache_jax
from tests.cli import program
from tests.tiny import tiny_config, tiny_processor
from vlcache_jax import KIVI, RTN, VLM, Processor, VLCache, calibration
from vlcache_jax.cache.methods import as_method
from vlcache_jax.loading import describe
from vlcache_jax.models.config import TextConfig as _TextConfig
from vlcache_jax.models.llava.config import LlavaConfig as _LlavaConfig
from vlcache_jax.models.llava.config import VisionConfig
from vlcache_jax.running import sampling


def untyped(kind: Any) -> Any:
    """A class that values of any type are given to, which is what is tested here."""
    return kind


AKVQ, RandomKV = untyped(vlcache_jax.AKVQ), untyped(vlcache_jax.RandomKV)
Buckets, Generate = untyped(vlcache_jax.Buckets), untyped(vlcache_jax.Generate)
LlavaConfig, TextConfig = untyped(_LlavaConfig), untyped(_TextConfig)
Calibration = untyped(calibration.Calibration)
Draws, Sampling = untyped(sampling.Draws), untyped(sampling.Sampling)

CONFIG = tiny_config("llava_next")
LAYERS, HEAD_DIM = CONFIG.text.num_layers, CONFIG.text.head_dim

UNFIT = {
    "a group": (RTN(group=3), ("group=3", f"head_dim={HEAD_DIM}", "choose group=1, 2, 4")),
    "a group of KIVI's": (KIVI(group=8, bits=4), ("group=8", f"head_dim={HEAD_DIM}", "choose")),
    "under a method": (VLCache(0.2, quantize=RTN(group=5)), ("group=5", "choose group=1, 2")),
    "a layer": (AKVQ(tsa_layers=(0, 99)), ("tsa_layers [99]", f"choose from 0 to {LAYERS - 1}")),
}
if HEAD_DIM <= 8 or HEAD_DIM % 8 == 0:
    del UNFIT["a group of KIVI's"]


def never(*_, **__):
    raise AssertionError("the weights are asked for")


@pytest.fixture(scope="module")
def unread():
    processor = Processor(CONFIG, tiny_processor("llava_next"), Buckets([64], [0, 5]))
    return VLM(CONFIG, never, processor, stop_ids=[])


def one_line(refused, words):
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(("cache", "words"), UNFIT.values(), ids=UNFIT)
def test_what_a_model_cannot_take_is_refused_before_weights_are_read(
    cache, words, unread, model_dir, monkeypatch
):
    asks = (
        lambda: unread.generate(text="x", cache=cache),
        lambda: unread.stream(text="x", cache=cache),
        lambda: vlcache_jax.inspect(unread, text="x", methods=[cache]),
        lambda: Generate(CONFIG, cache),
        lambda: describe(model_dir, cache=as_method(cache)),
    )
    for ask in asks:
        with pytest.raises(ValueError, match="choose") as refused:
            ask()
        one_line(refused, words)
    monkeypatch.setattr("vlcache_jax.loading.open_checkpoint", never)
    with pytest.raises(ValueError, match="choose") as refused:
        vlcache_jax.load(model_dir, cache=cache)
    one_line(refused, words)


def test_a_model_of_the_hub_is_not_downloaded_for_what_it_cannot_take(model_dir, monkeypatch):
    fetched = []

    def download(name, revision, allow_patterns):
        fetched.extend(allow_patterns)
        return str(model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="group=3"):
        vlcache_jax.load("owner/name", cache=RTN(group=3))
    assert fetched
    assert not [pattern for pattern in fetched if "safetensors" in pattern]
    vlcache_jax.load("owner/name", cache=RTN(group=4), lazy=True)
    assert "*.safetensors" in fetched


def test_the_command_line_refuses_what_a_model_cannot_take(model_dir, monkeypatch):
    monkeypatch.setattr("vlcache_jax.loading.open_checkpoint", never)
    unfit = {"akvq": AKVQ(tsa_layers=(99,)), "4": RTN(bits=4, group=3)}
    monkeypatch.setattr("vlcache_jax.cache.quantizers.QUANTIZERS", unfit)
    for bits in unfit:
        program.refused("choose", "generate", model_dir, "--prompt", "x", "--kv-bits", bits)


def test_the_cache_that_a_model_is_loaded_with_is_its_calls_default(model_dir):
    vlm = vlcache_jax.load(model_dir, cache=VLCache(0.3, quantize=AKVQ()))
    assert vlm.transformed
    own = vlm.generate(text="a b c", max_new_tokens=1)
    assert (own.cache.label, own.cache.budget_requested) == ("vl-cache+akvq", "0.3")
    assert vlm.generate(text="a b c", max_new_tokens=1, cache="full").cache.label == "full"


# Lists


def test_lists_are_taken_where_tuples_are_meant():
    made = [
        (AKVQ(tsa_layers=[0, np.int64(1)]), AKVQ(tsa_layers=(0, 1))),
        (AKVQ(tsa_layers=range(2)), AKVQ(tsa_layers=(0, 1))),
        (Buckets(prompt=[64, 128], tiles=np.array([0, 5])), Buckets((64, 128), (0, 5))),
        (Generate(CONFIG, stop_ids=[2, 3]), Generate(CONFIG, stop_ids=(2, 3))),
        (TextConfig(eos_token_ids=[2]), TextConfig(eos_token_ids=(2,))),
        (
            LlavaConfig(
                "llava_next", VisionConfig(), TextConfig(), grid_pinpoints=[[1, 2], [3, 4]]
            ),
            LlavaConfig(
                "llava_next", VisionConfig(), TextConfig(), grid_pinpoints=((1, 2), (3, 4))
            ),
        ),
        (Calibration([0.1, 0.9]).text_shares, (0.1, 0.9)),
    ]
    for one, other in made:
        assert one == other
        assert hash(one) == hash(other)
    assert AKVQ(tsa_layers=[]).widths == (2,)


def test_a_list_is_part_of_a_programs_key(model_dir):
    vlm = vlcache_jax.load(model_dir)
    vlm.stop_ids = untyped([2])  # as a user sets it
    ask = {"text": "a b c", "max_new_tokens": 3, "stop": ["x"]}
    listed = vlm.generate(**ask, cache=VLCache(0.4, quantize=AKVQ(tsa_layers=[0])))
    known = len(vlm.programs)
    again = vlm.generate(**ask, cache=VLCache(0.4, quantize=AKVQ(tsa_layers=(0,))))
    assert listed.tokens == again.tokens
    assert len(vlm.programs) == known


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AKVQ(tsa_layers=["0"]), r"tsa_layers\[0\]='?0'? must be a whole number"),
        (lambda: AKVQ(tsa_layers=[0, 1.5]), r"tsa_layers\[1\]=1.5 must be a whole number"),
        (lambda: AKVQ(tsa_layers="01"), r"tsa_layers=01 must be a list of whole numbers"),
        (lambda: AKVQ(tsa_layers=3), r"tsa_layers=3 must be a list of whole numbers"),
        (lambda: AKVQ(tsa_layers=[True]), r"tsa_layers\[0\]=True must be a whole number"),
        (lambda: Buckets(["64"], [0, 5]), r"buckets for prompt\[0\]=64 must be a whole number"),
        (lambda: Buckets([64], 5), "buckets for tiles=5 must be a list"),
        (lambda: Generate(CONFIG, stop_ids=["</s>"]), r"stop_ids\[0\]=</s> must be a whole number"),
        (lambda: Generate(CONFIG, stop_ids=[-1]), r"stop_ids\[0\]=-1 must be at least 0"),
        (lambda: Generate(CONFIG, max_new_tokens=2.5), "max_new_tokens=2.5 must be a whole number"),
        (lambda: Generate(CONFIG, max_new_tokens="3"), "max_new_tokens=3 must be a whole number"),
        (lambda: TextConfig(eos_token_ids=2), "eos_token_ids=2 must be a list"),
        (
            lambda: LlavaConfig("llava_next", VisionConfig(), TextConfig(), grid_pinpoints=[1, 2]),
            r"grid_pinpoints=\[1, 2\] must be a list of pairs",
        ),
        (
            lambda: LlavaConfig("llava", VisionConfig(), TextConfig(), grid_pinpoints=[[1, "a"]]),
            r"grid_pinpoints\[0\]\[1\]=a must be a whole number",
        ),
        (lambda: Calibration(["much"]), "text share=much must be a number"),
        (lambda: Sampling(temperature="hot"), "temperature=hot must be a number"),
        (lambda: Sampling(temperature=[0.5]), r"temperature=\[0.5\] must be a number"),
        (lambda: Sampling(top_p=None), "top_p=None must be a number"),
        (lambda: Sampling(top_k=2.5), "top_k=2.5 must be a whole number"),
        (lambda: Sampling(top_k=[5]), r"top_k=\[5\] must be a whole number"),
        (lambda: Draws.of(Sampling(), 1.5, [0]), "seed=1.5 must be a whole number"),
        (lambda: RandomKV(seed=1.5), "seed=1.5 must be a whole number"),
    ],
)
def test_a_wrong_type_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as refused:
        make()
    one_line(refused, ())


def test_numbers_of_numpy_are_numbers():
    assert Sampling(np.float32(0.5), np.int64(3), np.float64(1)) == Sampling(0.5, 3, 1.0)
    assert Generate(CONFIG, max_new_tokens=np.int32(5)).num_chunks == 1
