"""What the terminal shows of an evaluation."""

import io

import pytest
from rich.console import Console

from tests.evaluations import made_up_evaluation, made_up_setting, several_methods
from vlcache_jax.results.display import evaluation_tables


def shown(evaluation, width=80):
    """Its lines; the cells of the table's rows."""
    file = io.StringIO()
    Console(file=file, width=width).print(evaluation_tables(evaluation))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines, [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line
    ]


def length(bar):
    """Of a bar, in eighths of a cell."""
    return sum(8 if block == "█" else 8 - "▉▊▋▌▍▎▏".index(block) - 1 for block in bar)


@pytest.mark.parametrize("width", [80, 140])
def test_rows_are_in_the_order_of_the_bytes_and_bars_of_their_shares(width):
    evaluation = several_methods()
    lines, rows = shown(evaluation, width)
    assert len(rows) == len(evaluation.settings)  # a line for each
    kept = [float(row[1].removesuffix(" %")) for row in rows]
    assert kept == sorted(kept)
    assert ["vl-cache 0.1", "10.0 %", "94.0 % (92.0 to 96.0)", "0.03"] in [row[:4] for row in rows]
    bars = {float(row[2].split(" ")[0]): length(row[4]) for row in rows}
    shares = sorted(bars)
    assert [bars[share] for share in shares] == sorted(bars.values())
    assert "70 % to 100 %" in lines[1]
    for share in shares:
        assert bars[share] == pytest.approx(bars[100.0] * (share - 70) / 30, abs=1)


def test_choices_and_the_note_follow_the_table():
    lines, _ = shown(several_methods())
    assert lines[-2:] == [
        "vl-cache: 0.2 is the smallest budget whose interval lies at 95 % or above",
        "h2o: no budget that was tried has its interval at 95 % or above",
    ]
    lines, _ = shown(made_up_evaluation([made_up_setting(top1=1.0)], requests=3), 140)
    assert lines[-1].startswith("These numbers are of 3 requests")


def test_what_holds_is_green():
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard")
    console.print(evaluation_tables(several_methods()))
    green = [line for line in file.getvalue().splitlines() if "\x1b[32" in line]
    assert ["vl-cache 0.2" in green[0], "vl-cache 0.4" in green[1], len(green)] == [True, True, 2]


def test_answers_without_tokens_have_no_numbers():
    _, rows = shown(made_up_evaluation([made_up_setting(top1=None)], tokens=0))
    assert rows == [["vl-cache 0.1", "10.0 %", "-", "-", ""]]


def test_long_names_with_brackets_are_wrapped_and_shown_as_they_are():
    name = "[red]" + "pyramidkv" * 4
    setting = made_up_setting(name, 0.05, "akvq", top1=0.9)
    lines, rows = shown(made_up_evaluation([setting]))
    assert "".join(row[0] for row in rows).replace(" ", "") == setting.label.replace(" ", "")
    assert "".join(lines).count("90.0 % (88.0 to 92.0)") == 1
    assert name in "".join(lines[-2:])
