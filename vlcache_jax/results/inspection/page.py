"""An inspection as one HTML file that needs nothing else: no network, no server, no other file.

Heat maps are drawn by the page's own script from counts that stand in the page as JSON; what is
told of whole layers (charts, tables) is already in the HTML.
"""

import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from vlcache_jax.requests.packing import BASE, GRID, NEWLINE_PART
from vlcache_jax.results.inspection.bars import charts
from vlcache_jax.results.numbers import number, share
from vlcache_jax.results.pages import included, template
from vlcache_jax.results.report import human_bytes

if TYPE_CHECKING:
    from vlcache_jax.results.inspection import Inspection, Outcome, ShownPicture

HERE = Path(__file__).parent

LONGEST_SIDE = 1000
"""Pixels of a picture's longer side in the page, at most."""

PARTS = {BASE: "base", GRID: "grid", NEWLINE_PART: "newline"}
"""What the numbers in `ShownPicture.part` stand for."""


def render(inspection: "Inspection") -> str:
    """The page.

    Raises:
        NotImplementedError: the model has more than 255 kv heads.
    """
    methods = inspection.outcomes
    layers = [inspection.layers(method) for method in methods]
    kinds = (*inspection.kinds, "recent")
    outcomes = [inspection.full, *methods]
    quantized = any(outcome.cache.kv_bits for outcome in outcomes)
    about = " and ".join(list(inspection.kinds)[:-1]) or "visual"
    columns = [_numbers(outcome, about, quantized) for outcome in outcomes]
    settings = dict(inspection.settings)
    by_method = settings.pop("methods")
    # "<" could end the script element.
    data = json.dumps(_data(inspection), separators=(",", ":")).replace("<", "\\u003c")
    return template(HERE).render(
        inspection=inspection,
        script=included(HERE / "page.js"),
        data=Markup(data),
        answers=[_answer(inspection.full, method) for method in methods],
        labels=[method.label for method in methods],
        shares=[inspection.kept_share(method) for method in methods],
        pictures=[_picture(picture) for picture in inspection.pictures],
        prompt=_prompt_parts(inspection),
        charts=charts(layers, kinds),
        kinds=kinds,
        layers=[[_layer_row(layer, kinds) for layer in method] for method in layers],
        numbers=list(zip(columns[0], *(column.values() for column in columns), strict=True)),
        settings=list(_flat(settings)),
        by_method={label: list(_flat(values)) for label, values in by_method.items()},
    )


def _data(inspection: "Inspection") -> dict[str, Any]:
    """What the script needs: places of patches, and how many kv heads keep each token."""
    pairs = zip(inspection.pieces, inspection.visual, strict=True)
    return {
        "tokens": len(inspection.visual),
        "pieces": [None if visual else piece for piece, visual in pairs],
        "pictures": [
            {
                "size": picture.image.size,
                "tokens": picture.positions.tolist(),
                "part": [PARTS[part] for part in picture.part.tolist()],
                "rectangles": [
                    None if math.isnan(edges[0]) else [round(edge, 2) for edge in edges]
                    for edges in picture.rectangles.tolist()
                ],
            }
            for picture in inspection.pictures
        ],
        "outcomes": [_counts(inspection, outcome) for outcome in inspection.outcomes],
    }


def _counts(inspection: "Inspection", outcome: "Outcome") -> dict[str, Any]:
    """How many kv heads of each layer keep each token: uint8 [L, m], in base64."""
    layers, heads, _ = outcome.trace.kept.shape
    if heads > 255:
        raise NotImplementedError(f"a page about {heads} kv heads: at most 255")
    counts = np.rint(inspection.kept_by_layer(outcome) * heads).astype(np.uint8)
    encoded = base64.b64encode(counts.tobytes()).decode("ascii")
    return {"label": outcome.label, "layers": layers, "heads": heads, "counts": encoded}


