"""Which layers of a checkpoint attend to text: `calibrate`, and the file that it leaves behind.

AKVQ-VL (Su et al. 2025, arXiv 2501.15021) gives text more bits in text-salient (TSA) layers, which
it names for two decoders. For others they are found here, by a few prompts with pictures.

Choices of this library, where the paper leaves it open: the attention is that of the rows after the
last visual token, over all heads; a layer's text share is what these rows pay to text tokens that
are not pivots, divided by all that they pay (pivots are left out because every deep layer's
attention rests on them, and most of them are text); the mean over the prompts decides.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax import demo
from vlcache_jax.cache.methods import Custom
from vlcache_jax.cache.quantizers import AKVQ
from vlcache_jax.cache.score import ColumnSum
from vlcache_jax.errors import real_number, short
from vlcache_jax.files import check_file, whole_file
from vlcache_jax.models.families import Params
from vlcache_jax.requests.images import Images
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.requests.videos import Videos
from vlcache_jax.results.answer import versions
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.stages import Stages
from vlcache_jax.vlm import VLM

KV_LAYERS = "kv_layers.json"
"""Name of the file beside a checkpoint's weights, which `load` reads."""

THRESHOLD = 0.5
"""Text share above which a layer is text-salient; a choice of this library."""

FORMAT = 1
"""Version of the file."""


