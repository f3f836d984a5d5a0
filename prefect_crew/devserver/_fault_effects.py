"""What the faults of an answer do: they spoil it, or break the connection that it should go over."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from http import HTTPStatus
from typing import Any

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_crew.devserver._faults import Fault
from prefect_crew.devserver._state import ServerState

_CONNECTION = "prefect_crew.connection"


class Connection:
    """The TCP connection that a request came over."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def drop(self) -> None:
        """Close it: the client sees that the server disconnected without (the rest of) an answer."""
        self._transport.abort()  # close() would wait for an answer that never comes

    def reset(self) -> None:
        """Reset it (TCP RST): the client sees a read error."""
        with contextlib.suppress(OSError):  # the client was faster
            # A linger time of zero makes the kernel send RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()


def with_connection(connection: Connection) -> dict[str, Any]:
    """Return the ASGI state of a request that came over a connection."""
    return {_CONNECTION: connection}


class ConnectionProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with the connection in the state of each request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Hand the connection to its requests."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, **with_connection(Connection(transport))}


def spoiled(fault: Fault, answer: Response | None, path: str, state: ServerState) -> Response:
    """Return what is sent in place of the answer, which is None where the fault comes before the work."""
    match fault.base_name:
        case "drop" | "reset" | "timeout" | "cut" | "crash":
            return BrokenAnswer(fault, answer, state)
        case "redirect":
            return Response(status_code=307, headers={"Location": f"/elsewhere{path}"})
        case "html":
            return HTMLResponse("<!DOCTYPE html><title>Sign in</title><body><h1>Sign in</h1></body>")
        case "garbage":
            return Response(b'{"kickoff_id": "', media_type="application/json")
        case "empty":
            return Response(b"", media_type="application/json")
        case "no-id":
            return JSONResponse({"message": "Crew started"})
        case code:
            status = HTTPStatus(int(code.removesuffix("-bare")))
            headers = None if fault.value is None else {"Retry-After": f"{fault.value:g}"}
            body = state.response_format.error(status.phrase, f"The fault {fault} was asked for.")
            return JSONResponse(body, status, headers)


class BrokenAnswer(Response):
    """No answer, or the first half of one, and the end of the connection. `status_code` is 0 where nothing is sent."""

    def __init__(self, fault: Fault, answer: Response | None, state: ServerState) -> None:
        super().__init__(answer.body if answer else b'{"status":"running"}', media_type="application/json")
        self.status_code = 0 if fault.base_name != "cut" else answer.status_code if answer else 200
        self._fault = fault
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Break the connection, and return once the client is gone."""
        try:
            connection: Connection = scope["state"][_CONNECTION]
        except KeyError:
            message = "Faults of the connection need this package's own server: CrewServer or serve()."
            raise RuntimeError(message) from None
        match self._fault.base_name:
            case "crash":
                self._state.crash()  # where the process lives on, it resets its connections
            case "reset":
                connection.reset()
            case "timeout":
                await self._wait(receive)
                connection.drop()
            case "cut":
                body = bytes(self.body)
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
                await asyncio.sleep(0.05)  # aborting a connection throws away what is still to be written
                connection.drop()
            case _:
                connection.drop()
        await _until_gone(receive)

    async def _wait(self, receive: Receive) -> None:
        """Wait for the fault's seconds, or until the client is gone or the server ends."""
        ends = {asyncio.ensure_future(_until_gone(receive)), asyncio.ensure_future(self._state.closing.wait())}
        try:
            await asyncio.wait(ends, timeout=self._fault.value or None, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
