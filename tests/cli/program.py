"""The command line, run in this process."""

from typer.testing import CliRunner

from vlcache_jax.cli import app


def run(*args):
    return CliRunner().invoke(app, ["--no-compilation-cache", *(str(arg) for arg in args)])


def refused(message, *args):
    """Exit code 2, one clear error on stderr, nothing on stdout."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
