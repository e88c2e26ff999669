"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from lockkit.serve.protocol import ApiError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # otherwise nginx collects the events
]


class EventStream(Response):
    """A response of `data: JSON` events that ends with `data: [DONE]`.

    If `chunks` raises an `ApiError`, it is sent as an event with the key "error", because the HTTP
    status is sent already. The stream then ends without [DONE].

    Args:
        chunks: a function that takes the ASGI `receive` and yields the chunks, each a JSON object.
            `receive` tells when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Callable[[Receive], AsyncGenerator[dict[str, Any], None]]):
        super().__init__()
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events (ASGI)."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
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
