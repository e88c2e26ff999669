"""The JSON of requests and answers, as in OpenAI's API reference (Completions, Chat Completions, Models).

This server does not support several answers per request, log probabilities, penalties and tools. Their
fields are accepted only with the value that turns the feature off. Otherwise the request is refused, and
the message names the field. Unknown fields are refused, too. Numbers have the ranges of the reference;
`app.py` checks the server's own limits.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema


def _valid_unicode(text: str) -> str:
    """Refuse half of a surrogate pair. JSON can contain one, but it is no character and has no tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not a character") from None
    return text


def _off(switch: bool) -> bool:
    if switch:
        raise ValueError("this server does not support that")
    return switch


_Text = Annotated[str, AfterValidator(_valid_unicode)]
_TokenId = Annotated[int, Field(ge=0)]
_StopString = Annotated[_Text, Field(min_length=1, max_length=256)]
# Fields that may only turn a feature off. Not `Literal`, because Python has 0.0 == False and True == 1.
_No = Annotated[bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})] | None
_Zero = Annotated[float, Field(ge=0, le=0)] | None
_One = Annotated[int, Field(ge=1, le=1)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = Field(False, description="Send one more chunk at the end, with the token counts.")


class _Generation(_Strict):
    model: str = Field(description="Name of the model, as in /v1/models.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens to generate.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most likely token. Default: 1.")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample only the most likely tokens that together have this probability. Default: 1.",
    )
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="With the same seed, the same logits give the same tokens."
    )
    stop: _StopString | Annotated[list[_StopString], Field(max_length=4)] | None = Field(
        None, description="Strings that end the answer. They are not part of it."
    )
    stream: bool | None = Field(None, description="Send the answer while it is generated, as server-sent events.")
    stream_options: StreamOptions | None = None
    n: _One = None
    presence_penalty: _Zero = None
    frequency_penalty: _Zero = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="Accepted and ignored; not stored.")

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Generation):
    """Continue a prompt."""

    prompt: _Text | list[_TokenId] = Field(description="A text, or its token ids.")
    best_of: _One = None
    echo: _No = None
    logprobs: _No = None
    suffix: Literal[""] | None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: _Text


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and content, with the parts of the content joined: the form that chat templates read."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(_Generation):
    """Answer a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: _No = None
    top_logprobs: _Zero = None
    tools: Annotated[list[dict], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """The text that continues a prompt."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The model's answer to a conversation."""

    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lockkit"


class ModelList(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of /health."""

    status: Literal["ok"] = "ok"
    fused_kernel: bool = False  # whether chains run in the fused operator of `lockkit kernel`


class ErrorDetail(BaseModel):
    """What is wrong with a request: a message of one line, the class of error, the field, and a code."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Answer to a request that is refused or fails."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is refused or fails.

    Args:
        status: HTTP status.
        message: one line that says what is wrong.
        param: the field, if one field is wrong.
        code: short name of the error, for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return error_body(self.status, self.message, self.param, self.code)


_ERROR_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 500: "server_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error, see `ApiError`."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump()
