"""The counters of budgets on the Prefect server: what runs in flight have reserved, and what ended ones have used.

A counter is a global concurrency limit without decay: Prefect changes its slots in one conditional UPDATE, which no
Variable offers. A start reserves once its claim stands, and its permit notes how much. Until then the reserve is the
owner's alone; from then on whoever writes down that it did not start gives it back. Order and failure are chosen so
that a counter may be too high, after a crash or a lost answer, and never too low.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.events import emit_event
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

from prefect_crew._internal.prefect_api import is_busy, request_soon, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.budgets import PREFIX, UNITS, BudgetPeriod, slots_of
from prefect_crew.crew import Crew
from prefect_crew.exceptions import BudgetExceededError, ConfigurationError
from prefect_crew.prices import cost_of
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, utcnow

BUSY_FOR = 10.0
"""Seconds for which a change is repeated while the Prefect API is busy."""
TRIES = 5
"""Attempts at a counter that others create or change at the same time."""
UNKNOWN = 0.05
"""The share of a budget that a run reserves while no run of its crew has told what it used."""
KEEP = timedelta(days=32)
"""A counter that nobody has changed for so long is of a past day or month, or of a batch that is over."""
MARK = "{}.exceeded"
"""The name of the limit that stands for the last refusal under a budget that stops runs: each makes it anew, under
another id, and a start notes the one that it found. So no clock says which runs are older than the refusal."""


def _periods(crew: Crew, record: RunRecord) -> list[BudgetPeriod]:
    batch = crew.batch or record.flow_run_id or record.idempotency_key
    holding, warning = dict[str, BudgetPeriod](), dict[str, BudgetPeriod]()
    for budget in crew.budgets:
        for period in budget.periods(name=crew.label, batch=batch, at=record.claimed_at):
            # A crew and a flow of one name share a counter: a run counts in it once, and the lower limit holds.
            found = warning if period.on_limit == "warn" else holding
            found[period.counter] = min(found.get(period.counter, period), period, key=lambda one: one.limit)
    for name in warning.keys() & holding.keys():
        # A counter has one limit, so a limit that only warns is counted apart from one that holds.
        one = warning[name]
        warning[name] = replace(one, counter=f"{name.removesuffix(one.measure)}warn.{one.measure}")
    return [*holding.values(), *warning.values()]


def reserves_median(crew: Crew) -> bool:
    """Return whether what a run is expected to use is known from earlier runs only."""
    by_tokens = crew.price is not None and cost_of(crew.price, None) is None
    return any(one.max_tokens or (one.max_cost and by_tokens) for one in crew.budgets)


async def reserve(crew: Crew, record: RunRecord, warned: set[str]) -> None:
    """Count a run that is about to start in all budgets of its crew, and note in its record what was counted.

    `warned`: the counters whose warning was logged already.

    Raises:
        BudgetExceededError: One of them has no room. Nothing stays counted.
        ConfigurationError: A budget limits the cost, and the crew has no price.
        PREFECT_ERRORS: The Prefect API is away or refuses.
    """
    try:
        for period in _periods(crew, record):
            await _reserve(crew, record, period, warned)
    except BaseException:
        await release(record)
        raise


async def _reserve(crew: Crew, record: RunRecord, period: BudgetPeriod, warned: set[str]) -> None:
    needed = _expected(crew, record, period)
    slots = slots_of(period.measure, needed)
    if not slots or (used := await _take(record, period, slots)) is None:
        return
    error = BudgetExceededError(**vars(period), used=used / UNITS[period.measure], needed=needed)
    if error.on_limit != "warn":
        raise error
    if period.counter not in warned:
        warned.add(period.counter)
        run_logger().warning("%s", error)
        await note_exceeded(error, crew)


def _expected(crew: Crew, record: RunRecord, period: BudgetPeriod) -> float:
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
    known = [one[period.measure] for one in record.earlier if period.measure in one]
    # One slot at least: what a run has reserved nothing of, its end does not correct.
    return max(statistics.median(known) if known else UNKNOWN * period.limit, 1 / UNITS[period.measure])


async def release(record: RunRecord) -> None:
    """Give back what a run has reserved that surely did not start."""
    await change(record, {name: -slots for name, slots in (record.reserved or {}).items()})
    record.reserved = None


async def release_given_back(record: RunRecord, records: RecordStore) -> None:
    """Give back what a claim has reserved that its owner gave back, unless somebody else does: who resolved it, which
    made a permit, or where that is not on record who will resolve it."""
    if not record.reserved:
        return
    with suppress(*PREFECT_ERRORS):
        found = await records.attempts(record.idempotency_key)
        given_back = (record.owner, record.permit, RecordPhase.NOT_STARTED)
        if any((one.owner, one.permit, one.phase) == given_back for one in found):
            await release(record)


def corrections(record: RunRecord) -> dict[str, int]:
    """Return by how many slots the counters of an ended run change by what it used. What is unknown stays reserved."""
    more = dict[str, int]()
    for name, reserved in (record.reserved or {}).items():
        measure = name.rpartition(".")[2]
        if (used := record.used.get(measure)) is not None and (slots := slots_of(measure, used) - reserved):
            more[name] = slots
    return more


async def change(record: RunRecord, slots_by_name: Mapping[str, int]) -> dict[str, int]:
    """Change counters as far as they go, and return by how much each was changed.

    It never fails: the run it is about has ended, or was refused.
    """
    changed = dict[str, int]()
    for name, slots in slots_by_name.items():
        try:
            async with get_client() as client:
                for _ in range(TRIES):
                    how = "increment" if slots > 0 else "decrement"
                    if not slots or await _post(client, how, [name], abs(slots)) is not None:
                        changed[name] = slots
                        break
                    # More than there is room for: what is left of it is taken.
                    stands = await client.read_global_concurrency_limit_by_name(name)
                    slots = max(0, min(slots, stands.limit - stands.active_slots))
        except PREFECT_ERRORS as error:
            what = record.idempotency_key
            run_logger().warning("The counter %s could not be corrected for run %s: %s", name, what, error)
    return changed


async def _take(record: RunRecord, period: BudgetPeriod, slots: int) -> int | None:
    """Take slots of a counter, which is created or given the budget's limit where needed, and note them in a record.

    Where there is no room, return how many slots are taken.
    """
    name, limit, mark = period.counter, slots_of(period.measure, period.limit), MARK.format(period.counter)
    async with get_client() as client:
        for _ in range(TRIES):
            found = await _post(client, "increment", [name, mark] if period.on_limit == "stop" else [name], slots)
            if found is not None and name not in found:
                if slots > limit:
                    return 0
                try:
                    made = GlobalConcurrencyLimitCreate(name=name, limit=limit, active_slots=slots)
                    body = made.model_dump(mode="json", exclude_unset=True)
                    await request_soon(
                        client, "POST", "/v2/concurrency_limits/", json=body, give_up_after=BUSY_FOR, again=is_busy
                    )
                except PrefectHTTPStatusError as error:
                    if error.response.status_code != 409:  # somebody else has just created it
                        raise
                    continue
                found[name] = {"limit": limit}
            if found and found[name]["limit"] == limit:
                record.reserved = {**(record.reserved or {}), name: slots}
                if mark in found:
                    record.marks = {**(record.marks or {}), name: found[mark]["id"]}
                return None
            if found:  # the budget was changed: its limit holds from now on, for this start as well
                await _post(client, "decrement", [name], slots)
            stands = await client.read_global_concurrency_limit_by_name(name)
            if stands.limit != limit:
                await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=limit))
                with suppress(ObjectNotFound):  # what was refused under the other limit stops no run any more
                    await client.delete_global_concurrency_limit_by_name(mark)
            elif stands.active_slots + slots > limit:  # else somebody has just changed it, or given some back
                return stands.active_slots
    return limit


async def _post(client: PrefectClient, how: str, names: list[str], slots: int) -> dict[str, Any] | None:
    """Change counters; return the limits of these names that there are by name, None where one has no room.

    Nothing is sent twice but what surely changed nothing: Prefect's client would, after a lost answer.
    """
    path, body = f"/v2/concurrency_limits/{how}", {"names": names, "slots": slots}
    try:
        answer = await request_soon(client, "POST", path, json=body, give_up_after=BUSY_FOR, again=is_busy)
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (422, 423):  # beyond the limit as a whole, or with what is taken
            raise
        return None
    return {one["name"]: one for one in answer.json()}


async def delete_past_counters(older_than: timedelta) -> None:
    """Delete the counters that nobody has changed for so long, `KEEP` at least."""
    found, before = list[GlobalConcurrencyLimitResponse](), utcnow() - max(older_than, KEEP)
    async with get_client() as client:
        while page := await client.read_global_concurrency_limits(limit=200, offset=len(found)):
            found += page
        for one in found:
            if one.name.startswith(f"{PREFIX}.") and one.updated and one.updated < before:
                with suppress(ObjectNotFound):  # somebody else prunes too
                    await client.delete_global_concurrency_limit_by_name(one.name)


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
            with suppress(ObjectNotFound):
                await client.delete_global_concurrency_limit_by_name(mark)
            with suppress(ObjectAlreadyExists):  # inactive: a start reads it with its counter, and takes none of it
                made = GlobalConcurrencyLimitCreate(name=mark, limit=1, active=False)
                await client.create_global_concurrency_limit(made)
    except PREFECT_ERRORS as problem:
        run_logger().warning("Runs in flight under budget %r are not stopped: %s", error.budget, problem)


async def to_stop(crew: Crew, records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs in flight that are to be stopped: a later start under a budget that says so was refused."""
    found, marks = list[RunRecord](), dict[str, str | None]()
    for record in records:
        periods = {one.counter for one in _periods(crew, record) if one.on_limit == "stop"}
        stopping = periods & {*(record.reserved or ())}
        for name in stopping - {*marks}:
            marks[name] = None
            with suppress(*PREFECT_ERRORS):  # most often that there is none
                async with get_client() as client:
                    marks[name] = str((await client.read_global_concurrency_limit_by_name(MARK.format(name))).id)
        if any(marks[name] not in (None, (record.marks or {}).get(name)) for name in stopping):
            found.append(record)
    return found
