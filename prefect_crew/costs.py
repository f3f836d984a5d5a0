"""What runs have used and cost, by crew, day, flow, batch or tag: from records, and from the ledgers of batches."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from prefect_crew._text import sparkline
from prefect_crew.artifacts.escape import cell, table
from prefect_crew.batches.stored import list_batches, open_stored_batch
from prefect_crew.client.models import TokenUsage
from prefect_crew.exceptions import CrewError
from prefect_crew.prices import Spending, money
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.totals import read_totals

By = Literal["crew", "day", "flow", "batch", "tag"]
_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # of a row outside of flows, its result may name another
_AT_ONCE = 100
"""Flow runs that are asked for in one request."""


@dataclass(frozen=True)
class CostRow:
    """What runs of one crew used and cost that ended on one day (UTC), of one flow and batch, with equal tags."""

    day: date
    crew: str
    spending: Spending
    flow: str | None = None
    batch: str | None = None
    tags: Sequence[str] = ()
    flow_run_id: str | None = None
    """To look up flow and tags by."""


def grouped(rows: Iterable[CostRow], by: By) -> dict[str, Spending]:
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
) -> tuple[list[CostRow], list[str]]:
    """Return what runs used and cost that ended from `since` to `until` (UTC, both included).

    Flows and tags are looked up only if they are in `by`. What could not be read is the second value, in sentences.
    """
    rows: list[CostRow] = []
    missed: list[str] = []
    records = [record async for record in PrefectRecords().all(RecordPhase.ENDED)]
    # After the records: whoever prunes counts a run before its record goes.
    totals, counted = await read_totals()
    for record in records:
        if record.ended_at is not None and record.ref not in counted:
            usage = record.usage or (None if record.result is None else record.result.usage)
            is_reported = usage is not None and usage.total_tokens is not None
            spent = Spending(1, int(is_reported), int(record.cost is not None), usage, record.cost)
            rows.append(CostRow(record.ended_at.date(), record.crew, spent, flow_run_id=record.flow_run_id))
    for name, ledger in await list_batches():
        try:
            async with open_stored_batch(name) as batch:
                label = await batch.ledger.label() or batch.entry.crew_url
                for day, flow_run, spent in await batch.ledger.spending_by_day():
                    on = date.fromisoformat(day)
                    rows.append(CostRow(on, label, spent, batch=name, flow_run_id=flow_run))
        except CrewError:
            missed.append(f"Batch {name!r} is left out: its ledger cannot be opened here ({ledger}).")
    for total in totals:
        counts = {name: getattr(total, name) for name in ("total_tokens", "prompt_tokens", "completion_tokens")}
        usage = TokenUsage(**counts) if total.reported else None
        spent = Spending(total.runs, total.reported, total.priced, usage, total.cost if total.priced else None)
        rows.append(CostRow(total.day, total.crew, spent, flow=total.flow, tags=tuple(total.tags)))
    found = [row for row in rows if (since or row.day) <= row.day <= (until or row.day)]
    if {"flow", "tag"} & set(by):
        found = await _with_flows(found)
    return found, missed


async def _with_flows(rows: Sequence[CostRow]) -> list[CostRow]:
    """Return rows with the names of their flows and the tags of their flow runs, as far as Prefect still has them."""
    ids = sorted({UUID(row.flow_run_id) for row in rows if row.flow_run_id and _ID.fullmatch(row.flow_run_id)})
    known: dict[str | None, tuple[str, tuple[str, ...]]] = {}
    async with get_client() as client:
        for start in range(0, len(ids), _AT_ONCE):
            some = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + _AT_ONCE]))
            runs = await client.read_flow_runs(flow_run_filter=some)
            flows = await client.read_flows(flow_run_filter=some)
            names = {flow.id: flow.name for flow in flows}
            known |= {str(run.id): (names[run.flow_id], tuple(run.tags)) for run in runs if run.flow_id in names}
    return [
        row if (one := known.get(row.flow_run_id)) is None else replace(row, flow=one[0], tags=one[1]) for row in rows
    ]


HEADER = ("Runs", "Tokens", "Cost", "Without tokens")


def cells(name: str, spent: Spending) -> tuple[str, ...]:
    """Return the row of a table, under a first title and `HEADER`."""
    tokens = f"{spent.tokens:,}" if spent.reported else "–"
    return name, f"{spent.runs:,}", tokens, money(spent.cost), f"{spent.runs - spent.reported:,}"


def costs_markdown(rows: Sequence[CostRow], missed: Sequence[str], *, since: date) -> str:
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
