"""What docs/benchmarks.md and the README say of result files."""

import pytest

from benchmarks import speed_sections
from benchmarks.documents import NOT_MEASURED

ABOUT = {
    "command": "python -m benchmarks.some",
    "device": "a device",
    "machine": {"cores": 2, "cpu": "a cpu"},
    "versions": {"jax": "0"},
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05",
    "limit": {"bandwidth": 2e10, "flops": 1e11, "memory": 2**30, "source": "measured here"},
}
ROW = {
    "stage": "decode", "model": "small", "dtype": "float32", "context": 1024, "batch": 2,
    "method": "vl-cache", "budget": "0.1", "synthetic_positions": True,
}  # fmt: skip
TIMED = {
    **ROW, "seconds": 0.0123, "spread": [0.012, 0.013], "share": 0.5, "speedup": 3.21,
    "share_of_ideal": 0.8, "programs": 1, "compile_s": 4.0,
}  # fmt: skip
FAILED = {**ROW, "exception": "ValueError: no memory"}
PEERS = {
    **ABOUT,
    "checks": [{"side": "full", "reference": "other", "equal_tokens": 64, "tokens": 65,
                "logits_error": 2e-6}],
    "rows": [{**ROW, "side": "full", "seconds": 0.5, "spread": [0.4, 0.6], "compile_s": 1.0},
             {**ROW, "side": "static", "exception": "RuntimeError: no compiler"}],
    "ratios": [{"ratio": "full over other", "stage": "decode", "speedup": 1.25},
               {"ratio": "full over static", "stage": "decode", "speedup": None}],
}  # fmt: skip
CPU = {
    **ABOUT,
    "rows": [TIMED],
    "cpu": {"weight_bytes": 2**20, "cache_bytes": 2**21, "speedup": 2.5, "ideal": 3.0,
            "share": 0.83, "must_reach": 0.6},
}  # fmt: skip
PAPER = {**ABOUT, "paper": [{**ROW, "paper": 7.08, "ours": 1.9, "ideal": 1.95}]}


@pytest.mark.parametrize("part", speed_sections.SECTIONS, ids=lambda part: part.name)
def test_what_was_not_measured_says_so(part):
    if part.files:
        assert part.make(*[None] * len(part.files)) == NOT_MEASURED


def test_times_are_told_beside_their_limit():
    text = speed_sections.speed_part({**ABOUT, "rows": [TIMED, FAILED]})
    assert "12.3 ms | 12 ms to 13 ms | 50% | 3.21x | 80% | 1 | 4.0 s |" in text
    assert "small, float32 ‡ | 1024 x 2 | vl-cache 0.1" in text
    assert "ValueError: no memory" in text
    assert "0123456789ab," in text
    assert "2.50, 83% of that; 60% must be reached" in speed_sections.speed_part(CPU)


def test_peers_are_told_with_the_check_and_what_failed():
    text = speed_sections.peers_part(PEERS)
    assert "64 of 65 greedy tokens the same, logits within 2e-06" in text
    assert "| static | decode | RuntimeError: no compiler |" in text
    assert "- full over other, decode: 1.25 times as fast" in text
    assert "full over static" not in text


def test_the_papers_rows():
    text = speed_sections.paper_part(PAPER, None)
    assert "| 1,024 x 2 | decode | 7.08x | 1.90x | 1.95x |" in text


def test_a_profile_is_a_table_of_shares():
    scopes = [{"scope": "mlp", "share": 0.75}, {"scope": "head", "share": 0.25}]
    text = speed_sections.profile_part({**ABOUT, "profiles": [{**ROW, "scopes": scopes}, FAILED]})
    assert "| program | cache | context x batch | mlp | head |" in text
    assert "| decode | vl-cache 0.1 | 1024 x 2 | 75.0% | 25.0% |" in text


def test_throughput():
    row = {
        **ROW, "sequences": 1234, "cache_bytes": 2**30, "tail_bytes": 2**30, "tokens_per_s": 99.94,
        "share": 0.6, "tokens_per_s_over_full": 4.5, "answers_per_s": 0.5,
    }  # fmt: skip
    text = speed_sections.throughput_part({**ABOUT, "rows": [row, FAILED]})
    assert "| vl-cache 0.1 | 1024 | 1,234 | 2.0 GiB | 99.9 | 60% | 4.50x | 0.50 |" in text
    assert "Memory used: 1.0 GiB" in text


def test_the_limits_are_those_of_the_roofline():
    text = speed_sections.limits_part()
    assert "| 8,192 x 64 | 19.3 ms to 4.97 ms, 3.90x |" in text
    assert "†" in text


def test_the_summary_has_a_line_for_what_is_known():
    text = speed_sections.summary_part(None, CPU, PEERS, None)
    assert "2.50 times as fast; by the bytes alone 3.00" in text
    assert "full over other, 1024 tokens, CPU | 1.25 times as fast" in text
    assert "| speed on a GPU | not measured |" in text
    text = speed_sections.summary_part(None, None, None, PAPER)
    assert "1.90 times as fast; ideal 1.95" in text
    assert "not measured" not in text
