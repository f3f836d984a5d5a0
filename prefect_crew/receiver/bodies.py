"""The bodies of requests, which anybody may send: bounded in size and in time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

BODY_TIMEOUT = 10.0
"""Seconds for a whole body."""


class BodyError(Exception):
    """A body that is not taken; `status` is the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_body(request: Request, most: int) -> bytes:
    """Return the body of a request, of at most so many bytes.

    Raises:
        BodyError: It is larger, did not come in time, or ended early.
    """
    length = request.headers.get("content-length", "0")
    too_large = f"a body has at most {most} bytes"
    if not length.isdecimal() or len(length) > 12 or int(length) > most:
        raise BodyError(413, too_large)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for part in request.stream():
                body += part
                if len(body) > most:  # whatever the head says of its length
                    raise BodyError(413, too_large)
    except TimeoutError:
        raise BodyError(408, "the body did not come in time") from None
    except ClientDisconnect:
        raise BodyError(400, "the connection was closed") from None
    return bytes(body)
