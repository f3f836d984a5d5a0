"""Remove the records of runs that ended long ago: a small sweep to schedule, the same as `prefect-crew runs prune`.

A record is what keeps a run from being bought twice, and `get_result` reads it. Choose an age beyond the oldest run key
that anybody may come back to, backfills included. What is in flight or uncertain is never removed.
"""

from __future__ import annotations

from datetime import timedelta

from prefect import flow, get_run_logger

from prefect_crew.pruning import prune
from prefect_crew.record_store import PrefectRecords


@flow(retries=2, retry_delay_seconds=60)
async def prune_records(older_than_days: int = 90, dry_run: bool = False) -> str:
    """Remove old records of ended runs, and say how many.

    Args:
        older_than_days: The age, in days since a run's end. A later call with a removed run's key buys a new run.
        dry_run: Only count.
    """
    pruned = await prune(PrefectRecords(), older_than=timedelta(days=older_than_days), dry_run=dry_run)
    said = f"{pruned.runs} records {'would go' if dry_run else 'removed'}, {pruned.kept} kept"
    get_run_logger().info("%s", said)
    return said
