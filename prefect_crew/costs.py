"""Add up the use and the cost of the runs that have ended, by crew, day, flow or batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterId, FlowRunFilter, FlowRunFilterId

from prefect_crew.client.models import TokenUsage
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.prices import Spending
from prefect_crew.runs.database import in_store
from prefect_crew.settings import CrewSettings
from prefect_crew.store import spending
from prefect_crew.store.spending import CostLine

By = Literal["crew", "day", "flow", "batch"]
PAGE = 200
"""The most objects in one answer of the Prefect server."""


@dataclass(frozen=True)
class Costs:
    """The sums of each crew, day, flow or batch: days in their order, else the highest cost first.

    `notes` are sentences on missing data.
    """

    groups: dict[str, Spending]
    notes: list[str]

    @property
    def total(self) -> Spending:
        """The sum of all groups."""
        return Spending.sum(self.groups.values())


async def read_costs(by: By = "crew", *, since: date | None = None, until: date | None = None) -> Costs:
    """Add up the runs that ended from `since` to `until` (days in UTC, both included).

    Raises:
        ConfigurationError: `since` is later than `until`.
        StoreError, PREFECT_ERRORS: The crew database, or the Prefect API with the names of flows, cannot be used.
    """
    if since is not None and until is not None and since > until:
        raise ConfigurationError(f"The first day, {since}, is later than the last, {until}.")
    first, last = since or date(1970, 1, 1), until or datetime.now(UTC).date() + timedelta(days=1)
    kind = "flow_run" if by == "flow" else by
    lines = await in_store(spending.costs, first, last + timedelta(days=1), kind)
    if by == "flow":
        names = await _flow_names(line.group for line in lines)
        groups = [(names.get(line.group or ""), line) for line in lines]
    else:
        groups = [(line.group, line) for line in lines]
    return Costs(grouped(groups, by), _pruned_days(since))


def grouped(lines: Iterable[tuple[str | None, CostLine]], by: By) -> dict[str, Spending]:
    """Add up lines by their names, and put the names in order. Pure."""
    groups: defaultdict[str, list[Spending]] = defaultdict(list)
    for name, line in lines:
        usage = TokenUsage(total_tokens=line.tokens) if line.runs_with_tokens else None
        cost = line.cost if line.runs_with_cost else None
        part = Spending(line.runs, line.runs_with_tokens, line.runs_with_cost, usage, cost)
        groups[f"no {by}" if name is None else name].append(part)
    sums = [(name, Spending.sum(parts)) for name, parts in groups.items()]
    if by == "day":
        return dict(sorted(sums))
    return dict(sorted(sums, key=lambda group: (-(group[1].cost or 0), -group[1].tokens, group[0])))


def _pruned_days(since: date | None) -> list[str]:
    """Return a sentence if the period begins before the time for which attempts are kept, else none."""
    days = CrewSettings().keep_records_days
    first = datetime.now(UTC).date() - timedelta(days=days)
    if since is None or since >= first:
        return []
    return [
        f"Runs are kept for {days} days, so those that ended before {first} may be missing. "
        "PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS keeps them longer."
    ]


async def _flow_names(flow_run_ids: Iterable[str | None]) -> dict[str, str]:
    """Return the names of the flows of flow runs, if Prefect still has them."""
    ids = [UUID(flow_run_id) for flow_run_id in flow_run_ids if flow_run_id is not None]
    flow_of: dict[str, UUID] = {}
    names: dict[UUID, str] = {}
    async with get_client() as client:
        for start in range(0, len(ids), PAGE):
            page = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + PAGE]))
            runs = await client.read_flow_runs(flow_run_filter=page, limit=PAGE)
            flow_of |= {str(run.id): run.flow_id for run in runs}
            if new := {run.flow_id for run in runs} - names.keys():
                flows = await client.read_flows(flow_filter=FlowFilter(id=FlowFilterId(any_=[*new])), limit=PAGE)
                names |= {flow.id: flow.name for flow in flows}
    return {run: names[flow] for run, flow in flow_of.items() if flow in names}
