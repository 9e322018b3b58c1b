"""Several processes that run one program: what they answer, and what becomes of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.program import refused, run_alone, without_kept_programs

ASKED = ("--raw-prompt", "--prompt", "Once upon a time", "--json")


def started(directory, number, address, *arguments):
    """One of two processes, with two devices each."""
    own = "--coordinator", address, "--process-id", number, "--processes", 2
    options = ["--no-compilation-cache", "generate", directory, *ASKED, *arguments, *own]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    return subprocess.Popen(
        [sys.executable, "-m", "vlcache_jax.cli", *map(str, options)],
        env={**without_kept_programs(), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def connections(address):
    """How many processes are connected with the first one."""
    port, files = int(address.rpartition(":")[2]), (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
    lines = [line.split() for file in files for line in file.read_text().splitlines()[1:]]
    return sum(local.endswith(f":{port:04X}") and state == "01" for _, local, _, state, *_ in lines)


@pytest.mark.full
def test_two_processes_answer_as_one(text_dir, address):
    arguments = "--max-new-tokens", 6, "--mesh", "model=2,data=2"
    both = [started(text_dir, number, address, *arguments) for number in (0, 1)]
    (first, errors), (second, more) = (each.communicate(timeout=300) for each in both)
    assert [each.returncode for each in both] == [0, 0], errors + more
    assert (errors, second, more) == ("", "", "")
    alone = run_alone("generate", text_dir, *ASKED, "--max-new-tokens", 6)
    assert json.loads(first)["tokens"] == json.loads(alone.stdout)["tokens"]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_is_lost_ends_the_others(text_dir, address):
    both = [started(text_dir, number, address, "--mesh", "model=4") for number in (0, 1)]
    end = time.monotonic() + 100
    while connections(address) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    both[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    out, errors = both[0].communicate(timeout=120)
    both[1].communicate()
    assert both[0].returncode not in (0, None)
    assert out == ""
    assert errors.count("\n") == 1
    assert "another process was lost, or could not be reached" in errors
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("together, or none", ("--coordinator", "a:1")),
        ("together, or none", ("--process-id", 0, "--processes", 2)),
        ("is written HOST:PORT", ("--coordinator", "a", "--process-id", 0, "--processes", 2)),
        ("must be from 0", ("--coordinator", "a:1", "--process-id", 2, "--processes", 2)),
    ],
)
def test_processes_that_cannot_be_are_refused(message, arguments):
    refused(message, "generate", "demo-small", "--prompt", "x", *arguments)


def test_a_trace_of_several_processes_is_not_implemented(tmp_path):
    several = "--coordinator", "a:1", "--process-id", 0, "--processes", 2
    trace = "--trace", tmp_path / "trace.npz"
    refused("--trace with several", "generate", "demo-small", "--prompt", "x", *trace, *several)


@pytest.mark.parametrize("command", ["generate", "compare", "evaluate", "chat"])
def test_a_mesh_that_cannot_be_is_refused(command):
    asked = () if command == "chat" else ("--prompt", "x")
    refused("takes 64 devices", command, "demo-small", *asked, "--mesh", "model=64")
    refused("model=4,data=2", command, "demo-small", *asked, "--mesh", "tensor=2")
