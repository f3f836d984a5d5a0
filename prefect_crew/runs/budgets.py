"""The budgets of a crew as allowances of the crew database, and what is said when one has no room."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event

from prefect_crew._internal.clock import moment
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.budgets import Budget
from prefect_crew.crew import Crew
from prefect_crew.exceptions import BudgetExceededError, ConfigurationError
from prefect_crew.prices import cost_of
from prefect_crew.store.decision import Allowance, Decision, Overrun

# The warnings that a flow run has had. Module-level: the rows of a batch share no other place.
_warned = deque[tuple[str | None, str]](maxlen=100)


def allowances(crew: Crew, batch: str) -> list[Allowance]:
    """Return the allowances of a crew's budgets. `batch` is the batch, pipeline or flow run of the run.

    Raises:
        ConfigurationError: A budget has no estimate of a run's use.
    """
    return [_allowance(crew, budget, batch) for budget in crew.budgets]


def _allowance(crew: Crew, budget: Budget, batch: str) -> Allowance:
    estimate_cost = budget.estimate_cost
    if (price := cost_of(crew.price, None)) is not None:  # None if it depends on the tokens
        estimate_cost = price
    for measure, limit, estimate in (
        ("cost", budget.max_cost, estimate_cost),
        ("tokens", budget.max_tokens, budget.estimate_tokens),
    ):
        if limit is not None and estimate is None:
            also = ", or give the crew a price for each run" if measure == "cost" else ""
            raise ConfigurationError(
                f"Budget {budget.name or crew.label!r} limits {measure} but has no estimate of a run's use. Nothing "
                f"was started. Give the budget estimate_{measure}=…{also}."
            )
    return Allowance(
        scope=scope_of(crew, budget, batch),
        per="all" if budget.per == "batch" else budget.per,
        max_runs=budget.max_kickoffs,
        max_tokens=budget.max_tokens,
        max_cost=budget.max_cost,
        estimate_tokens=budget.estimate_tokens or 0,
        estimate_cost=estimate_cost or 0.0,
        is_warning=budget.on_limit == "warn",
    )


def scope_of(crew: Crew, budget: Budget, batch: str) -> str:
    """Return the scope whose sums a budget limits: budgets of one name share it."""
    name = f"budget {budget.name or crew.label}"
    return f"{name} of {batch}" if budget.per == "batch" else name


def budget_error(crew: Crew, decision: Decision, batch: str, *, row_of: str | None) -> BudgetExceededError:
    """Emit the event about a budget without room, and return the error. `row_of`: the batch whose row had no room."""
    refusing = next(overrun for overrun in decision.overruns if not overrun.is_warning)
    error = _error(crew, refusing, batch, decision.now, row_of)
    _emit(error, crew)
    return error


def warn_of_budgets(crew: Crew, decision: Decision, batch: str) -> None:
    """Log each budget that only warns and has no room, once in a flow run, and emit the event."""
    for overrun in decision.overruns:
        error = _error(crew, overrun, batch, decision.now)
        if (warning := (flow_run_id(), error.counter)) not in _warned:
            _warned.append(warning)
            run_logger().warning("%s", error)
            _emit(error, crew)


def _error(crew: Crew, overrun: Overrun, batch: str, now: float, row_of: str | None = None) -> BudgetExceededError:
    measure = {"runs": "kickoffs"}.get(overrun.measure, overrun.measure)
    name = f"max_{measure}"
    budget = next(
        budget
        for budget in crew.budgets
        if scope_of(crew, budget, batch) == overrun.scope and getattr(budget, name) == overrun.limit
    )
    allowance = _allowance(crew, budget, batch)
    estimates = {"cost": allowance.estimate_cost, "tokens": allowance.estimate_tokens, "kickoffs": 1}
    return BudgetExceededError(
        budget=budget.name or crew.label,
        counter=f"{overrun.scope}, {measure} a {budget.per}",
        measure=measure,
        used=overrun.used,
        limit=overrun.limit,
        estimate=estimates[measure],
        resets_at=_resets_at(budget, now),
        on_limit=budget.on_limit,
        row_of=row_of,
    )


def _resets_at(budget: Budget, now: float) -> datetime | None:
    at = moment(now)
    if budget.per == "day":
        return datetime(at.year, at.month, at.day, tzinfo=UTC) + timedelta(days=1)
    if budget.per == "month":
        return (datetime(at.year, at.month, 1, tzinfo=UTC) + timedelta(days=32)).replace(day=1)
    return None


def _emit(error: BudgetExceededError, crew: Crew) -> None:
    """Emit `prefect-crew.budget.exceeded` for automations, once for each limit and period."""
    names = ("budget", "measure", "used", "limit", "estimate", "on_limit")
    facts: dict[str, Any] = {name: getattr(error, name) for name in names}
    period = error.resets_at and error.resets_at.isoformat()
    emit_event(
        event="prefect-crew.budget.exceeded",
        resource={
            "prefect.resource.id": f"prefect-crew.budget.{error.counter}",
            "prefect.resource.name": f"Budget {error.budget}",
        },
        related=[{"prefect.resource.id": f"prefect-crew.crew.{crew.label}", "prefect.resource.role": "crew"}],
        payload={**facts, "resets_at": period},
        id=uuid5(NAMESPACE_URL, f"{error.counter}/{period}/exceeded"),
    )
