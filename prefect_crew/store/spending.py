"""The use of the runs of a scope: the sums that allowances limit, and the reports of costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Literal

import sqlalchemy as sa

from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import Allowance, Attempt, Overrun
from prefect_crew.store.schema import attempts, spending

_COLUMNS = ("runs", "tokens", "cost", "open_runs", "open_tokens", "open_cost")


@dataclass(frozen=True, kw_only=True)
class Use:
    """The use of runs: of those that ended, with the estimates of those in flight."""

    runs: int = 0
    tokens: int = 0
    cost: float = 0.0


def day_of(moment: float) -> str:
    """Return the day (UTC) of a time of the store."""
    return datetime.fromtimestamp(moment, UTC).date().isoformat()


@transaction("read")
def used(transaction: Transaction, scope: str, since: str = "") -> Use:
    """Return the use of a scope since a day, from the first one without it."""
    return _used(transaction, scope, since)


def _used(transaction: Transaction, scope: str, since: str) -> Use:
    c = spending.c
    query = sa.select(
        sa.func.sum(c.runs + c.open_runs),
        sa.func.sum(c.tokens + c.open_tokens),
        sa.func.sum(c.cost + c.open_cost, type_=c.cost.type),
    ).where(c.scope == scope, c.day >= since)
    runs, tokens, cost = transaction.connection.execute(query).one()
    return Use(runs=int(runs or 0), tokens=int(tokens or 0), cost=cost or 0.0)


def overruns(transaction: Transaction, allowances: Sequence[Allowance], now: float) -> list[Overrun]:
    """Return the allowances that have no room for one more run. The caller has locked their scopes."""
    today = day_of(now)
    since = {"day": today, "month": f"{today[:7]}-01", "all": ""}
    full: list[Overrun] = []
    for allowance in allowances:
        use = _used(transaction, allowance.scope, since[allowance.per])
        measures: tuple[tuple[Literal["runs", "tokens", "cost"], float, float, float | None], ...] = (
            ("runs", use.runs, 1, allowance.max_runs),
            ("tokens", use.tokens, allowance.estimate_tokens, allowance.max_tokens),
            ("cost", use.cost, allowance.estimate_cost, allowance.max_cost),
        )
        full += [
            Overrun(allowance=allowance, measure=measure, used=amount, limit=limit, estimate=estimate)
            for measure, amount, estimate, limit in measures
            if limit is not None and amount + estimate > limit + 1e-9
        ]
    return full


def book(transaction: Transaction, estimates: Mapping[str, Sequence[float]] | None, day: str, sign: int = 1) -> None:
    """Add the estimates of a run in flight, or take them back with `sign` -1."""
    _add(transaction, day, {scope: (0, 0, 0, sign, sign * e[0], sign * e[1]) for scope, e in (estimates or {}).items()})


def close(transaction: Transaction, attempt: Attempt, tokens: int | None, cost: float | None) -> None:
    """Replace the estimates of a run by its use; an amount that nobody knows stays estimated."""
    rows: dict[str, Sequence[float]] = {}
    for scope, (estimated_tokens, estimated_cost) in (attempt.estimates or {}).items():
        use = (estimated_tokens if tokens is None else tokens, estimated_cost if cost is None else cost)
        rows[scope] = (1, *use, -1, -estimated_tokens, -estimated_cost)
    _add(transaction, day_of(attempt.begun_at), rows)


def _add(transaction: Transaction, day: str, rows: Mapping[str, Sequence[float]]) -> None:
    if not rows:
        return
    # Sorted: else two transactions could wait for each other.
    values = [{"scope": scope, "day": day, **dict(zip(_COLUMNS, rows[scope], strict=True))} for scope in sorted(rows)]
    insert = transaction.insert(spending)
    sums = {name: spending.c[name] + insert.excluded[name] for name in _COLUMNS}
    transaction.connection.execute(insert.on_conflict_do_update(index_elements=["scope", "day"], set_=sums), values)


@dataclass(frozen=True, kw_only=True)
class CostLine:
    """The runs of one group that ended in a time. The runs without a known amount are not in its sum."""

    group: str | None
    runs: int
    runs_with_tokens: int
    runs_with_cost: int
    tokens: int
    cost: float


@transaction("read")
def costs(
    transaction: Transaction,
    since: date,
    until: date,
    by: Literal["crew", "day", "batch", "flow_run"] = "crew",
    *,
    crew_url: str | None = None,
) -> list[CostLine]:
    """Add up the runs that ended from `since` to before `until` (days in UTC): a line for each crew's name, day, batch
    or flow run."""
    c = attempts.c
    first = transaction.connection.scalar(sa.select(sa.func.min(c.ended_at)))
    if first is None:
        return []
    since = max(since, date.fromisoformat(day_of(first)))
    days = [date.fromordinal(number) for number in range(since.toordinal(), until.toordinal())]
    if by == "day":
        lines = [
            line for day in days for line in _cost_lines(transaction, day, day, sa.literal(day.isoformat()), crew_url)
        ]
    else:
        column = {"crew": c.crew, "batch": c.batch, "flow_run": c.flow_run_id}[by]
        lines = _cost_lines(transaction, days[0], days[-1], column, crew_url) if days else []
    return lines


def _cost_lines(transaction: Transaction, first: date, last: date, group: Any, crew_url: str | None) -> list[CostLine]:
    c = attempts.c
    begin, end = (datetime(d.year, d.month, d.day, tzinfo=UTC).timestamp() for d in (first, last))
    # As an expression: SQLite would else walk through an index of the column, and so through all attempts.
    group = sa.func.coalesce(group, None)
    query = (
        sa.select(
            group,
            sa.func.count(),
            sa.func.count(c.tokens),
            sa.func.count(c.cost),
            sa.func.coalesce(sa.func.sum(c.tokens), 0),
            sa.func.coalesce(sa.func.sum(c.cost, type_=c.cost.type), 0, type_=c.cost.type),
        )
        .where(c.ended_at >= begin, c.ended_at < end + 86_400, c.state != "not_started")
        .group_by(group)
    )
    if crew_url is not None:
        query = query.where(c.crew_url == crew_url)
    return [
        CostLine(
            group=name, runs=runs, runs_with_tokens=with_tokens, runs_with_cost=with_cost, tokens=int(tokens), cost=cost
        )
        for name, runs, with_tokens, with_cost, tokens, cost in transaction.connection.execute(query)
    ]
