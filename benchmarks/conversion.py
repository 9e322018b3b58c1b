"""Time and memory of conversion and loading: `python -m benchmarks.conversion --workdir DIR`.

Makes a random bfloat16 checkpoint of the shapes of LLaVA-1.5-7B (14.1 GB in three files), converts
it, and loads it from both directories, each in a process of its own whose anonymous memory
(RssAnon of /proc/PID/status: what cannot be dropped, as mapped files can) is sampled all the time.
Needs 30 GB of disk, and memory for the parameters plus 2 GB. Linux only.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.documents import RESULTS, ROOT, Part, measured, table
from benchmarks.environment import environment, write_result
from vlcache_jax.checkpoints.checkpoint import open_checkpoint
from vlcache_jax.checkpoints.safetensors_writer import SHARD_BYTES, write_tensors
from vlcache_jax.checkpoints.weights import DTYPES, parameter_name, parameter_shapes, tensors_of
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.models.llava.names import LLAVA

CONVERT_LIMIT = 4e9
"""Most anonymous memory of a conversion, in bytes."""

LOAD_LIMIT = 2e9
"""Most anonymous memory of a loading process beside the parameters, in bytes."""

RESULT = RESULTS / "cpu" / "conversion.json"
_SAMPLE_S = 0.01


def model_config(tiny: bool) -> dict[str, Any]:
    """config.json of LLaVA-1.5-7B, or of a model of the same kind with few and narrow layers."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = (256, 512, 3, 16) if tiny else (1024, 4096, 24, 16)
    text = (512, 1024, 4, 4) if tiny else (4096, 11008, 32, 32)
    return {
        "model_type": "llava",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": 336,
            "patch_size": 14,
            **dict(zip(names, vision, strict=True)),
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 2048 if tiny else 32064,
            "num_key_value_heads": text[-1],
            "max_position_embeddings": 4096,
            **dict(zip(names, text, strict=True)),
        },
    }


def make_checkpoint(
    directory: Path, config: dict[str, Any], shard_bytes: int, progress: Callable[[int], None]
) -> None:
    """Write a random checkpoint tensor by tensor, reporting the bytes of each.

    The values have a random sign, a random mantissa and one of four neighbouring exponents, which
    compresses about as well as trained weights do.
    """
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    dtype = DTYPES["bfloat16"]
    shapes = tensor_shapes(config)
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
            array = ((bits & 0x81FF) | 0x3C00).view(dtype).reshape(shape)  # 2^-7 to 2^-4
            progress(array.nbytes)
            yield name, array

    write_tensors(directory, shapes, dtype, tensors(), shard_bytes)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hub names and shapes of all tensors of a model."""
    return {
        tensor: shape
        for name, whole in parameter_shapes(LlavaConfig.from_hf(config)).items()
        for tensor, shape in tensors_of(LLAVA, name, whole).items()
    }


def report_load(directory: str) -> None:
    """Load a checkpoint and print its size, time and checksums as JSON; run in a child."""
    began = time.perf_counter()
    params = open_checkpoint(directory).load()
    seconds = time.perf_counter() - began
    sums = {
        parameter_name(path): zlib.crc32(np.asarray(leaf).reshape(-1).view(np.uint8).data)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"load_s": round(seconds, 2), "parameter_bytes": size, "crc32": sums}))


def watch(command: list[str], progress: Callable[[int], None]) -> tuple[dict[str, Any], str]:
    """Run a program and sample its anonymous memory until it ends.

    Returns:
        Its time in seconds and its peak in bytes, and what it printed.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began, highest = time.perf_counter(), 0
        child = subprocess.Popen(command, stdout=output, stderr=errors, text=True, cwd=ROOT)
        try:
            while child.poll() is None:
                highest = max(highest, _anonymous_bytes(child.pid))
                progress(highest)
                time.sleep(_SAMPLE_S)
        finally:
            child.kill()
            child.wait()
        seconds = round(time.perf_counter() - began, 2)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {errors.read()}")
        return {"process_s": seconds, "peak_rss_anon_bytes": highest}, output.read()


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(lines[0].split()[1]) if lines else 0  # a process that has ended has none


