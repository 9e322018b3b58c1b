"""What docs/benchmarks.md says of speed and memory: every number comes from a result file.

The limits alone are computed, by `benchmarks.roofline`. What was not measured says so.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.documents import NOT_MEASURED, ROOT, table
from benchmarks.models import MODELS
from benchmarks.roofline import DEVICES, decode_step, largest_batch
from benchmarks.roofline.packed import bits_of, quantized_rows
from benchmarks.speed.rows import cache_of
from vlcache_jax.cache.quantizers import AKVQ
from vlcache_jax.report import human_bytes

RESULTS = ROOT / "benchmarks" / "results"
CPU = RESULTS / "cpu"
GPU = RESULTS / "nvidia-h200"
"""Written by `python -m benchmarks.gpu_suite` on that device."""

SPEED_CPU = CPU / "speed.json"
PEERS_CPU = CPU / "peers.json"
PROFILE_CPU = CPU / "profile.json"
THROUGHPUT_CPU = CPU / "throughput.json"
PAPER_GPU = GPU / "paper_decode.json"
PAPER_WHOLE_GPU = GPU / "paper_whole.json"
DECODE_GPU = GPU / "model_decode.json"
PEERS_GPU = GPU / "peers.json"
THROUGHPUT_GPU = GPU / "throughput.json"
PROFILE_GPU = GPU / "profile.json"
PROGRAMS = RESULTS / "offline" / "programs-h200.json"

SUMMARY = (PROGRAMS, SPEED_CPU, PEERS_CPU, PAPER_GPU)
"""What the README's part is made of."""


SIZES = ((2048, 1), (2048, 64), (8192, 8), (8192, 64), (32768, 8), (131072, 1))
"""Context and batch of the rows of limits."""

SHOWN = ("llava-v1.6-mistral-7b", "llava-1.5-7b", "llava-v1.6-34b")
DEVICE = DEVICES["h200"]

Result = dict[str, Any]


def milliseconds(seconds: float) -> str:
    """A time with three digits."""
    return f"{1e3 * seconds:.3g} ms"


def limits_part() -> str:
    """What the bytes and operations allow on the named device."""
    plain, packed = [], []
    for context, batch in SIZES:
        cells: list[list[str]] = [[], []]
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
            cells[0].append(f"{milliseconds(full)} to {tenth}{fits}")
            cells[1].append(f"{in_bits}; {tenth_in_bits}{fits}")
        size = f"{context:,} x {batch}"
        plain.append([size, *cells[0]])
        packed.append([size, *cells[1]])
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
    text = MODELS[model].text
    quantizer = AKVQ().for_decoder(text.kind, text.num_layers)
    bits = (
        bits_of(text, quantizer, quantized_rows(text, quantizer, context, share))
        for share in (1.0, 0.1)
    )
    return [(1.0, 16.0), (0.1, 16.0), *zip((1.0, 0.1), bits, strict=True)]


def programs_part(result: Result | None) -> str:
    """Whole programs compiled for a GPU that is not there."""
    if result is None:
        return NOT_MEASURED
    head = [
        "model", "program", "prompt x batch", "budget", "bits", "cache", "of the full one",
        "temporaries", "peak", "cache copies in the loop", "launches per layer",
        "one command buffer", "compile",
    ]  # fmt: skip
    rows = [
        [
            row["model"],
            row["stage"],
            f"{row['context']} x {row['batch']}",
            f"{row['budget']:.0%}",
            row.get("kv_bits", "16"),
            human_bytes(row["cache_bytes"]),
            f"{row['cache_bytes'] / row['full_cache_bytes']:.1%}",
            human_bytes(row["temp_bytes"]),
            human_bytes(row["peak_bytes"]),
            str(row["cache_copies_in_loop"]),
            "-" if row["launches_per_layer"] is None else f"{row['launches_per_layer']:g}",
            "yes" if row["one_command_buffer"] else "no",
            f"{row['compile_s']:.0f} s",
        ]
        for row in result["rows"]
    ]
    return f"bfloat16, jax {result['versions']['jax']}:\n\n{table(head, rows)}"


def _in_bits(row: Result) -> str:
    """How a program's cache is quantized, where it is."""
    bits = row.get("kv_bits", "16")
    return {"16": ""}.get(bits, f" in {bits} bits" if bits.isdigit() else f" by {bits}")


