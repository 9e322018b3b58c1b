"""What the command line shows: answers, comparisons and models as plain values and as tables."""

import dataclasses
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlcache_jax.answer import Answer
from vlcache_jax.report import human_bytes

if TYPE_CHECKING:
    from vlcache_jax.calibration import Calibration


def answer_facts(answer: Answer) -> dict[str, Any]:
    """An answer as plain values."""
    timings = answer.timings
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "timings": {
            "compile_s": timings.compile_s,
            "prefill_s": timings.prefill_s,
            "decode_s": timings.decode_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
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
    compared = []
    for answer in answers:
        compared.append(
            {
                **answer_facts(answer),
                "agrees": answer.tokens == first,
                "same_tokens": same_tokens(first, answer.tokens),
                "right": None if right is None else answer.text.strip() == right,
            }
        )
    return {"prompt": prompt, "right_answer": right, "answers": compared}


def same_tokens(first: list[int], second: list[int]) -> int:
    """How many tokens two answers have in common before they differ, or one of them ends."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def versions() -> dict[str, str]:
    """Of Python and the packages that an answer depends on."""
    packages = ("vlcache-jax", "jax", "jaxlib", "flax", "transformers")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def answer_rows(facts: dict[str, Any]) -> dict[str, str]:
    """The lines of a table about an answer, given as `answer_facts`."""
    kv, timings = facts["kv"], facts["timings"]
    speed, budgets = timings["decode_tokens_per_s"], kv["layer_budgets"]
    return {
        "method": setting(kv),
        "cache": f"{human_bytes(kv['kept_bytes'])} of {human_bytes(kv['full_bytes'])} "
        f"({kv['kept_share']:.1%})",
        **_quantized_rows(kv),
        "allocated": f"{human_bytes(kv['allocated_bytes'])}, and "
        f"{human_bytes(kv['tail_bytes'])} for new tokens",
        "kept per layer": f"{min(budgets)} to {max(budgets)} tokens, "
        f"mean {kv['kept_visual']:.1f} visual, {kv['kept_text']:.1f} text",
        "time to first token": f"{timings['prefill_s']:.3f} s",
        "decode": "-" if speed is None else f"{speed:.1f} tokens/s",
        "compilation, apart": f"{timings['compile_s']:.1f} s",
    }


def setting(facts: dict[str, Any]) -> str:
    """A method as it was asked for: name, budget and what the cache is quantized to."""
    bits = facts.get("kv_bits")  # not in files of before there were quantized caches
    words = f"{facts['method']}, budget {facts['budget_requested']}"
    if bits is None:
        return words
    return f"{words}, {bits} bits" if bits.isdecimal() else f"{words}, {bits}"


def _quantized_rows(kv: dict[str, Any]) -> dict[str, str]:
    """The lines of a table about a quantized cache; none where it is not."""
    if kv.get("kv_bits") is None:
        return {}
    parts = {"codes": "payload_bytes", "scales": "scale_bytes", "full width": "dense_bytes"}
    return {
        "bits per number": f"{kv['effective_bits']:.2f}",
        "made of": ", ".join(f"{name} {human_bytes(kv[part])}" for name, part in parts.items()),
    }


def prompt_rows(facts: dict[str, Any]) -> dict[str, str]:
    """The lines of a table about an answer's prompt, given as `answer_facts`."""
    total, visual = facts["prompt_tokens"], facts["visual_tokens"]
    return {"prompt tokens": f"{total} (visual {visual}, text {total - visual})"}


def question_rows(prompt: str, right: str | None) -> dict[str, str]:
    """The lines of a table about a question that was not typed; none where it was."""
    return {} if right is None else {"question": prompt, "right answer": right}


def comparison_tables(facts: dict[str, Any]) -> Group:
    """What `comparison` gives: the prompt, then a column for each answer."""
    answers = facts["answers"]
    above = {
        "question": facts["prompt"],
        **({} if facts["right_answer"] is None else {"right answer": facts["right_answer"]}),
        **prompt_rows(answers[0]),
    }
    columns = []
    for number, answer in enumerate(answers):
        state = {"answer": answer["text"] or "(nothing)"}
        if answer["right"] is not None:
            state["right"] = "yes" if answer["right"] else "no"
        if number == 0:
            state["as the full cache"] = ""
        elif answer["agrees"]:
            state["as the full cache"] = "yes"
        else:
            state["as the full cache"] = f"no, from token {answer['same_tokens'] + 1} on"
        columns.append(state | answer_rows(answer))
    table = Table("")
    for column in columns:
        table.add_column(Text(column.pop("method")))
    # The longest column has all lines, in their order: that of a quantized cache, if there is one.
    for name in max(columns, key=len):
        table.add_row(name, *(Text(column.get(name, "")) for column in columns))
    return Group(two_columns(above), table)


def calibration_facts(found: "Calibration") -> dict[str, Any]:
    """A calibration as plain values."""
    return dataclasses.asdict(found) | {"tsa_layers": list(found.tsa_layers)}


def calibration_table(facts: dict[str, Any]) -> Table:
    """What `calibration_facts` gives: a line for each layer."""
    title = f"attention to text; prompts: {facts['prompts']}, threshold: {facts['threshold']:.0%}"
    table = Table("layer", "text share", "kind", title=title)
    for layer, share in enumerate(facts["text_shares"]):
        salient = layer in facts["tsa_layers"]
        kind = "text-salient (TSA)" if salient else "pivot-salient (PSA)"
        table.add_row(str(layer), f"{share:.1%}", kind)
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
        "visual tokens of a tile": f"{facts['tile_tokens']:,}",
    }
    memory = (
        f"\nMemory for {need['context']} prompt tokens (bucket {need['bucket']}), batch "
        f"{need['batch']}, {need['new_tokens']} new tokens, method {setting(need)}:"
    )
    names = ("parameters", "pool", "prefill", "tail", "activations", "total")
    notes = {"prompt": "prompt tokens", "tiles": "image tiles"}
    sizes = {
        note: ", ".join(f"{b['size']} ({b['padding']:.0%})" for b in facts["buckets"][name])
        for name, note in notes.items()
    }
    shown = [
        two_columns(model),
        memory,
        two_columns({name: human_bytes(need[name]) for name in names}),
        "\nBuckets that shapes are padded to, with the mean share of padding of each:",
        two_columns(sizes),
    ]
    if "pictures" in facts:
        table = Table("--image", "question", "right answer")
        for picture in facts["pictures"]:
            table.add_row(*(Text(picture[name]) for name in ("name", "prompt", "answer")))
        shown += ["\nPictures in this package, each with a question of its own:", table]
    return Group(*shown)


def two_columns(rows: dict[str, str]) -> Table:
    """A table of names and values."""
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table
