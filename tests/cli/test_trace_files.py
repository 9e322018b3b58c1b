"""A trace that cannot be written whole: nothing is lost, nothing is half written."""

import os
import signal
import subprocess
import sys

import pytest

from tests.cli.program import without_kept_programs

CHILD = """
import os, resource, signal, sys
from vlcache_jax.cli import main
how, *sys.argv[1:] = sys.argv[1:]
if how == "full":  # as on a full disk: no file may grow beyond so many bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
else:
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


@pytest.mark.full
@pytest.mark.parametrize("how", ["full", "killed"])
def test_what_was_there_stays(how, model_dir, tmp_path):
    trace = tmp_path / "trace.npz"
    trace.write_bytes(b"before")
    options = ["--prompt", "x", "--max-new-tokens", "2", "--trace", str(trace), "--force"]
    command = [sys.executable, "-c", CHILD, how, "--no-compilation-cache", "generate"]
    child = subprocess.run(
        [*command, str(model_dir), *options],
        env=without_kept_programs(),
        capture_output=True,
        text=True,
    )
    assert trace.read_bytes() == b"before"
    if how == "killed":
        assert child.returncode == -signal.SIGKILL
        return
    assert child.returncode == 2
    assert child.stdout  # the answer
    [line] = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in line
    assert str(trace) in line
    assert os.listdir(tmp_path) == ["trace.npz"]
