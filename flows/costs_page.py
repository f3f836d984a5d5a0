"""A page of what runs have used and cost: an artifact that a deployment with a schedule keeps up to date."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prefect import flow, get_run_logger
from prefect.artifacts import acreate_table_artifact

from prefect_crew import Spending
from prefect_crew.costs import read_costs


@flow
async def costs_page(days: int = 30) -> str:
    """Write the artifacts `crew-costs-by-crew` and `crew-costs-by-day`, and return the sum in words.

    Args:
        days: How far they go back, in days (UTC), today included.
    """
    since = datetime.now(UTC).date() - timedelta(days=days - 1)
    by_crew, by_day = await read_costs("crew", since=since), await read_costs("day", since=since)
    for note in by_crew.notes:
        get_run_logger().warning("%s", note)
    for by, costs in (("crew", by_crew), ("day", by_day)):
        table = [{by: name, **cells(spending)} for name, spending in costs.groups.items()]
        # An artifact without rows has no columns.
        await acreate_table_artifact(
            table or [{by: "none", **cells(Spending())}],
            key=f"crew-costs-by-{by}",
            description=" ".join([f"What crews have used and cost since {since}.", *costs.notes]),
        )
    return str(by_crew.total)


def cells(spending: Spending) -> dict[str, object]:
    """Return the cells of a row. Tokens and costs that nobody knows are not zero."""
    return {
        "runs": spending.runs,
        "tokens": spending.tokens if spending.reported else None,
        "without tokens": spending.runs - spending.reported,
        "cost": spending.cost,
        "without cost": spending.runs - spending.priced,
    }
