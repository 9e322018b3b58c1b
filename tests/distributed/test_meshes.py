"""Meshes: what is refused, how parameters are cut, and programs on eight devices of a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vlcache_jax
from vlcache_jax.distributed.mesh import DeviceMesh, fits, parse
from vlcache_jax.distributed.rules import PARAMETERS, axes_of, partition
from vlcache_jax.distributed.weights import part_of
from vlcache_jax.models.config import TextConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_on_eight_devices():
    """How many devices a CPU is, JAX asks once: the tests of meshes have a process of their own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    file = Path(__file__).with_name("on_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ("model=4,data=2", (2, 4)),
        (" data=2 , model=1", (2, 1)),
        ("model=3", (1, 3)),
        ({"data": 8}, (8, 1)),
        ({}, (1, 1)),
    ],
)
def test_how_a_mesh_is_written(given, sizes):
    assert parse(given) == {"data": sizes[0], "model": sizes[1]}


@pytest.mark.parametrize(
    "given",
    [
        "",
        "model",
        "model=",
        "model=0",
        "model=-1",
        "model=2.0",
        "model=²",
        "tensor=2",
        "model=2,model=4",
        "model=2,,data=2",
        "model=99999999999",
        {"model": 2.5},
        {"model": True},
        {2: 2},
        7,
        ["model=2"],
    ],
)
def test_what_is_no_mesh_is_refused_in_one_line(given):
    with pytest.raises(ValueError, match="model=4,data=2") as error:
        parse(given)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_a_mesh_has_to_fit_devices_and_heads(text_dir):
    with pytest.raises(ValueError, match="takes 64 devices, and there is 1"):
        vlcache_jax.load(text_dir, mesh="model=64")
    text = TextConfig(num_heads=12, num_kv_heads=4)
    assert [n for n in range(1, 13) if fits(text, n)] == [1, 2, 3, 4, 6, 12]
    with pytest.raises(ValueError, match="of 8 devices model=1, 2, 3, 4, 6 fits"):
        DeviceMesh({"data": 1, "model": 8}, text, [jax.devices()[0]] * 8)


def test_a_mesh_of_one_device_is_none(text_dir):
    assert DeviceMesh.of("model=1,data=1", TextConfig()) is None
    assert vlcache_jax.load(text_dir, mesh={"model": 1}).programs.mesh is None


def test_which_axis_is_split():
    path = [jax.tree_util.DictKey(name) for name in ("params", "layers", 3, "down")]
    assert axes_of(path, 2) == ("mlp", None)
    assert tuple(partition(axes_of(path, 2))) == (("heads", "group"), None)
    path = [jax.tree_util.DictKey(name) for name in ("params", "vision", "layers", 3, "qkv")]
    assert axes_of(path, 4) == (None,) * 4
    path = [jax.tree_util.DictKey("pool"), jax.tree_util.GetAttrKey("k")]
    assert partition(axes_of(path, 4))[:2] == ("data", "heads")
    assert partition(axes_of(path, 4), split_batch=False)[:2] == (None, "heads")
    assert partition(axes_of([jax.tree_util.DictKey("token")], 1))[0] == "data"


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_part_of_a_parameter_is_read_by_itself(name):
    """Zeros stand behind the last one; all parts of a group have its key and value."""
    axes, grouped = PARAMETERS[name], "qkv" in name
    sizes = {"kv_heads": 2, "group": 8 if grouped else 6}
    shape = tuple(sizes.get(axis or "", 5) for axis in axes)
    counts = tuple({"kv_heads": 2, None: 1}.get(axis, 3) for axis in axes)
    whole = np.random.default_rng(0).standard_normal(shape)
    for number in np.ndindex(*counts):
        expected = whole
        for at, (axis, mine, count) in enumerate(zip(axes, number, counts, strict=True)):
            if axis == "group" and grouped:
                expected = np.take(expected, [2 * mine, 2 * mine + 1, 6, 7], at)
                continue
            wide = [(0, -shape[at] % count if each == at else 0) for each in range(len(shape))]
            expected = np.split(np.pad(expected, wide), count, at)[mine]
        found = part_of(name, shape, number, counts, whole.__getitem__)
        np.testing.assert_array_equal(found, expected)
