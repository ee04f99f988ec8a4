"""The bodies of requests, as OpenAI's API defines them, and `prompt_logprobs` as vLLM does.

Fields that are not known here, or that ask for what the server can't do, are refused; none is ignored in silence. Many
clients send every field they know, so a known field is taken if its value asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

LONGEST_LIST = 20  # likeliest tokens with each written one, OpenAI's limit
LONGEST_PROMPT_LIST = 128  # the same for the tokens of a prompt
MOST_STOPS = 4

TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]


def _zero(value: float) -> float:
    if value != 0:
        raise ValueError("must be 0")
    return value


Zero = Annotated[float, AfterValidator(_zero)]  # 0 or 0.0, as clients in Python write it


def _nothing(value: Any) -> None:
    if value not in (None, [], {}):
        raise ValueError("must be left out; this server does not have it")


Nothing = Annotated[Any, AfterValidator(_nothing)]  # null or empty


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # of OpenAI's server; padding against eavesdroppers, which loopback needs not

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any) -> Any:
        return False if value is None else value


class Body(BaseModel):
    """What both kinds of requests may have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    model: str | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)  # 0 leaves the likeliest token
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=LONGEST_PROMPT_LIST)
    # Only these values, which change nothing.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: dict[str, Zero] | None = None
    # About whoever asks; they change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None

    @field_validator("temperature", "top_p", "n", "stream", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MOST_STOPS:
            raise ValueError(f"must be at most {MOST_STOPS} strings")
        return [stop for stop in stops if stop]

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        assert not isinstance(self.stop, str)
        return self.stop or []


class CompletionBody(Body):
    """A body for /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=LONGEST_LIST)
    echo: bool = False
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @field_validator("max_tokens", "echo", mode="before")
    @classmethod
    def _null(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["text"] | None = None  # lm-eval writes it
    # An earlier answer has them, as the official client writes it.
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    refusal: Nothing = None
    tool_calls: Nothing = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(BaseModel):
    """The only form of answers."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatBody(Body):
    """A body for /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=LONGEST_LIST)
    # Only these values, which change nothing.
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None  # of tools
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    audio: Nothing = None
    moderation: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Nothing = None
    web_search_options: Nothing = None
    service_tier: Literal["auto", "default"] | None = None
    # About whoever asks, and what OpenAI's server keeps; they change no answer.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _null(cls, value: Any) -> Any:
        return False if value is None else value
