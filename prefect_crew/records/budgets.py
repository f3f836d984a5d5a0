"""The counters of budgets on the Prefect server: what runs in flight have reserved, and what ended ones have used.

A counter is a global concurrency limit without decay: Prefect changes its slots in one conditional UPDATE, which no
Variable offers. A start reserves before its claim is written, and the claim notes what was reserved. Whoever writes
down that it did not start gives that back; whoever closes the record corrects it. What is uncertain, or was used by a
run that reports nothing, stays counted as reserved. A process that dies in between, or an answer that is lost, leaves a
counter too high, never too low.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.events import emit_event
from prefect.exceptions import ObjectAlreadyExists, PrefectException, PrefectHTTPStatusError

from prefect_crew._internal.prefect_api import is_busy, lock_here, request_soon, run_logger
from prefect_crew.budgets import MOST, UNITS, BudgetPeriod, slots_of
from prefect_crew.crew import Crew
from prefect_crew.exceptions import BudgetExceededError, ConfigurationError
from prefect_crew.prices import cost_of
from prefect_crew.records.model import RecordStore, RunRecord
from prefect_crew.records.store import BUSY_FOR, PrefectRecords

TRIES = 5
"""Attempts at a counter that others create or change at the same time."""
UNKNOWN = 0.05
"""The share of a budget that a run reserves while no run of its crew has told what it used."""
KEPT = 50
"""Runs of a crew whose median is reserved, the latest ones."""
Change = tuple[str, str, int]
"""Increment or decrement, a counter, and by how many slots."""
MARK = "{}.exceeded"
"""The name of the limit whose last change is when a start was refused and runs were to be stopped."""
# By the crew's address, what its latest runs used. Process-wide: a process asks the server for it once.
_used: dict[str, deque[dict[str, float]]] = {}
_warned: set[str] = set()  # process-wide: one line in the log for all rows of a batch


def _periods(crew: Crew, record: RunRecord) -> list[BudgetPeriod]:
    batch = crew.batch or record.flow_run_id or record.idempotency_key
    found = (budget.periods(name=crew.label, batch=batch, at=record.claimed_at) for budget in crew.budgets)
    periods = dict[str, BudgetPeriod]()
    for period in (period for periods in found for period in periods):
        # A crew and a flow of one name share a counter: a run counts in it once, and the lower limit holds.
        other = periods.setdefault(period.counter, period)
        periods[period.counter] = min(other, period, key=lambda one: one.limit)
    return list(periods.values())


async def reserve(crew: Crew, record: RunRecord) -> None:
    """Count the run that a record is about to claim in all budgets of its crew, and note in it what was counted.

    Raises:
        BudgetExceededError: One of them has no room. Nothing stays counted.
        ConfigurationError: A budget limits the cost, and the crew has no price.
        httpx.HTTPError: The Prefect API is away or refuses.
    """
    try:
        for period in _periods(crew, record):
            await _reserve(crew, record, period)
    except BaseException:
        await release(record)
        raise


async def _reserve(crew: Crew, record: RunRecord, period: BudgetPeriod) -> None:
    needed = await _expected(crew, period)
    if not (slots := slots_of(period.measure, needed)):
        return
    if (used := await _take(period, slots)) is None:
        record.reserved = {**(record.reserved or {}), period.counter: slots}
        return
    error = BudgetExceededError(**vars(period), used=used / UNITS[period.measure], needed=needed)
    if error.on_limit != "warn":
        raise error
    if period.counter not in _warned:
        _warned.add(period.counter)
        run_logger().warning("%s", error)
        await note_exceeded(error, crew)


async def _expected(crew: Crew, period: BudgetPeriod) -> float:
    """Return what a run is expected to use: what is known before, else the median of the latest runs of its crew."""
    if period.measure == "kickoffs":
        return 1
    if period.measure == "cost":
        if crew.price is None:
            raise ConfigurationError(
                f"Budget {period.budget!r} limits the cost, and crew {crew.label} has no price. Nothing was started. "
                "Give its block a price, or limit tokens or kickoffs."
            )
        if (fixed := cost_of(crew.price, None)) is not None:
            return fixed
    async with lock_here(f"budget {crew.url}"):
        if crew.url not in _used:
            learn(crew, reversed(await PrefectRecords().latest_ended()))
    known = [one[period.measure] for one in _used[crew.url] if period.measure in one]
    # One slot at least: what a run has reserved nothing of, its end does not correct.
    return max(statistics.median(known) if known else UNKNOWN * period.limit, 1 / UNITS[period.measure])


def learn(crew: Crew, records: Iterable[RunRecord]) -> None:
    """Take what runs of a crew have used, the latest one last, for what its next ones are expected to use."""
    _used.setdefault(crew.url, deque(maxlen=KEPT)).extend(_usage(one) for one in records if one.crew_url == crew.url)


def _usage(record: RunRecord) -> dict[str, float]:
    """Return what is known of what a run used."""
    used = {"cost": record.cost, "tokens": record.usage and record.usage.total_tokens}
    return {measure: amount for measure, amount in used.items() if amount is not None}


async def release(record: RunRecord) -> None:
    """Give back what a run has reserved that surely did not start."""
    await _change([("decrement", name, slots) for name, slots in (record.reserved or {}).items()])
    record.reserved = None


async def release_given_back(record: RunRecord, records: RecordStore) -> None:
    """Give back what a claim has reserved that its owner gave back, unless somebody else did: who resolved or voided it
    has made a permit."""
    with suppress(httpx.HTTPError, PrefectException):
        found = await records.attempts(record.idempotency_key)
        if any((one.owner, one.permit) == (record.owner, record.permit) for one in found):
            await release(record)


def corrections(record: RunRecord) -> list[Change]:
    """Return what changes in the counters of a run that has ended by what it used. What is unknown stays reserved."""
    used, changes = _usage(record), list[Change]()
    for name, reserved in (record.reserved or {}).items():
        measure = name.rpartition(".")[2]
        more = min(slots_of(measure, used[measure]), MOST) - reserved if measure in used else 0
        changes += [("increment" if more > 0 else "decrement", name, abs(more))] if more else []
    return changes


async def settle(crew: Crew, record: RunRecord, changes: Sequence[Change]) -> None:
    """Make the `corrections` of a run once its record is closed; by whoever closed it, once."""
    if crew.url in _used:
        learn(crew, [record])
    await _change(changes)


# Requests


async def _take(period: BudgetPeriod, slots: int) -> int | None:
    """Take slots of a counter, which is created or given the budget's limit where needed.

    Returns:
        None, or where there is no room how many slots are taken.
    """
    name, limit = period.counter, period.slots
    async with get_client() as client:
        for _ in range(TRIES):
            found = await _post(client, "increment", name, slots)
            if found and found[0]["limit"] == limit:
                return None
            if found == []:
                with suppress(ObjectAlreadyExists):
                    await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
                continue
            if found:  # the budget was changed: its limit holds from now on, for this start as well
                await _post(client, "decrement", name, slots)
            stands = await client.read_global_concurrency_limit_by_name(name)
            if stands.limit != limit:
                await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=limit))
            elif stands.active_slots + slots > limit:  # else somebody has just changed it, or given some back
                return stands.active_slots
    return limit


async def _post(client: PrefectClient, change: str, name: str, slots: int) -> list[dict[str, Any]] | None:
    """Change a counter; return the limits of that name that there are, None where it has no room.

    Nothing is sent twice but what surely changed nothing: Prefect's client would, after a lost answer.
    """
    path, body = f"/v2/concurrency_limits/{change}", {"names": [name], "slots": slots}
    try:
        answer = await request_soon(client, "POST", path, json=body, give_up_after=BUSY_FOR, again=is_busy)
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (422, 423):  # beyond the limit as a whole, or with what is taken
            raise
        return None
    return answer.json()


async def _change(changes: Sequence[Change]) -> None:
    """Change counters as far as they go. It never fails: the run it is about has ended, or was refused."""
    for change, name, slots in changes:
        try:
            async with get_client() as client:
                for _ in range(TRIES):
                    if slots <= 0 or await _post(client, change, name, slots) is not None:
                        break
                    # More than there is room for: what is left of it is taken.
                    stands = await client.read_global_concurrency_limit_by_name(name)
                    slots = min(slots, stands.limit - stands.active_slots)
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().warning("The counter %s could not be corrected: %s", name, error)


# What others are told


async def note_exceeded(error: BudgetExceededError, crew: Crew) -> None:
    """Tell automations, once in a period, that a budget has no room, and those who wait for its runs to stop them."""
    facts = {name: getattr(error, name) for name in ("budget", "measure", "used", "limit", "needed", "on_limit")}
    emit_event(
        event="prefect-crew.budget.exceeded",
        resource={"prefect.resource.id": error.counter, "prefect.resource.name": f"Budget {error.budget}"},
        related=[{"prefect.resource.id": f"prefect-crew.crew.{crew.label}", "prefect.resource.role": "crew"}],
        payload={**facts, "resets_at": error.resets_at and error.resets_at.isoformat()},
        id=uuid5(NAMESPACE_URL, f"{error.counter}/exceeded"),
    )
    if error.on_limit != "stop":
        return
    mark = MARK.format(error.counter)
    try:
        async with get_client() as client:
            with suppress(ObjectAlreadyExists):
                await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=mark, limit=0))
            await client.update_global_concurrency_limit(mark, GlobalConcurrencyLimitUpdate(limit=0))  # now, not then
    except (httpx.HTTPError, PrefectException) as problem:
        run_logger().warning("Runs in flight under budget %r are not stopped: %s", error.budget, problem)


async def to_stop(crew: Crew, records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs in flight that are to be stopped: a later start under a budget that says so was refused.

    It makes one request for each counter.
    """
    found, refused_at = list[RunRecord](), dict[str, datetime | None]()
    for record in records:
        for period in _periods(crew, record):
            if period.on_limit != "stop" or period.counter not in (record.reserved or ()):
                continue
            if period.counter not in refused_at:
                refused_at[period.counter] = await _refused_at(period)
            moment = refused_at[period.counter]
            if moment is not None and record.claimed_at < moment:
                found.append(record)
                break
    return found


async def _refused_at(period: BudgetPeriod) -> datetime | None:
    with suppress(httpx.HTTPError, PrefectException):  # most often that there is no such limit
        async with get_client() as client:
            return (await client.read_global_concurrency_limit_by_name(MARK.format(period.counter))).updated
    return None
