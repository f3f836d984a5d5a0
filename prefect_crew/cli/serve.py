"""Commands to begin with: a demonstration, a project to start from; a crew and the webhook receiver, served."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.types import Port

from prefect_crew.cli import _output
from prefect_crew.cli._output import Progress
from prefect_crew.cli._prefect import page_url, reach_prefect
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect_crew.devserver import CrewServer

Host = Annotated[str, Parameter(name="--host", help="The address to listen on.")]
ListenPort = Annotated[Port, Parameter(name="--port", help="The port; 0 takes a free one.")]


def serve(
    spec: Annotated[str, Parameter(name="CREW")] = "travel",
    /,
    *,
    host: Host = "127.0.0.1",
    port: ListenPort = 8000,
    token: Annotated[str | None, Parameter(env_var="CREW_TOKEN")] = None,
    response_format: Literal["documented", "live"] = "documented",
    fault: list[str] | None = None,
    speed: float = 1.0,
    save: Annotated[str | None, Parameter(name="--save")] = None,
) -> None:
    """Serve a crew on this machine like a deployed crew, until Ctrl-C.

    Args:
        spec: A bundled crew (travel, echo), a YAML script, or CrewAI code as module:factory.
        token: The token that the server accepts; a random one if left out. Other users see it on the command line.
        response_format: How the server words its answers.
        fault: A fault to inject, such as kickoff:500@1 or status:latency=2@3-5; can be repeated. To list them:
            prefect-crew docs reference/dev-server
        speed: How many times faster a script runs than its seconds say.
        save: Store the crew as a Prefect block under this name, so that flows and commands need only the name.
    """
    from prefect_crew.devserver import CrewServer
    from prefect_crew.devserver.web_server import open_listener, print_line, url_of

    try:
        server = CrewServer(spec, token=token or None, response_format=response_format, faults=fault or (), speed=speed)
    except ValueError as error:
        raise ConfigurationError("; ".join(str(error).splitlines())) from error
    with _listening(host, port):
        listener = open_listener(host, port)
    with listener:
        url = url_of(listener)
        if save is not None:
            _store(save, url, server)
        inputs = "".join(f" -i {shlex.quote(item.name)}=…" for item in server.program.inputs() if item.required)
        shown = "" if save or token else f"CREW_TOKEN={server.token} "
        line = f"Serving the crew {server.program.name} at {url}  Try: {shown}prefect-crew run {save or url}{inputs}"
        if sys.stdout.isatty():  # a pipe that nobody reads would block the server once it is full
            server.on_kickoff = lambda kickoff_id: print_line(f"Started run {kickoff_id}")
        server.serve(listener, lambda: print_line(f"{line}  Stop: Ctrl-C"))


def _store(name: str, url: str, server: CrewServer) -> None:
    reach_prefect()
    from prefect_crew.cli.crews import save_served

    _output.current.hide(server.token)
    asyncio.run(save_served(name, url, server.token, is_flow=server.is_flow))
    _output.note(f"Stored crew {name} ({url}) as the block deployed-crew/{name}.")


@contextmanager
def _listening(host: str, port: int) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. --port 0 takes a free port."
        ) from error


receiver = App(name="receiver")


@receiver.command
def start(*, host: Host = "127.0.0.1", port: ListenPort = 8001) -> None:
    """Receive the webhooks of crews, which wake waits and become Prefect events, until Ctrl-C.

    PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET signs the webhooks. Set the same secret here and where crews start.
    """
    from prefect_crew.receiver.app import create_receiver
    from prefect_crew.receiver.serve import serve_receiver

    # Its own log lines, whatever Prefect's logging is set to.
    handler, logger = logging.StreamHandler(), logging.getLogger("prefect_crew.receiver")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if _output.current.debug else logging.INFO)
    logger.propagate = False
    with _listening(host, port):
        serve_receiver(create_receiver(), host=host, port=port)


INPUTS = {
    "budget": "1000 USD",
    "interests": "games, tech, ai, relaxing hikes, amazing food",
    "duration": "7 days",
    "age": "35",
}
NEXT = {
    "This crew served, to be run by you": ["prefect-crew serve travel"],
    "A crew of your own": [
        "prefect-crew crews save my-crew --url https://…",
        "prefect-crew run my-crew -i topic=Lisbon",
    ],
    "The same in Python": ['run_crew("my-crew", {"topic": "Lisbon"})'],
    "A project to start from, with schedules and a worker": ["prefect-crew init my-crews"],
    "The tutorial": ["prefect-crew docs tutorial"],
}


def demo() -> None:
    """Run the travel crew through Prefect on this machine: no account, no key, no network."""
    # No network is meant: Prefect's own statistics stay off for this command, and so does its notice about them.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    _output.note("prefect-crew demo: a crew of three agents plans a trip, and Prefect runs it.", "bold")
    _output.note("No account, no key: the crew is scripted and lives on this machine.", "dim")
    for name, value in INPUTS.items():
        _output.note(f"  {name:<10} {value}")
    url = reach_prefect()
    progress = Progress()
    _output.note("Starting a crew server on this machine …")
    from prefect_crew._internal.asyncio_tasks import sync_version
    from prefect_crew.blocks import crew_of
    from prefect_crew.crew import WaitPolicy
    from prefect_crew.devserver import CrewServer
    from prefect_crew.flows import run_loaded_crew
    from prefect_crew.runs.request import RunOptions

    # Often enough to see each task; a crew on the network is asked less often.
    often = WaitPolicy(initial=0.2, factor=1.0, max_interval=0.2, timeout=300)
    with CrewServer("travel", speed=2) as server:
        _output.current.hide(server.token)
        _output.note(f"Crew travel at {server.url}: checking the inputs …")
        crew = replace(crew_of(server.crew(wait=often)).called("travel"), on_status=progress.watch)
        try:
            answer = sync_version(run_loaded_crew)(crew, INPUTS, RunOptions())
        except KeyboardInterrupt:
            # A crew that is deployed goes on, and the log says so: this one cannot.
            _output.note("The demo's crew has ended with the demo.", "dim")
            raise
    _output.put()
    _output.put_markdown(answer.output)
    flow_run_id = progress.seen.flow_run_id if progress.seen else None
    _output.note("")
    if url is None:
        _output.note(
            "Prefect's embedded server ends with this command. A server that you start shows its runs.\n", "dim"
        )
    page = page_url(flow_run_id)
    embedded = ["prefect server start", f"http://127.0.0.1:4200/runs/flow-run/{flow_run_id}"]
    _output.note("Where to go from here", "bold")
    if shutil.which("prefect-crew") is None:
        _output.note(f"  The commands are in {Path(sys.executable).parent}: activate that environment first.")
    for title, how in {"This run in Prefect, and its page of results": [page] if page else embedded, **NEXT}.items():
        _output.note(f"  {title}")
        for line in how:
            _output.note(f"      {line}", "cyan")


NOT_COPIED = ("__pycache__", ".env", ".venv", ".pytest_cache", "results")
"""Files that a trial of the project in a clone of the repository leaves in it, secrets among them."""


def init(folder: Annotated[Path, Parameter(name="DIR", help="A folder that is empty, or not there yet.")], /) -> None:
    """Write a starter project: code to deploy on a crew worker, a test of it, and flows to copy and change."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ConfigurationError(f"{folder} is not an empty folder. Nothing was written. Give an empty or new folder.")
    for source, target in _sources():
        shutil.copytree(source, folder / target, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
    readme = folder / "README.md"  # the repository's tests are told by comments how to run its blocks
    readme.write_text(re.sub(r"<!-- .*? -->\n", "", readme.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "requirements.txt").write_text(
        f"prefect-crew[postgres]=={version('prefect-crew')}\npytest\n", encoding="utf-8"
    )
    _output.put(f"Wrote a project to {folder}. Start with its README.md.")


def _sources() -> list[tuple[Path, str]]:
    """Return the folders that a project consists of, each with its place in the project."""
    package = Path(__file__).parents[1]
    if (starter := package / "starter").is_dir():
        return [(starter, "")]
    repository = package.parent  # an editable install: pyproject.toml names the same files for the wheel
    return [(repository / "deployments", ""), (repository / "flows", "flows")]
