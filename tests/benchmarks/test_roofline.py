"""The limit as arithmetic: the published tables of this project, and the command."""

import json
import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.models import MODELS, abstract_inputs
from benchmarks.roofline import (
    DEVICES,
    Work,
    decode_step,
    language_bytes,
    largest_batch,
    packing,
    prefill,
    scoring,
    sequence_bytes,
    tokens_per_second,
    vision_bytes,
)
from benchmarks.roofline.__main__ import main
from benchmarks.roofline.links import LINKS, Split
from benchmarks.roofline.packed import bits_of, quantized_rows, rows_by_width
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.packed import arrange
from vlcache_jax.cache.quantizers import AKVQ, KIVI, RTN
from vlcache_jax.results.report import kept_bytes

MISTRAL = MODELS["llava-v1.6-mistral-7b"]
VICUNA = MODELS["llava-1.5-7b"]
YI = MODELS["llava-v1.6-34b"]
H200 = DEVICES["h200"]
TWO_BIT = 2.5
"""Bits of a value with a scale and an offset for 64 of them."""

# One step on an H200: full cache → 10 %, in ms, and their ratio; † where the full cache does not
# fit. Columns: Mistral-7B, Vicuna-7B, Yi-34B.
DECODE = """
| 2k, 1 | 3.43→3.38 (1.02x) | 3.39→3.16 (1.07x) | 16.1→16.0 (1.01x) |
| 2k, 32 | 5.37→3.57 (1.50x) | 11.1→3.94 (2.83x) | 19.8→16.4 (1.21x) |
| 2k, 64 | 7.37→3.77 (1.95x) | 19.1→4.74 (4.04x) | 23.5→16.8 (1.40x) |
| 8k, 8 | 5.37→3.57 (1.50x) | 11.1→3.94 (2.83x) | 19.8→16.4 (1.21x) |
| 8k, 64 | 19.4→4.97 (3.89x) | 67.1→9.53 (7.04x)† | 46.0→19.0 (2.42x)† |
| 32k, 8 | 11.4→4.17 (2.72x) | 35.1→6.34 (5.54x)† | 31.0→17.5 (1.77x) |
| 128k, 1 | 7.37→3.77 (1.95x) | 19.1→4.74 (4.04x) | 23.5→16.8 (1.40x) |
"""

# Sequences in 139 GiB: full, 10 %, 10 % at 2 bit.
LARGEST = [
    (MISTRAL, 2, (463, 3028, 6299)),
    (MISTRAL, 8, (121, 1064, 3936)),
    (MISTRAL, 32, (30, 296, 1574)),
    (VICUNA, 2, (116, 762, 1586)),
    (VICUNA, 8, (30, 268, 991)),
    (VICUNA, 32, (7, 74, 396)),
    (YI, 8, (38, 334, 1236)),
]


def within_a_percent(value):
    return pytest.approx(value, rel=0.01)


def decode_table():
    cell = re.compile(r"([\d.]+)→([\d.]+) \(([\d.]+)x\)(†?)")
    for line in DECODE.split("\n")[1:-1]:
        thousands, batch = re.findall(r"(\d+)k, (\d+)", line)[0]
        cells = cell.findall(line)
        for model, (full, kept, ratio, dagger) in zip((MISTRAL, VICUNA, YI), cells, strict=True):
            shape = model, int(thousands) * 1024, int(batch)
            yield *shape, float(full), float(kept), float(ratio), not dagger


@pytest.mark.parametrize(
    ("config", "context", "batch", "full", "kept", "ratio", "fits"), list(decode_table())
)
def test_decode_steps_equal_the_table(config, context, batch, full, kept, ratio, fits):
    step = decode_step(config, context, batch).floor(H200)
    compressed = decode_step(config, context, batch, 0.1).floor(H200)
    assert 1e3 * step == within_a_percent(full)
    assert 1e3 * compressed == within_a_percent(kept)
    assert step / compressed == within_a_percent(ratio)
    assert (batch <= largest_batch(H200, config, context)) is fits


def test_a_decoder_alone_is_a_shape_too():
    llama = MODELS["llama-3.1-8b"]
    assert vision_bytes(llama) == 0
    assert language_bytes(llama) == 2 * 8_030_261_248  # as its model card counts
    assert abstract_inputs(llama, 2, 64).tiles.shape == (0, 3, 0, 0)
    same = replace(MISTRAL.text, rope=llama.text.rope)
    ours = replace(llama.text, vocab_size=32064, max_positions=32768, kind="mistral")
    assert ours == same  # but for its vocabulary it is Mistral, and a step reads the same bytes
    step, other = (decode_step(replace(c, text=same), 8192, 8) for c in (llama, MISTRAL))
    assert step.floor(H200) == other.floor(H200)


