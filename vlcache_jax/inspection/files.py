"""Writing of reports and figures."""

from pathlib import Path

from vlcache_jax.cache.trace import check_target

SUFFIXES = {".html": "the page", ".json": "the numbers"}


def check_report(path: str | Path, *, force: bool) -> Path:
    """The file that a report may be written to; to be asked before any work is done.

    Raises:
        FileExistsError: the file exists and `force` is not set.
        FileNotFoundError: its directory does not exist.
        ValueError: its name does not end in .html or .json.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        endings = " or ".join(f"{ending} ({what})" for ending, what in SUFFIXES.items())
        raise ValueError(f"report {path} must end in {endings}")
    return check_target(path, force=force, what="report", suffix=suffix)


def write_whole(target: Path, data: bytes) -> None:
    """Write a file beside its place and rename it, so that it is there whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
