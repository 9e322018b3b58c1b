"""A LLaVA-NeXT around a published decoder: what of it is learned, and how it is put together.

Learned are a small vision tower, the projector, and low-rank changes of the decoder's products
(LoRA: Hu et al. 2021, arXiv 2106.09685). The decoder itself stays as it is.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from safetensors.numpy import load_file, save_file

from benchmarks.accuracy import network
from benchmarks.accuracy.learner import Learner, level_of, of_a_step
from benchmarks.accuracy.loss import Bound, attend_patches
from benchmarks.accuracy.network import Dialogue
from benchmarks.accuracy.pages import questions_of_one_page
from benchmarks.accuracy.pages.drawing import CHARACTERS
from benchmarks.accuracy.tasks import Item
from pallas_kernels.add_rms_norm.xla import rms_norm
from vlcache_jax.checkpoints.changed import (
    CHANGED,
    LEARNED,
    SMOLLM2,
    TOKENIZER,
    Published,
    renamed,
)
from vlcache_jax.checkpoints.checkpoint import DECODER
from vlcache_jax.checkpoints.gguf import GgufCheckpoint
from vlcache_jax.checkpoints.weights import (
    join,
    parameter_name,
    parse_dtype,
    refuse_differences,
    split,
    tensors_of,
)
from vlcache_jax.files import sha256, whole_directory
from vlcache_jax.models.layers import product
from vlcache_jax.models.llama import Attend
from vlcache_jax.models.llava.clip import VisionTower
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.models.llava.model import Projector
from vlcache_jax.models.llava.names import LLAVA
from vlcache_jax.requests.buckets import Buckets

if TYPE_CHECKING:
    from benchmarks.accuracy.train import Stage

TILE = 336
PINPOINTS = [[672, 672], [336, 672], [672, 336], [1008, 336], [336, 1008]]
IMAGE = "<image>"
UNUSED = "<empty_output>"
"""A special token of the decoder's vocabulary that no chat has: it becomes the picture's."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALOGUE = Dialogue("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n")

SHARPNESS = 3.0
"""How much surer the auxiliary loss is of the nearest glyph."""

SCALE = 2.0
"""What the product of two factors is multiplied by."""

SCALES = {"down": 1.0, "up": SCALE}
"""What each factor is multiplied by where it is stored."""

KEPT = "product"
"""What a step keeps of its layers for the way back; the rest is computed again."""


class Eyes(nnx.Module):
    """What of a LLaVA is in front of the decoder."""

    def __init__(self, config: LlavaConfig, rngs: nnx.Rngs):
        self.vision_layers = config.vision_layers
        self.vision = VisionTower(config.vision, dtype=jnp.float32, rngs=rngs)
        self.projector = Projector(config, dtype=jnp.float32, rngs=rngs)


