"""The engine under load, in this process: `python -m benchmarks.serving`.

So many requests are under way at any time: whenever one is answered the next one is submitted. All
ask about a picture and are answered by as many tokens as they may have; nothing is run once for
several of them. Pictures are read and prepared before the time begins.
"""

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice, pairwise
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import typer

import vlcache_jax
from benchmarks import device
from benchmarks.command import AsJson, Force, Out, bad_input, check_out, counting_bar, finish
from benchmarks.documents import RESULTS, Part, table
from benchmarks.documents import measured as where_measured
from benchmarks.environment import environment
from benchmarks.models import MODELS
from benchmarks.roofline import DEVICES
from benchmarks.speed.cases import FULL, name_of
from benchmarks.speed.options import dtype_of
from benchmarks.speed_sections import milliseconds
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import make_method
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.demo import pictures
from vlcache_jax.results.report import slots_that_fit
from vlcache_jax.running.programs import Programs
from vlcache_jax.serving import Engine, SlotGroup
from vlcache_jax.serving.ticket import Ticket
from vlcache_jax.streaming import Request
from vlcache_jax.vlm import VLM

MODEL = "demo-small"
PROMPT_ROWS = 512
AT_ONCE = (1, 8, 16)
CACHES = (FULL, make_method("vl-cache", 0.1), make_method("vl-cache", 0.1, make_quantizer("2")))
FIT = "llava-v1.6-mistral-7b", 2048, 128
"""Model, prompt rows and new tokens of the sequences that are counted."""


class Run(NamedTuple):
    """What one program of the engine's thread did.

    Attributes:
        stage: its name.
        began, ended: by `time.perf_counter`.
        running: tickets that were in slots.
    """

    stage: str
    began: float
    ended: float
    running: frozenset[int]


@contextmanager
def watched(engine: Engine) -> Iterator[list[Run]]:
    """What the engine runs: when each program begins, and when its result is there."""
    seen: list[Run] = []
    ready = Programs.ready

    def watch(self: Programs, name: Any, *args: Any, **options: Any) -> Any:
        program, seconds = ready(self, name, *args, **options)

        def timed(*args: Any) -> Any:
            running = {id(ticket) for group in engine.groups for _, ticket in group.running}
            began = time.perf_counter()
            result = program(*args)
            seen.append(Run(name[1], began, time.perf_counter(), frozenset(running)))
            return result

        return timed, seconds

    Programs.ready = watch
    try:
        yield seen
    finally:
        Programs.ready = ready


