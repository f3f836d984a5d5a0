"""Commands that serve: a crew, webhooks, a demonstration."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._options import PORT, flag
from prefect_crew.cli._prefect import Prefect, flow_run_url, reach_prefect
from prefect_crew.cli._progress import Progress, progress
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect_crew.client.models import CrewResult


def serve(
    spec: Annotated[
        str,
        Parameter(name="CREW", help="A bundled crew (travel, echo), a YAML script, or CrewAI code as module:factory."),
    ] = "travel",
    /,
    *,
    host: Annotated[str, Parameter(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, PORT] = 8000,
    token: Annotated[
        str | None, Parameter(help="The bearer token. Left out: that in CREW_TOKEN, else a random one, which is shown.")
    ] = None,
    dialect: Annotated[
        Literal["documented", "union", "live"], Parameter(help="How answers are worded.")
    ] = "documented",
    generation: Annotated[Literal["first", "later"], Parameter(help="How webhook bodies are worded.")] = "first",
    fault: Annotated[
        list[str] | None,
        Parameter(help="Something that goes wrong, such as kickoff:500; may be given again.", negative=()),
    ] = None,
    seed: Annotated[int | None, Parameter(help="Seed of faults that happen at random.")] = None,
    speed: Annotated[float, Parameter(help="The seconds of scripts are divided by it.")] = 1.0,
    journal: Annotated[Path | None, Parameter(help="A file that lets runs survive a restart of the server.")] = None,
    on_crash: Annotated[
        Literal["rerun", "lose"], Parameter(help="What a restart does with runs of the journal that had not ended.")
    ] = "rerun",
    inspect: Annotated[bool, flag("Also answer GET /_test/requests, for tests.")] = False,
    no_stop: Annotated[bool, flag("Leave /stop out, as servers may.")] = False,
    max_runs: Annotated[int | None, Parameter(help="How many runs go on at once; later ones are pending.")] = None,
) -> int:
    """Serve a crew with the API of a deployed one, until Ctrl-C."""
    from prefect_crew.devserver.server import serve as serve_until_signalled

    try:
        return serve_until_signalled(
            spec,
            host=host,
            port=port,
            token=token or os.environ.get("CREW_TOKEN") or None,
            dialect=dialect,
            generation=generation,
            faults=fault or (),
            seed=seed,
            speed=speed,
            journal=journal,
            on_crash=on_crash,
            inspect=inspect,
            no_stop=no_stop,
            max_runs=max_runs,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    except OSError as error:
        if error.filename is not None:  # the journal
            raise
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror or error}. Try --port 0.") from error


MIB = 1024 * 1024


def webhooks(
    *,
    host: Annotated[str, Parameter(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, PORT] = 8001,
    max_body: Annotated[float, Parameter(help="MiB of a webhook's body; the crew's whole result is in one.")] = 1.0,
    queue: Annotated[int, Parameter(help="How many webhooks wait while the Prefect API is away.")] = 2000,
) -> int:
    """Take the webhooks of crews and turn them into Prefect events, until Ctrl-C.

    It verifies with PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET what kickoffs have signed with the same.
    """
    from prefect_crew.exceptions import ConfigurationError
    from prefect_crew.receiver.app import create_receiver
    from prefect_crew.receiver.forward import Forwarder
    from prefect_crew.receiver.serve import serve_receiver

    if not (0.001 <= max_body <= 1024 and queue >= 1):
        raise ConfigurationError("--max-body is 0.001 to 1024 MiB, and --queue 1 or more.")
    _log_to_stderr(logging.DEBUG if _output.debugging() else logging.INFO)
    app = create_receiver(max_body=int(max_body * MIB), forwarder=Forwarder(limit=queue))
    try:
        return serve_receiver(app, host=host, port=port, announce=_announce)
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror or error}. Try --port 0.") from error


def _log_to_stderr(level: int) -> None:
    """Have the receiver's own log lines on standard error, whatever Prefect's logging is set to."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("prefect_crew.receiver")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _announce(line: str) -> None:
    _output.put(line)
    sys.stdout.flush()  # whoever started this as a process reads the line through a pipe


