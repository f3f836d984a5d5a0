"""Functions that Prefect's client and contexts lack: requests that are repeated soon, one change at a time on SQLite,
the contexts around a call, and a logger that writes each message on one line.

Private API of Prefect is used in `_request_once`, `embedded_server`, `contexts_around` and `is_entered`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import os
import random
import sys
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import httpx
import prefect
from prefect.client.base import PrefectHttpxAsyncClient
from prefect.client.orchestration import PrefectClient, get_client
from prefect.context import ContextModel, FlowRunContext
from prefect.exceptions import MissingContextError, PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, STATUS_ERRORS, TRANSPORT_ERRORS
from prefect_crew._text import one_line

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger | logging.LoggerAdapter[Any]]
else:
    Adapter = logging.LoggerAdapter

T = TypeVar("T")
ContextT = TypeVar("ContextT", bound=ContextModel)


class OneLine(Adapter):
    """A logger that writes each message on one line, so that a crew's text cannot add lines or control a terminal."""

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


def flow_run_id() -> str | None:
    """Return the id of the flow run around this call, or None."""
    context = FlowRunContext.get()
    return None if context is None or context.flow_run is None else str(context.flow_run.id)


async def read_all(read: Callable[..., Awaitable[Sequence[T]]], **filters: Any) -> list[T]:
    """Return all objects that a method of Prefect's client finds. It returns at most 200 at a time."""
    objects: list[T] = []
    while len(objects) % 200 == 0:
        page = await read(**filters, limit=200, offset=len(objects))
        objects += page
        if not page:
            break
    return objects


