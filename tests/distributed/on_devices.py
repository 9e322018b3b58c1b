"""Tests on eight devices that are all this machine's CPU; `test_meshes.py` starts them."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

import vlcache_jax
from benchmarks.hlo import parse
from tests.model_files import config_json, write_tiny
from tests.tiny import picture, tiny_pinpoints, tiny_processor
from vlcache_jax import AKVQ, KIVI, RTN, VLCache
from vlcache_jax.cache.methods import METHODS
from vlcache_jax.serving import Engine, SlotGroup

PICTURES = [picture(80, 60, 1), picture(56, 100, 2), None]
TEXTS = ["What is it?", "And this, in a few words?", "One without a picture"]
MESHES = ("model=8", "model=4,data=2", "model=2,data=4", "data=8")
NEW = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory of a tiny model, by its query and kv heads; widths that nothing divides."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def of(heads, kv_heads, tied=False):
        name = f"{heads}_{kv_heads}_{tied}"
        if name not in made:
            config = config_json(heads=heads, kv_heads=kv_heads, tied=tied)
            text = {"vocab_size": 269, "max_position_embeddings": 1024, "intermediate_size": 41}
            config["text_config"] |= text | {"head_dim": 8}
            config["vision_config"] |= {"image_size": 56}
            config["image_grid_pinpoints"] = [list(pair) for pair in tiny_pinpoints()]
            made[name] = write_tiny(folder / name, config, tiny_processor("llava_next"))
        return made[name]

    return of


@pytest.fixture(scope="module")
def loaded(models):
    """A model on a mesh; each is loaded once."""
    made = {}

    def of(heads, kv_heads, mesh=None, **more):
        key = heads, kv_heads, mesh, *more.items()
        if key not in made:
            made[key] = vlcache_jax.load(models(heads, kv_heads, **more), mesh=mesh)
        return made[key]

    return of


def tokens(vlm, **options):
    answers = vlm.generate(PICTURES, TEXTS, max_new_tokens=NEW, **options)
    return [(answer.tokens, answer.cache.layer_budgets) for answer in answers]


@pytest.fixture(scope="module")
def alone(loaded):
    """The answers of one device, made once."""
    made = {}

    def of(heads, kv_heads, **options):
        key = heads, kv_heads, repr(options)
        if key not in made:
            made[key] = tokens(loaded(heads, kv_heads), **options)
        return made[key]

    return of


def check(loaded, alone, heads, kv_heads, mesh, **options):
    expected = alone(heads, kv_heads, **options)
    assert len({tuple(each) for each, _ in expected}) > 1
    found = tokens(loaded(heads, kv_heads, mesh), **options)
    assert found == expected


def test_a_mesh_of_both_axes_gives_the_tokens_of_one_device(loaded, alone):
    check(loaded, alone, 8, 2, "model=4,data=2", cache=VLCache(0.2))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "vl-cache"])
def test_every_method(loaded, alone, name):
    check(loaded, alone, 8, 2, "model=4,data=2", cache=name)


@pytest.mark.parametrize(
    "cache",
    [AKVQ(), KIVI(), VLCache(0.3, quantize=RTN(bits=4)), VLCache(0.3, shared_heads=True)],
    ids=lambda cache: getattr(cache, "label", None) or cache.name,
)
def test_every_quantizer_and_shared_heads(loaded, alone, cache):
    check(loaded, alone, 8, 2, "model=4,data=2", cache=cache)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_every_mesh_and_number_of_kv_heads(loaded, alone, kv_heads, mesh):
    check(loaded, alone, 8, kv_heads, mesh, cache=VLCache(0.2))


@pytest.mark.parametrize("kv_heads", [1, 7])
def test_seven_devices(loaded, alone, kv_heads):
    check(loaded, alone, 7, kv_heads, "model=7", cache=VLCache(0.2))


def test_a_tied_head_is_split_with_the_embedding(loaded):
    plain, mesh = (loaded(8, 2, mesh, tied=True) for mesh in (None, "model=4"))
    assert tokens(mesh) == tokens(plain)


@pytest.mark.parametrize("folder", ["onevision_dir", "qwen_dir", "qwen3_dir", "text_dir"])
def test_every_family(folder, request):
    path, found = request.getfixturevalue(folder), []
    shown = None if folder == "text_dir" else PICTURES
    for mesh in (None, "model=2,data=2"):
        vlm = vlcache_jax.load(path, mesh=mesh)
        answers = vlm.generate(shown, TEXTS, max_new_tokens=NEW, cache=VLCache(0.3))
        found.append([(answer.tokens, answer.cache.layer_budgets) for answer in answers])
    assert found[0] == found[1]


def test_draws_traces_and_parts(loaded):
    plain, mesh = (loaded(8, 2, mesh) for mesh in (None, "model=4,data=2"))
    drawn = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 3}
    assert tokens(mesh, **drawn) == tokens(plain, **drawn)
    parts = {"cache": "h2o", "prefill_chunk": 64}
    assert tokens(mesh, **parts) == tokens(plain, **parts)
    one, other = (
        vlm.generate(PICTURES[0], TEXTS[0], cache=VLCache(0.2), max_new_tokens=2, trace=True).trace
        for vlm in (plain, mesh)
    )
    for field in ("kept", "budget", "hit_rate", "mass_recall", "scores", "sparsity"):
        own, expected = getattr(mesh_trace := other, field), getattr(one, field)
        np.testing.assert_allclose(own, expected, rtol=2e-5, atol=2e-5, err_msg=field)
    assert mesh_trace.tau == one.tau


def test_a_score_of_ones_own(loaded, alone):
    """A function is shown the heads of its device."""

    def first(layer):
        return layer.k[..., 0].swapaxes(1, 2)

    cache = vlcache_jax.Custom(0.3, score=first)
    check(loaded, alone, 8, 4, "model=4,data=2", cache=cache)


def test_kernels_run_on_each_device(models):
    answers = []
    for mesh in (None, "model=2,data=2"):
        vlm = vlcache_jax.load(models(8, 2), mesh=mesh, backend="triton")
        made = vlm.generate(text=TEXTS[:2], max_new_tokens=3, cache=VLCache(0.5))
        answers.append([answer.tokens for answer in made])
    assert answers[0] == answers[1]


def test_every_device_holds_its_part(loaded):
    """Of what is split: no device has it whole, and none has more than the others."""
    mesh = loaded(8, 4, "model=4,data=2")
    layer, cache = mesh.params["layers"][0], mesh.session(PICTURES[0])._prefix.all_rows[False]
    arrays = [layer[name] for name in ("qkv", "out", "gate_up", "down")]
    for array in (*arrays, mesh.params["embed"]["embedding"], *cache.buffers):
        sizes = {shard.data.nbytes for shard in array.addressable_shards}
        assert sizes == {array.nbytes // 4}


@pytest.mark.parametrize("store", ["device", "host", "8"])
def test_a_session(loaded, store, tmp_path):
    found = []
    for mesh in (None, "model=4,data=2"):
        session = loaded(8, 2, mesh).session(PICTURES[0], store=store, cache=VLCache(0.3))
        own = [session.ask(text, max_new_tokens=NEW).tokens for text in TEXTS[:2]]
        session.save(tmp_path / f"{mesh}.safetensors")
        found.append(own)
    assert found[0] == found[1]
    if store == "device":  # a file of one is opened by the other
        again = loaded(8, 2, "model=4,data=2").open_session(tmp_path / "None.safetensors")
        once = loaded(8, 2).open_session(tmp_path / "model=4,data=2.safetensors")
        third = [each.ask(TEXTS[2], max_new_tokens=NEW).tokens for each in (again, once)]
        assert third[0] == third[1]


@pytest.mark.parametrize("mesh", ["model=4", "model=4,data=2"])
def test_the_engine(loaded, mesh):
    vlm = loaded(8, 2, mesh)
    groups = [SlotGroup(2, NEW, 0.3)]
    with Engine(vlm, ["vl-cache"], groups, prompt_rows=512, prefill_chunk=64) as engine:
        engine.warm_up()
        options = {"cache": VLCache(0.3), "max_new_tokens": NEW}
        made = [vlm.request(*each, **options) for each in zip(PICTURES, TEXTS, strict=True)]
        found = [ticket.answer.tokens for ticket in [engine.submit(each) for each in made]]
    plain = loaded(8, 2)
    for own, image, text in zip(found, PICTURES, TEXTS, strict=True):
        assert own == plain.generate(image, text, **options).tokens


def test_an_evaluation(loaded):
    plain, mesh = (
        vlcache_jax.evaluate(
            loaded(8, 2, mesh),
            [{"images": PICTURES[0], "text": TEXTS[0]}],
            [VLCache(0.2), VLCache(0.3, quantize=RTN(bits=4))],
            max_new_tokens=NEW,
        )
        for mesh in (None, "model=4")
    )
    for one, other in zip(plain.settings, mesh.settings, strict=True):
        assert (one.top1, one.kept_share) == (other.top1, other.kept_share)
        assert other.kl == pytest.approx(one.kl, abs=1e-4)


def exchanged(text):
    """The collectives of a program: kind, and elements of each array that XLA has put together."""
    kinds = "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"
    return [
        (line.opcode.removesuffix("-start"), *line.sizes)
        for computation in parse(text).values()
        for line in computation.values()
        if line.opcode.removesuffix("-start") in kinds
    ]


@pytest.fixture(scope="module")
def programs(models):
    """The collectives of each program of a prompt and its answer, by the program's name."""
    vlm = vlcache_jax.load(models(8, 2), mesh="model=4,data=2")
    tokens(vlm, cache=VLCache(0.2))
    compiled: Any = vlm.programs._compiled
    return {name[1]: exchanged(program.as_text()) for (name, *_), (program, _) in compiled.items()}


