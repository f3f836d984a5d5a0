"""`prefect-crew serve`: a crew server as a process, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import socket
from collections.abc import Callable, Iterable

from prefect_crew.server.app import STATUS_PATHS, create_app
from prefect_crew.server.bodies import Generation
from prefect_crew.server.faults import Fault, Faults
from prefect_crew.server.journal import Journal
from prefect_crew.server.local import CrewServer, InProcessCrewServer
from prefect_crew.server.program import Program
from prefect_crew.server.programs import load_program
from prefect_crew.server.scripted import ScriptedProgram
from prefect_crew.server.signals import to_stdout, until_signalled
from prefect_crew.server.web import WebServer, listener

__all__ = ["CrewServer", "InProcessCrewServer", "load_program", "serve"]


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
