"""How questions are put, in words of several kinds."""

import random

from benchmarks.accuracy.pages.content import Fact

VALUE = (
    "Answer with the value only.",
    "Write just what stands there.",
    "Give the value without any other words.",
)
NAME = ("Answer with the name only.", "Write the name and nothing else.", "Give just the name.")
WHOLE = (
    "Write the whole line as it stands there.",
    "Copy the complete line.",
    "Answer with the full text of the line.",
)
NUMBER = ("Answer with the number only.", "Write just the number.", "Give only the amount.")
YES = ("Answer yes or no.", "Say yes or no.", "Write only yes or no.")
PARAGRAPH = (
    "Write it out word by word.",
    "Copy it completely and change nothing.",
    "Write the whole text from its first word to its last.",
)

CONTEXTS = (
    "You see a photographed page.",
    "This is a scan of a document.",
    "Look at the page.",
    "Here is a page with entries.",
    "",
    "",
)

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "field": (
        (
            'What is written in the field "{name}"{where}?',
            'Which value does the entry "{name}" have{where}?',
            'What stands behind "{name}"{where}?',
        ),
        VALUE,
    ),
    "price": (
        (
            'What does the item "{name}" cost{where}?',
            'What is the price of "{name}"{where}?',
            'How much is charged for "{name}"{where}?',
        ),
        VALUE,
    ),
    "cell": (
        (
            'What is the value of "{head}" for "{name}"{where}?',
            'In the row "{name}", what stands under "{head}"{where}?',
            'Which number does "{name}" have in the column "{head}"{where}?',
        ),
        VALUE,
    ),
    "departure": (
        (
            'When is the departure to "{name}"{where}?',
            'At what time does the train to "{name}" leave{where}?',
        ),
        VALUE,
    ),
    "track": (
        (
            'From which platform does the train to "{name}" leave{where}?',
            'What is the platform of the departure to "{name}"{where}?',
        ),
        NUMBER,
    ),
    "bar": (
        (
            'Which value does the bar "{name}" have{where}?',
            'What number stands at the bar of "{name}"{where}?',
        ),
        NUMBER,
    ),
    "field of": (
        (
            'Which field has the value "{value}"{where}?',
            'What is the name of the entry that says "{value}"{where}?',
        ),
        NAME,
    ),
    "item of": (
        (
            "Which item costs {value}{where}?",
            "What was bought for {value}{where}?",
        ),
        NAME,
    ),
    "row of": (
        (
            'Which row has {value} under "{head}"{where}?',
            'In the column "{head}", which name has the value {value}{where}?',
        ),
        NAME,
    ),
    "train of": (
        (
            "Where does the train at {value} go{where}?",
            "What is the destination of the departure at {value}{where}?",
        ),
        NAME,
    ),
    "bar of": (
        ("Which bar has the value {value}{where}?", "What is the bar with {value} called{where}?"),
        NAME,
    ),
    "line": (
        (
            'Read the line that begins with "{name}"{where}.',
            'What does the line of "{name}" say{where}?',
        ),
        WHOLE,
    ),
    "text line": (
        (
            'Read the line of text that begins with "{start}"{where}.',
            'How does the line go that starts with "{start}"{where}?',
        ),
        WHOLE,
    ),
    "more": (
        (
            'Which costs more, "{one}" or "{other}"{where}?',
            'Of "{one}" and "{other}", which is more expensive{where}?',
        ),
        NAME,
    ),
    "larger": (
        (
            'Which has the larger value of "{head}", "{one}" or "{other}"{where}?',
            'In the column "{head}", is it "{one}" or "{other}" that has more{where}?',
        ),
        NAME,
    ),
    "earlier": (
        (
            'Which train leaves earlier, the one to "{one}" or to "{other}"{where}?',
            'Is the departure to "{one}" or to "{other}" the earlier one{where}?',
        ),
        NAME,
    ),
    "longer": (
        (
            'Which bar is longer, "{one}" or "{other}"{where}?',
            'Of the bars "{one}" and "{other}", which has the larger value{where}?',
        ),
        NAME,
    ),
    "together": (
        (
            'What do "{one}" and "{other}" cost together{where}?',
            'What is the total of "{one}" and "{other}"{where}?',
        ),
        NUMBER,
    ),
    "sum": (
        (
            'What is the sum of "{head}" for "{one}" and "{other}"{where}?',
            'Add the values of "{one}" and "{other}" under "{head}"{where}. What do you get?',
        ),
        NUMBER,
    ),
    "bars": (
        (
            'What is the sum of the bars "{one}" and "{other}"{where}?',
            'What do the values of "{one}" and "{other}" add up to{where}?',
        ),
        NUMBER,
    ),
    "is there": (
        (
            'Is there {what} "{name}"{where}?',
            'Does the page have {what} "{name}"{where}?',
        ),
        YES,
    ),
    "paragraph": (
        (
            'Copy the paragraph that begins with "{start}"{where}.',
            'What does the paragraph say that starts with "{start}"{where}?',
        ),
        PARAGRAPH,
    ),
}
"""By name: the questions, with the fields in braces, and how to answer."""


def put(fact: Fact, rng: random.Random, *, where: str = "", brief: bool = False) -> str:
    """One wording of a question.

    Args:
        fact: what is asked.
        rng: where the choice comes from.
        where: which picture it is about, with a space in front; empty where there is one.
        brief: without the context, as in a conversation of several turns.
    """
    questions, formats = WORDINGS[fact.wording]
    context = "" if brief else rng.choice(CONTEXTS)
    question = rng.choice(questions).format(**fact.fields, where=where)
    return f"{context} {question} {rng.choice(formats)}".strip()
