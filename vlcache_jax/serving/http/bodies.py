"""What clients send: the fields of the OpenAI API that are served, as arguments of `VLM.request`.

A field that would change the answer, and is not served, is refused by its name. Others that are not
known are ignored.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from vlcache_jax.cache.methods import FullCache, make_method
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.serving.http.errors import ApiError

MOST_CHOICES = 8
"""Most answers to one request, `n`."""

MOST_LOGPROBS = 20
"""Most of the likeliest tokens that are told at each step."""

MOST_PROMPTS = 16
"""Most prompts of one request for completions."""

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class ResponseFormat(BaseModel):
    """`response_format`: text alone."""

    type: Literal["text"] = "text"


class Body(BaseModel):
    """Fields that both routes have; None is the same as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1, le=1)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    response_format: ResponseFormat | None = None
    kv_method: str | None = None
    kv_budget: str | Number | int | None = None
    kv_bits: str | int | None = None
    kv_map: bool | None = None

    @property
    def unknown(self) -> list[str]:
        """Fields that are ignored."""
        return sorted(self.model_extra or ())

    def options(
        self,
        most_tokens: int,
        seed: int,
        method: str,
        bits: str | None = None,
        budget: str | None = None,
    ) -> dict[str, Any]:
        """Arguments of `VLM.request`, but for the prompt.

        Args:
            most_tokens: of an answer, where the request does not say.
            seed: of the draws, where it does not say.
            method: the cache method, where it does not say.
            bits: the quantizer, where it does not say.
            budget: of the cache, where it does not say; the full cache has none.

        Raises:
            ApiError: there is no such cache.
        """
        try:
            name = self.kv_method or method
            if self.kv_budget is not None:
                budget = str(self.kv_budget)
            elif name == FullCache.name:
                budget = None
            bits = bits if self.kv_bits is None else str(self.kv_bits)
            cache = make_method(name, budget, make_quantizer(bits))
        except ValueError as error:
            raise ApiError(400, error, param="kv_method") from None
        return {
            "cache": cache,
            "max_new_tokens": self.new_tokens or most_tokens,
            "min_new_tokens": self.min_tokens or 0,
            "ignore_eos": bool(self.ignore_eos),
            "temperature": self.temperature or 0.0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k if self.top_k and self.top_k > 0 else None,
            "seed": seed if self.seed is None else self.seed,
            "stop": () if self.stop is None else self.stop,
        }

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class Conversation(NamedTuple):
    """A conversation as `VLM.request` takes it.

    Attributes:
        messages: with a part for each picture.
        urls: of the pictures, in their order.
        text_first: text of the user stands in front of a picture in its message.
    """

    messages: list[dict[str, Any]]
    urls: list[str]
    text_first: bool


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer; the newer name comes first."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def told(self) -> int | None:
        """How many of the likeliest tokens are told at each step, None for not even the drawn."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self, images_first: bool = False) -> Conversation:
        """The messages as the model takes them.

        Args:
            images_first: move pictures in front of the text of their message.

        Raises:
            ApiError: a part is none that is served.
        """
        made, urls, text_first = [], [], False
        for number, message in enumerate(self.messages):
            role = "system" if message.role == "developer" else message.role
            parts: list[Any] = []
            given = message.content
            if isinstance(given, str):
                given = [{"type": "text", "text": given}]
            own = [*_parts(given, f"messages.{number}.content")]
            if images_first:
                own.sort(key=lambda part: part[0] == "text")
            for kind, content in own:
                if kind == "text":
                    parts.append({"type": "text", "text": content})
                    continue
                text_first |= any(part["type"] == "text" and part["text"] for part in parts)
                parts.append({"type": "image"})
                urls.append(content)
            made.append({"role": role, "content": parts})
        return Conversation(made, urls, text_first)


class CompletionBody(Body):
    """The body of /v1/completions: text alone, without a chat template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def told(self) -> int | None:
        """As of `ChatBody`."""
        return self.logprobs


def _parts(content: list[dict[str, Any]], where: str) -> Iterator[tuple[str, str]]:
    """Kind and content of each part: the text, or the URL of a picture."""
    for number, part in enumerate(content):
        match part:
            case {"type": "text", "text": str(text)}:
                yield "text", text
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
                yield "image_url", url
            case {"type": "text" | "image_url" as kind}:
                what = "a text" if kind == "text" else 'an object with a "url"'
                message = f"{where}.{number}: a part of the type {kind} has {what} as its {kind}"
                raise ApiError(400, message, param=f"{where}.{number}.{kind}")
            case _:
                message = f"{where}.{number}: parts of the types text and image_url are served"
                raise ApiError(400, message, param=f"{where}.{number}.type")
