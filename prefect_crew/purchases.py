"""One purchase: decide by the record, and where it says so, claim it and have it posted.

It knows its store by protocol: records on the Prefect server or a ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from opentelemetry import trace

from prefect_crew.api.errors import CrewError
from prefect_crew.events import emit
from prefect_crew.logs import run_logger
from prefect_crew.posting import LIMITED_FOR, ClaimLostError, Purchase, give_back, post_claimed, uncertain
from prefect_crew.records import (
    Decision,
    RecordPhase,
    RecordStore,
    RunRecord,
    check_same_run,
    decide,
    latest_purchase,
    utcnow,
)
from prefect_crew.sessions import CrewSession
from prefect_crew.suspending.suspended import SuspendedWaits

__all__ = ["Purchased", "purchase_run"]


@dataclass(frozen=True)
class Purchased:
    """What a call with a run key came to. Within this module, a fresh claim has no kickoff id yet."""

    decision: Decision
    record: RunRecord

    @property
    def bought(self) -> bool:
        """Whether this call bought it, or is about to."""
        return self.decision in (Decision.START, Decision.BUY_AGAIN)


async def purchase_run(
    purchase: Purchase,
    records: RecordStore,
    session: CrewSession,
    *,
    problem: CrewError | None = None,
    check: Callable[[], Awaitable[None]] | None = None,
) -> Purchased:
    """Find the run of a purchase's key, or buy it. What it returns has a kickoff id.

    Args:
        purchase: What is to be bought.
        records: The store of records.
        session: A client for the crew.
        problem: Why nothing can be bought at this moment. A run that is in flight or done is found all the same.
        check: Raises a CrewError where the kickoff would be in vain. It is asked once the claim stands: a run that is
            found needs no check, and costs the crew's server no request.

    Raises:
        CrewError: As `open_run`, or `problem` where only a purchase would do.
    """
    if problem is None:
        opened = await _decide_and_claim(purchase, records)
    else:
        found = await _find_only(purchase, records)
        if found is None:
            raise problem
        run_logger().warning("%s", problem)
        opened = found
    loop = asyncio.get_running_loop()
    until = loop.time() + LIMITED_FOR
    while True:
        _announce(purchase, opened)
        if not opened.bought:
            return opened
        if check is not None:
            await _checked(check, opened.record, records)
        try:
            return Purchased(opened.decision, await post_claimed(purchase, opened.record, records, session))
        except ClaimLostError:
            if loop.time() > until:
                raise CrewError(
                    f"Run {opened.record.run_key!r} was not started: for {LIMITED_FOR / 60:g} minutes each claim of it "
                    "has grown old before its kickoff could be sent. The Prefect API answers too slowly, or this "
                    "machine sleeps. Mend that, then run again with the same key."
                ) from None
            run_logger().warning(
                "Run %s was settled by somebody while this process was asleep, or away: what is on record now counts.",
                opened.record.run_key,
            )
            opened = await _decide_and_claim(purchase, records)


async def _checked(check: Callable[[], Awaitable[None]], record: RunRecord, records: RecordStore) -> None:
    """Give the claim back where the check fails, however it fails: nothing was posted."""
    try:
        await check()
    except BaseException as problem:
        await give_back(record, records, problem)
        raise


async def _find_only(purchase: Purchase, records: RecordStore) -> Purchased | None:
    """Return what the record alone gives, None if that would be a purchase."""
    attempts = await records.attempts(purchase.identity.run_key)
    decision, record = await _decide(purchase, attempts, records)
    if decision in (Decision.START, Decision.BUY_AGAIN) or record is None:
        return None
    return await _follow(purchase, decision, record, records)


async def _decide_and_claim(purchase: Purchase, records: RecordStore) -> Purchased:
    """Return a decision with the record that it is about; START and BUY_AGAIN come with a claim that is ours."""
    if not purchase.force_new:
        # The common case in one request: nobody knows the key yet.
        first = _claim(purchase, 1)
        if await records.claim(first):
            return Purchased(Decision.START, first)
    while True:
        attempts = await records.attempts(purchase.identity.run_key)
        decision, record = await _decide(purchase, attempts, records)
        if decision in (Decision.START, Decision.BUY_AGAIN):
            claim = _claim(purchase, attempts[-1].attempt + 1 if attempts else 1)
            if await records.claim(claim):
                return Purchased(decision, claim)
        elif record is not None:
            return await _follow(purchase, decision, record, records)


def _claim(purchase: Purchase, attempt: int) -> RunRecord:
    # The check of the inputs comes before the POST, twice where a token was rotated.
    return purchase.record(attempt, delay=2 * purchase.crew.request_timeout)


async def _decide(
    purchase: Purchase, attempts: Sequence[RunRecord], records: RecordStore
) -> tuple[Decision, RunRecord | None]:
    record = latest_purchase(attempts)
    force_new = purchase.force_new
    if force_new:
        # A retry of the very call that forced an attempt means that attempt, not yet another one.
        ours = [attempt for attempt in attempts if attempt.forced_by == purchase.identity.place]
        record, force_new = (latest_purchase(ours), False) if ours else (record, True)
    elif record is not None:
        check_same_run(record, crew_url=purchase.crew.url, inputs_digest=purchase.digest)
    owner_ended = record is not None and record.phase is RecordPhase.CLAIMED and await records.owner_ended(record)
    decision = decide(
        record,
        caller=purchase.identity.caller,
        now=utcnow(),
        bought=sum(attempt.counts for attempt in attempts),
        max_kickoffs=purchase.crew.max_kickoffs,
        owner_ended=owner_ended,
        force_new=force_new,
        asked_at=purchase.asked_at,
    )
    if decision is Decision.BUY_AGAIN and record is not None and not purchase.quiet:
        resumed = await SuspendedWaits().waits(record, purchase.identity.caller.flow_run_id)
        decision = Decision.RETURN if resumed else decision
    return decision, record


async def _follow(purchase: Purchase, decision: Decision, record: RunRecord, records: RecordStore) -> Purchased:
    """Return the run that a record leads to, waiting for its id where somebody else is posting."""
    delay = 0.1
    looked_again = False
    while decision is Decision.CLAIMED_ELSEWHERE or (
        decision is Decision.UNCERTAIN and record.phase is RecordPhase.CLAIMED and not looked_again
    ):
        # A claim that was read before its owner was seen to have ended may have become a run in between.
        looked_again = decision is Decision.UNCERTAIN
        if not looked_again:
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, 2.0)
        attempts = await records.attempts(record.run_key)
        decision, latest = await _decide(purchase, attempts, records)
        if latest is None or decision in (Decision.START, Decision.BUY_AGAIN):
            return await _decide_and_claim(purchase, records)
        record = latest
    if decision is Decision.UNCERTAIN:
        _announce(purchase, Purchased(decision, record))
        raise uncertain(record)
    return Purchased(decision, record)


def _announce(purchase: Purchase, opened: Purchased) -> None:
    """Log the decision in one line, emit it, and put it on the span that is current."""
    if purchase.quiet:
        return
    record = opened.record
    run_logger().info(
        "Run key %s: %s (crew %s, attempt %d%s)",
        record.run_key,
        opened.decision,
        record.crew,
        record.attempt,
        f", run {record.kickoff_id}" if record.kickoff_id else "",
    )
    trace.get_current_span().set_attribute("prefect_crew.decision", str(opened.decision))
    emit("decided", record, decision=str(opened.decision))