def _files(directory: Path) -> dict[str, int]:
    """The files of a directory and below by name, and their sizes in bytes."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.stat().st_size for file in files}


def _forget(directory: Path) -> None:
    """Drop a directory's files from the page cache, so that they are read from the disk."""
    for name in _files(directory):
        with (directory / name).open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, tiny: bool, bar: Progress) -> dict[str, Any]:
    """Make, convert and load a checkpoint in an empty folder."""
    source, target = folder / "safetensors", folder / "converted"
    config = model_config(tiny)
    total = 2 * sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())
    free = shutil.disk_usage(folder).free
    if free < 2.1 * total:
        raise OSError(f"{folder} needs {2.1 * total / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")

    task = bar.add_task("making the checkpoint", total=total)
    shard_bytes = SHARD_BYTES if not tiny else total // 3
    make_checkpoint(source, config, shard_bytes, lambda done: bar.advance(task, done))
    result: dict[str, Any] = {
        "model": "tiny" if tiny else "LLaVA-1.5-7B shapes, random",
        "parameter_bytes": total,
        "source": _files(source),
    }
    load = "from benchmarks.conversion import report_load; report_load({!r})"
    commands = {
        "convert": ["-m", "convert", str(source), str(target)],
        "load_safetensors": ["-c", load.format(str(source))],
        "load_converted": ["-c", load.format(str(target))],
    }
    sums = {}
    for name, arguments in commands.items():
        _forget(folder)
        task = bar.add_task(f"{name}: peak memory", total=total)
        step, output = watch(
            [sys.executable, *arguments], lambda now, task=task: bar.update(task, completed=now)
        )
        if output:
            report = json.loads(output)
            sums[name] = report.pop("crc32")
            step |= report
        result[name] = step
    first, second = sums.values()
    return result | {
        "converted_bytes": sum(_files(target).values()),
        "parameters": len(first),
        "page_cache": "dropped before each step",
        "checks": {
            f"conversion below {CONVERT_LIMIT / 1e9:g} GB": (
                result["convert"]["peak_rss_anon_bytes"] < CONVERT_LIMIT
            ),
            f"loads below parameters + {LOAD_LIMIT / 1e9:g} GB": all(
                result[name]["peak_rss_anon_bytes"] <= total + LOAD_LIMIT for name in sums
            ),
            "both loads give the same parameters": first == second,
        },
    }


@measured
def part(result: dict[str, Any]) -> str:
    """The part of the README."""
    rows = []
    for key, name in (
        ("convert", "convert to Orbax"),
        ("load_safetensors", "load the Hugging Face directory"),
        ("load_converted", "load the converted directory"),
    ):
        step = result[key]
        peak = step["peak_rss_anon_bytes"] / 1e9
        rows.append([name, f"{step['process_s']:.0f} s", f"{peak:.1f} GB"])
    size, machine = result["parameter_bytes"] / 1e9, result["machine"]
    return (
        f"{result['model']}, {size:.1f} GB of parameters, on {machine['cores']} cores "
        f"({machine['cpu']}):\n\n{table(['step', 'time', 'peak anonymous memory'], rows)}"
    )


SECTION = Part("conversion", part, (RESULT,))


def main(
    workdir: Annotated[Path, typer.Option(help="A directory on a disk with 30 GB free.")],
    out: Annotated[Path, typer.Option(help="The result file.")] = RESULT,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A small model, to try the program.")
    ] = False,
) -> None:
    """Measure conversion and loading, and check the bounds on their memory."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(dir=workdir.resolve(), prefix="conversion-") as folder,
        Progress(*columns, console=console) as bar,
    ):
        result = environment() | measure(Path(folder), tiny, bar)
    write_result(out, result)
    for check, passed in result["checks"].items():
        console.print(f"{'yes' if passed else 'NO '} {check}")
    if not all(result["checks"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
