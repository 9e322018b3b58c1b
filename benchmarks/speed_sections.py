"""What docs/benchmarks.md and the commands say of speed and memory.

Every number comes from a result file; the limits alone are computed, by `benchmarks.roofline`.
"""

from collections.abc import Callable, Sequence

from benchmarks.documents import RESULTS, Part, Result, measured, table
from benchmarks.models import MODELS
from benchmarks.programs import PARTS
from benchmarks.roofline import DEVICES, decode_step, largest_batch
from benchmarks.roofline.packed import caches
from benchmarks.speed.rows import cache_of
from vlcache_jax.results.report import human_bytes

CPU = RESULTS / "cpu"
GPU = RESULTS / "nvidia-h200"
"""Written by `python -m benchmarks.gpu_suite` on that device."""

PROGRAMS = RESULTS / "offline" / "programs-h200.json"
SIZES = ((2048, 1), (2048, 64), (8192, 8), (8192, 64), (32768, 8), (131072, 1))
"""Context and batch of the rows of limits."""

SHOWN = ("llava-v1.6-mistral-7b", "llava-1.5-7b", "llava-v1.6-34b")
DEVICE = DEVICES["h200"]


def milliseconds(seconds: float) -> str:
    """A time with three digits."""
    return f"{1e3 * seconds:.3g} ms"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _size(row: Result) -> str:
    return f"{row['context']} x {row['batch']}"


def _made_by(result: Result) -> str:
    """Where, when, with what."""
    return (
        f"`{result['command']}`, {result['device']} ({result['machine']['cores']} cores of "
        f"{result['machine']['cpu']}), jax {result['versions']['jax']}, "
        f"commit {result['commit'][:12]}, {result['date'][:10]}"
    )


def _rows(
    head: Sequence[str],
    rows: Sequence[Result],
    about: Callable[[Result], list[str]],
    cells: Callable[[Result], list[str]],
) -> str:
    """A table of measurements; where one failed, the reason stands in place of its cells."""

    def line(row: Result) -> list[str]:
        own = about(row)
        if "exception" not in row:
            return [*own, *cells(row)]
        gap = [""] * (len(head) - len(own) - 1)
        return [*own, row["exception"].splitlines()[0][:80], *gap]

    return table(head, map(line, rows))


def _timed(row: Result) -> list[str]:
    """Median and spread."""
    low, high = map(milliseconds, row["spread"])
    return [milliseconds(row["seconds"]), f"{low} to {high}"]


def limits_part() -> str:
    """What the bytes and operations allow on the named device."""
    plain, packed = [], []
    for context, batch in SIZES:
        size = f"{context:,} x {batch}"
        plain.append([size])
        packed.append([size])
        for model in SHOWN:
            config = MODELS[model]
            full, *others = (
                decode_step(config, context, batch, *kept).floor(DEVICE)
                for kept in _caches(model, context)
            )
            tenth, in_bits, tenth_in_bits = (
                f"{milliseconds(floor)}, {full / floor:.2f}x" for floor in others
            )
            fits = "" if largest_batch(DEVICE, config, context) >= batch else " †"
            plain[-1].append(f"{milliseconds(full)} to {tenth}{fits}")
            packed[-1].append(f"{in_bits}; {tenth_in_bits}{fits}")
    batches = [
        [f"{context:,}", *(
            " / ".join(str(largest_batch(DEVICE, MODELS[model], context, *kept))
                       for kept in _caches(model, context)) for model in SHOWN)]
        for context in (2048, 8192, 32768)
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"A decode step with the full cache and with a tenth of it, on an {DEVICE.name} "
            f"({DEVICE.bandwidth / 1e12:g} TB/s, {DEVICE.flops / 1e12:g} TFLOP/s, "
            f"{DEVICE.memory / 2**30:g} GiB); † where the full cache does not fit:",
            table(["context x batch", *SHOWN], plain),
            "With all of it by AKVQ, and with a tenth of it by AKVQ, each beside the full cache as "
            "it is; rows of 16 bit, scales and shifts are counted:",
            table(["context x batch", *SHOWN], packed),
            "Most sequences that fit, full / a tenth / full by AKVQ / a tenth by AKVQ:",
            table(["context", *SHOWN], batches),
        ]
    )