_NO_TRACKING = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
"""No network is meant: Prefect's own statistics stay off for this one command, and so does its notice about them."""


def demo(
    *,
    budget: Annotated[str, Parameter(help="What the trip may cost.")] = "1000 USD",
    interests: Annotated[str, Parameter(help="What you like.")] = "games, tech, ai, relaxing hikes, amazing food",
    duration: Annotated[str, Parameter(help="How long the trip is.")] = "7 days",
    age: Annotated[str, Parameter(help="How old you are.")] = "35",
) -> None:
    """Run the travel crew through Prefect on this machine: no account, no key, no network."""
    given = {"budget": budget, "interests": interests, "duration": duration, "age": age}
    for name, value in _NO_TRACKING.items():
        os.environ.setdefault(name, value)
    _introduce(given)
    with progress() as shown:
        prefect = reach_prefect(shown, meanwhile=("prefect_crew.flows", "prefect_crew.devserver.server"))
        shown.phase("Starting a crew server on this machine")
        answer = _run(shown, given)
    _output.put()
    _output.put_markdown(answer.output)
    _say_where_next(shown, prefect)


def _introduce(given: dict[str, str]) -> None:
    console = _output.errors()
    console.print("[bold]prefect-crew demo[/]: a crew of three agents plans a trip, and Prefect runs it.", markup=True)
    console.print("[dim]No account, no key: the crew is scripted and lives on this machine.[/]", markup=True)
    for name, value in given.items():
        _output.note(f"  {name:<10} {value}")


def _run(shown: Progress, given: dict[str, Any]) -> CrewResult:
    from prefect_crew.crew import WaitPolicy
    from prefect_crew.devserver import CrewServer
    from prefect_crew.flows import run_crew
    from prefect_crew.runs.progress import watch_runs

    # Often enough to see each task; a crew on the network is asked less often.
    often = WaitPolicy(initial=0.3, factor=1.0, max_interval=0.3, timeout=300)
    with CrewServer("travel") as server, watch_runs(shown.watch):
        _output.secret(server.token)
        shown.phase(f"Kicking off the crew at {server.url}")
        answer = run_crew(server.crew(wait=often).crew.called("travel"), given)
    shown.result(answer)
    return answer


def _say_where_next(shown: Progress, prefect: Prefect) -> None:
    board = shown.board
    flow_run = board.flow_run_id if board else None
    page = flow_run_url(flow_run)
    run = _output.command
    ways: list[tuple[str, list[str]]] = []
    if page:
        ways.append(("This run in Prefect, and its page of results", [page]))
    else:
        there = f"http://127.0.0.1:4200/runs/flow-run/{flow_run}" if flow_run else "http://127.0.0.1:4200"
        ways.append(("This run in Prefect, and its page of results", [run("prefect server start"), there]))
    if board and board.idempotency_key:
        ways.append(("Its result again", [run(f"prefect-crew result {shlex.quote(board.idempotency_key)}")]))
    ways += [
        ("This crew served, to be run by you", [run("prefect-crew serve travel")]),
        (
            "A crew of your own",
            [run("prefect-crew save my-crew --url https://…"), run("prefect-crew run my-crew -i topic=Lisbon")],
        ),
        ("The same in Python", ['run_crew(DeployedCrew.load("my-crew"), {"topic": "Lisbon"})']),
        ("Everything else", ["README.md and docs/"]),
    ]
    _output.note("")
    if prefect.embedded:
        _output.note(
            "Prefect's embedded server ends with this command. What it recorded is kept: a server that you start "
            "shows it.\n",
            "dim",
        )
    _output.note("Where to go from here", "bold")
    for what, how in ways:
        _output.note(f"  {what}")
        for line in how:
            _output.note(f"      {line}", "cyan")
