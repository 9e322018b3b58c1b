"""`kv_map`: how much of the cache keeps each part of a picture, and of the text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.requests.processing import Processor
from vlcache_jax.serving.ticket import Ticket


def rectangles(processor: Processor, images: Sequence[Image.Image]) -> list[np.ndarray]:
    """Where the visual tokens of each picture lie in it.

    Args:
        processor: the model's.
        images: the pictures, in the order of the prompt's marks.

    Returns:
        (left, top, right, bottom) in shares of the picture's width and height, float64 [n, 4] for
        each. NaN for what shows no part of it.

    Raises:
        NotImplementedError: the processor resizes them in a way that is not followed.
    """
    found = processor.patches([(image.height, image.width) for image in images])
    return [own.rectangles / (image.size * 2) for own, image in zip(found, images, strict=True)]


def kept_map(tickets: Sequence[Ticket], shown: Sequence[np.ndarray]) -> dict[str, Any]:
    """What is told of prompts, plain values.

    Args:
        tickets: one of each prompt; it has been answered, and had `kv_map`.
        shown: `rectangles` of the pictures, where there is but one prompt.

    Returns:
        For each picture its "rectangles", and the share of the kv heads of all layers that keep the
        token of each, "kept"; of the text tokens the mean of these, None where there are none.
        Tokens that show nothing, newlines and padding, are left out.
    """
    text, visual = [], []
    for ticket in tickets:
        assert ticket.kept_share is not None
        shows = ticket.inputs.visual_index[0, : ticket.kept_share.size] >= 0
        text.append(ticket.kept_share[~shows])
        visual.append(ticket.kept_share[shows])
    ends = np.cumsum([len(each) for each in shown])
    pictures = []
    for own, kept in zip(shown, np.split(np.concatenate(visual), ends[:-1]), strict=False):
        left, top, right, bottom = own.T
        there = (right > left) & (bottom > top)  # not of NaN
        pictures.append({"rectangles": _plain(own[there]), "kept": _plain(kept[there])})
    words = np.concatenate(text)
    return {"pictures": pictures, "text": _plain(words.mean()) if words.size else None}


def _plain(values: np.ndarray | np.floating) -> Any:
    return np.round(np.asarray(values, np.float64), 4).tolist()
