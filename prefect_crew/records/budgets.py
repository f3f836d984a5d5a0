"""The counters of budgets on the Prefect server: the estimates of runs in flight, and the use of ended runs.

A counter is a global concurrency limit without decay: Prefect changes its slots in one conditional UPDATE, and a
Variable has no such change. After a start has created its claim, it adds the run's estimate to the counter; its permit
stores how much. Before the permit, only the owner can take the estimate off. After it, the caller that writes
NOT_STARTED takes the estimate off. The caller that creates the end of a run adds the difference between use and
estimate. The order of these steps ensures that a counter may be too high after a crash or a lost answer, never too low.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from math import ceil
from statistics import fmean
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from prefect_crew._internal.prefect_api import BUSY_FOR, flow_run_id, is_busy, read_all, request_soon, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.budgets import PREFIX, UNITS, BudgetPeriod, slots_of
from prefect_crew.crew import Crew
from prefect_crew.exceptions import BudgetExceededError, ConfigurationError
from prefect_crew.prices import cost_of
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, utcnow
from prefect_crew.records.store import PrefectRecords

TRIES = 5
"""Attempts to change a counter while others create or change it."""
LATEST = 20
"""The number of a crew's latest runs whose mean use is proposed as an estimate."""
LOOK_BACK = timedelta(days=7)
MOST_READ = 2000
"""The age, and the number of ends, within which `_latest_use` looks for these runs."""
KEEP = timedelta(days=32)
"""A counter that nobody has changed for this time is of a past day or month, or of a finished batch."""

# The counters for which a flow run has logged a warning. Module-level: the rows of a batch share no other place.
_warned = deque[tuple[str | None, str]](maxlen=100)


def _periods(crew: Crew, batch: str, at: datetime) -> list[BudgetPeriod]:
    """Return the counters for a run that is claimed at a moment, each with its limit and the run's estimate."""
    refusing, warning = dict[str, BudgetPeriod](), dict[str, BudgetPeriod]()
    price = cost_of(crew.price, None)  # None if it depends on the tokens
    for budget in crew.budgets:
        for period in budget.periods(name=crew.label, batch=batch, at=at):
            if period.measure == "cost" and price is not None:
                period = replace(period, estimate=price)
            # A crew and a flow of one name share a counter: a run counts in it once, and the lower limit holds.
            periods = warning if period.on_limit == "warn" else refusing
            periods[period.counter] = min(periods.get(period.counter, period), period, key=lambda each: each.limit)
    for name in warning.keys() & refusing.keys():
        # A counter has one limit, so a budget that only warns gets a counter of its own.
        period = warning[name]
        warning[name] = replace(period, counter=f"{name.removesuffix(period.measure)}warn.{period.measure}")
    return [*refusing.values(), *warning.values()]


async def check_estimates(crew: Crew) -> None:
    """Check that each budget of a crew has an estimate of a run's use.

    Raises:
        ConfigurationError: A budget has none. The message proposes the mean of the crew's latest runs.
    """
    for period in _periods(crew, crew.batch or "", utcnow()):
        if period.estimate is None:
            raise await _no_estimate(crew, period)


async def _no_estimate(crew: Crew, period: BudgetPeriod) -> ConfigurationError:
    option, amounts = f"estimate_{period.measure}", await _latest_use(crew, period.measure)
    advice = f"{option}=…; no run of crew {crew.label} has reported its use of late"
    if amounts:
        mean = fmean(amounts)
        proposal = str(ceil(mean)) if period.measure == "tokens" else f"{mean:.4g}"
        runs = f"last {len(amounts)} runs" if len(amounts) > 1 else "only run"
        advice = f"{option}={proposal}, the mean of the {runs} of crew {crew.label} that reported their use"
    also = ", or give the crew a price for each run" if period.measure == "cost" else ""
    return ConfigurationError(
        f"Budget {period.budget!r} limits {period.measure} but has no estimate of a run's use. Nothing was started. "
        f"Give the budget {advice}{also}."
    )


async def _latest_use(crew: Crew, measure: str) -> list[float]:
    """Return the amounts of a measure that a crew's latest runs reported; an empty list without the Prefect API."""
    amounts, count = list[float](), 0
    with suppress(*PREFECT_ERRORS):
        async for end in PrefectRecords().ended_since(utcnow() - LOOK_BACK):
            count += 1
            if end.crew_url == crew.url and measure in end.used:
                amounts.append(end.used[measure])
            if len(amounts) >= LATEST or count >= MOST_READ:
                break
    return amounts


async def add_estimates(crew: Crew, record: RunRecord) -> None:
    """Add a run's estimates to the counters of all its budgets before the run starts, and set them in its record.

    Raises:
        BudgetExceededError: A budget has no room. Nothing stays counted.
        ConfigurationError: A budget has no estimate.
        PREFECT_ERRORS: The Prefect API cannot be reached or refuses.
    """
    try:
        for period in _periods(crew, crew.batch or record.flow_run_id or record.idempotency_key, record.claimed_at):
            await _add_estimate(crew, record, period)
    except BaseException:
        await release(record)
        raise


async def _add_estimate(crew: Crew, record: RunRecord, period: BudgetPeriod) -> None:
    if period.estimate is None:
        raise await _no_estimate(crew, period)
    slots = slots_of(period.measure, period.estimate)
    if not slots or (used := await _take(record, period, slots)) is None:
        return
    error = BudgetExceededError(**vars(period), used=used / UNITS[period.measure])
    if error.on_limit != "warn":
        raise error
    warning = (flow_run_id(), period.counter)
    if warning not in _warned:
        _warned.append(warning)
        run_logger().warning("%s", error)
        note_exceeded(error, crew)


