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
    name, estimate_cost = budget.name or crew.label, budget.estimate_cost
    if (price := cost_of(crew.price, None)) is not None:  # None if it depends on the tokens
        estimate_cost = price
    lacking = "cost" if budget.max_cost is not None and estimate_cost is None else None
    if lacking or (budget.max_tokens is not None and budget.estimate_tokens is None):
        also = ", or give the crew a price for each run" if lacking else ""
        raise ConfigurationError(
            f"Budget {name!r} limits {lacking or 'tokens'} but has no estimate of a run's use. Nothing was started. "
            f"Give the budget estimate_{lacking or 'tokens'}=…{also}."
        )
    return Allowance(
        # Budgets of one name share the sums of its scope.
        scope=f"budget {name} of {batch}" if budget.per == "batch" else f"budget {name}",
        per="all" if budget.per == "batch" else budget.per,
        name=name,
        max_runs=budget.max_kickoffs,
        max_tokens=budget.max_tokens,
        max_cost=budget.max_cost,
        estimate_tokens=budget.estimate_tokens or 0,
        estimate_cost=estimate_cost or 0.0,
        is_warning=budget.on_limit == "warn",
    )


def budget_error(crew: Crew, decision: Decision) -> BudgetExceededError:
    """Emit the event about a budget without room, and return the error."""
    refusing = next(overrun for overrun in decision.overruns if not overrun.allowance.is_warning)
    error = _error(refusing, decision.now)
    _emit(error, crew)
    return error


def warn_of_budgets(crew: Crew, decision: Decision) -> None:
    """Log each budget that only warns and has no room, once in a flow run, and emit the event."""
    for overrun in decision.overruns:
        error = _error(overrun, decision.now)
        if (warning := (flow_run_id(), error.counter)) not in _warned:
            _warned.append(warning)
            run_logger().warning("%s", error)
            _emit(error, crew)


def _error(overrun: Overrun, now: float) -> BudgetExceededError:
    allowance, at, resets_at = overrun.allowance, moment(now), None
    if allowance.per == "day":
        resets_at = datetime(at.year, at.month, at.day, tzinfo=UTC) + timedelta(days=1)
    elif allowance.per == "month":
        resets_at = (datetime(at.year, at.month, 1, tzinfo=UTC) + timedelta(days=32)).replace(day=1)
    measure = "kickoffs" if overrun.measure == "runs" else overrun.measure
    when, then = "", f"Nothing was started. Raise max_{measure} and make the same call again."
    if allowance.is_warning:
        then = "The run starts anyway, since on_limit is 'warn'."
    elif resets_at is not None:
        when = f". The budget begins again at {resets_at:%Y-%m-%d %H:%M} UTC"
        then = f"Nothing was started. Make the same call again then, or raise max_{measure}."
    return BudgetExceededError(
        f"Budget {allowance.name!r} has no room for another run, which takes about {overrun.estimate:,.4g}: "
        f"{overrun.used:,.6g} of {overrun.limit:,.6g} {measure} are used, with the estimates of runs in flight{when}. "
        f"{then}",
        budget=allowance.name,
        counter=f"{allowance.scope}, {measure} a {'batch' if allowance.per == 'all' else allowance.per}",
        measure=measure,
        used=overrun.used,
        limit=overrun.limit,
        estimate=overrun.estimate,
        resets_at=resets_at,
        on_limit="warn" if allowance.is_warning else "refuse",
    )


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