@pytest.mark.parametrize(("config", "thousands", "batches"), LARGEST)
def test_the_largest_batches_equal_the_table(config, thousands, batches):
    context = 1024 * thousands
    found = [
        largest_batch(H200, config, context, budget, bits)
        for budget, bits in ((1.0, 16.0), (0.1, 16.0), (0.1, TWO_BIT))
    ]
    assert found == [within_a_percent(batch) for batch in batches]


@pytest.mark.parametrize(("config", "thousands", "ratio"), [(MISTRAL, 32, 9.1), (VICUNA, 8, 8.4)])
def test_rates_at_the_largest_batch_equal_the_table(config, thousands, ratio):
    def rate(budget):
        batch = largest_batch(H200, config, 1024 * thousands, budget)
        return tokens_per_second(H200, config, 1024 * thousands, batch, budget)

    assert rate(0.1) / rate(1.0) == within_a_percent(ratio)


@pytest.mark.parametrize(
    ("config", "thousands", "seconds", "digits"),
    [(MISTRAL, 2, 0.038, 3), (MISTRAL, 8, 0.167, 3), (MISTRAL, 32, 0.94, 2), (YI, 2, 0.178, 3)],
)
def test_prefill_equals_the_table_in_its_digits(config, thousands, seconds, digits):
    assert round(prefill(config, 1024 * thousands).floor(H200), digits) == seconds


@pytest.mark.parametrize(("thousands", "percent"), [(2, 4), (8, 13), (32, 38), (128, 71)])
def test_the_share_of_attention_in_prefill_equals_the_table(thousands, percent):
    found = prefill(MISTRAL, 1024 * thousands)
    assert round(100 * found.parts["attention"].floor(H200) / found.floor(H200)) == percent


@pytest.mark.parametrize(("config", "full_bytes"), [(MISTRAL, 99e9), (VICUNA, 92e9)])
def test_from_which_cache_on_two_bit_allows_the_published_speedup(config, full_bytes):
    def speedup(share):
        context = round(share * full_bytes / sequence_bytes(config, 1))  # of one long sequence
        kept = decode_step(config, context, 1, 0.1, TWO_BIT)
        return decode_step(config, context).floor(H200) / kept.floor(H200)

    assert speedup(1.0) == within_a_percent(7.08)
    assert speedup(0.98) < 7.08 < speedup(1.02)


@pytest.mark.parametrize(
    ("config", "weights", "token"), [(MISTRAL, 14.5, 128), (VICUNA, 13.5, 512), (YI, 68.8, 240)]
)
def test_weights_and_bytes_of_a_token(config, weights, token):
    assert language_bytes(config) / 1e9 == within_a_percent(weights)
    assert sequence_bytes(config, 1) == token * 1024


def test_a_large_batch_is_bound_by_operations():
    parts = decode_step(MISTRAL, 2048, 1024).parts
    products, attention = parts["products"], parts["attention"]
    assert products.floor(H200) == products.operations / H200.flops
    assert attention.floor(H200) == attention.bytes / H200.bandwidth


def test_a_stage_is_its_parts_one_after_the_other():
    step = decode_step(MISTRAL, 8192, 64, 0.1, tail=128)
    assert step.bytes == sum(part.bytes for part in step.parts.values())
    assert step.floor(H200) > Work(step.bytes, step.operations).floor(H200) * (1 - 1e-9)
    tail = step.bytes - decode_step(MISTRAL, 8192, 64, 0.1).bytes
    assert tail == pytest.approx(64 * 128 * 128 * 1024)


def test_causal_attention_counts_the_entries_that_the_mask_leaves():
    one, text = prefill(MISTRAL, 3).parts["attention"], MISTRAL.text
    entries = 1 + 2 + 3
    assert one.operations == 4 * entries * text.num_layers * text.num_heads * text.head_dim


