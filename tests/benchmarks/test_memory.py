"""Programs compiled for a GPU that is not here: launches, command buffers, bytes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmarks
from benchmarks import memory
from benchmarks.ahead_of_time import GPUS, plugin_version
from benchmarks.memory import ALL, Program, largest_batch, run, step_launches

RESULT = Path(benchmarks.__file__).parent / "results" / "offline" / "programs-h200.json"
MOST_LAUNCHES = 12
MOST_TEMPORARIES = 256 * 2**20

needs_plugin = pytest.mark.skipif(
    plugin_version() is None,
    reason="the CUDA plugin is not installed: pip install 'vlcache-jax[cuda]'",
)

THUNKS = """001: kCopy         [source       | next=003 (2)] kCopy
003: kWhile         [prev=002 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer      [source       | next=466 (1)]
        005: kCustomKernel [source       | sink        ] norm__1 grid: [1, 1, 1]
        006: kCustomKernel [source       | next=007 (1)] append_and_attend grid: [8, 1, 1]
        007: kCustomKernel [source       | next=008 (1)] merge_splits grid: [8, 1, 1]
        008: kGemm         [source       | next=009 (1)] kGemm
        009: kCustomKernel [source       | sink        ] append_and_attend__1 grid: [8, 1, 1]
        010: kCustomKernel [source       | sink        ] add_rms_norm__1 grid: [1, 1, 1]
{more}468: kCustomKernel       [source       | sink        ] last grid: [1, 1, 1]
"""


def test_launches_of_a_step_are_counted():
    found = step_launches(THUNKS.format(more=""))
    assert found == {
        "kernels_per_step": {"append_and_attend": 2, "merge_splits": 1, "add_rms_norm": 1},
        "launches_per_step": 6,
        "launches_per_layer": 3,
        "one_command_buffer": True,
    }


def test_a_launch_beside_the_command_buffer_is_seen():
    more = "    466: kDynamicSliceFusion [prev=000 (1) | sink        ] params=1, results=1\n"
    found = step_launches(THUNKS.format(more=more))
    assert found["one_command_buffer"] is False
    assert found["launches_per_step"] == 7


def test_a_program_without_the_kernel_has_no_figures():
    found = step_launches(THUNKS.replace("append_and_attend", "fusion").format(more=""))
    assert found["launches_per_layer"] is found["one_command_buffer"] is None


@needs_plugin
@pytest.mark.parametrize("batch", [1, 64])
def test_a_decode_step_is_one_small_command_buffer(batch):
    found = run(Program(batch=batch))
    check(found)
    layers = 32
    assert found["kernels_per_step"]["append_and_attend"] == layers
    assert found["cache_bytes"] <= 0.115 * found["full_cache_bytes"]


def check(row):
    assert row["fits"]
    assert row["cache_copies_in_loop"] == 0
    assert row["launches_per_layer"] <= MOST_LAUNCHES
    assert row["one_command_buffer"] is True
    if row["stage"] == "decode":
        assert row["temp_bytes"] <= MOST_TEMPORARIES


def test_the_committed_table_holds_every_program():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert {"commit", "command", "date", "machine", "versions"} <= result.keys()
    keys = ("model", "stage", "context", "batch", "budget")
    rows = {tuple(row[key] for key in keys): row for row in result["rows"]}
    assert rows.keys() == {tuple(getattr(program, key) for key in keys) for program in ALL}
    for row in rows.values():
        check(row)


@pytest.mark.parametrize(
    ("option", "value"), [("--device", "b9000"), ("--model", "gpt"), ("--stage", "sleep")]
)
def test_unknown_names_are_refused_with_those_that_are_known(option, value):
    result = CliRunner().invoke(app(), [option, value])
    assert result.exit_code == 2
    assert value in result.output


def test_an_existing_file_is_not_overwritten(tmp_path):
    file = tmp_path / "programs.json"
    file.write_text("mine")
    result = CliRunner().invoke(app(), ["--out", str(file)])
    assert result.exit_code == 2
    assert "--force" in result.output
    assert file.read_text() == "mine"


def app():
    import typer

    app = typer.Typer()
    app.command()(memory.main)
    return app


@pytest.mark.parametrize("start", [1, 3, 700])
@pytest.mark.parametrize(
    ("fixed", "each", "bend"), [(15e9, 1e9, 0), (15e9, 3e8, 2e4), (15e9, 80e9, 0)]
)
def test_the_largest_batch_is_found_in_a_few_compilations(start, fixed, each, bend):
    def compiled(program):
        peak = int(fixed + program.batch * each + program.batch**2 * bend)
        return {"peak_bytes": peak, "fits": peak <= GPUS["h200"].memory}

    found, rows = largest_batch(Program(batch=start), compiled)
    peaks = [fixed + batch * each + batch**2 * bend for batch in (found, found + found // 100 + 1)]
    assert peaks[0] <= GPUS["h200"].memory < peaks[1]
    assert len(rows) <= 12


def test_where_not_even_one_sequence_fits():
    found, rows = largest_batch(Program(), lambda program: {"peak_bytes": 10**12, "fits": False})
    assert found == 0
    assert len(rows) == 1
