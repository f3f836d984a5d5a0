"""Start a run at most once: decide, claim, post, and write down its id."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import httpx
from opentelemetry import trace
from prefect.exceptions import PrefectException

from prefect_crew._internal.interrupts import ENDINGS, cancelled_once, watch_ctrl_c
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.client._retry_safety import KickoffFate, kickoff_delay, kickoff_fate, post_deadline
from prefect_crew.client.inputs import STATE_ID, encode_inputs, inputs_digest, is_uuid, missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import holds_secret, withholding
from prefect_crew.crew import Crew, CrewSession, open_session
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewError,
    InvalidInputsError,
    KickoffUncertainError,
)
from prefect_crew.records.keys import RunIdentity, identify
from prefect_crew.records.model import (
    Decision,
    InputMarks,
    Lease,
    RecordPhase,
    RecordStore,
    RunRecord,
    check_same_run,
    decide,
    latest_start,
    marks_of,
    utcnow,
)
from prefect_crew.records.owners import crash_dead_owner
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.limits import take_slots
from prefect_crew.runs.listener import subscribe
from prefect_crew.runs.options import check_choices
from prefect_crew.runs.run import OpenRun, no_kickoff_left
from prefect_crew.runs.stop import is_known_cancelled, stop_if_asked
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState
from prefect_crew.webhooks import webhooks_for

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks


T = TypeVar("T")
PERMIT_GOOD_FOR = 30.0
"""Seconds from asking for a permit to the first byte of its kickoff: a connection has to be made in between."""
LIMITED_FOR = 600.0
"""Seconds for which a kickoff is tried again while the server answers 429, or 503 with a time to come back."""
FINISH = 25.0
"""Seconds that a cancelled caller leaves a POST in flight to end: Prefect kills a cancelled process after about 30."""


@dataclass(frozen=True)
class Start:
    """What is to be bought, the same for every attempt. `inputs` are encoded, `digest` is theirs and that of
    `restore_from`.

    `quiet`: no log line, event or span attribute about the decision, for one row among thousands. `settings`: those
    that say whether there are webhooks, read by whoever makes many purchases: reading them takes 3 ms.
    """

    crew: Crew
    identity: RunIdentity
    inputs: dict[str, Any] = field(repr=False)
    digest: str
    name: str | None
    meta: Mapping[str, Any] | None = field(repr=False)
    webhooks: Webhooks | None = field(repr=False)
    force_new: bool = False
    restore_from: str | None = None
    quiet: bool = False
    settings: CrewSettings = field(default_factory=CrewSettings)
    asked_at: datetime = field(default_factory=utcnow)
    slot: str | None = None

    @cached_property
    def secret_inputs(self) -> list[str]:
        """The names of the inputs that are secret."""
        return self.crew.secret_among(self.inputs)

    @cached_property
    def marks(self) -> InputMarks | None:
        """The fingerprints of the inputs, none for a row: its ledger says with what it was run."""
        if self.quiet:
            return None
        token = self.crew.token.get_secret_value()
        return marks_of(token, self.inputs, secret=self.secret_inputs, restore_from=self.restore_from)

    def record(self, attempt: int, good_for: float = 0.0) -> RunRecord:
        """Return the record that claims an attempt, of which a permit is asked for within `good_for` seconds."""
        now, caller = utcnow(), self.identity.caller
        return RunRecord(
            idempotency_key=self.identity.idempotency_key,
            attempt=attempt,
            crew=self.crew.label,
            crew_url=self.crew.url,
            inputs_digest=self.digest,
            input_marks=self.marks,
            owner=caller.owner,
            claimed_at=now,
            good_for=good_for,
            post_deadline=post_deadline(self.crew.request_timeout),
            forced_by=self.identity.place if self.force_new else None,
            flow_run_id=caller.flow_run_id,
            flow_run_count=caller.flow_run_count,
            process=caller.process,
            slot=self.slot,
            step=self.name,
            secret_inputs=self.secret_inputs,
            # In the claim: whoever kicks off may be gone before anything else of it is written down.
            hooked=self.webhooks is None and bool(self.settings.webhook_url),
        )


def uncertain(record: RunRecord) -> KickoffUncertainError:
    """Return the error about a kickoff of which nobody knows what became, having told automations once."""
    reason = record.reason or "whoever sent it ended before its answer was written down"
    emit("uncertain", record, once=True, reason=reason)
    return KickoffUncertainError(idempotency_key=record.idempotency_key, reason=reason, sent=record.sent)


class ClaimLostError(Exception):
    """The claim is not ours any more, was decided by what is not on record any more, or was not used in time.

    Nothing was sent since.
    """


async def post_claimed(
    start: Start, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease
) -> RunRecord:
    """Post a claimed run and write its id down; POST again only what surely did not start a run.

    `lease` is the claim's.

    Raises:
        ClaimLostError: Somebody else has resolved the claim meanwhile, or its kickoff was not sent in time and it is
            given back. Nothing was posted since.
        KickoffUncertainError: It was posted, and nobody knows what became of it. That is on record.
        CrewError: It surely did not start a run. The claim is given back.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + LIMITED_FOR
    if not record.permit:  # the claim of a ledger is its permit as well
        lease = await _take_permit(record, records, lease)
    while True:
        try:
            return await _post_and_react(start, record, records, session, lease)
        except (CrewError, ClaimLostError) as problem:
            if record.phase is not RecordPhase.CLAIMED:
                raise
            async with giving_back(record, records):
                delay = await _pause_after(problem, session)
                if delay is None or loop.time() + delay > until:
                    raise
            if delay and not start.quiet:
                run_logger().warning("%s It is sent again in %.0f s.", problem, delay)
            # Before the pause, so that nobody resolves the claim during it.
            lease = await _take_permit(record, records, lease, pause=delay)


