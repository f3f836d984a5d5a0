"""Commands that serve: a crew, webhooks, a demonstration."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

from cyclopts import Parameter, validators
from cyclopts.types import Port

from prefect_crew.cli import _output
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.cli._progress import progress
from prefect_crew.devserver._faults import FAULTS, HTTP_PLACES, WEBHOOK_PLACES
from prefect_crew.exceptions import ConfigurationError

HOST = Parameter(help="The address to listen on.")
PORT = Parameter(help="The port; 0 takes a free one.")


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
    spec: Annotated[
        str,
        Parameter(name="CREW", help="A bundled crew (travel, echo), a YAML script, or CrewAI code as module:factory."),
    ] = "travel",
    /,
    *,
    host: Annotated[str, HOST] = "127.0.0.1",
    port: Annotated[Port, PORT] = 8000,
    token: Annotated[
        str | None, Parameter(help="The bearer token. Left out, a random one, which is shown.", env_var="CREW_TOKEN")
    ] = None,
    response_format: Annotated[
        Literal["documented", "union", "live"], Parameter(help="How answers are worded.")
    ] = "documented",
    generation: Annotated[Literal["first", "later"], Parameter(help="How webhook bodies are worded.")] = "first",
    fault: Annotated[
        list[str] | None, Parameter(help="Something that goes wrong, such as kickoff:500; may be given again.")
    ] = None,
    speed: Annotated[float, Parameter(help="The seconds of scripts are divided by it.")] = 1.0,
    no_stop: Annotated[bool, Parameter(help="Leave /stop out, as servers may.")] = False,
    max_runs: Annotated[int | None, Parameter(help="How many runs go on at once; later ones are pending.")] = None,
) -> int:
    """Serve a crew with the API of a deployed one, until Ctrl-C."""
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
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror or error}. Try --port 0.") from error


def webhooks(
    *,
    host: Annotated[str, HOST] = "127.0.0.1",
    port: Annotated[Port, PORT] = 8001,
    max_body: Annotated[
        float,
        Parameter(
            help="MiB of a webhook's body; the crew's whole result is in one.",
            validator=validators.Number(gte=0.001, lte=1024),
        ),
    ] = 1.0,
    queue: Annotated[
        int,
        Parameter(help="How many webhooks wait while the Prefect API is away.", validator=validators.Number(gte=1)),
    ] = 2000,
) -> int:
    """Take the webhooks of crews and turn them into Prefect events, until Ctrl-C.

    Requests must be signed with PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET, which kickoffs sign their webhooks with.
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
    budget: Annotated[str, Parameter(help="What the trip may cost.")] = "1000 USD",
    interests: Annotated[str, Parameter(help="What you like.")] = "games, tech, ai, relaxing hikes, amazing food",
    duration: Annotated[str, Parameter(help="How long the trip is.")] = "7 days",
    age: Annotated[str, Parameter(help="How old you are.")] = "35",
) -> None:
    """Run the travel crew through Prefect on this machine: no account, no key, no network."""
    given = {"budget": budget, "interests": interests, "duration": duration, "age": age}
    # No network is meant: Prefect's own statistics stay off for this command, and so does its notice about them.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    _output.note("prefect-crew demo: a crew of three agents plans a trip, and Prefect runs it.", "bold")
    _output.note("No account, no key: the crew is scripted and lives on this machine.", "dim")
    for name, value in given.items():
        _output.note(f"  {name:<10} {value}")
    with progress() as shown:
        url = reach_prefect(shown, imports=("prefect_crew.flows", "prefect_crew.devserver"))
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
    seen, run = shown.seen, _output.command
    flow_run_id = seen.flow_run_id if seen else None
    page = flow_run_url(flow_run_id)
    _output.note("")
    if url is None:
        _output.note(
            "Prefect's embedded server ends with this command. A server that you start shows its runs.\n", "dim"
        )
    embedded = [run("prefect server start"), f"http://127.0.0.1:4200/runs/flow-run/{flow_run_id}"]
    ways = {
        "This run in Prefect, and its page of results": [page] if page else embedded,
        "Its result again": [run(f"prefect-crew result {shlex.quote(str(seen.idempotency_key))}")] if seen else [],
        "This crew served, to be run by you": [run("prefect-crew serve travel")],
        "A crew of your own": [
            run("prefect-crew save my-crew --url https://…"),
            run("prefect-crew run my-crew -i topic=Lisbon"),
        ],
        "The same in Python": ['run_crew(DeployedCrew.load("my-crew"), {"topic": "Lisbon"})'],
        "Everything else": ["README.md and docs/"],
    }
    _output.note("Where to go from here", "bold")
    for what, how in ways.items():
        _output.note(f"  {what}")
        for line in how:
            _output.note(f"      {line}", "cyan")
