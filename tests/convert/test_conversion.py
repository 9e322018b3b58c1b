"""Conversion both ways: the same bits, and nothing half-written whatever happens."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import typer
from safetensors.numpy import load_file
from typer.testing import CliRunner

from convert.__main__ import convert_command
from convert.program import convert as run
from tests.cli.program import without_kept_programs
from tests.model_files import (
    SPELLINGS,
    config_json,
    random_tensors,
    read_tensors,
    respell,
    same_bits,
    write_model,
)
from vlcache_jax.checkpoints import writing
from vlcache_jax.checkpoints.safetensors_writer import write_tensors

CONFIG = config_json()
ROOT = Path(__file__).parents[2]
PIECES = ["embed", "head", "layer_000", "layer_001", "projector", "vision"]


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "hf", CONFIG, random_tensors(CONFIG, ml_dtypes.bfloat16), 3)


@pytest.fixture
def command():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(convert_command)

    def invoke(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.stdout == ""
        return result.exit_code, result.stderr

    return invoke


def _entries(directory):
    return sorted(entry.name for entry in directory.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "tied"),
    [("llava", 4, 4, False), ("llava_next", 4, 2, False), ("llava_next", 7, 1, True)],
)
def test_there_and_back_is_bit_identical(family, heads, kv_heads, tied, dtype, tmp_path):
    config = config_json(family, heads=heads, kv_heads=kv_heads, tied=tied)
    tensors = random_tensors(config, dtype)
    write_model(tmp_path / "hf", config, tensors, shards=2)
    there = run(tmp_path / "hf", tmp_path / "orbax")
    back = run(there, tmp_path / "back", to_hf=True)
    assert same_bits(read_tensors(back), tensors)
    for name in ("config.json", "generation_config.json", "tokenizer.model"):
        original = (tmp_path / "hf" / name).read_bytes()
        assert (there / name).read_bytes() == (back / name).read_bytes() == original
    assert _entries(tmp_path) == ["back", "hf", "orbax"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_converts_to_the_same(spelling, tmp_path):
    tensors = random_tensors(CONFIG)
    named = {respell(name, spelling): array for name, array in tensors.items()}
    write_model(tmp_path / "hf", CONFIG, named, shards=2)
    there = run(tmp_path / "hf", tmp_path / "orbax")
    assert same_bits(read_tensors(run(there, tmp_path / "back", to_hf=True)), tensors)
    assert same_bits(read_tensors(run(tmp_path / "hf", tmp_path / "hub", to_hf=True)), tensors)


def test_layout_and_manifest(model, tmp_path):
    there = run(model, tmp_path / "orbax")
    files = ["MANIFEST.json", "config.json", "generation_config.json", "params", "tokenizer.model"]
    assert _entries(there) == files
    assert _entries(there / "params") == PIECES
    manifest = json.loads((there / "MANIFEST.json").read_text())
    assert (manifest["format"], manifest["dtype"]) == (1, "bfloat16")
    qkv = {"shape": [32, 2, 4, 8], "dtype": "bfloat16"}
    assert manifest["parameters"]["layers.1.qkv"] == qkv
    assert manifest["source"]["name"] == str(model)
    listed = {entry["name"]: entry["bytes"] for entry in manifest["source"]["files"]}
    assert listed == {file.name: file.stat().st_size for file in model.iterdir()}
    assert {"python", "jax", "orbax-checkpoint", "numpy"} <= manifest["versions"].keys()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_changes_the_weights_and_the_config(dtype, model, tmp_path):
    tensors = read_tensors(model)
    there = run(model, tmp_path / "orbax", dtype=dtype)
    back = run(there, tmp_path / "back", to_hf=True)
    expected = {name: array.astype(dtype) for name, array in tensors.items()}
    assert same_bits(read_tensors(back), expected)
    config = json.loads((back / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == dtype
    assert "torch_dtype" not in config["vision_config"]


def test_shards_and_their_index(tmp_path):
    arrays = {f"t{i}": np.full((10, i + 1), i, np.float32) for i in range(6)}
    shapes = {name: array.shape for name, array in arrays.items()}
    write_tensors(tmp_path, shapes, np.dtype(np.float32), arrays.items(), shard_bytes=200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == "model-00001-of-00005.safetensors"  # t0 and t1, then one in each
    for file in files:
        loaded = load_file(file)
        assert {index["weight_map"][name] for name in loaded} == {file.name}
        assert len(loaded) == 1 or sum(array.nbytes for array in loaded.values()) <= 200
    assert same_bits(read_tensors(tmp_path), arrays)


def test_the_writer_refuses_other_tensors_than_announced(tmp_path):
    def write(tensors):
        write_tensors(tmp_path, {"a": (2,), "b": (3,)}, np.dtype(np.float32), tensors)

    with pytest.raises(ValueError, match="expected b"):
        write([("a", np.zeros(2, np.float32)), ("c", np.zeros(3, np.float32))])
    with pytest.raises(ValueError, match=r"expected b .* got nothing"):
        write([("a", np.zeros(2, np.float32))])
    with pytest.raises(ValueError, match="expected a"):
        write([("a", np.zeros(2, np.float64))])


def test_an_existing_target_needs_force(model, command, tmp_path):
    target = run(model, tmp_path / "orbax", dtype="float32")
    code, text = command(model, target)
    assert code == 2
    assert "exists: choose another name, or --force" in text
    assert json.loads((target / "MANIFEST.json").read_text())["dtype"] == "float32"
    code, text = command(model, target, "--force")
    assert code == 0
    assert str(target) in text.replace("\n", "")
    assert json.loads((target / "MANIFEST.json").read_text())["dtype"] == "bfloat16"
    assert _entries(tmp_path) == ["hf", "orbax"]


def test_force_replaces_model_directories_only(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_bytes(b"cat")
    with pytest.raises(FileExistsError, match="is not a model directory"):
        run(model, photos, force=True)
    assert _entries(photos) == ["cat.png"]
    assert _entries(tmp_path) == ["hf", "photos"]


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_source_and_target_must_not_contain_each_other(place, model):
    with pytest.raises(ValueError, match="must not contain each other"):
        run(model, model / place, force=True)
    assert (model / "config.json").is_file()


def _stop_at(piece, error):
    def progress(name, done, total):
        if name == piece:
            raise error

    return progress


@pytest.mark.parametrize("to_hf", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("broken"), RuntimeError("bug")])
def test_a_failure_in_the_middle_leaves_the_old_target(error, to_hf, model, tmp_path):
    target = run(model, tmp_path / "out", to_hf=to_hf)
    before = {file: file.stat().st_mtime_ns for file in target.rglob("*")}
    with pytest.raises(type(error)):
        run(model, target, force=True, to_hf=to_hf, progress=_stop_at("layer_001", error))
    assert {file: file.stat().st_mtime_ns for file in target.rglob("*")} == before
    with pytest.raises(type(error)):
        run(model, tmp_path / "new", to_hf=to_hf, progress=_stop_at("layer_001", error))
    assert _entries(tmp_path) == ["hf", "out"]


def test_the_hook_for_errors_that_nobody_hears_of_is_put_back(model, tmp_path):
    before = sys.unraisablehook
    run(model, tmp_path / "out")
    with pytest.raises(OSError, match="broken"):
        run(model, tmp_path / "new", progress=_stop_at("layer_001", OSError("broken")))
    assert sys.unraisablehook is before


@pytest.mark.parametrize("name", [".out.partial", ".out.old"])
def test_a_link_beside_the_target_is_not_followed(name, model, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / name).symlink_to(precious)
    run(model, tmp_path / "out")
    assert _entries(precious) == ["file"]
    with pytest.raises(FileExistsError):
        run(model, tmp_path / "out")
    assert _entries(tmp_path) == [name, "hf", "out", "precious"]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(FileExistsError, match="symbolic link"):
        run(model, tmp_path / "link", force=True)


def test_two_runs_do_not_write_one_target(model, tmp_path):
    def progress(name, done, total):
        if name == "embed":
            with pytest.raises(ValueError, match="another process is writing"):
                run(model, tmp_path / "out")

    run(model, tmp_path / "out", progress=progress)
    assert _entries(tmp_path) == ["hf", "out"]


def _child(code, **kwargs):
    # Compiled programs it might not be able to write either.
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**without_kept_programs(), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def test_a_killed_run_leaves_no_target_and_the_next_succeeds(model, tmp_path):
    target = tmp_path / "out"
    code = (
        "import os, signal\n"
        "from convert.program import convert\n"
        "def progress(piece, done, total):\n"
        "    if piece == 'layer_001':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert({str(model)!r}, {str(target)!r}, progress=progress)\n"
    )
    assert _child(code).returncode == -signal.SIGKILL
    partial, hf = sorted(tmp_path.iterdir())
    assert (partial.name[:5], hf.name) == (".out.", "hf")
    assert _entries(partial / "params") == ["embed", "layer_000", *PIECES[4:]]
    back = run(run(model, target), tmp_path / "back", to_hf=True)
    assert _entries(tmp_path) == ["back", "hf", "out"]
    assert same_bits(read_tensors(back), read_tensors(model))


def test_too_little_room_is_seen_before_any_work(model, command, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    code, text = command(model, tmp_path / "out")
    assert code == 1
    assert "not enough room in" in text
    assert "0.00 GB needed, 0.00 GB free" in text
    assert _entries(tmp_path) == ["hf"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB, which only root can mount."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(options, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("option", [(), ("--to-hf",)])
def test_a_full_disk_leaves_nothing(option, model, command, small_disk, monkeypatch):
    code, text = command(model, small_disk / "out", *option)
    assert code == 1
    assert "not enough room in" in text
    plenty = namedtuple("usage", "free")(10**9)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: plenty)
    code, text = command(model, small_disk / "out", *option)
    assert code == 1
    assert text.startswith("error: ")
    assert "no space left" in text.lower()
    assert len(text.strip().split("\n")) == 1
    assert _entries(small_disk) == []


@pytest.mark.parametrize("option", ["", "--to-hf"])
def test_a_file_that_may_not_grow_leaves_nothing(option, model, tmp_path):
    """A write that fails, without root: no file may be larger than 8 KB."""
    code = (
        "import resource, sys\n"
        "import convert.program\n"
        "from convert.__main__ import convert_command\n"
        "import typer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        f"sys.argv = ['convert', {str(model)!r}, {str(tmp_path / 'out')!r}, *{option.split()!r}]\n"
        "typer.run(convert_command)\n"
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    child = _child(code)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limits
    assert child.returncode == 1
    assert child.stderr.startswith("error: ")
    assert len(child.stderr.strip().split("\n")) == 1
    assert child.stdout == ""
    assert _entries(tmp_path) == ["hf"]


def test_bad_input_exits_with_2_and_one_error(model, command, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    write_model(other, CONFIG | {"model_type": "idefics"}, {})
    short = shutil.copytree(model, tmp_path / "short")
    file = short / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for arguments, message in (
        ((tmp_path / "none", "out"), "no directory"),
        ((empty, "out"), "no config.json at"),
        ((other, "out"), "model_type='idefics' must be \"llama\" or"),
        ((short, "out"), "is truncated or damaged"),
        ((model, "out", "--dtype", "int4"), "dtype='int4' is not supported"),
        ((model, tmp_path / "no" / "place"), "no directory"),
    ):
        source, target, *options = arguments
        code, text = command(source, tmp_path / target, *options)
        assert (code, text.startswith("error: ")) == (2, True)
        assert message in text
    assert _entries(tmp_path) == ["empty", "hf", "other", "short"]


def test_the_program_runs_as_a_module(model, tmp_path):
    arguments = [sys.executable, "-m", "convert", str(model), str(tmp_path / "out"), "--to-hf"]
    child = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stdout) == (0, "")
    assert child.stderr.startswith(f"wrote {tmp_path / 'out'}")
    assert same_bits(read_tensors(tmp_path / "out"), read_tensors(model))


def test_ctrl_c_is_one_line(model, command, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_write_manifest", interrupted)
    assert command(model, tmp_path / "out") == (1, "error: interrupted\n")
    assert _entries(tmp_path) == ["hf"]
