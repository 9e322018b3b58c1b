"""What docs/accuracy.md says of the real decoder: every number comes from a result file."""

from typing import Any

from benchmarks import documents
from benchmarks.accuracy.report import BUDGETS, FULL, SHOWN, budget_of, draw_band, per_cent
from benchmarks.documents import DOCS, Part, Plot, Result, measured, panels, table
from vlcache_jax.cache.methods import DEFAULT_METHOD
from vlcache_jax.cache.methods import METHODS as METHOD_NAMES

RESULTS = documents.RESULTS / "fidelity"
METHODS = RESULTS / "methods-2000.json"
"""Of `python -m benchmarks.fidelity`; the others of its other parts and lengths."""

LENGTHS = tuple(RESULTS / f"methods-{tokens}.json" for tokens in (512, 2000, 6000))
ABLATION = RESULTS / "ablation.json"
LAYERS = RESULTS / "layers.json"
CANDIDATES = RESULTS / "candidates.json"

DECIDING = ("0.05", "0.1", "0.2")
"""Budgets at which the default method has to be as good as every published one."""

Facts = dict[str, Any]


def cell(facts: Facts | None) -> str:
    """KL and the share of the same top-1; a dash where there is none."""
    return "-" if facts is None else f"{facts['kl']:.3f} / {facts['top1']:.2f}"


def tables(result: Result) -> str:
    """KL and the share of the same top-1 by setting and budget."""
    rows = [
        [f"`{name}`", *(cell(of.get(budget)) for budget in result["budgets"])]
        for name, of in result["details"].items()
    ]
    return table(["setting", *map(budget_of, result["budgets"])], rows)


def about(result: Result) -> str:
    """What was run."""
    return (
        f"`{result['command']}`: {result['n']} prompts of the split `{result['split']}` from "
        f"{result['documents']} documents, {result['tokens']:,} tokens of text in each, answers of "
        f"at most {result['max_new_tokens']} tokens."
    )


def run_part(result: Result) -> str:
    """The model and the machine."""
    shape, machine = result["architecture"], result["machine"]
    return (
        f"{result['model']}: {shape['parameters'] / 1e6:.0f} million parameters, {shape['layers']} "
        f"layers, {shape['query_heads']} query and {shape['kv_heads']} kv heads of "
        f"{shape['head_dim']}, run in {shape['dtype']} (SHA-256 of the weights "
        f"{shape['sha256'][:16]}), on {machine['cores']} cores of {machine['cpu']} with jax "
        f"{result['versions']['jax']}."
    )


def methods_part(result: Result) -> str:
    """KL and top-1 of every method by budget, and what is sure of it at a tenth."""
    rows = [
        [f"`{name}`", spread(facts, "kl", 3), spread(facts, "top1", 2), f"{facts['kl_p95']:.2f}",
         per_cent(facts["same_answer"]), per_cent(facts["kept_share"]), behind(facts)]
        for name, of in result["details"].items()
        if (facts := of.get(SHOWN))
    ]  # fmt: skip
    head = ["setting", "KL", "same top-1", "KL, 95th percentile", "same answers, %", "kept, %",
            f"KL above {DEFAULT_METHOD}'s"]  # fmt: skip
    return "\n\n".join(
        [
            f"![KL and same top-1 by budget]({PLOTS[0].path.name})",
            f"{about(result)} KL in nats per token / share of tokens whose likeliest is the same:",
            tables(result),
            f"At {budget_of(SHOWN)}, with 95 % intervals over documents:",
            table(head, rows),
        ]
    )


def spread(facts: Facts, name: str, digits: int) -> str:
    """A figure and its interval."""
    low, high = facts["intervals"][name]
    return f"{facts[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def behind(facts: Facts) -> str:
    """By how much the KL is above the default method's, prompt by prompt, and its interval."""
    if "behind" not in facts:
        return "-"
    low, high = facts["behind"]["interval"]
    return f"{facts['behind']['kl']:+.3f} ({low:+.3f} to {high:+.3f})"


def default_part(result: Result) -> str:
    """How the default method stands to the published ones: what it was made the default for."""
    shown = [budget for budget in DECIDING if budget in result["budgets"]]
    rows = []
    for name, of in result["details"].items():
        if name in METHOD_NAMES and name not in (DEFAULT_METHOD, FULL):
            rows.append([f"`{name}`", *(behind(of[budget]) for budget in shown)])
    of = result["details"]
    ours, paper, best = (of[name][SHOWN]["kl"] for name in (DEFAULT_METHOD, "vl-cache", "oracle"))
    return "\n\n".join(
        [
            f"By how much the KL is above that of `{DEFAULT_METHOD}`, prompt by prompt, with 95 % "
            "intervals over documents:",
            table(["method", *map(budget_of, shown)], rows),
            f"At {budget_of(SHOWN)} its KL is {ours / paper:.2f} of VL-Cache's, and "
            f"{(paper - ours) / (paper - best):.0%} of the distance from VL-Cache to the oracle "
            "are closed.",
        ]
    )


def candidates_part(result: Result) -> str:
    """What the default method was chosen among."""
    of = result["details"]
    order = sorted(of, key=lambda name: of[name][SHOWN]["kl"])
    rows = [[name, *(cell(of[name].get(budget)) for budget in result["budgets"])] for name in order]
    return f"{about(result)}\n\n" + table(["setting", *map(budget_of, result["budgets"])], rows)


