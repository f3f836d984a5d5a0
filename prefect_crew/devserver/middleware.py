"""What stands before the endpoints: token, counters, faults."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import struct
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_crew.devserver._json import JSONAnswer
from prefect_crew.devserver.faults import Fault
from prefect_crew.devserver.state import Runtime
from prefect_crew.devserver.webhooks import CALLBACKS

_KEY = "prefect_crew.connection"


class Connection(Protocol):
    """The connection that a request came over."""

    def drop(self) -> None:
        """Close it. The client sees that the server disconnected without (the rest of) an answer."""
        ...

    def reset(self) -> None:
        """Reset it (TCP RST). The client sees a read error."""
        ...


def connection_of(scope: MutableMapping[str, Any]) -> Connection:
    """Return the connection of a request.

    Raises:
        RuntimeError: The app runs under a server that tells nothing of its connections.
    """
    try:
        return scope["state"][_KEY]
    except KeyError:
        raise RuntimeError(
            "Faults of the connection need this package's own server: use serve(), CrewServer or InProcessCrewServer."
        ) from None


def with_connection(state: MutableMapping[str, Any], connection: Connection) -> dict[str, Any]:
    """Return a copy of an ASGI state that carries the connection."""
    return {**state, _KEY: connection}


def reset(transport: asyncio.Transport) -> None:
    """Close a connection so that the other side sees it reset."""
    peer = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):  # the other side was faster
        # A linger time of zero makes the kernel send RST instead of FIN.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class _Socket:
    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def drop(self) -> None:
        self._transport.abort()  # close() would wait for an answer that never comes

    def reset(self) -> None:
        reset(self._transport)


class ConnectionProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with the connection in the state of each request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, and tell its requests of it."""
        super().connection_made(transport)
        self.app_state = with_connection(self.app_state, _Socket(transport))


_RUN_FAULTS = "prefect_crew.faults"
_FOREVER = 3.15e7


