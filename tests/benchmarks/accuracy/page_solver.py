"""Answers found from the letters of a page and the words of a question alone."""

import re

import numpy as np

from benchmarks.accuracy.pages.drawing import CHARACTERS

Word = tuple[int, int, str]
"""(row, first column, text) of letters that stand next to each other."""


def solve(cells: tuple[np.ndarray, ...], question: str) -> str:
    """The answer to a question about one or two pages."""
    page = cells[int("in the second picture" in question)]
    words = words_of(page)
    question = re.sub(r" in the (first|second) picture", "", question)
    quoted = re.findall(r'"([^"]+)"', question)
    bare = re.sub(r'"[^"]*"', "", question)
    number = next(iter(re.findall(r"\d[\d:.]*\d|\d", bare)), "")
    if re.search(r"yes or no", bare):
        names = {text.rstrip(":") for *_, text in words}
        return "yes" if quoted[0] in names else "no"
    if "paragraph" in bare:
        return " ".join(paragraph(words, quoted[0]))
    if re.search(r"line (that|of|go)|the line", bare):
        start = quoted[0]
        return next(
            line for line in lines_of(words) if re.match(rf"{re.escape(start)}(:| |$)", line)
        )
    if "begins" in question or "starts" in question:
        return next(line for line in lines_of(words) if line.startswith(quoted[0]))
    head = next((q for q in quoted if is_head(words, q)), None)
    names = [q for q in quoted if q != head]
    if re.search(r"sum|total|together|add up|Add", bare):
        values = [hundredths(value_of(words, name, head)) for name in names]
        total = sum(values)
        if "." in value_of(words, names[0], head):
            return f"{total // 100}.{total % 100:02}"
        return str(total // 100)
    if len(names) == 2:
        first, second = (hundredths(value_of(words, name, head)) for name in names)
        if "earlier" in bare:
            first, second = second, first
        return names[0] if first > second else names[1]
    if len(names) == 1 and re.search(r"entry that says|has the value|has the", bare):
        return label_of(words, names[0])
    if number and not names:
        return name_of(words, number, head)
    if "platform" in bare:
        return line_of(words, names[0])[-1]
    if "departure" in bare or "train" in bare:
        return line_of(words, names[0])[0]
    return value_of(words, names[0], head)


def words_of(page: np.ndarray) -> list[Word]:
    """Words from top to bottom, and from left to right."""
    found = []
    for row, line in enumerate(page):
        text = "".join(CHARACTERS[i] if i >= 0 else " " for i in line)
        found += [(row, match.start(), match[0]) for match in re.finditer(r"\S+", text)]
    return found


def lines_of(words: list[Word]) -> list[str]:
    """Every run of words with single spaces."""
    lines, last = [], None
    for row, column, text in words:
        if last is not None and last == (row, column - 1):
            lines[-1] += f" {text}"
        else:
            lines.append(text)
        last = row, column + len(text)
    return lines


def paragraph(words: list[Word], start: str) -> list[str]:
    """The lines of a paragraph: they begin in the same column, one or two rows apart."""
    placed: list[tuple[int, int, str]] = []
    last = None
    for row, column, text in words:
        if last is not None and last == (row, column - 1):
            head = placed[-1]
            placed[-1] = (head[0], head[1], f"{head[2]} {text}")
        else:
            placed.append((row, column, text))
        last = row, column + len(text)
    row, column, text = next(
        line for line in placed if line[2] == start or line[2].startswith(start)
    )
    found = [text]
    below = {(r, c): t for r, c, t in placed}
    step = 1 if (row + 1, column) in below else 2
    while (row + step, column) in below:
        row += step
        found.append(below[row, column])
    return found


def find(words: list[Word], name: str) -> int:
    at = [i for i, (*_, text) in enumerate(words) if text.rstrip(":") == name]
    assert len(at) == 1, (name, at)
    return at[0]


def line_of(words: list[Word], name: str) -> list[str]:
    """Time, place and platform of a departure."""
    at = find(words, name)
    return [words[at - 1][2], name, words[at + 1][2]]


def is_head(words: list[Word], name: str) -> bool:
    """Whether a word is above a column of numbers."""
    if not (name.isalpha() and name[0].isupper() and any(text == name for *_, text in words)):
        return False
    return not is_departure(words, find(words, name))


def is_departure(words: list[Word], at: int) -> bool:
    """Whether a time is in front of a word, as a timetable has it."""
    (row, column, time), place = words[at - 1], words[at]
    follows = (row, column + len(time) + 2) == place[:2]
    return follows and re.fullmatch(r"\d\d:\d\d", time) is not None


def value_of(words: list[Word], name: str, head: str | None = None) -> str:
    """What stands behind a name; in a table, the number that ends where its column's head does."""
    at = find(words, name)
    row, column, text = words[at]
    if text.endswith(":"):  # values of two words have one space between them
        values = [words[at + 1]]
        for other in words[at + 2 :]:
            before = values[-1]
            if (other[0], other[1]) != (before[0], before[1] + len(before[2]) + 1):
                break
            values.append(other)
        return " ".join(value[2] for value in values)
    if is_departure(words, at):
        return words[at - 1][2]
    if head is None:
        return words[at + 1][2]
    _, left, top = words[find(words, head)]
    edge = left + len(top)
    return next(t for r, c, t in words if r == row and c + len(t) == edge and c > column)


def name_of(words: list[Word], value: str, head: str | None) -> str:
    """The name in front of a number or a price, or behind a time; in a table, that of its row."""
    if ":" in value and any(text == value for *_, text in words):
        at = next(i for i, word in enumerate(words) if word[2] == value)
        if words[at - 1][2].endswith(":") and words[at - 1][0] == words[at][0]:
            return words[at - 1][2].rstrip(":")
        return words[at + 1][2]
    places = [i for i, word in enumerate(words) if word[2] == value]
    if head is not None:
        _, left, top = words[find(words, head)]
        places = [i for i in places if words[i][1] + len(value) == left + len(top)]
    else:
        places = [i for i in places if not is_table_cell(words, i)]
    [at] = places
    while words[at][2][0].isdigit():
        at -= 1
    return words[at][2].rstrip(":")


def is_table_cell(words: list[Word], at: int) -> bool:
    """Never asked for without the head of its column."""
    before = words[at - 1][2]
    return not before[0].isalpha() or before.endswith(":") or is_departure(words, at - 1)


def label_of(words: list[Word], value: str) -> str:
    """The field of a form that has a value."""
    for word in words:
        if word[2].endswith(":"):
            label = word[2].rstrip(":")
            if value_of(words, label) == value:
                return label
    raise AssertionError(value)


def hundredths(text: str) -> int:
    if ":" in text:
        return int(text.replace(":", ""))
    return round(100 * float(text))