async def _pause_after(problem: Exception, session: CrewSession) -> float | None:
    """Return the seconds after which what was surely refused is sent again, None if it is not."""
    if isinstance(problem, AuthenticationError) and await session.renew():
        return 0.0
    return kickoff_delay(problem)


@asynccontextmanager
async def giving_back(record: RunRecord, records: RecordStore) -> AsyncGenerator[None]:
    """Give a claim back for whatever is raised meanwhile: nothing that was sent for it has started a run."""
    try:
        yield
    except BaseException as problem:
        await give_back(record, records, problem)
        raise


async def to_its_end(
    work: Coroutine[Any, Any, T], then: Callable[[asyncio.Task[T]], Coroutine[Any, Any, None]] | None = None
) -> T:
    """Return what a write or a kickoff gives, which no cancellation of the caller cuts off.

    A cancellation is raised once that has ended, and `then`, which is given the task, has done what follows. After
    `FINISH` seconds it is raised anyway, and both go on beside.
    """
    task = asyncio.create_task(work)
    # An event loop that ends, as on a signal or the timeout of a flow that is not async, cancels all tasks that it
    # knows of: so it cancels the caller, which waits, and not this one.
    asyncio.tasks._unregister_task(task)  # noqa: SLF001  documented, for those who extend asyncio
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # of one that is left, nobody asks
    try:
        await asyncio.wait({task})
    except ENDINGS:
        following = None if then is None else asyncio.create_task(then(task))
        await asyncio.wait({task}, timeout=FINISH)
        if following is not None and task.done():
            await following
        raise
    return task.result()


async def _take_permit(record: RunRecord, records: RecordStore, lease: Lease, *, pause: float = 0.0) -> Lease:
    """Take the next permit of a claim, wait for `pause` seconds, and return how long it is good for.

    `lease` is that of the claim, or of the permit before. Gives the claim back where it fails or is cancelled.

    Raises:
        ClaimLostError: Somebody else has resolved the claim.
    """
    new = Lease(pause + PERMIT_GOOD_FOR)
    async with giving_back(record, records):
        # One that comes to stand late says less than what gives the claim back.
        if await to_its_end(records.permit(record, new.seconds, late=lease.over)):
            await asyncio.sleep(pause)
            return new
    record.phase = RecordPhase.NOT_STARTED  # here alone: what stands there is not ours to write
    raise ClaimLostError("somebody resolved its claim while this process was asleep, or away.")


