"""Fill the README's generated parts from committed files: `python -m benchmarks.readme`.

`--demo` runs the shipped demo anew first. A part stands between two comments that name it.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.environment import environment, write_result

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results" / "cpu"
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


PARTS = {"demo": demo_part, "conversion": conversion_part}
"""The generated parts: each from the result file of its name."""


def fill(text: str) -> str:
    """The README with every part generated anew from its result file.

    Raises:
        ValueError: a part's comments are missing.
    """
    for name, make in PARTS.items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        pattern = rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)"
        text, count = re.subn(
            pattern, lambda m, r=result, f=make: f"{m[1]}{f(r)}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md must have one part {name!r} between its comments")
    return text


def main(
    demo: Annotated[bool, typer.Option("--demo", help="Run the shipped demo anew first.")] = False,
) -> None:
    """Write the README's generated parts."""
    if demo:
        write_result(RESULTS / "demo.json", run_demo())
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
