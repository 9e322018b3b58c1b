"""What a result needs beside its numbers, so that others can repeat it."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vlcache_jax.files import whole_file

_PACKAGES = (
    "jax", "jaxlib", "flax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy", "triton",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Commit, command, machine, versions and date of a run."""
    return {
        "commit": commit_of(Path(__file__).parent),
        "command": " ".join([Path(sys.executable).name, "-m", _module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            **{item.name: item.version for item in metadata.distributions()
               if item.name in _PACKAGES},
        },
    }  # fmt: skip


def added(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result with the rows of another one behind its own; "added" says what made these.

    Args:
        before: the result; {} for none.
        new: the other one.
    """
    if not before:
        return new
    about = {name: value for name, value in new.items() if name != "rows"}
    return {
        **before,
        "rows": [*before["rows"], *new["rows"]],
        "added": [*before.get("added", []), {**about, "rows": len(new["rows"])}],
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, which appears whole or not at all."""
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, which appears whole or not at all; folders are made where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, force=True) as file:
        file.write(content)


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem


def commit_of(folder: Path) -> str:
    """The commit that is checked out in a folder, marked where the files differ from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--verify", "HEAD")
    if not commit:
        return "none"
    return f"{commit} with changes" if git("status", "--porcelain") else commit


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
