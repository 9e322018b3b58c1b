"""The command that times decode attention on a CPU."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import cpu_decode
from benchmarks.documents import NOT_MEASURED, ROOT
from pallas_kernels.ragged_decode_attention import xla

SMALL = ["--size", "64x2", "--group", "2", "--share", "0.5", "--repeats", "2"]


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(cpu_decode.main)
    return lambda *more: CliRunner().invoke(app, [*SMALL, *more])


def test_a_checkout_is_timed_beside_this_one(run, tmp_path):
    out = tmp_path / "result.json"
    printed = run("--beside", str(ROOT), "--out", str(out)).stdout
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert {"context": 64, "batch": 2, "group": 2, "share": 0.5}.items() <= row.items()
    assert list(row["times"]) == ["attention", "before", "sum of the pool"]
    assert all(len(times["samples"]) == 2 for times in row["times"].values())
    given = cpu_decode.arrays(64, 2, 2, 0.5, "float32")
    used = np.asarray(given[4] + given[7]).sum()
    assert row["bytes"] == 2 * used * cpu_decode.KV_HEADS * cpu_decode.HEAD_DIM * 4
    assert result["before"].split()[0] == result["commit"].split()[0]
    (_, _, line) = cpu_decode.part(result).splitlines()
    assert line.startswith("| 64 x 2, 2 queries, float32 | 50% |")
    assert all(cell.strip() in printed for cell in line.split("|"))
    assert run("--out", str(out)).exit_code != 0


def test_another_checkout_does_not_replace_this_one(run):
    other = cpu_decode.checkout(ROOT)
    assert other is not xla
    assert other.__file__ == xla.__file__
    from pallas_kernels.ragged_decode_attention import xla as again

    assert again is xla
    assert run("--beside", str(ROOT / "none")).exit_code != 0


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_segments_lie_inside_of_the_pool(share):
    _, k, _, offset, length, *_ = cpu_decode.arrays(64, 5, 1, share, "float32")
    offset, length = np.asarray(offset), np.asarray(length)
    assert ((offset >= 0) & (length > 0) & (offset + length <= k.shape[2])).all()
    assert len(set(offset.tolist())) > 1
    assert (length == 64).all() == (share == 1)


def test_without_a_result_nothing_is_claimed():
    assert cpu_decode.part(None) == NOT_MEASURED
