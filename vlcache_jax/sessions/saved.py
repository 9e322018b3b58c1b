"""A session as a file: safetensors with the arrays, and the rest as JSON in its header.

Nothing of it is code. It is read whole, checked against the sum of its bytes that it names, and
belongs to one model (`VLM.fingerprint`).
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from vlcache_jax.errors import reason, short
from vlcache_jax.files import check_file, whole_file
from vlcache_jax.models.qwen_vl.layout import Span
from vlcache_jax.requests.inputs import Interpolation, ModelInputs
from vlcache_jax.requests.packing import Segment, Shown
from vlcache_jax.running.parts import Rows
from vlcache_jax.running.state import Buffers, Memory, WindowScores
from vlcache_jax.sessions.prefix import Prefix

if TYPE_CHECKING:
    from vlcache_jax.vlm import VLM

VERSION = 1
"""Of the format."""

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (Buffers, Interpolation, Memory, ModelInputs, Segment, Shown, Span, WindowScores)
}


def save(
    prefix: Prefix, messages: list[dict[str, Any]], path: str | Path, *, force: bool = False
) -> None:
    """Write a session; see `Session.save`."""
    target = check_file(path, "session", force=force)
    shown: Shown = prefix.subject["images"]
    if shown.clips:
        raise NotImplementedError("a session about a video cannot be saved yet: save its frames")
    state = {
        "version": VERSION,
        "model": prefix.vlm.fingerprint,
        "messages": messages,
        "first": prefix.first,
        "context": prefix.subject["context"],
        "store": prefix.store,
        "chunk": prefix.chunk,
        "length": prefix.length,
        "inputs": prefix.inputs,
        "shown": shown,
        "rows": {
            ("transformed" if transformed else "plain"): {
                "tables": list(rows.tables),
                "kept": rows.kept,
                "memory": rows.memory,
            }
            for transformed, rows in prefix.all_rows.items()
        },
    }
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_encode(state, arrays), ensure_ascii=False)
    content = to_bytes(arrays, {"session": text, "sum": _sum(arrays, text)})
    with whole_file(target, force=force) as file:
        file.write(content)


def open_saved(vlm: "VLM", path: str | Path) -> tuple[Prefix, list[dict[str, Any]]]:
    """What a session is made of, from its file; see `VLM.open_session`."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no session at {short(file)}")
    try:
        with safe_open(file, "numpy") as opened:
            found = opened.metadata() or {}
            if "session" not in found:
                raise ValueError(f"{short(file)} is no session: `Session.save` writes them")
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{short(file)} cannot be read: {reason(error)}") from error
    if found.get("sum") != _sum(arrays, found["session"]):
        raise ValueError(f"{short(file)} is damaged: its bytes are not those that were saved")
    state = _decode(json.loads(found["session"]), arrays)
    if state["version"] != VERSION:
        raise ValueError(f"{short(file)} is a session of another version of this library")
    if state["model"] != vlm.fingerprint:
        raise ValueError(
            f"{short(file)} is a session of another model than {short(vlm.name)}: open it with "
            "the checkpoint and the number type that it was saved with"
        )
    dtype = vlm.params["embed"]["embedding"].dtype
    rows = {
        kind == "transformed": Rows(
            tuple(map(jax.device_put, each["tables"])),
            dtype,
            state["store"],
            kept=each["kept"],
            memory=jax.device_put(each["memory"]),
        )
        for kind, each in state["rows"].items()
    }
    return Prefix.restored(vlm, state, rows), state["messages"]


def _sum(arrays: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def _encode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A value as JSON, with its arrays put aside under names of their own."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        if array.size and not any(array.strides):  # one number, many times
            number = array.reshape(-1)[:1].copy()
            return {"blank": _encode(number, arrays), "shape": list(array.shape)}
        name = f"{len(arrays):06d}"
        arrays[name] = np.ascontiguousarray(array)
        return {"array": name}
    if type(value).__name__ in _KINDS:
        names = getattr(value, "_fields", None) or value.__dataclass_fields__
        fields = {name: _encode(getattr(value, name), arrays) for name in names}
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, dict):
        return {"dict": {key: _encode(each, arrays) for key, each in value.items()}}
    kind = "tuple" if isinstance(value, tuple) else "list"
    return {kind: [_encode(each, arrays) for each in value]}


def _decode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The inverse of `_encode`."""
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "blank" in value:
        return np.broadcast_to(_decode(value["blank"], arrays)[0], value["shape"])
    if "kind" in value:
        fields = {name: _decode(each, arrays) for name, each in value["fields"].items()}
        return _KINDS[value["kind"]](**fields)
    if "dict" in value:
        return {key: _decode(each, arrays) for key, each in value["dict"].items()}
    [(kind, parts)] = value.items()
    return (tuple if kind == "tuple" else list)(_decode(each, arrays) for each in parts)
