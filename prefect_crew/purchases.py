"""One purchase: decide by the record, and where it says so, claim it and have it posted.

It knows its store by protocol: records on the Prefect server or a ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from opentelemetry import trace

from prefect_crew.api.errors import CrewError
from prefect_crew.crew import CrewSession
from prefect_crew.events import emit
from prefect_crew.interrupts import cancelled_once
from prefect_crew.logs import run_logger
from prefect_crew.posting import (
    LIMITED_FOR,
    ClaimLostError,
    Purchase,
    give_back,
    giving_back,
    post_claimed,
    to_its_end,
    uncertain,
)
from prefect_crew.records import (
    Decision,
    Lease,
    RecordPhase,
    RecordStore,
    RunRecord,
    check_same_run,
    decide,
    latest_purchase,
)

__all__ = ["Purchased", "purchase_run"]


AGAIN = 0.1
"""Seconds after which a claim is read again that somebody else has changed."""
CLAIM_GOOD_FOR = 30.0
"""Seconds, on top of the check of the inputs, after which a claim without a permit is taken for given up."""


@dataclass(frozen=True)
class Purchased:
    """What a call with a run key came to."""

    decision: Decision
    record: RunRecord

    @property
    def bought(self) -> bool:
        """Whether this call bought it."""
        return self.decision in (Decision.START, Decision.BUY_AGAIN)


@dataclass(frozen=True)
class _Claim(Purchased):
    """A claim that is ours, which nothing was sent for yet."""

    known: Sequence[RunRecord] = ()
    """The attempts that it was decided by."""
    lease: Lease = field(default_factory=lambda: Lease(0))


@cancelled_once
async def purchase_run(
    purchase: Purchase,
    records: RecordStore,
    session: CrewSession,
    *,
    check: Callable[[], Awaitable[None]] | None = None,
) -> Purchased:
    """Find the run of a purchase's key, or buy it. What it returns has a kickoff id.

    Args:
        purchase: What is to be bought.
        records: The store of records.
        session: A client for the crew.
        check: Raises a CrewError where the kickoff would be in vain. It is asked once the claim stands: a run that is
            found needs no check, and costs the crew's server no request.

    Raises:
        CrewError: As `open_run`.
    """
    loop = asyncio.get_running_loop()
    until = None
    while True:
        opened = await _decide_and_claim(purchase, records, checked=check is not None)
        _announce(purchase, opened)
        if not isinstance(opened, _Claim):
            return opened
        try:
            await _make_sure(opened, records, check)
            record = await post_claimed(purchase, opened.record, records, session, opened.lease)
            return Purchased(opened.decision, record)
        except ClaimLostError as lost:
            until = loop.time() + LIMITED_FOR if until is None else until  # from the first that was lost
            if loop.time() > until:
                raise CrewError(
                    f"Run {opened.record.run_key!r} was not started: for {LIMITED_FOR / 60:g} minutes each claim of it "
                    "was lost before its kickoff could be sent. The Prefect API answers too slowly, or this machine "
                    "sleeps. See to that, then run again with the same key."
                ) from None
            run_logger().warning("Run %s: %s What is on record now counts.", opened.record.run_key, lost)


async def _make_sure(claim: _Claim, records: RecordStore, check: Callable[[], Awaitable[None]] | None) -> None:
    """Check the kickoff, and meanwhile that the claim was decided by what is still on record.

    Gives the claim back where either fails, however it fails: nothing was sent. Raises ClaimLostError for the second.
    """
    async with giving_back(claim.record, records):
        confirmed = asyncio.ensure_future(records.confirm(claim.record, claim.known))
        confirmed.add_done_callback(lambda done: done.cancelled() or done.exception())  # the check may fail first
        try:
            if check is not None:
                await check()
            sure = await confirmed
        finally:
            confirmed.cancel()
        if not sure:
            raise ClaimLostError("another call claimed it, or its earlier attempts were removed, at the same time.")


async def _decide_and_claim(purchase: Purchase, records: RecordStore, *, checked: bool) -> Purchased:
    """Return a decision with the record that it is about; START and BUY_AGAIN come as a claim that is ours.

    `checked`: whether its inputs are checked before a permit is asked for.
    """
    # Twice, where a token was rotated.
    good_for = CLAIM_GOOD_FOR + (2 * purchase.crew.request_timeout if checked else 0.0)
    if not purchase.force_new:
        # The common case in one request: nobody knows the key yet.
        first = await _claim(purchase, records, Decision.START, (), good_for)
        if first is not None:
            return first
    while True:
        attempts = await records.attempts(purchase.identity.run_key)
        decision, record = await _decide(purchase, attempts, records)
        if decision in (Decision.START, Decision.BUY_AGAIN):
            claim = await _claim(purchase, records, decision, attempts, good_for)
            if claim is not None:
                return claim
        elif decision is Decision.VOID and record is not None:
            if not await records.resolve(record, RecordPhase.NOT_STARTED, reason="its owner gave it up"):
                await asyncio.sleep(AGAIN)
        elif record is not None and (followed := await _follow(purchase, decision, record, records)) is not None:
            return followed


async def _claim(
    purchase: Purchase, records: RecordStore, decision: Decision, known: Sequence[RunRecord], good_for: float
) -> _Claim | None:
    """Claim the next attempt; None if somebody else has."""
    lease = Lease(good_for)
    record = purchase.record(known[-1].attempt + 1 if known else 1, good_for)

    async def give_up(claiming: asyncio.Task[bool]) -> None:
        await asyncio.wait({claiming})
        if not claiming.cancelled() and claiming.exception() is None and claiming.result():
            await give_back(record, records, asyncio.CancelledError())

    if not await to_its_end(records.claim(record), give_up):
        return None
    return _Claim(decision, record, known, lease)


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
        check_same_run(
            record,
            crew_url=purchase.crew.url,
            inputs_digest=purchase.digest,
            marks=purchase.marks,
            secret_inputs=purchase.secret_inputs,
        )
    owner_ended = record is not None and record.phase is RecordPhase.CLAIMED and await records.owner_ended(record)
    decision = decide(
        record,
        caller=purchase.identity.caller,
        bought=sum(attempt.counts for attempt in attempts),
        max_kickoffs=purchase.crew.max_kickoffs,
        owner_ended=owner_ended,
        force_new=force_new,
        asked_at=purchase.asked_at,
    )
    return decision, record


async def _follow(purchase: Purchase, decision: Decision, record: RunRecord, records: RecordStore) -> Purchased | None:
    """Return the run that a record leads to, waiting for its id where somebody else is posting; None if it has none."""
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
        if latest is None or decision in (Decision.START, Decision.BUY_AGAIN, Decision.VOID):
            return None
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
