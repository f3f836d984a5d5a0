"""A crew server that ends without a word, by the fault `crash`, and comes back with the same runs.

Importing this adds the fault.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from anyio.abc import TaskStatus
from starlette.responses import Response

from prefect_crew._internal.web_server import WebServer
from prefect_crew.devserver import CrewServer, Fault
from prefect_crew.devserver._faults import FAULTS, Kind
from prefect_crew.devserver._server import Connection, _Uvicorn

FAULTS["crash"] = Kind("the server ends without a word")


class CrashingServer(CrewServer):
    """`crashed` is set while it is down, and `restart` brings it back: runs that had not ended begin again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.crashed = threading.Event()
        self._uvicorn: WebServer | None = None

    def crash(self) -> None:
        """End at once. On the server's event loop."""
        assert self._uvicorn is not None
        self.abandon()
        for server in self._uvicorn.servers:
            server.close()
        for connection in list(self._uvicorn.server_state.connections):
            Connection(connection.transport).drop()  # pyright: ignore[reportArgumentType]
        self._uvicorn.stop()
        self.crashed.set()

    def restart(self) -> None:
        """Start again, with the same runs."""
        self.stop()
        self.crashed.clear()
        self.start()

    def abandon(self) -> None:
        """Send and finish nothing from now on, and let no request hang."""
        for connection in self.hanging:
            connection.drop()
        for task in self._tasks:
            task.cancel()

    def open(self) -> None:
        """Begin the runs that had not ended. On the event loop of a new life."""
        self._sender._slots = asyncio.Semaphore(32)  # the old one belongs to the old loop
        for run in self.runs:
            if not run.state.ended:
                again = replace(run)
                again.faults |= {name: value for name, value in run.faults.items() if name in ("stuck", "forgotten")}
                self.crew_runs.start(again)

    async def _serve(self, listener: Any, *, task_status: TaskStatus[WebServer]) -> None:
        with listener:
            uvicorn = self._uvicorn = _Uvicorn(self, on_started=lambda: task_status.started(uvicorn))
            await uvicorn.serve(sockets=[listener])

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncGenerator[None, None]:
        self.open()
        async with super()._lifespan(app):
            yield

    def _spoiled(self, fault: Fault, path: str) -> Response:
        return _Crash(self) if fault.base_name == "crash" else super()._spoiled(fault, path)


class _Crash(Response):
    def __init__(self, server: CrashingServer) -> None:
        super().__init__()
        self._server = server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._server.crash()
        while (await receive())["type"] != "http.disconnect":
            pass
