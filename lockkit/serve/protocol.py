"""The JSON of requests and errors, as in OpenAI's API reference (Completions, Chat Completions, Models).

This server does not support penalties of presence and frequency, biases, tools, and answers in a given form. Their
fields are accepted only with the value that asks for nothing (`_Only`). Otherwise the request is refused, and
the message names the field. Unknown fields are refused, too. A field that is null counts as absent, since
clients send back all fields of an earlier answer. Numbers have the ranges of the reference; `service.py`
checks the server's own limits.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from lockkit.generate import LOWEST_PENALTY

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

_MOST_STOPS = 4
_LONGEST_STOP = 256  # characters


class _Only:
    """Marks a field that must have one of these values, which ask for nothing. It is then ignored."""

    def __init__(self, *values: Any):
        self._values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [*self._values, None]}

    def _check(self, value: Any) -> Any:
        # In Python, 0 == False and 1 == True. In JSON, they differ.
        if any(value == only and isinstance(value, bool) == isinstance(only, bool) for only in self._values):
            return value
        raise _wrong(f"must be {' or '.join(map(json.dumps, self._values))}: other values are not supported")


def _wrong(message: str) -> PydanticCustomError:
    """What is wrong with a field, without its name."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


_OnlyFalse = Annotated[Any, _Only(False)]
_OnlyZero = Annotated[Any, _Only(0)]
_OnlyOne = Annotated[Any, _Only(1)]
_OnlyNoText = Annotated[Any, _Only("")]
_OnlyNoItems = Annotated[Any, _Only([])]
_OnlyNoFields = Annotated[Any, _Only({})]
_AnySwitch = Annotated[Any, _Only(True, False)]
_Choice = Annotated[Any, _Only("none", "auto")]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="Send one more chunk at the end, with the token counts.")
    include_obfuscation: _OnlyFalse = None


def _stops(value: Any) -> list[str]:
    stops = value if isinstance(value, list) else [value]
    if not all(isinstance(stop, str) for stop in stops):
        raise _wrong("must be a string or a list of strings")
    if len(stops) > _MOST_STOPS:
        raise _wrong(f"must have at most {_MOST_STOPS} strings")
    if not all(1 <= len(stop) <= _LONGEST_STOP for stop in stops):
        raise _wrong(f"must have strings of 1 to {_LONGEST_STOP} characters")
    return stops


_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": _LONGEST_STOP}
_Stops = Annotated[
    list[str],
    PlainValidator(_stops),
    WithJsonSchema(
        {"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": _MOST_STOPS}, {"type": "null"}]}
    ),
]


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
    stop: _Stops = Field(
        [],
        description="Strings that end the answer. They are not part of it. A special token, for instance "
        "`<|im_end|>`, ends it, too.",
    )
    stream: bool | None = Field(None, description="Send the answer while it is generated, as server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and ignored; not stored.")
    n: int | None = Field(None, ge=1, le=128, description="Answers for each prompt. Default: 1.")
    presence_penalty: _OnlyZero = None
    frequency_penalty: _OnlyZero = None
    logit_bias: _OnlyNoFields = None
    # Not in OpenAI's API, but sent by clients of other servers.
    top_k: int | None = Field(
        None, ge=-1, le=2**31, description="Sample only from this many most likely tokens; 0 and -1 for all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Sample only from tokens at least this share as likely as the most likely one."
    )
    repetition_penalty: float | None = Field(
        None,
        ge=LOWEST_PENALTY,
        le=10,
        description="Above 1, tokens that were there before, also in the prompt, become less likely.",
    )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `lockkit.generate.Sampling` that the request sets."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return given | ({"top_k": max(0, given["top_k"])} if "top_k" in given else {})


def _prompts(value: Any) -> list[str] | list[list[int]]:
    if isinstance(value, str) or _are_token_ids(value):
        return [value]
    if isinstance(value, list) and (
        all(isinstance(entry, str) for entry in value) or all(_are_token_ids(entry) for entry in value)
    ):
        return value
    raise _wrong("must be a text, a list of texts, a list of token ids, or a list of such lists")


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int and entry >= 0 for entry in value)


_TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "items": _TOKEN_IDS_SCHEMA},
    ]
}


_MOST_COMPLETION_LOGPROBS = 5


def _completion_logprobs(value: Any) -> int | None:
    if value is False:
        return None
    if type(value) is not int or not 0 <= value <= _MOST_COMPLETION_LOGPROBS:
        raise _wrong(f"must be a whole number from 0 to {_MOST_COMPLETION_LOGPROBS}")
    return value


_LOGPROBS_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": _MOST_COMPLETION_LOGPROBS},
        {"const": False},
        {"type": "null"},
    ]
}


class CompletionRequest(_Generation):
    """Continue a prompt, or several."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="A text, or its token ids; or a list of several. Each gets an answer, in the order of the list."
    )
    best_of: _OnlyOne = None
    echo: _OnlyFalse = None
    logprobs: Annotated[int | None, PlainValidator(_completion_logprobs), WithJsonSchema(_LOGPROBS_SCHEMA)] = Field(
        None, description="Send the log probability of each token, and of this many most likely ones in its place."
    )
    suffix: _OnlyNoText = None

    @property
    def wanted_logprobs(self) -> int | None:
        """Most likely tokens to report for each place; None for no log probabilities at all."""
        return self.logprobs


def _message_text(value: Any) -> str:
    """The text of a message. Parts are joined, since chat templates read one text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(_is_text_part(part) for part in value):
        return "".join(part["text"] for part in value)
    raise _wrong('must be a text, or a list of {"type": "text", "text": ...}: other parts are not supported')


def _is_text_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    fields = {name: value for name, value in part.items() if value is not None}
    return fields.keys() == {"type", "text"} and fields["type"] == "text" and isinstance(fields["text"], str)


_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": {"type": "null"},
            },
        },
        {"type": "null"},
    ]
}


class Message(_Strict):
    """One message of a conversation. An assistant's message may have no content."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, PlainValidator(_message_text), WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: str | None = None
    # Fields of an earlier answer that a client sends back.
    refusal: _OnlyNoText = None
    tool_calls: _OnlyNoItems = None
    annotations: _OnlyNoItems = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise _wrong("has no content")
        return self

    def plain(self) -> dict[str, str]:
        """Role and content: the form that chat templates read."""
        return {"role": self.role, "content": self.content or ""}


class ResponseFormat(_Strict):
    """The form of the answer. There is only one."""

    type: Literal["text"]


class ChatRequest(_Generation):
    """Answer a conversation."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    response_format: ResponseFormat | None = None
    prompt_cache_key: str | None = Field(None, description="Accepted and ignored; not stored.")
    safety_identifier: str | None = Field(None, description="Accepted and ignored; not stored.")
    logprobs: bool | None = Field(None, description="Send the log probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="With logprobs: and those of this many most likely tokens in its place."
    )
    tools: _OnlyNoItems = None
    functions: _OnlyNoItems = None
    tool_choice: _Choice = None
    function_call: _Choice = None
    parallel_tool_calls: _AnySwitch = None
    store: _OnlyFalse = None
    metadata: _OnlyNoFields = None
    service_tier: Annotated[Any, _Only("auto", "default")] = None
    modalities: Annotated[Any, _Only(["text"])] = None
    reasoning_effort: Annotated[Any, _Only("none")] = None
    verbosity: Annotated[Any, _Only("medium")] = None

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise _wrong("needs logprobs: true")
        return value

    @property
    def wanted_logprobs(self) -> int | None:
        """Most likely tokens to report for each place; None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


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
