"""The command `costs`: what runs have used and cost."""

from __future__ import annotations

import asyncio
from datetime import date
from typing import Annotated, Literal

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._options import Output
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.prices import Spending


def costs(
    *,
    by: Literal["crew", "day", "flow", "batch", "tag"] = "crew",
    from_: Annotated[date | None, Parameter(name="--from")] = None,
    to: date | None = None,
    output: Output = None,
) -> None:
    """Show what runs have used and cost, by crew, day, flow, batch or tag.

    Runs count that have ended, on the day of their end in UTC.

    Args:
        by: What is added up. A run with several tags counts under each.
        from_: The first day, such as 2026-05-01.
        to: The last day.
    """
    reach_prefect()
    from prefect_crew.costs import HEADER, cells, grouped, read_costs

    rows, missed = asyncio.run(read_costs([by], since=from_, until=to))
    groups, total = grouped(rows, by), Spending.sum(row.spending for row in rows)
    if output:
        found = [{"name": name, **spent.as_dict()} for name, spent in groups.items()]
        _output.put_json({"by": by, "groups": found, "total": total.as_dict(), "missing": missed})
        return
    shown = [cells(name, spent) for name, spent in groups.items()]
    if len(shown) > 1:
        shown.append(cells("together", total))
    _output.put_rows((by.capitalize(), *HEADER), shown, empty="No run has ended in this time.")
    for line in ([f"{total.unknown}."] if total.unknown else []) + missed:
        _output.note(line, "yellow")
