"""What clients get: the answers to a request, whole or as a stream of events."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlcache_jax.running.sampling import Logprobs
from vlcache_jax.serving.http.kept import kept_map
from vlcache_jax.serving.ticket import Ticket

DONE = "data: [DONE]\n\n"
"""The last event of a stream."""


class Answering:
    """The answers to one request, as the client gets them.

    Args:
        tickets: one for each choice.
        model: its name.
        chat: whether it is a conversation; else completions.
        tokenizer: of the model.
        shown: of the pictures, see `kept_map`.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        model: str,
        chat: bool,
        tokenizer: Any,
        shown: Sequence[np.ndarray] = (),
    ):
        self.tickets, self._model, self._chat, self._tokenizer = tickets, model, chat, tokenizer
        self._shown = shown
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._sent = [0] * len(tickets)  # characters
        self._told = [0] * len(tickets)  # tokens whose logprobs were sent

    def body(self) -> dict[str, Any]:
        """The whole response; all tickets have ended."""
        choices = []
        for index, ticket in enumerate(self.tickets):
            text = ticket.answer.text
            content: dict[str, Any] = {"text": text}
            if self._chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, content, ticket.answer.finish_reason))
        return {**self._head(), "choices": choices, "usage": self.usage()}

    def begin(self) -> list[dict[str, Any]]:
        """The first chunks of a stream."""
        if not self._chat:
            return []
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [
            self._chunk(self._choice(index, delta, None, [])) for index in range(len(self.tickets))
        ]

    def more(self) -> list[dict[str, Any]]:
        """A chunk for each choice that has text that was not sent yet, or has ended."""
        chunks = []
        for index, ticket in enumerate(self.tickets):
            if self._sent[index] < 0:
                continue
            ended = ticket.done  # before the text is looked at: then there is no more
            reason = ticket.answer.finish_reason if ended else None
            text = ticket.answer.text if ended else ticket.written.text
            piece, self._sent[index] = text[self._sent[index] :], len(text)
            if piece:
                content = {"delta": {"content": piece}} if self._chat else {"text": piece}
                chunks.append(self._chunk(self._choice(index, content, None)))
            if ended:
                content = {"delta": {}} if self._chat else {"text": ""}
                chunks.append(self._chunk(self._choice(index, content, reason)))
                self._sent[index] = -1
        return chunks

    def last(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head(stream=True), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens so far; of the prompts, and of all answers."""
        written = [
            len(ticket.answer.tokens) if ticket.done else len(ticket.written.tokens)
            for ticket in self.tickets
        ]
        # The choices of one prompt stand beside each other, and have it in common.
        own = [*{id(ticket.request.groups[0]): ticket for ticket in self.tickets}.values()]
        prompt = sum(int(ticket.inputs.length[0]) for ticket in own)
        cached = sum(ticket.cached_tokens for ticket in own)
        found: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": sum(written),
            "total_tokens": prompt + sum(written),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if all(ticket.done for ticket in self.tickets):
            reports = [ticket.answer.cache for ticket in self.tickets]
            found["kv_cache"] = {
                "method": reports[0].label,
                "budget": reports[0].budget_requested,
                "full_bytes": sum(report.full_bytes for report in reports),
                "kept_bytes": sum(report.kept_bytes for report in reports),
                "kept_share": float(np.mean([report.kept_share for report in reports])),
            }
            if own[0].kv_map:
                found["kv_cache"]["map"] = kept_map(own, self._shown)
        return found

    def _head(self, stream: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(stream=True), "choices": [choice]}

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        reason: str | None,
        told: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        ticket, logprobs = self.tickets[index], None
        if ticket.logprobs is not None and told is None:
            ids = ticket.answer.tokens if ticket.done else ticket.written.tokens
            first = self._told[index]
            count = min(len(ticket.told), len(ids))
            own = [*zip(ids[first:count], ticket.told[first:count], strict=True)]
            self._told[index] = max(first, count)
            logprobs = self._chat_logprobs(own) if self._chat else self._text_logprobs(own)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _chat_logprobs(self, told: list[tuple[int, Logprobs]]) -> dict[str, Any]:
        content = []
        for token, one in told:
            others = [*zip(one.ids.tolist(), one.values.tolist(), strict=True)]
            listed = [self._token(*pair) for pair in others[: self.tickets[0].logprobs]]
            content.append(self._token(token, float(one.drawn)) | {"top_logprobs": listed})
        return {"content": content, "refusal": None}

    def _text_logprobs(self, told: list[tuple[int, Logprobs]]) -> dict[str, Any]:
        most = self.tickets[0].logprobs
        pairs = [[*zip(one.ids.tolist(), one.values.tolist(), strict=True)] for _, one in told]
        top = [{self._word(token): value for token, value in each[:most]} for each in pairs]
        words = [self._word(token) for token, _ in told]
        return {
            "tokens": words,
            "token_logprobs": [float(one.drawn) for _, one in told],
            "top_logprobs": top,
            "text_offset": [sum(map(len, words[:i])) for i in range(len(words))],
        }

    def _token(self, token: int, value: float) -> dict[str, Any]:
        word = self._word(token)
        # JSON has no infinity: the least that clients expect.
        return {"token": word, "logprob": max(value, -9999.0), "bytes": [*word.encode()]}

    def _word(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)


def event(data: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
