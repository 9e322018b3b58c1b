"""Which budget is safe: `evaluate` compares methods with the full cache on a user's own requests.

```
 request ─► prefill, once ─► full cache ─► its greedy answer
                             every method ─► the same answer, fed token by token ─► Replayed
 all requests ─► Setting of each method ─► Evaluation ─► .save("report.html")
```

No right answers are needed: what is measured is how far a method's predictions are from the full
cache's.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import CacheLike, FullCache, as_method
from vlcache_jax.errors import real_number, short
from vlcache_jax.evaluation import replay
from vlcache_jax.evaluation.comparison import Comparer, SharedPrefill
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.results.answer import versions
from vlcache_jax.results.labels import labels
from vlcache_jax.results.numbers import bits
from vlcache_jax.results.report import kept_bytes, kv_bits, token_bytes
from vlcache_jax.running.generate import Generate
from vlcache_jax.vlm import VLM

TOLERANCE = 0.95
"""Share of tokens that have to be the same, by default."""

FIELDS = ("images", "context", "text", "videos", "frames")
"""Of a request: arguments of `VLM.generate`, each of which may be left out."""

RESAMPLED = 2000
"""Samples of the bootstrap."""

FEW = 10
"""Requests below which an interval over them says little."""


class Replayed(NamedTuple):
    """What a method made of the full cache's answer to one request.

    Attributes:
        kl: KL(full || method) of each prediction that depends on the cache, in nats, float32 [n].
            Those are the answer's tokens but the first, and its end; none of an empty answer.
        same: whether the likeliest token is the full cache's, bool [n].
        kept_share: bytes kept, as a share of the full cache's.
    """

    kl: np.ndarray
    same: np.ndarray
    kept_share: float

    @property
    def first_difference(self) -> int | None:
        """The first token that differs where the method runs free, from 0 on; None for none."""
        return None if self.same.all() else 1 + int(np.argmin(self.same))


@dataclass(frozen=True)
class Setting:
    """A method with its budget and bits, over all requests. Shares are from 0 to 1.

    Attributes:
        label: unlike that of any other setting.
        method: the method's name.
        budget: as it was given: "0.1", "256tok".
        kv_bits: the quantizer as the command line calls it; None for none.
        kl: KL(full || setting) in nats, mean over the tokens of all requests; None where no answer
            has a token that depends on the cache.
        kl_p95: its 95th percentile.
        top1: share of tokens whose likeliest is the full cache's.
        same_answer: share of requests that are answered with the same tokens.
        first_difference: of the requests that are not, the median of the first token that differs,
            from 0 on; None where there are none.
        kept_share: bytes kept, as a share of the full cache's, the mean over the requests.
        intervals: of 95 %, for "kl" and "top1", by the percentile bootstrap over requests.
    """

    label: str
    method: str
    budget: str
    kv_bits: str | None
    kl: float | None
    kl_p95: float | None
    top1: float | None
    same_answer: float
    first_difference: float | None
    kept_share: float
    intervals: dict[str, tuple[float, float] | None]


@dataclass(frozen=True)
class Evaluation:
    """How far methods are from the full cache.

    Attributes:
        model: what was loaded.
        requests: how many there were.
        tokens: of the full cache's answers, all in all.
        tolerance: share of tokens that have to be the same.
        settings: of each method, in the order given.
        versions: of Python and of packages.
    """

    model: str
    requests: int
    tokens: int
    tolerance: float
    settings: list[Setting]
    versions: dict[str, str]

    @property
    def chosen(self) -> dict[str, Setting | None]:
        """For each method's name its smallest setting that holds; None for none.

        It holds where the whole interval of `top1` is at the tolerance or above.
        """
        found: dict[str, Setting | None] = {setting.method: None for setting in self.settings}
        for setting in sorted(self.settings, key=lambda setting: setting.kept_share):
            if found[setting.method] is None and self.holds(setting):
                found[setting.method] = setting
        return found

    @property
    def choice(self) -> dict[str, str | None]:
        """The budgets of what is `chosen`."""
        return {method: found and found.budget for method, found in self.chosen.items()}

    def holds(self, setting: Setting) -> bool:
        """Whether a setting is as good as the tolerance asks, as far as the requests tell."""
        interval = setting.intervals["top1"]
        return interval is not None and interval[0] >= self.tolerance

    @property
    def few(self) -> bool:
        """Whether the requests are too few for intervals over them to say much."""
        return self.requests < FEW

    @property
    def conclusions(self) -> list[str]:
        """What is `chosen` of each method, as a sentence."""
        limit = f"{100 * self.tolerance:.6g} % or above"
        return [
            f"{method}: no budget that was tried has its interval at {limit}"
            if found is None
            else f"{method}: {' with '.join(filter(None, (found.budget, bits(found.kv_bits))))} "
            f"is the smallest budget whose interval lies at {limit}"
            for method, found in self.chosen.items()
        ]

    @property
    def caution(self) -> str | None:
        """What there is to say of so `few` requests; None where there are enough."""
        if not self.few:
            return None
        asked = "1 request" if self.requests == 1 else f"{self.requests} requests"
        return (
            f"These numbers are of {asked}: an interval over fewer than {FEW} says little, so try "
            "more before relying on a budget"
        )

    def as_json(self) -> dict[str, Any]:
        """All as plain values."""
        settings = [asdict(setting) for setting in self.settings]
        for setting in settings:
            del setting["label"], setting["first_difference"]
        return {
            "requests": self.requests,
            "tolerance": self.tolerance,
            "settings": settings,
            "choice": self.choice,
            "model": self.model,
            "versions": self.versions,
        }

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the page (.html) or the numbers (.json); the file appears whole or not at all.

        Raises:
            FileExistsError: the file exists and `force` is not set.
            FileNotFoundError: its directory does not exist.
            ValueError: its name ends otherwise.
        """
        from vlcache_jax.evaluation.page import render
        from vlcache_jax.results.pages import write_report

        write_report(path, self.as_json, lambda: render(self), force=force)