async def _post_and_react(
    start: Start, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease
) -> RunRecord:
    """Make one POST, and see one that is in flight to its end even if the caller is cancelled."""

    async def react(post: asyncio.Task[RunRecord]) -> None:
        lease.end()  # what is not on its way yet is not sent any more
        await asyncio.wait({post})
        if post.cancelled():
            return
        if (error := post.exception()) is None:
            await stop_if_asked(session, record, records)
        # Of anything else, such as a signal raised within it, nobody knows whether it came before the POST.
        elif record.phase is RecordPhase.CLAIMED and isinstance(error, (CrewError, ClaimLostError)):
            await give_back(record, records, error)

    return await to_its_end(_post(start, record, records, session, lease), react)


async def _post(start: Start, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease) -> RunRecord:
    """Make one POST and write down what became of it. What surely did not start a run raises and writes nothing."""
    crew, attempt, settings = start.crew, record.attempt, start.settings

    def redact(text: str) -> str:
        return crew.redactor(start.inputs)(text)  # hardly ever needed, and slow to make

    def last_look() -> None:
        if lease.over:
            raise ClaimLostError("its permit grew too old before its kickoff could be sent.")

    try:
        webhooks = start.webhooks or webhooks_for(
            crew, record.idempotency_key, attempt=attempt, owner=record.owner, settings=settings
        )
        with withholding(redact):
            # The attempt tells two runs of one key apart, for a person who looks for the one of a record.
            meta = {**(start.meta or {}), "idempotency_key": record.idempotency_key, "run_attempt": record.attempt}
            kickoff_id = await session.client.kickoff(
                start.inputs,
                meta=meta,
                webhooks=webhooks,
                restore_from=start.restore_from,
                before_sending=last_look,
            )
    except ClaimLostError:
        raise
    except BaseException as error:
        if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
            raise
        record.phase, record.reason = RecordPhase.UNCERTAIN, redact(f"{type(error).__name__}: {error}")[:500]
        await _save(record, records)
        if not isinstance(error, Exception):
            raise
        raise uncertain(record) from error
    record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.STARTED, kickoff_id, utcnow()
    if not start.quiet:
        # Before anything else: whatever fails from here on, a person finds the id in a log.
        run_logger().info("Crew %s was kicked off: run %s", record.crew, kickoff_id)
    try:
        reason = await _held_by_another(record, kickoff_id, records)
    except BaseException:
        # Cut off: that the id is on record matters more.
        await _save(record, records)
        raise
    if reason is not None:
        record.phase, record.reason = RecordPhase.UNCERTAIN, reason
        record.kickoff_id = record.kicked_off_at = None
    await _save(record, records)
    if reason is not None:
        raise uncertain(record)
    return record


async def _held_by_another(record: RunRecord, kickoff_id: str, records: RecordStore) -> str | None:
    """Return why a kickoff id cannot be that of this run, None if no other record holds it.

    A proxy that caches or deduplicates kickoffs gives one id to two of them.
    """
    try:
        holders = await records.holders(kickoff_id)
    except (httpx.HTTPError, PrefectException, CrewError):
        return None  # nor can it be written down: whoever saves it tells of that
    others = [key for key, attempt in holders if (key, attempt) != (record.idempotency_key, record.attempt)]
    return (
        f"the crew's server answered with run {kickoff_id}, which is that of idempotency key {others[0]!r}"
        if others
        else None
    )


async def give_back(record: RunRecord, records: RecordStore, error: BaseException) -> None:
    """Write down that a claimed run was surely not started, for this reason."""
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
            "prefect-crew runs resolve %s %s",
            record.idempotency_key,
            record.phase,
            f", kickoff id {record.kickoff_id}" if record.kickoff_id else "",
            type(error).__name__,
            shlex.quote(record.idempotency_key),
            f"--kickoff-id {shlex.quote(record.kickoff_id)}" if record.kickoff_id else "--never-started",
        )


AGAIN = 0.1
"""Seconds after which a claim is read again that somebody else has changed."""
CLAIM_GOOD_FOR = 30.0
"""Seconds, on top of the check of the inputs, after which a claim without a permit is taken for given up."""


