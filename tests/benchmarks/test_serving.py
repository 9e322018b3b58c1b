"""What the benchmark of the engine says of a load, and that it measures one."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import serving
from benchmarks.serving import Run, described
from vlcache_jax.serving.ticket import Times


def ticket(submitted, first, ended, tokens) -> Any:
    times = Times(submitted, submitted, first, ended)
    return SimpleNamespace(times=times, answer=SimpleNamespace(tokens=[0] * tokens))


def test_a_load_is_described():
    one, other = ticket(0.0, 1.0, 5.0, 5), ticket(0.0, 3.0, 7.0, 3)
    runs = [
        Run("finish", 0.0, 1.0, frozenset()),
        Run("decode_chunk", 1.25, 2.25, frozenset({1})),
        Run("finish", 2.5, 4.0, frozenset({1})),
        Run("decode_chunk", 4.25, 5.25, frozenset({1, 2})),
        Run("decode_chunk", 9.5, 10.5, frozenset({3})),  # of nobody that ran before
    ]
    found = described(runs, [one, other], wall=4.0, cpu=2.0)
    assert (found["requests_per_s"], found["tokens_per_s"]) == (0.5, 2.0)
    assert found["requests_per_cpu_s"] == 1.0
    assert (found["first_token_s"]["p50"], found["per_token_s"]["p50"]) == (2.0, 1.5)
    assert found["mean_slots_in_use"] == pytest.approx(4 / 3)
    assert (found["largest_gap_s"], found["decode_chunk_s"]) == (3.0, 1.0)
    assert found["host_per_chunk_s"] == pytest.approx((0.25 + 4.25) / 2)
    assert found["stage_s"] == {"decode_chunk": 3.0, "finish": 2.5}


def test_a_failed_request_ends_the_measurement():
    def submit(request):
        raise RuntimeError("no slot")

    engine: Any = SimpleNamespace(submit=submit)
    requests: Any = [object()] * 9
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match="no slot"):
        serving.answered(engine, requests, 2)
    assert time.perf_counter() - began < 5


def test_a_tenth_fits_six_times_at_equal_memory():
    full, tenth, bits = (row["over_full"] for row in serving.fits())
    assert full == 1
    assert 6 <= tenth < bits


@pytest.mark.full
def test_the_command_measures_each_load(tmp_path):
    app, out = typer.Typer(), tmp_path / "serving.json"
    app.command()(serving.main)
    arguments = ["--at-once", "1", "--at-once", "2", "--requests", "3", "--new-tokens", "17"]
    arguments += ["--repeats", "1", "--out", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert [row["at_once"] for row in result["rows"]] == [1, 2] * len(serving.CACHES)
    for row in result["rows"]:
        assert row["tokens"] == 3 * 17
        assert row["mean_slots_in_use"] <= row["at_once"]
        assert sum(row["stage_s"].values()) <= row["wall_s"]
    assert "| vl-cache 0.1 | 2 |" in serving.part(result)
