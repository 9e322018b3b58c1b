"""The command line, run in this process or in one of its own."""

import os
import subprocess
import sys
from types import SimpleNamespace

from typer.testing import CliRunner

from vlcache_jax.cli import app


def run(*args):
    return CliRunner().invoke(app, ["--no-compilation-cache", *(str(arg) for arg in args)])


def without_kept_programs():
    """The environment, but for the folder in which the tests keep compiled programs."""
    kept = {name for name in os.environ if name.startswith("JAX_") and "_CACHE_" in name}
    return {name: value for name, value in os.environ.items() if name not in kept}


def run_alone(*args):
    """The same in a process of its own."""
    command = [sys.executable, "-m", "vlcache_jax.cli", "--no-compilation-cache", *map(str, args)]
    child = subprocess.run(command, capture_output=True, text=True)
    return SimpleNamespace(
        exit_code=child.returncode, stdout=child.stdout, stderr=child.stderr, exception=None
    )


def refused(message, *args):
    """Exit code 2, one clear error on stderr, nothing on stdout."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