def _caches(model: str, context: int) -> list[tuple[float, float]]:
    """Budget and stored bits of the full cache, a tenth, and both in AKVQ's bits."""
    config = MODELS[model]
    return [cache.kept(config, context) for cache in caches(config, 0.1, "akvq").values()]


@measured
def programs_part(result: Result) -> str:
    """Whole programs compiled for a GPU that is not there."""
    head = [
        "model", "program", "prompt x batch", "method", "budget", "bits", "cache",
        "of the full one",
        "temporaries", "peak", "cache copies in the loop", "launches per layer",
        "one command buffer", "compile",
    ]  # fmt: skip

    def cache(row: Result) -> list[str]:
        if row["stage"] == "vision":
            return ["-"] * 5
        return [
            row.get("method", "vl-cache") if row["budget"] < 1 else "full",
            f"{row['budget']:.0%}",
            row.get("kv_bits", "16"),
            human_bytes(row["cache_bytes"]),
            f"{row['cache_bytes'] / row['full_cache_bytes']:.1%}",
        ]

    def step(row: Result) -> list[str]:
        if row["stage"] == "vision":
            return ["-"] * 3
        return [
            str(row["cache_copies_in_loop"]),
            "-" if row["launches_per_layer"] is None else f"{row['launches_per_layer']:g}",
            "yes" if row["one_command_buffer"] else "no",
        ]

    rows = [
        [
            row["model"],
            row["stage"],
            _size(row) + (f", {row['tiles']} tiles" if row.get("tiles") else ""),
            *cache(row),
            human_bytes(row["temp_bytes"]),
            human_bytes(row["peak_bytes"]),
            *step(row),
            f"{row['compile_s']:.0f} s",
        ]
        for row in result["rows"]
        if row["stage"] not in PARTS
    ]
    tables = [table(head, rows)] if rows else []
    parts = [row for row in result["rows"] if row["stage"] in PARTS]
    return "\n\n".join([f"bfloat16, jax {result['versions']['jax']}:", *tables, *_part_rows(parts)])


def _part_rows(rows: Sequence[Result]) -> list[str]:
    """Prompts in parts: what they need beside the weights and the whole prompt's K and V."""
    head = [
        "model", "part", "prompt x batch", "method", "rows", "K and V", "beside weights, K and V",
        "copies of K or V", "operations", "least", "ratio", "least bytes", "compile",
    ]  # fmt: skip

    def counted(row: Result) -> list[str]:
        if "operations" not in row:
            return ["-"] * 4
        found, least = row["operations"], row["least_operations"]
        return [
            f"{found / 1e12:.2f} T", f"{least / 1e12:.2f} T", f"{found / least:.2f}",
            human_bytes(row["least_bytes"]),
        ]  # fmt: skip

    cells = [
        [
            row["model"],
            row["stage"],
            _size(row) + (f", {row['tiles']} tiles" if row["tiles"] else ""),
            row["method"] if row["budget"] < 1 else "full",
            "-" if row["stage"] in ("see", "build_cache") else f"{row['rows']:,}",
            human_bytes(row["full_cache_bytes"]),
            human_bytes(row["beside_bytes"]),
            str(row["buffer_copies"]),
            *counted(row),
            f"{row['compile_s']:.0f} s",
        ]
        for row in rows
    ]
    return [table(head, cells)] if cells else []


def _speed_rows(rows: Sequence[Result]) -> str:
    head = [
        "stage", "model", "context x batch", "cache", "median", "spread", "share of the limit",
        "speed-up", "of the ideal", "programs", "first call",
    ]  # fmt: skip

    def about(row: Result) -> list[str]:
        far = " ‡" if row["synthetic_positions"] else ""
        return [row["stage"], f"{row['model']}, {row['dtype']}{far}", _size(row), cache_of(row)]

    def cells(row: Result) -> list[str]:
        return [
            *_timed(row),
            _share(row.get("share")),
            _times(row.get("speedup")),
            _share(row.get("share_of_ideal")),
            str(row.get("programs", "-")),
            f"{row['compile_s']:.1f} s",
        ]

    return f"{_rows(head, rows, about, cells)}\n\n‡ more positions than the model was made for."


