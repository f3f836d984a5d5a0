"""The dev server on a port: in a thread of this process, or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, Unpack

from starlette.applications import Starlette

from prefect_crew._internal.web_server import WebServer, open_listener, print_line, url_of
from prefect_crew.devserver._app import (
    Connection,
    ConnectionProtocol,
    Counters,
    ServerOptions,
    ServerState,
    Spec,
    create_app,
    state_of,
)
from prefect_crew.devserver._faults import Faults
from prefect_crew.devserver._runs import Run

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew

_START_SECONDS = 30.0


class CrewServer:
    """A crew server on a port of 127.0.0.1, in a thread of this process; `with` starts and stops it.

    Args:
        spec: What is served; see `load_program`. A mapping serves several crews, each under `/NAME`.
        port: The port; 0 takes a free one.
        token: The bearer token; a random one by default.
        options: response_format, generation, faults, speed, stop, max_runs, review_webhook; see `create_app`.

    Attributes:
        port: The port; 0 before the first start of a server that takes a free one.
        state: What the server holds: its crews and their runs, counters, faults and webhooks.
        faults: What goes wrong; may be added to and cleared while the server runs.
        counters: Requests and kickoffs, counted over restarts.
        requests: Requests by place: inputs, kickoff, status, resume, stop, health.
        crashed: Set when the fault `crash` has ended the server; `restart()` brings it back.

    Raises:
        ValueError: An option or the crew makes no sense; the text says which and why.
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Spec] = "echo",
        *,
        port: int = 0,
        token: str | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        self._app = create_app(spec, token=token or secrets.token_urlsafe(24), **options)
        self.state: ServerState = state_of(self._app)
        self.state.crash = self._crash
        self.port: int = port
        self.faults: Faults = self.state.faults
        self.counters: Counters = self.state.counters
        self.requests: Counter[str] = self.counters.requests
        self.crashed: threading.Event = threading.Event()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: WebServer | None = None

    def __repr__(self) -> str:
        return f"<CrewServer {self.url}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base URL of the crew, without a slash at the end. Its port may be 0 before the first start."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        """The bearer token. Setting it rotates it: from then on the old one gets 401."""
        return self.state.token

    @token.setter
    def token(self, token: str) -> None:
        self.state.token = token

    @property
    def headers(self) -> dict[str, str]:
        """The request headers that carry the token."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def runs(self) -> list[Run]:
        """All runs that this server knows, oldest first."""
        return self.state.runs

    @property
    def kickoffs(self) -> int:
        """How many kickoffs have started a run."""
        return self.counters.kickoffs

    @property
    def kickoffs_by_key(self) -> Counter[str]:
        """How many kickoffs have started a run, by the `idempotency_key` in their meta."""
        return self.counters.kickoffs_by_key

    def run(self, kickoff_id: str) -> Run:
        """Return one run.

        Raises:
            KeyError: There is none with this id.
        """
        for run in self.runs:
            if run.id == kickoff_id:
                return run
        raise KeyError(f"the server knows no run {kickoff_id}")

    def crew(self, **fields: Any) -> DeployedCrew:
        """Return a Prefect block for this server; `fields` are more of the block's own."""
        from prefect_crew.blocks import DeployedCrew

        values: dict[str, Any] = {"url": self.url, "token": self.token}
        return DeployedCrew(**values | fields)

    def start(self) -> None:
        """Start the server and return once it answers.

        Raises:
            OSError: The port is taken.
            RuntimeError: It runs already, or does not start.
        """
        if self._thread is not None:
            raise RuntimeError(f"{self!r} runs already")
        listener = open_listener("127.0.0.1", self.port)  # here, so that its error is the caller's
        self.port = listener.getsockname()[1]
        self._started.clear()
        self.crashed.clear()
        self._failure = None
        self._thread = threading.Thread(
            target=self._main, args=(listener,), name=f"crew server {self.url}", daemon=True
        )
        self._thread.start()
        if not self._started.wait(_START_SECONDS) or self._failure:
            self._thread = None
            raise RuntimeError(f"{self!r} does not start") from self._failure

    def stop(self) -> None:
        """Stop the server: runs in flight are cancelled, and the port is free when this returns. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            if self._loop is not None and self._server is not None:
                with contextlib.suppress(RuntimeError):  # it crashed, and its loop is closed
                    self._loop.call_soon_threadsafe(self._server.stop)
            thread.join()

    def restart(self) -> None:
        """Start again after a crash, or stop and start, with the same address, token, counters and runs.

        Runs that had not ended begin again, under their ids.
        """
        self.stop()
        self.start()

    def _main(self, listener: socket.socket) -> None:
        try:
            asyncio.run(self._serve(listener))
        except BaseException as error:  # noqa: BLE001 - whatever it was, start() raises it
            self._failure = error
        finally:
            listener.close()
            self._started.set()

    async def _serve(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = _DevServer(self._app, on_started=self._started.set)
        await self._server.serve(sockets=[listener])

    def _crash(self) -> None:
        self.state.abandon()
        if self._server is not None:
            for server in self._server.servers:
                server.close()
            for connection in list(self._server.server_state.connections):
                Connection(connection.transport).reset()
            self._server.stop()
        self.crashed.set()


class _DevServer(WebServer):
    """Serves an app that `create_app` made."""

    def __init__(self, app: Starlette, *, on_started: Callable[[], None]) -> None:
        super().__init__(app, on_started=on_started, http=ConnectionProtocol, timeout_graceful_shutdown=1)
        self._state = state_of(app)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the runs and the requests that never answer, then shut down."""
        await self._state.close()
        await super().shutdown(sockets)


def serve(
    spec: Spec | Mapping[str, Spec] = "travel",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    announce: Callable[[str], None] = print_line,
    **options: Unpack[ServerOptions],
) -> int:
    """Serve a crew until Ctrl-C or SIGTERM; runs in flight are cancelled then. Returns 0.

    Args:
        spec: What is served; see `load_program`.
        host: The address to listen on.
        port: 0 takes a free one.
        token: The bearer token; None makes a random one, which is announced. A given one is not shown.
        announce: Gets the line that says where the server is, once it answers; by default it goes to standard output.
        options: response_format, generation, faults, speed, stop, max_runs, review_webhook; see `create_app`.

    Raises:
        ValueError: An option or the crew makes no sense; the text says which and why (ScriptError, ProgramNotFoundError
            and FaultError are ValueErrors).
        OSError: The port is taken, or the host is not this machine's.
    """
    app = create_app(spec, token=token or secrets.token_urlsafe(24), **options)
    with contextlib.closing(open_listener(host, port)) as listener:
        line = _line(state_of(app), url_of(listener), show_token=not token)
        asyncio.run(_DevServer(app, on_started=lambda: announce(line)).serve(sockets=[listener]))
    return 0


def _line(state: ServerState, url: str, *, show_token: bool) -> str:
    name, runs = next(iter(state.crews.items()))
    inputs = "".join(f" -i {shlex.quote(item.name)}=…" for item in runs.program.inputs() if item.required)
    token = f"CREW_TOKEN={state.token} " if show_token else ""
    crew = f"{url}/{name}" if name else url
    return f"Serving the crew {runs.program.name} at {crew}  Try: {token}prefect-crew run {crew}{inputs}  Stop: Ctrl-C"
