"""The kernels as machine code, without a GPU."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest
import typer
from typer.testing import CliRunner

import benchmarks
from benchmarks import kernels, operations
from benchmarks.kernels import ARCHITECTURES, TAIL, Case, cases, compile_case, representative

RESULTS = Path(benchmarks.__file__).parent / "results" / "offline"
FIELDS = ("kernel", "dtype", "head_dim", "config", "arch", "registers", "spill_bytes")
FIELDS += ("shared_bytes", "tensor_core_ops", "ok")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install 'vlcache-jax[offline]'",
)


def invoke(*arguments):
    app = typer.Typer()
    app.command()(kernels.main)
    return CliRunner().invoke(app, arguments)


@pytest.mark.full
@needs_triton
def test_the_representative_kernels_compile():
    result = invoke("--offline", "--representative", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    assert {row["kernel"] for row in rows} == {
        "prefill_attention",
        "window_rows",
        "window_columns",
        "append_and_attend",
        "quantized_append_and_attend",
        "merge_splits",
        "add_rms_norm",
        "sample_tokens",
    }
    for row in rows:
        assert set(FIELDS) <= row.keys()
        matrix = row["dtype"] == "bfloat16" and row["kernel"] not in (
            "merge_splits",
            "add_rms_norm",
        )
        assert (row["tensor_core_ops"] > 0) == matrix


@needs_triton
def test_what_spills_or_is_too_large_is_not_ok(monkeypatch):
    case = next(case for case in cases() if representative(case))
    good = compile_case(case)[0]
    assert good["ok"]

    def worse(**changes):
        from benchmarks.triton_offline import KernelCode

        names = ("registers", "spill_bytes", "shared_bytes", "tensor_core_ops")
        facts = {name: good[name] for name in names} | changes
        code = KernelCode(name=good["kernel"], num_warps=4, num_stages=1, grid=(1, 1, 1), **facts)
        monkeypatch.setattr(kernels, "compile_kernels", lambda *args, **kwargs: [code])
        return compile_case(case)[0]["ok"]

    assert worse()
    assert not worse(spill_bytes=8)
    assert not worse(shared_bytes=166_913)  # one byte beyond an A100's block
    assert not worse(tensor_core_ops=0)


@needs_triton
def test_a_kernel_that_does_not_compile_is_a_row_that_is_not_ok():
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    kernel.__name__ = "a-dash"  # LLVM refuses the name

    def program(x):
        parameters = plgpu.CompilerParams(num_warps=4, num_stages=1)
        return pl.pallas_call(kernel, out_shape=x, compiler_params=parameters)(x)

    shape = jax.ShapeDtypeStruct((16, 16), "float32")
    example = next(cases())
    case = Case("prefill_attention", "", "float32", 16, example.config, "sm_90", program, (shape,))
    (row,) = compile_case(case)
    assert row["ok"] is False
    assert row["error"]


def test_every_operation_type_head_dim_and_configuration_is_a_case():
    found = list(cases())
    assert {case.operation for case in found} == set(operations.OPERATIONS)
    for case in found:
        options = kernels.configs(case.operation, case.arch, case.dtype, case.head_dim)
        assert case.config in options
    heads = {(c.operation, c.dtype, c.head_dim, c.arch) for c in found if c.head_dim < 1000}
    assert len(heads) == (3 * 3 + 2) * 6 * 2  # packed rows are not for float32
    chunks = {(c.operation, c.variant, c.arch) for c in found if kernels.CHUNK in c.variant}
    assert len(chunks) == 2 * len(kernels.CHUNKS) * len(ARCHITECTURES)
    packed = {str(variant) for variant in kernels.PACKED}
    assert packed == {c.variant for c in found if c.operation == "quantized_decode_attention"}
    assert len(packed) == len(kernels.PACKED)
    for operation in ("prefill_attention", "window_scores", "ragged_decode_attention"):
        variants = {case.variant for case in found if case.operation == operation}
        assert all(any(f"group {group}" in v for v in variants) for group in kernels.GROUPS)


@pytest.mark.parametrize("version", ["0.10.2"])
def test_the_committed_table_is_whole_and_green(version):
    file = RESULTS / f"kernels-jax-{version}.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["versions"]["jax"] == version
    assert result["ok"]

    def key(row):
        return row["operation"], row["variant"], row["dtype"], row["head_dim"], row["arch"]

    present = {(*key(row), json.dumps(row["config"])) for row in result["rows"]}
    for case in cases():
        assert (*key(case.row), json.dumps(case.row["config"])) in present
    assert all(row["ok"] and row["spill_bytes"] == 0 for row in result["rows"])


def test_rows_are_added_to_those_of_a_file(tmp_path, monkeypatch):
    file, chosen = tmp_path / "kernels.json", list(cases())[:3]
    monkeypatch.setattr(kernels, "cases", lambda: iter(chosen))
    monkeypatch.setattr(
        kernels, "compile_case", lambda case: [{"kernel": "k", **case.row, "ok": True}]
    )
    old = {"kernel": "k", **chosen[1].row, "ok": False}
    file.write_text(json.dumps({"commit": "old", "rows": [old], "ok": False}))
    assert invoke("--offline", "--add", "--out", str(file)).exit_code == 1  # the old one is not ok
    result = json.loads(file.read_text())
    assert [row["config"] for row in result["rows"]] == [
        case.row["config"] for case in (chosen[1], chosen[0], chosen[2])
    ]
    assert (result["commit"], result["ok"]) == ("old", False)
    assert [made["rows"] for made in result["added"]] == [2]
    refused = invoke("--offline", "--add")
    assert (refused.exit_code, "--out" in refused.output) == (2, True)


def test_without_offline_the_command_says_what_to_run():
    result = invoke()
    assert result.exit_code == 2
    assert "gpu_suite" in result.output


@pytest.mark.parametrize(("context", "splits"), [(100, 1), (2048, 17), (8192, 33)])
def test_the_decode_kernel_has_as_many_programs_as_there_are_splits(context, splits):
    layer = operations.layer(kernels._shape, "bfloat16", 1, (32, 8), 128, 3 * context, TAIL)
    run = operations.kernel("ragged_decode_attention", 128, most_rows=context)
    kernel, *_ = (e for e in jax.make_jaxpr(run)(*layer).eqns if e.primitive.name == "pallas_call")
    assert kernel.params["grid_mapping"].grid == (splits, 8, 1)
