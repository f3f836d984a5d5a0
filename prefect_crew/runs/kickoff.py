"""Start a run at most once: decide, claim, take a permit, send `POST /kickoff`, and store the kickoff id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from prefect_crew._internal.asyncio_tasks import OwnTask
from prefect_crew._internal.prefect_api import held_flow_run, left_behind, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, naming_prefect_away
from prefect_crew.artifacts.run import render_run
from prefect_crew.artifacts.telemetry import count_uncertain
from prefect_crew.client._retry_safety import BARE_DELAY, POST_DEADLINE, KickoffFate, kickoff_delay, kickoff_fate
from prefect_crew.client.inputs import Unshown, missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, CrewSession, known_version
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
from prefect_crew.records.budgets import add_estimates, note_exceeded, release, release_given_back
from prefect_crew.records.decision import STARTS, Decision, check_same_run, decide, latest_start
from prefect_crew.records.keys import RunIdentity, identify
from prefect_crew.records.model import Lease, RecordPhase, RecordStore, RunRecord, secret_mark, utcnow
from prefect_crew.records.owners import crash_dead_owner
from prefect_crew.records.sessions import Turn, claim_id, take_turn, turn_in_the_way
from prefect_crew.runs.claims import OtherClaim, loop_ends, save, take_back_shared_id, uncertain
from prefect_crew.runs.limits import Slots, take_slots
from prefect_crew.runs.listener import subscribe
from prefect_crew.runs.options import RunRequest
from prefect_crew.runs.run import WITHHELD, LiveRun, no_attempt_left
from prefect_crew.runs.stop import is_known_cancelled, nothing_started, stop_if_asked, until_cancelled
from prefect_crew.runs.turns import EarlierTurnError, wait_for_turn
from prefect_crew.states import CrewState
from prefect_crew.webhooks import is_prefect_cloud, webhooks_for

T = TypeVar("T")
CLAIM_GOOD_FOR = 30.0
"""Seconds, in addition to the time for the check of the inputs, after which other calls consider a claim without a
permit as given up."""
PERMIT_GOOD_FOR = 30.0
"""Seconds from the request for a permit to the first byte of its kickoff: they include the time to connect."""
LIMITED_FOR = 600.0
"""Seconds for which a kickoff is sent again while the server answers 429, or 503 with `Retry-After`."""
FINISH = 25.0
"""Seconds for the work that a cancelled start still does, such as waiting for the answer to a POST: Prefect kills a
cancelled process after about 30 s."""
LEAST_DELAY = 0.1
"""Seconds, at least, before a kickoff is sent for the second time; each later pause is at least twice as long."""


class ClaimLostError(Exception):
    """Another caller resolved our claim, the records changed after we decided, or our time to send the kickoff is over.
    Nothing was sent."""


async def start_run(
    request: RunRequest,
    identity: RunIdentity,
    records: RecordStore,
    session: CrewSession,
    *,
    slot: str | None = None,
) -> tuple[Decision, RunRecord]:
    """Find the run of an idempotency key, or start it. Return the decision and the record. Raises the errors of
    `run_crew`.

    Args:
        request: The request.
        identity: The idempotency key of the run, and the caller.
        records, session: The store of its record, and the session with its crew.
        slot: The lease of the run's slot in the crew's limit.
    """
    work = OwnTask()
    return await work.run(_Start(request, identity, records, session, slot, work).run(), within=FINISH)


@dataclass
class _Start:
    """One call of `start_run`. `record` is the attempt that it claimed, `lease` the lease of its last claim or permit,
    `earlier` the attempts before.
    """

    request: RunRequest
    identity: RunIdentity
    records: RecordStore
    session: CrewSession
    slot: str | None
    work: OwnTask
    record: RunRecord = field(init=False)
    lease: Lease = field(init=False)
    earlier: Sequence[RunRecord] = ()

    async def run(self) -> tuple[Decision, RunRecord]:
        """Decide, claim and send the kickoff, until there is a run or an error."""
        loop = asyncio.get_running_loop()
        until = None
        while True:
            decision = await self._find_or_claim()
            record, key = self.record, self.identity.idempotency_key
            takes_turn = record.session is not None and decision in STARTS
            if not (self.request.is_row or takes_turn):
                run_logger().info("Crew %s: %s. (key %s)", record.crew, _step_taken(decision, record), key)
            if decision is Decision.UNCERTAIN:
                raise uncertain(record)
            if decision is Decision.REATTACH and (other := await self.records.other_holder(record)) is not None:
                await take_back_shared_id(record, self.records, other)
            if decision not in STARTS:
                return decision, record
            try:
                await self._make_sure()
                if takes_turn:
                    await self._take_turn()
                    if not self.request.is_row:
                        run_logger().info("Crew %s: %s. (key %s)", record.crew, _step_taken(decision, record), key)
                await self._post_until_taken()
            except ClaimLostError as lost:
                self._raise_if_cancelled()
                until = loop.time() + LIMITED_FOR if until is None else until  # counted from the first lost claim
                if loop.time() > until:
                    raise NotStartedError(
                        f"Run {key!r} was not started: for {LIMITED_FOR / 60:g} minutes this call lost each claim "
                        "before its kickoff could be sent. The Prefect API answers too slowly, or this machine "
                        "sleeps. Fix that, then run again with the same key."
                    ) from None
                run_logger().warning("Run %s: %s This call looks at its attempts again.", key, lost)
            else:
                return decision, record

    def _raise_if_cancelled(self) -> None:
        """Raise CancelledError if the caller was cancelled, and FlowRunCancelledError if only its flow run was: the
        caller may outlive it."""
        self.work.raise_if_cancelled()
        if is_known_cancelled(self.identity.caller):
            raise nothing_started(self.identity.caller.flow_run_id)

    # Decide and claim

    async def _find_or_claim(self) -> Decision:
        """Decide by the attempts on record. `record` is then the run that was found, or our claim to start a run."""
        session = self.request.inputs.session
        if not self.request.options.force_new and session is None:
            # The common case in one request: the key is new.
            with suppress(BudgetExceededError):  # raised for a row of a batch; a row that has a run needs no room
                if await self._claim(()):
                    return Decision.START
            self.work.raise_if_cancelled()
        claim = OtherClaim(self.records)
        while True:
            attempts = await self.records.attempts(self.identity.idempotency_key)
            decision, record = await self._decide(attempts)
            if decision in STARTS:
                if session is not None and (
                    earlier := await turn_in_the_way(self.request.crew.url, session, self.records)
                ):
                    raise EarlierTurnError(earlier)  # nothing is written before the turn of this call has come
                if await self._claim(attempts):
                    return decision
                # The next pass reads the claim that has the name. The pause is for an API that refuses a name and does
                # not show its Variable.
                claim.read_again = False
                await asyncio.sleep(claim.delay)
            elif record is None:
                continue
            elif await claim.is_settled(decision, record):
                self.record = record
                return decision

    async def _decide(self, attempts: Sequence[RunRecord]) -> tuple[Decision, RunRecord | None]:
        request, identity = self.request, self.identity
        record, force_new = latest_start(attempts), request.options.force_new
        if force_new:
            # A retry of the call that forced an attempt is about that attempt and starts no further one.
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
        # A claim for which surely nothing was sent is no conflict. With `force_new` no record matters.
        if record is not None and not request.options.force_new and decision is not Decision.VOID:
            check_same_run(record, crew_url=request.crew.url, inputs_digest=request.inputs.digest)
        return decision, record

    async def _claim(self, earlier: Sequence[RunRecord]) -> bool:
        """Claim the attempt after the earlier ones. Return False if another call has claimed it. Raises
        BudgetExceededError: a budget has no room for the run.
        """
        self._raise_if_cancelled()
        request = self.request
        # Twice the time of the check: it repeats its request after the token was rotated.
        lease = Lease(CLAIM_GOOD_FOR + (0.0 if request.is_row else 2 * request.crew.request_timeout))
        record = self._new_record(max((attempt.attempt for attempt in earlier), default=0) + 1, lease.seconds)
        with self.work.uncut():
            if request.is_row:  # the claim of a row is its permit as well
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
        """Return the record that claims an attempt; the caller asks for a permit within `good_for` seconds."""
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
            post_deadline=POST_DEADLINE * crew.request_timeout,
            forced_by=self.identity.place if request.options.force_new else None,
            flow_run_id=caller.flow_run_id,
            flow_run_count=caller.flow_run_count,
            process=caller.process,
            slot=self.slot,
            crew_version=known_version(crew.url),
            step=request.options.name,
            secret_inputs=list(inputs.secret_names),
            # The mark is for rows. A call that finds a single run considers its secrets unknown in any case.
            secret_mark=secret_mark(crew.token.get_secret_value(), inputs.encoded, inputs.secret_names)
            if request.is_row
            else None,
            # In the claim: the process may die between the kickoff and the next write.
            has_webhooks=request.options.webhooks is None and bool(request.settings.webhook_url),
            session=inputs.session,
        )

    async def _make_sure(self) -> None:
        """Make sure that no other attempt appeared or went. Then check the inputs, and add the estimates.

        If a step fails, this gives the claim back, because nothing was sent. A refused start leaves no record.

        Raises:
            ClaimLostError: The attempts on record are not the ones that this call decided by.
            BudgetExceededError: A budget has no room for the run.
        """
        async with self._giving_back(self.lease):
            if not await self.records.confirm(self.record, self.earlier):
                raise ClaimLostError("another call claimed this run or removed its attempts at the same time.")
            if self.request.is_row:  # a batch has checked the inputs of all its rows, and a row has counted already
                return
            # After the claim, and not during `confirm`: for a run that is found, it costs the crew's server no request.
            await check_inputs(self.session, self.request)
            self._raise_if_cancelled()
            if self.request.crew.budgets:
                with self.work.uncut():
                    await add_estimates(self.request.crew, self.record)
                self.work.raise_if_cancelled()

    async def _take_turn(self) -> None:
        """Take the next turn of the session: last, so that a refused start takes none. If this fails, give the claim
        back.

        Raises:
            EarlierTurnError: An earlier turn is not over.
            ClaimLostError: The turn did not come within the time of the claim.
        """
        record, window = self.record, Lease(CLAIM_GOOD_FOR)
        async with self._giving_back(self.lease):
            with self.work.uncut():
                turn = await take_turn(record, self.records)
                if turn is not None and turn.claim == claim_id(record):  # a batch finds the turn by the record
                    record.turn, record.restored = turn.number, turn.restored
            self._raise_if_cancelled()
            # This call may have slept since it read the turn before. Others then went on, and if they were pruned, the
            # number was free again.
            if turn is None or self.lease.is_over or window.is_over:
                raise ClaimLostError("it did not get its turn in the session within the time of its claim.")
            if turn.claim != claim_id(record):
                raise EarlierTurnError(turn)
            if self.request.is_row:
                await self.records.save(record)
                return
            start = "an empty state" if turn.restored is None else f"the state of run {turn.restored}"
            run_logger().info("Session %r: turn %d starts from %s.", turn.session, turn.number, start)

    # Post

    async def _post_until_taken(self) -> None:
        """Send the kickoff of a claim and store its id. Send it again only if the last kickoff surely started no run.

        Raises:
            ClaimLostError: Somebody else has resolved the claim, or the time for the kickoff is over. Nothing was sent.
            KickoffUncertainError: The kickoff was sent, and nobody knows whether it started a run. The record says so.
            CrewError: The kickoff surely started no run. The claim is given back.
        """
        loop, record = asyncio.get_running_loop(), self.record
        until, least = loop.time() + LIMITED_FOR, LEAST_DELAY
        if not record.entries:  # a claim in a ledger is its permit as well
            await self._take_permit()
        while True:
            client = self.session.client
            try:
                with self.work.uncut():  # a cancellation waits until the POST has ended
                    await self._post()
                    await asyncio.sleep(0)  # so that a cancellation at the moment of the answer is noticed
                break
            except (CrewError, ClaimLostError) as problem:
                if record.phase is not RecordPhase.CLAIMED:
                    raise
                async with self._giving_back():
                    if self.work.is_cancelled:
                        raise
                    self._raise_if_cancelled()
                    is_renewed = isinstance(problem, AuthenticationError) and await self.session.renew(client)
                    # The batch decides when a refused row is tried again: other rows wait with it.
                    delay = 0.0 if is_renewed else None if self.request.is_row else kickoff_delay(problem)
                    if delay is not None and not is_renewed:
                        # Each try creates a permit. `Retry-After` may be 0, or a date that is over by our clock.
                        delay, least = max(delay, least), min(least * 2, BARE_DELAY)
                    if delay is None or loop.time() + delay > until:
                        raise
                if delay:
                    run_logger().warning("%s The kickoff is sent again in %.0f s.", problem, delay)
                # Before the pause, so that nobody resolves the claim during it.
                await self._take_permit(pause=delay)
        # The batch of a row decides what becomes of it.
        if self.work.is_cancelled or (is_known_cancelled(self.identity.caller) and not self.request.is_row):
            with self.work.uncut():
                await stop_if_asked(self.session, record, self.records)
        self.work.raise_if_cancelled()

    async def _take_permit(self, *, pause: float = 0.0) -> None:
        """Take the next permit of the claim, and wait for `pause` seconds. Its lease replaces the last one.

        If another error or a cancellation prevents this, it gives the claim back.

        Raises:
            ClaimLostError: Somebody else has resolved the claim, so there is no claim to give back.
        """
        record, lease = self.record, Lease(pause + PERMIT_GOOD_FOR)
        async with self._giving_back():
            # If the request for the permit arrives after the claim was given back, NOT_STARTED still has a higher rank.
            with self.work.uncut():
                is_taken = await self.records.permit(record, lease.seconds, before=self.lease, lease=lease)
            if is_taken:
                self._raise_if_cancelled()
                if pause:
                    await until_cancelled(self.identity.caller.flow_run_id, asyncio.sleep(pause))
                self.lease = lease
                return
        record.phase = RecordPhase.NOT_STARTED  # in memory only: somebody else has written to the record
        if not record.entries:  # a permit would have told others which estimates to release
            await release(record)
        raise ClaimLostError("somebody resolved its claim while this process was asleep, or away.")

    async def _post(self) -> None:
        """Send one `POST /kickoff` and store its outcome. If it surely started no run, raise and store nothing."""
        request, record, records = self.request, self.record, self.records
        masked, has_left = self.session.crew.redactor(request.inputs), False

        def redact(text: str) -> str:
            return WITHHELD if request.inputs.is_hidden else masked(text)

        def last_look() -> None:
            nonlocal has_left
            if self.lease.is_over or self.work.is_cancelled or is_known_cancelled(self.identity.caller):
                raise ClaimLostError("its permit grew too old before its kickoff could be sent.")
            self.identity.nonce.has_sent = has_left = True

        try:
            options, settings = request.options, request.settings
            webhooks = options.webhooks or webhooks_for(request.crew, record, settings=settings, wait=options.wait)
            with withholding(redact):
                # With the attempt, a person finds the run of a record among several runs of one key.
                names = {"idempotency_key": record.idempotency_key, "run_attempt": record.attempt}
                kickoff_id = await self.session.client.kickoff(
                    request.inputs,
                    meta=Unshown({**(request.options.meta or {}), **names}),
                    webhooks=webhooks,
                    restore_from=record.restored or request.inputs.restore_from,
                    before_sending=last_look,
                )
        except ClaimLostError:
            raise
        except BaseException as error:
            if not has_left and loop_ends(error):
                raise ClaimLostError("its event loop ended before its kickoff could be sent.") from None
            if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
                raise
            record.phase, record.reason = RecordPhase.UNCERTAIN, redact(f"{type(error).__name__}: {error}")[:500]
            await save(record, records.save)
            count_uncertain(record)
            if not isinstance(error, Exception):
                raise
            raise uncertain(record) from error
        record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.STARTED, kickoff_id, utcnow()
        if not request.is_row:
            # Before anything else: if a later step fails, a person finds the id in a log.
            run_logger().info("Crew %s was kicked off: run %s", record.crew, kickoff_id)
        if (other := await save(record, records.save_started)) is not None:
            await take_back_shared_id(record, records, other)

    @asynccontextmanager
    async def _giving_back(self, unused: Lease | None = None) -> AsyncGenerator[None]:
        """If the block raises, give the claim back (`_give_back`): no request has started a run for it."""
        try:
            yield
        except BaseException as problem:
            # A claim without a permit expires by itself, so FINISH seconds are enough. With a permit, a refused kickoff
            # would seem uncertain, so there is no limit.
            limit = None if self.record.entries and isinstance(problem, Exception) else FINISH
            with suppress(TimeoutError), self.work.uncut():
                await asyncio.wait_for(_give_back(self.record, self.records, problem, unused), limit)
            raise


def _has_given_up(identity: RunIdentity, record: RunRecord) -> bool:
    """Return whether an earlier try of this call has claimed a record and surely sent no kickoff for it."""
    nonce = identity.nonce
    return record.owner == nonce.text and not (record.entries and nonce.has_sent)


def _step_taken(decision: Decision, record: RunRecord) -> str:
    """Return the text of the log line about a decision and its reason."""
    run = f"found run {record.kickoff_id}"
    match decision:
        case Decision.START:
            return "a run is being started"
        case Decision.START_AGAIN:
            return "the last run of this key gave no result, and another run is being started"
        case Decision.REATTACH:
            return f"{run}, which is in flight. This call waits for it and starts nothing"
        case Decision.RETURN if record.state is CrewState.COMPLETED:
            return f"{run}, which has completed. Its result is used and nothing is started"
        case Decision.RETURN:
            return f"{run}, which has {record.state or 'ended'}. Nothing is started"
        case _:
            return "nobody knows whether an earlier kickoff started a run. Nothing is started"


async def _give_back(
    record: RunRecord, records: RecordStore, error: BaseException, unused: Lease | None = None
) -> None:
    """Store that a claimed run was surely not started, with the error as the reason.

    `unused` is the lease of a claim without a request for a permit. While the lease lasts, this deletes the claim of a
    refused start, so that a refusal each minute does not use up the attempts of a key. A claim that another call
    resolved stays, since two calls that each delete a claim which the other has read would never agree.
    """
    record.phase, record.reason = RecordPhase.NOT_STARTED, f"{type(error).__name__}"
    if unused is None or record.entries:  # a claim in a ledger is its permit as well
        await save(record, records.save)
        await release_given_back(record, records)
    else:
        is_kept = unused.is_over or isinstance(error, ClaimLostError)
        await save(record, records.save if is_kept else records.withdraw)
        await release(record)


# One run for a caller


async def open_run(request: RunRequest, *, inside_own_task: bool = False) -> LiveRun:
    """Find the run of a request, or start it, for a caller that does not wait for it. Raises the errors of
    `run_crew`."""
    run = LiveRun(request.crew)
    await kick_off(run, request, inside_own_task=inside_own_task)
    run.remember()
    if run.owned:
        await run.artifact.keep(lambda: render_run(run.view(None)))  # in `run_crew`, the wait shows the artifact
    return run


@naming_prefect_away("Nothing was started. Run again with the same key.")
async def kick_off(run: LiveRun, request: RunRequest, *, inside_own_task: bool = False) -> None:
    """Find or start a request's run, and set `run.kickoff_id` and `run.record`. Raises the errors of `run_crew`."""
    run.request, crew, options = request, request.crew, request.options
    identity = await identify(
        crew.label,
        request.inputs.digest,
        idempotency_key=options.idempotency_key,
        name=options.name,
        inside_own_task=inside_own_task,
    )
    key, flow_run_id = identity.idempotency_key, identity.caller.flow_run_id
    if request.settings.webhook_url and not is_prefect_cloud(request.settings.webhook_url):
        subscribe()
    while True:
        if is_known_cancelled(identity.caller):
            # A cancelled flow may catch the error of one wait: it must not start further runs.
            raise _refusal(nothing_started(flow_run_id))
        slots = None
        if crew.concurrency_limit:
            slots = await until_cancelled(flow_run_id, _take_slot(request, identity, run.records))
        try:
            async with nullcontext() if slots is None else slots.kept(), run.session:
                with withholding(run.redact_text):
                    decision, record = await start_run(
                        *(request, identity, run.records, run.session),
                        slot=None if slots is None else str(slots.lease),
                    )
            break
        except EarlierTurnError as earlier:
            await _wait_for_turn(earlier.turn, run, request, identity, slots)
        except (CrewError, *PREFECT_ERRORS) as error:
            await _after_failure(error, crew, key, slots)
            if (refusal := _refusal(error)) is not error:
                raise refusal from None
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


