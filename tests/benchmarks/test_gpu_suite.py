"""The GPU suite without a GPU: a dry run of all of it, and what happens when things go wrong."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import device, measure
from benchmarks.gpu_suite import __main__ as command
from benchmarks.gpu_suite import bars, checks, end_to_end, speed, stages, worker
from benchmarks.gpu_suite import suite as suites
from benchmarks.gpu_suite.stages import STAGES, Context
from benchmarks.gpu_suite.suite import Suite
from benchmarks.peers.process import PeerError, Process
from benchmarks.roofline import WORKSPACE, Device
from benchmarks.speed import __main__ as speed_command
from benchmarks.speed import cases, presets
from pallas_kernels.tuning import PrefillConfig as Config
from vlcache_jax.models.llava.config import with_vision
from vlcache_jax.results.report import pool_bytes

MODELS = cases.models()
COMPARED = {"rows": [{"samples": [1.0, 1.0]}], "ratios": []}
"""Of the processes of `benchmarks.peers`, which has tests of its own."""
NAMES = [stage.name for stage in STAGES]


class Here:
    """Stands for a process: answers in this one."""

    def __init__(self, module, settings):
        assert (module, settings["JAX_PLATFORMS"]) == ("benchmarks.gpu_suite.worker", "cpu")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, name, limit_s, **request):
        if name == "start":
            self.worker = worker.Worker(**request)
            return self.worker.about()
        return json.loads(json.dumps(self.worker.run(**request)))


def shallow():
    """The shapes that a dry run takes, with few layers: it is their compilation that takes long."""
    demo = with_vision(MODELS["demo-small"])
    text, vision = replace(demo.text, num_layers=2), replace(demo.vision, num_layers=2)
    return {"demo-small": replace(demo, text=text, vision=vision, vision_layers=1)}


def command_here(arguments, **_):
    """`python -m benchmarks.speed`, which has tests of its own, without a process."""
    assert arguments[1:3] == ["-m", "benchmarks.speed"]
    app = typer.Typer()
    app.command()(speed_command.main)
    done = CliRunner().invoke(app, arguments[3:])
    return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.output)


def suite(out, *arguments):
    """The command, without a process of its own: its exit code and what it reports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Suite", partial(Suite, start=Here))
        for module in (cases, speed_command):
            patch.setattr(module, "models", shallow)
        patch.setattr(end_to_end, "subprocess", SimpleNamespace(run=command_here))
        patch.setattr(
            end_to_end, "compare", create_autospec(end_to_end.compare, return_value=COMPARED)
        )
        options = ["--dry-run", "--json", "--out", str(out), *arguments]
        done = CliRunner().invoke(command.app, options, catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("suite")
    return out, *suite(out)


def saved(out, name):
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def test_a_stage_alone_passes(tmp_path):
    name = NAMES[0]
    code, report = suite(tmp_path, "--only", name)
    assert (code, report["ok"]) == (0, True)
    assert [(row["stage"], row["status"]) for row in report["stages"]] == [(name, "ok")]
    assert saved(tmp_path, name)["rows"]


@pytest.mark.full
def test_every_stage_passes(dry):
    out, code, report = dry
    assert {row["stage"]: row["status"] for row in report["stages"]} == dict.fromkeys(NAMES, "ok")
    assert (code, report["ok"], report["out"]) == (0, True, str(out))
    states = {row["bar"]: row["state"] for row in report["bars"]}
    assert list(states.values()) == ["aim reached"] + 8 * ["not measured"]


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_result_says_what_made_it(dry, name):
    result = saved(dry[0], name)
    assert result["ok"] is result["dry_run"] is True
    assert result["device"] == "cpu"
    assert result["versions"]["jax"] == jax.__version__
    assert result["profiles" if name == "profile" else "rows"]
    fields = {"commit", "command", "date", "driver", "platform_version", "XLA_FLAGS", "source",
              "seconds", "seed", "headline"}  # fmt: skip
    assert fields <= result.keys()
    if not name.startswith("correctness") and name != "throughput":
        assert all(
            len(row["samples"]) == 2
            for row in result["rows"]
            if row.get("ok", True) and "exception" not in row
        )


def test_the_batch_of_packed_caches_is_what_the_memory_holds():
    variants = (presets.TENTH, presets.PACKED_TENTH)
    case = cases.Case(presets.PAPER_MODEL, 32768, 24, "bfloat16")
    text, dtype = case.config.text, jnp.dtype("bfloat16")
    each = sum(pool_bytes(text, variant, dtype, batch=1, prompt_rows=32768) for variant in variants)
    for memory in (80e9, 139 * 2**30):
        found = end_to_end.fitting(case, variants, Device("a GPU", 1, 1, memory, "given"))
        weights = 15.1e9 + WORKSPACE
        assert found * each < memory - weights < (found + 1) * 1.05 * each
    small = Device("a GPU", 1, 1, 1e9, "given")
    assert end_to_end.fitting(case, variants, small) == 1


@pytest.mark.full
def test_the_table_of_block_sizes_has_the_format_of_the_committed_one(dry):
    (entries,) = saved(dry[0], "measured").values()
    assert set(entries) == {
        "prefill_attention", "window_scores", "ragged_decode_attention",
        "quantized_decode_attention", "add_rms_norm",
    }  # fmt: skip
    assert Config(**entries["prefill_attention"]["bfloat16/16"])


@pytest.mark.full
def test_a_second_run_does_nothing(dry, monkeypatch):
    monkeypatch.setattr(worker.Worker, "run", None)
    code, report = suite(dry[0])
    assert code == 0
    assert {row["status"] for row in report["stages"]} == {"done before"}


def test_a_failed_stage_stops_no_other(tmp_path, monkeypatch):
    def fail(context):
        context.save(rows=[{"name": "this far"}])
        raise RuntimeError("no such luck")

    monkeypatch.setattr(speed, "ceilings", fail)
    code, report = suite(tmp_path, "--only", "ceilings", "--only", "sweep_norm")
    assert code == 1
    statuses = {row["stage"]: row["status"] for row in report["stages"]}
    assert statuses == {"ceilings": "failed", "sweep_norm": "ok"}
    result = saved(tmp_path, "ceilings")
    assert "RuntimeError: no such luck" in result["error"]
    assert (result["ok"], result["rows"]) == (False, [{"name": "this far"}])
    monkeypatch.undo()
    _, report = suite(tmp_path, "--only", "ceilings", "--only", "sweep_norm")
    assert [row["status"] for row in report["stages"]] == ["ok", "done before"]


class Fake(Here):
    """A process that answers at once, and notes what it was asked."""

    log: ClassVar[list[str]] = []
    dies = ()
    device = "cpu"

    def __init__(self, module, settings):
        self.log.append(settings.get("XLA_PYTHON_CLIENT_PREALLOCATE", "new"))

    def ask(self, name, limit_s, **request):
        if name == "start":
            head = {"device": self.device, "source": stages.source(), "dry_run": request["dry"]}
            self.out = Path(request["out"])
            return {"out": request["out"], "head": head}
        self.log.append(request["stage"])
        if request["stage"] in self.dies:
            (self.out / f"{request['stage']}.json").write_text('{"rows": [1]}', encoding="utf-8")
            raise PeerError("the process ended with code -6: abort")
        return {"status": "ok", "seconds": 1, "healthy": request["stage"] != "speed_decode"}


def of(out, *names, dry=True, left=60.0, start: Any = Fake):
    settings: Any = {"dry": dry, "force": False, "environment": {"commit": "none"}, "start": start}
    return Suite(names, str(out), deadline=time.time() + left, **settings)


@pytest.fixture
def log(monkeypatch):
    noted: list[str] = []
    monkeypatch.setattr(Fake, "log", noted)
    return noted


def test_a_stage_that_ends_its_process_costs_that_stage_alone(tmp_path, log, monkeypatch):
    monkeypatch.setattr(Fake, "dies", ("correctness_norm",))
    run = of(tmp_path, "ceilings", "correctness_norm", "speed_decode", "sweep_norm")
    run.run()
    # A new process behind the one that died, and behind one that cannot use its device.
    assert log == [
        "new", "ceilings", "correctness_norm", "new", "speed_decode", "new", "sweep_norm",
    ]  # fmt: skip
    assert [end["status"] for end in run.ends.values()] == ["ok", "failed", "ok", "ok"]
    result = saved(tmp_path, "correctness_norm")
    assert (result["ok"], result["rows"]) == (False, [1])
    assert "code -6" in result["error"]


def test_a_stage_with_processes_of_its_own_gets_one_for_itself(tmp_path, log):
    of(tmp_path, "ceilings", "profile", "peers", "throughput").run()
    assert log == ["new", "ceilings", "false", "peers", "new", "throughput", "profile"]


def test_a_process_that_cannot_begin_is_not_started_again(tmp_path, log, monkeypatch):
    def refuse(*_, **__):
        raise PeerError("no")

    monkeypatch.setattr(Fake, "ask", refuse)
    with pytest.raises(PeerError):
        of(tmp_path, "ceilings", "profile").run()
    assert log == ["new"]


def test_a_stage_that_never_ends_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "GRACE_S", 0.1 - STAGES[0].most_s)
    run = of(tmp_path, "ceilings", start=Process)
    run.run()
    assert [end["status"] for end in run.ends.values()] == ["failed"]
    assert "TimeoutError: killed" in saved(tmp_path, "ceilings")["error"]


