"""Replays of prose by many methods, kept as they are made: a run that was cut off goes on.

passages ─► for each: what is not in the log yet ─► Replays ─► a line for each setting
log ─► {label: {budget: facts}}
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.oracle import Attended, Oracle, Told
from benchmarks.fidelity.prose import Passage
from benchmarks.fidelity.settings import Cell
from vlcache_jax.cache.methods import DEFAULT_METHOD
from vlcache_jax.cache.state import Pool
from vlcache_jax.evaluation import Replayed, Replays, summarise
from vlcache_jax.evaluation.replay import Said
from vlcache_jax.requests.inputs import ModelInputs


class Prose(Replays):
    """Replays that have oracles among them."""

    stages = Told

    def tell(self, full: Pool, inputs: ModelInputs, said: Said) -> Attended | None:
        """The attention of the full cache's answers, where an oracle asks for it."""
        if not any(isinstance(method, Oracle) for method in self.methods.values()):
            return None
        fed = np.zeros((said.first.size, self.max_new_tokens), np.int32)
        rows = min(len(said.fed), self.max_new_tokens)
        fed[:, :rows] = np.asarray(said.fed[:rows]).T
        return self.do(self.way, "attend", self.vlm.params, full, inputs, (fed, said.compared))


class Log:
    """What was replayed so far: a file with a line for each prompt and setting.

    Args:
        path: the file; made where it is not there.
        identity: what the figures depend on beside prompt and setting.

    Raises:
        ValueError: the file belongs to another identity, or is no such log.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path, self._found = path, defaultdict[str, dict[str, Replayed]](dict)
        wanted = json.loads(json.dumps(dict(identity)))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
            return
        head, *lines = path.read_text(encoding="utf-8").splitlines() or ["null"]
        if (found := json.loads(head)) != wanted:
            raise ValueError(f"{path} was made with {found}, not {wanted}: name another file")
        for line in lines:
            try:
                self._read(line)
            except ValueError:  # cut off while it was written: run again
                continue

    def _read(self, line: str) -> None:
        row = json.loads(line)
        same = np.array([mark == "1" for mark in row["same"]], bool)
        own = Replayed(np.array(row["kl"], np.float32), same, row["kept"])
        self._found[row["prompt"]][row["setting"]] = own

    def of(self, prompt: str) -> dict[str, Replayed]:
        """What there is of a prompt, by setting."""
        return dict(self._found[prompt])

    def add(self, prompt: str, replayed: Mapping[str, Replayed]) -> None:
        """Write what was made of a prompt."""
        lines = [
            json.dumps(
                {
                    "prompt": prompt,
                    "setting": name,
                    "kl": [float(f"{value:.4g}") for value in each.kl],
                    "same": "".join("01"[int(value)] for value in each.same),
                    "kept": round(each.kept_share, 6),
                }
            )
            for name, each in replayed.items()
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        for line in lines:  # as a later run will find it
            self._read(line)


def key_of(passage: Passage) -> str:
    """What a log calls a prompt."""
    return hashlib.sha256(f"{passage.context}\n{passage.question}".encode()).hexdigest()[:16]


def measure(replays: Prose, passage: Passage, log: Log) -> None:
    """Replay what the log does not have of a prompt.

    Args:
        replays: the model and the settings.
        passage: the prompt.
        log: where the results go.
    """
    there = log.of(key_of(passage))
    if missing := [name for name in replays.methods if name not in there]:
        inputs = replays.vlm.processor(None, passage.question, context=passage.context)
        _, found = replays.run(inputs, missing)
        log.add(key_of(passage), {name: own[0] for name, own in found.items()})


def details(
    cells: Iterable[Cell], passages: Sequence[Passage], log: Log
) -> dict[str, dict[str, Any]]:
    """{label: {budget: facts}}, the facts of `evaluation.summarise`, intervals over documents.

    Beside them stands "behind": by how much the KL is above the default method's at that budget,
    prompt by prompt, with its interval; where that was run too.
    """
    found: dict[str, dict[str, Any]] = {}
    documents = [passage.document for passage in passages]
    logged = [log.of(key_of(passage)) for passage in passages]
    for label, budget in cells:
        replayed = [own[name_of((label, budget))] for own in logged]
        facts = summarise(replayed, documents)
        base = name_of((DEFAULT_METHOD, budget))
        if label != DEFAULT_METHOD and all(base in own for own in logged):
            pairs = zip(replayed, (own[base] for own in logged), strict=True)
            apart = [one._replace(kl=one.kl - other.kl) for one, other in pairs]
            difference = summarise(apart, documents)
            facts["behind"] = {"kl": difference["kl"], "interval": difference["intervals"]["kl"]}
        found.setdefault(label, {})[budget] = rounded(facts)
    return found


def name_of(cell: Cell) -> str:
    """What a log calls a setting."""
    return " ".join(cell)


def rounded(value: Any) -> Any:
    """Numbers as a file has them."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value