def lengths_part(*results: Result | None) -> str:
    """KL and top-1 at a tenth by the length of the text."""
    there = [result for result in results if result]
    names = dict.fromkeys(name for result in there for name in result["details"])
    rows = [
        [f"`{name}`", *(cell(result["details"].get(name, {}).get(SHOWN)) for result in there)]
        for name in names
    ]
    head = ["setting", *(f"{result['tokens']:,} tokens (n = {result['n']})" for result in there)]
    missing = [] if len(there) == len(results) else ["Other lengths: not measured yet."]
    return "\n\n".join([f"At {budget_of(SHOWN)}:", table(head, rows), *missing])


def ablation_part(result: Result) -> str:
    """Scores by divisions over the layers."""
    pairs = [name.rsplit(", ", 1) for name in result["details"]]
    scores, rules = (dict.fromkeys(part) for part in zip(*pairs, strict=True))
    rows = [
        [score, *(cell(result["details"][f"{score}, {rule}"].get(SHOWN)) for rule in rules)]
        for score in scores
    ]
    return f"{about(result)}\n\n{table(['score', *rules], rows)}"


def layers_part(result: Result) -> str:
    """What is lost when one layer alone is compressed."""
    of = {name: facts[SHOWN] for name, facts in result["details"].items()}
    worst = sorted(of, key=lambda name: -of[name]["kl"])
    total = sum(facts["kl"] for facts in of.values())
    least = worst[-1].removeprefix("layer ")
    named = ", ".join(f"{name.removeprefix('layer ')} ({of[name]['kl']:.4f})" for name in worst[:5])
    return "\n\n".join(
        [
            f"![KL of each layer alone]({PLOTS[1].path.name})",
            f"{about(result)} One layer keeps {budget_of(SHOWN)} by VL-Cache's score, all others "
            f"everything. The KL of all layers adds up to {total:.3f}; most of it is of layers "
            f"{named}, least of layer {least} ({of[worst[-1]]['kl']:.4f}).",
        ]
    )


def both_part(small: Result | None, real: Result | None) -> str:
    """The small model's scores beside the real decoder's fidelity."""
    if not small or not real:
        return documents.NOT_MEASURED
    scores, found = small["details"], real["details"]
    names = [name for name in next(iter(scores.values())) if name != FULL and name in found]
    rows = [
        [f"`{name}`", *(per_cent(of_task[name][SHOWN]["score"]) for of_task in scores.values()),
         f"{found[name][SHOWN]['kl']:.3f}", per_cent(found[name][SHOWN]["top1"])]
        for name in names
    ]  # fmt: skip
    full = [per_cent(of_task[FULL]["1.0"]["score"]) for of_task in scores.values()]
    head = ["method", *(f"small model, {task}" for task in scores), "real decoder, KL",
            "real decoder, same top-1"]  # fmt: skip
    return f"At {budget_of(SHOWN)}, scores and shares in %:\n\n" + table(
        head, [["full cache", *full, "0", "100.0"], *rows]
    )


SECTIONS = (
    Part("fidelity-both", both_part, (BUDGETS, METHODS)),
    Part("fidelity-run", measured(run_part), (METHODS,)),
    Part("fidelity-methods", measured(methods_part), (METHODS,)),
    Part("fidelity-lengths", measured(lengths_part), LENGTHS),
    Part("fidelity-default", measured(default_part), (METHODS,)),
    Part("fidelity-candidates", measured(candidates_part), (CANDIDATES,)),
    Part("fidelity-ablation", measured(ablation_part), (ABLATION,)),
    Part("fidelity-layers", measured(layers_part), (LAYERS,)),
)
"""Generated parts of docs/accuracy.md."""


def draw_methods(result: Result) -> Any:
    """KL and the share of the same top-1 by budget."""
    figure, [[left, right]] = panels(8.4, 4, 1, 2, sharex=True)
    for name, of in result["details"].items():
        budgets = sorted(of, key=float)
        x = [float(budget) for budget in budgets]
        style = {"label": name, "marker": ".", "linestyle": "--" if "oracle" in name else "-"}
        for axes, what in ((left, "kl"), (right, "top1")):
            values = ([of[b][what], *of[b]["intervals"][what]] for b in budgets)
            draw_band(axes, x, *zip(*values, strict=True), alpha=0.08, **style)
    left.set(xscale="log", yscale="log", xlabel="budget", ylabel="KL, nats per token")
    right.set(xlabel="budget", ylabel="same top-1", ylim=(None, 1.01))
    ticks = [float(budget) for budget in result["budgets"]]
    right.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    right.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize="small")  # fmt: skip
    return figure


def draw_layers(result: Result) -> Any:
    """KL of each layer compressed alone."""
    figure, [[axes]] = panels(7, 2.6)
    facts = [of[SHOWN] for of in result["details"].values()]
    low, high = zip(*(each["intervals"]["kl"] for each in facts), strict=True)
    kl = [each["kl"] for each in facts]
    draw_band(axes, range(len(kl)), kl, low, high, marker=".")
    axes.set(xlabel="layer", ylabel="KL, nats per token", ylim=(0, None))
    return figure


PLOTS = (
    Plot(DOCS / "fidelity-methods.svg", (METHODS,), draw_methods, "fidelity-methods"),
    Plot(DOCS / "fidelity-layers.svg", (LAYERS,), draw_layers, "fidelity-layers"),
)
