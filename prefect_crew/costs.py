"""What runs have used and cost, by crew, day, flow, batch or tag: from records, and from the ledgers of batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal

from prefect_crew._text import sparkline
from prefect_crew.artifacts.escape import cell, table
from prefect_crew.batches.stored import list_batches, open_stored_batch
from prefect_crew.exceptions import CrewError
from prefect_crew.prices import Spending, money
from prefect_crew.records.model import RunRecord, utcnow
from prefect_crew.records.prune import FLOW_RUN_ID, read_by_id
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.totals import DayTotal, read_totals, total_of

By = Literal["crew", "day", "flow", "batch", "tag"]
TRIES = 5
"""Times that the records are read while somebody prunes them."""
CLOCKS = timedelta(hours=1)
"""By how much the clock of a process that wrote an end may differ from the Prefect server's."""


def grouped(rows: Iterable[DayTotal], by: By) -> dict[str, Spending]:
    """Return what each crew, day, flow, batch or tag comes to: days in order, else the dearest first. Pure.

    A run with several tags counts under each of them.
    """
    groups: defaultdict[str, list[Spending]] = defaultdict(list)
    for row in rows:
        for name in (row.tags or (None,)) if by == "tag" else (getattr(row, by),):
            groups[f"no {by}" if name is None else str(name)].append(row.spending)
    sums = [(name, Spending.sum(parts)) for name, parts in groups.items()]
    if by == "day":
        return dict(sorted(sums))
    return dict(sorted(sums, key=lambda one: (-(one[1].cost or 0), -one[1].tokens, one[0])))


async def read_costs(
    by: Collection[By], *, since: date | None = None, until: date | None = None
) -> tuple[list[DayTotal], list[str]]:
    """Return what runs used and cost that ended from `since` to `until` (UTC, both included).

    Flows and tags are looked up only if they are in `by`. What could not be read is the second value, in sentences.
    """
    missed: list[str] = []
    records, totals = list[RunRecord](), await read_totals(since=since, until=until)
    for _ in range(TRIES):
        records = await _read_ended(since)
        # Whoever prunes counts a run before its record goes. A total that changed may be of a run that was just read.
        before, totals = totals, await read_totals(since=since, until=until)
        if totals == before:
            break
    else:
        missed.append("Records are being pruned at this moment, so that some runs may count twice. Ask again later.")
    rows, counted = totals
    for record in records:
        if record.ended_at is not None and record.ref not in counted:
            rows.append(total_of(record).model_copy(update={"flow_run_id": record.flow_run_id}))
    for name, ledger in await list_batches():
        try:
            async with open_stored_batch(name) as batch:
                label = await batch.ledger.label() or batch.entry.crew_url
                for day, flow_run, spent in await batch.ledger.spending_by_day():
                    on = date.fromisoformat(day)
                    rows.append(DayTotal(day=on, crew=label, spending=spent, batch=name, flow_run_id=flow_run))
        except CrewError:
            missed.append(f"Batch {name!r} is left out: its ledger cannot be opened here ({ledger}).")
    found = [row for row in rows if (since or row.day) <= row.day <= (until or row.day)]
    if {"flow", "tag"} & set(by):
        found = await _with_flows(found)
    return found, missed


async def _read_ended(since: date | None) -> list[RunRecord]:
    """Return the records of the runs that ended on a day (UTC) or later, and perhaps some of the day before.

    A record is changed when its run ends, or later.
    """
    store, now = PrefectRecords(), utcnow()
    first = datetime.fromtimestamp(0, UTC) if since is None else datetime.combine(since, time.min, UTC)
    records = dict[str | None, RunRecord]()
    # The second reading is for those that somebody changed meanwhile: they are among the latest now.
    for moment in (first, now):
        async for record in store.ended_since(moment - CLOCKS):
            records[record.ref] = record
    return list(records.values())


async def _with_flows(rows: Sequence[DayTotal]) -> list[DayTotal]:
    """Return rows with the names of their flows and the tags of their flow runs, as far as Prefect still has them."""
    # Of a row outside of flows, its result may name another.
    ids = (row.flow_run_id for row in rows if row.flow_run_id and FLOW_RUN_ID.fullmatch(row.flow_run_id))
    runs = await read_by_id("/flow_runs/filter", ids)
    flows = await read_by_id("/flows/filter", (run["flow_id"] for run in runs.values()))
    names = {flow_id: flow["name"] for flow_id, flow in flows.items()}
    known = {run_id: {"flow": names.get(run["flow_id"]), "tags": run["tags"]} for run_id, run in runs.items()}
    return [DayTotal.model_validate({**dict(row), **known.get(row.flow_run_id or "", {})}) for row in rows]


HEADER = ("Runs", "Tokens", "Cost", "Without tokens")


def cells(name: str, spent: Spending) -> tuple[str, ...]:
    """Return the row of a table, under a first title and `HEADER`."""
    tokens = f"{spent.tokens:,}" if spent.reported else "–"
    return name, f"{spent.runs:,}", tokens, money(spent.cost), f"{spent.runs - spent.reported:,}"


def costs_markdown(rows: Sequence[DayTotal], missed: Sequence[str], *, since: date) -> str:
    """Return the page of costs: what each crew came to, and each day."""
    total = Spending.sum(row.spending for row in rows)
    days = grouped(rows, "day")
    parts = [f"## Costs since {since}", f"{total.runs:,} runs: {total}."]
    last = max((row.day for row in rows), default=since)
    every = [days.get(str(since + timedelta(number)), Spending()) for number in range((last - since).days + 1)]
    costs = [spent.cost or 0.0 for spent in every]
    what, figures = ("Cost", costs) if any(costs) else ("Tokens", [float(spent.tokens) for spent in every])
    if chart := sparkline(figures):
        parts.append(f"{what} by day, {since} to {last}: `{chart}`")
    for by, groups in (("crew", grouped(rows, "crew")), ("day", days)):
        shown = [cells(cell(name), spent) for name, spent in groups.items()]
        parts += [f"### By {by}", table((by.capitalize(), *HEADER), shown)]
    return "\n\n".join([*parts, *map(cell, missed)]) + "\n"
