"""Start a run at most once: decide, claim, take a permit, post, and write down the id."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NoReturn, TypeVar

from prefect_crew._internal.asyncio_tasks import ENDINGS, cancelled_once
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, naming_prefect_away
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.telemetry import count_uncertain
from prefect_crew.client._retry_safety import BARE_DELAY, KickoffFate, kickoff_delay, kickoff_fate, post_deadline
from prefect_crew.client.inputs import Inputs, missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, CrewSession, session_of
from prefect_crew.exceptions import (
    AuthenticationError,
    BudgetExceededError,
    ConfigurationError,
    CrewAPIError,
    CrewError,
    FlowRunCancelledError,
    InvalidInputsError,
    KickoffUncertainError,
    NotStartedError,
    ResponseFormatError,
)
from prefect_crew.prices import ONE_TOKEN, cost_of
from prefect_crew.records.budgets import add_estimates, note_exceeded, release, release_given_back
from prefect_crew.records.decision import Decision, check_same_run, decide, latest_start
from prefect_crew.records.keys import RunIdentity, identify
from prefect_crew.records.model import Lease, RecordPhase, RecordStore, RunRecord, secret_mark, utcnow
from prefect_crew.records.owners import crash_dead_owner
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.limits import Slots, take_slots
from prefect_crew.runs.listener import subscribe
from prefect_crew.runs.options import RunOptions
from prefect_crew.runs.run import OpenRun, no_attempt_left
from prefect_crew.runs.stop import is_known_cancelled, stop_if_asked
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState
from prefect_crew.webhooks import is_prefect_cloud, webhooks_for

T = TypeVar("T")
CLAIM_GOOD_FOR = 30.0
"""Seconds, on top of the check of the inputs, after which a claim without a permit is taken for given up."""
PERMIT_GOOD_FOR = 30.0
"""Seconds from asking for a permit to the first byte of its kickoff: a connection has to be made in between."""
LIMITED_FOR = 600.0
"""Seconds for which a kickoff is tried again while the server answers 429, or 503 with a time to come back."""
FINISH = 25.0
"""Seconds for all that a cancelled start still does, such as to see a POST in flight to its end: Prefect kills a
cancelled process after about 30."""
LEAST_DELAY = 0.1
"""Seconds before a kickoff is sent for the second time, at least; before each further one it is twice as long."""
AGAIN = 0.1
"""Seconds after which a claim is read again that somebody else has."""


@dataclass(frozen=True)
class RunRequest:
    """What a caller asks for: the run of a key, or another one. It never changes, whatever becomes of the attempts.

    `quiet`: no log line about
    the decision, for one row among thousands. `settings` say whether there are webhooks; reading them takes 3 ms.
    """

    crew: Crew
    identity: RunIdentity
    inputs: Inputs
    options: RunOptions
    quiet: bool = False
    settings: CrewSettings = field(default_factory=CrewSettings)
    asked_at: datetime = field(default_factory=utcnow)
    slot: str | None = None

    def has_given_up(self, record: RunRecord) -> bool:
        """Return whether a try of this call before has claimed a record and surely sent no kickoff for it."""
        nonce = self.identity.nonce
        return record.owner == nonce.text and not (record.entries and nonce.has_sent)

    def record(self, attempt: int, good_for: float = 0.0) -> RunRecord:
        """Return the record that claims an attempt, of which a permit is asked for within `good_for` seconds."""
        caller = self.identity.caller
        return RunRecord(
            idempotency_key=self.identity.idempotency_key,
            attempt=attempt,
            crew=self.crew.label,
            crew_url=self.crew.url,
            inputs_digest=self.inputs.digest,
            owner=caller.owner,
            claimed_at=utcnow(),
            good_for=good_for,
            post_deadline=post_deadline(self.crew.request_timeout),
            forced_by=self.identity.place if self.options.force_new else None,
            flow_run_id=caller.flow_run_id,
            flow_run_count=caller.flow_run_count,
            process=caller.process,
            slot=self.slot,
            step=self.options.name,
            secret_inputs=list(self.inputs.secret_names),
            # A single run is found blind whatever its secrets are: the mark is for rows.
            secret_mark=secret_mark(self.crew.token.get_secret_value(), self.inputs.encoded, self.inputs.secret_names)
            if self.quiet
            else None,
            # In the claim: whoever kicks off may be gone before anything else of it is written down.
            has_webhooks=self.options.webhooks is None and bool(self.settings.webhook_url),
        )


@dataclass(frozen=True)
class Started:
    """What a call with an idempotency key came to: a run with a kickoff id."""

    decision: Decision
    record: RunRecord

    @property
    def is_new(self) -> bool:
        """Whether this call started it."""
        return self.decision.starts


@dataclass(frozen=True)
class _Claim(Started):
    """A claim that is ours, which nothing was sent for yet. `known` are the attempts that it was decided by."""

    known: Sequence[RunRecord]
    lease: Lease


class ClaimLostError(Exception):
    """The claim is not ours any more, was decided by what is on record no more, or was not used in time. Nothing was
    sent since."""


async def _start_run(
    request: RunRequest,
    records: RecordStore,
    session: CrewSession,
    *,
    check: Callable[[], Awaitable[None]] | None = None,
) -> Started:
    """Find the run of an idempotency key, or start it. Raises as `run_crew`.

    `check` raises a CrewError where the kickoff would be in vain. It is called once the claim stands: a run that is
    found needs no check, and costs the crew's server no request.
    """
    loop = asyncio.get_running_loop()
    until = None
    while True:
        found = await _decide_and_claim(request, records, is_checked=check is not None)
        if not request.quiet:
            record = found.record
            run_logger().info(
                "Crew %s: %s. (key %s)", record.crew, _step_taken(found.decision, record), record.idempotency_key
            )
        if found.decision is Decision.UNCERTAIN:
            raise _uncertain(found.record)
        if not isinstance(found, _Claim):
            is_in_flight = found.decision is Decision.REATTACH
            if is_in_flight and (other := await records.other_holder(found.record)) is not None:
                await _take_back_shared_id(found.record, records, other)
            return found
        try:
            await _make_sure(request, found, records, check)
            await _post_until_taken(request, found.record, records, session, found.lease)
        except ClaimLostError as lost:
            until = loop.time() + LIMITED_FOR if until is None else until  # from the first that was lost
            if loop.time() > until:
                raise NotStartedError(
                    f"Run {found.record.idempotency_key!r} was not started: for {LIMITED_FOR / 60:g} minutes each "
                    "claim of it was lost before its kickoff could be sent. The Prefect API answers too slowly, or "
                    "this machine sleeps. Fix that, then run again with the same key."
                ) from None
            run_logger().warning("Run %s: %s What is on record now counts.", found.record.idempotency_key, lost)
        else:
            return found


start_run = cancelled_once(_start_run, lambda: FINISH)


def _step_taken(decision: Decision, record: RunRecord) -> str:
    """Return for the log what a call does, and why."""
    run = f"found run {record.kickoff_id}"
    match decision:
        case Decision.START:
            return "a run is started"
        case Decision.START_AGAIN:
            return "the last run of this key gave no result, and another run is started"
        case Decision.REATTACH:
            return f"{run}, which is in flight. This call waits for it and starts nothing"
        case Decision.RETURN if record.state is CrewState.COMPLETED:
            return f"{run}, which has completed. Its result is used and nothing is started"
        case Decision.RETURN:
            return f"{run}, which has {record.state or 'ended'}. Nothing is started"
        case _:
            return "nobody knows whether an earlier kickoff started a run. Nothing is started"


# Decide and claim


async def _decide_and_claim(request: RunRequest, records: RecordStore, *, is_checked: bool) -> Started:
    """Return a decision with the record that it is about; one that starts a run comes as a claim that is ours."""
    # The time of the check twice, where a token was rotated.
    good_for = CLAIM_GOOD_FOR + (2 * request.crew.request_timeout if is_checked else 0.0)
    if not request.options.force_new:
        # The common case in one request: nobody knows the key yet.
        with suppress(BudgetExceededError):  # of a row: one that has a run needs no room
            first = await _claim(request, records, Decision.START, (), good_for)
            if first is not None:
                return first
    delay, read_again = AGAIN, False
    while True:
        attempts = await records.attempts(request.identity.idempotency_key)
        decision, record = await _decide(request, attempts, records)
        if decision.starts:
            claim = await _claim(request, records, decision, attempts, good_for)
            if claim is not None:
                return claim
            # Whoever took the name is read next. An API that refuses a name and does not show it is not asked at once.
            await asyncio.sleep(delay)
        elif record is None:
            continue
        elif decision is Decision.VOID:
            if await records.resolve(record, RecordPhase.NOT_STARTED, reason="the call that claimed it gave it up"):
                await release(record)  # what a permit of this very call says
            else:
                await asyncio.sleep(AGAIN)
        elif decision is Decision.CLAIMED_ELSEWHERE:
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, 2.0)
        elif decision is not Decision.UNCERTAIN or record.phase is not RecordPhase.CLAIMED or read_again:
            return Started(decision, record)
        # A claim that was read before its owner was seen to have ended may have become a run in between.
        read_again = decision is Decision.UNCERTAIN


async def _decide(
    request: RunRequest, attempts: Sequence[RunRecord], records: RecordStore
) -> tuple[Decision, RunRecord | None]:
    record, force_new = latest_start(attempts), request.options.force_new
    if force_new:
        # A retry of the very call that forced an attempt means that attempt, not yet another one.
        ours = [attempt for attempt in attempts if attempt.forced_by == request.identity.place]
        record, force_new = (latest_start(ours), False) if ours else (record, True)
    owner_ended = record is not None and record.phase is RecordPhase.CLAIMED and await records.owner_ended(record)
    decision = decide(
        record,
        caller=request.identity.caller,
        kickoffs=sum(attempt.counts for attempt in attempts),
        max_attempts=request.crew.max_attempts,
        owner_ended=owner_ended,
        is_own=record is not None and request.has_given_up(record),
        force_new=force_new,
        asked_at=request.asked_at,
    )
    # What another call claimed and surely never sent binds nobody. Nor does what is forced look at any record.
    if record is not None and not request.options.force_new and decision is not Decision.VOID:
        check_same_run(record, crew_url=request.crew.url, inputs_digest=request.inputs.digest)
    return decision, record


async def _claim(
    request: RunRequest, records: RecordStore, decision: Decision, known: Sequence[RunRecord], good_for: float
) -> _Claim | None:
    """Claim the next attempt; None if somebody else has. Raises BudgetExceededError: there is no room for it."""
    lease = Lease(good_for)
    record = request.record(max((attempt.attempt for attempt in known), default=0) + 1, good_for)

    async def claim() -> bool:
        if request.quiet:  # the claim of a row is its permit as well
            await add_estimates(request.crew, record)
        is_ours = await records.claim(record, lease)
        if not is_ours:
            await release(record)
        return is_ours

    async def give_up(claiming: asyncio.Task[bool]) -> None:
        await asyncio.wait({claiming})
        if not claiming.cancelled() and claiming.exception() is None and claiming.result():
            await _give_back(record, records, asyncio.CancelledError(), lease)

    if not await _to_its_end(claim(), give_up):
        return None
    return _Claim(decision, record, known, lease)


async def _make_sure(
    request: RunRequest, claim: _Claim, records: RecordStore, check: Callable[[], Awaitable[None]] | None
) -> None:
    """Check the kickoff, and at the same time that the claim was decided by what is still on record. Then count it.

    Gives the claim back where one fails, however it fails: nothing was sent. A start that is refused leaves no record.

    Raises:
        ClaimLostError: The claim was decided by something else.
        BudgetExceededError: There is no room for the run.
    """
    async with _giving_back(claim.record, records, claim.lease):
        confirmed = asyncio.ensure_future(records.confirm(claim.record, claim.known))
        confirmed.add_done_callback(lambda done: done.cancelled() or done.exception())  # the check may fail first
        try:
            if check is not None:
                try:
                    await check()
                except CrewError:
                    if await confirmed:  # else there may be a run, which needs no check
                        raise
            is_sure = await confirmed
        finally:
            confirmed.cancel()
        if not is_sure:
            raise ClaimLostError("another call claimed it, or its earlier attempts were removed, at the same time.")
        if request.crew.budgets and not request.quiet:
            await _to_its_end(add_estimates(request.crew, claim.record))


def _uncertain(record: RunRecord) -> KickoffUncertainError:
    """Return the error about a kickoff of which nobody knows what became, having emitted its event once."""
    reason = record.reason or "the process that sent it ended before it recorded the answer"
    emit("uncertain", record, once=True, reason=reason)
    return KickoffUncertainError(idempotency_key=record.idempotency_key, reason=reason, sent=record.sent)


# Post


async def _post_until_taken(
    request: RunRequest, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease
) -> None:
    """Post a claimed run and write its id down; POST again only what surely did not start a run.

    Raises:
        ClaimLostError: Somebody else has resolved the claim, or its kickoff was not sent in time. Nothing was posted.
        KickoffUncertainError: It was posted, and nobody knows what became of it. That is on record.
        CrewError: It surely did not start a run. The claim is given back.
    """
    loop = asyncio.get_running_loop()
    until, least = loop.time() + LIMITED_FOR, LEAST_DELAY
    if not record.entries:  # the claim of a ledger is its permit as well
        lease = await _take_permit(record, records, lease)
    while True:
        client = session.client
        try:
            return await _post_and_react(request, record, records, session, lease)
        except (CrewError, ClaimLostError) as problem:
            if record.phase is not RecordPhase.CLAIMED:
                raise
            async with _giving_back(record, records):
                is_renewed = isinstance(problem, AuthenticationError) and await session.renew(client)
                delay = 0.0 if is_renewed else kickoff_delay(problem)
                if delay is not None and not is_renewed:
                    # Each try makes a permit. A server may say 0, or a date that has passed by our clock.
                    delay, least = max(delay, least), min(least * 2, BARE_DELAY)
                if delay is None or loop.time() + delay > until:
                    raise
            if delay and not request.quiet:
                run_logger().warning("%s It is sent again in %.0f s.", problem, delay)
            # Before the pause, so that nobody resolves the claim during it.
            lease = await _take_permit(record, records, lease, pause=delay)


async def _take_permit(record: RunRecord, records: RecordStore, lease: Lease, *, pause: float = 0.0) -> Lease:
    """Take the next permit of a claim, wait for `pause` seconds, and return how long it is good for.

    `lease` is that of the claim, or of the permit before. Gives the claim back where it fails or is cancelled.

    Raises:
        ClaimLostError: Somebody else has resolved the claim.
    """
    new = Lease(pause + PERMIT_GOOD_FOR)
    async with _giving_back(record, records):
        # A permit that comes to stand late says less than what gives the claim back.
        if await _to_its_end(records.permit(record, new.seconds, before=lease, lease=new)):
            await asyncio.sleep(pause)
            return new
    record.phase = RecordPhase.NOT_STARTED  # here alone: what stands there is not ours to write
    if not record.entries:  # which would have told others what to give back
        await release(record)
    raise ClaimLostError("somebody resolved its claim while this process was asleep, or away.")


async def _post_and_react(
    request: RunRequest, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease
) -> None:
    """Make one POST, and see one that is in flight to its end even if the caller is cancelled."""

    async def react(post: asyncio.Task[None]) -> None:
        lease.end()  # what is not on its way yet is not sent any more
        await asyncio.wait({post})
        if post.cancelled():
            return
        if (error := post.exception()) is None:
            await stop_if_asked(session, record, records)
        # Of anything else, such as a signal raised within it, nobody knows whether it came before the POST.
        elif record.phase is RecordPhase.CLAIMED and isinstance(error, (CrewError, ClaimLostError)):
            await _give_back(record, records, error)

    await _to_its_end(_post(request, record, records, session, lease), react)


async def _post(
    request: RunRequest, record: RunRecord, records: RecordStore, session: CrewSession, lease: Lease
) -> None:
    """Make one POST and write down what became of it. What surely did not start a run raises and writes nothing."""
    redact = session.crew.redactor(request.inputs)

    def last_look() -> None:
        if lease.is_over:
            raise ClaimLostError("its permit grew too old before its kickoff could be sent.")
        request.identity.nonce.has_sent = True

    try:
        webhooks = request.options.webhooks or webhooks_for(request.crew, record, settings=request.settings)
        with withholding(redact):
            # The attempt tells two runs of one key apart, for a person who looks for the one of a record.
            meta = {
                **(request.options.meta or {}),
                "idempotency_key": record.idempotency_key,
                "run_attempt": record.attempt,
            }
            kickoff_id = await session.client.kickoff(
                request.inputs.encoded,
                meta=meta,
                webhooks=webhooks,
                restore_from=request.inputs.restore_from,
                before_sending=last_look,
            )
    except ClaimLostError:
        raise
    except BaseException as error:
        if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
            raise
        record.phase, record.reason = RecordPhase.UNCERTAIN, redact(f"{type(error).__name__}: {error}")[:500]
        await _save(record, records)
        count_uncertain(record)
        if not isinstance(error, Exception):
            raise
        raise _uncertain(record) from error
    record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.STARTED, kickoff_id, utcnow()
    if not request.quiet:
        # Before anything else: whatever fails from here on, a person finds the id in a log.
        run_logger().info("Crew %s was kicked off: run %s", record.crew, kickoff_id)
    if (other := await _save_started(record, records)) is not None:
        await _take_back_shared_id(record, records, other)


async def _take_back_shared_id(record: RunRecord, records: RecordStore, other: str) -> NoReturn:
    """Raise KickoffUncertainError, since another record, whose key is `other`, holds the kickoff id of this one.

    A proxy that caches or deduplicates kickoffs gives one id to two of them: one of their records keeps it.
    """
    run = record.kickoff_id
    record.reason = f"the crew's server answered with run {run}, which is that of idempotency key {other!r}"
    record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.UNCERTAIN, None, None
    await _save(record, records)
    count_uncertain(record)
    raise _uncertain(record)


@asynccontextmanager
async def _giving_back(record: RunRecord, records: RecordStore, unused: Lease | None = None) -> AsyncGenerator[None]:
    """Give a claim back for whatever is raised in here, as `_give_back`: no request has started a run for it."""
    try:
        yield
    except BaseException as problem:
        # A courtesy: a claim without a permit expires by itself. With one, a refused kickoff would seem uncertain.
        limit = None if record.entries and isinstance(problem, Exception) else FINISH
        with suppress(TimeoutError):
            await asyncio.wait_for(_give_back(record, records, problem, unused), limit)
        raise


async def _give_back(
    record: RunRecord, records: RecordStore, error: BaseException, unused: Lease | None = None
) -> None:
    """Write down that a claimed run was surely not started, for this reason.

    `unused` is the lease of a claim that no permit was asked of. The claim of a start that is refused is deleted while
    its lease lasts, so that a refusal each minute does not fill the numbers of a key. One that is lost to another call
    stays: two calls that each delete the claim which the other has read would never agree.
    """
    record.phase, record.reason = RecordPhase.NOT_STARTED, f"{type(error).__name__}"
    if unused is None or record.entries:  # the claim of a ledger is its permit as well
        await _save(record, records)
        await release_given_back(record, records)
    elif unused.is_over or isinstance(error, ClaimLostError):
        await _save(record, records)
        await release(record)
    else:
        await _save(record, records, write=records.withdraw)
        await release(record)


async def _save_started(record: RunRecord, records: RecordStore) -> str | None:
    """Write down the id of a run, as `_save`; return the key of another record that holds this id."""
    try:
        return await records.save_started(record)
    except CrewError:
        raise
    except PREFECT_ERRORS as error:
        _log_unsaved(record, error)
        return None


async def _save(
    record: RunRecord, records: RecordStore, *, write: Callable[[RunRecord], Awaitable[None]] | None = None
) -> None:
    """Write down what is known; if that cannot be done, say it where a person finds it, and go on.

    The record then stays a claim, which later calls take for uncertain: nothing is started twice because of it.
    """
    try:
        await (write or records.save)(record)
    except PREFECT_ERRORS as error:
        _log_unsaved(record, error)


def _log_unsaved(record: RunRecord, error: Exception) -> None:
    run_logger().error(
        "Run %s is %s%s, and that could not be recorded (%s). Once the Prefect API is back: "
        "prefect-crew runs resolve %s %s",
        record.idempotency_key,
        record.phase,
        f", kickoff id {record.kickoff_id}" if record.kickoff_id else "",
        type(error).__name__,
        shlex.quote(record.idempotency_key),
        f"--kickoff-id {shlex.quote(record.kickoff_id)}" if record.kickoff_id else "--never-started",
    )


async def _to_its_end(
    work: Coroutine[Any, Any, T], then: Callable[[asyncio.Task[T]], Coroutine[Any, Any, None]] | None = None
) -> T:
    """Return what a write or a kickoff gives, which no cancellation of the caller cuts off.

    A cancellation is raised once that has ended, and `then`, which is given the task, has done what follows. After
    `FINISH` seconds it is raised anyway, and both go on by themselves.
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


