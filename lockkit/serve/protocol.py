"""The JSON of requests and answers, after OpenAI's API reference (Completions, Chat Completions, Models).

What this server does not do (several answers at once, log probabilities, penalties, tools) is
accepted only where it is switched off, and refused by name otherwise; so is what it does not know.
Numbers have the reference's ranges; the server's own limits are checked in `app.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema


def _whole(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and has no tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not a character") from None
    return text


def _off(switch: bool) -> bool:
    if switch:
        raise ValueError("this server does not do that")
    return switch


Text = Annotated[str, AfterValidator(_whole)]
TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]
# What is accepted only where it is switched off. Not Literal: to Python 0.0 is False, and True is 1.
No = Annotated[bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None
One = Annotated[int, Field(ge=1, le=1)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = Field(False, description="Send the token counts in a last chunk of their own.")


class _Generation(_Strict):
    model: str = Field(description="As /v1/models lists it.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens to generate at most.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token. Default: 1.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Draw among the likeliest tokens that make up this share. Default: 1."
    )
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="The same seed draws the same tokens from the same logits."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="Texts that end the answer; they are not part of it."
    )
    stream: bool | None = Field(None, description="Send the answer as it is made, as server-sent events.")
    stream_options: StreamOptions | None = None
    n: One = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="Accepted, not used, not kept.")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Generation):
    """Continue a prompt."""

    prompt: Text | list[TokenId] = Field(description="A text, or the numbers of its tokens.")
    best_of: One = None
    echo: No = None
    logprobs: No = None
    suffix: Literal[""] | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(_Generation):
    """Answer a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: No = None
    top_logprobs: Zero = None
    tools: Annotated[list[dict], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lockkit"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    fused_kernel: bool = False  # chains run in the kernel of `lockkit kernel`


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """A refusal: an HTTP status and what is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict:
        return error_body(self.status, self.message, self.param, self.code)


ERROR_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 500: "server_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump()
