"""One purchase: decide by the record, and where it says so, claim, post once, and write the id down.

The only place that kicks a crew off. It knows its store by protocol: records on the Prefect server or a ledger.
What is promised: never a second POST for one claim unless the first surely did not start a run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
from opentelemetry import trace
from prefect.exceptions import PrefectException

from prefect_crew.api.certainty import KickoffFate, kickoff_delay, kickoff_fate
from prefect_crew.api.errors import AuthenticationError, CrewError, KickoffUncertainError
from prefect_crew.api.withholding import withholding
from prefect_crew.events import emit
from prefect_crew.interrupts import ENDINGS, to_be_seen_to_its_end
from prefect_crew.logs import run_logger
from prefect_crew.receiver.targets import webhooks_for
from prefect_crew.records import (
    Decision,
    RecordPhase,
    RecordStore,
    RunRecord,
    check_same_run,
    decide,
    known_by,
    latest_purchase,
    utcnow,
)
from prefect_crew.run_keys import RunIdentity
from prefect_crew.sessions import CrewSession
from prefect_crew.stopping import stop_if_asked
from prefect_crew.suspended import SuspendedWaits

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks
    from prefect_crew.blocks import DeployedCrew
    from prefect_crew.settings import CrewSettings

__all__ = ["Purchase", "Purchased", "purchase_run"]

LIMITED_FOR = 600.0
"""Seconds for which a kickoff is tried again while the server answers 429, or 503 with a time to come back."""
FINISH = 25.0
"""Seconds that a cancelled caller leaves a POST in flight to end: Prefect kills a cancelled process after about 30."""


@dataclass(frozen=True)
class Purchased:
    """What a call with a run key came to. Within this module, a fresh claim has no kickoff id yet."""

    decision: Decision
    record: RunRecord

    @property
    def bought(self) -> bool:
        """Whether this call bought it, or is about to."""
        return self.decision in (Decision.START, Decision.BUY_AGAIN)


@dataclass(frozen=True)
class Purchase:
    """What is to be bought, the same for every attempt. `inputs` are encoded, `digest` is theirs.

    `quiet`: no log line, event or span attribute about the decision, for one row among thousands. `settings`: read by
    whoever makes many purchases, since reading them takes 3 ms.
    """

    crew: DeployedCrew
    identity: RunIdentity
    inputs: dict[str, Any]
    digest: str
    name: str | None
    meta: Mapping[str, Any] | None
    webhooks: Webhooks | None
    force_new: bool = False
    quiet: bool = False
    settings: CrewSettings | None = None
    asked_at: datetime = field(default_factory=utcnow)

    def record(self, attempt: int, *, delay: float = 0.0) -> RunRecord:
        """Return the record that claims an attempt, which is posted after at most `delay` seconds."""
        now, caller = utcnow(), self.identity.caller
        return RunRecord(
            run_key=self.identity.run_key,
            attempt=attempt,
            crew=self.crew.label,
            crew_url=self.crew.url,
            inputs_digest=self.digest,
            owner=caller.owner,
            claimed_at=now,
            known_by=known_by(now, self.crew.request_timeout, delay),
            forced_by=self.identity.place if self.force_new else None,
            flow_run_id=caller.flow_run_id,
            flow_run_count=caller.flow_run_count,
            step=self.name,
        )


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
    while True:
        _announce(purchase, opened)
        if not opened.bought:
            return opened
        if check is not None:
            await _checked(check, opened.record, records)
        try:
            return Purchased(opened.decision, await _buy(purchase, opened.record, records, session))
        except _ClaimLostError:
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
        await _not_started(record, records, problem)
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
        raise _uncertain(record)
    return Purchased(decision, record)


def _uncertain(record: RunRecord) -> KickoffUncertainError:
    reason = record.reason or "whoever sent it ended before its answer was written down"
    emit("uncertain", record, once=True, reason=reason)
    return KickoffUncertainError(run_key=record.run_key, reason=reason, sent=record.sent)


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


class _ClaimLostError(Exception):
    """Somebody took the owner of this claim for dead, and settled it."""


async def _keep_claim(purchase: Purchase, record: RunRecord, records: RecordStore) -> None:
    """Make sure of a claim that has grown old before its kickoff is sent: a machine slept, or `/inputs` was slow.

    What is sent after its owner must know the outcome may be bought by others meanwhile. Raises _ClaimLostError then.
    """
    patience = timedelta(seconds=purchase.crew.request_timeout)
    if utcnow() + patience < record.known_by:
        return
    await _look_at_claim(record, records)
    record.known_by = known_by(utcnow(), purchase.crew.request_timeout)
    await records.save(record)


async def _look_at_claim(record: RunRecord, records: RecordStore) -> None:
    attempts = await records.attempts(record.run_key)
    standing = next((one for one in attempts if one.attempt == record.attempt), None)
    if standing is None or standing.owner != record.owner or standing.phase is not RecordPhase.CLAIMED:
        record.phase = RecordPhase.NOT_STARTED  # here alone: what stands there is not ours to write
        raise _ClaimLostError


async def _buy(purchase: Purchase, record: RunRecord, records: RecordStore, session: CrewSession) -> RunRecord:
    """Post a claimed run and write its id down; POST again only what surely did not start a run."""
    loop = asyncio.get_running_loop()
    until = loop.time() + LIMITED_FOR
    while True:
        try:
            return await _post_shielded(purchase, record, records, session)
        except CrewError as error:
            if record.phase is not RecordPhase.CLAIMED:
                raise
            if utcnow() >= record.known_by:
                await _look_at_claim(record, records)
            if isinstance(error, AuthenticationError) and await session.renew():
                continue
            delay = kickoff_delay(error)
            if delay is None or loop.time() + delay > until:
                await _not_started(record, records, error)
                raise
            if not purchase.quiet:
                run_logger().warning("%s It is sent again in %.0f s.", error, delay)
            await _pause(record, records, delay, purchase.crew.request_timeout)


async def _pause(record: RunRecord, records: RecordStore, delay: float, request_timeout: float) -> None:
    """Wait between two posts of one claim, with the claim kept fresh for others who look at it."""
    record.known_by = known_by(utcnow(), request_timeout, delay)
    try:
        try:
            await records.save(record)
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().warning("Others may take the claim of run %s for given up: %s", record.run_key, error)
        await asyncio.sleep(delay)
    except ENDINGS as cancelled:
        await _not_started(record, records, cancelled)
        raise


async def _post_shielded(
    purchase: Purchase, record: RunRecord, records: RecordStore, session: CrewSession
) -> RunRecord:
    """See a POST that is in flight to its end even if the caller is cancelled, so that its id is written down."""
    post = asyncio.create_task(_post(purchase, record, records, session))
    to_be_seen_to_its_end(post)
    try:
        return await asyncio.shield(post)
    except ENDINGS:
        if not post.done():
            await asyncio.wait({post}, timeout=FINISH)
        if post.done() and not post.cancelled() and (error := post.exception()) is not None:
            # Of anything else, such as a signal raised within it, nobody knows whether it came before the POST.
            if record.phase is RecordPhase.CLAIMED and isinstance(error, CrewError):
                await _not_started(record, records, error)
        elif post.done() and not post.cancelled():
            await stop_if_asked(session, record, records)
        raise


async def _post(purchase: Purchase, record: RunRecord, records: RecordStore, session: CrewSession) -> RunRecord:
    """Make one POST and write down what became of it. What surely did not start a run raises and writes nothing."""
    crew, attempt, settings = purchase.crew, record.attempt, purchase.settings
    redact = crew.redactor(purchase.inputs)
    await _keep_claim(purchase, record, records)
    try:
        webhooks = purchase.webhooks or webhooks_for(crew, record.run_key, attempt=attempt, settings=settings)
        record.hooked = webhooks is not None and purchase.webhooks is None
        with withholding(redact):
            meta = {**(purchase.meta or {}), "run_key": record.run_key}
            kickoff_id = await session.client.kickoff(purchase.inputs, meta=meta, webhooks=webhooks)
    except BaseException as error:
        if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
            raise
        if utcnow() >= record.known_by:
            await _look_at_claim(record, records)
        record.phase, record.reason = RecordPhase.UNCERTAIN, redact(f"{type(error).__name__}: {error}")[:500]
        await _save(record, records)
        if not isinstance(error, Exception):
            raise
        raise _uncertain(record) from error
    record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.STARTED, kickoff_id, utcnow()
    if not purchase.quiet:
        # Before it is written down: whatever fails from here on, a person finds the id in a log.
        run_logger().info("Crew %s was kicked off: run %s", record.crew, kickoff_id)
    await _save(record, records)
    return record


async def _not_started(record: RunRecord, records: RecordStore, error: BaseException) -> None:
    record.phase, record.reason = RecordPhase.NOT_STARTED, f"{type(error).__name__}"
    await _save(record, records)


async def _save(record: RunRecord, records: RecordStore) -> None:
    """Write down what is known; if that cannot be done, say it where a person finds it, and go on.

    The record then stays a claim, which later calls take for uncertain: nothing is bought twice because of it.
    """
    try:
        await records.save(record)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().error(
            "Run %s is %s%s, and that could not be written down (%s). Once the Prefect API is back: "
            "prefect-crew runs settle %r %s",
            record.run_key,
            record.phase,
            f", kickoff id {record.kickoff_id}" if record.kickoff_id else "",
            type(error).__name__,
            record.run_key,
            f"--kickoff-id {record.kickoff_id}" if record.kickoff_id else "--never-started",
        )
