"""Start a run at most once: decide, claim, take a permit, post, and write down the id."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn, TypeVar

from prefect_crew._internal.asyncio_tasks import OwnTask
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, naming_prefect_away
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.telemetry import count_uncertain
from prefect_crew.client._retry_safety import BARE_DELAY, KickoffFate, kickoff_delay, kickoff_fate, post_deadline
from prefect_crew.client.inputs import missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, CrewSession
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
from prefect_crew.runs.limits import Slots, take_slots
from prefect_crew.runs.listener import subscribe
from prefect_crew.runs.options import RunRequest
from prefect_crew.runs.run import LiveRun, no_attempt_left
from prefect_crew.runs.stop import is_known_cancelled, stop_if_asked
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
AGAIN = 0.2
"""Seconds after which a claim that another call holds is read again, at first; each further pause is twice as long, up
to 2 s."""


class ClaimLostError(Exception):
    """The claim is not ours any more, was decided by what is on record no more, or was not used in time. Nothing was
    sent since."""


async def start_run(
    request: RunRequest,
    identity: RunIdentity,
    records: RecordStore,
    session: CrewSession,
    *,
    slot: str | None = None,
    check: Callable[[], Awaitable[None]] | None = None,
) -> tuple[Decision, RunRecord]:
    """Find the run of an idempotency key, or start it. Return how it was decided, and its record. Raises as `run_crew`.

    Args:
        request: What is asked for.
        identity: Which run it is about, and who asks.
        records, session: Where its record lives, and what its crew is reached by.
        slot: The lease of the run's slot in the crew's limit.
        check: Raises a CrewError where the kickoff would be in vain. It is called once the claim stands: a run that is
            found needs no check, and costs the crew's server no request.
    """
    work = OwnTask()
    return await work.run(_Start(request, identity, records, session, slot, check, work).run(), within=FINISH)


@dataclass
class _Start:
    """One call of `start_run`, with the attempt that it has claimed: its record, and the lease of its last claim or
    permit. `earlier` are the attempts that the claim was decided by."""

    request: RunRequest
    identity: RunIdentity
    records: RecordStore
    session: CrewSession
    slot: str | None
    check: Callable[[], Awaitable[None]] | None
    work: OwnTask
    record: RunRecord = field(init=False)
    lease: Lease = field(init=False)
    earlier: Sequence[RunRecord] = ()

    async def run(self) -> tuple[Decision, RunRecord]:
        """Decide, claim and post, until there is a run or an error."""
        loop = asyncio.get_running_loop()
        until = None
        while True:
            decision = await self._find_or_claim()
            record, key = self.record, self.identity.idempotency_key
            if not self.request.quiet:
                run_logger().info("Crew %s: %s. (key %s)", record.crew, _step_taken(decision, record), key)
            if decision is Decision.UNCERTAIN:
                raise _uncertain(record)
            if decision is Decision.REATTACH and (other := await self.records.other_holder(record)) is not None:
                await _take_back_shared_id(record, self.records, other)
            if not decision.starts:
                return decision, record
            try:
                await self._make_sure()
                await self._post_until_taken()
            except ClaimLostError as lost:
                self.work.raise_if_cancelled()
                until = loop.time() + LIMITED_FOR if until is None else until  # from the first that was lost
                if loop.time() > until:
                    raise NotStartedError(
                        f"Run {key!r} was not started: for {LIMITED_FOR / 60:g} minutes each claim of it was lost "
                        "before its kickoff could be sent. The Prefect API answers too slowly, or this machine sleeps. "
                        "Fix that, then run again with the same key."
                    ) from None
                run_logger().warning("Run %s: %s What is on record now counts.", key, lost)
            else:
                return decision, record

    # Decide and claim

    async def _find_or_claim(self) -> Decision:
        """Decide by the attempts on record; `record` is the run that is found, or a claim of ours to start it by."""
        if not self.request.options.force_new:
            # The common case in one request: nobody knows the key yet.
            with suppress(BudgetExceededError):  # of a row: one that has a run needs no room
                if await self._claim(()):
                    return Decision.START
            self.work.raise_if_cancelled()
        delay, read_again = AGAIN, False
        while True:
            attempts = await self.records.attempts(self.identity.idempotency_key)
            decision, record = await self._decide(attempts)
            if decision.starts:
                if await self._claim(attempts):
                    return decision
                # Whoever took the name is read next. An API that refuses a name and does not show it is not asked at
                # once.
                await asyncio.sleep(delay)
            elif record is None:
                continue
            elif decision is Decision.VOID:
                reason = "the call that claimed it gave it up"
                if await self.records.resolve(record, RecordPhase.NOT_STARTED, reason=reason):
                    await release(record)  # what a permit of this very call says
                else:
                    await asyncio.sleep(AGAIN)
            elif decision is Decision.CLAIMED_ELSEWHERE:
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)
            elif decision is not Decision.UNCERTAIN or record.phase is not RecordPhase.CLAIMED or read_again:
                self.record = record
                return decision
            # A claim that was read before its owner was seen to have ended may have become a run in between.
            read_again = decision is Decision.UNCERTAIN

    async def _decide(self, attempts: Sequence[RunRecord]) -> tuple[Decision, RunRecord | None]:
        request, identity = self.request, self.identity
        record, force_new = latest_start(attempts), request.options.force_new
        if force_new:
            # A retry of the very call that forced an attempt means that attempt, not yet another one.
            forced = [attempt for attempt in attempts if attempt.forced_by == identity.place]
            record, force_new = (latest_start(forced), False) if forced else (record, True)
        is_claim = record is not None and record.phase is RecordPhase.CLAIMED
        decision = decide(
            record,
            caller=identity.caller,
            kickoffs=sum(attempt.counts for attempt in attempts),
            max_attempts=request.crew.max_attempts,
            owner_ended=record is not None and is_claim and await self.records.owner_ended(record),
            is_own=record is not None and _has_given_up(identity, record),
            force_new=force_new,
            asked_at=request.asked_at,
        )
        # What another call claimed and surely never sent binds nobody. Nor does what is forced look at any record.
        if record is not None and not request.options.force_new and decision is not Decision.VOID:
            check_same_run(record, crew_url=request.crew.url, inputs_digest=request.inputs.digest)
        return decision, record

    async def _claim(self, earlier: Sequence[RunRecord]) -> bool:
        """Claim the attempt after the earlier ones; False if somebody else has. Raises BudgetExceededError: there
        is no room for it."""
        request = self.request
        # The time of the check twice, where a token was rotated.
        lease = Lease(CLAIM_GOOD_FOR + (0.0 if self.check is None else 2 * request.crew.request_timeout))
        record = self._new_record(max((attempt.attempt for attempt in earlier), default=0) + 1, lease.seconds)
        with self.work.uncut():
            if request.quiet:  # the claim of a row is its permit as well
                await add_estimates(request.crew, record)
            is_ours = await self.records.claim(record, lease)
            if not is_ours:
                await release(record)
        self.record, self.lease, self.earlier = record, lease, earlier
        if is_ours and self.work.is_cancelled:
            await _give_back(record, self.records, asyncio.CancelledError(), lease)
        self.work.raise_if_cancelled()
        return is_ours

    def _new_record(self, attempt: int, good_for: float) -> RunRecord:
        """Return the record that claims an attempt, of which a permit is asked for within `good_for` seconds."""
        request, caller = self.request, self.identity.caller
        crew, inputs = request.crew, request.inputs
        return RunRecord(
            idempotency_key=self.identity.idempotency_key,
            attempt=attempt,
            crew=crew.label,
            crew_url=crew.url,
            inputs_digest=inputs.digest,
            owner=caller.owner,
            claimed_at=utcnow(),
            good_for=good_for,
            post_deadline=post_deadline(crew.request_timeout),
            forced_by=self.identity.place if request.options.force_new else None,
            flow_run_id=caller.flow_run_id,
            flow_run_count=caller.flow_run_count,
            process=caller.process,
            slot=self.slot,
            step=request.options.name,
            secret_inputs=list(inputs.secret_names),
            # A single run is found blind whatever its secrets are: the mark is for rows.
            secret_mark=secret_mark(crew.token.get_secret_value(), inputs.encoded, inputs.secret_names)
            if request.quiet
            else None,
            # In the claim: whoever kicks off may be gone before anything else of it is written down.
            has_webhooks=request.options.webhooks is None and bool(request.settings.webhook_url),
        )

    async def _make_sure(self) -> None:
        """Check the kickoff, and at the same time that the claim was decided by what is still on record. Then count it.

        Gives the claim back where one fails, however it fails: nothing was sent. A start that is refused leaves no
        record.

        Raises:
            ClaimLostError: The claim was decided by something else.
            BudgetExceededError: There is no room for the run.
        """
        async with self._giving_back(self.lease):
            confirmed = asyncio.ensure_future(self.records.confirm(self.record, self.earlier))
            confirmed.add_done_callback(lambda done: done.cancelled() or done.exception())  # the check may fail first
            try:
                if self.check is not None:
                    try:
                        await self.check()
                    except CrewError:
                        if await confirmed:  # else there may be a run, which needs no check
                            raise
                is_sure = await confirmed
            finally:
                confirmed.cancel()
            if not is_sure:
                raise ClaimLostError("another call claimed it, or its earlier attempts were removed, at the same time.")
            if self.request.crew.budgets and not self.request.quiet:
                with self.work.uncut():
                    await add_estimates(self.request.crew, self.record)
                self.work.raise_if_cancelled()

    # Post

    async def _post_until_taken(self) -> None:
        """Post a claimed run and write its id down; post again only what surely did not start a run.

        Raises:
            ClaimLostError: Somebody else has resolved the claim, or its kickoff was not sent in time. Nothing was
                posted.
            KickoffUncertainError: It was posted, and nobody knows what became of it. That is on record.
            CrewError: It surely did not start a run. The claim is given back.
        """
        loop, record = asyncio.get_running_loop(), self.record
        until, least = loop.time() + LIMITED_FOR, LEAST_DELAY
        if not record.entries:  # the claim of a ledger is its permit as well
            await self._take_permit()
        while True:
            client = self.session.client
            try:
                with self.work.uncut():  # a POST in flight is seen to its end
                    await self._post()
                    await asyncio.sleep(0)  # a cancellation that comes with its answer is seen
                break
            except (CrewError, ClaimLostError) as problem:
                if record.phase is not RecordPhase.CLAIMED:
                    raise
                async with self._giving_back():
                    if self.work.is_cancelled:
                        raise
                    is_renewed = isinstance(problem, AuthenticationError) and await self.session.renew(client)
                    delay = 0.0 if is_renewed else kickoff_delay(problem)
                    if delay is not None and not is_renewed:
                        # Each try makes a permit. A server may say 0, or a date that has passed by our clock.
                        delay, least = max(delay, least), min(least * 2, BARE_DELAY)
                    if delay is None or loop.time() + delay > until:
                        raise
                if delay and not self.request.quiet:
                    run_logger().warning("%s It is sent again in %.0f s.", problem, delay)
                # Before the pause, so that nobody resolves the claim during it.
                await self._take_permit(pause=delay)
        if self.work.is_cancelled:
            await stop_if_asked(self.session, record, self.records)
        self.work.raise_if_cancelled()

    async def _take_permit(self, *, pause: float = 0.0) -> None:
        """Take the next permit of the claim, and wait for `pause` seconds. Its lease takes the place of the one before.

        Gives the claim back where it fails or is cancelled.

        Raises:
            ClaimLostError: Somebody else has resolved the claim.
        """
        record, lease = self.record, Lease(pause + PERMIT_GOOD_FOR)
        async with self._giving_back():
            # A permit that comes to stand late says less than what gives the claim back.
            with self.work.uncut():
                is_taken = await self.records.permit(record, lease.seconds, before=self.lease, lease=lease)
            if is_taken:
                self.work.raise_if_cancelled()
                await asyncio.sleep(pause)
                self.lease = lease
                return
        record.phase = RecordPhase.NOT_STARTED  # here alone: what stands there is not ours to write
        if not record.entries:  # which would have told others what to give back
            await release(record)
        raise ClaimLostError("somebody resolved its claim while this process was asleep, or away.")

    async def _post(self) -> None:
        """Make one POST and write down what became of it. What surely did not start a run raises and writes nothing."""
        request, record, records = self.request, self.record, self.records
        redact, has_left = self.session.crew.redactor(request.inputs), False

        def last_look() -> None:
            nonlocal has_left
            if self.lease.is_over or self.work.is_cancelled:
                raise ClaimLostError("its permit grew too old before its kickoff could be sent.")
            self.identity.nonce.has_sent = has_left = True

        try:
            webhooks = request.options.webhooks or webhooks_for(request.crew, record, settings=request.settings)
            with withholding(redact):
                # The attempt tells two runs of one key apart, for a person who looks for the one of a record.
                meta = {
                    **(request.options.meta or {}),
                    "idempotency_key": record.idempotency_key,
                    "run_attempt": record.attempt,
                }
                kickoff_id = await self.session.client.kickoff(
                    request.inputs.encoded,
                    meta=meta,
                    webhooks=webhooks,
                    restore_from=request.inputs.restore_from,
                    before_sending=last_look,
                )
        except ClaimLostError:
            raise
        except BaseException as error:
            if not has_left and _loop_ends(error):
                raise ClaimLostError("its event loop ended before its kickoff could be sent.") from None
            if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
                raise
            record.phase, record.reason = RecordPhase.UNCERTAIN, redact(f"{type(error).__name__}: {error}")[:500]
            await _despite_loop_end(partial(_save, records=records), record)
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

    @asynccontextmanager
    async def _giving_back(self, unused: Lease | None = None) -> AsyncGenerator[None]:
        """Give the claim back for whatever is raised in here, as `_give_back`: no request has started a run for it."""
        try:
            yield
        except BaseException as problem:
            # A courtesy: a claim without a permit expires by itself. With one, a refused kickoff would seem uncertain.
            limit = None if self.record.entries and isinstance(problem, Exception) else FINISH
            with suppress(TimeoutError), self.work.uncut():
                await asyncio.wait_for(_give_back(self.record, self.records, problem, unused), limit)
            raise


def _has_given_up(identity: RunIdentity, record: RunRecord) -> bool:
    """Return whether a try of this call before has claimed a record and surely sent no kickoff for it."""
    nonce = identity.nonce
    return record.owner == nonce.text and not (record.entries and nonce.has_sent)


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


def _uncertain(record: RunRecord) -> KickoffUncertainError:
    """Return the error about a kickoff of which nobody knows what became, having emitted its event once."""
    reason = record.reason or "the process that sent it ended before it recorded the answer"
    emit("uncertain", record, once=True, reason=reason)
    return KickoffUncertainError(idempotency_key=record.idempotency_key, reason=reason, sent=record.sent)


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
        return await _despite_loop_end(records.save_started, record)
    except CrewError:
        raise
    except PREFECT_ERRORS as error:
        _log_unsaved(record, error)
        return None


async def _despite_loop_end(write: Callable[[RunRecord], Awaitable[T]], record: RunRecord) -> T:
    """Write something down, once more where the event loop ended meanwhile, which cancels its tasks once.

    Only within `OwnTask.uncut`: elsewhere a CancelledError may be meant for the caller.
    """
    try:
        return await write(record)
    except (asyncio.CancelledError, ValueError) as error:
        if not _loop_ends(error):
            raise
        return await write(record)


def _loop_ends(error: BaseException) -> bool:
    """Return whether an error says that the event loop ends, which cancels the tasks that anyio makes a connection by.

    Once all of them are cancelled, anyio makes an empty group of errors, which is a ValueError.
    """
    task = asyncio.current_task()
    is_own = task is not None and task.cancelling() > 0  # it is this task that was cancelled
    return type(error) in (asyncio.CancelledError, ValueError) and not is_own


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


# One run of a user's


async def open_run(request: RunRequest, *, inside_own_task: bool = False) -> LiveRun:
    """Find the run of a request, or start it, for a caller that does not wait for it. Raises as `run_crew`."""
    run = LiveRun(request.crew)
    await kick_off(run, request, inside_own_task=inside_own_task)
    run.remember()
    if run.owned:
        await run.artifact.show(lambda: run.view(None))  # a wait shows it if it lasts, else once, at its end
    return run


@naming_prefect_away("Nothing was started. Run again with the same key.")
async def kick_off(run: LiveRun, request: RunRequest, *, inside_own_task: bool = False) -> None:
    """Find the run of a request, or start it: `run` has its kickoff id and its record then. Raises as `run_crew`."""
    run.request, crew, options = request, request.crew, request.options
    identity = await identify(
        crew.label,
        request.inputs.digest,
        idempotency_key=options.idempotency_key,
        name=options.name,
        inside_own_task=inside_own_task,
    )
    key, flow_run_id = identity.idempotency_key, identity.caller.flow_run_id
    if is_known_cancelled(flow_run_id):
        # A flow that catches the end of one wait must not go on starting runs.
        raise FlowRunCancelledError(f"Flow run {flow_run_id} was cancelled, so no run was started.")
    slots = await _take_slot(request, identity, run.records) if crew.concurrency_limit else None
    if request.settings.webhook_url and not is_prefect_cloud(request.settings.webhook_url):
        subscribe()
    try:
        async with nullcontext() if slots is None else slots.kept(), run.session:
            with withholding(run.redact):
                decision, record = await start_run(
                    *(request, identity, run.records, run.session),
                    slot=None if slots is None else str(slots.lease),
                    check=lambda: check_inputs(run.session, request),
                )
    except (CrewError, *PREFECT_ERRORS) as error:
        await _after_failure(error, crew, key, slots)
        raise
    run.record, run.kickoff_id, run.is_fresh = record, str(record.kickoff_id), True
    run.owned = record.owner == identity.caller.owner
    run.is_found = not run.owned
    if not run.owned:
        if slots is not None:
            await slots.release()
        await crash_dead_owner(record)
        had_ended = record.ended_at is not None and record.ended_at <= request.asked_at
        if decision is Decision.RETURN and record.state is not CrewState.COMPLETED and had_ended:
            run.advice = no_attempt_left(crew)
    run.notify(None)


async def _after_failure(error: Exception, crew: Crew, idempotency_key: str, slots: Slots | None) -> None:
    """Say in an error which start failed, and give back what the start took."""
    if isinstance(error, CrewError):
        error.about(idempotency_key, crew.label)
    # An uncertain one may be in flight, and counts until its slot's lease ends.
    if slots is not None and not isinstance(error, KickoffUncertainError):
        await slots.release()
    if isinstance(error, BudgetExceededError):
        note_exceeded(error, crew)


async def _take_slot(request: RunRequest, identity: RunIdentity, records: RecordStore) -> Slots | None:
    """Take a slot of the crew's limit for a call that may start a run: what is in flight or completed needs none."""
    latest = latest_start(await records.attempts(identity.idempotency_key))
    failed = latest is None or (latest.phase is RecordPhase.ENDED and latest.state is not CrewState.COMPLETED)
    if latest is not None and latest.phase is RecordPhase.CLAIMED:  # one that was given up is started anew
        failed = not latest.open_for or _has_given_up(identity, latest) or await records.owner_ended(latest)
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