class PageLearner(Learner):
    """The LLaVA that reads pages.

    Args:
        vision: see `network.config_json`.
        rank: of the decoder's changes.
        dtype: type of what the decoder multiplies; all else is float32.
        published: the decoder.
    """

    dialogue = DIALOGUE
    # Few shapes: each is compiled for itself, which takes as long as a dozen steps.
    buckets = Buckets((128, 256, 384, 512, 768, 1024, 2048, 3072, 6144), (0, 3, 4, 5, 10))
    round_to = 16

    def __init__(
        self, vision: dict[str, int], rank: int, dtype: Any, published: Published = SMOLLM2
    ):
        self.rank, self.dtype, self._published = rank, dtype, published
        checkpoint = GgufCheckpoint(published.file())
        self.files = _processor(checkpoint.processor())
        tokenizer = self.files.tokenizer
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        text = checkpoint.config.text
        self.config_json = _config_json(vision, checkpoint.file.config, image)
        params = checkpoint.load("float32")
        embedding = np.asarray(params["embed"]["embedding"])

        def rows(texts: str) -> np.ndarray:
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return embedding[[id_ for (id_,) in ids]]

        layers = [params["layers"][i] for i in range(text.num_layers)]
        fixed = {
            "embedding": embedding,
            "norm": params["head"]["norm"]["scale"],
            "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
            "ideal": rows(CHARACTERS + " "),
            "newline": rows("\n")[0],
        }
        self.fixed = jax.tree.map(jnp.asarray, fixed)
        self._eps = text.rms_norm_eps
        self._eyes = nnx.split(nnx.eval_shape(lambda: Eyes(self.config, nnx.Rngs(0))))[0]

    def initial(self, seed: int) -> Any:
        """{"eyes": tower and projector, "factors": kernel to its (down, up) of all layers}."""
        eyes = nnx.to_pure_dict(nnx.state(Eyes(self.config, nnx.Rngs(seed))))
        # A copy: what is learned is donated to each step.
        eyes["projector"]["newline"] = jnp.array(self.fixed["newline"], jnp.float32, copy=True)
        factors, key = {}, jax.random.key(seed)
        for number, (name, axes) in enumerate(CHANGED.items()):
            layers, *shape = self.fixed["layers"][name].shape
            into, out = int(np.prod(shape[:axes])), int(np.prod(shape[axes:]))
            down = jax.random.normal(jax.random.fold_in(key, number), (layers, into, self.rank))
            factors[name] = {"down": down * into**-0.5, "up": jnp.zeros((layers, self.rank, out))}
        return {"eyes": eyes, "factors": factors}

    def bind(self, learned: Any, fixed: Any) -> Bound:
        """The library's tower and projector; the layers with their factors, in a scan."""
        eyes: Any = nnx.merge(self._eyes, learned["eyes"])

        def visual_rows(tiles: jax.Array) -> jax.Array:
            features = eyes.vision(tiles, eyes.vision_layers, attend=attend_patches)
            return eyes.projector.table(eyes.projector(features))

        def decode(rows: jax.Array, attend: Attend) -> tuple[jax.Array, jax.Array]:
            def layer(x: jax.Array, each: tuple[Any, Any]) -> tuple[jax.Array, None]:
                weights, factors = each
                return changed_layer(weights, factors, x, attend, self._eps, self.dtype), None

            kept = jax.checkpoint_policies.save_only_these_names(KEPT)
            step = jax.checkpoint(layer, policy=kept)
            x, _ = jax.lax.scan(step, rows, (fixed["layers"], learned["factors"]))
            return x, jnp.float32(0)

        def logits(hidden: jax.Array) -> jax.Array:
            hidden = rms_norm(hidden, fixed["norm"], self._eps)
            return _sums(self.dtype, "...d,vd->...v", hidden, fixed["embedding"])

        return Bound(
            visual_rows,
            fixed["ideal"],
            _nearest,
            fixed["newline"],
            lambda tokens: fixed["embedding"][tokens],
            decode,
            logits,
        )

    def draw(self, stage: "Stage", rng: np.random.Generator, split: str) -> list[list[Item]]:
        """Pages; half as many where there are pairs."""
        variant, count = of_a_step(stage, rng)
        return [
            questions_of_one_page(
                stage.tasks,
                int(rng.integers(2**31)),
                stage.questions,
                split=split,
                level=level_of(stage, rng),
                jitter=stage.jitter,
                variant=variant,
            )
            for _ in range(count)
        ]

    def export(self, folder: Path, learned: Any, dtype: str = "bfloat16") -> None:
        """Write what was learned as a `ChangedCheckpoint` reads it."""
        kind = parse_dtype(dtype)
        tensors = {
            tensor: view
            for key, leaf in jax.tree_util.tree_leaves_with_path(learned["eyes"])
            for tensor, view in split(LLAVA, parameter_name(key), np.asarray(leaf).astype(kind))
        }
        for name, factors in learned["factors"].items():
            for part, scale in SCALES.items():
                tensors[f"factors.{name}.{part}"] = (scale * np.asarray(factors[part])).astype(kind)
        with whole_directory(folder.resolve(), force=True) as directory:
            save_file(tensors, directory / LEARNED)
            note = {
                "decoder": asdict(self._published),
                "learned": sha256(directory / LEARNED),
                "tokens": {IMAGE: UNUSED},
            }
            self.files.save_pretrained(directory)
            (directory / TOKENIZER).unlink()  # the decoder's, which comes with it
            config = {**self.config_json, "dtype": kind.name}
            for name, content in ((DECODER, note), ("config.json", config)):
                text = json.dumps(content, indent=2) + "\n"
                (directory / name).write_text(text, encoding="utf-8")

    def read(self, folder: Path) -> Any:
        """What `export` has written, like `initial`; see `Learner.read`."""
        if not (folder / LEARNED).is_file():
            raise ValueError(f"{folder} has no {LEARNED}: give a model that was exported here")
        given = load_file(folder / LEARNED)
        leaves, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda: self.initial(0)))
        shapes = {parameter_name(key): leaf.shape for key, leaf in leaves}
        expected: dict[str, Any] = {}
        for name, shape in shapes.items():
            expected |= _stored(name, shape)
        found = {name: tensor.shape for name, tensor in given.items()}
        refuse_differences(f"{folder} for this recipe", expected, found)
        parts, kind = [], np.dtype(np.float32)
        for name, shape in shapes.items():
            tensors = [given[tensor] for tensor in _stored(name, shape)]
            part, own = name.split(".", 1)
            if part == "eyes":
                parts.append(join(LLAVA, own, shape, kind, tensors))
            else:
                parts.append(tensors[0].astype(kind) / SCALES[own.split(".")[1]])
        return tree.unflatten(map(jnp.asarray, parts))


