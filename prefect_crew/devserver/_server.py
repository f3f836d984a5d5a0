"""The dev server on a port: in a thread of this process, or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self, Unpack

from prefect_crew._internal.web_server import WebServer, open_listener, print_line, url_of
from prefect_crew.devserver._app import Connection, ConnectionProtocol, CrewApp, ServerOptions, Spec
from prefect_crew.devserver._runs import Run

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew

_START_SECONDS = 30.0


class CrewServer(CrewApp):
    """A crew server on a port of 127.0.0.1, in a thread of this process; `with` starts and stops it.

    Args:
        spec: What is served; see `load_program`. A mapping serves several crews, each under `/NAME`.
        port: The port; 0 takes a free one.
        **options: As below.

    Options:
        - `token`: The bearer token that every request but `GET /` must carry; a random one by default.
        - `response_format`: How answers are worded: "documented" is the published API to the letter, "union" has
          everything that strict clients look for, "live" is what hosted crews answer.
        - `generation`: How the bodies of webhooks are worded: "first" or "later".
        - `faults`: What goes wrong, as `Fault` or as text such as "status:500@1", with those that a script brings.
        - `speed`: The seconds of scripts are divided by it.
        - `stop`: Whether there is `/stop`; the published contract has none.
        - `max_runs`: At most this many runs of a crew at once; later ones are pending. None: no limit for scripts, 100
          for CrewAI code.
        - `review_webhook`: Where people are asked as a Flow does it: by a signed webhook, answered at its callback URL.

    Attributes:
        port: The port; 0 before the first start of a server that takes a free one.
        token: The bearer token. Setting it rotates it: from then on the old one gets 401.
        faults: What goes wrong; may be changed while the server runs.
        requests: Requests by place: inputs, kickoff, status, resume, stop, health.
        unauthorized: How many requests had a missing or wrong token; they count nowhere else.
        accepted: The kickoffs that started a run: kickoff id to meta.
        crashed: Set when the fault `crash` has ended the server; `restart()` brings it back.

    Raises:
        ValueError: An option or the crew makes no sense; the text says which and why.
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Spec] = "echo",
        *,
        port: int = 0,
        **options: Unpack[ServerOptions],
    ) -> None:
        super().__init__(spec, **options)
        self.crash = self._crash
        self.port: int = port
        self.crashed: threading.Event = threading.Event()
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
    def headers(self) -> dict[str, str]:
        """The request headers that carry the token."""
        return {"Authorization": f"Bearer {self.token}"}

    def run(self, kickoff_id: str) -> Run:
        """Return one run.

        Raises:
            KeyError: There is none with this id.
        """
        return {run.id: run for run in self.runs}[kickoff_id]

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
        self.crashed.clear()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(listener, started), name=f"crew server {self.url}", daemon=True
        )
        self._thread.start()
        try:
            started.result(_START_SECONDS)
        except (Exception, SystemExit) as error:
            self._thread = None
            raise RuntimeError(f"{self!r} does not start: {error}") from error

    def stop(self) -> None:
        """Stop the server: runs in flight are cancelled, and the port is free when this returns. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            if self._loop is not None and self._server is not None:
                with contextlib.suppress(RuntimeError):  # it crashed, and its loop is closed
                    self._loop.call_soon_threadsafe(self._server.stop)
            thread.join()

    def restart(self) -> None:
        """Start again, also after a crash. Runs that had not ended begin again, under their ids."""
        self.stop()
        self.start()

    def _main(self, listener: socket.socket, started: Future[None]) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._server = _DevServer(self, on_started=lambda: started.set_result(None))
            await self._server.serve(sockets=[listener])

        with listener:
            try:
                asyncio.run(main())
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)  # for start() to raise

    def _crash(self) -> None:
        self.abandon()
        if self._server is not None:
            for server in self._server.servers:
                server.close()
            for connection in list(self._server.server_state.connections):
                Connection(connection.transport).reset()
            self._server.stop()
        self.crashed.set()


class _DevServer(WebServer):
    """Serves an app."""

    def __init__(self, app: CrewApp, *, on_started: Callable[[], None]) -> None:
        super().__init__(app.asgi, on_started=on_started, http=ConnectionProtocol, timeout_graceful_shutdown=1)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the runs and the requests that never answer, then shut down."""
        await self._app.close()
        await super().shutdown(sockets)


def serve(
    spec: Spec | Mapping[str, Spec] = "travel",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    **options: Unpack[ServerOptions],
) -> int:
    """Serve a crew until Ctrl-C or SIGTERM; runs in flight are cancelled then. Returns 0.

    Standard output gets one line once the server answers: where it is, and the token where it is a random one. The
    other arguments are those of `CrewServer`.

    Raises:
        ValueError: An option or the crew makes no sense (ScriptError, ProgramNotFoundError and FaultError are
            ValueErrors).
        OSError: The port is taken, or the host is not this machine's.
    """
    app = CrewApp(spec, **options)
    with contextlib.closing(open_listener(host, port)) as listener:
        name, served = next(iter(app.crews.items()))
        inputs = "".join(f" -i {shlex.quote(item.name)}=…" for item in served.program.inputs() if item.required)
        crew = f"{url_of(listener)}/{name}".rstrip("/")
        line = f"{'' if options.get('token') else f'CREW_TOKEN={app.token} '}prefect-crew run {crew}{inputs}"
        line = f"Serving the crew {served.program.name} at {crew}  Try: {line}  Stop: Ctrl-C"
        asyncio.run(_DevServer(app, on_started=lambda: print_line(line)).serve(sockets=[listener]))
    return 0
