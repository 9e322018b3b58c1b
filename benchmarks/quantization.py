"""What each part of AKVQ-VL's quantizer is for: `python -m benchmarks.quantization`.

The paper's ablation, in its order: round to nearest, the Walsh-Hadamard transform, more bits for
the text where it is attended to, full width for pivots. Each stage spends at most the bits of the
one before: what it gives to text and pivots it takes from the recent rows of full width.

    plant ─► q, k, v of a few layers ─► build the pool ─► one decode step ─► error of the attention

The keys and values are random, with what the paper found in real models planted in them
(`Structure`); pool, packing and attention are the library's own. So the table says that each part
does what it is for where there is something to do. How much of it there is in a model, a benchmark
of the model has to say.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import lax

from benchmarks import command
from benchmarks.accuracy.report import RESULTS
from benchmarks.documents import Part, measured, table
from benchmarks.environment import environment
from benchmarks.roofline import packed
from pallas_kernels.hadamard import transform
from pallas_kernels.rows import NewToken, Tail
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import Plan
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.cache.quantizers import AKVQ, KIVI, RTN
from vlcache_jax.models.config import TextConfig

SHAPE = TextConfig(num_layers=4, num_heads=32, num_kv_heads=2, head_dim=128)
"""Of what is planted; the rest of it is without meaning."""

BEFORE, VISUAL, BEHIND = 32, 416, 64
"""A prompt: text, the picture, text."""

ROWS = BEFORE + VISUAL + BEHIND
IS_VISUAL = np.repeat([False, True, False], [BEFORE, VISUAL, BEHIND])
TSA = (0, 1)
"""The layers that attend to text."""

PIVOTS = 4
"""Tokens with massive activations: the first one, and some of the picture's."""

OUTLIER_CHANNELS = 4
FADE = 8
"""Rows behind which the pull of the recent ones has fallen by e."""


@dataclass(frozen=True)
class Structure:
    """What is planted; 0 leaves it out. A logit is else of variance 1.

    Attributes:
        outliers: what some channels of every key are off by, the same for all tokens, in standard
            deviations; half as many channels of the values are larger by this factor.
        text: by how much the logits of text are raised in the layers `TSA`.
        pivots: those of pivots in the others.
        recent: that of the last token, and of those in front of it less and less.
    """

    outliers: float = 6.0
    text: float = 2.5
    pivots: float = 5.0
    recent: float = 2.5


class Planted(NamedTuple):
    """One prompt and the token behind it, K kv heads with G query heads each.

    Attributes:
        token: queries, key and value of the new token, [L, K, G + 2, H].
        k: keys of the prompt, [L, K, T, H].
        v: values, likewise.
        salience: largest activation of each token in front of each layer, [L, T].
    """

    token: Any
    k: Any
    v: Any
    salience: Any


def stages(recent: int = 32) -> dict[str, Quantizer]:
    """The paper's ablation, each stage with as many recent rows as the bits of the first allow.

    Args:
        recent: rows of full width of the first stage, the last ones of each layer.
    """
    layers, tsa, text = SHAPE.num_layers, len(TSA), BEFORE + BEHIND
    # Bits per channel that a row of full width takes more than one of 2 bits with its scales.
    more = 14 - 32 / SHAPE.head_dim
    each = more * layers - 2 * tsa  # a recent row of a TSA layer is text that needs no 4 bits
    with_text = math.floor((more * recent * layers - 2 * text * tsa) / each)
    with_pivots = math.floor(with_text - more * PIVOTS * (layers - tsa) / each)
    own = {"tsa_layers": TSA, "recent": with_text, "pivots": 0}
    return {
        "RTN": RTN(recent=recent),
        "+ WHT": RTN(recent=recent, transform=True),
        "+ TSA": AKVQ(**own),
        "+ PSA": AKVQ(**{**own, "recent": with_pivots, "pivots": PIVOTS}),
    }


OTHERS: dict[str, Quantizer | None] = {
    "KIVI": KIVI(recent=32),
    "RTN + WHT, 4 bit": RTN(bits=4, transform=True),
    "RTN + WHT, 8 bit": RTN(bits=8, transform=True),
    "bfloat16": None,
}
"""What the stages are shown beside; None quantizes nothing."""