WIDTH, LAYERS, ROWS = 64, 2, 2
"""Of the model: its residual stream, and the sequences of each device."""


def test_what_crosses_the_devices_in_decoding(programs):
    """Two of the residual stream for each layer, one for the embedding, and the logits."""
    residual = ("all-reduce", ROWS * WIDTH)
    expected = [("all-gather", ROWS * 272)] + [residual] * (2 * LAYERS + 1)
    assert sorted(programs["decode_chunk"]) == expected


def test_what_crosses_the_devices_in_front_of_it(programs):
    """The same of the prompt's rows; of the cache, scores of heads that are shared, and counts."""
    assert programs["build_cache"] == [("all-reduce", ROWS * LAYERS)]
    assert programs["start"] == []
    found = Counter((kind, size) for kind, *sizes in programs["prefill"] for size in sizes)
    gathered = {size: n for (kind, size), n in found.items() if kind == "all-gather"}
    reduced = {size: n for (kind, size), n in found.items() if kind == "all-reduce"}
    # The table of visual rows, each device having run some of the tiles, and the logits.
    assert len(found) == len(gathered) + len(reduced)
    assert list(gathered.values()) == [1, 1]
    assert min(gathered) == ROWS * 272
    # Of each layer the sum over a group's heads, [B, K, T], and the mean sparsity, [B].
    *others, residual = sorted(reduced)
    assert others == [ROWS, residual // WIDTH]
    assert [reduced[size] for size in sorted(reduced)] == [LAYERS, LAYERS, 2 * LAYERS + 1]