@measured
def speed_part(result: Result) -> str:
    """All that `benchmarks.speed` measured: the stages' times, and what a preset compares."""
    limit = result["limit"]
    parts = [
        f"{_made_by(result)}. The limit is that of {limit['bandwidth'] / 1e9:.1f} GB/s copied "
        f"and {limit['flops'] / 1e9:.0f} GFLOP/s multiplied, {limit['source']}."
    ]
    if result["rows"]:
        parts.append(_speed_rows(result["rows"]))
    if (found := result.get("cpu")) and found["speedup"]:
        parts.append(
            f"{human_bytes(found['weight_bytes'])} of weights and "
            f"{human_bytes(found['cache_bytes'])} of cache are read in a step: by the bytes alone "
            f"a tenth is {found['ideal']:.2f} times as fast. Measured are {found['speedup']:.2f}, "
            f"{found['share']:.0%} of that; {found['must_reach']:.0%} must be reached."
        )
    if result.get("profiles"):
        parts.append(_scope_rows(result["profiles"]))
    return "\n\n".join(parts)


@measured
def peers_part(result: Result) -> str:
    """Hugging Face transformers beside ours."""
    first = result["rows"][0]
    checks = "; ".join(
        f"{check['side']} and {check['reference']}: {check['equal_tokens']} of {check['tokens']} "
        f"greedy tokens the same, logits within {check['logits_error']:.0e}"
        for check in result["checks"]
    )
    ratios = "\n".join(
        f"- {row['ratio']}, {row['stage']}: {row['speedup']:.2f} times as fast"
        for row in result["ratios"]
        if row["speedup"]
    )
    rows = _rows(
        ["side", "stage", "median", "spread", "first call"],
        result["rows"],
        about=lambda row: [row["side"], row["stage"]],
        cells=lambda row: [*_timed(row), f"{row['compile_s']:.1f} s"],
    )
    return (
        f"{_made_by(result)}. Model {first['model']}, {first['dtype']}, a prompt of "
        f"{first['context']} tokens, batch {first['batch']}. Checked first: {checks}."
        f"\n\n{rows}\n\n{ratios}"
    )


@measured
def paper_part(*results: Result | None) -> str:
    """The paper's five rows beside ours: decode steps, then prefill and whole answers."""
    found = [result for result in results if result is not None]
    head = ["context x batch", "stage", "paper", "ours", "ideal"]
    rows = [
        [f"{row['context']:,} x {row['batch']}", row["stage"], *(_times(row[n]) for n in head[2:])]
        for result in found
        for row in result["paper"]
    ]
    return f"{'; '.join(map(_made_by, found))}.\n\n{table(head, rows)}"


def _scope_rows(profiles: Sequence[Result]) -> str:
    traced = [row for row in profiles if "scopes" in row]
    shares = [{scope["scope"]: scope["share"] for scope in row["scopes"]} for row in traced]
    scopes = list(dict.fromkeys(name for row in shares for name in row))
    rows = [
        [row["stage"], cache_of(row), _size(row), *(_share(own.get(name), 1) for name in scopes)]
        for row, own in zip(traced, shares, strict=True)
    ]
    return table(["program", "cache", "context x batch", *scopes], rows)


@measured
def profile_part(result: Result) -> str:
    """Where the time goes, by scope."""
    rows = _scope_rows(result["profiles"])
    return f"{_made_by(result)}. Shares of the time of all instructions:\n\n{rows}"


@measured
def throughput_part(result: Result) -> str:
    """Tokens per second of as many sequences as the memory holds."""
    head = [
        "cache", "context", "sequences", "cache and tail", "tokens/s", "share of the limit",
        "over full", "answers/s",
    ]  # fmt: skip
    rows = _rows(
        head,
        result["rows"],
        about=lambda row: [cache_of(row), f"{row['context']}"],
        cells=lambda row: [
            f"{row['sequences']:,}",
            human_bytes(row["cache_bytes"] + row["tail_bytes"]),
            f"{row['tokens_per_s']:,.1f}",
            _share(row["share"]),
            _times(row.get("tokens_per_s_over_full")),
            f"{row['answers_per_s']:.2f}",
        ],
    )
    return (
        f"{_made_by(result)}. Memory used: {human_bytes(result['limit']['memory'])}, weights "
        f"included.\n\n{rows}"
    )


