"""Arguments that lmms-eval gives to every model, checked before the model is opened."""

import os

import jax


def batch_size_of(batch_size: int | str, max_batch_size: int | None) -> int:
    """Prompts of a batch.

    Args:
        batch_size: `--batch_size`; the command line gives it as text.
        max_batch_size: `--max_batch_size`; None for no limit.

    Raises:
        ValueError: it is no whole number above 0.
    """
    sizes = [batch_size] if max_batch_size is None else [batch_size, max_batch_size]
    if not all(str(size).isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(
            f"batch_size={batch_size} and max_batch_size={max_batch_size}: give whole numbers "
            "above 0; a size is not found by itself"
        )
    return min(map(int, sizes))


def check_device(device: str | None) -> None:
    """Refuse a device other than the one that JAX takes.

    Args:
        device: `--device`, "cpu", "cuda" or "cuda:0"; None for JAX's own choice.

    Raises:
        ValueError: it is another device.
    """
    taken = {"gpu": ("cuda", "cuda:0", "gpu")}.get(jax.default_backend(), (jax.default_backend(),))
    if device is not None and device not in taken:
        raise ValueError(
            f"device {device!r}: JAX runs on {taken[0]!r} here. Leave the argument out and choose "
            "with the environment variables JAX_PLATFORMS=cpu or CUDA_VISIBLE_DEVICES=1"
        )


def check_one_process() -> None:
    """Refuse a launcher's second process.

    Raises:
        NotImplementedError: there are several processes.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise NotImplementedError(
            f"{processes} processes: only one is supported; start `python -m lmms_eval` by itself"
        )
