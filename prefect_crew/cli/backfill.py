"""`prefect-crew backfill`: the runs of a deployment that a range of time lacks."""

from __future__ import annotations

import asyncio
from datetime import date, datetime
from typing import Annotated

from cyclopts import Parameter

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.cli import terminal
from prefect_crew.cli.crews import JSON, flag
from prefect_crew.cli.exits import UsageError
from prefect_crew.cli.prefect_side import flow_run_url, reach_prefect
from prefect_crew.cli.progress import progress

__all__ = ["backfill"]


def backfill(
    deployment: Annotated[str, Parameter(name="DEPLOYMENT", help="Its name, flow/deployment.")],
    /,
    *,
    from_: Annotated[str, Parameter(name="--from", help="The first day or time, such as 2026-01-01; UTC.")],
    to: Annotated[str, Parameter(name="--to", help="The last one; a day means the whole of it.")],
    every: Annotated[str | None, Parameter(help="The pause between two times: 1d, 12h. Else the schedule's.")] = None,
    schedule: Annotated[str | None, Parameter(help="The schedule's slug, where there are several.")] = None,
    dry_run: Annotated[bool, flag("Show the times and create nothing.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Create the flow runs of a deployment that a range of dates lacks; a second call creates nothing twice."""
    first, last = _moment("--from", from_), _moment("--to", to)
    with progress(quiet=True) as shown:
        reach_prefect(shown)
    from prefect_crew import backfill as logic
    from prefect_crew.pruning import parse_age

    try:
        pause = None if every is None else parse_age(every)
    except ConfigurationError as error:
        raise UsageError(f"--every {error}") from None
    runs = asyncio.run(logic.backfill(deployment, first, last, pause, schedule=schedule, dry_run=dry_run))
    if json:
        terminal.put_json(
            [
                {
                    "scheduled_for": run.scheduled_for.isoformat(),
                    "created": run.created and not dry_run,
                    "flow_run_id": None if run.flow_run_id is None else str(run.flow_run_id),
                    "state": run.state,
                }
                for run in runs
            ]
        )
        return
    word = "to create" if dry_run else "created"
    rows = [
        (
            f"{run.scheduled_for:%Y-%m-%d %H:%M} UTC",
            word if run.created else run.state,
            (flow_run_url(str(run.flow_run_id)) or str(run.flow_run_id)) if run.flow_run_id else "",
        )
        for run in runs
    ]
    terminal.put_rows(("Time", "Run", "Where"), rows, empty="The range has no time of that schedule.")


def _moment(option: str, text: str) -> date:
    """Read a day or a time."""
    try:
        return date.fromisoformat(text) if len(text) <= len("2026-01-01") else datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{option} {text}: give a day such as 2026-01-01, or a time such as 2026-01-01T06:00."
        ) from None
