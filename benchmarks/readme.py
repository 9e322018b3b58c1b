"""Fill the documents' generated parts from committed files: `python -m benchmarks.readme`.

`--demo` runs the shipped demo anew first. A part stands between two comments that name it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.environment import environment, write_result

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
QUESTION = "What is in the picture?"


def run_demo() -> dict[str, Any]:
    """The shipped model's answer about the shipped picture, with the versions that gave it."""
    import vlcache_jax
    from vlcache_jax.demo import IMAGE

    cache = vlcache_jax.VLCache()  # as `make demo` does: the command line's default, as a stream
    stream = vlcache_jax.load("demo").stream(IMAGE, QUESTION, cache=cache)
    for _ in stream:
        pass
    answer = stream.answer
    return {
        **environment(),
        "question": QUESTION,
        "answer": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "method": answer.cache.method,
        "budget_requested": answer.cache.budget_requested,
        "full_bytes": answer.cache.full_bytes,
        "kept_bytes": answer.cache.kept_bytes,
    }


def demo_part(result: dict[str, Any]) -> str:
    """Question and answer of the shipped demo."""
    shown = json.dumps(result["answer"], ensure_ascii=True)
    return (
        f"Question: *{result['question']}* ({result['prompt_tokens']} prompt tokens, "
        f"{result['visual_tokens']} of them visual; {result['method']} with a budget of "
        f"{result['budget_requested']} keeps {result['kept_bytes']:,} of "
        f"{result['full_bytes']:,} cache bytes)\n\nAnswer:\n\n```\n{shown}\n```"
    )


def conversion_part(result: dict[str, Any]) -> str:
    """Time and memory of converting and loading a checkpoint of the 7B shapes."""
    rows = ["| step | time | peak anonymous memory |", "|---|---|---|"]
    for key, name in (
        ("convert", "convert to Orbax"),
        ("load_safetensors", "load the Hugging Face directory"),
        ("load_converted", "load the converted directory"),
    ):
        step = result[key]
        peak = step["peak_rss_anon_bytes"] / 1e9
        rows.append(f"| {name} | {step['process_s']:.0f} s | {peak:.1f} GB |")
    size = result["parameter_bytes"] / 1e9
    machine = result["machine"]
    return (
        f"{result['model']}, {size:.1f} GB of parameters, on {machine['cores']} cores "
        f"({machine['cpu']}):\n\n" + "\n".join(rows)
    )


def programs_part(result: dict[str, Any]) -> str:
    """Whole programs compiled for a GPU that is not there."""
    rows = [
        "| model | program | prompt x batch | cache, of full | temporaries "
        "| cache copies in the loop | launches per layer | one command buffer | compile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        share = row["cache_bytes"] / row["full_cache_bytes"]
        rows.append(
            f"| {row['model']} | {row['stage']} | {row['context']} x {row['batch']} "
            f"| {row['cache_bytes'] / 2**20:,.0f} MiB, {share:.1%} "
            f"| {row['temp_bytes'] / 2**20:,.1f} MiB | {row['cache_copies_in_loop']} "
            f"| {row['launches_per_layer']:g} | {'yes' if row['one_command_buffer'] else 'no'} "
            f"| {row['compile_s']:.0f} s |"
        )
    return f"VL-Cache at 10 %, bfloat16, jax {result['versions']['jax']}:\n\n" + "\n".join(rows)


Part = tuple[str, Path, Callable[[dict[str, Any]], str]]

DOCUMENTS: dict[Path, tuple[Part, ...]] = {
    ROOT / "README.md": (
        ("demo", RESULTS / "cpu" / "demo.json", demo_part),
        ("conversion", RESULTS / "cpu" / "conversion.json", conversion_part),
    ),
    ROOT / "docs" / "kernels.md": (
        ("programs", RESULTS / "offline" / "programs-h200.json", programs_part),
    ),
}
"""The generated parts of each document: name, result file, what makes the text of it."""


def fill(document: Path) -> str:
    """A document with every part generated anew from its result file.

    Raises:
        ValueError: a part's comments are missing.
    """
    text = document.read_text(encoding="utf-8")
    for name, file, make in DOCUMENTS[document]:
        result = json.loads(file.read_text(encoding="utf-8"))
        pattern = rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)"
        text, count = re.subn(
            pattern, lambda m, r=result, f=make: f"{m[1]}{f(r)}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"{document.name} must have one part {name!r} between its comments")
    return text


def main(
    demo: Annotated[bool, typer.Option("--demo", help="Run the shipped demo anew first.")] = False,
) -> None:
    """Write the generated parts of the README and the docs."""
    if demo:
        write_result(RESULTS / "cpu" / "demo.json", run_demo())
    for document in DOCUMENTS:
        document.write_text(fill(document), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
