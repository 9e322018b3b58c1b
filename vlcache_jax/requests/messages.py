"""Prompts as conversations: where pictures go in them, and what a chat template makes of them.

"<image>What?" ─conversation─► [{"role": "user", "content": [image, "What?"]}] ─ChatTemplate─► text

A context, the document that a question is about, stands in front of the question as pictures do.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, combinations
from typing import Any, TypeAlias

from vlcache_jax.errors import reason, short
from vlcache_jax.requests.packing import Packing, Rendered

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: `{"role": "user", "content": "..."}` for each message, in their order.

The role is "system", "user" or "assistant". The content is a string, or a list of
`{"type": "text", "text": "..."}` and `{"type": "image"}`.
"""

Text: TypeAlias = str | Messages
"""One prompt: what the user says, or a conversation."""

ROLES = "system", "user", "assistant"

IMAGE = "<image>"
"""What stands for a picture in any family's prompts, beside the family's own mark."""

EDGES = "\ufdd0", "\ufdd1"
"""Around a context until a prompt is rendered: two of Unicode's codes that are no characters."""


def is_one(text: Any) -> bool:
    """Whether this is one prompt, a string or a conversation, and not a list of several."""
    is_list = isinstance(text, list | tuple) and len(text) > 0
    return isinstance(text, str) or (is_list and all(isinstance(part, Mapping) for part in text))


def conversation(
    text: Text,
    num_images: int,
    mark: str | None,
    raw: bool,
    *,
    breaks: bool = True,
    context: str | None = None,
) -> list[dict[str, Any]]:
    """A prompt as messages whose contents are lists of parts, with a part for each picture.

    Pictures stand where parts or marks are; without either in front of the first user message. A
    context comes behind these, a blank line behind it.

    Args:
        text: the prompt.
        num_images: how many pictures it has.
        mark: what stands for a picture in a string; None where there can be no pictures.
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
    made = [_message(message, f"messages[{i}]", mark, breaks) for i, message in enumerate(messages)]
    parts = [part for message in made for part in message["content"]]
    if context is not None:
        words = readable(context).strip()
        if not words:
            raise ValueError("the context is empty: give a text, or leave it out")
        first = _of_user(made, "the context")
        question = first.pop(0)["text"] if first and first[0]["type"] == "text" else ""
        words = f"{EDGES[0]}{words}{EDGES[1]}\n\n{question}"
        first.insert(0, {"type": "text", "text": words})
    if not parts and not num_images:
        raise ValueError("the prompt is empty: give a text, an image or both")
    places = sum(part["type"] == "image" for part in parts)
    if mark is None and (count := max(places, num_images)):
        raise ValueError(
            f"the model reads text alone and was given {count} picture{'s' * (count > 1)}: leave "
            "them out, or take a model with a vision tower"
        )
    if places != num_images and (raw or places):
        hint = "" if raw else ", or leave the marks out and the images come first"
        where = "text" if isinstance(text, str) else "messages"
        raise ValueError(
            f"{places} {mark} marks in the {where} but {num_images} images: "
            f"give one mark for each image{hint}"
        )
    if not places and num_images:
        _of_user(made, "the images")[:0] = [{"type": "image"}] * num_images
    return made


def _of_user(messages: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The parts of the first message of the user."""
    first = next((m["content"] for m in messages if m["role"] == "user"), None)
    if first is None:
        raise ValueError(f"no message is the user's, where {what} could go: add one")
    return first


def _message(
    message: Mapping[str, Any], name: str, mark: str | None, breaks: bool
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
            case {"type": "image", **rest} if not rest:
                parts.append({"type": "image"})
            case {"type": "text", "text": str(words), **rest} if not rest:
                words = marked(readable(words), mark)
                pieces = words.split(mark) if mark else [words]
                for number, piece in enumerate(pieces):
                    if not breaks and number > 0:
                        piece = piece.removeprefix("\n")
                    if not breaks and number < len(pieces) - 1:
                        piece = piece.removesuffix("\n")
                    parts += [{"type": "image"}] * (number > 0)
                    parts += [{"type": "text", "text": piece}] * (piece != "")
            case _:
                raise ValueError(
                    f"{name} has the part {short(repr(part))}: give "
                    '{"type": "text", "text": "..."} or {"type": "image"}, and the pictures '
                    "themselves as images"
                )
    return {"role": role, "content": parts}


def marked(text: str, mark: str | None) -> str:
    """The text with the family's own mark for every picture."""
    return text.replace(IMAGE, mark) if mark else text


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
        self._packing, self._mark = packing, packing.mark
        self._remedy = "write the whole prompt yourself and pass raw_prompt=True (--raw-prompt)"

    def render(self, text: Text, num_images: int, context: str | None = None) -> Rendered:
        """The whole prompt, with a mark for each picture.

        Args:
            text: the prompt.
            num_images: how many pictures it has.
            context: what it is about, if it is about a text.

        Raises:
            ValueError: the prompt is malformed, there is no template, or it refuses the messages or
                writes another number of marks.
        """
        asked = partial(conversation, text, num_images, self._mark, False, context=context)
        messages = asked(breaks=False)
        if not isinstance(self._template, str):
            remedy = self._remedy + (f", with {self._mark} marks" if self._mark else "")
            raise ValueError(f"this checkpoint has no chat template: {remedy}")
        rendered = self._apply(messages)
        if self._marks(rendered, "\n") < num_images:  # it writes no line breaks itself
            rendered = self._apply(asked())
        if (count := self._marks(rendered)) != num_images:
            raise ValueError(
                f"the chat template wrote {count} {self._mark} marks for {num_images} images: "
                f"{self._remedy}"
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
        marks = sum(part["type"] == "image" for part in parts)
        texts = [part["text"].strip() for part in parts if part["type"] == "text"]
        return self._marks(rendered) == marks and all(text in rendered for text in texts)

    def _marks(self, text: str, behind: str = "") -> int:
        """How many marks are in a text, with this behind each."""
        return text.count(self._mark + behind) if self._mark else 0

    def _join(self, parts: list[dict[str, Any]]) -> str:
        """The parts as one string."""
        text = "".join(part.get("text", f"{self._mark}\n") for part in parts)
        return text[:-1] if parts and parts[-1]["type"] == "image" else text

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