def _made_by(result: Result) -> str:
    """Where, when, with what."""
    return (
        f"`{result['command']}`, {result['device']} ({result['machine']['cores']} cores of "
        f"{result['machine']['cpu']}), jax {result['versions']['jax']}, "
        f"commit {result['commit'][:12]}, {result['date'][:10]}"
    )


def _speed_rows(rows: Iterable[Result]) -> str:
    head = [
        "stage", "model", "context x batch", "cache", "median", "spread", "share of the limit",
        "speed-up", "of the ideal", "programs", "first call",
    ]  # fmt: skip
    cells = []
    for row in rows:
        about = [
            row["stage"],
            f"{row['model']}, {row['dtype']}" + (" ‡" if row["synthetic_positions"] else ""),
            f"{row['context']} x {row['batch']}",
            cache_of(row),
        ]
        if "exception" in row:
            cells.append([*about, row["exception"].splitlines()[0][:80], *[""] * 6])
            continue
        low, high = row["spread"]
        share, speedup = row.get("share"), row.get("speedup")
        ideal = row.get("share_of_ideal")
        cells.append(
            [
                *about,
                milliseconds(row["seconds"]),
                f"{milliseconds(low)} to {milliseconds(high)}",
                "-" if share is None else f"{share:.0%}",
                "-" if speedup is None else f"{speedup:.2f}x",
                "-" if ideal is None else f"{ideal:.0%}",
                str(row.get("programs", "-")),
                f"{row['compile_s']:.1f} s",
            ]
        )
    return table(head, cells) + "\n\n‡ more positions than the model was made for."


def cpu_part(result: Result | None) -> str:
    """Decode steps on a CPU."""
    if result is None:
        return NOT_MEASURED
    found, limit = result["cpu"], result["limit"]
    return "\n\n".join(
        [
            f"{_made_by(result)}. The limit is that of {limit['bandwidth'] / 1e9:.1f} GB/s copied "
            f"and {limit['flops'] / 1e9:.0f} GFLOP/s multiplied, {limit['source']}.",
            _speed_rows(result["rows"]),
            f"{human_bytes(found['weight_bytes'])} of weights and "
            f"{human_bytes(found['cache_bytes'])} of cache are read in a step: by the bytes alone "
            f"a tenth is {found['ideal']:.2f} times as fast. Measured are {found['speedup']:.2f}, "
            f"{found['share']:.0%} of that; {found['must_reach']:.0%} must be reached.",
        ]
    )


def peers_part(result: Result | None) -> str:
    """Hugging Face transformers beside ours."""
    if result is None:
        return NOT_MEASURED
    head = ["side", "stage", "median", "spread", "first call"]
    rows = []
    for row in result["rows"]:
        if "exception" in row:
            rows.append([row["side"], row["stage"], row["exception"].splitlines()[0][:80], "", ""])
            continue
        low, high = (milliseconds(value) for value in row["spread"])
        times = [milliseconds(row["seconds"]), f"{low} to {high}", f"{row['compile_s']:.1f} s"]
        rows.append([row["side"], row["stage"], *times])
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
    return "\n\n".join(
        [
            f"{_made_by(result)}. Model {first['model']}, {first['dtype']}, a prompt of "
            f"{first['context']} tokens, batch {first['batch']}. Checked first: {checks}.",
            table(head, rows),
            ratios,
        ]
    )


def paper_part(steps: Result | None, whole: Result | None) -> str:
    """The paper's five rows beside ours."""
    if steps is None and whole is None:
        return NOT_MEASURED
    head = ["context x batch", "stage", "paper", "ours", "ideal"]
    rows = [
        [f"{row['context']:,} x {row['batch']}", row["stage"], f"{row['paper']:.2f}x",
         f"{row['ours']:.2f}x", f"{row['ideal']:.2f}x"]
        for result in (steps, whole)
        if result is not None
        for row in result["paper"]
    ]  # fmt: skip
    made = "; ".join(_made_by(result) for result in (steps, whole) if result is not None)
    return f"{made}.\n\n{table(head, rows)}"


def decode_part(result: Result | None) -> str:
    """Decode steps of a 7B model."""
    if result is None:
        return NOT_MEASURED
    return f"{_made_by(result)}.\n\n{_speed_rows(result['rows'])}"