class Replays(Comparer):
    """Replays requests by many methods; keeps its compiled programs from one to the next.

    Args:
        vlm: the model.
        methods: by what they are called.
        max_new_tokens: most tokens of an answer.

    Attributes:
        methods: made for the model.
        way: the stages that they share.

    Raises:
        ValueError: the model cannot take a method's settings, or `max_new_tokens` is below 1.
    """

    stages: ClassVar[type[SharedPrefill]] = SharedPrefill
    """The kind of stages that all methods share."""

    def __init__(self, vlm: VLM, methods: Mapping[str, CacheMethod], max_new_tokens: int):
        super().__init__(vlm)
        self.max_new_tokens = max_new_tokens
        self.methods = {
            name: method.for_model(vlm.config.text, vlm.tsa_layers)
            for name, method in methods.items()
        }
        self._generate = Generate(
            vlm.config, FullCache(), max_new_tokens, stop_ids=vlm.stop_ids, backend=vlm.backend
        )
        self.way = self.stages(vlm.config, vlm.backend, vlm.transformed, max_new_tokens)

    def tell(self, full: Any, inputs: ModelInputs, said: replay.Said) -> Any:
        """What `SharedPrefill.build` is told of the full cache's answers: nothing here."""

    def run(
        self, inputs: ModelInputs, names: Iterable[str] | None = None
    ) -> tuple[replay.Said, dict[str, list[Replayed]]]:
        """Run B prompts by all methods, or by those that are named.

        Args:
            inputs: the prompts, on the host.
            names: of the methods.

        Returns:
            The full cache's answers, and what each method made of each of them.
        """
        methods = {name: self.methods[name] for name in names or self.methods}
        some = {name: method for name, method in methods.items() if not method.is_full}
        watching, given = tuple(some.values()), jax.device_put(inputs)
        full, token, seen = self.do(self.way, "prefill", self.vlm.params, given, methods=watching)
        said = replay.answer(self, self._generate, full, token, inputs.length)
        found = {name: [_perfect(n) for n in said.compared] for name in methods}
        told = self.tell(full, given, said)
        for pools in self.pools(self.way, full, given, some, seen, told):
            found |= self._replay(pools, said, inputs.length)
        return said, found

    def _replay(self, pools: Any, said: replay.Said, length: np.ndarray) -> dict[str, Any]:
        """What methods of like pools made of the answers."""
        text, dtype = self.vlm.config.text, self.vlm.params["embed"]["embedding"].dtype
        own = Generate(**vars(self._generate) | {"cache": pools.method})
        counts = np.asarray(pools.pool.counts).reshape(len(pools.keys), len(length), -1)
        kl, same = replay.replay(self, own, pools.params, pools.pool, said, length)
        widths = counts.shape[-1] // text.num_layers

        def of(index: int, row: int) -> Replayed:
            rows, n = counts[index, row].reshape(-1, widths), said.compared[row]
            share = kept_bytes(text, pools.method.quantize, rows, dtype)
            share /= int(length[row]) * token_bytes(text, dtype)
            return Replayed(kl[index, row, :n], same[index, row, :n], share)

        return {
            name: [of(index, row) for row in range(len(length))]
            for index, name in enumerate(pools.keys)
        }


