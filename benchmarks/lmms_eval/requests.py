"""What lmms-eval asks for, checked, read and answered in batches; needs no lmms-eval."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from PIL import Image

from vlcache_jax import VLM, Answer, CacheMethod, Sampling

NEW_TOKENS = 1024
"""Most tokens of an answer where a task does not say, as in lmms-eval's own LLaVA models."""

GREEDY = Sampling()

FEWSHOT_DELIMITER = "\n\n"
"""What lmms-eval says ends an answer where a task does not say."""

UNSUPPORTED = {"num_beams": 1, "repetition_penalty": 1.0, "min_new_tokens": 0}
"""Settings that would change an answer and are not implemented, and the values that change none."""


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


def check_machine(device: str | None) -> None:
    """Refuse a device other than the one that JAX takes, and a launcher's second process.

    Args:
        device: `--device`, "cpu", "cuda" or "cuda:0"; None for JAX's own choice.

    Raises:
        ValueError: it is another device.
        NotImplementedError: there are several processes.
    """
    taken = {"gpu": ("cuda", "cuda:0", "gpu")}.get(jax.default_backend(), (jax.default_backend(),))
    if device is not None and device not in taken:
        raise ValueError(
            f"device {device!r}: JAX runs on {taken[0]!r} here. Leave the argument out and choose "
            "with the environment variables JAX_PLATFORMS=cpu or CUDA_VISIBLE_DEVICES=1"
        )
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise NotImplementedError(
            f"{processes} processes: only one is supported; start `python -m lmms_eval` by itself"
        )


@dataclass(frozen=True)
class Settings:
    """How an answer is generated. Requests of equal settings can share a batch.

    Attributes:
        max_new_tokens: most tokens of the answer.
        sampling: how they are drawn.
        until: strings that the answer ends before.
    """

    max_new_tokens: int = NEW_TOKENS
    sampling: Sampling = GREEDY
    until: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Settings":
        """Read a task's generation arguments, with lmms-eval's and Hugging Face's meanings.

        An answer is drawn if `do_sample` says so, or in its absence a temperature above 0. Without
        that `top_k` and `top_p` mean nothing, and tasks do give values that could not be drawn
        with. Arguments for other models (`image_aspect_ratio` and the like) are passed over.

        Where a task names no `until`, lmms-eval fills in the blank line between few-shot examples.
        It is not an end here if it stands alone, as in lmms-eval's own LLaVA models: it would cut
        off answers of several paragraphs.

        Raises:
            ValueError: a value is out of range.
            NotImplementedError: a setting is not supported, such as beams.
        """
        for name, harmless in UNSUPPORTED.items():
            if arguments.get(name) not in (None, harmless):
                raise NotImplementedError(
                    f"{name}={arguments[name]} is not implemented: run the task with "
                    f"--gen_kwargs {name}={harmless}"
                )
        given = {name: value for name, value in arguments.items() if value is not None}
        until = given.get("until", ())
        until = (until,) if isinstance(until, str) else tuple(until)
        temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
        sampling = GREEDY
        if given.get("do_sample", True) and temperature:
            top_k = given.get("top_k") or None  # 0 is Hugging Face's word for all tokens
            sampling = Sampling(temperature, top_k, float(given.get("top_p", 1.0)))
        return cls(
            max_new_tokens=int(given.get("max_new_tokens", NEW_TOKENS)),
            sampling=sampling,
            until=() if until == (FEWSHOT_DELIMITER,) else tuple(filter(None, until)),
        )


class Visuals(NamedTuple):
    """What a document shows.

    Attributes:
        images: its images.
        videos: the files of its videos.
    """

    images: list[Image.Image]
    videos: list[str | Path]


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        text: the prompt.
        visuals: reads its images, and finds its videos.
        settings: how its answer is generated.
    """

    text: str
    visuals: Callable[[], Visuals]
    settings: Settings

    @classmethod
    def of(cls, arguments: tuple[Any, ...], datasets: Mapping[str, Any]) -> "Request":
        """Read the `args` of an lmms-eval instance for `generate_until`.

        Args:
            arguments: context, generation arguments, the function from a document to its images and
                paths of videos, the document's number, its task and its split.
            datasets: documents by task, split and number.

        Raises:
            ValueError: a generation argument is out of range.
            NotImplementedError: one is not supported; `visuals` raises it for audio.
        """
        text, generation, doc_to_visual, number, task, split = arguments

        def visuals() -> Visuals:
            found = Visuals([], [])
            for visual in doc_to_visual(datasets[task][split][number]) or []:
                if isinstance(visual, Image.Image):
                    found.images.append(visual)
                elif isinstance(visual, str | Path):
                    found.videos.append(visual)
                else:
                    raise NotImplementedError(
                        f"document {number} of {task} has a {type(visual).__name__}: only images "
                        "and files of videos are supported, not audio"
                    )
            return found

        return cls(text, visuals, Settings.of(generation))


def answer_all(
    vlm: VLM,
    requests: Sequence[Request],
    *,
    cache: CacheMethod,
    batch_size: int,
    prefill_batch: int | None = None,
    frames: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Answer requests batch by batch; what a batch shows is read while the one before it runs.

    Args:
        vlm: the model.
        requests: in any mixture of settings; a batch has requests of the same ones.
        cache: what is kept of each prompt.
        batch_size: most prompts of a batch.
        prefill_batch: prompts of a batch that are prefilled at a time, all by default.
        frames: frames of each video that the model is shown; what its processor says by default.
        seed: of the first batch's draws. Each batch has one of its own, so that a request that is
            repeated is drawn anew.

    Yields:
        The places of a batch's requests and their answers.

    Raises:
        ValueError: a prompt does not fit the model, or a video cannot be read.
        NotImplementedError: a document holds something else than images and videos.
    """
    groups: dict[Settings, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.settings, []).append(place)
    batches = [
        (settings, group[start : start + batch_size])
        for settings, group in groups.items()
        for start in range(0, len(group), batch_size)
    ]

    def shown(places: list[int]) -> dict[str, Any]:
        found = [requests[place].visuals() for place in places]
        images, videos = ([list(each) for each in kind] for kind in zip(*found, strict=True))
        return {"images": images, "videos": videos, "frames": frames if any(videos) else None}

    arguments = (
        {
            **shown(places),
            "text": [requests[place].text for place in places],
            "max_new_tokens": settings.max_new_tokens,
            "cache": cache,
            "seed": seed + index,
            "prefill_batch": prefill_batch,
            "stop": settings.until,
            **asdict(settings.sampling),
        }
        for index, (settings, places) in enumerate(batches)
    )
    for (_, places), answers in zip(batches, vlm.generate_each(arguments), strict=True):
        yield places, answers
