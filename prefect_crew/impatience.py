"""Requests to the Prefect API that are repeated by us, soon, and not by Prefect's client, after two seconds.

On SQLite a request that reads before it writes is answered 503 whenever another one writes at that moment ("database is
locked"; read in Prefect 3.9.1's source and measured: with four runs side by side every second change of a Variable).
Prefect's client then sleeps about two seconds, with retries switched off as well, which is longer than everything else
that a run costs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import PrefectHTTPStatusError

from prefect_crew.turns import Line, Rank, line_here

__all__ = ["busy", "request_once", "request_soon", "transient"]

CLOSING = 0.003
"""Seconds after which a connection that the server closes is seen to be closed."""


def transient(error: Exception) -> bool:
    """Return whether the Prefect API may take the same request a moment later."""
    if isinstance(error, PrefectHTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, httpx.TransportError)


def busy(error: Exception) -> bool:
    """Return whether the Prefect API has done nothing because it was busy: asking again is safe, whatever is asked."""
    return isinstance(error, PrefectHTTPStatusError) and error.response.status_code == 503


async def request_soon(
    client: PrefectClient,
    method: str,
    path: str,
    *,
    json: Any,
    patience: float,
    rank: Rank | None = Rank.RECORD,
    again: Callable[[Exception], bool] = transient,
) -> httpx.Response:
    """Make one request, again and again for `patience` seconds while the Prefect API is away or busy.

    `again` tells which errors are worth another attempt. Changes that meet on a locked database go in turns afterwards,
    by `rank`; None for one that is never refused, since the server only writes for it: that takes no turn.

    Raises:
        PrefectHTTPStatusError, httpx.TransportError: The last attempt's.
    """
    loop = asyncio.get_running_loop()
    line = line_here()
    until = loop.time() + patience
    delay = 0.02
    while True:
        try:
            async with line.turn(rank) if rank is not None else nullcontext():
                return await _alone(client, method, path, json=json, line=line)
        except (PrefectHTTPStatusError, httpx.TransportError) as error:
            if not again(error) or loop.time() + delay > until:
                raise
        # At random, so that those who met on a locked database do not meet again.
        await asyncio.sleep(delay * (0.5 + random.random()))  # noqa: S311  no secret depends on it
        delay = min(delay * 1.7, 10.0)


async def _alone(client: PrefectClient, method: str, path: str, *, json: Any, line: Line) -> httpx.Response:
    try:
        return await request_once(client, method, path, json=json)
    except PrefectHTTPStatusError as error:
        if busy(error):
            line.form()
            # The server closes the connection after such an answer (its exception goes on to uvicorn): whoever sent
            # the next request on it at this moment would lose that.
            await asyncio.sleep(CLOSING)
        raise


async def request_once(client: PrefectClient, method: str, path: str, *, json: Any) -> httpx.Response:
    """Make one request with Prefect's own connection, address and credentials, and without its retries.

    Raises:
        PrefectHTTPStatusError: The answer is an error.
        httpx.TransportError: There was none.
    """
    inner = cast("Any", client)._client  # noqa: SLF001  Prefect offers no request without retries
    request: httpx.Request = inner.build_request(method, path, json=json)
    if getattr(inner, "enable_csrf_support", False):
        await inner._add_csrf_headers(request)  # noqa: SLF001
    response = await httpx.AsyncClient.send(inner, request)
    try:
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        raise PrefectHTTPStatusError.from_httpx_error(error) from None
    return response
