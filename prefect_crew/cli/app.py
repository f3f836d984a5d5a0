"""The commands of `prefect-crew`, and how one line of them is run."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

from cyclopts import App

from prefect_crew.cli import _errors, batch, blocks, deploy, doctor, reviews, runs, serve
from prefect_crew.cli import run as run_commands
from prefect_crew.devserver.faults import FAULTS, HTTP_PLACES, WEBHOOK_PLACES


def _epilogue() -> str:
    lines = [f"  {line.code:>3}  {line.meaning}" for line in _errors.EXITS]
    return "\n".join(("--debug with any command shows the traceback of an error.", "", "Exit codes:", *lines))


app = App(
    name="prefect-crew",
    help="Run deployed CrewAI crews from Prefect: never twice, never lost.",
    help_format="plaintext",
    help_epilogue=_epilogue(),
    version=version("prefect-crew"),
    version_flags=["--version"],
    help_flags=["--help", "-h"],
)


def _faults() -> str:
    """Return what `serve --fault` takes."""
    phases = "[-before-accept|-after-accept]"
    kinds = "\n".join(
        f"  {kind.name + (phases if kind.phases else ''):<{len(phases) + 10}}{kind.text}" for kind in FAULTS.values()
    )
    return (
        f"Faults: PLACE:NAME[=VALUE][@WHEN][%PROBABILITY], such as kickoff:500@1 or status:latency=2@3-5%0.1.\n"
        f"Places of requests: {', '.join(HTTP_PLACES)}.\nPlaces of deliveries: {', '.join(WEBHOOK_PLACES)}.\n{kinds}"
    )


for _command in (
    serve.demo,
    serve.serve,
    run_commands.inputs,
    run_commands.run,
    run_commands.status,
    run_commands.result,
    run_commands.resume,
    run_commands.stop,
    blocks.save,
    deploy.deploy,
    deploy.backfill,
    serve.webhooks,
    doctor.doctor,
):
    _epilogue_of = _faults() if _command is serve.serve else ""
    app.command(_command, help_epilogue=_epilogue_of, sort_key=len(tuple(app)))
app.command(runs.app)
app.command(reviews.app)
app.command(batch.app)


def run(arguments: list[str]) -> int:
    """Run one line of arguments; return the exit code that the command chose, 0 if it chose none.

    Raises:
        CycloptsError, UsageError: The line makes no sense.
        Exception: Whatever the command raises.
    """
    command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    answer: Any = command(*bound.args, **bound.kwargs)
    sys.stdout.flush()  # so that a pipe that is closed is noticed here at the latest
    return answer if isinstance(answer, int) else 0