def embedded_server(port: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of Prefect's embedded server on a loopback port.

    They are the same as in Prefect's `SubprocessASGIServer`, which imports the whole server before it starts one. To
    ask for upstream: that class in a module of its own.
    """
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--lifespan", "on"]
    env = os.environ | get_current_settings().to_environment_variables(exclude_unset=True)
    env |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    command += ["--app-dir", str(Path(prefect.__file__).parents[1])]  # before modules in the working directory
    return [*command, "--host", "127.0.0.1", "--port", port, "--log-level", "error"], env


async def label_flow_run(*, name: str) -> None:
    """Rename the flow run around this call. If the Prefect API cannot be reached, log that and keep the name."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    if flow_run is None or name == flow_run.name:  # an earlier attempt of the flow run has renamed it
        return
    try:
        async with get_client() as client:
            await client.update_flow_run(flow_run.id, name=name)
        flow_run.name = name
    except PREFECT_ERRORS as error:
        run_logger().debug("The flow run could not be renamed: %s", error)


class Held(Protocol):
    """A flow run whose coroutine runs, or has run, on the crew worker of this process, named `worker`."""

    pool: str
    worker: str
    reason: str
    was_cancelled: bool

    @property
    def is_left(self) -> bool:
        """Whether the coroutine has ended, or has to, and nobody has cancelled the flow run."""
        ...


# Not an argument: the tasks, threads and subflows of a flow outlive its coroutine, and only their context is known to
# the worker. Not by id: a thread that has survived since before the flow run began again belongs to the ended one.
held_flow_run: ContextVar[Held | None] = ContextVar("prefect_crew_held", default=None)
"""The flow run around the call on a crew worker. None within its hooks, which may start crews."""


def left_behind(held: Held) -> asyncio.CancelledError:
    """Return the error of a call in a task or thread that outlives its flow run on a crew worker.

    It ends there as it would with the process of another worker: no `except Exception` takes it, so no task stores an
    outcome that the flow run's next start would find.
    """
    text = f"A task of flow run {flow_run_id()}, which has ended on this worker, starts no crew. {held.reason}".rstrip()
    run_logger().warning("%s", text)
    return asyncio.CancelledError(text)


def contexts_around(kind: type[ContextT]) -> list[ContextT]:
    """Return Prefect's contexts of a kind around this call, the innermost first.

    Prefect's public API returns only the innermost one. The context before is in the token that will restore it.
    """
    contexts: list[ContextT] = []
    context: Any = kind.get()
    while isinstance(context, kind):
        contexts.append(context)
        token = context._token  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        context = None if token is None else token.old_value
    return contexts


def is_entered(context: ContextModel) -> bool:
    """Return whether a Prefect context is still active. Other code may keep the object of a context that has ended."""
    return context._token is not None  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


# Requests

BUSY_FOR = 10.0
"""Seconds for which callers repeat a change while the Prefect API is busy."""
CROWDED_FOR = 300.0
"""Seconds for which each change is sent alone after the server refused one, since SQLite takes one writer at a time."""
LONGEST = 2.0
"""Seconds after which a request blocks no other one: it may hang, or Prefect's client may repeat it."""
AT_ONCE = 8
"""The most requests in flight. Waiting requests are sent by their urgency."""
CROWDED = 3
"""The most requests in flight after the server refused a change: a change that is sent alone waits for all of them."""
PATIENCE = 30.0
"""Seconds after which more urgent requests no longer overtake a request, so that an end does not wait for ever."""
NAMES_AT_ONCE = 1000
"""The number of names in one request from which on no further caller shares it."""
CLOSING = 0.003
"""Seconds after which this process notices that the server has closed a connection."""


class Urgency(IntEnum):
    """The order in which waiting requests are sent.

    If many runs begin at the same time, the first is kicked off before the second is claimed: the crew of the first
    already works then.
    """

    CONTINUE = 0
    """Requests between a claim and its stored kickoff id."""
    BEGIN = 1
    FINISH = 2
    """Requests that can wait until other runs have begun: the Variable `crew_kickoff_ID`, and the end of a run."""
    SHOW = 3


class _Turns:
    """Lets several callers through at a time. The most urgent caller goes next; among equals, the earliest."""

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self.crowded_until = float("-inf")
        """The time of the event loop until which each change is sent alone (`CROWDED_FOR`)."""
        self._waiting: list[tuple[float, int, bool, asyncio.Future[int]]] = []
        self._number = itertools.count()

    @asynccontextmanager
    async def turn(self, urgency: Urgency, *, alone: bool = False) -> AsyncGenerator[None]:
        """Wait for a turn. The block is the turn; for other callers it ends after `LONGEST` seconds at the latest.

        `alone`: while the server is crowded, wait until nobody else has a turn.
        """
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[int] = loop.create_future()
        # SQLite refuses a change that reads before it writes if another one writes in between.
        is_crowded = loop.time() < self.crowded_until
        rank = float("-inf") if urgency is Urgency.CONTINUE else loop.time() + urgency * PATIENCE
        heapq.heappush(self._waiting, (rank, next(self._number), alone and is_crowded, turn))
        more = (CROWDED if is_crowded else AT_ONCE) - self._most
        self._most += more
        self._pass_on(more)
        try:
            held = [await turn]
        except asyncio.CancelledError:
            self._pass_on(0 if turn.cancelled() else turn.result())
            raise
        timer = loop.call_later(LONGEST, lambda: self._pass_on(held.pop()))
        try:
            yield
        finally:
            timer.cancel()
            if held:
                self._pass_on(held.pop())

    def _pass_on(self, given_back: int) -> None:
        self._free += given_back
        while self._waiting:
            *_, alone, turn = self._waiting[0]
            if not turn.done():
                needs = self._most if alone else 1
                if needs > self._free:
                    return
                self._free -= needs
                turn.set_result(needs)
            heapq.heappop(self._waiting)


@dataclass
class _Batch:
    """The reads by name that share one request: their names, the number of callers, and the answer."""

    names: list[str] = field(default_factory=list[str])
    callers: int = 0
    rows: list[Any] | None = None
    error: Exception | None = None


class NamedReads:
    """Reads by exact names. Callers that come while a request is in flight share the next request.

    One request is one SQL statement of the server, so each caller gets a snapshot.
    """

    def __init__(self) -> None:
        self._next = _Batch()
        self._lock = asyncio.Lock()

    async def read(self, names: list[str], ask: Callable[[list[str]], Awaitable[list[Any]]], most: int) -> list[Any]:
        """Return the rows of `ask` for these names, and perhaps rows for other callers.

        `most`: the most rows in one answer of `ask`. An answer with so many may be cut, and the caller then asks alone.
        """
        if len(self._next.names) >= NAMES_AT_ONCE:
            self._next = _Batch()
        batch = self._next
        batch.names += names
        batch.callers += 1
        async with self._lock:
            if batch.rows is None and batch.error is None:  # else another caller has made the request
                if self._next is batch:
                    self._next = _Batch()  # a later caller needs a newer answer
                try:
                    batch.rows = await ask([*dict.fromkeys(batch.names)])
                except Exception as error:  # noqa: BLE001  raised below, for each caller
                    batch.error = error
        if batch.error is not None:
            raise batch.error
        rows = batch.rows or []
        return rows if batch.callers == 1 or len(rows) < most else await ask(names)


@dataclass
class _Loop:
    """The state that the requests of one event loop share."""

    requests: _Turns = field(default_factory=lambda: _Turns(AT_ONCE))
    named_reads: dict[str | None, NamedReads] = field(default_factory=dict[str | None, NamedReads])
    """By the URL of the Prefect API."""
    locks: dict[str, asyncio.Lock] = field(default_factory=dict[str, asyncio.Lock])


# By event loop, since a lock belongs to one. Module-level: the requests of one loop come from independent flows.
_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = weakref.WeakKeyDictionary()


def _this_loop() -> _Loop:
    loop = asyncio.get_running_loop()
    if loop not in _loops:
        for other in [other for other in list(_loops) if other.is_closed()]:
            _loops.pop(other, None)  # a lock for which somebody waited keeps its loop, and so this entry
    return _loops.get(loop) or _loops.setdefault(loop, _Loop())


def lock_here(name: str) -> asyncio.Lock:
    """Return the running event loop's lock with this name."""
    return _this_loop().locks.setdefault(name, asyncio.Lock())


def named_reads() -> NamedReads:
    """Return the `NamedReads` of the running event loop and the current Prefect API."""
    return _this_loop().named_reads.setdefault(get_current_settings().api.url, NamedReads())


def is_transient(error: Exception) -> bool:
    """Return whether the Prefect API may accept the same request a moment later."""
    if isinstance(error, PrefectHTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, TRANSPORT_ERRORS)


def is_busy(error: Exception) -> bool:
    """Return whether the Prefect API was busy and did nothing (503), so that any request may be repeated."""
    return isinstance(error, PrefectHTTPStatusError) and error.response.status_code == 503


async def request_soon(
    client: PrefectClient,
    method: str,
    path: str,
    *,
    json: Any,
    give_up_after: float,
    urgency: Urgency = Urgency.CONTINUE,
    alone: bool = True,
    again: Callable[[Exception], bool] = is_transient,
    before_sending: Callable[[], None] | None = None,
) -> httpx.Response:
    """Make one change. Repeat it while the Prefect API is unreachable or busy, for `give_up_after` seconds.

    Prefect's own client sleeps 2 s after a 503.

    Args:
        client, method, path, json, give_up_after: The request. `json` may be a function that is called at the sending.
        urgency: The order among waiting changes.
        alone: False for a change that writes before it reads, which the server never refuses because of another change.
        again: Returns whether to repeat the request after an error.
        before_sending: Called once, right before the request is sent for the first time.

    Raises:
        TRANSPORT_ERRORS, PrefectHTTPStatusError: The error of the last attempt.
    """
    loop, turns = asyncio.get_running_loop(), _this_loop().requests
    until, delay = None, 0.02
    while True:
        try:
            async with turns.turn(urgency, alone=alone):
                if until is None:
                    until = loop.time() + give_up_after  # without the time in the queue
                    if before_sending is not None:
                        before_sending()
                return await _request_once(client, method, path, json=json() if callable(json) else json)
        except (*TRANSPORT_ERRORS, PrefectHTTPStatusError) as error:
            if is_busy(error):
                turns.crowded_until = loop.time() + CROWDED_FOR
                # The server closes the connection after such an answer (its exception reaches uvicorn): another request
                # on that connection would be lost.
                await asyncio.sleep(CLOSING)
            if not again(error) or (until is not None and loop.time() + delay > until):
                raise
        # A random pause, so that callers that met on a locked database do not meet again.
        await asyncio.sleep(delay * (0.5 + random.random()))  # noqa: S311  no secret depends on it
        delay = min(delay * 1.7, 10.0)


async def read_in_turn(client: PrefectClient, path: str, *, json: Any) -> httpx.Response:
    """Read objects by a filter from the Prefect API, by a POST, when it is this request's turn."""
    async with _this_loop().requests.turn(Urgency.CONTINUE):
        return await client.request("POST", path, json=json)  # pyright: ignore[reportArgumentType] - a true route


async def _request_once(client: PrefectClient, method: str, path: str, *, json: Any) -> httpx.Response:
    """Make one request with the client's own connection, address and credentials, and without its retries.

    It uses private API, since Prefect's client has no request without retries, and waits 2 s after a 503 even if it is
    set to retry nothing (prefect/client/base.py). To ask for upstream: `Retry-After` on the 503 of a locked SQLite.
    """
    inner = cast("Any", client)._client  # noqa: SLF001
    request: httpx.Request = inner.build_request(method, path, json=json)
    if getattr(inner, "enable_csrf_support", False):
        await inner._add_csrf_headers(request)  # noqa: SLF001
    response: httpx.Response = await cast("Any", super(PrefectHttpxAsyncClient, inner)).send(request)
    try:
        response.raise_for_status()
    except STATUS_ERRORS as error:
        raise PrefectHTTPStatusError.from_httpx_error(error) from None
    return response