def test_scoring_by_hand():
    text, rows, kept = MISTRAL.text, 1000, 100
    found = scoring(MISTRAL, rows, 2, 0.1, window=10).parts
    heads, width = 2 * 32 * 8, text.head_dim * 2
    queries = 2 * 10 * 32 * 32 * width
    assert found["scores"].bytes == heads * rows * (width + 4) + queries
    entries = sum(range(991, 1001))
    assert found["scores"].operations == 2 * 2 * entries * 32 * 32 * text.head_dim
    assert found["selection"].bytes == heads * 4 * (rows + kept)
    assert found["compaction"].bytes == heads * kept * (4 + 4 * width)


def test_a_window_is_never_longer_than_the_prompt():
    assert scoring(MISTRAL, 8, window=50) == scoring(MISTRAL, 8, window=8)


def test_scoring_is_a_small_part_of_prefill():
    for thousands, bar in ((2, 0.03), (32, 0.005)):
        share = scoring(MISTRAL, 1024 * thousands).floor(H200)
        assert share < bar * prefill(MISTRAL, 1024 * thousands).floor(H200)


# Quantized caches.


@pytest.mark.parametrize(
    "quantizer",
    [AKVQ(recent=9, pivots=3, tsa_layers=(0, 1)), RTN(recent=7), KIVI(recent=5, group=16)],
)
def test_rows_of_each_width_are_those_of_the_librarys_arrangement(quantizer):
    """All text and every pivot kept, no pivot recent: what the count stands for."""
    rows, text = 96, 20
    visual, position = jnp.arange(rows) < rows - text, np.arange(rows)
    salience = jnp.where(jnp.arange(rows) < 3, 9.0, 1.0) * jnp.ones((1, 4, 1))
    for budget, lengths in ((0.5, np.array([40, 55, 62, 30])), (1.0, np.full(4, rows))):
        kept = (position < lengths[:, None] - text) | (position >= rows - text)
        prompt = Prompt(jnp.array([rows]), visual[None], 4, Budget.parse(budget).data)
        given = jnp.array(kept)[None, :, None], jnp.array(lengths)[None]
        found = arrange(quantizer, *given, prompt, salience, budget < 1)[1][0]
        expected = rows_by_width(quantizer, lengths, evicts=budget < 1, text=text)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(expected.sum(axis=-1), lengths)


def test_few_rows_are_all_of_full_width():
    found = rows_by_width(AKVQ(tsa_layers=(0,)), np.array([6, 9]), evicts=True)
    assert found.tolist() == [[0, 6, 0], [9, 0, 0]]  # text, and pivots


def test_a_tenth_in_two_bits_by_hand():
    """Recent rows, 15 pivots, and the rest at 2 bits with 32 of scale and shift for 128 values."""
    for context, kept, recent in ((4096, 410, 41), (8192, 819, 81), (32768, 3277, 327)):
        quantizer = AKVQ(tsa_layers=())
        rows = quantized_rows(MISTRAL.text, quantizer, context, 0.1)
        assert rows.tolist() == 32 * [[recent + 15, kept - recent - 15]]
        bits = ((recent + 15) * 16 + (kept - recent - 15) * 2.25) / kept
        assert bits_of(MISTRAL.text, quantizer, rows) == pytest.approx(bits)
        share = kept_bytes(MISTRAL.text, quantizer, rows, jnp.dtype(jnp.bfloat16)) / sequence_bytes(
            MISTRAL, context
        )
        assert share == pytest.approx(kept * bits / 16 / context)
        assert share <= 0.03
    whole = quantized_rows(MISTRAL.text, AKVQ(tsa_layers=()), 4096)
    assert whole.tolist() == 32 * [[143, 3953]]


def test_text_of_text_salient_layers_by_hand():
    rows = quantized_rows(VICUNA.text, AKVQ(tsa_layers=(0, 1)), 2048, 0.1)
    assert rows.tolist() == 2 * [[20, 30, 155]] + 30 * [[35, 0, 170]]
    whole = quantized_rows(VICUNA.text, AKVQ(tsa_layers=(0, 1), recent=30), 2048)
    assert whole[0].tolist() == [30, 20, 1998]
    kivi = quantized_rows(MISTRAL.text, KIVI(), 1000)
    assert kivi[0].tolist() == [136, 864]
    assert bits_of(MISTRAL.text, KIVI(), kivi) == pytest.approx((136 * 16 + 864 * 3) / 1000)


