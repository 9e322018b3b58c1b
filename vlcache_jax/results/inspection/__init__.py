"""See what the cache keeps: `inspect` answers a question and tells what each method kept of it.

```
 pictures, text ─► full cache ─► Outcome ┐
                   method     ─► Outcome ├─► Inspection ─► .save("report.html")
                   method     ─► Outcome ┘                 .save_figures("png")
```

Which patch of a picture a visual token is comes from the family's packing, what was kept of it from
`cache.trace`. The page is made by `page`, the figures by `figures`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import FullCache, as_method
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.cache.trace import Trace
from vlcache_jax.files import whole_file
from vlcache_jax.requests.images import ImageLike, Images, load_image
from vlcache_jax.requests.inputs import CONTEXT
from vlcache_jax.requests.processing import Processor
from vlcache_jax.requests.videos import Clip, Videos
from vlcache_jax.results.answer import Answer, same_tokens, versions
from vlcache_jax.results.labels import labels, settings_of
from vlcache_jax.results.report import CacheReport
from vlcache_jax.running.driver import Timings
from vlcache_jax.vlm import VLM


@dataclass(frozen=True)
class ShownPicture:
    """A picture, or what of a video is one, and its n visual tokens.

    Attributes:
        name: its file's name, or "picture 1"; of a video with the numbers of the frames that its
            tokens show, and when the first of them is seen.
        image: the picture, or the first of the frames, RGB and upright.
        positions: places of its visual tokens in the prompt, int64 [n].
        rectangles: what each of them shows, (left, top, right, bottom) in pixels of the picture,
            float64 [n, 4]; NaN for a newline, of no area where it shows padding alone.
        part: 0 for the base tile, 1 for the grid of tiles, 2 for a newline, int8 [n].
        video: the number of the video that it is of, from 1 on; None for a picture.
    """

    name: str
    image: Image.Image
    positions: np.ndarray
    rectangles: np.ndarray
    part: np.ndarray
    video: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What one method answered and kept.

    Attributes:
        label: the method and its budget, unlike that of any other: "vl-cache+akvq 0.1", or "full";
            with the settings that tell it from others of its name: "vl-cache 0.1, threshold=0.1".
        text: the answer.
        right: whether it is the right one, None where that is not known.
        pieces: the text of each of its tokens; one that completes no character is "".
        first_difference: the first token that is not that of the full cache's answer; None where
            the answers are the same.
        cache: what is kept, in tokens and bytes.
        timings: of the run; its `prefill_s` has the decode step in it that the trace takes.
        trace: which tokens are kept, and why.
    """

    label: str
    text: str
    right: bool | None
    pieces: list[str]
    first_difference: int | None
    cache: CacheReport
    timings: Timings
    trace: Trace