def _refusal(error: Exception) -> BaseException:
    """Return the error of a failed start. A call that outlives its flow run on a crew worker ends as cancelled instead,
    after the start has given its claim and its slot back."""
    held = held_flow_run.get()
    if isinstance(error, FlowRunCancelledError) and held is not None and held.is_left:
        return left_behind(held)
    return error


async def _wait_for_turn(
    turn: Turn, run: LiveRun, request: RunRequest, identity: RunIdentity, slots: Slots | None
) -> None:
    """Wait until an earlier turn of the session is over. In the meantime the call holds no slot."""
    crew, policy = request.crew, request.options.wait or request.crew.wait
    if slots is not None:
        await slots.release()
    try:
        await wait_for_turn(
            turn, run.crew, run.records, caller=identity.caller, policy=policy, asked_at=request.asked_at
        )
    except CrewError as error:
        error.about(identity.idempotency_key, crew.label)
        raise


async def _after_failure(error: Exception, crew: Crew, idempotency_key: str, slots: Slots | None) -> None:
    """Add key and crew to the error of a failed start, and release its slot."""
    if isinstance(error, CrewError):
        error.about(idempotency_key, crew.label)
    # An uncertain run may be in flight: it keeps its slot until the lease ends.
    if slots is not None and not isinstance(error, KickoffUncertainError):
        await slots.release()
    if isinstance(error, BudgetExceededError):
        note_exceeded(error, crew)


