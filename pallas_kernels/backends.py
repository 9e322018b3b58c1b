"""The choice of a backend, the same for every operation."""

from collections.abc import Sequence


def choose_backend(requested: str | None, implemented: Sequence[str]) -> str:
    """The backend to run: `requested`, or the best one implemented.

    Args:
        requested: a backend's name, or None for the best that supports the case.
        implemented: names in order of preference.

    Raises:
        NotImplementedError: the operation has no such backend.
    """
    if requested is None:
        return implemented[0]
    if requested not in implemented:
        raise NotImplementedError(f"backend={requested!r} is not implemented: use {implemented}")
    return requested
