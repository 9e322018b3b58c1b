"""Prompts as conversations: what chat templates take, and where the pictures go in them."""

from collections.abc import Mapping, Sequence
from reprlib import repr as shortened
from typing import Any, TypeAlias

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: `{"role": "user", "content": "..."}` for each message, in their order.

The role is "system", "user" or "assistant". The content is a string, or a list of
`{"type": "text", "text": "..."}` and `{"type": "image"}`.
"""

Text: TypeAlias = str | Messages
"""One prompt: what the user says, or a conversation."""

ROLES = "system", "user", "assistant"


def is_one(text: Any) -> bool:
    """Whether this is one prompt, a string or a conversation, and not a list of several."""
    is_list = isinstance(text, list | tuple) and len(text) > 0
    return isinstance(text, str) or (is_list and all(isinstance(part, Mapping) for part in text))


def conversation(text: Text, num_images: int, mark: str, raw: bool) -> list[dict[str, Any]]:
    """A prompt as messages whose contents are lists of parts, with a part for each picture.

    Pictures stand where parts or marks are; without either in front of the first user message.

    Args:
        text: the prompt.
        num_images: how many pictures it has.
        mark: what stands for a picture in a string.
        raw: the pictures have to be marked.

    Raises:
        ValueError: a message is not of the form that `Messages` describes, the conversation is
            empty, or it has another number of places for pictures than there are pictures.
    """
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    made = [_message(message, f"messages[{i}]", mark) for i, message in enumerate(messages)]
    parts = [part for message in made for part in message["content"]]
    if not parts and not num_images:
        raise ValueError("the prompt is empty: give a text, an image or both")
    places = sum(part["type"] == "image" for part in parts)
    if places != num_images and (raw or places):
        hint = "" if raw else ", or leave the marks out and the images come first"
        where = "text" if isinstance(text, str) else "messages"
        raise ValueError(
            f"{places} {mark} marks in the {where} but {num_images} images: "
            f"give one mark for each image{hint}"
        )
    if not places and num_images:
        first = next((m["content"] for m in made if m["role"] == "user"), None)
        if first is None:
            raise ValueError("no message is the user's, where the images could go: add one")
        first[:0] = [{"type": "image"}] * num_images
    return made


def _message(message: Mapping[str, Any], name: str, mark: str) -> dict[str, Any]:
    """A message with a list of parts as its content; errors call it `name`."""
    if set(message) != {"role", "content"}:
        raise ValueError(f"{name} has the keys {list(message)}: give it a role and a content alone")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{name} has the role {role!r}: choose one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name} has the content {shortened(content)}: give a string or a list")
    parts = []
    for part in content:
        match part:
            case {"type": "image", **rest} if not rest:
                parts.append({"type": "image"})
            case {"type": "text", "text": str(words), **rest} if not rest:
                for number, piece in enumerate(words.split(mark)):
                    parts += [{"type": "image"}] * (number > 0)
                    parts += [{"type": "text", "text": piece}] * (piece != "")
            case _:
                raise ValueError(
                    f'{name} has the part {shortened(part)}: give {{"type": "text", "text": "..."}}'
                    ' or {"type": "image"}, and the pictures themselves as images'
                )
    return {"role": role, "content": parts}
