"""A trace is summed up by the scopes of the model's stages."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.speed import cases
from benchmarks.speed.cases import FULL, Case
from benchmarks.speed.profile import (
    OTHER,
    SCOPES,
    UNKNOWN,
    Code,
    dump_hlo,
    events_of,
    profile_rows,
    scope_of,
    summarize,
)
from tests.tiny import tiny_config
from vlcache_jax.cache.methods import VLCache
from vlcache_jax.models.families import init_params

TEXT = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %a.1 = f32[4] add(%p, %p), metadata={op_name="jit(f)/while/body/mlp/add"}
  ROOT %b.1 = f32[4] multiply(%a.1, %p), metadata={op_name="jit(f)/while/body/mlp/mul"}
}

%sum (p0: f32[4], p1: f32[4]) -> f32[4] {
  %p0 = f32[4] parameter(0)
  %p1 = f32[4] parameter(1)
  %bitcast.10 = f32[4] bitcast(%p1), metadata={op_name="jit(f)/while/body/projections/dot"}
  ROOT %add.11 = f32[4] add(%p0, %bitcast.10), metadata={op_name="jit(f)/while/body/add"}
}

%gemm (p2: f32[4]) -> f32[4] {
  %p2 = f32[4] parameter(0)
  %dot.12 = f32[4] dot(%p2, %p2), metadata={op_name="jit(f)/while/body/head/dot"}
  ROOT %add.13 = f32[4] add(%p2, %dot.12), metadata={op_name="jit(f)/while/body/add"}
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %fusion.2 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %dot.3 = f32[4]{0} dot(%x, %x), metadata={op_name="jit(f)/while/body/vision/mlp/dot" stack_frame_id=1}
  %dot.7 = f32[4]{0} dot(%x, %x)
  %fusion.8 = f32[4]{0} fusion(%x, %dot.7), kind=kLoop, calls=%sum, metadata={op_name="jit(f)/while/body/add"}
  %fusion.9 = f32[4]{0} fusion(%x), kind=kCustom, calls=%gemm, metadata={op_name="jit(f)/while/body/add"}
  ROOT %tuple.4 = (s32[], f32[4]{0}) tuple(%x, %dot.3)
}

ENTRY %main.9 (arg: f32[4]) -> f32[4] {
  %arg = f32[4]{0} parameter(0)
  %while.5 = (s32[], f32[4]{0}) while(%arg), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %copy.6 = f32[4]{0} copy(%while.5)
}
"""  # noqa: E501


def test_the_outermost_scope_counts():
    assert scope_of("jit(f)/while/body/decode_attention/dot_general") == "decode_attention"
    assert scope_of("jit(f)/vision/mlp/dot_general") == "vision"
    assert scope_of("jit(f)/mlp_norm/add") == OTHER


def test_scopes_of_instructions():
    code = Code.of(TEXT)
    assert code.scopes["dot.3"] == "vision"
    assert code.scopes["fusion.2"] == "mlp"  # its instructions' own
    assert code.scopes["dot.7"] == "projections"  # of what reads it
    assert code.scopes["fusion.8"] == OTHER
    assert code.scopes["fusion.9"] == "head"  # of the product in it
    assert code.scopes["copy.6"] == OTHER
    assert code.module == "jit_f"
    assert code.control == {"while.5"}


def test_time_is_summed_by_scope_without_what_only_runs_others():
    events = [
        ("while.5", 9.0),
        ("dot.3", 3.0),
        ("dot.3", 3.0),
        ("fusion.2", 2.0),
        ("stranger", 2.0),
    ]
    found = summarize(events, Code.of(TEXT), calls=2)
    assert found["seconds"] == 5
    assert found["launches"] == 2
    scopes = {row["scope"]: row for row in found["scopes"]}
    assert scopes["vision"]["seconds"] == 3
    assert scopes["vision"]["share"] == pytest.approx(0.6)
    assert scopes["mlp"]["launches"] == 0.5
    assert scopes[UNKNOWN]["seconds"] == 1
    assert found["scopes"][0]["scope"] == "vision"
    assert found["instructions"][0]["name"] == "dot.3"


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def trace(**lines):
    planes: dict[str, list] = {}
    for key, events in lines.items():
        plane, _, line = key.partition("__")
        name = {"gpu": "/device:GPU:0", "cpu": "/host:CPU"}[plane]
        planes.setdefault(name, []).append(SimpleNamespace(name=line, events=events))
    return SimpleNamespace(
        planes=[SimpleNamespace(name=name, lines=held) for name, held in planes.items()]
    )


def test_on_a_cpu_an_instruction_lasts_until_its_end_on_any_thread():
    mine = {"hlo_op": "dot.3", "hlo_module": "jit_f"}
    found = events_of(
        trace(
            cpu__one=[event("dot.3", 0, 1e9, **mine), event("dot.3", 5e9, 1e9, **mine),
                      event("end: dot.3", 9e9, 10)],
            cpu__two=[event("end: dot.3", 3e9, 10),
                      event("other", 0, 5e9, hlo_op="other", hlo_module="jit_g")],
        ),
        "jit_f",
    )  # fmt: skip
    assert found == [("dot.3", 3.0), ("dot.3", 4.0)]


def test_on_a_gpu_the_streams_count_and_nothing_of_the_host():
    found = events_of(
        trace(
            gpu__Stream_13=[event("gemm", 0, 1e9, hlo_op="dot.3", hlo_module="jit_f"),
                            event("memset", 2, 2e9)],
            gpu__XLA=[event("jit_f", 0, 9e9)],
            cpu__host=[event("dot.3", 0, 7e9, hlo_op="dot.3", hlo_module="jit_f")],
        ),
        "jit_f",
    )  # fmt: skip
    assert found == [("dot.3", 1.0), ("memset", 2.0)]


@pytest.fixture
def tiny(monkeypatch):
    shapes = {"tiny": tiny_config("llava")}
    monkeypatch.setattr(cases, "models", lambda: shapes)
    return Case("tiny", 96, 1, images=True, chunk=4)


def test_the_stages_of_real_programs_are_found(tiny, tmp_path):
    params = init_params(tiny.config)
    tenth = VLCache(0.1)
    rows = profile_rows(tiny, (tenth,), params, tmp_path)
    prefill, decode = rows
    seen = {row["scope"] for row in prefill["scopes"]}
    assert set(SCOPES) - {"decode_attention", "sampling"} <= seen
    seen = {row["scope"] for row in decode["scopes"]}
    assert {"decode_attention", "projections", "mlp", "head", "sampling"} <= seen
    assert "vision" not in seen
    assert UNKNOWN not in seen
    assert decode["steps"] == tiny.chunk
    for row in rows:
        assert sum(scope["share"] for scope in row["scopes"]) == pytest.approx(1)
        assert row["trace"].startswith(str(tmp_path))
    json.dumps(rows)


def test_programs_are_written_as_text(tiny, tmp_path):
    dump_hlo(tiny, (FULL,), init_params(tiny.config), tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"tiny-96x1-prefill-full.hlo.txt", "tiny-96x1-decode-full.hlo.txt"}
    assert all(file.read_text().startswith("HloModule") for file in tmp_path.iterdir())