def _picture(picture: "ShownPicture") -> dict[str, Any]:
    """A picture as the page shows it."""
    return {
        "name": picture.name,
        "video": picture.video,
        "width": picture.image.width,
        "height": picture.image.height,
        "uri": data_uri(picture.image),
        "counts": {name: int(np.sum(picture.part == part)) for part, name in PARTS.items()},
        "newlines": picture.positions[picture.part == NEWLINE_PART].tolist(),
    }


def data_uri(image: Image.Image) -> str:
    """A picture as a data URI, scaled down to `LONGEST_SIDE`: PNG or JPEG, whichever is smaller."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    encoded = {}
    for kind, options in {"png": {"optimize": True}, "jpeg": {"quality": 85}}.items():
        file = io.BytesIO()
        small.save(file, kind, **options)
        encoded[kind] = base64.b64encode(file.getvalue()).decode("ascii")
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{kind};base64,{encoded[kind]}"


def _prompt_parts(inspection: "Inspection") -> list[dict[str, Any]]:
    """The prompt's text tokens one by one, and the visual tokens of each picture as one part."""
    texts = [
        {"first": place, "last": place, "text": inspection.pieces[place].replace("\n", "↵\n")}
        for place in np.flatnonzero(~inspection.visual).tolist()
    ]
    blocks = [
        {
            "first": int(picture.positions[0]),
            "last": int(picture.positions[-1]),
            "text": f"{picture.name}: {len(picture.positions):,} visual tokens",
        }
        for picture in inspection.pictures
    ]
    return sorted(texts + blocks, key=lambda part: part["first"])


def _answer(full: "Outcome", outcome: "Outcome") -> dict[str, Any]:
    """An answer in parts: as the full cache's, the first token that differs, what follows."""
    at, pieces = outcome.first_difference, outcome.pieces
    if at is None:
        return {"same": "".join(pieces), "differs": None}
    return {
        "same": "".join(pieces[:at]),
        "differs": [*pieces, "[end]"][at],
        "rest": "".join(pieces[at + 1 :]),
        "instead_of": [*full.pieces, "[end]"][at],
        "number": at + 1,
    }


def _layer_row(layer: dict[str, Any], kinds: Sequence[str]) -> tuple[str, ...]:
    """A layer's line of the table."""
    counts = (number(layer[name]) for name in ("budget", *kinds))
    shares = (share(layer[name]) for name in ("sparsity", "beta", "hit_rate", "mass_recall"))
    return (str(layer["layer"]), *counts, *shares)


def _numbers(outcome: "Outcome", about: str, quantized: bool) -> dict[str, str]:
    """A column of the table of bytes, tokens and seconds, with or without a quantized cache's.

    `about` is the kind of the tokens that the question is about.
    """
    cache, trace, times = outcome.cache, outcome.trace, outcome.timings
    lines = {
        "full cache of the prompt": human_bytes(cache.full_bytes),
        "kept of it": human_bytes(cache.kept_bytes),
        "kept share": share(cache.kept_share),
    }
    if quantized:
        lines |= {
            "bits per number": f"{cache.effective_bits:.2f}",
            "codes": human_bytes(cache.payload_bytes),
            "scales": human_bytes(cache.scale_bytes),
            "tokens of full width": human_bytes(cache.dense_bytes),
        }
    return lines | {
        "allocated, with padding": human_bytes(cache.allocated_bytes),
        "allocated for new tokens": human_bytes(cache.tail_bytes),
        "tokens kept by a layer": f"{min(cache.layer_budgets):,} to {max(cache.layer_budgets):,}",
        f"{about} among them, mean": f"{cache.kept_visual:,.1f}",
        "text among them, mean": f"{cache.kept_text:,.1f}",
        "CacheHitRate, mean": share(trace.hit_rate.mean()),
        "attention kept, mean": share(trace.mass_recall.mean()),
        "time to first token, trace included": f"{times.prefill_s:.3f} s",
        "time of all further tokens": f"{times.decode_s:.3f} s",
        "tokens per second": number(times.decode_tokens_per_s),
        "compilation, apart": f"{times.compile_s:.3f} s",
    }


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested settings: {"a": {"b": 1}} -> ("a.b", "1")."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else str(value)