def profile_part(result: Result | None) -> str:
    """Where the time goes, by scope."""
    if result is None:
        return NOT_MEASURED
    traced = [row for row in result["profiles"] if "scopes" in row]
    shares = [{scope["scope"]: scope["share"] for scope in row["scopes"]} for row in traced]
    scopes = list(dict.fromkeys(name for row in shares for name in row))
    rows = [
        [
            row["stage"],
            cache_of(row),
            f"{row['context']} x {row['batch']}",
            *(f"{own[name]:.1%}" if name in own else "-" for name in scopes),
        ]
        for row, own in zip(traced, shares, strict=True)
    ]
    head = ["program", "cache", "context x batch", *scopes]
    return f"{_made_by(result)}. Shares of the time of all instructions:\n\n{table(head, rows)}"


def throughput_part(result: Result | None) -> str:
    """Tokens per second of as many sequences as the memory holds."""
    if result is None:
        return NOT_MEASURED
    head = [
        "cache", "context", "sequences", "cache and tail", "tokens/s", "share of the limit",
        "over full", "answers/s",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        if "exception" in row:
            rows.append([cache_of(row), f"{row['context']}", row["exception"][:80], *[""] * 5])
            continue
        ratio = row.get("tokens_per_s_over_full")
        rows.append(
            [
                cache_of(row),
                f"{row['context']}",
                f"{row['sequences']:,}",
                human_bytes(row["cache_bytes"] + row["tail_bytes"]),
                f"{row['tokens_per_s']:,.1f}",
                f"{row['share']:.0%}",
                "-" if ratio is None else f"{ratio:.2f}x",
                f"{row['answers_per_s']:.2f}",
            ]
        )
    return (
        f"{_made_by(result)}. Memory used: {human_bytes(result['limit']['memory'])}, weights "
        f"included.\n\n{table(head, rows)}"
    )


def summary_part(
    programs: Result | None, speed: Result | None, peers: Result | None, gpu: Result | None
) -> str:
    """What the README says of speed and memory: a line for each thing that is known."""
    lines = []
    if programs is not None:
        size = {"stage": "decode", "model": SHOWN[0], "context": 8192, "batch": 64}
        own = [row for row in programs["rows"] if size.items() <= row.items()]
        for row in own:
            lines.append(
                [
                    f"{row['model']}, {row['context']} x {row['batch']}, {row['budget']:.0%} of "
                    f"the cache{_in_bits(row)}, compiled for an H200",
                    f"cache {human_bytes(row['cache_bytes'])}, peak "
                    f"{human_bytes(row['peak_bytes'])}, {row['cache_copies_in_loop']} copies of it "
                    "in the loop",
                ]
            )
    if speed is not None:
        found, row = speed["cpu"], speed["rows"][0]
        lines.append(
            [
                f"decode step, a tenth over the full cache, {row['context']} x {row['batch']}, CPU",
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
        return table(["what", "result"], lines)
    for row in gpu["paper"]:
        lines.append(
            [
                f"{row['stage']}, a tenth over the full cache, 7B, {row['context']:,} x "
                f"{row['batch']}, {gpu['device']}",
                f"{row['ours']:.2f} times as fast; ideal {row['ideal']:.2f}",
            ]
        )
    return table(["what", "result"], lines)


PARTS: dict[str, tuple[Callable[..., str], tuple[Path, ...]]] = {
    "limits": (limits_part, ()),
    "paper": (paper_part, (PAPER_GPU, PAPER_WHOLE_GPU)),
    "decode-gpu": (decode_part, (DECODE_GPU,)),
    "decode-cpu": (cpu_part, (SPEED_CPU,)),
    "peers-gpu": (peers_part, (PEERS_GPU,)),
    "peers-cpu": (peers_part, (PEERS_CPU,)),
    "throughput-gpu": (throughput_part, (THROUGHPUT_GPU,)),
    "throughput-cpu": (throughput_part, (THROUGHPUT_CPU,)),
    "profile-gpu": (profile_part, (PROFILE_GPU,)),
    "profile-cpu": (profile_part, (PROFILE_CPU,)),
    "programs": (programs_part, (PROGRAMS,)),
}
"""The generated parts of docs/benchmarks.md, and what they are made of."""
