"""The checkpoint and picture shipped with the package, for a first run without a download.

The checkpoint is made by `benchmarks/make_demo.py`: LLaVA-NeXT in shape, tiny in size.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""A Hugging Face model directory."""

IMAGE = Path(__file__).parent / "picture.png"
"""A picture to ask it about."""