async def release(record: RunRecord) -> None:
    """Take the estimates of a run that surely did not start off the counters."""
    await change(record, {name: -slots for name, slots in (record.estimates or {}).items()})
    record.estimates = None


async def release_given_back(record: RunRecord, records: RecordStore) -> None:
    """Take the estimates of a claim off the counters after its owner gave the claim back.

    The record must say that the owner gave the claim back. Else the caller that resolves the claim does this.
    """
    if not record.estimates:
        return
    with suppress(*PREFECT_ERRORS):
        attempts = await records.attempts(record.idempotency_key)
        given_back = (record.owner, record.entries, RecordPhase.NOT_STARTED)
        if any((attempt.owner, attempt.entries, attempt.phase) == given_back for attempt in attempts):
            await release(record)


def corrections(record: RunRecord) -> dict[str, int]:
    """Return the slots by which the use of an ended run differs from its estimate, by counter.

    If the run did not report its use, the counter keeps the estimate.
    """
    more = dict[str, int]()
    for name, estimate in (record.estimates or {}).items():
        measure = name.rpartition(".")[2]
        if (used := record.used.get(measure)) is not None and (slots := slots_of(measure, used) - estimate):
            more[name] = slots
    return more


async def change(record: RunRecord, slots_by_name: Mapping[str, int]) -> dict[str, int]:
    """Change counters within their limits. Return the change of each counter, in slots.

    This logs errors of Prefect and raises none, since the run has ended or was refused.
    """
    changed = dict[str, int]()
    for name, slots in slots_by_name.items():
        try:
            async with get_client() as client:
                for _ in range(TRIES):
                    how = "increment" if slots > 0 else "decrement"
                    if not slots or await _post(client, how, name, abs(slots)) is not None:
                        changed[name] = slots
                        break
                    # The counter has less room: fill it up to its limit.
                    counter = await client.read_global_concurrency_limit_by_name(name)
                    slots = max(0, min(slots, counter.limit - counter.active_slots))
        except PREFECT_ERRORS as error:
            key = record.idempotency_key
            run_logger().warning("The counter %s could not be corrected for run %s: %s", name, key, error)
    return changed


async def _take(record: RunRecord, period: BudgetPeriod, slots: int) -> int | None:
    """Take slots of a counter and set them in the record. Return None; without room, the number of taken slots.

    If needed, this creates the counter, or sets its limit to the limit of the budget.
    """
    name, limit = period.counter, slots_of(period.measure, period.limit)
    async with get_client() as client:
        for _ in range(TRIES):
            counters = await _post(client, "increment", name, slots)
            if counters is not None and name not in counters:
                if slots > limit:
                    return 0
                try:
                    new = GlobalConcurrencyLimitCreate(name=name, limit=limit, active_slots=slots)
                    body = new.model_dump(mode="json", exclude_unset=True)
                    await request_soon(
                        client, "POST", "/v2/concurrency_limits/", json=body, give_up_after=BUSY_FOR, again=is_busy
                    )
                except PrefectHTTPStatusError as error:
                    if error.response.status_code != 409:  # somebody else has just created it
                        raise
                    continue
                counters[name] = {"limit": limit}
            if counters and counters[name]["limit"] == limit:
                record.estimates = {**(record.estimates or {}), name: slots}
                return None
            if counters:  # somebody has changed the budget: the new limit holds from now on, for this start as well
                await _post(client, "decrement", name, slots)
            counter = await client.read_global_concurrency_limit_by_name(name)
            if counter.limit != limit:
                await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=limit))
            elif counter.active_slots + slots > limit:  # else somebody has just changed it, or given slots back
                return counter.active_slots
    return limit


async def _post(client: PrefectClient, how: str, name: str, slots: int) -> dict[str, Any] | None:
    """Change a counter. Return it by its name, an empty dict if it does not exist, None if it has no room.

    A request is repeated only if it surely changed nothing. Prefect's own method also repeats it after a lost answer.
    """
    path, body = f"/v2/concurrency_limits/{how}", {"names": [name], "slots": slots}
    try:
        answer = await request_soon(client, "POST", path, json=body, give_up_after=BUSY_FOR, again=is_busy)
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (422, 423):  # 422: more slots than the limit; 423: too few free slots
            raise
        return None
    return {counter["name"]: counter for counter in answer.json()}


async def delete_past_counters(older_than: timedelta) -> None:
    """Delete the counters that nobody has changed for `older_than`, and at least for `KEEP`."""
    before = utcnow() - max(older_than, KEEP)
    async with get_client() as client:
        for counter in await read_all(client.read_global_concurrency_limits):
            if counter.name.startswith(f"{PREFIX}.") and counter.updated and counter.updated < before:
                with suppress(ObjectNotFound):  # somebody else prunes too
                    await client.delete_global_concurrency_limit_by_name(counter.name)


def note_exceeded(error: BudgetExceededError, crew: Crew) -> None:
    """Emit the event `prefect-crew.budget.exceeded` for automations, once for each counter."""
    facts = {name: getattr(error, name) for name in ("budget", "measure", "used", "limit", "estimate", "on_limit")}
    emit_event(
        event="prefect-crew.budget.exceeded",
        resource={"prefect.resource.id": error.counter, "prefect.resource.name": f"Budget {error.budget}"},
        related=[{"prefect.resource.id": f"prefect-crew.crew.{crew.label}", "prefect.resource.role": "crew"}],
        payload={**facts, "resets_at": error.resets_at and error.resets_at.isoformat()},
        id=uuid5(NAMESPACE_URL, f"{error.counter}/exceeded"),
    )
