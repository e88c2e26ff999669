"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from lockkit.serve.protocol import ApiError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the pieces
]


class EventStream(Response):
    """A response of `data: JSON` events, `data: [DONE]` last.

    An `ApiError` on the way is sent as an event with the key "error", since the status is out
    already; the stream then ends without [DONE].

    Args:
        chunks: from the ASGI `receive`, which tells when the client leaves, to the chunks.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Callable[[Any], AsyncIterator[dict[str, Any]]]):
        super().__init__()
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        last = "[DONE]"
        async with contextlib.aclosing(self._chunks(receive)) as chunks:
            try:
                async for chunk in chunks:
                    await send(_event(json.dumps(chunk, ensure_ascii=False)))
            except ApiError as error:
                last = json.dumps(error.body())
        await send({**_event(last), "more_body": False})


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
