"""A crew server that ends without a word, by the fault `crash`, and comes back with the same runs.

Importing this adds the fault.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prefect_crew.devserver import CrewServer, Fault
from prefect_crew.devserver._faults import FAULTS, Kind

FAULTS["crash"] = Kind("the server ends without a word")


class CrashingServer(CrewServer):
    """`crashed` is set while it is down, and `restart` brings it back: runs that had not ended begin again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.crashed = threading.Event()

    def crash(self) -> None:
        """End at once. On the server's event loop."""
        assert self._web is not None
        self.abandon()
        for server in self._web.servers:
            server.close()
        for connection in list(self._web.server_state.connections):
            connection.transport.abort()  # pyright: ignore[reportAttributeAccessIssue]
        self.crashed.set()

    def restart(self) -> None:
        """Start again, with the same runs."""
        self.stop()
        self.crashed.clear()
        self.start()

    def abandon(self) -> None:
        """Send and finish nothing from now on, and let no request hang."""
        assert self._web is not None
        self._web.should_exit = True
        for task in self._tasks:
            task.cancel()

    def open(self) -> None:
        """Begin the runs that had not ended. On the event loop of a new life."""
        self._sender._slots = asyncio.Semaphore(32)  # the old one belongs to the old loop  # pyright: ignore
        for run in self.runs:
            if not run.state.ended:
                again = replace(run)
                again.faults |= {name: value for name, value in run.faults.items() if name in ("stuck", "forgotten")}
                self._start(again)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncGenerator[None, None]:
        self.open()
        async with super()._lifespan(app):
            yield

    async def _spoiled(self, fault: Fault, request: Request) -> Response:
        if fault.base_name != "crash":
            return await super()._spoiled(fault, request)
        self.crash()
        return await self._dropped(request)