async def _take_slot(request: RunRequest, identity: RunIdentity, records: RecordStore) -> Slots | None:
    """Take a slot of the crew's limit for a call that may start a run. A run in flight or completed needs none."""
    attempts = await records.attempts(identity.idempotency_key)
    latest, is_used_up = latest_start(attempts), sum(a.counts for a in attempts) >= request.crew.max_attempts
    has_failed = latest is not None and latest.phase is RecordPhase.ENDED and latest.state is not CrewState.COMPLETED
    failed = latest is None or (has_failed and not is_used_up)
    if latest is not None and latest.phase is RecordPhase.CLAIMED:  # if its owner gave up, this call starts the run
        failed = not latest.open_for or _has_given_up(identity, latest) or await records.owner_ended(latest)
    return await take_slots(request.crew) if failed or request.options.force_new else None


async def check_inputs(session: CrewSession, request: RunRequest) -> None:
    """Check the inputs against `GET /inputs`. If the request fails, log that and go on.

    A web page or a redirect as the answer raises: `/kickoff` would answer in the same way, and nobody would know
    whether it started a run.

    Raises:
        InvalidInputsError: Inputs are missing, or the crew does not know some and `allow_extra_inputs` is False.
        AuthenticationError, ConfigurationError: The server refuses the token; the URL is not the URL of a crew.
    """
    expected: Sequence[CrewInput] = session.crew.expected_inputs or ()
    if session.crew.expected_inputs is None:
        try:
            expected = await session.call(lambda client: client.inputs())
        except AuthenticationError:
            raise
        except CrewError as error:
            check_is_crew(error, session.crew)
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


def check_is_crew(error: CrewError, crew: Crew) -> None:
    """Raise ConfigurationError if an error of `GET /inputs` shows that the server sent a web page or a redirect."""
    if isinstance(error, ResponseFormatError):
        is_page = error.body.lstrip().startswith("<")
    else:
        is_page = isinstance(error, CrewAPIError) and 300 <= error.status_code < 400
    if is_page:
        raise ConfigurationError(
            f"{crew.url} is not the URL of a crew: GET /inputs was answered with a web page or a redirect. ({error}) "
            "Nothing was started. Correct the crew's URL, then make the same call again."
        ) from error