def test_bits_stand_for_sixteenths_whatever_the_type():
    rows = np.array([[10, 90]])
    config = replace(MISTRAL.text, num_layers=1)
    two, four = (bits_of(config, RTN(recent=10), rows, jnp.dtype(dtype))
                 for dtype in ("bfloat16", "float32"))  # fmt: skip
    assert two == pytest.approx((10 * 16 + 90 * 2.25) / 100)
    assert 2 * four == pytest.approx((10 * 32 + 90 * 2.25) / 100)


def test_packing_by_hand():
    work = packing(MISTRAL, 1000, 3, 2.25).parts["packing"]
    assert work == Work(3 * 1000 * 128 * 1024 * (1 + 2.25 / 16))


def test_tied_embeddings_are_multiplied_once_and_stored_once():
    small = replace(MISTRAL, text=replace(MISTRAL.text, num_layers=1))
    tied = replace(small, text=replace(small.text, tie_embeddings=True))
    table = small.text.vocab_size * small.text.hidden_size
    assert language_bytes(small) - language_bytes(tied) == 2 * table
    both = [decode_step(config, 10).operations for config in (small, tied)]
    assert both[0] == pytest.approx(both[1], rel=1e-4)


def test_a_model_that_does_not_fit_holds_no_sequence():
    assert largest_batch(DEVICES["a100"], YI, 2048) > 0
    assert largest_batch(replace(H200, memory=60e9), YI, 2048) == 0


# The command.


def run(*arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def printed(*arguments):
    done = run("--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_json_holds_every_stage_and_cache():
    found = printed("--context", "8192", "--batch", "64")
    names = ["full", "10 %"]
    assert [(row["stage"], row["cache"]) for row in found["rows"]] == [
        ("prefill", ""),
        ("scoring", "10 %"),
        *(("decode", name) for name in names),
    ]
    for row in found["rows"]:
        for field in ("bytes", "operations", "floor_s"):
            total = sum(part[field] for part in row["parts"].values())
            assert row[field] == pytest.approx(total, rel=1e-9, abs=2)
    full, kept = found["capacity"]
    assert [row["cache"] for row in found["capacity"]] == names
    assert (full["largest_batch"], kept["largest_batch"]) == (121, 1064)
    assert kept["speedup"] == within_a_percent(3.89)
    assert full["fits"] is True
    assert found["beyond_positions"] is False
    assert found["device"]["source"] == "measured"


def test_a_quantizer_stands_beside_both_caches():
    found = printed("--context", "32768", "--batch", "24", "--kv-bits", "akvq")
    names = ["full", "10 %", "full + akvq", "10 % + akvq"]
    assert [(row["stage"], row["cache"]) for row in found["rows"]] == [
        ("prefill", ""),
        ("scoring", "10 %"),
        ("packing", "full + akvq"),
        ("scoring", "10 % + akvq"),
        *(("decode", name) for name in names),
    ]
    by_name = {row["cache"]: row for row in found["capacity"]}
    assert list(by_name) == names
    both = by_name["10 % + akvq"]
    assert both["rows_by_bits"] == {"16": 342, "2": 2935}
    assert both["stored_bits"] == pytest.approx((342 * 16 + 2935 * 2.25) / 3277)
    assert by_name["full + akvq"]["rows_by_bits"] == {"16": 143, "2": 32625}
    assert by_name["full"]["rows_by_bits"] == {}
    bits = both["stored_bits"]
    assert both["largest_batch"] == largest_batch(H200, MISTRAL, 32768, 0.1, bits)
    assert both["largest_batch"] > by_name["10 %"]["largest_batch"]
    step = decode_step(MISTRAL, 32768, 24, 0.1, bits).floor(H200)
    assert both["speedup"] == pytest.approx(decode_step(MISTRAL, 32768, 24).floor(H200) / step)
    plain = printed("--kv-bits", "4", "--budget", "1")["capacity"]
    assert [(row["cache"], row["stored_bits"]) for row in plain] == [
        ("full", 16), ("full + 4", 4.25),
    ]  # fmt: skip


def test_a_context_beyond_the_positions_is_marked():
    found = printed("--model", "llava-1.5-7b", "--context", "8192", "--batch", "64")
    assert found["beyond_positions"] is True
    assert [row["fits"] for row in found["capacity"]] == [False, True]


def test_the_full_cache_alone_has_no_scoring():
    found = printed("--budget", "1")
    assert [row["stage"] for row in found["rows"]] == ["prefill", "decode"]
    assert len(found["capacity"]) == 1


def test_the_file_is_written_and_not_overwritten(tmp_path):
    out = tmp_path / "limit.json"
    found = printed("--out", str(out))
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert {"commit", "command", "date", "machine", "versions", "device", "rows"} <= found.keys()
    plot = tmp_path / "limit.svg"
    printed("--plot", str(plot), "--kv-bits", "akvq", "--batch", "24")
    drawn = plot.read_bytes()
    assert b"10 % + akvq" in drawn
    assert b"does not fit" in drawn
    for option, file in (("--out", out), ("--plot", plot)):
        refused = run(option, str(file))
        assert refused.exit_code == 2
        assert "--force" in refused.output
    printed("--plot", str(plot), "--kv-bits", "akvq", "--batch", "24", "--force")
    assert plot.read_bytes() == drawn


def test_the_tables_name_the_numbers():
    shown = run("--context", "8192", "--batch", "64", "--kv-bits", "akvq")
    assert shown.exit_code == 0
    for text in ("NVIDIA H200 (measured", "4.967 ms", "3.90x", "1,064", "10 % + akvq"):
        assert text in shown.output


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--device", "b9000", "h200"),
        ("--model", "gpt", "llava-1.5-7b"),
        ("--budget", "0", "budget"),
        ("--budget", "1.5", "budget"),
        ("--kv-bits", "3", "akvq"),
        ("--context", "0", "context"),
    ],
)
def test_bad_input_is_refused(option, value, word):
    done = run(option, value)
    assert done.exit_code == 2
    assert word in done.output


