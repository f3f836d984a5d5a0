"""Add up the use and the cost of runs, by crew, day, flow or batch, from records and from ledgers of batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal

from prefect_crew.batches.stored import list_batches, open_stored_batch
from prefect_crew.exceptions import CrewError
from prefect_crew.prices import Spending
from prefect_crew.records.model import Entry, utcnow
from prefect_crew.records.prune import FLOW_RUN_ID, read_by_id
from prefect_crew.records.store import PrefectRecords
from prefect_crew.settings import CrewSettings

By = Literal["crew", "day", "flow", "batch"]
CLOCKS = timedelta(hours=1)
"""The most by which the clock of a process that wrote an end may differ from the Prefect server's clock."""


@dataclass(frozen=True)
class CostRow:
    """The use and the cost of a crew's runs that ended on one day (UTC): one run of a record, or several of a batch."""

    day: date
    crew: str
    spending: Spending
    flow: str | None = None
    batch: str | None = None
    flow_run_id: str | None = None


def row_of(end: Entry) -> CostRow:
    """Return the row of one ended run."""
    usage = end.usage or (end.result and end.result.usage)
    is_reported = usage is not None and usage.total_tokens is not None
    spending = Spending(1, int(is_reported), int(end.cost is not None), usage, end.cost)
    day = (end.ended_at or utcnow()).date()
    return CostRow(day, str(end.crew), spending, flow_run_id=end.flow_run_id)


def grouped(rows: Iterable[CostRow], by: By) -> dict[str, Spending]:
    """Add up the rows of each crew, day, flow or batch: days in their order, else the highest cost first. Pure."""
    groups: defaultdict[str, list[Spending]] = defaultdict(list)
    for row in rows:
        name = getattr(row, by)
        groups[f"no {by}" if name is None else str(name)].append(row.spending)
    sums = [(name, Spending.sum(parts)) for name, parts in groups.items()]
    if by == "day":
        return dict(sorted(sums))
    return dict(sorted(sums, key=lambda group: (-(group[1].cost or 0), -group[1].tokens, group[0])))


async def read_costs(
    by: Collection[By], *, since: date | None = None, until: date | None = None
) -> tuple[list[CostRow], list[str]]:
    """Return a row for each run that ended from `since` to `until` (UTC, both included), and notes on missing data.

    A row has a flow's name only if `by` asks for it.
    """
    rows, gaps = [row_of(end) for end in await _read_ends(since)], _pruned_days(since)
    for name, ledger in await list_batches():
        try:
            async with open_stored_batch(name) as batch:
                label = await batch.ledger.label() or batch.entry.crew_url
                rows += [
                    CostRow(date.fromisoformat(day), label, spending, batch=name, flow_run_id=flow_run)
                    for day, flow_run, spending in await batch.ledger.spending_by_day()
                ]
        except CrewError:
            gaps.append(f"Batch {name!r} is left out because its ledger cannot be opened here ({ledger}).")
    rows = [row for row in rows if (since or row.day) <= row.day <= (until or row.day)]
    return await _with_flows(rows) if "flow" in by else rows, gaps


def _pruned_days(since: date | None) -> list[str]:
    """Return a sentence if the period begins before the time for which records are kept, else none."""
    days = CrewSettings().keep_records_days
    first = utcnow().date() - timedelta(days=days)
    if since is None or since >= first:
        return []
    return [
        f"Records are kept for {days} days, so runs that ended before {first} may be missing. "
        "PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS keeps them longer."
    ]


async def _read_ends(since: date | None) -> list[Entry]:
    """Return the ends of the runs that ended on a day (UTC) or later, and perhaps some of the day before."""
    store, now = PrefectRecords(), utcnow()
    first = datetime.fromtimestamp(0, UTC) if since is None else datetime.combine(since, time.min, UTC)
    ends = dict[str | None, Entry]()
    # The second reading finds the ends that somebody created during the first: they are among the latest now.
    for moment in (first, now):
        async for end in store.ended_since(moment - CLOCKS):
            ends[end.claim] = end
    return [*ends.values()]


async def _with_flows(rows: Sequence[CostRow]) -> list[CostRow]:
    """Add the names of flows to rows, if Prefect still has them."""
    # Rows outside of a flow may have an id that is no UUID.
    ids = (row.flow_run_id for row in rows if row.flow_run_id and FLOW_RUN_ID.fullmatch(row.flow_run_id))
    runs = await read_by_id("/flow_runs/filter", ids)
    flows = await read_by_id("/flows/filter", (run["flow_id"] for run in runs.values()))
    names = {run_id: flows[run["flow_id"]]["name"] for run_id, run in runs.items() if run["flow_id"] in flows}
    return [replace(row, flow=names.get(row.flow_run_id or "")) for row in rows]
