"""The speed benchmark times the real programs, and sets them beside the right limits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import measure
from benchmarks.models import WINDOW
from benchmarks.roofline import DEVICES, Device, Stage, Work
from benchmarks.speed import __main__ as command
from benchmarks.speed import cases, limit, presets
from benchmarks.speed.cases import FULL, Case, name_of, paper_sparsity
from benchmarks.speed.decoding import (
    CHUNKS,
    Decoding,
    decode_rows,
    random_pool,
    random_rows,
    random_scales,
    random_words,
)
from benchmarks.speed.options import variants_of
from benchmarks.speed.prompts import answer_rows, method_work, prefill_rows
from benchmarks.speed.rows import cache_of, described, row_of
from pallas_kernels.packing import split_affine
from tests.tiny import tiny_config
from vlcache_jax.cache.methods import METHODS, FullCache, VLCache
from vlcache_jax.cache.packed import PackedPool
from vlcache_jax.cache.quantizers import AKVQ, RTN
from vlcache_jax.cache.state import Pool
from vlcache_jax.models.families import init_params
from vlcache_jax.running.stages import DecodeState

TENTH = VLCache(0.1)
PACKED = VLCache(0.1, quantize=AKVQ())
WHOLE = FullCache(quantize=AKVQ(recent=8))
DEVICE = Device("test", 1e9, 1e10, 1e9, "given")


DEEP = tiny_config("llava", max_positions=128)
FLAT = dataclasses.replace(DEEP, text=dataclasses.replace(DEEP.text, num_layers=1))
SHAPES = {"tiny": FLAT, "demo-small": FLAT, "deep": DEEP}


@pytest.fixture
def tiny(monkeypatch):
    """A model of one layer, which compiles fast."""
    for module in (cases, command):
        monkeypatch.setattr(module, "models", lambda: SHAPES)
    return Case("tiny", 96, 2, new_tokens=6, chunk=2)


@pytest.fixture(scope="module")
def params():
    return init_params(SHAPES["tiny"])


def test_sizes_of_the_paper_vary_and_fit_the_pool():
    case = Case("llava-v1.6-mistral-7b", 2048, 3)
    lengths = np.asarray(case.lengths(TENTH))
    text = case.config.text
    assert lengths.shape == (3, text.num_layers)
    assert (lengths.sum(axis=1) <= TENTH.limit.capacity(text.num_layers, 2048)).all()
    assert abs(lengths.mean() / 2048 - 0.1) < 0.01
    assert (lengths[:, :2].min(axis=1) > 2 * lengths[:, 2:].mean(axis=1)).all()
    assert len(np.unique(lengths[:, 5])) > 1  # every prompt has its own
    assert (np.asarray(case.lengths(FULL)) == 2048).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 32])
def test_sparsity_is_within_what_the_paper_reports(layers):
    found = paper_sparsity(4, layers)
    assert found.shape == (4, layers)
    assert (found >= 0.70).all()
    assert (found <= 0.99).all()


def test_positions_beyond_the_models_are_marked():
    assert not Case("llava-1.5-7b", 2048).synthetic_positions
    long = Case("llava-1.5-7b", 32768)
    assert long.synthetic_positions
    assert long.config.text.max_positions == long.context + long.new_tokens


def test_prompts_end_in_the_papers_window(tiny):
    inputs = tiny.inputs()
    visual = inputs.visual_index >= 0
    assert (visual.sum(axis=1) == tiny.context - WINDOW).all()
    assert inputs.tiles.shape[0] == 0
    pictured = dataclasses.replace(tiny, images=True).inputs(seed=1, length=80)
    rows = pictured.tiles.shape[0] * tiny.config.vision.num_patches
    assert pictured.tiles.shape[0] == tiny.batch
    assert pictured.visual_index.max() < rows
    assert (pictured.length == 80).all()
    assert (pictured.visual_index[:, 80 - WINDOW :] == -1).all()


def test_rows_are_random_and_of_variance_one():
    rows = np.asarray(random_rows(0, (2, 3, 500, 8), "float32"))
    assert abs(rows.var() - 1) < 0.05
    assert len(np.unique(rows)) > 0.99 * rows.size


@pytest.mark.full
def test_what_is_timed_are_the_tokens_of_generate(tiny):
    """A chunk after a chunk from one cache of two layers, whatever ran before."""
    params = init_params(DEEP)
    decoding = Decoding(dataclasses.replace(tiny, model="deep"), TENTH, params)
    stages, pool = decoding.generate.stages, decoding.pool
    first = decoding.run(1)
    state: DecodeState = decoding.start()
    tokens = []
    for _ in range(CHUNKS[-1] * tiny.chunk):
        state, _ = jax.jit(stages.decode_step)(params, pool, state)
        tokens.append(state.token)
    expected = np.stack(tokens, axis=1)
    last = decoding.run(CHUNKS[-1])
    np.testing.assert_array_equal(first, expected[:, : tiny.chunk])
    np.testing.assert_array_equal(last, expected[:, -tiny.chunk :])
    decoding.check()
    assert decoding.programs() == 1


def test_a_step_that_writes_nothing_finite_is_found(tiny, params):
    decoding = Decoding(tiny, TENTH, params)
    assert isinstance(decoding.pool, Pool)
    spoilt = dataclasses.replace(decoding.pool, v=jnp.full_like(decoding.pool.v, jnp.nan))
    decoding.pool = spoilt
    with pytest.raises(ArithmeticError, match="not finite"):
        decoding.check()


def test_a_steps_work_is_that_of_the_rows_kept(tiny, params):
    decoding = Decoding(tiny, TENTH, params)
    text, item = tiny.config.text, 4
    row = 2 * text.num_kv_heads * text.head_dim * item
    tail = (CHUNKS[0] + CHUNKS[1]) * tiny.chunk / 2 + 0.5
    kept = int(decoding.pool.length.sum()) + tiny.batch * text.num_layers * round(tail)
    assert decoding.work.parts["attention"].bytes == pytest.approx(kept * row)
    own = {name: part for name, part in params.items() if name in ("embed", "layers", "head")}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(own))
    assert decoding.work.parts["products"].bytes == weights


def test_words_and_scales_are_random_and_small():
    words = np.asarray(random_words(0, (2, 2, 50, 8)))
    assert len(np.unique(words)) > 0.99 * words.size
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.02
    scale, shift = split_affine(random_scales(0, (2, 2, 1, 800), 2))
    assert (np.asarray(scale) > 0).all()
    ends = np.stack([shift, shift + 3 * scale])
    assert (np.abs(ends) >= 0.49).all()
    assert (np.abs(ends) <= 1.02).all()


@pytest.mark.parametrize("variant", [PACKED, WHOLE], ids=str)
def test_a_packed_pool_holds_the_rows_of_each_width(tiny, variant):
    case = dataclasses.replace(tiny, model="deep", context=240)
    pool, counts = random_pool(case, variant), case.rows_by_width(variant)
    assert isinstance(pool, PackedPool)
    np.testing.assert_array_equal(pool.counts, counts)
    np.testing.assert_array_equal(counts.sum(axis=-1), case.lengths(variant))
    assert pool.quantizer.widths == (4, 2)  # the decoder has text-salient layers
    assert counts[..., 1].any()  # text of 4 bits
    shapes = variant.for_model(case.config.text).pool_shapes(
        case.config.text, case.batch, case.context, jnp.dtype("float32")
    )
    assert jax.tree.map(lambda x: x.shape, pool) == jax.tree.map(lambda x: x.shape, shapes)
    # Runs follow each other, and end inside of the pool.
    words = -(-counts[..., 1:] // np.array([8, 16]))
    ends = np.cumsum(words.reshape(2, -1), axis=1)
    np.testing.assert_array_equal(
        np.asarray(pool.first).reshape(2, -1), ends - words.reshape(2, -1)
    )
    assert ends.max() <= pool.words_k.shape[2]
    dense = np.asarray(pool.dense.offset + pool.dense.length)
    assert dense.max() <= pool.dense.k.shape[2]


def test_a_packed_steps_work_is_that_of_its_bytes(tiny, params):
    """Rows of full width in float32, codes, and a word of scale and shift for each row and head."""
    decoding, text = Decoding(tiny, PACKED, params), tiny.config.text
    dense, four, two = np.asarray(decoding.pool.counts).sum(axis=(0, 1))
    heads, size = text.num_kv_heads, text.head_dim
    row = 2 * heads * size
    tail = tiny.batch * text.num_layers * round((CHUNKS[0] + CHUNKS[1]) * tiny.chunk / 2 + 0.5)
    kept = dense * row * 4 + (four * row // 2 + two * row // 4) + (four + two) * 2 * heads * 4
    assert decoding.work.parts["attention"].bytes == pytest.approx(kept + tail * row * 4)
    share = kept / (tiny.batch * text.num_layers * tiny.context * row * 4)
    assert decoding.kept["kept_bytes_share"] == pytest.approx(share)


def test_what_packing_adds_to_a_prefill(tiny):
    text = tiny.config.text
    whole = tiny.batch * tiny.context * text.num_layers * 2 * text.num_kv_heads * text.head_dim * 2
    (packing,) = method_work(tiny, WHOLE).parts.values()
    assert packing.bytes == pytest.approx(whole * (1 + tiny.stored_bits(WHOLE) / 16))
    plain, packed = (method_work(tiny, variant).parts for variant in (TENTH, PACKED))
    assert packed["scores"] == plain["scores"]
    assert packed["compaction"].bytes < plain["compaction"].bytes


def test_packed_rows_stand_beside_the_full_cache(tiny, params):
    full, packed = decode_rows(tiny, (FULL, PACKED), params, DEVICE, measure.DRY)
    assert (packed["method"], packed["kv_bits"]) == ("vl-cache+akvq", "akvq")
    assert packed["programs"] == 1
    assert packed["ideal_speedup"] == pytest.approx(full["floor_s"] / packed["floor_s"])
    assert packed["kept_bytes_share"] == packed["kept_share"] * packed["stored_bits"] / 16
    assert packed["kept_bytes_share"] < packed["kept_share"]
    assert (full["stored_bits"], full["kept_bytes_share"]) == (16, 1)


def test_quantizers_of_methods_and_of_the_full_cache():
    found = variants_of(["vl-cache", "full"], ["0.1", "0.2"], kv_bits=["16", "akvq", "2"])
    assert list(map(name_of, found)) == [
        "full", "full+akvq", "full+2",
        "vl-cache 0.1", "vl-cache+akvq 0.1", "vl-cache+2 0.1",
        "vl-cache 0.2", "vl-cache+akvq 0.2", "vl-cache+2 0.2",
    ]  # fmt: skip
    assert [variant.is_full for variant in found[:3]] == [True, False, False]
    case = Case("llava-v1.6-mistral-7b", 2048)
    shown = [cache_of(described(case, variant)) for variant in found[:6]]
    assert shown[:3] == ["full", "full+akvq", "full+rtn 2"]
    assert shown[3:] == ["vl-cache 0.1", "vl-cache+akvq 0.1", "vl-cache+rtn 2 0.1"]
    assert cache_of({"method": "vl-cache", "budget": "0.1"}) == "vl-cache 0.1"  # an older file's
    assert list(map(name_of, variants_of(None, None))) == [name_of(FULL), name_of(TENTH)]
    assert found[2].quantize == RTN(bits=2, transform=True)


def test_decode_rows_stand_beside_the_full_cache(tiny, params):
    rows = decode_rows(tiny, (FULL, TENTH), params, DEVICE, measure.DRY)
    full, tenth = rows
    steps = (CHUNKS[1] - CHUNKS[0]) * tiny.chunk
    for row in rows:
        assert row["programs"] == 1
        assert row["share"] is None  # so small a model stays in the processor's cache
        short, long = row["program_samples"]["seconds"]
        assert row["samples"] == [(b - a) / steps for a, b in zip(short, long, strict=True)]
    assert tenth["speedup"] == pytest.approx(full["seconds"] / tenth["seconds"])
    assert tenth["ideal_speedup"] == pytest.approx(full["floor_s"] / tenth["floor_s"])
    assert full["kept_share"] == 1
    assert 0.05 < tenth["kept_share"] < 0.15
    assert "speedup" not in full


def test_what_does_not_fit_says_so_and_the_others_run(tiny, params, monkeypatch):
    original = Decoding.__init__

    def init(self, case, variant, params):
        if variant == FULL:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        original(self, case, variant, params)

    monkeypatch.setattr(Decoding, "__init__", init)
    full, tenth = decode_rows(tiny, (FULL, TENTH), params, DEVICE, measure.DRY)
    assert full["exception"].startswith("RuntimeError: RESOURCE_EXHAUSTED")
    assert "seconds" not in full
    assert tenth["seconds"]
    assert "speedup" not in tenth


def test_stages_with_a_prompt(tiny, params):
    prefilled = prefill_rows(tiny, (FULL, TENTH), params, DEVICE, measure.DRY)
    assert [(row["stage"], row["method"]) for row in prefilled] == [
        ("prefill", "full"),
        ("prefill", "vl-cache"),
        ("method", "vl-cache"),
    ]
    assert all(row["programs"] == 1 for row in prefilled if row["stage"] == "prefill")
    added = prefilled[2]
    pairs = zip(prefilled[1]["samples"], prefilled[0]["samples"], strict=True)
    assert added["samples"] == [with_it - without for with_it, without in pairs]
    full, tenth = answer_rows(tiny, (FULL, TENTH), params, DEVICE, measure.DRY)
    assert full["programs"] == tenth["programs"] == 1
    assert full["new_tokens"] == tiny.new_tokens
    assert full["floor_s"] > tenth["floor_s"]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_every_method_has_sizes(tiny, name):
    lengths = np.asarray(tiny.lengths(METHODS[name](budget=0.3)))
    assert lengths.min() >= 1
    assert abs(lengths.mean() / tiny.context - 0.3) < 0.05


def test_bytes_of_another_type():
    stage = limit.in_type(Stage({"it": Work(100, 7)}), "float32")
    assert stage.parts["it"] == Work(200, 7)
    assert limit.in_type(stage, "bfloat16") == stage


def test_the_device_is_measured():
    found, rows = limit.measured("float32", measure.DRY)
    assert found.bandwidth == max(row["per_s"] for row in rows if row["name"] != "product")
    assert found.flops == next(row["per_s"] for row in rows if row["name"] == "product")
    assert "this run" in found.source
    assert all(row["samples"] and row["amount"] > 0 for row in rows)


def test_shares_are_of_what_memory_must_move(tiny):
    timing = measure.Timing([2.0, 4.0, 2.0], 1.0, 1, 1)
    for work, share in (
        (Work(1e9), 0.5),
        (Work(1e7), None),  # may come from the processor's cache
        (Work(1e7, 1e10), 0.5),
    ):
        row = row_of("decode", tiny, TENTH, timing, Stage({"it": work}), DEVICE)
        assert row["share"] == share
        assert row["floor_s"] == work.floor(DEVICE)


def test_differences_are_taken_sample_by_sample():
    longer = measure.Timing([5.0, 9.0, 7.0], 1.0, 1, 1)
    shorter = measure.Timing([1.0, 3.0, 2.0], 2.0, 1, 1)
    found = measure.difference(longer, shorter, 2)
    assert found.samples == [2.0, 3.0, 2.5]
    assert found.seconds == 2.5
    assert found.compile_s == 2.0


def test_the_cpus_preset_is_of_the_size_that_is_asked_for():
    case = presets.cpu_case("float32")
    text = case.config.text
    assert case.batch >= 8
    assert case.context == 8192
    assert text.num_kv_heads * text.head_dim >= 512
    assert not case.synthetic_positions or case.context == 8192
    summary = presets.cpu_summary(case, [{"speedup": 3.0}])
    weights, cache = summary["weight_bytes"], summary["cache_bytes"]
    assert cache >= 4 * weights
    assert summary["ideal"] == pytest.approx((weights + cache) / (weights + 0.1 * cache))
    assert summary["share"] == pytest.approx(3.0 / summary["ideal"])
    # Both pools, weights, and as much again for what is made on the way: well below 12 GB.
    assert 2 * (1.12 * cache + weights) < 4e9


def test_the_papers_rows_stand_beside_ours_and_the_ideal():
    found = presets.paper_cases("bfloat16", 1, [], [])
    assert list(found) == [(1, 2048), (1, 32768), (1, 131072), (4, 32768), (64, 2048)]
    assert all(case.model == presets.PAPER_MODEL for case in found.values())
    (key,) = presets.paper_cases("bfloat16", 1, [32768], [4])
    assert key == (4, 32768)
    size = {"context": 131072, "batch": 1}
    rows = [{**size, "stage": "decode", "method": "vl-cache", "speedup": 4.2}]
    h200 = DEVICES["h200"]
    ratios = {row["stage"]: row for row in presets.paper_ratios(found, rows, h200)}
    assert ratios["decode"]["paper"] == 7.08
    assert ratios["decode"]["ours"] == 4.2
    assert ratios["decode"]["ideal"] == pytest.approx(1.95, abs=0.01)  # of the roofline's table
    assert ratios["prefill"]["ours"] is None
    assert 0.97 < ratios["prefill"]["ideal"] < 1
    assert 1 < ratios["end-to-end"]["ideal"] < 1.95


@pytest.fixture
def invoke(tiny, monkeypatch):
    monkeypatch.setattr(limit, "measured", lambda *_: (DEVICE, []))
    app = typer.Typer()
    app.command()(command.main)
    return lambda *arguments: CliRunner().invoke(app, [str(x) for x in arguments])


def test_the_command_prints_json_alone_and_writes_the_same(invoke, tmp_path):
    out = tmp_path / "speed.json"
    found = invoke(
        "--model", "tiny", "--context", "128", "--stage", "decode", "--repeats", "2",
        "--json", "--out", out,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert [row["method"] for row in result["rows"]] == ["full", "vl-cache"]
    assert [row["synthetic_positions"] for row in result["rows"]] == [True] * 2
    assert {"commit", "command", "versions", "date", "device", "XLA_FLAGS", "limit"} <= set(result)
    assert json.loads(out.read_text())["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model", "gpt"),
        ("--stage", "sleep"),
        ("--preset", "fast"),
        ("--method", "magic"),
        ("--budget", "-1"),
        ("--kv-bits", "3"),
        ("--dtype", "int8"),
    ],
)
def test_bad_input_is_refused(invoke, option, value):
    found = invoke(option, value)
    assert found.exit_code == 2
    assert value.lstrip("-") in found.output