def evaluate(
    vlm: VLM,
    requests: Sequence[Mapping[str, Any]],
    methods: Sequence[CacheLike],
    *,
    max_new_tokens: int = 64,
    tolerance: float = TOLERANCE,
    raw_prompt: bool = False,
    names: Sequence[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Compare methods with the full cache on some requests.

    Each request is prefilled once, and answered once, greedily, by the full cache. Each method is
    then fed that answer token by token. All requests are checked before the parameters are read.

    Args:
        vlm: the model.
        requests: for each the arguments of `VLM.generate` that are among `FIELDS`: "text", and
            "images", "videos" or "context" if it is about any.
        methods: one or more methods, or quantizers, which keep everything.
        max_new_tokens: most tokens of an answer.
        tolerance: share of tokens that have to be the same for a budget to be chosen.
        raw_prompt: take the texts as they are, without the chat template.
        names: what each request is called in errors; "request 1" and so on by default.
        progress: called before each request with its name, the requests done and those in all.

    Raises:
        ValueError: there is no request or no method, a method is given twice, a request has another
            field, an image, a video, a text or a context is bad, or there are more tokens than the
            model has positions for.
        FileNotFoundError: a file of an image or a video does not exist.
    """
    tolerance = real_number(tolerance, "tolerance")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"{tolerance=} must be from 0 to 1, a share of the tokens")
    if not methods:
        raise ValueError("nothing to evaluate: give one method or more, VLCache(0.1) for instance")
    if not requests:
        raise ValueError("there are no requests: give one or more")
    chosen = [as_method(method) for method in methods]
    called = list(names or (f"request {number + 1}" for number in range(len(requests))))
    replays = Replays(vlm, dict(zip(labels(chosen), chosen, strict=True)), max_new_tokens)
    options = {"max_new_tokens": max_new_tokens, "raw_prompt": raw_prompt}
    for _ in _prepared(vlm, requests, called, options):
        pass
    _ = vlm.params  # read before the first request is announced
    found: dict[str, list[Replayed]] = {name: [] for name in replays.methods}
    tokens, prepared = 0, _prepared(vlm, requests, called, options)
    for number, name in enumerate(called):
        if progress:
            progress(name, number, len(called))
        said, replayed = replays.run(next(prepared))
        tokens += int(said.counts.sum())
        for each, own in replayed.items():
            found[each] += own
    settings = [_setting(name, replays.methods[name], own) for name, own in found.items()]
    return Evaluation(vlm.name, len(requests), tokens, tolerance, settings, versions())


def _prepared(
    vlm: VLM,
    requests: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    options: Mapping[str, Any],
) -> Iterator[ModelInputs]:
    """The inputs of one request after the other."""
    for name, request in zip(names, requests, strict=True):
        try:
            check_fields(request)
            yield vlm.request(**request, **options).groups[0]
        except (ValueError, OSError, NotImplementedError) as error:
            words = f"{name}: {error}"
            raise type(error)(words) from error


def check_fields(request: Any) -> None:
    """Refuse a request that is not of the fields that there are.

    Raises:
        ValueError: it is no mapping, or has another field, or one of another type.
    """
    if not isinstance(request, Mapping):
        raise ValueError(f"a request has the fields {', '.join(FIELDS)}: {short(request)} is none")
    if unknown := [field for field in request if field not in FIELDS]:
        raise ValueError(
            f"there is no field {short(unknown[0])!r}: a request has {', '.join(FIELDS)}"
        )
    if not isinstance(text := request.get("text", ""), str):
        raise ValueError(f"text={short(text)} must be a string")


def _perfect(count: int) -> Replayed:
    """What the full cache makes of its own answer."""
    return Replayed(np.zeros(count, np.float32), np.ones(count, bool), 1.0)


def _setting(name: str, method: CacheMethod, replayed: Sequence[Replayed]) -> Setting:
    """A method over all requests."""
    own = name, method.name, str(method.limit), kv_bits(method.quantize)
    return Setting(*own, **summarise(replayed))


def summarise(
    replayed: Sequence[Replayed], groups: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """A method over all requests, by the names of `Setting`.

    Args:
        replayed: what it made of each request.
        groups: what each request belongs to; intervals are over these. Each is its own by default.
    """
    kl = np.concatenate([each.kl for each in replayed]).astype(np.float64)
    same = np.concatenate([each.same for each in replayed])
    known = list(dict.fromkeys(groups or range(len(replayed))))
    places = [known.index(group) for group in groups or range(len(replayed))]
    sums = {
        "count": np.bincount(places, [each.same.size for each in replayed]),
        "kl": np.bincount(places, [each.kl.sum(dtype=np.float64) for each in replayed]),
        "top1": np.bincount(places, [each.same.sum() for each in replayed]),
    }
    differ = [at for each in replayed if (at := each.first_difference) is not None]
    return {
        "kl": float(kl.mean()) if kl.size else None,
        "kl_p95": float(np.quantile(kl, 0.95)) if kl.size else None,
        "top1": float(same.mean()) if same.size else None,
        "same_answer": 1 - len(differ) / len(replayed),
        "first_difference": float(np.median(differ)) if differ else None,
        "kept_share": float(np.mean([each.kept_share for each in replayed])),
        "intervals": {what: ratio_interval(sums[what], sums["count"]) for what in ("kl", "top1")},
    }


def ratio_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of sum(sums) / sum(counts), by the percentile bootstrap over requests.

    Args:
        sums: of what each request's tokens have, [n].
        counts: of its tokens, [n]; None comes of none at all.
    """
    if not counts.sum():
        return None
    drawn = np.random.default_rng(0).integers(counts.size, size=(RESAMPLED, counts.size))
    total = counts[drawn].sum(axis=1)
    ratios = (sums[drawn].sum(axis=1)[total > 0]) / total[total > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
