"""An evaluation as one HTML file that needs nothing else: no network, no server, no script."""

from pathlib import Path
from typing import TYPE_CHECKING

from vlcache_jax.evaluation.plots import plots
from vlcache_jax.results.numbers import number, share, small, with_interval
from vlcache_jax.results.pages import template

if TYPE_CHECKING:
    from vlcache_jax.evaluation import Evaluation, Setting

COLUMNS = {
    "setting": "A method with its budget, and what else tells it from the others.",
    "bytes kept": "Of the prompt's cache, as a share of the full cache's bytes; the mean over the "
    "requests. Scales of a quantized cache are counted.",
    "same top-1": "At how many of the tokens the setting's likeliest one is the full cache's, with "
    "the 95 % interval of that share.",
    "KL": "How far the setting's probabilities of all tokens are from the full cache's: KL(full || "
    "setting) in nats, the mean over the tokens, with its 95 % interval. 0 is no difference.",
    "KL, 95th percentile": "One token of twenty is further away than this.",
    "same answers": "How many requests the setting would answer with the same tokens, all of them, "
    "if it ran alone.",
    "first difference": "Of the other requests, the token of the answer from which on it differs, "
    "counted from 1; the median over them.",
}
"""Of the table of all settings, and what each of them means."""


def render(evaluation: "Evaluation") -> str:
    """The page."""
    return template(Path(__file__).parent).render(
        evaluation=evaluation,
        plots=plots(evaluation),
        columns=COLUMNS,
        settings=[_row(setting) for setting in evaluation.settings],
    )


def _row(setting: "Setting") -> tuple[str, ...]:
    """A setting's line of the table, of the `COLUMNS`."""
    first = setting.first_difference
    return (
        setting.label,
        share(setting.kept_share),
        with_interval(setting.top1, setting.intervals["top1"], share),
        with_interval(setting.kl, setting.intervals["kl"], small),
        small(setting.kl_p95),
        share(setting.same_answer),
        number(None if first is None else first + 1),
    )
