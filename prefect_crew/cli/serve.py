"""Commands that serve: a crew, the webhook receiver, a demonstration."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators
from cyclopts.types import Port

from prefect_crew.cli import _output
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.cli._progress import Progress
from prefect_crew.devserver._faults import FAULTS, HTTP_PLACES, WEBHOOK_PLACES
from prefect_crew.exceptions import ConfigurationError

Host = Annotated[str, Parameter(name="--host", help="The address to listen on.")]
ListenPort = Annotated[Port, Parameter(name="--port", help="The port; 0 takes a free one.")]


def faults_help() -> str:
    """Return what `serve --fault` takes."""
    phases = "[-before-accept|-after-accept]"
    names = {name + (phases if kind.has_phases else ""): kind for name, kind in FAULTS.items()}
    kinds = "\n".join(f"  {name:<{len(phases) + 10}}{kind.text}" for name, kind in names.items())
    return (
        f"Faults: PLACE:NAME[=VALUE][@WHEN], such as kickoff:500@1 or status:latency=2@3-5.\n"
        f"Places of requests: {', '.join(HTTP_PLACES)}.\nPlaces of deliveries: {', '.join(WEBHOOK_PLACES)}.\n{kinds}"
    )


def serve(
    spec: Annotated[str, Parameter(name="CREW")] = "travel",
    /,
    *,
    host: Host = "127.0.0.1",
    port: ListenPort = 8000,
    token: Annotated[str | None, Parameter(env_var="CREW_TOKEN")] = None,
    response_format: Literal["documented", "union", "live"] = "documented",
    generation: Literal["first", "later"] = "first",
    fault: list[str] | None = None,
    speed: float = 1.0,
    no_stop: bool = False,
    max_runs: int | None = None,
) -> int:
    """Serve a crew on this machine as a deployed one is served, until Ctrl-C.

    Args:
        spec: A bundled crew (travel, echo), a YAML script, or CrewAI code as module:factory.
        token: The token that it takes; a random one if left out. Other users of this machine can see it here.
        response_format: How the server words its answers.
        generation: How it words webhooks.
        fault: A fault to inject, such as kickoff:500; can be repeated.
        speed: How many times faster than its seconds say a script runs.
        no_stop: Have no /stop, as some servers.
        max_runs: How many runs go on at once; others are pending.
    """
    from prefect_crew.devserver import serve as serve_crew

    try:
        return _listening(
            host,
            port,
            lambda: serve_crew(
                spec,
                host=host,
                port=port,
                token=token or None,
                response_format=response_format,
                generation=generation,
                faults=fault or (),
                speed=speed,
                stop=not no_stop,
                max_runs=max_runs,
            ),
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _listening(host: str, port: int, serve: Callable[[], int]) -> int:
    try:
        return serve()
    except OSError as error:
        if error.filename is not None:  # not of the port
            raise
        raise OSError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. --port 0 takes a free port."
        ) from error


receiver = App(name="receiver", help="The webhook receiver, which turns webhooks of crews into Prefect events.")


@receiver.command
def start(
    *,
    host: Host = "127.0.0.1",
    port: ListenPort = 8001,
    max_body: Annotated[float, Parameter(validator=validators.Number(gte=0.001, lte=1024))] = 1.0,
    queue: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 2000,
) -> int:
    """Receive the webhooks of crews and turn them into Prefect events, until Ctrl-C.

    PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET signs them: set the same one here and where crews are kicked off.

    Args:
        max_body: The largest webhook in MiB; one holds the crew's whole result.
        queue: Webhooks kept while the Prefect API does not answer.
    """
    from prefect_crew.receiver.app import create_receiver
    from prefect_crew.receiver.forward import Forwarder
    from prefect_crew.receiver.serve import serve_receiver

    # Its own log lines, whatever Prefect's logging is set to.
    handler, logger = logging.StreamHandler(), logging.getLogger("prefect_crew.receiver")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if _output.current.debug else logging.INFO)
    logger.propagate = False
    app = create_receiver(max_body=int(max_body * 1024 * 1024), forwarder=Forwarder(limit=queue))
    return _listening(host, port, lambda: serve_receiver(app, host=host, port=port, announce=_announce))


def _announce(line: str) -> None:
    _output.put(line)
    sys.stdout.flush()  # a parent process reads the line through a pipe


def demo(
    *,
    budget: str = "1000 USD",
    interests: str = "games, tech, ai, relaxing hikes, amazing food",
    duration: str = "7 days",
    age: str = "35",
) -> None:
    """Run the travel crew through Prefect on this machine: no account, no key, no network.

    Args:
        budget: What the trip may cost.
        interests: What you like.
        duration: How long the trip is.
        age: How old you are.
    """
    given = {"budget": budget, "interests": interests, "duration": duration, "age": age}
    # No network is meant: Prefect's own statistics stay off for this command, and so does its notice about them.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    _output.note("prefect-crew demo: a crew of three agents plans a trip, and Prefect runs it.", "bold")
    _output.note("No account, no key: the crew is scripted and lives on this machine.", "dim")
    for name, value in given.items():
        _output.note(f"  {name:<10} {value}")
    with Progress() as shown:
        url = reach_prefect(shown)
        shown.phase("Starting a crew server on this machine")
        from prefect_crew.crew import WaitPolicy
        from prefect_crew.devserver import CrewServer
        from prefect_crew.flows import run_crew

        # Often enough to see each task; a crew on the network is asked less often.
        often = WaitPolicy(initial=0.3, factor=1.0, max_interval=0.3, timeout=300)
        with CrewServer("travel") as server:
            _output.current.hide(server.token)
            shown.phase(f"Kicking off the crew at {server.url}")
            crew = replace(server.crew(wait=often).crew.called("travel"), on_status=shown.watch)
            answer = run_crew(crew, given)
    _output.put()
    _output.put_markdown(answer.output)
    seen = shown.seen
    flow_run_id = seen.flow_run_id if seen else None
    _output.note("")
    if url is None:
        _output.note(
            "Prefect's embedded server ends with this command. A server that you start shows its runs.\n", "dim"
        )
    page = flow_run_url(flow_run_id)
    embedded = ["prefect server start", f"http://127.0.0.1:4200/runs/flow-run/{flow_run_id}"]
    ways = {
        "This run in Prefect, and its page of results": [page] if page else embedded,
        "This crew served, to be run by you": ["prefect-crew serve travel"],
        "A crew of your own": [
            "prefect-crew crews save my-crew --url https://…",
            "prefect-crew run my-crew -i topic=Lisbon",
        ],
        "The same in Python": ['run_crew(DeployedCrew.load("my-crew"), {"topic": "Lisbon"})'],
        "A project to start from, with schedules and a worker": ["prefect-crew init my-crews"],
    }
    _output.note("Where to go from here", "bold")
    if which("prefect-crew") is None:
        _output.note(f"  The commands are in {Path(sys.executable).parent}: activate that environment first.")
    for what, how in ways.items():
        _output.note(f"  {what}")
        for line in how:
            _output.note(f"      {line}", "cyan")