def answered(engine: Engine, requests: Sequence[Request], at_once: int) -> list[Ticket]:
    """The tickets of all requests, so many of which are under way at any time."""
    waiting, lock = iter(requests), threading.Lock()
    tickets: list[Ticket] = []
    failed: list[Exception] = []

    def client() -> None:
        while True:
            with lock:
                request = None if failed else next(waiting, None)
            if request is None:
                return
            try:
                ticket = engine.submit(request)
                _ = ticket.answer
                tickets.append(ticket)
            except Exception as error:  # raised below, in the thread that measures
                failed.append(error)

    clients = [threading.Thread(target=client) for _ in range(at_once)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    if failed:
        raise failed[0]
    return tickets


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th."""
    found = np.percentile(values, (50, 95, 99))
    return dict(zip(("p50", "p95", "p99"), map(float, found), strict=True))


def described(
    runs: Sequence[Run], tickets: Sequence[Ticket], wall: float, cpu: float
) -> dict[str, Any]:
    """The measures of one load."""
    chunks = [(index, run) for index, run in enumerate(runs) if run.stage == "decode_chunk"]
    # The host's part of a chunk: from its result to whatever program runs next.
    host = [runs[i + 1].began - run.ended for i, run in chunks if i + 1 < len(runs)]
    device_s = statistics.median(run.ended - run.began for _, run in chunks)
    host_s = statistics.median(host)
    gaps = [
        second.ended - first.ended
        for (_, first), (_, second) in pairwise(chunks)
        if first.running & second.running
    ]
    tokens = [len(ticket.answer.tokens) for ticket in tickets]
    times = [ticket.times for ticket in tickets]
    each = [
        (time.ended - time.first) / (count - 1) for time, count in zip(times, tokens, strict=True)
    ]
    stages = {run.stage for run in runs}
    return {
        "requests": len(tickets),
        "tokens": sum(tokens),
        "wall_s": wall,
        "cpu_s": cpu,
        "requests_per_s": len(tickets) / wall,
        "tokens_per_s": sum(tokens) / wall,
        "requests_per_cpu_s": len(tickets) / cpu,
        "first_token_s": percentiles([time.first - time.submitted for time in times]),
        "per_token_s": percentiles(each),
        "mean_slots_in_use": statistics.mean(len(run.running) for _, run in chunks),
        "largest_gap_s": max(gaps, default=0.0),
        "decode_chunk_s": device_s,
        "host_per_chunk_s": host_s,
        "host_share": host_s / (host_s + device_s),
        "stage_s": {
            stage: sum(run.ended - run.began for run in runs if run.stage == stage)
            for stage in sorted(stages)
        },
    }


def measured(
    vlm: VLM, cache: CacheMethod, at_once: Sequence[int], count: int, new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """The rows of a cache: an engine for each number of requests at once, and all take turns."""
    shown = pictures(MODEL)
    requests = [
        vlm.request(one.file, one.prompt, cache=cache, max_new_tokens=new_tokens, ignore_eos=True)
        for one in islice(cycle(shown), count)
    ]
    budget = 1.0 if cache.limit.keeps_all else 0.1
    engines = {}
    for number in at_once:
        group = SlotGroup(number, new_tokens, budget)
        engines[number] = Engine(vlm, [cache], [group], prompt_rows=PROMPT_ROWS)
        engines[number].warm_up()
    samples: dict[int, list[dict[str, Any]]] = {number: [] for number in at_once}
    for _ in range(repeats):
        for number, engine in engines.items():
            with watched(engine) as runs:
                began, cpu = time.perf_counter(), time.process_time()
                tickets = answered(engine, requests, number)
                spent = time.perf_counter() - began, time.process_time() - cpu
            samples[number].append(described(runs, tickets, *spent))
    rows = []
    for number, engine in engines.items():
        engine.close()
        found = sorted(samples[number], key=lambda sample: sample["wall_s"])
        middle = found[len(found) // 2]
        rows.append({"method": name_of(cache), "at_once": number, **middle, "samples": found})
    for row in rows[1:]:
        row["over_first"] = row["requests_per_s"] / rows[0]["requests_per_s"]
        row["cpu_over_first"] = row["requests_per_cpu_s"] / rows[0]["requests_per_cpu_s"]
    return rows


def fits() -> list[dict[str, Any]]:
    """How many sequences a GPU's memory holds with each cache, by count."""
    model, rows, new_tokens = FIT
    memory = int(DEVICES["h200"].memory)
    sizes = {"rows": rows, "new_tokens": new_tokens}
    found = [
        slots_that_fit(MODELS[model], jnp.dtype("bfloat16"), cache, memory, **sizes)
        for cache in CACHES
    ]
    return [
        {"model": model, "memory": memory, **sizes, "method": name_of(cache), "sequences": count,
         "over_full": count / found[0]}
        for cache, count in zip(CACHES, found, strict=True)
    ]  # fmt: skip


@where_measured
def part(result: dict[str, Any]) -> str:
    """What the result says, for docs/benchmarks.md."""
    lines, slots = [], []
    for row in result["rows"]:
        times = [
            " / ".join(milliseconds(value) for value in row[name].values())
            for name in ("first_token_s", "per_token_s")
        ]
        over = "-" if "over_first" not in row else f"{row['over_first']:.2f}x"
        cells = [f"{row['requests_per_s']:.2f}", f"{row['tokens_per_s']:.0f}", over, *times]
        lines.append([row["method"], str(row["at_once"]), *cells])
        slots.append([
            row["method"], str(row["at_once"]), f"{row['mean_slots_in_use']:.1f}",
            milliseconds(row["largest_gap_s"]), milliseconds(row["decode_chunk_s"]),
            milliseconds(row["host_per_chunk_s"]), f"{row['host_share']:.1%}",
            f"{1e3 / row['requests_per_cpu_s']:.1f} ms",
        ])  # fmt: skip
    counted = [[row["method"], f"{row['sequences']:,}", f"{row['over_full']:.1f}x"]
               for row in result["fit"]]  # fmt: skip
    head = ["cache", "at once", "requests/s", "tokens/s", "over the first", "first token",
            "per token"]  # fmt: skip
    more = ["cache", "at once", "slots in use", "largest gap", "decode chunk", "host per chunk",
            "host's share", "CPU per request"]  # fmt: skip
    first, fit = result["rows"][0], result["fit"][0]
    load = " and ".join(f"{each:.1f}" for each in result["load"])
    return (
        f"`{result['command']}`, {result['device']} ({result['usable_cores']} of "
        f"{result['machine']['cores']} cores of {result['machine']['cpu']}, load of the machine "
        f"{load} in front and behind), jax {result['versions']['jax']}, commit "
        f"{result['commit'][:12]}, {result['date'][:10]}. Model {result['model']}, "
        f"{result['dtype']}, {result['new_tokens']} new tokens, {result['requests']} requests, "
        f"the middle one of {len(first.get('samples', [0]))} runs; 50th / 95th / 99th percentile "
        f"of times:\n\n{table(head, lines)}\n\n{table(more, slots)}\n\n"
        f"Sequences in {fit['memory'] / 2**30:.0f} GiB beside the weights, {fit['model']}, "
        f"{fit['rows']:,} prompt rows and {fit['new_tokens']} new tokens, by count:\n\n"
        f"{table(['cache', 'sequences', 'over full'], counted)}"
    )


SECTION = Part("serving-cpu", part, (RESULTS / "cpu" / "serving.json",))


def main(
    at_once: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests under way; several times.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 48,
    new_tokens: Annotated[int, typer.Option(min=2, max=512, help="Of an answer.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each load.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="float32 by default on a CPU.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="12 requests, once.")] = False,
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Answer requests by the engine, 1, 8 and 16 at once, from full and small caches."""
    check_out(out, force=force)
    with bad_input():
        kind = dtype_of(dtype)
    if quick:
        requests, repeats = 12, 1
    vlm, rows, before = vlcache_jax.load(MODEL, dtype=kind), [], os.getloadavg()[0]
    numbers = [*dict.fromkeys(at_once or AT_ONCE)]
    with counting_bar() as bar:
        task = bar.add_task("measuring", total=len(CACHES))
        for cache in CACHES:
            rows += measured(vlm, cache, numbers, requests, new_tokens, repeats)
            bar.advance(task)
    result = {
        **environment(),
        **device.describe(need_gpu=False),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load": [before, os.getloadavg()[0]],
        "model": MODEL,
        "dtype": kind,
        "requests": requests,
        "new_tokens": new_tokens,
        "rows": rows,
        "fit": fits(),
    }
    finish(result, part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