@dataclass(frozen=True)
class Started:
    """What a call with an idempotency key came to."""

    decision: Decision
    record: RunRecord

    @property
    def is_new(self) -> bool:
        """Whether this call started it."""
        return self.decision in (Decision.START, Decision.START_AGAIN)


@dataclass(frozen=True)
class _Claim(Started):
    """A claim that is ours, which nothing was sent for yet."""

    known: Sequence[RunRecord] = ()
    """The attempts that it was decided by."""
    lease: Lease = field(default_factory=lambda: Lease(0))


@cancelled_once
async def start_run(
    start: Start,
    records: RecordStore,
    session: CrewSession,
    *,
    check: Callable[[], Awaitable[None]] | None = None,
) -> Started:
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
        opened = await _decide_and_claim(start, records, checked=check is not None)
        _announce(start, opened)
        if not isinstance(opened, _Claim):
            return opened
        try:
            await _make_sure(opened, records, check)
            record = await post_claimed(start, opened.record, records, session, opened.lease)
            return Started(opened.decision, record)
        except ClaimLostError as lost:
            until = loop.time() + LIMITED_FOR if until is None else until  # from the first that was lost
            if loop.time() > until:
                raise CrewError(
                    f"Run {opened.record.idempotency_key!r} was not started: for {LIMITED_FOR / 60:g} minutes each "
                    f"claim of it "
                    "was lost before its kickoff could be sent. The Prefect API answers too slowly, or this machine "
                    "sleeps. See to that, then run again with the same key."
                ) from None
            run_logger().warning("Run %s: %s What is on record now counts.", opened.record.idempotency_key, lost)


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


async def _decide_and_claim(start: Start, records: RecordStore, *, checked: bool) -> Started:
    """Return a decision with the record that it is about; START and START_AGAIN come as a claim that is ours.

    `checked`: whether its inputs are checked before a permit is asked for.
    """
    # Twice, where a token was rotated.
    good_for = CLAIM_GOOD_FOR + (2 * start.crew.request_timeout if checked else 0.0)
    if not start.force_new:
        # The common case in one request: nobody knows the key yet.
        first = await _claim(start, records, Decision.START, (), good_for)
        if first is not None:
            return first
    while True:
        attempts = await records.attempts(start.identity.idempotency_key)
        decision, record = await _decide(start, attempts, records)
        if decision in (Decision.START, Decision.START_AGAIN):
            claim = await _claim(start, records, decision, attempts, good_for)
            if claim is not None:
                return claim
        elif decision is Decision.VOID and record is not None:
            if not await records.resolve(record, RecordPhase.NOT_STARTED, reason="its owner gave it up"):
                await asyncio.sleep(AGAIN)
        elif record is not None and (followed := await _follow(start, decision, record, records)) is not None:
            return followed


async def _claim(
    start: Start, records: RecordStore, decision: Decision, known: Sequence[RunRecord], good_for: float
) -> _Claim | None:
    """Claim the next attempt; None if somebody else has."""
    lease = Lease(good_for)
    record = start.record(known[-1].attempt + 1 if known else 1, good_for)

    async def give_up(claiming: asyncio.Task[bool]) -> None:
        await asyncio.wait({claiming})
        if not claiming.cancelled() and claiming.exception() is None and claiming.result():
            await give_back(record, records, asyncio.CancelledError())

    if not await to_its_end(records.claim(record), give_up):
        return None
    return _Claim(decision, record, known, lease)


async def _decide(
    start: Start, attempts: Sequence[RunRecord], records: RecordStore
) -> tuple[Decision, RunRecord | None]:
    record = latest_start(attempts)
    force_new = start.force_new
    if force_new:
        # A retry of the very call that forced an attempt means that attempt, not yet another one.
        ours = [attempt for attempt in attempts if attempt.forced_by == start.identity.place]
        record, force_new = (latest_start(ours), False) if ours else (record, True)
    elif record is not None:
        check_same_run(
            record,
            crew_url=start.crew.url,
            inputs_digest=start.digest,
            marks=start.marks,
            secret_inputs=start.secret_inputs,
        )
    owner_ended = record is not None and record.phase is RecordPhase.CLAIMED and await records.owner_ended(record)
    decision = decide(
        record,
        caller=start.identity.caller,
        kickoffs=sum(attempt.counts for attempt in attempts),
        max_kickoffs=start.crew.max_kickoffs,
        owner_ended=owner_ended,
        force_new=force_new,
        asked_at=start.asked_at,
    )
    return decision, record