H100 = DEVICES["h100"]


@pytest.mark.parametrize(
    ("model", "devices", "parts"),
    [("llava-v1.6-34b", 2, 2), ("llava-v1.6-34b", 4, 4), ("qwen2.5-vl-72b", 4, 4),
     ("qwen2.5-vl-72b", 8, 8), ("qwen2.5-vl-7b", 7, 1)],
)  # fmt: skip
def test_a_step_on_several_devices_by_hand(model, devices, parts):
    config, context, batch = MODELS[model], 8192, 8
    text, split = config.text, Split(config, devices, LINKS["nvlink"])
    read = split.read(context, batch, 0.1, 16)
    assert read["weights"] * devices == pytest.approx(language_bytes(config))
    own = 2 * 2 * text.num_layers * text.num_kv_heads // parts * text.head_dim
    assert read["caches"] == pytest.approx(batch * 0.1 * context * own)
    assert split.collectives == 2 * text.num_layers + 2
    residual, logits = 2 * batch * text.hidden_size, 4 * batch * text.vocab_size
    others = (devices - 1) / devices
    sent = others * (2 * (2 * text.num_layers + 1) * residual + logits)
    assert split.sent(batch) == pytest.approx(sent)
    floor = sum(read.values()) / H100.bandwidth + sent / 450e9
    assert split.floor(H100, context, batch, 0.1, 16) == pytest.approx(floor)


def test_models_that_one_device_cannot_hold():
    for model, fewest in (("llava-v1.6-34b", 2), ("qwen2.5-vl-72b", 4)):
        alone = largest_batch(H100, MODELS[model], 8192)
        full, tenth = (
            Split(MODELS[model], fewest, LINKS["nvlink"]).largest_batch(H100, 8192, budget, 16)
            for budget in (1, 0.1)
        )
        assert tenth > 8 * full > 8 * 5 * alone
    one = Split(YI, 1, LINKS["nvlink"])
    assert one.largest_batch(H100, 2048, 0.1, 16) == largest_batch(H100, YI, 2048, 0.1)
    assert one.floor(H100, 2048, 8, 1, 16) == decode_step(YI, 2048, 8).bytes / H100.bandwidth
    assert (one.sent(8), one.collectives) == (0, 0)


def test_the_command_tells_of_several_devices():
    given = ["--model", "llava-v1.6-34b", "--device", "h100", "--devices", "2"]
    told = run(*given, "--link", "infiniband", "--json")
    rows = json.loads(told.stdout)["split"]
    assert [row["cache"] for row in rows] == ["full", "10 %"]
    assert rows[0]["largest_batch"] < rows[1]["largest_batch"]
    assert "InfiniBand NDR, 50 GB/s" in run(*given, "--link", "infiniband").stdout
    refused = run("--devices", "5")
    assert refused.exit_code == 2
    assert "model=1, 2, 4 fits" in " ".join(refused.output.split())
    assert run("--link", "string").exit_code == 2