@dataclass(frozen=True)
class Inspection:
    """A prompt of m tokens, and what each method kept of it.

    Attributes:
        model: what was loaded.
        prompt: the question, as it was asked.
        right_answer: what is to be answered, None where that is not known.
        pieces: the text of each token of the rendered prompt, m of them; "" for visual ones.
        visual: which tokens are visual, bool [m].
        context: which tokens are the context's, bool [m].
        pictures: the pictures and the frames of videos, in their order.
        full: the outcome of the full cache.
        outcomes: those of the methods.
        settings: what the run was made with, the methods' settings among it, as plain values.
        versions: of Python and of packages.
    """

    model: str
    prompt: str
    right_answer: str | None
    pieces: list[str]
    visual: np.ndarray
    context: np.ndarray
    pictures: list[ShownPicture]
    full: Outcome
    outcomes: list[Outcome]
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def kinds(self) -> dict[str, int]:
        """Tokens of the prompt by their kind; of visual and context those that it has."""
        about = {"visual": int(self.visual.sum()), "context": int(self.context.sum())}
        found = {kind: count for kind, count in about.items() if count}
        return found | {"text": self.visual.size - sum(found.values())}

    def kept_share(self, outcome: Outcome) -> np.ndarray:
        """The share of layers and kv heads that keep each token, float64 [m]."""
        return _kept(outcome.trace).mean(axis=(0, 1))

    def kept_by_layer(self, outcome: Outcome) -> np.ndarray:
        """The share of each layer's kv heads that keep each token, float64 [L, m]."""
        return _kept(outcome.trace).mean(axis=1)

    def layers(self, outcome: Outcome) -> list[dict[str, Any]]:
        """What each layer keeps, and why, as plain values; None for what a method does not have.

        `budget` tokens are kept by each kv head: `recent` of them, the prompt's last ones, whatever
        they are worth, and of the others `visual`, `context` and `text` by their worth (means over
        the heads).
        `hit_rate` and `mass_recall` are means over the heads too.
        """
        trace = outcome.trace
        none = np.full(len(trace.budget), None)
        recent = np.zeros_like(trace.budget) if trace.recent is None else trace.recent
        chosen = _kept(trace) & (np.arange(trace.m) < trace.m - recent[:, None, None])
        columns = {
            "layer": np.arange(len(trace.budget)),
            "budget": trace.budget,
            "recent": recent,
            "visual": (chosen & self.visual).sum(axis=2).mean(axis=1),
            "context": (chosen & self.context).sum(axis=2).mean(axis=1),
            "text": (chosen & ~(self.visual | self.context)).sum(axis=2).mean(axis=1),
            "sparsity": none if trace.sparsity is None else trace.sparsity,
            "beta": none if trace.beta is None else trace.beta,
            "hit_rate": trace.hit_rate.mean(axis=1),
            "mass_recall": trace.mass_recall.mean(axis=1),
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def as_json(self) -> dict[str, Any]:
        """All numbers as plain values.

        A newline's rectangle is None. `kept` are the positions that each kv head of each layer
        keeps; None where every one keeps all of them.
        """
        return vars(self) | {
            "visual": self.visual.tolist(),
            "context": self.context.tolist(),
            "pictures": [_picture_values(picture) for picture in self.pictures],
            "full": self._outcome_values(self.full),
            "outcomes": [self._outcome_values(outcome) for outcome in self.outcomes],
        }

    def _outcome_values(self, outcome: Outcome) -> dict[str, Any]:
        mask = _kept(outcome.trace)
        kept = [[np.flatnonzero(head).tolist() for head in layer] for layer in mask]
        return {
            "label": outcome.label,
            "text": outcome.text,
            "right": outcome.right,
            "pieces": outcome.pieces,
            "first_difference": outcome.first_difference,
            "cache": dataclasses.asdict(outcome.cache),
            "timings": dataclasses.asdict(outcome.timings),
            "layers": self.layers(outcome),
            "kept_share": self.kept_share(outcome).tolist(),
            "kept": None if mask.all() else kept,
        }

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the page (.html) or the numbers (.json); the file appears whole or not at all.

        Raises:
            FileExistsError: the file exists and `force` is not set.
            FileNotFoundError: its directory does not exist.
            ValueError: its name ends otherwise.
        """
        from vlcache_jax.results.inspection.page import render
        from vlcache_jax.results.pages import write_report

        write_report(path, self.as_json, lambda: render(self), force=force)

    def save_figures(self, folder: str | Path, *, force: bool = False) -> list[Path]:
        """Draw the figures as PNG files into a folder, which is made if it is not there.

        Returns:
            The files; see `figures.FIGURES`.

        Raises:
            FileExistsError: one of the files exists and `force` is not set.
            FileNotFoundError: the directory that the folder is to be made in does not exist.
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: the folder is a file.
        """
        from vlcache_jax.results.inspection import figures

        target = figures.check_folder(folder, force=force)
        drawn = {target / name: draw(self) for name, draw in figures.FIGURES.items()}
        target.mkdir(exist_ok=True)
        options = {"format": "png", "dpi": figures.DPI, "metadata": {"Software": None}}
        for path, figure in drawn.items():
            with whole_file(path, force=force) as file:
                figure.savefig(file, **options)
        return list(drawn)


def inspect(
    vlm: VLM,
    images: Images = None,
    text: str = "",
    *,
    methods: Sequence[CacheMethod | Quantizer],
    videos: Videos = None,
    frames: int | None = None,
    context: str | None = None,
    right_answer: str | None = None,
    max_new_tokens: int = 64,
    raw_prompt: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Answer a prompt with the full cache and with each method, and tell what was kept.

    The input is checked before the parameters are read. Each token is the most likely one.

    Args:
        vlm: the model.
        images: None, an image or a list of images: local files, PIL images or uint8 [H, W, 3].
        text: the prompt.
        methods: one or more methods, or quantizers, which keep everything.
        videos: None, a video or a list of videos (`requests.videos.Videos`).
        frames: how many frames of each video the model is shown.
        context: a text that the prompt is about.
        right_answer: what is to be answered, where that is known.
        max_new_tokens: most tokens of an answer.
        raw_prompt: take the text as it is, without the chat template.
        progress: called before each answer with its label, the answers done and those in all.

    Raises:
        ValueError: there is no method, or one is given twice, an image or the prompt is bad, or
            there are more tokens than the model has positions for.
        FileNotFoundError: a file of an image or a video does not exist.
    """
    if not methods:
        raise ValueError("nothing to inspect: give one method or more, VLCache(0.1) for instance")
    given = images if isinstance(images, list | tuple) else [images]
    sources: list[Any] = [] if images is None else list(given)
    loaded: list[ImageLike] = [load_image(source) for source in sources]
    clips = vlm.processor.clips(videos, frames)
    chosen = [
        as_method(method).for_model(vlm.config.text, vlm.tsa_layers)
        for method in (FullCache(), *methods)
    ]
    names = labels(chosen)
    prompt: dict[str, Any] = {
        "images": loaded, "text": text, "videos": clips, "context": context,
        "raw_prompt": raw_prompt,
    }  # fmt: skip
    streams = [
        vlm.stream(**prompt, max_new_tokens=max_new_tokens, cache=method, trace=True)
        for method in chosen
    ]
    inputs = vlm.processor(**prompt)
    length = int(inputs.length[0])
    tokens, index = inputs.tokens[0, :length], inputs.visual_index[0, :length]
    visual = index >= 0
    words = iter(vlm.processor.detokenizer(special_tokens=True).split(tokens[~visual]))
    _ = vlm.params  # read before the first answer is announced
    answers: list[Answer] = []
    for number, (name, stream) in enumerate(zip(names, streams, strict=True)):
        if progress:
            progress(name, number, len(chosen))
        for _ in stream:
            pass
        answers.append(stream.answer)
    full, *outcomes = (
        _outcome(vlm.processor, name, answer, answers[0], right_answer)
        for name, answer in zip(names, answers, strict=True)
    )
    return Inspection(
        model=vlm.name,
        prompt=text,
        right_answer=right_answer,
        pieces=["" if is_visual else next(words) for is_visual in visual],
        visual=visual,
        context=index == CONTEXT,
        pictures=locate(vlm.processor, sources, clips, tokens, visual),
        full=full,
        outcomes=outcomes,
        settings={
            "methods": dict(zip(names, map(settings_of, chosen), strict=True)),
            "max_new_tokens": max_new_tokens,
            "raw_prompt": raw_prompt,
            "backend": vlm.backend or "the best for the device",
            "device": jax.devices()[0].device_kind,
            "dtype": str(vlm.params["embed"]["embedding"].dtype),
        },
        versions=versions(),
    )


def locate(
    processor: Processor,
    sources: Sequence[ImageLike],
    clips: Sequence[Clip],
    tokens: np.ndarray,
    visual: np.ndarray,
) -> list[ShownPicture]:
    """The pictures of a prompt, with the places of their visual tokens in it.

    Args:
        processor: the model's.
        sources: the pictures, in the order of the prompt's marks.
        clips: the videos, likewise.
        tokens: the prompt's ids, int [m].
        visual: which of them are visual, bool [m].
    """
    images = [load_image(source) for source in sources]
    patches = processor.patches([(image.height, image.width) for image in images])
    none, of_videos = np.zeros(0, np.int64), processor.is_video(tokens)
    pictures = [
        ShownPicture(
            Path(source).name if isinstance(source, str | Path) else f"picture {number}",
            image, none, found.rectangles, found.part,
        )
        for number, (source, image, found) in enumerate(
            zip(sources, images, patches, strict=True), 1
        )
    ]  # fmt: skip
    frames = [
        frame for number, clip in enumerate(clips, 1) for frame in _frames(processor, clip, number)
    ]
    placed = [
        *_placed(pictures, np.flatnonzero(visual & ~of_videos)),
        *_placed(frames, np.flatnonzero(visual & of_videos)),
    ]
    return sorted(placed, key=lambda picture: picture.positions[0])


def _placed(pictures: Sequence[ShownPicture], places: np.ndarray) -> Iterator[ShownPicture]:
    """Pictures whose tokens follow each other at these places of the prompt, int [n]."""
    for picture in pictures:
        own, places = np.split(places, [len(picture.part)])
        yield dataclasses.replace(picture, positions=own)


def _frames(processor: Processor, clip: Clip, number: int) -> Iterator[ShownPicture]:
    """The pictures of a video, not yet placed: of those that a token shows, the first frame."""
    patches = processor.frame_patches(clip)
    span = -(-len(clip.frames) // len(patches))
    for first, found in zip(range(0, len(clip.frames), span), patches, strict=True):
        own = clip.chosen[first : first + span].tolist()
        name = f"{clip.name or f'video {number}'}, frame {' and '.join(map(str, own))}"
        if clip.shape.fps:
            name += f", {own[0] / clip.shape.fps:.2f} s"
        none = np.zeros(0, np.int64)
        yield ShownPicture(name, clip.frames[first], none, found.rectangles, found.part, number)


def _outcome(
    processor: Processor, name: str, answer: Answer, full: Answer, right: str | None
) -> Outcome:
    assert answer.trace is not None  # it was asked for
    same = same_tokens(full.tokens, answer.tokens)
    return Outcome(
        label=name,
        text=answer.text,
        right=answer.is_right(right),
        pieces=processor.detokenizer().split(answer.tokens),
        first_difference=None if answer.tokens == full.tokens else same,
        cache=answer.cache,
        timings=answer.timings,
        trace=answer.trace,
    )


def _kept(trace: Trace) -> np.ndarray:
    """Which tokens each kv head of each layer keeps, bool [L, K, m]."""
    mask = np.zeros((*trace.kept.shape[:2], trace.m + 1), bool)
    np.put_along_axis(mask, trace.kept, True, axis=2)  # -1 is the row behind the last
    return mask[..., :-1]


def _picture_values(picture: ShownPicture) -> dict[str, Any]:
    newline = np.isnan(picture.rectangles[:, 0])
    boxes = picture.rectangles.tolist()
    return {
        "name": picture.name,
        "width": picture.image.width,
        "height": picture.image.height,
        "positions": picture.positions.tolist(),
        "rectangles": [None if end else box for end, box in zip(newline, boxes, strict=True)],
        "part": picture.part.tolist(),
        "video": picture.video,
    }