# One run of a user's


@naming_prefect_away("Nothing was started. Run again with the same key.")
async def open_run(
    crew: Crew | CrewSession, inputs: Inputs, options: RunOptions, *, inside_own_task: bool = False
) -> OpenRun:
    """Find the run of a key, or start it. What it returns has a kickoff id. Raises as `run_crew`.

    An open session is used, and stays open.
    """
    given, crew = crew, crew.crew if isinstance(crew, CrewSession) else crew
    # Callers have done so to name the run. Inputs that the crew has not taken would show what it calls secret.
    inputs = crew.take(inputs, restore_from=options.restore_from)
    identity = await identify(
        crew.label,
        inputs.digest,
        idempotency_key=options.idempotency_key,
        name=options.name,
        inside_own_task=inside_own_task,
    )
    request = RunRequest(crew, identity, inputs, options)
    if is_known_cancelled(identity.caller.flow_run_id):
        # A flow that catches the end of one wait must not go on starting runs.
        raise FlowRunCancelledError(f"Flow run {identity.caller.flow_run_id} was cancelled, so no run was started.")
    records = PrefectRecords()
    slots = await _take_slot(request, records) if crew.concurrency_limit else None
    if slots is not None:
        request = replace(request, slot=str(slots.lease))
    if request.settings.webhook_url and not is_prefect_cloud(request.settings.webhook_url):
        subscribe()
    try:
        async with (
            nullcontext() if slots is None else slots.kept(),
            session_of(given if isinstance(given, CrewSession) else crew) as session,
        ):
            with withholding(crew.redactor(request.inputs)):
                started = await start_run(request, records, session, check=lambda: check_inputs(session, request))
            crew = session.crew  # with a renewed token, if there was one
    except (CrewError, *PREFECT_ERRORS) as error:
        await _after_failure(error, crew, identity.idempotency_key, slots)
        raise
    record = started.record
    run = OpenRun(
        crew,
        str(record.kickoff_id),
        record,
        request.inputs,
        owned=started.is_new,
        is_found=not started.is_new,
        meta=request.options.meta,
        webhooks=request.options.webhooks,
    )
    # Who gives a session goes on to wait for the run: that shows it if it lasts, else once, at its end.
    if run.owned and not isinstance(given, CrewSession):
        await run.artifact.show(lambda: run.view(None))
    if not run.owned:
        if slots is not None:
            await slots.release()
        await crash_dead_owner(record)
        had_ended = record.ended_at is not None and record.ended_at <= request.asked_at
        if started.decision is Decision.RETURN and record.state is not CrewState.COMPLETED and had_ended:
            run.advice = no_attempt_left(crew)
    run.notify(None)
    return run


