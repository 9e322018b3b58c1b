"""What the command line shows: answers, comparisons and models as plain values and as tables."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from vlcache_jax.results.answer import Answer, same_tokens
from vlcache_jax.results.numbers import bits, scale_end, share, small, with_interval
from vlcache_jax.results.report import human_bytes

if TYPE_CHECKING:
    from vlcache_jax.evaluation import Evaluation
    from vlcache_jax.results.inspection import Inspection


def answer_facts(answer: Answer) -> dict[str, Any]:
    """An answer as plain values."""
    counts = ("text", "tokens", "finish_reason", "prompt_tokens", "visual_tokens", "context_tokens")
    times = ("compile_s", "prefill_s", "decode_s", "decode_tokens_per_s")
    return {
        **{name: getattr(answer, name) for name in counts},
        "timings": {name: getattr(answer.timings, name) for name in times},
        "kv": dataclasses.asdict(answer.cache),
    }


def comparison(prompt: str, right: str | None, answers: list[Answer]) -> dict[str, Any]:
    """Answers to one prompt as plain values, each compared with the first.

    Args:
        prompt: the prompt.
        right: its right answer, None where it is not known.
        answers: that of the full cache, then the others.
    """
    first = answers[0].tokens
    compared = [
        {
            **answer_facts(answer),
            "agrees": answer.tokens == first,
            "same_tokens": same_tokens(first, answer.tokens),
            "right": answer.is_right(right),
        }
        for answer in answers
    ]
    return {"prompt": prompt, "right_answer": right, "answers": compared}


def answer_rows(facts: dict[str, Any]) -> dict[str, str]:
    """The lines of a table about an answer, given as `answer_facts`."""
    kv, timings, about = facts["kv"], facts["timings"], about_kind(facts)
    speed, budgets = timings["decode_tokens_per_s"], kv["layer_budgets"]
    size = {name: human_bytes(count) for name, count in kv.items() if name.endswith("_bytes")}
    rows = {
        "method": setting(kv),
        "cache": f"{size['kept_bytes']} of {size['full_bytes']} ({kv['kept_share']:.1%})",
    }
    if kv.get("kv_bits") is not None:
        rows["bits per number"] = f"{kv['effective_bits']:.2f}"
        rows["made of"] = (
            f"codes {size['payload_bytes']}, scales {size['scale_bytes']}, "
            f"full width {size['dense_bytes']}"
        )
    return rows | {
        "allocated": f"{size['allocated_bytes']}, and {size['tail_bytes']} for new tokens",
        "kept per layer": f"{min(budgets)} to {max(budgets)} tokens, "
        f"mean {kv['kept_visual']:.1f} {about}, {kv['kept_text']:.1f} text",
        "time to first token": f"{timings['prefill_s']:.3f} s",
        "decode": "-" if speed is None else f"{speed:.1f} tokens/s",
        "compilation, apart": f"{timings['compile_s']:.1f} s",
    }


def setting(facts: dict[str, Any]) -> str:
    """A method as it was asked for: name, budget and what the cache is quantized to."""
    quantizer = facts.get("kv_bits")  # not in files of before there were quantized caches
    words = [facts["method"], f"budget {facts['budget_requested']}", bits(quantizer)]
    return ", ".join(filter(None, words))


def about_kind(facts: dict[str, Any]) -> str:
    """What the tokens are called that the question is about, of an answer as `answer_facts`."""
    return " and ".join([kind for kind, count in _about(facts).items() if count] or ["visual"])


def _about(facts: dict[str, Any]) -> dict[str, int]:
    """Tokens that the question is about; in older files there are no contexts."""
    return {"visual": facts["visual_tokens"], "context": facts.get("context_tokens", 0)}


def prompt_rows(facts: dict[str, Any]) -> dict[str, str]:
    """The lines of a table about an answer's prompt, given as `answer_facts`."""
    total, about = facts["prompt_tokens"], sum(_about(facts).values())
    return {"prompt tokens": f"{total} ({about_kind(facts)} {about}, text {total - about})"}


def agreement(difference: int | None) -> str:
    """Whether an answer is the full cache's, by its first token that is not; None for none."""
    return "yes" if difference is None else f"no, from token {difference + 1} on"


def answer_line(facts: dict[str, Any], reused: int) -> str:
    """What an answer of a conversation took, given as `answer_facts`, on one line.

    Args:
        facts: the answer.
        reused: tokens of its prompt whose keys and values were there before.
    """
    rows = answer_rows(facts)
    said = [
        f"time to first token {rows['time to first token']}",
        f"kept {rows['cache']}, {rows['method']}",
        f"reused {reused} of {facts['prompt_tokens']} prompt tokens",
    ]
    if facts["timings"]["compile_s"]:
        said.append(f"compilation, apart, {rows['compilation, apart']}")
    return "; ".join(said)


def differences(own: Answer, full: Answer, split: Callable[[list[int]], list[str]]) -> Table:
    """An answer above the full cache's, each marked from the first token on that differs.

    The marks are those of a word diff: [-...-] of the one, {+...+} of the other.

    Args:
        own: the answer of a cache.
        full: that of the full cache.
        split: the text of each token of an answer.
    """
    same = same_tokens(full.tokens, own.tokens)
    table = Table(show_header=False)
    for answer, marks, style in ((own, "[--]", "red"), (full, "{++}", "green")):
        pieces = split(answer.tokens)
        text = Text("".join(pieces[:same]))
        if rest := "".join(pieces[same:]):
            text.append(f"{marks[:2]}{rest}{marks[2:]}", style)
        table.add_row(Text(setting(dataclasses.asdict(answer.cache))), text)
    table.add_row("as the full cache", agreement(None if own.tokens == full.tokens else same))
    return table


