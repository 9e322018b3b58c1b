"""Quantized caches: the full one in few bits, and what a method keeps in few bits."""

from benchmarks.accuracy.evaluate import FULL
from benchmarks.accuracy.experiments.common import Bench, Cell, compare, differences
from benchmarks.accuracy.experiments.text import both, budget_of, change, full_cache, made_by
from benchmarks.accuracy.report import Result, per_cent
from benchmarks.documents import table
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import as_method, make_method
from vlcache_jax.cache.quantizers import make_quantizer

WHOLE_BITS = ("8", "4", "2", "kivi", "akvq")
"""What the full cache is quantized by, as `--kv-bits` calls it."""

EVICTING = ("vl-cache", "snapkv")
"""Methods whose kept tokens are quantized, by `BITS`."""

BITS = "akvq"


def run(bench: Bench) -> Result:
    """Scores of each cache, and what quantizing changes in a method's."""
    cells: dict[Cell, CacheMethod] = {
        (f"{FULL} + {bits}", "1.0"): as_method(make_quantizer(bits)) for bits in WHOLE_BITS
    }
    for text, budget in bench.budgets:
        for name in EVICTING:
            cells[name, text] = make_method(name, budget)
            cells[f"{name} + {BITS}", text] = make_method(name, budget, make_quantizer(BITS))
    items = bench.items()
    outcomes = bench.run(items, cells, "caches")
    details = compare(items, outcomes)
    for text, _ in bench.budgets:
        for name in EVICTING:
            label = f"{name} + {BITS}"
            changed = differences(items, outcomes[label, text], outcomes[name, text])
            for task, of_task in details.items():
                of_task[label][text]["to_method"] = changed[task]
    return {"details": details}


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    details, rows = result["details"], []
    tasks = list(details)
    for label, of in details[tasks[0]].items():
        for budget, facts in of.items():
            own = [details[task][label][budget] for task in tasks]
            share = sum(each["kept_bytes"] for each in own) / len(own)
            bits = 16 * share * len(own) / sum(each["kept"] for each in own)
            agree = " / ".join(per_cent(each["agreement"]["answers"]) for each in own)
            versus = [change(each["to_method"]) if "to_method" in facts else "-" for each in own]
            rows.append(
                [label, budget_of(budget), f"{bits:.2f}", f"{share:.1%}", *map(both, own), agree,
                 *versus]
            )  # fmt: skip
    head = [
        "cache", "tokens", "bits of a value", "bytes", *tasks, f"same answers, {' / '.join(tasks)}",
        *(f"{task}, to the method as it is" for task in tasks),
    ]  # fmt: skip
    size, group = result["architecture"]["head_dim"], min(128, result["architecture"]["head_dim"])
    return "\n\n".join(
        [
            made_by(result),
            f"The full cache, and what methods keep of it, quantized: by plain rounding behind the "
            f"Walsh-Hadamard transform (`8`, `4`, `2`), by KIVI, by AKVQ. Bytes are those of the "
            f"full cache, with scales, shifts and rows of 16 bit. A head of this model has {size} "
            f"values, so a scale and a shift stand for {group}, which is {32 / group:g} bit of "
            f"each value (of a head of 128, 0.25), and a prompt is short: AKVQ's 128 recent "
            f"tokens and 15 pivots of 16 bit are a larger part of it than of a long one. Each cell "
            f"has the score, and the difference to the full cache. {full_cache(details)}",
            table(head, rows),
        ]
    )
