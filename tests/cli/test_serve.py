"""`vlcache serve`: what fits, what is refused, and a server from its start to its end."""

import json
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.cli.program import refused, run

SMALL = ("--prompt-rows", "128", "--new-tokens", "9", "--method", "full", "--prefix-memory", "0")


def test_what_fits_without_weights(model_dir):
    def fitting(*options):
        return json.loads(run("serve", str(model_dir), "--dry-run", "--json", *options).stdout)

    tenth, bits = fitting(), fitting("--kv-bits", "2")
    assert 4 * tenth["fit_full"] < tenth["fit_kept"] < bits["fit_kept"]
    assert sum(group["slots"] for group in tenth["groups"]) == 9
    assert tenth["needed"] <= tenth["memory"]
    few = fitting("--slots", "3", "--new-tokens", "20", "--method", "vl-cache")
    assert few["groups"] == [{"slots": 3, "new_tokens": 20, "budget": "0.1"}]
    table = run("serve", str(model_dir), "--dry-run").stdout
    assert "sequences that fit, full cache" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached by others: set --api-key"),
        (["--api-key", " "], "--api-key is empty"),
        (["--method", "other"], "other"),
        (["--kv-budget", "2"], "budget"),
        (["--kv-bits", "3"], "3"),
        (["--slots", "1000000000"], "ask for fewer"),
        (["--memory-fraction", "0"], "memory_fraction=0"),
        (["--memory-fraction", "0.000001"], "not one slot fits"),
        (["--prefix-store", "disk", "--slots", "1"], "prefix_store"),
        ([each for n in "1234" for each in ("--new-tokens", n)], "at most three times"),
    ],
)
def test_what_is_refused_before_anything_is_compiled(model_dir, options, message):
    refused(message, "serve", str(model_dir), *options)


def test_without_the_packages_it_says_how_to_get_them(model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused("pip install 'vlcache-jax[serve]'", "serve", str(model_dir))


def test_from_its_start_to_its_end(model_dir):
    command = [sys.executable, "-m", "vlcache_jax.cli", "serve", str(model_dir), *SMALL]
    own = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--port", "0", "--name", "tiny"], **own) as server:
        try:
            assert server.stderr is not None
            ready = next(line for line in server.stderr if "ready" in line)
            address = ready.split()[1]
            with urllib.request.urlopen(f"{address}v1/models") as response:
                assert json.load(response)["data"][0]["id"] == "tiny"
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 5,
            }
            request = urllib.request.Request(
                f"{address}v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as response:
                assert json.load(response)["choices"][0]["finish_reason"] in ("stop", "length")
            port = address.rstrip("/").rpartition(":")[2]
            second = subprocess.run([*command, "--port", port], capture_output=True, text=True)
            assert second.returncode == 2
            assert "choose another --port" in second.stderr
            server.send_signal(signal.SIGTERM)
            rest = server.stderr.read()
            assert server.wait(60) in (0, -signal.SIGTERM), rest
        finally:
            server.kill()
    lines = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines] == ["answered"]
    assert "Traceback" not in rest
