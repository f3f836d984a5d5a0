"""Requests to the Prefect API: repeated soon where its client waits for seconds, one write at a time on SQLite."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, nullcontext
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar, cast

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.context import ContextModel, FlowRunContext
from prefect.exceptions import MissingContextError, PrefectHTTPStatusError
from prefect.logging import get_run_logger

from prefect_crew._text import one_line

ContextT = TypeVar("ContextT", bound=ContextModel)

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger | logging.LoggerAdapter[Any]]
else:
    Adapter = logging.LoggerAdapter


class OneLine(Adapter):
    """A logger whose every message is one line: a crew's words make no line of their own, and steer no terminal."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message."""
        if self.isEnabledFor(level):
            kwargs.setdefault("stacklevel", 2)
            self.logger.log(level, "%s", one_line(str(msg) % args if args else str(msg)), **kwargs)


def run_logger() -> OneLine:
    """Return the logger of the current task or flow run, else the package's."""
    try:
        return OneLine(get_run_logger(), {})
    except MissingContextError:
        return OneLine(logging.getLogger("prefect_crew"), {})


CROWDED_FOR = 300.0
"""Seconds for which a server is remembered to be one of those."""
LONGEST = 2.0
"""Seconds that a turn is waited for: a request that hangs must not hold up the others."""


class Rank(IntEnum):
    """What goes first."""

    RECORD = 0
    END = 1
    VIEW = 2


class Line:
    """The changes of one event loop, in a line where that is needed."""

    def __init__(self) -> None:
        self._until = float("-inf")
        self._busy = False
        self._waiting: list[tuple[Rank, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def form(self) -> None:
        """Go one after the other from now on: the server was seen to refuse two at once."""
        self._until = asyncio.get_running_loop().time() + CROWDED_FOR

    @asynccontextmanager
    async def turn(self, rank: Rank) -> AsyncGenerator[None]:
        """Make one change meanwhile."""
        held = await self._enter(rank)
        try:
            yield
        finally:
            if held:
                self._leave()

    async def _enter(self, rank: Rank) -> bool:
        loop = asyncio.get_running_loop()
        if loop.time() >= self._until:
            return False
        if not self._busy:
            self._busy = True
            return True
        mine: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiting, (rank, next(self._numbers), mine))
        try:
            await asyncio.wait({mine}, timeout=LONGEST)
        except asyncio.CancelledError:
            if not mine.cancel():  # it was given at this moment
                self._leave()
            raise
        return not mine.cancel()

    def _leave(self) -> None:
        while self._waiting:
            *_, other = heapq.heappop(self._waiting)
            if not other.done():
                other.set_result(None)
                return
        self._busy = False


_lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Line] = weakref.WeakKeyDictionary()


def line_here() -> Line:
    """Return the line of the running event loop."""
    return _lines.setdefault(asyncio.get_running_loop(), Line())


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


def flow_run_id() -> str | None:
    """Return the id of the flow run around this call."""
    context = FlowRunContext.get()
    return None if context is None or context.flow_run is None else str(context.flow_run.id)


def contexts_around(kind: type[ContextT]) -> list[ContextT]:
    """Return Prefect's contexts of a kind around this call, the innermost first.

    Prefect shows the innermost only. What it replaced stands in the token that will bring it back; there is no public
    way to the parent context.
    """
    found: list[ContextT] = []
    context: Any = kind.get()
    while isinstance(context, kind):
        found.append(context)
        token = context._token  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        context = None if token is None else token.old_value
    return found
