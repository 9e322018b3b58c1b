"""An inspection as one HTML file that needs nothing else: no network, no server, no other file.

Heat maps are drawn by the page's own script from counts that stand in the page as JSON; what is
told of whole layers (charts, tables) is already in the HTML.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from vlcache_jax.inspection.bars import charts
from vlcache_jax.patches import BASE, GRID, NEWLINE_PART
from vlcache_jax.report import human_bytes

if TYPE_CHECKING:
    from vlcache_jax.inspection import Inspection, Outcome, ShownPicture

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
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": _share, "bytes": human_bytes, "number": _number}
    methods = inspection.outcomes
    layers = [inspection.layers(method) for method in methods]
    settings, by_method = _settings_rows(inspection.settings)
    return environment.get_template("page.html.jinja").render(
        inspection=inspection,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        data=_script_json(_data(inspection)),
        sizes={
            "tokens": len(inspection.visual),
            "visual": int(inspection.visual.sum()),
            "text": int((~inspection.visual).sum()),
            "layers": len(inspection.full.trace.budget),
        },
        answers=[_answer(inspection.full, method) for method in methods],
        labels=[method.label for method in methods],
        shares=[inspection.kept_share(method) for method in methods],
        pictures=[_picture(picture) for picture in inspection.pictures],
        prompt=list(_prompt_parts(inspection)),
        charts=charts(layers),
        layers=[[_layer_row(layer) for layer in method] for method in layers],
        numbers=_numbers([inspection.full, *methods]),
        settings=settings,
        by_method=by_method,
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


def _script_json(value: Any) -> Markup:
    """JSON that may stand inside a <script> element, whatever its texts are."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def _picture(picture: "ShownPicture") -> dict[str, Any]:
    """A picture as the page shows it."""
    return {
        "name": picture.name,
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
        "differs": _piece(pieces, at),
        "rest": "".join(pieces[at + 1 :]),
        "instead_of": _piece(full.pieces, at),
        "number": at + 1,
    }


def _piece(pieces: list[str], place: int) -> str:
    """A token of an answer; behind its last one, that it ends."""
    return pieces[place] if place < len(pieces) else "[end]"


def _layer_row(layer: dict[str, Any]) -> tuple[str, ...]:
    """A layer's line of the table."""
    counts = (_number(layer[name]) for name in ("budget", "visual", "text", "recent"))
    shares = (_share(layer[name]) for name in ("sparsity", "beta", "hit_rate", "mass_recall"))
    return (str(layer["layer"]), *counts, *shares)


def _numbers(outcomes: "list[Outcome]") -> list[tuple[str, ...]]:
    """Lines of the table of bytes, tokens and seconds: a name, and a value for each outcome."""
    lines: dict[str, Callable[..., str]] = {
        "full cache of the prompt": lambda one: human_bytes(one.cache.full_bytes),
        "kept of it": lambda one: human_bytes(one.cache.kept_bytes),
        "kept share": lambda one: _share(one.cache.kept_share),
    }
    if any(one.cache.kv_bits for one in outcomes):
        lines |= {
            "bits per number": lambda one: f"{one.cache.effective_bits:.2f}",
            "codes": lambda one: human_bytes(one.cache.payload_bytes),
            "scales": lambda one: human_bytes(one.cache.scale_bytes),
            "tokens of full width": lambda one: human_bytes(one.cache.dense_bytes),
        }
    lines |= {
        "allocated, with padding": lambda one: human_bytes(one.cache.allocated_bytes),
        "allocated for new tokens": lambda one: human_bytes(one.cache.tail_bytes),
        "tokens kept by a layer": lambda one: _span(one.cache.layer_budgets),
        "visual among them, mean": lambda one: f"{one.cache.kept_visual:,.1f}",
        "text among them, mean": lambda one: f"{one.cache.kept_text:,.1f}",
        "CacheHitRate, mean": lambda one: _share(one.trace.hit_rate.mean()),
        "attention kept, mean": lambda one: _share(one.trace.mass_recall.mean()),
        "time to first token, trace included": lambda one: _seconds(one.timings.prefill_s),
        "time of all further tokens": lambda one: _seconds(one.timings.decode_s),
        "tokens per second": lambda one: _number(one.timings.decode_tokens_per_s),
        "compilation, apart": lambda one: _seconds(one.timings.compile_s),
    }
    return [(name, *map(value, outcomes)) for name, value in lines.items()]


def _settings_rows(
    settings: dict[str, Any],
) -> tuple[list[tuple[str, str]], dict[str, list[tuple[str, str]]]]:
    """The settings of the run, and those of each method: names and values."""
    plain = {name: value for name, value in settings.items() if name != "methods"}
    methods = {label: list(_flat(values)) for label, values in settings["methods"].items()}
    return list(_flat(plain)), methods


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested settings: {"a": {"b": 1}} -> ("a.b", "1")."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else str(value)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    """A number, with one decimal where it is not whole."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _span(values: list[int]) -> str:
    return f"{min(values):,} to {max(values):,}"
