"""Prompts as conversations: where pictures and videos go, what a chat template makes of them.

"<image>What?" ─conversation─► [{"role": "user", "content": [image, "What?"]}] ─ChatTemplate─► text

A context, the document that a question is about, stands in front of the question as pictures do.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, combinations
from typing import Any, TypeAlias

from vlcache_jax.errors import reason, short
from vlcache_jax.requests.packing import NO_VIDEOS, Packing, Rendered

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: `{"role": "user", "content": "..."}` for each message, in their order.

The role is "system", "user" or "assistant". The content is a string, or a list of
`{"type": "text", "text": "..."}`, `{"type": "image"}` and `{"type": "video"}`.
"""

Text: TypeAlias = str | Messages
"""One prompt: what the user says, or a conversation."""

ROLES = "system", "user", "assistant"

MARKS = {"image": "<image>", "video": "<video>"}
"""What stands for a picture or a video in any family's prompts, beside the family's own mark."""

EDGES = "\ufdd0", "\ufdd1"
"""Around a context until a prompt is rendered: two of Unicode's codes that are no characters."""


def is_one(text: Any) -> bool:
    """Whether this is one prompt, a string or a conversation, and not a list of several."""
    is_list = isinstance(text, list | tuple) and len(text) > 0
    return isinstance(text, str) or (is_list and all(isinstance(part, Mapping) for part in text))


def conversation(
    text: Text,
    counts: Mapping[str, int],
    marks: Mapping[str, str],
    raw: bool,
    *,
    breaks: bool = True,
    context: str | None = None,
) -> list[dict[str, Any]]:
    """A prompt as messages whose contents are lists of parts, with a part for each picture.

    Pictures stand where parts or marks are; without either in front of the first user message. So
    do videos, behind pictures. A context comes behind these, a blank line behind it.

    Args:
        text: the prompt.
        counts: how many pictures and videos it has, as "image" and "video".
        marks: what stands for each kind in a string; of the kinds that there can be.
        raw: the pictures have to be marked.
        breaks: keep the line break between a mark and the text beside it, which LLaVA's own data
            have and most templates write themselves.
        context: what the first user message is about; it is put between `EDGES`.

    Raises:
        ValueError: a message is not of the form that `Messages` describes, the conversation is
            empty, or it has another number of places for pictures than there are pictures, or any
            where there can be none.
    """
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    made = [
        _message(message, f"messages[{i}]", marks, breaks) for i, message in enumerate(messages)
    ]
    parts = [part for message in made for part in message["content"]]
    if context is not None:
        words = readable(context).strip()
        if not words:
            raise ValueError("the context is empty: give a text, or leave it out")
        first = _of_user(made, "the context")
        question = first.pop(0)["text"] if first and first[0]["type"] == "text" else ""
        words = f"{EDGES[0]}{words}{EDGES[1]}\n\n{question}"
        first.insert(0, {"type": "text", "text": words})
    if not parts and not any(counts.values()):
        raise ValueError("the prompt is empty: give a text, an image or both")
    places = {kind: sum(part["type"] == kind for part in parts) for kind in MARKS}
    refuse_others({kind: max(counts[kind], places[kind]) for kind in MARKS}, marks)
    for kind, count in places.items():
        if count != counts[kind] and (raw or count):
            hint = "" if raw else f", or leave the marks out and the {kind}s come first"
            where = "text" if isinstance(text, str) else "messages"
            raise ValueError(
                f"{count} {marks[kind]} marks in the {where} but {counts[kind]} {kind}s: "
                f"give one mark for each {kind}{hint}"
            )
    loose = [kind for kind in MARKS if not places[kind] for _ in range(counts[kind])]
    if loose:
        _of_user(made, f"the {loose[0]}s")[:0] = [{"type": kind} for kind in loose]
    return made


