"""The dev server in this process or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import shlex
import signal
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from starlette.applications import Starlette

from prefect_crew.devserver.app import STATUS_PATHS, create_app, runtime_of
from prefect_crew.devserver.faults import Fault, Faults
from prefect_crew.devserver.middleware import ConnectionProtocol, reset
from prefect_crew.devserver.programs import load_program
from prefect_crew.devserver.runs import Execution, Journal, Program
from prefect_crew.devserver.scripts import CrewScript, ScriptedProgram
from prefect_crew.devserver.state import Counters, Runtime
from prefect_crew.devserver.transport import InProcessTransport
from prefect_crew.devserver.webhooks import Generation

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew


def to_stdout(line: str) -> None:
    """Print a line at once: whoever started this as a process reads it through a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def until_signalled(server: uvicorn.Server) -> Generator[None, None, None]:
    """Stop the server at the first SIGINT or SIGTERM, and at once at the second."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread; whoever runs this elsewhere stops it in another way
        return

    def handle(number: int, frame: FrameType | None) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listener(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address; port 0 takes a free one.

    Raises:
        OSError: The port is taken, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off; left on, it costs each answer 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # so that a server which comes back can take its port again
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


class WebServer(uvicorn.Server):
    """Serves an app that `create_app` made; stop it by setting `should_exit`. Signals are its caller's concern."""

    def __init__(self, app: Starlette, *, on_started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=ConnectionProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._runtime = runtime_of(app)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:  # older uvicorns return from a start that failed
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let go of requests that never answer, then shut down."""
        await self._runtime.close()
        await super().shutdown(sockets)

    def crash(self) -> None:
        """Break all connections, refuse new ones and end. On the event loop."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            reset(connection.transport)
        self.should_exit = self.force_exit = True


Spec = str | os.PathLike[str] | CrewScript | Program
_START_SECONDS = 30.0
_S = TypeVar("_S", bound="LocalServer")


class LocalServer(ABC):
    """What both kinds of server have in common.

    Args:
        spec: What is served: see `programs.load_program`. A mapping serves several crews, each under `/NAME`.
        token: The bearer token; a random one by default.
        faults, seed: What goes wrong; beside those that a script brings.
        speed: Seconds of scripts are divided by it.
        options: As `create_app` takes them: dialect, generation, status_paths, stop, max_runs, journal, on_crash,
            inspect, new_id.

    Attributes:
        faults: May be added to and cleared while the server runs.
        counters: Requests, answers, kickoffs; they go on over a restart.
        crashed: Set when the fault `crash` has ended the server; `restart()` brings it back.
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Spec] = "echo",
        *,
        token: str | None = None,
        faults: Iterable[Fault | str] = (),
        seed: int | None = None,
        speed: float = 1.0,
        **options: Any,
    ) -> None:
        many = spec if isinstance(spec, Mapping) else {"": spec}
        self._programs = {name: load_program(one, speed=speed) for name, one in many.items()}
        scripts = [one.script for one in self._programs.values() if isinstance(one, ScriptedProgram)]
        scripted = [fault for script in scripts for fault in script.faults]
        first_seed = next((script.seed for script in scripts if script.seed), 0)
        self.faults = Faults([*scripted, *faults], seed=first_seed if seed is None else seed)
        self.counters = Counters()
        self.crashed = threading.Event()
        self._token = token or secrets.token_urlsafe(24)
        self._options = options
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._app = self._new_app()
        self._used = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    def __enter__(self: _S) -> _S:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    @abstractmethod
    def url(self) -> str:
        """Base URL of the crew, without a slash at the end."""

    @abstractmethod
    async def _serve(self) -> None:
        """Run until `_stop`; set `_ready` once requests are answered."""

    @abstractmethod
    def _stop(self) -> None:
        """Make `_serve` end, from any thread."""

    @abstractmethod
    def _crash(self) -> None:
        """Make `_serve` end at once, on its own event loop, and break all connections."""

    @property
    def token(self) -> str:
        """The bearer token. Setting it rotates it: from then on the old one gets 401."""
        return self._token

    @token.setter
    def token(self, token: str) -> None:
        self._token = self.runtime.token = token

    @property
    def headers(self) -> dict[str, str]:
        """The request headers that carry the token."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def app(self) -> Starlette:
        """The ASGI app that is running; another one after each restart."""
        return self._app

    @property
    def runtime(self) -> Runtime:
        """What the app shares."""
        return runtime_of(self._app)

    @property
    def runs(self) -> list[Execution]:
        """All runs that this server knows, oldest first."""
        return self.runtime.runs

    @property
    def kickoffs(self) -> int:
        """How many kickoffs have started a run, restarts included."""
        return self.counters.kickoffs

    @property
    def kickoffs_by_key(self) -> Counter[str]:
        """The same for each `idempotency_key` in the kickoffs' meta."""
        return self.counters.kickoffs_by_key

    @property
    def requests(self) -> Counter[str]:
        """Requests by place: inputs, kickoff, status, resume, stop, health."""
        return self.counters.requests

    def run(self, kickoff_id: str) -> Execution:
        """Return one run.

        Raises:
            KeyError: There is none with this id.
        """
        found = next((run for run in self.runs if run.id == kickoff_id), None)
        if found is None:
            raise KeyError(f"the server knows no run {kickoff_id}")
        return found

    def crew(self, **fields: Any) -> DeployedCrew:
        """Return a Prefect block for this server; `fields` are more of the block's own."""
        from prefect_crew.blocks import DeployedCrew

        known: dict[str, Any] = {"url": self.url, "token": self.token}
        return DeployedCrew(**known | fields)

    def start(self) -> None:
        """Start the server and return once it answers.

        Raises:
            OSError: The port is taken, or the journal cannot be written.
            RuntimeError: It runs already, or does not start.
        """
        if self._thread is not None:
            raise RuntimeError(f"{self!r} runs already")
        if self._used:
            self._app = self._new_app()
        self._used = True
        self._ready.clear()
        self.crashed.clear()
        self._failure = None
        if self.runtime.journal:
            self.runtime.journal.check()
        self._open()
        self._thread = threading.Thread(target=self._main, name=f"crew server {self.url}", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_SECONDS) or self._failure:
            self._thread = None
            self._close()
            raise RuntimeError(f"{self!r} does not start") from self._failure

    def stop(self) -> None:
        """Stop the server: runs in flight are cancelled, and the port is free when this returns. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop()
            thread.join()
        self._close()

    def restart(self) -> None:
        """Start again after a crash, or stop and start: a new app with the same address, token, counters and journal.

        Without a journal, the runs from before are unknown, as they would be on a real server.
        """
        self.stop()
        self.start()

    def _new_app(self) -> Starlette:
        return create_app(
            self._programs.get("", self._programs),
            token=self._token,
            faults=self.faults,
            counters=self.counters,
            crash=self._crash_now,
            **self._options,
        )

    @abstractmethod
    def _open(self) -> None:
        """Take what the server needs, in the caller's thread, so that errors appear there."""

    @abstractmethod
    def _close(self) -> None:
        """Give it back; idempotent."""

    def _crash_now(self) -> None:
        self.runtime.abandon()
        self._crash()
        self.crashed.set()

    def _main(self) -> None:
        try:
            asyncio.run(self._hold())
            if not self._ready.is_set():
                self._failure = RuntimeError("it ended before it answered")
        except BaseException as error:  # noqa: BLE001 - whatever it was, the thread that waits in start() must hear of it
            self._failure = error
        finally:
            self._loop = None
            self._ready.set()

    async def _hold(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._serve()


class CrewServer(LocalServer):
    """A crew server on a port of the loopback interface. `port=0` takes a free one."""

    def __init__(self, spec: Spec | Mapping[str, Spec] = "echo", *, port: int = 0, **options: Any) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._uvicorn: WebServer | None = None
        super().__init__(spec, **options)

    @property
    def url(self) -> str:
        """Base URL of the crew; its port is 0 before the first start of a server that takes a free one."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """The port; 0 before the first start of a server that takes a free one."""
        return self._port

    def _open(self) -> None:
        self._socket = listener("127.0.0.1", self._port)
        self._port = self._socket.getsockname()[1]

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _serve(self) -> None:
        if self._socket is None:
            raise RuntimeError("the socket was not opened")
        self._uvicorn = WebServer(self._app, on_started=self._ready.set)
        await self._uvicorn.serve(sockets=[self._socket])

    def _stop(self) -> None:
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def _crash(self) -> None:
        if self._uvicorn is not None:
            self._uvicorn.crash()


class InProcessCrewServer(LocalServer):
    """A crew server without a port: our client finds it by its host name, which no other program can reach.

    `transport` gives the same to any httpx client: `httpx.AsyncClient(transport=server.transport)`.
    """

    _numbers = itertools.count(1)

    def __init__(self, spec: Spec | Mapping[str, Spec] = "echo", *, host: str | None = None, **options: Any) -> None:
        self._host = host or f"crew-{next(self._numbers)}.test"
        self.transport = InProcessTransport()
        self._ended: asyncio.Event | None = None
        self._registration = contextlib.ExitStack()
        super().__init__(spec, **options)

    @property
    def url(self) -> str:
        """Base URL of the crew, which only our client and `transport` know."""
        return f"https://{self._host}"

    def _open(self) -> None:
        from prefect_crew.client._transport import in_process

        self._registration.enter_context(in_process(self._host, self.transport))

    def _close(self) -> None:
        self._registration.close()

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        async with self._app.router.lifespan_context(self._app):
            self.transport.open(self._app)
            self._ready.set()
            try:
                await self._ended.wait()
            finally:
                self.transport.close()
                self.runtime.closing.set()

    def _stop(self) -> None:
        loop, ended = self._loop, self._ended
        if loop is not None and ended is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself, by a crash
                loop.call_soon_threadsafe(ended.set)

    def _crash(self) -> None:
        self.transport.crash()
        if self._ended is not None:
            self._ended.set()


def serve(
    spec: str = "travel",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    dialect: str = "documented",
    generation: Generation = "first",
    faults: Iterable[str | Fault] = (),
    seed: int | None = None,
    speed: float = 1.0,
    journal: str | os.PathLike[str] | None = None,
    on_crash: str = "rerun",
    inspect: bool = False,
    status_paths: Iterable[str] = STATUS_PATHS,
    no_stop: bool = False,
    max_runs: int | None = None,
    announce: Callable[[str], None] | None = None,
) -> int:
    """Serve a crew until Ctrl-C or SIGTERM; runs in flight are cancelled then. Returns 0.

    Args:
        spec: What `load_program` takes.
        host, port: Where; port 0 takes a free one.
        token: The bearer token; None makes a random one, which is announced. A given one is not shown.
        faults, seed: In text form; beside those that the script brings. The seed defaults to the script's.
        speed: Seconds of a script are divided by it.
        journal, on_crash, dialect, generation, inspect, status_paths, max_runs: See `create_app`.
        no_stop: Leave `/stop` out, as servers may.
        announce: Gets the line that says where the server is, once it answers; by default it goes to standard output.

    Raises:
        ValueError: Any of these makes no sense; the text says which and why (ScriptError, ProgramNotFoundError and
            FaultError are ValueErrors).
        OSError: The port is taken, the host is not this machine's, or the journal cannot be written.
    """
    program = load_program(spec, speed=speed)
    script = program.script if isinstance(program, ScriptedProgram) else None
    chosen = seed if seed is not None else script.seed if script else 0
    if on_crash not in ("rerun", "lose"):
        raise ValueError(f"on_crash must be rerun or lose, not {on_crash!r}.")
    if generation not in ("first", "later"):  # pyright: ignore[reportUnnecessaryContains] - it may come from a command line
        raise ValueError(f"generation must be first or later, not {generation!r}.")
    app = create_app(
        program,
        token=token or secrets.token_urlsafe(24),
        dialect=dialect,
        generation=generation,
        faults=Faults([*(script.faults if script else ()), *faults], seed=chosen),
        status_paths=status_paths,
        stop=not no_stop,
        max_runs=max_runs,
        journal=journal,
        on_crash="lose" if on_crash == "lose" else "rerun",
        inspect=inspect,
    )
    if journal:
        Journal(journal).check()
    bound = listener(host, port)
    line = _line(program, _url(bound), None if token else app.state.runtime.token)
    server = WebServer(app, on_started=lambda: (announce or to_stdout)(line))
    with contextlib.closing(bound), until_signalled(server):
        asyncio.run(server.serve(sockets=[bound]))
    return 0


def _url(bound: socket.socket) -> str:
    host, port = str(bound.getsockname()[0]), int(bound.getsockname()[1])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - what listens everywhere is reached here
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _line(program: Program, url: str, token: str | None) -> str:
    needed = [item.name for item in program.inputs() if item.required]
    inputs = "".join(f" -i {shlex.quote(name)}=…" for name in needed)
    before = f"CREW_TOKEN={token} " if token else ""
    return f"Serving the crew {program.name} at {url}  Try: {before}prefect-crew run {url}{inputs}  Stop: Ctrl-C"