class TokenLayer:
    """Answers 401 to everything without the token, before anything else; only the health pages are open, and the
    callbacks of reviews, whose URLs hold a token of their own."""

    def __init__(self, app: ASGIApp, *, runtime: Runtime) -> None:
        self._app = app
        self._runtime = runtime
        mounts = ["", *(f"/{name}" for name in runtime.crews if name)]
        self._open = {f"{mount}{slash}" for mount in mounts for slash in ("", "/")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 401."""
        if scope["type"] != "http" or scope["path"] in self._open or CALLBACKS in scope["path"] or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        self._runtime.counters.unauthorized += 1
        code, body = self._runtime.dialect.error(
            401, "Unauthorized", "The bearer token is missing or wrong: send Authorization: Bearer TOKEN."
        )
        await JSONAnswer(body, code, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        # Both are compared in any case, so that the time tells nothing.
        return hmac.compare_digest(token.strip(), self._runtime.token.encode()) & (scheme.lower() == b"bearer")


def faults_of_run(scope: MutableMapping[str, Any]) -> list[Fault]:
    """Return the faults that this kickoff's run is to have."""
    return scope.get(_RUN_FAULTS, [])


class FaultLayer:
    """Counts the requests of one place and carries out the faults that they meet."""

    def __init__(self, app: ASGIApp, *, place: str, runtime: Runtime) -> None:
        self._app = app
        self._place = place
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, as well or as badly as the faults say."""
        counters = self._runtime.counters
        counters.requests[self._place] += 1

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                counters.answers[self._place, message["status"]] += 1
            await send(message)

        met = self._runtime.faults.draw(self._place, "any")
        scope[_RUN_FAULTS] = [fault for fault in met if fault.kind.group == "run"]
        here = [fault for fault in met if fault.kind.group == "answer"]
        late = sum(fault.value or 0 for fault in here if fault.kind.name == "latency")
        if late:
            # A slow server has the request: it goes on with it after a client that has lost its patience.
            receive = await _read(receive)
            await asyncio.sleep(late)
        fault = next((fault for fault in here if fault.kind.name not in ("latency", "forgotten")), None)
        if any(fault.kind.name == "forgotten" for fault in here):
            self._forget(scope)
        if fault is None:
            await self._app(scope, receive, counted)
            return
        answer = _Answer()
        if fault.after:
            await self._app(scope, receive, answer.send)
            # Nothing was accepted, so there is no "after"; but any answer can be cut off.
            if answer.status >= 400 and fault.kind.name != "cut":
                await answer.replay(counted)
                return
        else:
            await _body(receive)  # a socket that is closed with unread data is reset instead
        await self._effect(fault)(_Request(fault, scope, receive, counted, answer, self._runtime))

    def _forget(self, scope: Scope) -> None:
        id_ = scope.get("path_params", {}).get("id")
        for executions in self._runtime.crews.values():
            if run := executions.get(id_):
                run.forgotten = True

    def _effect(self, fault: Fault) -> Callable[[_Request], Awaitable[None]]:
        return _EFFECTS.get(fault.kind.name, _answer_with_code)


@dataclass
class _Answer:
    """An answer that was made and not sent."""

    messages: list[Message] = field(default_factory=list[Message])

    @property
    def status(self) -> int:
        return next((m["status"] for m in self.messages if m["type"] == "http.response.start"), 200)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages)

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    async def replay(self, send: Send) -> None:
        for message in self.messages:
            await send(message)


@dataclass
class _Request:
    fault: Fault
    scope: Scope
    receive: Receive
    send: Send
    answer: _Answer
    runtime: Runtime

    async def respond(self, response: Response) -> None:
        await response(self.scope, self.receive, self.send)


async def _read(receive: Receive) -> Receive:
    """Read a request's body, and return what gives it once more."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    rest = iter(messages)

    async def again() -> Message:
        return next(rest, None) or await receive()

    return again


async def _body(receive: Receive) -> None:
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drop(request: _Request) -> None:
    connection_of(request.scope).drop()
    await _gone(request.receive)


async def _reset(request: _Request) -> None:
    connection_of(request.scope).reset()
    await _gone(request.receive)


async def _timeout(request: _Request) -> None:
    ends = [asyncio.ensure_future(_gone(request.receive)), asyncio.ensure_future(request.runtime.closing.wait())]
    try:
        await asyncio.wait(ends, timeout=request.fault.value or _FOREVER, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
    await _drop(request)


async def _cut(request: _Request) -> None:
    body = request.answer.body or b'{"status":"running"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await request.send({"type": "http.response.start", "status": request.answer.status, "headers": headers})
    await request.send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
    await asyncio.sleep(0.05)  # aborting a connection throws away what is still to be written
    await _drop(request)


async def _redirect(request: _Request) -> None:
    await request.respond(Response(status_code=307, headers={"Location": "/elsewhere" + request.scope["path"]}))


async def _html(request: _Request) -> None:
    page = "<!DOCTYPE html><html><head><title>Sign in</title></head><body><h1>Sign in</h1></body></html>"
    await request.respond(HTMLResponse(page))


async def _garbage(request: _Request) -> None:
    await request.respond(Response(b'{"kickoff_id": "', media_type="application/json"))


async def _empty(request: _Request) -> None:
    await request.respond(Response(b"", media_type="application/json"))


async def _no_id(request: _Request) -> None:
    await request.respond(JSONAnswer({"message": "Crew started"}))


async def _crash(request: _Request) -> None:
    request.runtime.crash()
    await asyncio.sleep(_FOREVER)  # where the process lives on, whoever runs the app cancels this


async def _answer_with_code(request: _Request) -> None:
    name = request.fault.kind.name
    code = int(name.removesuffix("-bare"))
    status, body = request.runtime.dialect.error(code, _TITLES[code], f"The fault {request.fault} was asked for.")
    headers = {"Retry-After": f"{request.fault.value:g}"} if name in ("429", "503") else None
    await request.respond(JSONAnswer(body, status, headers=headers))


_TITLES = {
    400: "Bad request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    408: "Request timeout",
    422: "Validation error",
    429: "Too many requests",
    500: "Internal server error",
    502: "Bad gateway",
    503: "Service unavailable",
    504: "Gateway timeout",
}
_EFFECTS: dict[str, Callable[[_Request], Awaitable[None]]] = {
    "drop": _drop,
    "reset": _reset,
    "timeout": _timeout,
    "cut": _cut,
    "redirect": _redirect,
    "html": _html,
    "garbage": _garbage,
    "empty": _empty,
    "no-id": _no_id,
    "crash": _crash,
}