@measured
def sessions_part(result: Result) -> str:
    """A second question about a picture beside a new prefill of the same prompt."""
    head = ["visual tokens", "bucket", "way", "median", "spread", "over the new prefill",
            "first call"]  # fmt: skip
    rows = _rows(
        head,
        result["rows"],
        about=lambda row: [
            f"{row['visual_tokens']:,}",
            f"{row['bucket']:,}",
            row["way"],
        ],
        cells=lambda row: [
            *_timed(row),
            _times(row.get("speedup")),
            f"{row['compile_s']:.1f} s",
        ],
    )
    first = result["rows"][0]
    return (
        f"{_made_by(result)}. Model {first['model']}, {first['dtype']}, {first['method']}, "
        f"{first['question_tokens']} tokens of question:\n\n{rows}"
    )


def summary_part(
    programs: Result | None, speed: Result | None, peers: Result | None, gpu: Result | None
) -> str:
    """What the README says of speed and memory: a line for each thing that is known."""
    lines = []
    if programs is not None:
        size = {"stage": "decode", "model": SHOWN[0], "context": 8192, "batch": 64}
        for row in programs["rows"]:
            if size.items() <= row.items():
                bits = row.get("kv_bits", "16")
                by = {"16": ""}.get(bits, f" in {bits} bits" if bits.isdigit() else f" by {bits}")
                what = f"{row['model']}, {_size(row)}, {row['budget']:.0%} of the cache{by}"
                found = (
                    f"cache {human_bytes(row['cache_bytes'])}, peak "
                    f"{human_bytes(row['peak_bytes'])}, {row['cache_copies_in_loop']} copies of it "
                    "in the loop"
                )
                lines.append([f"{what}, compiled for an H200", found])
    if speed is not None:
        found, row = speed["cpu"], speed["rows"][0]
        lines.append(
            [
                f"decode step, a tenth over the full cache, {_size(row)}, CPU",
                f"{found['speedup']:.2f} times as fast; by the bytes alone {found['ideal']:.2f}",
            ]
        )
    if peers is not None:
        context = peers["rows"][0]["context"]
        lines += [
            [
                f"decode step, {ratio['ratio']}, {context} tokens, CPU",
                f"{ratio['speedup']:.2f} times as fast",
            ]
            for ratio in peers["ratios"]
            if ratio["stage"] == "decode" and ratio["speedup"]
        ]
    if gpu is None:
        lines.append(["speed on a GPU", "not measured"])
    else:
        lines += [
            [
                f"{row['stage']}, a tenth over the full cache, 7B, {row['context']:,} x "
                f"{row['batch']}, {gpu['device']}",
                f"{row['ours']:.2f} times as fast; ideal {row['ideal']:.2f}",
            ]
            for row in gpu["paper"]
        ]
    return table(["what", "result"], lines)


SUMMARY = Part(
    "speed",
    summary_part,
    (PROGRAMS, CPU / "speed.json", CPU / "peers.json", GPU / "paper_decode.json"),
)
"""Of the README."""

SECTIONS = (
    Part("limits", limits_part),
    Part("paper", paper_part, (GPU / "paper_decode.json", GPU / "paper_whole.json")),
    Part("decode-gpu", speed_part, (GPU / "model_decode.json",)),
    Part("decode-cpu", speed_part, (CPU / "speed.json",)),
    Part("peers-gpu", peers_part, (GPU / "peers.json",)),
    Part("peers-cpu", peers_part, (CPU / "peers.json",)),
    Part("throughput-gpu", throughput_part, (GPU / "throughput.json",)),
    Part("throughput-cpu", throughput_part, (CPU / "throughput.json",)),
    Part("sessions-gpu", sessions_part, (GPU / "sessions.json",)),
    Part("sessions-cpu", sessions_part, (CPU / "sessions.json",)),
    Part("profile-gpu", profile_part, (GPU / "profile.json",)),
    Part("profile-cpu", profile_part, (CPU / "profile.json",)),
    Part("programs", programs_part, (PROGRAMS,)),
)
"""Of docs/benchmarks.md."""
