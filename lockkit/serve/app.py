"""The endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

The bodies of requests are parsed here, not by FastAPI, so that every refusal is in plain words.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from lockkit.serve.answers import ChatCompletion, Completion, Health, ModelCard, ModelList
from lockkit.serve.config import ServeConfig
from lockkit.serve.engine import Engine
from lockkit.serve.guard import ENDPOINTS, Guard, refusal
from lockkit.serve.parse import parse_request
from lockkit.serve.prometheus import Metrics
from lockkit.serve.protocol import ApiError, ChatRequest, CompletionRequest, ErrorResponse
from lockkit.serve.service import Service
from lockkit.version import __version__

if TYPE_CHECKING:
    from pydantic import SecretStr

    from lockkit.serve.model import ServedModel

_Request = TypeVar("_Request", CompletionRequest, ChatRequest)
_REFUSALS = {
    400: "The request is malformed, or asks for something that this server does not support.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body or the answer took too long.",
    413: "The body is too large.",
    429: "Too many requests are waiting.",
}


def make_app(
    model: ServedModel,
    engine: Engine,
    config: ServeConfig,
    api_key: SecretStr | None,
    metrics: Metrics,
    request_log: TextIO | None = None,
) -> FastAPI:
    """Make the ASGI application for one model. The engine starts and stops with it.

    Args:
        model: the export.
        engine: of this export; not started yet.
        config: limits and the model's name in requests.
        api_key: required of every request except /health; None for no key.
        metrics: filled by every request.
        request_log: gets a line for every request; closed at the end.
    """
    service = Service(model, engine, config)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()
        if request_log is not None:
            request_log.close()

    app = FastAPI(
        title="lockkit serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={status: {"model": ErrorResponse, "description": text} for status, text in _REFUSALS.items()},
    )  # fmt: skip
    app.state.name = service.name
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)

    @app.get("/health")
    async def health() -> Health:
        """Whether the server can answer. Needs no API key."""
        if not engine.alive:
            raise ApiError(500, "the engine has stopped")
        return Health(fused_kernel=engine.fused)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model that this server has; there is only one."""
        return ModelList(data=[service.card])

    @app.get("/v1/models/{name:path}")
    async def model_card(name: str) -> ModelCard:
        """The model of this name."""
        service.check_model(name)
        return service.card

    @app.post(
        "/v1/completions", response_model=Completion, responses=_STREAMED, openapi_extra=_takes(CompletionRequest)
    )
    async def completions(request: Request) -> Any:
        """Continue a prompt, or several."""
        return await service.complete(await _read(CompletionRequest, request), request)

    @app.post(
        "/v1/chat/completions", response_model=ChatCompletion, responses=_STREAMED, openapi_extra=_takes(ChatRequest)
    )
    async def chat_completions(request: Request) -> Any:
        """Answer a conversation. The model must have a chat template."""
        return await service.chat(await _read(ChatRequest, request), request)

    # FastAPI documents this assignment as the way to change the description.
    app.openapi = lambda: _openapi(app, service.name, api_key is not None)  # type: ignore[method-assign]
    app.add_middleware(Guard, config=config, api_key=api_key, metrics=metrics, request_log=request_log)
    return app


def _takes(kind: type[_Request]) -> dict[str, Any]:
    """The part of an operation's OpenAPI description that says what its body is."""
    schema = {"$ref": _SCHEMAS + kind.__name__}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _read(kind: type[_Request], request: Request) -> _Request:
    """Parse the body of a request, whatever type it declares: curl declares a form.

    Browsers are an exception. They let any web page send JSON to this server if it declares a form or plain text.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if "origin" in request.headers and declared != "application/json":
        raise ApiError(400, "a web page must send the header `Content-Type: application/json`", code="content_type")
    return parse_request(kind, await request.body())


_SCHEMAS = "#/components/schemas/"
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # JSON, or [DONE]
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)  # registered for this class
    return refusal(error)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # registered for this class
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no such path: this server has {', '.join(ENDPOINTS)}"
    elif error.status_code == 405:
        message = f"this path takes {(error.headers or {}).get('Allow', 'another method')}, not {request.method}"
    response = refusal(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})  # `Allow`, if the path does not have this method
    return response


def _openapi(app: FastAPI, name: str, with_key: bool) -> dict[str, Any]:
    """FastAPI's OpenAPI description, corrected.

    The bodies of requests, the name of the model and the API key are added. The response 422 is removed,
    because an invalid request is answered with 400.
    """
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = FastAPI.openapi(app)  # kept by FastAPI in `app.openapi_schema`
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = schema["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    bodies = [(CompletionRequest, "validation"), (ChatRequest, "validation")]
    schemas |= models_json_schema(bodies, ref_template=_SCHEMAS + "{model}")[1]["$defs"]  # type: ignore[arg-type]
    for kind, _ in bodies:
        schemas[kind.__name__]["properties"]["model"]["enum"] = [name]
    if with_key:
        schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"bearer": []}]
        schema["paths"]["/health"]["get"]["security"] = []
    return schema