def test_a_stage_without_enough_time_is_not_begun(tmp_path, log):
    run = of(tmp_path, *NAMES[:2], dry=False, left=5)
    run.run()
    assert {end["status"] for end in run.ends.values()} == {"no time"}
    assert run.ends[NAMES[0]]["why"].startswith("needs 15 s, ")
    assert log == ["new"]
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite"],
        capture_output=True,
        text=True,
        cwd=stages.ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("no GPU here (JAX sees cpu alone)")
    assert "--dry-run" in line


def test_an_unknown_stage_is_named():
    done = CliRunner().invoke(command.app, ["--only", "speedd"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "speedd" in done.output
    assert "speed_decode" in done.output


def test_names_of_folders():
    assert device.slug("NVIDIA H200") == "nvidia-h200"
    assert device.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# Comparisons.


@pytest.fixture
def context(tmp_path):
    return Context("stage", tmp_path, True, float("inf"), {"device": "cpu"})


def compare(context, **variants):
    x = np.ones((3,), np.float32)

    def judge(results, expected):
        error = checks.relative_error(results[0], expected) + checks.not_finite(results[0])
        return {"out": (error, 1e-4)}

    groups = [
        checks.Group("double", "ones", (x,), {name: variant}, lambda: 2 * x, judge)
        for name, variant in variants.items()
    ]
    result = checks.run(context, groups)
    return result, [row["ok"] for row in result["rows"]]


def refuse(x):
    raise NotImplementedError("not here")


def fail(x):
    raise ValueError("too large")


def test_what_is_wrong_is_found(context):
    variants = {
        "right": lambda x: x + x,
        "wrong": lambda x: x + x + 1e-3,
        "not a number": lambda x: jnp.where(jnp.arange(3) == 2, jnp.nan, 2 * x),
        "refused": refuse,
        "broken": fail,
    }
    result, ok = compare(context, **variants)
    assert ok == [True, False, False, None, False]
    assert result["ok"] is False
    assert result["headline"].startswith("1 of 4 right")
    assert "ValueError: too large" in result["rows"][4]["exception"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_what_is_not_run_is_not_passed(context):
    context.until = 0
    result, ok = compare(context, right=lambda x: x + x)
    assert (ok, result["ok"], result["not_run"]) == ([None], False, 1)


# Times.


def test_programs_are_timed_by_the_call():
    effort = measure.Effort(warm_ups=1, repeats=5, sample_s=0.0)
    programs = {"sleep": lambda: time.sleep(0.02), "fail": lambda: fail(None)}
    found = measure.compare(programs, calls=2, effort=effort)
    timing, error = found["sleep"], found["fail"]
    assert isinstance(timing, measure.Timing)
    assert isinstance(error, ValueError)
    assert len(timing.samples) == 5
    assert 0.01 <= timing.seconds < 0.05
    assert (timing.calls, timing.programs) == (2, 1)


def test_input_sets_are_larger_than_the_cache():
    for size in (10**5, 3 * 10**6, 10**7, 10**9):
        count = measure.sets_for(size, dry=False)
        assert count == 64 or (count >= 2 and count * size > 2 * measure.L2_BYTES)


def test_a_program_calls_its_operation_for_every_set():
    sets = [(jnp.float32(i), jnp.float32(2)) for i in range(3)]
    results = measure.chain(lambda a, b, c: a * b + c, sets, (jnp.float32(5),))()
    assert [float(x) for x in results] == [5, 7, 9]


# Bars.


def timed(case, backend, **fields):
    return {"case": case, "backend": backend, "ok": True, **fields}


def test_bars_are_shares_of_what_was_measured():
    case = bars.PREFILL_CASE
    decode = [
        timed("large", "triton", bytes=600e6, bytes_per_s=3.6e12),
        timed("larger", "triton", bytes=900e6, bytes_per_s=3.9e12),
        timed("small", "triton", bytes=5e6, bytes_per_s=1e12),
        timed("large", "xla", bytes=600e6, bytes_per_s=1e12),
        {"case": "none", "backend": "triton", "ok": False, "bytes": 900e6},
    ]
    prefill = [
        timed(case, "triton", ops_per_s=500e12, seconds=1.1),
        timed(case, "cudnn", ops_per_s=550e12, seconds=1.0),
        timed(case, "automatic", ops_per_s=500e12, seconds=1.1),
        timed("causal, 2048 tokens", "automatic", ops_per_s=1e12, seconds=1.0),
    ]
    large = {"full_bytes": 600e6}
    packed = [
        timed("2 bits", "triton", bytes_per_s=3e12, seconds=1.0, **large),
        timed("8 bits", "triton", bytes_per_s=3.6e12, seconds=2.0, **large),
        timed("small", "triton", bytes_per_s=1e12, seconds=1.0, full_bytes=5e6),
        *(timed(case, "pool", seconds=3.2, **large) for case in ("2 bits", "8 bits", "small")),
    ]
    results = {
        "correctness_a": {"rows": [{"ok": True}, {"ok": None}, {"ok": False}, {"ok": True}]},
        "speed_decode": {"rows": decode, "copy_bytes_per_s": 4e12},
        "speed_prefill": {"rows": prefill, "matmul_ops_per_s": 790e12},
        "speed_packed": {"rows": packed, "copy_bytes_per_s": 4e12},
    }
    found = [(row["measured"], row["state"]) for row in bars.table(results)]
    assert found == [
        ("66.7 %", "short"),
        ("90.0 %", "reached"),
        ("500", "aim reached"),
        ("90.9 %", "short"),
        *3 * [(None, "not measured")],
        ("75.0 %", "reached"),
        ("160.0 %", "aim reached"),
    ]
    remarks = [row["remark"] for row in bars.table(results)]
    assert remarks[0] == "1 of 3 wrong"
    assert remarks[1] == "3.60 of 4.00 TB/s copied, 83.7 % of 4.3 TB/s; worst: large"
    assert remarks[2] == "cudnn 550, product 790"
    assert remarks[-2].endswith("; worst: 2 bits")
    assert remarks[-1] == "worst: 8 bits"


def test_what_was_not_measured_is_no_failure():
    assert {row["state"] for row in bars.table({})} == {"not measured"}