async def _follow(start: Start, decision: Decision, record: RunRecord, records: RecordStore) -> Started | None:
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
        attempts = await records.attempts(record.idempotency_key)
        decision, latest = await _decide(start, attempts, records)
        if latest is None or decision in (Decision.START, Decision.START_AGAIN, Decision.VOID):
            return None
        record = latest
    if decision is Decision.UNCERTAIN:
        _announce(start, Started(decision, record))
        raise uncertain(record)
    return Started(decision, record)


def _announce(start: Start, opened: Started) -> None:
    """Log the decision in one line, emit it, and put it on the span that is current."""
    if start.quiet:
        return
    record = opened.record
    run_logger().info(
        "Idempotency key %s: %s (crew %s, attempt %d%s)",
        record.idempotency_key,
        opened.decision,
        record.crew,
        record.attempt,
        f", run {record.kickoff_id}" if record.kickoff_id else "",
    )
    trace.get_current_span().set_attribute("prefect_crew.decision", str(opened.decision))
    emit("decided", record, decision=str(opened.decision))


async def open_run(
    crew: Crew | CrewSession,
    inputs: Mapping[str, Any],
    *,
    idempotency_key: str | None = None,
    name: str | None = None,
    force_new: bool = False,
    meta: Mapping[str, Any] | None = None,
    webhooks: Webhooks | None = None,
    restore_from: str | UUID | None = None,
    inside_own_task: bool = False,
) -> OpenRun:
    """Find the run of a key, or buy it. What it returns has a kickoff id.

    An open session is used, and stays open; its giver has checked the options.

    Raises:
        ConfigurationError: The inputs cannot be sent, or the idempotency key cannot be used; nothing was started.
        InvalidInputsError: Inputs are missing or unknown; nothing was started.
        IdempotencyConflictError: The key belongs to another crew or other inputs; nothing was started.
        KickoffUncertainError: A kickoff was sent and nobody knows whether it started a run.
        CrewConnectionError, RateLimitedError, ServerError: The kickoff surely did not start a run; it may be retried.
        CrewAPIError: The server refused it; nothing was started.
    """
    opened_before = crew if isinstance(crew, CrewSession) else None
    if isinstance(crew, CrewSession):
        crew = crew.crew
    else:
        check_choices(
            idempotency_key=idempotency_key, name=name, meta=meta, webhooks=webhooks, restore_from=restore_from
        )
    try:
        encoded = encode_inputs(inputs, as_json=crew.inputs_as_json)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{error} Nothing was started.") from None
    # Who gives one of pydantic's secrets has said that it is one.
    crew = crew.hiding(name for name, value in inputs.items() if holds_secret(value))
    state = None if restore_from is None else str(UUID(str(restore_from)))
    digest = inputs_digest(encoded, restore_from=state)
    identity = await identify(
        crew.label, digest, idempotency_key=idempotency_key, name=name, inside_own_task=inside_own_task
    )
    known = _known.get()
    settings = CrewSettings() if known is None else known.settings
    start = Start(crew, identity, encoded, digest, name, meta, webhooks, force_new, state, settings=settings)
    inputs = crew.sealed(inputs)
    del encoded, meta, webhooks
    records = PrefectRecords()
    slots = await take_slots(crew) if await _may_start(start, records) else None
    if slots is not None:
        start = replace(start, slot=str(slots.lease))
    try:
        async with nullcontext() if slots is None else slots.kept():
            run, opened = await _opened(start, records, opened_before)
    except KickoffUncertainError:
        raise  # it may be in flight, and counts until its slot's lease ends
    except CrewError:
        if slots is not None:
            await slots.release()
        raise
    if slots is not None and not opened.is_new:
        await slots.release()
    if not opened.is_new:
        await crash_dead_owner(opened.record)
    if opened.is_new:
        trouble = await run.artifact.create(run.view(None))
        if trouble:
            run_logger().warning("Run %s has no artifact: %s", run.kickoff_id, trouble)
    run.notify(None)
    return run