def comparison_tables(facts: dict[str, Any]) -> Group:
    """What `comparison` gives: the prompt, then a column for each answer."""
    answers = facts["answers"]
    asked = {"question": facts["prompt"], "right answer": facts["right_answer"]}
    columns = []
    for answer in answers:
        difference = None if answer["agrees"] else answer["same_tokens"]
        state = {
            **_verdict(answer["text"], answer["right"]),
            "as the full cache": "" if answer is answers[0] else agreement(difference),
        }
        rows = answer_rows(answer)
        columns.append((rows.pop("method"), state | rows))
    return Group(two_columns(asked | prompt_rows(answers[0])), _side_by_side(columns))


def _verdict(text: str, right: bool | None) -> dict[str, str]:
    """The lines of a table about what was answered."""
    known = {} if right is None else {"right": "yes" if right else "no"}
    return {"answer": text or "(nothing)"} | known


def _side_by_side(columns: list[tuple[str, dict[str, str]]]) -> Table:
    """A table of columns, each with its head and the lines that it has."""
    heads, parts = zip(*columns, strict=True)
    table = Table("", *(Column(Text(head)) for head in heads))
    # The longest column has all lines, in their order: that of a quantized cache, if there is one.
    for name in max(parts, key=len):
        table.add_row(name, *(Text(part.get(name, "")) for part in parts))
    return table


def inspection_table(inspection: "Inspection") -> Table:
    """The answers, and what was kept for them; whether they are right, where that is known."""
    columns = []
    for outcome in (inspection.full, *inspection.outcomes):
        cache = outcome.cache
        rows = {
            **_verdict(outcome.text, outcome.right),
            "as the full cache": agreement(outcome.first_difference),
            "cache": f"{human_bytes(cache.kept_bytes)} ({cache.kept_share:.1%})",
            "CacheHitRate": f"{outcome.trace.hit_rate.mean():.1%}",
        }
        columns.append((outcome.label, rows))
    return _side_by_side(columns)


def evaluation_tables(found: "Evaluation") -> Group:
    """How far each setting is from the full cache, and what can be chosen.

    The rows are in the order of the bytes that are kept, so that their bars are a plot.
    """
    rows = sorted(found.settings, key=lambda setting: setting.kept_share)
    furthest = max((1 - row.top1 for row in rows if row.top1 is not None), default=1)
    length = min(scale_end(1.1 * furthest), 1.0)  # so that the shortest bar is seen
    table = Table()
    table.add_column("setting", overflow="fold")
    for name in ("kept", "same top-1", "KL"):
        table.add_column(name, no_wrap=True)
    table.add_column(f"{100 * (1 - length):.4g} % to 100 %", min_width=12)
    for row in rows:
        height = 0.0 if row.top1 is None else row.top1 - 1 + length
        table.add_row(
            Text(row.label),
            share(row.kept_share),
            with_interval(row.top1, row.intervals["top1"], share),
            small(row.kl),
            Bar(length, 0, height, color="green" if found.holds(row) else "default"),
        )
    said = [*found.conclusions, *filter(None, [found.caution])]
    return Group(table, *map(Text, said))


def calibration_table(facts: dict[str, Any]) -> Table:
    """A calibration, given as plain values: a line for each layer."""
    title = f"attention to text; prompts: {facts['prompts']}, threshold: {facts['threshold']:.0%}"
    table = Table("layer", "text share", "kind", title=title)
    for layer, salience in enumerate(facts["text_shares"]):
        kind = "text-salient (TSA)" if layer in facts["tsa_layers"] else "pivot-salient (PSA)"
        table.add_row(str(layer), f"{salience:.1%}", kind)
    return table


def info_tables(facts: dict[str, Any]) -> Group:
    """What `loading.describe` gives."""
    parts, need = facts["parameters"], facts["memory"]
    name = facts["model"] if facts["revision"] is None else f"{facts['model']}@{facts['revision']}"
    model = {
        "model": f"{name} ({facts['family']}, {facts['dtype']})",
        "parameters": f"{parts['total']:,} "
        f"({', '.join(f'{name} {n:,}' for name, n in parts.items() if name != 'total')})",
        "cache per token": human_bytes(facts["kv_bytes_per_token"]),
        "positions": f"{facts['max_positions']:,}",
        "visual tokens of a tile": f"{facts['tile_tokens']:,}" if facts["tile_tokens"] else None,
    }
    memory = (
        f"\nMemory for {need['context']} prompt tokens (bucket {need['bucket']}), batch "
        f"{need['batch']}, {need['new_tokens']} new tokens, method {setting(need)}:"
    )
    names = ("parameters", "pool", "prefill", "tail", "activations", "total")
    buckets = {
        what: ", ".join(f"{b['size']} ({b['padding']:.0%})" for b in facts["buckets"][name])
        for name, what in (("prompt", "prompt tokens"), ("tiles", "image tiles"))
        if facts["buckets"][name][-1]["size"] > 0
    }
    shown = [
        two_columns(model),
        memory,
        two_columns({name: human_bytes(need[name]) for name in names}),
        "\nBuckets that shapes are padded to, with the mean share of padding of each:",
        two_columns(buckets),
    ]
    if "pictures" in facts:
        table = Table("--image", "question", "right answer")
        for picture in facts["pictures"]:
            table.add_row(*(Text(picture[name]) for name in ("name", "prompt", "answer")))
        shown += ["\nPictures in this package, each with a question of its own:", table]
    return Group(*shown)


def two_columns(rows: Mapping[str, str | None]) -> Table:
    """A table of names and values, without those that are None."""
    table = Table(show_header=False)
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, Text(value))
    return table