def refuse_others(counts: Mapping[str, int], marks: Mapping[str, str]) -> None:
    """Refuse what the model does not take: of each kind so many, beside the kinds of its marks."""
    given = {kind: count for kind, count in counts.items() if kind not in marks}
    if count := given.get("image", 0):
        raise ValueError(
            f"the model reads text alone and was given {count} picture{'s' * (count > 1)}: leave "
            "them out, or take a model with a vision tower"
        )
    if given.get("video"):
        raise ValueError(NO_VIDEOS)


def _of_user(messages: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The parts of the first message of the user."""
    first = next((m["content"] for m in messages if m["role"] == "user"), None)
    if first is None:
        raise ValueError(f"no message is the user's, where {what} could go: add one")
    return first


def _message(
    message: Mapping[str, Any], name: str, marks: Mapping[str, str], breaks: bool
) -> dict[str, Any]:
    """A message with a list of parts as its content; errors call it `name`."""
    if set(message) != {"role", "content"}:
        raise ValueError(
            f"{name} has the keys {short(list(message))}: give it a role and a content alone"
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(
            f"{name} has the role {short(repr(role))}: choose one of {', '.join(ROLES)}"
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name} has the content {short(repr(content))}: give a string or a list")
    parts = []
    for part in content:
        match part:
            case {"type": "image" | "video" as kind, **rest} if not rest:
                parts.append({"type": kind})
            case {"type": "text", "text": str(words), **rest} if not rest:
                parts += _parts(marked(readable(words), marks), marks, breaks)
            case _:
                raise ValueError(
                    f"{name} has the part {short(repr(part))}: give "
                    '{"type": "text", "text": "..."}, {"type": "image"} or {"type": "video"}, and '
                    "the pictures themselves as images, the videos as videos"
                )
    return {"role": role, "content": parts}


def _parts(words: str, marks: Mapping[str, str], breaks: bool) -> Iterator[dict[str, str]]:
    """A text with marks as parts."""
    kinds = {mark: kind for kind, mark in marks.items()}
    # Marks have the odd places.
    pieces = re.split(f"({'|'.join(map(re.escape, kinds))})", words) if kinds else [words]
    for number, piece in enumerate(pieces):
        if number % 2:
            yield {"type": kinds[piece]}
            continue
        if not breaks and number > 0:
            piece = piece.removeprefix("\n")
        if not breaks and number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            yield {"type": "text", "text": piece}


def marked(text: str, marks: Mapping[str, str]) -> str:
    """The text with the family's own mark for every picture and video."""
    for kind, mark in marks.items():
        text = text.replace(MARKS[kind], mark)
    return text


def readable(text: str) -> str:
    """The text with U+FFFD for what is no character: a shell's bytes, half of a surrogate pair."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.translate(dict.fromkeys(map(ord, EDGES), "\ufffd"))


class ChatTemplate:
    """A checkpoint's chat template: one text of a conversation, with the beginning of the answer.

    Templates that take contents as lists of parts and those that take them as strings both work,
    for each role by itself; where a string is taken, a picture is its mark and a line break.

    Args:
        packing: the family's, with the checkpoint's processor and tokenizer.
    """

    def __init__(self, packing: Packing):
        template = packing.processor.chat_template or packing.tokenizer.chat_template
        self._template = template.get("default") if isinstance(template, dict) else template
        self._packing, self._marks = packing, packing.marks
        self._remedy = "write the whole prompt yourself and pass raw_prompt=True (--raw-prompt)"

    def render(self, text: Text, counts: Mapping[str, int], context: str | None = None) -> Rendered:
        """The whole prompt, with a mark for each picture and video.

        Args:
            text: the prompt.
            counts: how many pictures and videos it has, as "image" and "video".
            context: what it is about, if it is about a text.

        Raises:
            ValueError: the prompt is malformed, there is no template, or it refuses the messages or
                writes another number of marks.
        """
        asked = partial(conversation, text, counts, self._marks, False, context=context)
        messages = asked(breaks=False)
        if not isinstance(self._template, str):
            marks = " and ".join(self._marks.values())
            remedy = self._remedy + (f", with {marks} marks" if marks else "")
            raise ValueError(f"this checkpoint has no chat template: {remedy}")
        rendered = self._apply(messages)
        ended = sum(rendered.count(f"{mark}\n") for mark in self._marks.values())
        if ended < sum(counts.values()):  # it writes no line breaks itself
            rendered = self._apply(asked())
        for kind, count in self._counts(rendered).items():
            if count != counts[kind]:
                raise ValueError(
                    f"the chat template wrote {count} {self._marks[kind]} marks for "
                    f"{counts[kind]} {kind}s: {self._remedy}"
                )
        if isinstance(text, str):
            self._warn_of_full_form(text)
        if context is None:
            return Rendered(rendered)
        before, edge, rest = rendered.partition(EDGES[0])
        inside, other, behind = rest.partition(EDGES[1])
        if not (edge and other):
            raise ValueError(f"the chat template leaves the context out: {self._remedy}")
        return Rendered(before + inside + behind, (len(before), len(before + inside)))

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        """The text of messages whose contents are lists of parts."""
        refusal, incomplete = None, None
        for strings in _subsets(sorted({message["role"] for message in messages})):
            given = [
                {**message, "content": self._join(message["content"])}
                if message["role"] in strings
                else message
                for message in messages
            ]
            try:
                rendered = self._run(given)
            except Exception as error:  # a template is a program, which may raise anything
                refusal = refusal or error
                continue
            if any(str(m["content"]) in rendered for m in given if isinstance(m["content"], list)):
                continue  # it took the list for a string
            if self._has_all(messages, rendered):
                return rendered
            incomplete = incomplete or rendered
        if incomplete is not None:
            return incomplete
        because = f" ({reason(refusal)})" if refusal else ""
        raise ValueError(
            f"the chat template refuses the messages{because}: change them, or {self._remedy}"
        )

    def _run(self, messages: list[dict[str, Any]]) -> str:
        """What the template makes of messages."""
        return str(
            self._packing.processor.apply_chat_template(
                messages,
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        )

    def _has_all(self, messages: list[dict[str, Any]], rendered: str) -> bool:
        """Whether the pictures and the user's texts are in a text."""
        parts = [part for message in messages for part in message["content"]]
        counts = {kind: sum(part["type"] == kind for part in parts) for kind in self._marks}
        texts = [part["text"].strip() for part in parts if part["type"] == "text"]
        return self._counts(rendered) == counts and all(text in rendered for text in texts)

    def _counts(self, text: str) -> dict[str, int]:
        """How many marks of each kind are in a text."""
        return {kind: text.count(mark) for kind, mark in self._marks.items()}

    def _join(self, parts: list[dict[str, Any]]) -> str:
        """The parts as one string."""
        text = "".join(
            part["text"] if part["type"] == "text" else f"{self._marks[part['type']]}\n"
            for part in parts
        )
        return text[:-1] if parts and parts[-1]["type"] != "text" else text

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template writes in front of a question and behind it, without white space."""
        try:
            text = self._apply([{"role": "user", "content": [{"type": "text", "text": "?-?"}]}])
        except ValueError:
            return "", ""
        before, _, behind = text.partition("?-?")
        bos = self._packing.tokenizer.bos_token or ""
        return _squeeze(before.removeprefix(bos)), _squeeze(behind)

    def _warn_of_full_form(self, text: str) -> None:
        before, behind = self._around
        if before and behind and before in (whole := _squeeze(text)) and whole.endswith(behind):
            warnings.warn(
                "the prompt has the chat template's own words around it already: pass "
                "raw_prompt=True (--raw-prompt), or the question alone",
                stacklevel=2,
            )


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All choices of names, the smaller ones first."""
    return chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))


def _squeeze(text: str) -> str:
    return "".join(text.split())