async def _may_start(start: Start, records: RecordStore) -> bool:
    """Return whether a call may start a run, and so needs a slot: what is in flight or completed needs none."""
    if start.crew.concurrency_limit is None:
        return False
    latest = latest_start(await records.attempts(start.identity.idempotency_key))
    if latest is None or start.force_new:
        return True
    return latest.phase is RecordPhase.ENDED and latest.state is not CrewState.COMPLETED


async def _opened(start: Start, records: RecordStore, session: CrewSession | None) -> tuple[OpenRun, Started]:
    crew, identity = start.crew, start.identity
    if is_known_cancelled(start.identity.caller.flow_run_id):
        # A flow that catches the end of one wait must not go on buying.
        raise CrewError(f"Flow run {start.identity.caller.flow_run_id} was cancelled: it kicks off nothing more.")
    if start.settings.webhook_url:
        subscribe()
    async with open_session(session or crew) as session:
        # Open as long as the POST may be in flight, so that a Ctrl-C meanwhile stops what it started.
        with watch_ctrl_c(), withholding(crew.redactor(start.inputs)):
            try:
                opened = await start_run(
                    start,
                    records,
                    session,
                    check=lambda: check_inputs(session, start),
                )
            except CrewError as error:
                error.about(identity.idempotency_key, crew.label)
                raise
        record = opened.record
        run = OpenRun(
            session.crew.hiding(crew.secret_inputs, texts=crew.hidden),
            str(record.kickoff_id),
            record,
            start.inputs,
            owned=opened.is_new,
            meta=start.meta,
            webhooks=start.webhooks,
        )
    refused_again = record.ended_at is not None and record.ended_at <= start.asked_at
    if opened.decision is Decision.RETURN and record.state is not CrewState.COMPLETED and refused_again:
        run.advice = no_kickoff_left(crew)
    return run, opened


@dataclass(frozen=True)
class _Known:
    """What whoever makes many purchases has asked once for all of them."""

    inputs: Mapping[str, Sequence[CrewInput]]
    settings: CrewSettings


_known: ContextVar[_Known | None] = ContextVar("prefect_crew_known", default=None)


@contextmanager
def knowing_inputs(expected: Mapping[str, Sequence[CrewInput]]) -> Generator[None]:
    """Take the inputs that crews name, by their URLs, as told, and the settings as they are now, meanwhile.

    Whoever has just asked the crews need not ask again; and reading the settings takes 3 ms.
    """
    token = _known.set(_Known(expected, CrewSettings()))
    try:
        yield
    finally:
        _known.reset(token)


async def check_inputs(session: CrewSession, start: Start) -> None:
    """Check inputs against `GET /inputs`. A crew that does not say what it needs is no obstacle.

    Raises:
        InvalidInputsError: Some are missing, or the crew does not name them and extra ones are not allowed.
        AuthenticationError: The token is refused, also after a reload of a stored block.
    """
    expected = await _expected_inputs(session)
    missing = missing_inputs(expected, start.inputs)
    unknown = [] if start.crew.allow_extra_inputs else unknown_inputs(expected, start.inputs)
    if missing or unknown:
        raise InvalidInputsError(
            missing_inputs=missing,
            unknown_inputs=unknown,
            known_inputs=[item.name for item in expected],
            before_kickoff=True,
            method="GET",
            path="/inputs",
        )
    if (state_id := start.inputs.get(STATE_ID)) is not None and not is_uuid(state_id):
        # Not refused: a crew that is no Flow may well have an input of that name.
        run_logger().warning(
            "The input %s is no UUID. A Flow takes it for the id of its state and refuses the run; a crew takes it as "
            "any other input.",
            STATE_ID,
        )


async def _expected_inputs(session: CrewSession) -> Sequence[CrewInput]:
    known = _known.get()
    told = None if known is None else known.inputs.get(session.crew.url)
    if told is not None:
        return told
    try:
        return await session.asked(lambda client: client.inputs())
    except AuthenticationError:
        raise
    except CrewError as error:
        run_logger().warning("The crew's inputs could not be checked before the kickoff: %s", error)
        return []
