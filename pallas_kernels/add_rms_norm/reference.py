"""Float64, for tests only."""

import numpy as np


def add_rms_norm(
    x: np.ndarray, delta: np.ndarray, scale: np.ndarray, *, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """The sum is rounded to the type of x before it is normalised, as in the models."""
    total = (x + delta).astype(x.dtype)
    y = total.astype(np.float64)
    y /= np.sqrt((y * y).mean(-1, keepdims=True) + eps)
    return total, y * scale.astype(np.float64)
