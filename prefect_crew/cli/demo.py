"""`prefect-crew demo`: the first minute. A crew through Prefect on this machine, without an account."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_crew.cli import terminal
from prefect_crew.cli.prefect_side import Prefect, flow_run_url, reach_prefect
from prefect_crew.cli.progress import Progress, progress

if TYPE_CHECKING:
    from prefect_crew.api.models import CrewResult

__all__ = ["demo"]

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
        prefect = reach_prefect(shown, meanwhile=("prefect_crew.runs", "prefect_crew.server.local"))
        shown.phase("Starting a crew server on this machine")
        answer = _run(shown, given)
    terminal.put()
    terminal.put_markdown(answer.output)
    _say_where_next(shown, prefect)


def _introduce(given: dict[str, str]) -> None:
    console = terminal.errors()
    console.print("[bold]prefect-crew demo[/]: a crew of three agents plans a trip, and Prefect runs it.", markup=True)
    console.print("[dim]No account, no key: the crew is scripted and lives on this machine.[/]", markup=True)
    for name, value in given.items():
        terminal.note(f"  {name:<10} {value}")


def _run(shown: Progress, given: dict[str, Any]) -> CrewResult:
    from prefect_crew.runs import run_crew
    from prefect_crew.server import CrewServer
    from prefect_crew.waiting import WaitPolicy
    from prefect_crew.watching import watch_runs

    # Often enough to see each task; a crew on the network is asked less often.
    often = WaitPolicy(initial=0.3, factor=1.0, max_interval=0.3, timeout=300)
    with CrewServer("travel") as server, watch_runs(shown.watch):
        terminal.secret(server.token)
        shown.phase(f"Kicking off the crew at {server.url}")
        answer = run_crew(server.crew(wait=often).crew.called("travel"), given)
    shown.result(answer)
    return answer


def _say_where_next(shown: Progress, prefect: Prefect) -> None:
    board = shown.board
    flow_run = board.flow_run_id if board else None
    page = flow_run_url(flow_run)
    run = terminal.command
    ways: list[tuple[str, list[str]]] = []
    if page:
        ways.append(("This run in Prefect, and its page of results", [page]))
    else:
        there = f"http://127.0.0.1:4200/runs/flow-run/{flow_run}" if flow_run else "http://127.0.0.1:4200"
        ways.append(("This run in Prefect, and its page of results", [run("prefect server start"), there]))
    if board and board.run_key:
        ways.append(("Its result again", [run(f"prefect-crew result {shlex.quote(board.run_key)}")]))
    ways += [
        ("This crew served, to be run by you", [run("prefect-crew serve travel")]),
        (
            "A crew of your own",
            [run("prefect-crew save my-crew --url https://…"), run("prefect-crew run my-crew -i topic=Lisbon")],
        ),
        ("The same in Python", ['run_crew(DeployedCrew.load("my-crew"), {"topic": "Lisbon"})']),
        ("Everything else", ["README.md and docs/"]),
    ]
    terminal.note("")
    if prefect.embedded:
        terminal.note(
            "Prefect's embedded server ends with this command. What it recorded is kept: a server that you start "
            "shows it.\n",
            "dim",
        )
    terminal.note("Where to go from here", "bold")
    for what, how in ways:
        terminal.note(f"  {what}")
        for line in how:
            terminal.note(f"      {line}", "cyan")