async def _after_failure(error: Exception, crew: Crew, idempotency_key: str, slots: Slots | None) -> None:
    """Say in an error which start failed, and give back what the start took."""
    if isinstance(error, CrewError):
        error.about(idempotency_key, crew.label)
    # An uncertain one may be in flight, and counts until its slot's lease ends.
    if slots is not None and not isinstance(error, KickoffUncertainError):
        await slots.release()
    if isinstance(error, BudgetExceededError):
        note_exceeded(error, crew)


async def _take_slot(request: RunRequest, records: RecordStore) -> Slots | None:
    """Take a slot of the crew's limit for a call that may start a run: what is in flight or completed needs none."""
    latest = latest_start(await records.attempts(request.identity.idempotency_key))
    failed = latest is None or (latest.phase is RecordPhase.ENDED and latest.state is not CrewState.COMPLETED)
    if latest is not None and latest.phase is RecordPhase.CLAIMED:  # one that was given up is started anew
        failed = not latest.open_for or request.has_given_up(latest) or await records.owner_ended(latest)
    return await take_slots(request.crew) if failed or request.options.force_new else None


async def check_inputs(session: CrewSession, request: RunRequest) -> None:
    """Check inputs against `GET /inputs`, and the price. A crew that does not say what it needs is not an obstacle.

    A web page or a redirect in place of an answer is one: `/kickoff` would answer in the same way, and nobody would
    know whether it started a run.

    Raises:
        InvalidInputsError: Some are missing, or the crew does not name them and extra ones are not allowed.
        AuthenticationError, ConfigurationError: The token is refused; the URL is not that of a crew, or the price is
            that of a model nobody knows.
    """
    cost_of(request.crew.price, ONE_TOKEN)  # raises if it is that of a model that nobody knows
    expected: Sequence[CrewInput] = session.crew.expected_inputs or ()
    if session.crew.expected_inputs is None:
        try:
            expected = await session.call(lambda client: client.inputs())
        except AuthenticationError:
            raise
        except CrewError as error:
            if _is_no_crew(error):
                raise ConfigurationError(
                    f"{request.crew.url} is not the URL of a crew: GET /inputs was answered with a web page or a "
                    f"redirect. ({error}) Nothing was started. Correct the crew's URL, then run again with the same "
                    "key."
                ) from error
            run_logger().warning("The crew's inputs could not be checked before the kickoff: %s", error)
    missing = missing_inputs(expected, request.inputs.encoded)
    unknown = [] if request.crew.allow_extra_inputs else unknown_inputs(expected, request.inputs.encoded)
    if missing or unknown:
        raise InvalidInputsError(
            missing_inputs=missing,
            unknown_inputs=unknown,
            known_inputs=[item.name for item in expected],
            before_kickoff=True,
            method="GET",
            path="/inputs",
        )


def _is_no_crew(error: CrewError) -> bool:
    """Return whether an error of `GET /inputs` says that a web page, or nothing but another address, is at the URL."""
    if isinstance(error, ResponseFormatError):
        return error.body.lstrip().startswith("<")
    return isinstance(error, CrewAPIError) and 300 <= error.status_code < 400