def plant(structure: Structure, seed: int) -> Planted:
    """Random numbers with that structure, float32."""
    rng = np.random.default_rng(seed)
    layers, heads, size = SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.head_dim
    shape = (layers, heads, ROWS, size)
    k, v = rng.standard_normal(shape), rng.standard_normal(shape)
    token = rng.standard_normal((layers, heads, SHAPE.num_heads // heads + 2, size))
    salience = np.max(np.abs(rng.standard_normal((layers, ROWS, size))), axis=-1)
    pivots = np.append(0, rng.choice(np.flatnonzero(IS_VISUAL), PIVOTS - 1, replace=False))
    recent = np.exp(-np.arange(ROWS)[::-1] / FADE)
    for layer, head in np.ndindex(layers, heads):
        keys, values, queries = (x[layer, head] for x in (k, v, token[:, :, :-2]))
        # A direction of its own for each pull, shared by the keys that are meant and all queries.
        directions = np.linalg.qr(rng.standard_normal((size, 2)))[0].T
        if layer in TSA:
            meant, strength = ~IS_VISUAL, structure.text
        else:
            meant, strength = np.isin(np.arange(ROWS), pivots), structure.pivots
        pulls = (meant, strength), (recent, structure.recent)
        for direction, (pull, most) in zip(directions, pulls, strict=True):
            length = math.sqrt(most * math.sqrt(size))  # so that the logit is raised by `most`
            keys += length * pull[:, None] * direction
            queries += length * direction
        channels = rng.permutation(size)[:OUTLIER_CHANNELS]
        keys[:, channels] += structure.outliers * rng.choice([-1, 1], OUTLIER_CHANNELS)
        values[:, channels[: OUTLIER_CHANNELS // 2]] *= max(1.0, structure.outliers)
        if layer not in TSA:
            salience[layer, pivots] *= 20
    return Planted(*(np.float32(x) for x in (token, k, v, salience)))


@jax.jit
def reference(planted: Planted) -> jax.Array:
    """The attention of the new token in float32, [B, L, N, H]."""
    token, k, v, _ = (x.astype(jnp.float32) for x in planted)
    k = jnp.concatenate([k, token[:, :, :, -2:-1]], axis=3)
    v = jnp.concatenate([v, token[:, :, :, -1:]], axis=3)
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("blkgh,blkth->blkgt", token[:, :, :, :-2], k, precision=exact)
    weights = jax.nn.softmax(logits / math.sqrt(k.shape[-1]), axis=-1)
    out = jnp.einsum("blkgt,blkth->blkgh", weights, v, precision=exact)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


@functools.partial(jax.jit, static_argnums=0)
def attend(quantizer: Quantizer | None, planted: Planted) -> tuple[jax.Array, jax.Array]:
    """The same by a pool of the library.

    Returns:
        The attention [B, L, N, H], and the rows of each width, int32 [B, L, 1 + widths].
    """
    method, (token, k, v, salience) = FullCache(quantize=quantizer), planted
    batch, layers, heads, rows, size = k.shape
    if method.transforms:  # as the folded weights would make them
        v = transform(v)
        token = token.at[:, :, :, -1].set(transform(token[:, :, :, -1]))
    length = jnp.full((batch,), rows, jnp.int32)
    shown = jnp.broadcast_to(jnp.asarray(IS_VISUAL), (batch, rows))
    prompt = Prompt(length, shown, layers, method.limit.data)
    plan = Plan(jnp.full((batch, layers), rows, jnp.int32), None, salience)
    k, v = (x.swapaxes(1, 2).reshape(batch, heads, layers * rows, size) for x in (k, v))
    pool = method.build(k, v, plan, prompt)
    level = jnp.ones((batch, size // 2)), jnp.zeros((batch, size // 2))  # no turn of RoPE
    empty = jnp.zeros((batch, heads, 1, size), k.dtype)
    tail = Tail(empty, empty, jnp.zeros((batch,), jnp.int32))
    segments = pool.segments()

    def one(layer: jax.Array) -> jax.Array:
        # All layers in one loop: what differs between their segments are numbers.
        own = jax.tree.map(
            lambda x, *xs: x if x.ndim > 2 else jnp.stack([x, *xs])[layer], *segments
        )
        return pool.append_and_attend(NewToken(token[:, layer], *level), own, tail, None)[0]

    out = lax.map(one, jnp.arange(layers)).swapaxes(0, 1)
    return (transform(out) if method.transforms else out), pool.counts


def ablation(
    structure: Structure,
    seeds: list[int],
    quantizers: Mapping[str, Quantizer | None],
    step: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """A row for each quantizer: its bits, and the relative error of the attention.

    The error of a layer is that of all heads together, |out - reference| / |reference|; the
    reference is float32, of the same bfloat16 numbers. `step` is called behind each.
    """
    each = [plant(structure, seed) for seed in seeds]
    planted = Planted(
        *(jnp.asarray(np.stack(parts), jnp.bfloat16) for parts in zip(*each, strict=True))
    )
    expected, rows = np.asarray(reference(planted)), []
    for name, quantizer in quantizers.items():
        out, counts = (np.asarray(x, np.float64) for x in attend(quantizer, planted))
        error = np.linalg.norm(out - expected, axis=(2, 3)) / np.linalg.norm(expected, axis=(2, 3))
        rows.append(
            {
                "name": name,
                **bits_of(quantizer, counts),
                "error": float(error.mean()),
                "by_seed": error.mean(axis=1).tolist(),
                "by_layer": error.mean(axis=0).tolist(),
            }
        )
        step()
    return rows


def bits_of(quantizer: Quantizer | None, counts: np.ndarray) -> dict[str, float]:
    """Bits of a value: "payload_bits" by its code alone, "bits" with scales and shifts.

    Counted are the rows of each width, [B, L, 1 + widths].
    """
    widths = (16, *(quantizer.widths if quantizer else ()))
    return {
        "payload_bits": float((counts @ widths).sum() / counts.sum()),
        "bits": packed.bits_of(SHAPE, quantizer, counts.astype(int)),
    }


@measured
def part(result: dict[str, Any]) -> str:
    """The table for docs/accuracy.md, and what it is of."""
    rows = [
        [row["name"], f"{row['payload_bits']:.2f}", f"{row['bits']:.2f}",
         *(f"{value:.1%}" for value in (row["error"], *row["by_seed"]))]
        for row in result["rows"]
    ]  # fmt: skip
    shape, planted = result["shape"], result["structure"]
    seeds = (f"seed {seed}" for seed in result["seeds"])
    head = ["", "payload bits", "bits with scales", "error", *seeds]
    return (
        f"`{result['command']}`: random keys and values of {shape['layers']} layers with heads of "
        f"{shape['head_dim']}, {shape['text_before'] + shape['visual'] + shape['text_behind']} "
        f"tokens. Planted are {OUTLIER_CHANNELS} channels of each key that are off by "
        f"{planted['outliers']:g} standard deviations, {OUTLIER_CHANNELS // 2} of each value that "
        f"are as many times larger, logits raised by {planted['text']:g} for text in layers "
        f"{' and '.join(map(str, shape['tsa_layers']))}, by {planted['pivots']:g} for "
        f"{shape['pivots']} pivots in the others, and by up to {planted['recent']:g} for the "
        "last tokens. Errors are relative ones of the attention's output, means over layers and "
        f"seeds.\n\n{table(head, rows)}"
    )


SECTION = Part("quantization", part, (RESULTS / "quantization.json",))

PARTS = tuple(asdict(Structure()))


def main(
    seed: Annotated[int, typer.Option(min=0, help="The first prompt's; others follow it.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Prompts, each with a seed of its own.")] = 3,
    without: Annotated[
        list[str] | None,
        typer.Option(help=f"Plant no {', '.join(PARTS)}; several times."),
    ] = None,
    as_json: command.AsJson = False,
    out: command.Out = None,
    force: command.Force = False,
) -> None:
    """Take AKVQ-VL's quantizer apart: what the attention loses by each of its parts.

    The stages follow the paper: round to nearest at 2 bits, the Walsh-Hadamard transform (WHT),
    4 bits for text in text-salient layers (TSA), 16 bits for pivots in the others (PSA), none with
    more bits than the one before. Below stand KIVI and plain rounding at 4 and 8 bits.

    Keys and values are random, with outlier channels, layers that attend to text, layers that
    attend to pivots, and a pull to recent tokens planted in them. --without leaves one of these
    out: the stage that is for it then gains nothing.

    Example: python -m benchmarks.quantization

    Example: python -m benchmarks.quantization --without outliers --seeds 1
    """
    command.check_out(out, force=force)
    with command.bad_input():
        command.check_known("structure", without or [], PARTS)
    structure = replace(Structure(), **dict.fromkeys(without or [], 0.0))
    chosen, wanted = list(range(seed, seed + seeds)), {**stages(), **OTHERS}
    with command.counting_bar() as bar:
        task = bar.add_task("measuring", total=len(wanted))
        rows = ablation(structure, chosen, wanted, lambda: bar.advance(task))
    result = {
        **environment(),
        "seeds": chosen,
        "structure": asdict(structure),
        "shape": {
            "layers": SHAPE.num_layers,
            "tsa_layers": list(TSA),
            "query_heads": SHAPE.num_heads,
            "kv_heads": SHAPE.num_kv_heads,
            "head_dim": SHAPE.head_dim,
            "text_before": BEFORE,
            "visual": VISUAL,
            "text_behind": BEHIND,
            "pivots": PIVOTS,
        },
        "quantizers": {name: repr(quantizer) for name, quantizer in wanted.items()},
        "rows": rows,
    }
    command.finish(result, part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