def _stored(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a learned array is stored as."""
    part, own = name.split(".", 1)
    return tensors_of(LLAVA, own, shape) if part == "eyes" else {name: shape}


def changed_layer(
    weights: Any, factors: Any, x: jax.Array, attend: Attend, eps: float, dtype: Any
) -> jax.Array:
    """`DecoderLayer` with factors beside its kernels: [B, T, D] -> [B, T, D]."""

    def changed(name: str, x: jax.Array) -> jax.Array:
        kernel = weights[name]
        axes = CHANGED[name]
        flat = kernel.reshape(x.shape[-1], -1)
        down, up = factors[name]["down"], SCALE * factors[name]["up"]
        whole: Any = changed_product(dtype, x, flat, down, up)
        return checkpoint_name(whole.reshape(*x.shape[:2], *kernel.shape[axes:]), KEPT)

    normed = rms_norm(x, weights["attention_norm"]["scale"], eps)
    mixed, _ = attend(changed("qkv", normed))
    mixed = checkpoint_name(mixed.reshape(*x.shape[:2], -1), KEPT)
    x = x + changed("out", mixed)
    normed = rms_norm(x, weights["mlp_norm"]["scale"], eps)
    gate_up = changed("gate_up", normed)
    return x + changed("down", jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def changed_product(
    dtype: Any, x: jax.Array, kernel: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array:
    """Give x @ (kernel + down @ up): [..., I], [I, O], [I, r], [r, O] -> [..., O].

    No gradient is made of the kernel, which stays as it is: it would cost as much as the product.

    Args:
        dtype: of what is multiplied; sums are float32.
        x: activations.
        kernel: what is changed.
        down: first factor of the change.
        up: second factor.
    """
    return _sums(dtype, "...i,io->...o", x, kernel + down @ up)


def _product_and_inputs(dtype: Any, *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return changed_product(dtype, *inputs), inputs


def _gradients(
    dtype: Any, inputs: tuple[jax.Array, ...], back: jax.Array
) -> tuple[jax.Array | None, ...]:
    x, kernel, down, up = inputs
    of_x = _sums(dtype, "...o,io->...i", back, kernel + down @ up)
    rows, back = x.reshape(-1, x.shape[-1]), back.reshape(-1, back.shape[-1])
    of_down = _sums(dtype, "ni,nr->ir", rows, _sums(dtype, "no,ro->nr", back, up))
    of_up = _sums(dtype, "nr,no->ro", _sums(dtype, "ni,ir->nr", rows, down), back)
    return of_x, None, of_down, of_up


changed_product.defvjp(_product_and_inputs, _gradients)


def _sums(dtype: Any, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return product(equation, x.astype(dtype), y.astype(dtype), out=jnp.float32)


def _nearest(seen: jax.Array, ideal: jax.Array) -> jax.Array:
    """Logits by distance: the embeddings of digits are close to each other, of unequal length."""
    return SHARPNESS * (seen @ ideal.T - jnp.sum(jnp.square(ideal), axis=-1) / 2)


def _processor(tokenizer: Any) -> Any:
    """The processor of the decoder's tokenizer, with a token for pictures."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(renamed(tokenizer, {IMAGE: UNUSED})),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        additional_special_tokens=[IMAGE],
    )
    return network.make_processor(own, PINPOINTS, tile=TILE, template=CHAT_TEMPLATE)


def _config_json(vision: dict[str, int], text: dict[str, Any], image: int) -> dict[str, Any]:
    data = network.config_json({**vision, "image_size": TILE}, {}, text["vocab_size"])
    return data | {
        "image_token_index": image,
        "image_grid_pinpoints": PINPOINTS,
        "image_seq_length": (TILE // network.PATCH) ** 2,
        "vision_feature_layer": -1,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
