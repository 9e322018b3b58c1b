"""The program as a process of its own: where its commands come from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.program import refused

ROOT = Path(__file__).parents[2]


def program(cwd, *arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "vlcache_jax.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_command_that_fails_to_import_costs_one_warning(tmp_path):
    (tmp_path / "broken-1.0.dist-info").mkdir()
    (tmp_path / "broken-1.0.dist-info" / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
    entries = "[vlcache.commands]\nbroken = broken_package.module:command\n"
    (tmp_path / "broken-1.0.dist-info" / "entry_points.txt").write_text(entries)
    (tmp_path / "broken_package.py").write_text("1 / 0")
    done = program(tmp_path, "--help", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.returncode == 0
    assert "generate" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "broken of broken_package.module:command is left out: division by zero" in done.stderr


def test_a_module_of_the_working_directory_does_not_stand_in_for_conversion(tmp_path):
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong module')")
    done = program(tmp_path, "convert", "--help")
    assert done.returncode == 0, done.stderr
    assert "Convert a checkpoint to Orbax" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("command", ["generate", "compare", "info", "inspect"])
@pytest.mark.parametrize("budget", ["10", "256"])
def test_a_bare_number_of_tokens_or_per_cent_is_refused(command, budget):
    asked = ("--prompt", "x") if command != "info" else ()
    for reading in ("0.1 for 10 %", f"{budget}tok for {budget} tokens"):
        refused(reading, command, "demo-small", *asked, "--json", "--kv-budget", budget)