@dataclass(frozen=True)
class Calibration:
    """How much each layer of a checkpoint attends to text.

    Attributes:
        text_shares: text share of each layer's attention, from 0 to 1, the mean over the prompts.
        threshold: a layer is text-salient where its share is above this.
        pivots: tokens of each layer and prompt that were left out for their massive activations.
        prompts: how many prompts it was found by.
        versions: of the packages that it was found with.

    Raises:
        ValueError: a number is out of range.
    """

    text_shares: tuple[float, ...]
    threshold: float = THRESHOLD
    pivots: int = AKVQ.pivots
    prompts: int = 1
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        shares = tuple(real_number(share, "text share") for share in self.text_shares)
        object.__setattr__(self, "text_shares", shares)
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"text_shares={short(shares)} must be one number from 0 to 1 a layer")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be from 0 to 1")
        if self.pivots < 0 or self.prompts < 1:
            raise ValueError(f"pivots={self.pivots} from 0 on, prompts={self.prompts} from 1 on")

    @property
    def tsa_layers(self) -> tuple[int, ...]:
        """The text-salient layers: `AKVQ(tsa_layers=...)`."""
        return tuple(i for i, share in enumerate(self.text_shares) if share > self.threshold)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write it to a .json file, which appears whole or not at all.

        Raises:
            FileExistsError: the file exists and `force` is not set.
            FileNotFoundError: its directory does not exist.
        """
        target = check_file(path, "calibration file", force=force)
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
        with whole_file(target, force=force) as file:
            file.write(f"{text}\n".encode())

    @classmethod
    def read(cls, path: str | Path, layers: int | None = None) -> "Calibration":
        """Read what `save` has written.

        Args:
            path: the file.
            layers: layers of the model that it is for; not checked by default.

        Raises:
            ValueError: the file is damaged, or for a model of another number of layers.
        """
        remedy = "delete it, or run `vlcache calibrate` again with --force"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            found = cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no calibration file ({error!r}): {remedy}") from None
        if layers not in (None, len(found.text_shares)):
            raise ValueError(
                f"{path} is for a model of {len(found.text_shares)} layers, this one has {layers}: "
                f"{remedy}"
            )
        return found


def file_beside(model: str | Path) -> Path:
    """Where `load` looks for the calibration of a model directory.

    Raises:
        ValueError: the model is no directory of the user's: a hub id, or that in this package.
        PermissionError: nothing can be written to the directory.
    """
    path, remedy = Path(model).expanduser(), "say where to write with --out FILE.json"
    own = demo.MODELS
    if any(map(path.samefile, own.values())) if path.is_dir() else str(model) in own:
        raise ValueError(f"{model} is a model of this package, which stays as it is: {remedy}")
    if not path.is_dir():
        raise ValueError(f"no directory {model} to write to: name one; of a hub id, {remedy}")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"nothing can be written to {path}: {remedy}")
    return path / KV_LAYERS


def calibrate(
    vlm: VLM,
    images: Images | Sequence[Images] = None,
    text: str | list[str] = "",
    *,
    videos: Videos | Sequence[Videos] = None,
    frames: int | None = None,
    threshold: float = THRESHOLD,
    pivots: int = AKVQ.pivots,
    raw_prompt: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Find the text-salient layers of a model, by a few prompts with pictures or videos.

    The prompts are only read, one at a time, never answered. Use the result as
    `AKVQ(tsa_layers=result.tsa_layers)`, or save it as `KV_LAYERS` beside the weights, where `load`
    finds it.

    Args:
        vlm: the model.
        images: of one prompt, an image or a list of images; of a list of prompts, a list with one
            such entry for each. An image is a local file, a PIL image or uint8 [H, W, 3].
        text: one prompt, or a list of them; each needs an image or a video.
        videos: as images (`requests.videos.Videos`).
        frames: how many frames of each video the model is shown.
        threshold: text share above which a layer is text-salient.
        pivots: tokens of each layer with the largest activations, which are left out.
        raw_prompt: take the text as it is, without the chat template.
        progress: called with the prompts done and the prompts in all.

    Raises:
        ValueError: bad images, videos or prompts, a prompt without either, a setting out of range.
        FileNotFoundError: a file of an image or a video does not exist.
        NotImplementedError: the model is on a mesh.
    """
    if vlm.mesh is not None:
        raise NotImplementedError("calibrate on a mesh: load the model on one device for it")
    # Any budget that is not the whole cache has the layers looked at; nothing is evicted.
    quantizer = AKVQ(pivots=pivots, tsa_layers=())
    method = Custom(0.5, score=ColumnSum(), allocation="uniform", quantize=quantizer)
    unmeasured = Calibration((0.0,), threshold, pivots)  # refuses a bad setting now
    request = vlm.request(
        images,
        text,
        videos=videos,
        frames=frames,
        max_new_tokens=1,
        raw_prompt=raw_prompt,
        cache=method,
        prefill_batch=1,
    )
    stages, prompts = request.generate.stages, request.groups
    for number, inputs in enumerate(prompts, 1):
        if not (inputs.visual_index >= 0).any():
            raise ValueError(f"prompt {number} has no picture and no video: give one to each")
    settings = request.settings.rows(np.zeros(1, np.int32))  # the same for all
    measure = jax.jit(partial(_text_shares, stages, quantizer))
    shares = []
    for done, inputs in enumerate(prompts):
        if progress:
            progress(done, len(prompts))
        shares.append(np.asarray(measure(vlm.params, inputs, settings))[0])
    if progress:
        progress(len(prompts), len(prompts))
    mean = tuple(np.stack(shares).mean(axis=0, dtype=np.float64).tolist())
    return replace(unmeasured, text_shares=mean, prompts=len(prompts), versions=versions())


def _text_shares(
    stages: Stages, quantizer: AKVQ, params: Params, inputs: ModelInputs, settings: Settings
) -> jax.Array:
    """Text share of each layer's attention, float32 [B, L]; the quantizer tells the pivots."""
    prefilled, _ = stages.prefill(params, inputs, settings)
    seen, prompt = prefilled.seen, stages.prompt(inputs, settings)
    assert seen.scores is not None  # the method scores
    attention = jnp.sum(seen.scores, axis=2)  # [B, L, T]; 0 beyond a prompt's end
    counted = ~prompt.visual[:, None]
    pivots = quantizer.dense(prompt, seen.salience)
    if pivots is not None:
        counted = counted & ~pivots
    paid = jnp.sum(jnp.where(counted, attention, 0), axis=-1)
    return paid / jnp.sum(attention, axis=-1)
