"""Runs rows concurrently: claim, kick off, poll, record."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from uuid import uuid4

from prefect.context import FlowRunContext

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, held_flow_run, left_behind, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, prefect_error
from prefect_crew.artifacts.events import emit
from prefect_crew.batches.ledger import PAGE, Ledger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.outcomes import (
    CORRECTABLE,
    ERROR_CAP,
    RETRYABLE,
    STOPPED_WITH_BATCH,
    RowState,
    end_of_row,
    explain_lost,
    is_masked,
    kickoffs_of,
    misfit,
    owed_to,
    state_of,
)
from prefect_crew.batches.rows import RowJob
from prefect_crew.batches.throttle import FirstPoll, Throttle
from prefect_crew.batches.turns import RowTurns
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewStatus
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import (
    AuthenticationError,
    BatchCancelledError,
    BudgetExceededError,
    CrewError,
    CrewLostError,
    DatasetError,
    FlowRunCancelledError,
    IdempotencyConflictError,
    KickoffUncertainError,
    LedgerError,
    SessionBlockedError,
)
from prefect_crew.records.budgets import note_exceeded
from prefect_crew.records.decision import Caller, latest_start
from prefect_crew.records.keys import RunIdentity
from prefect_crew.records.model import RecordPhase, RunRecord, secret_mark
from prefect_crew.records.sessions import Turn
from prefect_crew.runs.kickoff import start_run
from prefect_crew.runs.listener import Waker, waker_for
from prefect_crew.runs.options import RunOptions, RunRequest
from prefect_crew.runs.polling import Phases, Watcher, poll
from prefect_crew.runs.reviews.reviewer import People
from prefect_crew.runs.run import LiveRun, close_run, read_status
from prefect_crew.runs.stop import cancelled_on_server, close_stopped, is_cancelled, newest_id
from prefect_crew.runs.turns import EarlierTurnError
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState

FORCED = (RowState.INVALID_OUTPUT, RowState.LOST)
"""States after which a row starts again only by force: its run has completed, or the server has lost it."""
WAITING_ROWS = 1_000
"""Rows of sessions, at most, that wait for the rows before them, and have no place of `max_in_flight` yet."""
LOG_EVERY = 60.0
"""Seconds between two log lines of the same kind, for any number of rows."""
RowEnd = tuple[RowState, str | None]
"""The state of a row at its end in this call, and the class of its error, if any."""
TICK = 1.0
"""Seconds between two looks at the progress of the batch."""
LOOK_EVERY = 2.0
"""Seconds between two looks at whether the flow run was cancelled: many kickoffs may be sent between them."""
ASK_WITHIN = 5.0
KICK_OFF_WITHIN = 10.0
STOP_WITHIN = 12.0
"""Seconds for each step of a cancellation: Prefect kills a cancelled process after about 30."""


class Runner:
    """Runs the rows of one batch. Each call of `run_batch` has one runner, on one event loop.

    `on_end` is called at the end of each row with the name of its error's class, if any. `judge_again`: whether to
    judge the results of earlier calls again, since `line_options` have changed. `waiting` has the runs in flight by row
    key. `shut`: whether the runner ends its waits for runs too.
    """

    def __init__(
        self,
        session: CrewSession,
        throttle: Throttle,
        ledger: Ledger,
        options: BatchOptions,
        *,
        max_in_flight: int,
        on_end: Callable[[str | None], None],
        judge_again: bool = False,
    ) -> None:
        self.session = session
        self.throttle = throttle
        self.ledger = ledger
        self.shut = False
        self.waiting: dict[str, RunRecord] = {}
        self._options = options
        self.policy = options.wait or session.crew.wait
        self.first_poll = FirstPoll() if options.wait is None else None
        self._on_end = on_end
        self._judge_again = judge_again
        self._failed = self._ended = 0
        self._logged_at: dict[str, float] = {}
        self._places = asyncio.Semaphore(max_in_flight)
        self._rows_of_sessions = asyncio.Semaphore(max_in_flight + WAITING_ROWS)
        self._running: set[asyncio.Task[None]] = set()
        self._turns = RowTurns(session.crew, ledger, throttle, self._places)
        self._settings = CrewSettings()
        meta = {**(options.meta or {}), "batch": ledger.batch}
        self._run_options = RunOptions.of(meta=meta, wait=options.wait, webhooks=options.webhooks)
        context = FlowRunContext.get()
        flow_run = None if context is None else context.flow_run
        self._flow_run = (None, 0) if flow_run is None else (str(flow_run.id), flow_run.run_count)

    def stop(self, reason: str, *, shut: bool = False) -> None:
        """Kick off nothing more; with `shut`, end the waits too. The next call reattaches to the runs in flight."""
        self.throttle.stop(reason)
        if shut and not self.shut:
            self.shut = True
            for row in self._running - {asyncio.current_task()}:
                row.cancel()

    async def run_until_cancelled(self, jobs: Iterator[RowJob], tick: Callable[[], Awaitable[None]]) -> None:
        """Run all rows. If the flow run is cancelled, obey `on_cancel`; if only the task is cancelled, leave the runs.

        This calls `tick` about once a second, until the rows have ended.

        Raises:
            BatchCancelledError: This flow run was cancelled, and nobody else ends it.
            asyncio.CancelledError: The task was cancelled, or outlives its flow run. The runs in flight were stopped or
                left.
            CrewError: A row or a tick raised it.
        """
        own, on_cancel = flow_run_id(), self._options.on_cancel
        rows = asyncio.ensure_future(self.run(jobs))
        try:
            await _tick_during(rows, tick, own)
            held = held_flow_run.get()
            if held is not None and held.is_left:
                await self._end(rows, tick, "leave")
                raise left_behind(held)
            if not rows.done():
                await self._end(rows, tick, on_cancel)
            elif self.throttle.stopped is None or not await is_cancelled(own):
                return
            raise BatchCancelledError(name=self.ledger.batch)
        except asyncio.CancelledError:
            if not rows.done():
                await self._end(rows, tick, on_cancel if await _is_flow_run_cancelled(own) else "leave")
            raise
        finally:
            await cancel_and_wait(rows)

    async def _end(self, rows: asyncio.Future[None], tick: Callable[[], Awaitable[None]], on_cancel: str) -> None:
        """Kick off nothing more; stop the runs in flight, wait for them (drain) or leave them."""
        self.stop("the batch was cancelled.")
        if on_cancel == "drain":
            run_logger().info(
                "Batch %s was cancelled. It waits for its %d runs in flight.", self.ledger.batch, len(self.waiting)
            )
            await _tick_during(rows, tick, None)
            return
        # A kickoff under way gets its id first. If it were cut off, it would be uncertain.
        await _is_done_within(KICK_OFF_WITHIN, self.throttle.idle())
        if on_cancel == "stop":
            if not await _is_done_within(STOP_WITHIN, self.stop_runs(STOPPED_WITH_BATCH)):
                run_logger().warning("Not every run in flight could be stopped in %.0f s.", STOP_WITHIN)
        else:
            run_logger().warning(
                "%d runs of batch %s are left in flight. The same call waits for them. To stop them, run: "
                "prefect-crew batch cancel %s",
                len(self.waiting),
                self.ledger.batch,
                shlex.quote(self.ledger.batch),
            )
        await cancel_and_wait(rows)

    async def run(self, jobs: Iterator[RowJob]) -> None:
        """Run all rows, read each when there is room for it, and return when all have ended or were left.

        Raises CrewError if the ledger or the data set failed, and leaves the runs in flight.
        """
        try:
            async with asyncio.TaskGroup() as group:
                if self._options.session is not None:
                    for record in await self.ledger.left_out(self.session.crew.url):
                        if self.shut:
                            break
                        self._running.add(waiting := group.create_task(self._wait_for_left_out(record)))
                        waiting.add_done_callback(self._running.discard)
                async for job, attempts in self._rows_to_run(jobs):
                    room = self._places if job.inputs.session is None else self._rows_of_sessions
                    await room.acquire()
                    if self.shut:
                        room.release()
                        break
                    row = group.create_task(self._run_row(job, attempts))
                    self._running.add(row)
                    row.add_done_callback(partial(self._row_done, room))
        except BaseExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, DatasetError):
                first = DatasetError(first.reason, source=first.source, line=first.line, begun=True)
            self.throttle.stop(str(first))
            raise first from errors.exceptions[0].__cause__

    def _row_done(self, room: asyncio.Semaphore, row: asyncio.Task[None]) -> None:
        self._running.discard(row)
        room.release()

    async def _rows_to_run(self, jobs: Iterator[RowJob]) -> AsyncGenerator[tuple[RowJob, Sequence[RunRecord]]]:
        """Yield the rows that are not done, with their attempts; only rows in flight once the batch has stopped."""
        is_new = await self.ledger.is_empty()
        while page := await asyncio.to_thread(lambda: list(islice(jobs, PAGE))):
            if self.shut:  # another process may own the ledger by now
                return
            states = await self.ledger.enter_rows(
                page, self.session.crew, anew=self._judge_again, is_retried=self._options.is_retried
            )
            for _ in (state for state in states.values() if state is RowState.CONFLICT):
                self._on_end(IdempotencyConflictError.__name__)
            # An earlier call may have been killed before it did so.
            await self._turns.note(job for job in page if states[job.key] is not RowState.PENDING)
            page = [job for job in page if not self._has_nothing_to_do(states[job.key])]
            begun = [job.key for job in page if states[job.key] is not RowState.PENDING]
            by_row = await self.ledger.attempts_of(begun) if begun else {}
            for job in page:
                attempts = by_row.get(job.key, ())
                latest = latest_start(attempts)
                if latest is not None and latest.phase is RecordPhase.ENDED:
                    state, count = await self._judge(job, latest), kickoffs_of(attempts)
                    if not self._starts_again(job, state, count=count, before=count, owed=owed_to(attempts)):
                        continue
                if self.throttle.stopped is None or (latest is not None and latest.phase is RecordPhase.STARTED):
                    yield job, attempts
            if is_new and self.throttle.stopped is not None:
                return

    def _has_nothing_to_do(self, state: RowState) -> bool:
        """Whether this call has surely nothing to do for a row in this state."""
        if state in (RowState.UNCERTAIN, RowState.CONFLICT):
            return True
        retries = self._options.retries or self._options.retry_failed
        return state.is_final and not self._judge_again and (state is RowState.COMPLETED or not retries)

    async def _run_row(self, job: RowJob, attempts: Sequence[RunRecord]) -> None:
        """Bring one row to its end. If the batch stops before, the row is left without an end."""
        try:
            async with self._turns.of(job):
                end = await self._to_its_end(job, attempts)
        finally:
            self.throttle.left(job.key)
        if end is not None:
            self._ended += 1
            is_blocked = end[1] == SessionBlockedError.__name__  # one session must not stop the batch
            self._failed += end[0] is not RowState.COMPLETED and not is_blocked
            if reason := self._options.why_stop(self._failed, self._ended):
                self.stop(reason)
            self._on_end(end[1])

    async def _wait_for_left_out(self, record: RunRecord) -> None:
        """Wait for a run whose row no call runs any more, so that the rows of its session can go on."""
        inputs = self.session.crew.take(Inputs.of({}), session=record.session)
        job = RowJob(-1, self.ledger.row_key(record.idempotency_key), inputs)
        async with self._turns.of(job):
            try:
                await self.throttle.take_slot(job.key)
                await self._wait(job, record, first_look=True, counts=False)
            finally:
                self.throttle.left(job.key)

    async def _to_its_end(self, job: RowJob, attempts: Sequence[RunRecord]) -> RowEnd | None:
        """Find or start a row's run and wait for it, then retry as often as allowed; return the end of the last run.

        None if there is no end, since the batch starts nothing more or the token was refused.
        """
        before = count = kickoffs_of(attempts)
        owed, record, place, end = owed_to(attempts), latest_start(attempts), None, None
        if record is not None and record.crew_url != self.session.crew.url:
            record = None
        if record is not None and record.phase is not RecordPhase.STARTED:
            record, place = None, self._place(job, record, state_of(record))
        is_found = record is not None
        while True:
            if record is None:
                if (blocked := self._turns.blocked(job)) is not None:
                    return await self._no_run(job, blocked)
                if not await self.throttle.admit(job.key):
                    return end
                owner = str(uuid4())
                start = await self._kick_off(job, place, owner)
                if start is None:
                    self.throttle.left(job.key)
                    continue
                if not isinstance(start, RunRecord):
                    return start
                record, is_found = start, start.owner != owner
                count += not is_found
            else:
                await self.throttle.take_slot(job.key)
            end = await self._wait(job, record, first_look=is_found)
            if end is None:
                return None
            state, _ = end
            if state is RowState.COMPLETED:
                self.throttle.completed()
            if not self._starts_again(job, state, count=count, before=before, owed=owed):
                return end
            self.throttle.left(job.key)
            record, place = None, self._place(job, record, state)

    def _place(self, job: RowJob, record: RunRecord, state: RowState) -> str | None:
        """Return the name of a forced start after this attempt, None if the start needs no force."""
        is_corrected = state in CORRECTABLE and record.inputs_digest != job.inputs.digest
        return f"{self.ledger.batch}/{job.key}/{record.attempt}" if state in FORCED or is_corrected else None

    def _starts_again(self, job: RowJob, state: RowState, *, count: int, before: int, owed: int) -> bool:
        most = self.session.crew.max_attempts
        return self.throttle.stopped is None and self._options.starts_again(
            state, job.key, count=count, before=before, most=most, owed=owed
        )

    def _request(self, job: RowJob, *, force_new: bool = False) -> RunRequest:
        options = self._run_options.model_copy(update={"force_new": True}) if force_new else self._run_options
        return RunRequest(self.session.crew, job.inputs, options, is_row=True, settings=self._settings)

    async def _kick_off(self, job: RowJob, place: str | None, owner: str) -> RunRecord | RowEnd | None:
        """Start a row's run, or find the run that it has; None if surely no run started, and a new try is allowed.

        With a `place`, which identifies it, the start is forced; None starts only where the record allows it. The
        record of a run that this call starts has `owner`.
        """
        flow_run_id, flow_run_count = self._flow_run
        identity = RunIdentity(
            idempotency_key=self.ledger.idempotency_key(job.key),
            place=place or self.ledger.batch,
            caller=Caller(owner=owner, flow_run_id=flow_run_id, flow_run_count=flow_run_count),
        )
        request = self._request(job, force_new=place is not None)
        may_get_room, record, turn = self._may_get_room(), None, None
        try:
            _, record = await start_run(request, identity, self.ledger, self.session)
        except LedgerError:
            raise
        except EarlierTurnError as earlier:
            turn = earlier.turn
        except asyncio.CancelledError:
            if self.throttle.slots is not None:
                self.throttle.slots.leave(job.key)  # its kickoff may have been accepted
            raise
        except BudgetExceededError as error:
            # Also if the last other row has ended since the budget was read: its room is free only now.
            if (may_get_room or self._may_get_room()) and error.measure != "kickoffs":
                self.throttle.refused(error)
            else:
                note_exceeded(error, self.session.crew)
                self.stop(str(error))
            return None
        except CrewError as error:
            return await self._no_run(job, error)
        except PREFECT_ERRORS as error:
            self.throttle.refused(prefect_error(error, "A budget or a session could not be read, so rows wait."))
            return None
        finally:
            self.throttle.leave()
        if turn is not None:
            return await self._after_turn(job, turn, identity.caller)
        if record is not None and record.owner == owner:
            self.throttle.accepted()
        return record

    async def _after_turn(self, job: RowJob, turn: Turn, caller: Caller) -> RowEnd | None:
        """Wait until an earlier turn of a row's session is over; return the row's end if that cannot be waited for."""
        self.throttle.left(job.key)
        try:
            await self._turns.wait(job, turn, caller, self.policy)
        except CrewError as error:
            return await self._no_run(job, error)
        except PREFECT_ERRORS as error:
            self.throttle.refused(prefect_error(error, "A session could not be read, so its rows wait."))
        return None

    def _may_get_room(self) -> bool:
        """Return whether other rows, in flight or being kicked off, may use less of a budget than their estimates."""
        return bool(self.waiting) or self.throttle.under_way > 1

    async def _no_run(self, job: RowJob, error: CrewError) -> RowEnd | None:
        """Return the end of a row whose kickoff gave no run.

        Return None if this call tries the row again, or leaves it for a later call.
        """
        if isinstance(error, FlowRunCancelledError):
            self.throttle.stop(str(error))
            return None
        is_refused_token, is_first = isinstance(error, AuthenticationError), self.throttle.stopped is None
        if is_refused_token:
            self.throttle.stop(str(error))  # before the next await: other kickoffs under way are refused as well
            if not is_first:
                return None
        if isinstance(error, KickoffUncertainError):
            self.throttle.kickoffs += 1
            if self.throttle.slots is not None:
                self.throttle.slots.leave(job.key)
        elif kickoff_fate(error) is KickoffFate.RETRY:
            self.throttle.refused(error)
            return None
        attempts = await self.ledger.attempts(self.ledger.idempotency_key(job.key))
        end = await self._without_result(job, attempts[-1] if attempts else None, error)
        if is_refused_token:
            self.stop(str(error), shut=True)
        return end

    async def _wait(self, job: RowJob, record: RunRecord, *, first_look: bool, counts: bool = True) -> RowEnd | None:
        """Wait for a run and return its end; None if the token is refused, which leaves the run in flight.
        `counts`: whether a failure is one of the failures in a row that stop the batch."""
        is_judged = is_lost = False
        if record.phase is not RecordPhase.ENDED:
            self.waiting[job.key] = record
            self.throttle.wait_for(len(self.waiting))
            try:
                if record.error is not None:
                    # An earlier call noted this error and left the run. This call waits for the run again.
                    record.error = None
                    record.reason = record.reason if record.reason == STOPPED_WITH_BATCH else None
                    await self.ledger.save(record)
                await self._poll(job, record, first_look=first_look)
                is_judged = True
            except LedgerError:
                raise
            except AuthenticationError as error:
                self.stop(str(error), shut=True)
                return None
            except CrewError as error:
                is_lost = isinstance(error, CrewLostError)
                if record.ended_at is None:
                    return await self._without_result(job, record, error, counts=counts)
            finally:
                if self.throttle.slots is not None and not is_lost and record.ended_at is None:
                    self.throttle.slots.leave(job.key)  # the run is in flight, as after a wait that timed out
                del self.waiting[job.key]
                self.throttle.wait_for(len(self.waiting))
        state = state_of(record) if is_judged else await self._judge(job, record)
        if counts and state is not RowState.COMPLETED and record.reason != STOPPED_WITH_BATCH:
            self.throttle.failed(record.error or "the crew gave no reason")
        return state, RETRYABLE.get(state)

    async def _judge(self, job: RowJob, record: RunRecord) -> RowState:
        """Return the state of a row whose run has ended, and save whether its result fits `output_type`.

        The masks of a result may be the reason why it fits or does not: such a row stays in its state.
        """
        kind = self._options.output_type
        if record.state is CrewState.COMPLETED and (kind is None or not is_masked(record.result)):
            run = LiveRun(self.session, str(record.kickoff_id), record, self._request(job))
            if (error := misfit(run, record, kind)) != record.error:
                record.error = error
                await self.ledger.save(record)
        return state_of(record)

    async def _without_result(
        self, job: RowJob, record: RunRecord | None, error: CrewError, *, counts: bool = True
    ) -> RowEnd:
        """Return the end of a row without a result, and write the reason to the ledger."""
        if counts and not isinstance(error, SessionBlockedError):  # one session must not stop the batch
            self.throttle.failed(str(error))
        if isinstance(error, KickoffUncertainError):
            return RowState.UNCERTAIN, None
        kind = type(error).__name__
        if isinstance(error, IdempotencyConflictError):
            await self.ledger.note_conflict(job.key)
            return RowState.CONFLICT, kind
        is_over = record is not None and record.phase in (RecordPhase.NOT_STARTED, RecordPhase.ENDED)
        if record is None or not (is_over or job.key in self.waiting):
            return RowState.NOT_STARTED, kind
        if record.error is None:
            is_lost = isinstance(error, CrewLostError)
            record.error = (explain_lost(error, job.key, self.ledger.batch) if is_lost else str(error))[:ERROR_CAP]
            record.reason = kind if is_lost else record.reason or kind
            await self.ledger.save(record)
        return state_of(record), kind

    # The wait for the run of a row: the loop of `runs.polling`, and around it only what the record needs.

    async def _poll(self, job: RowJob, record: RunRecord, *, first_look: bool) -> None:
        """Wait until a run has ended, and write its end. `first_look`: poll at once. Raises the errors of `poll`."""
        kickoff_id, phases = str(record.kickoff_id), Phases.of(record)
        crew = self.session.crew
        # A row that was started with other secrets may repeat them, and nobody knows them here.
        mark = secret_mark(crew.token.get_secret_value(), job.inputs.encoded, job.inputs.secret_names)
        is_found, request = first_look and record.secret_mark != mark, self._request(job)
        run = LiveRun(self.session, kickoff_id, record, request, records=self.ledger, owned=True, is_found=is_found)
        with withholding(run.redact_text):
            async with waker_for(record.idempotency_key, crew.url) if record.has_webhooks else nullcontext() as waker:
                status = await poll(
                    lambda: read_status(run),
                    was_alive=first_look,
                    kickoff_id=kickoff_id,
                    crew=record.crew,
                    policy=self.policy,
                    phases=phases,
                    watcher=_RowWatcher(self, run, record, waker),
                    first_look=first_look,
                )
                status = status if waker is None else await waker.with_usage(status, run.current_id)
        end = end_of_row(run, record, status, phases.human_seconds, self._options.output_type)
        if record.phase is RecordPhase.ENDED:  # our stop has closed it, and the status has more facts about the end
            for name, value in end.items():
                setattr(record, name, value)
            await self.ledger.save(record)
        else:
            await close_run(record, self.ledger, end)
        if status.state is CrewState.COMPLETED and self.first_poll is not None:
            self.first_poll.add(record)

    async def stop_runs(self, reason: str) -> None:
        """Ask the crew's server once for each run in flight to stop it."""
        stopped = await asyncio.gather(*(self.stop_run(record, reason) for record in self.waiting.values()))
        failed = len(stopped) - sum(stopped)
        run_logger().info("Stop requested for %d runs, %d could not be stopped.", len(stopped), failed)

    async def stop_run(self, record: RunRecord, reason: str | None = None) -> bool:
        """Ask the crew's server to stop a run, write the outcome, and return whether the server accepted it."""
        try:
            return await stop_row(self.session, record, reason, self.ledger)
        except CrewError as error:
            self.log_seldom("stop", "Run %s could not be stopped: %s", record.kickoff_id, error)
            return False

    def log_seldom(self, kind: str, message: str, *args: object) -> None:
        """Log a warning, but not again for a minute."""
        now = time.monotonic()
        if kind not in self._logged_at or now - self._logged_at[kind] > LOG_EVERY:
            self._logged_at[kind] = now
            run_logger().warning(message, *args)


class _RowWatcher(Watcher):
    """Acts on each poll of one row's run."""

    def __init__(self, runner: Runner, run: LiveRun, record: RunRecord, waker: Waker | None) -> None:
        self._runner = runner
        self._run = run
        self._record = record
        self._waker = waker
        self._people: People | None = None
        self._first_pause = 0.0 if runner.first_poll is None else runner.first_poll.seconds

    @property
    def people(self) -> People:
        """The part that waits for people. Most rows ask nobody, so it is made when it is needed."""
        if self._people is None:
            runner = self._runner
            self._people = People(
                self._run,
                runner.policy,
                None,
                stop=lambda: runner.stop_run(self._record),
                waker=self._waker,
                quiet=True,
            )
        return self._people

    async def on_status(self, status: CrewStatus) -> None:
        runner, record = self._runner, self._record
        self._run.notify(status)
        if status.state is CrewState.WAITING:
            task = record.human_task
            await self.people.see_status(status)
            if record.human_task != task:
                await runner.ledger.save(record)
            runner.log_seldom(
                "person",
                "Row %r of batch %s waits for a person: task %s of run %s. prefect-crew reviews ls lists all that do.",
                runner.ledger.row_key(record.idempotency_key),
                runner.ledger.batch,
                record.human_task,
                record.kickoff_id,
            )
        elif status.state.ended:
            if record.human_since is not None:
                emit("resumed", record)  # the crew went on and ended between two polls
            if record.human_since is not None or self._people is not None:
                await self.people.aclose(ended=True)
        elif self._people is not None:
            await self._people.see_status(status)

    async def pause(self, seconds: float) -> bool:
        return await (super().pause if self._waker is None else self._waker.pause)(seconds)

    def next_pause(self, delay: float) -> float:
        first, self._first_pause = self._first_pause, 0.0
        return max(delay, first)

    async def more_time(self) -> float:
        return await self.people.more_time()

    async def stop(self, phase: str) -> bool:
        return self._runner.policy.stops(phase) and await self._runner.stop_run(self._record)

    async def on_human_wait(self, phases: Phases) -> None:
        phases.note_in(self._record)
        await self._runner.ledger.save(self._record)
        if phases.human_since is None:
            emit("resumed", self._record)

    async def on_unknown(self, seconds: float) -> None:
        text = "Run %s is not known to its server now. Such runs are polled for %g s."
        self._runner.log_seldom("unknown", text, self._record.kickoff_id, seconds)

    async def on_error(self, error: CrewError) -> None:
        self._runner.log_seldom("trouble", "%s The runs may be fine; they are polled again.", error)


async def stop_row(session: CrewSession, record: RunRecord, reason: str | None, ledger: Ledger) -> bool:
    """Ask the crew's server to stop a run of a row, write the outcome, and return whether the server accepted it.

    `reason` stays in the record unless the server surely did not accept. Raises CrewError.
    """

    async def note(why: str | None) -> None:
        if reason is not None and record.reason != why:
            record.reason = why
            await ledger.save(record)

    before = record.reason
    # First: a poll may see the end before the answer comes, or the answer may be lost. The end then has this reason.
    await note(reason)
    try:
        newest = await newest_id(record, ledger)
        answer = await session.call(lambda client: client.stop(newest))
    except CrewError as error:
        if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
            await note(before)
        raise
    if reason is not None and not answer.accepted:
        await note(before)
    else:
        await close_stopped(session.client, session.crew, record, answer, ledger)
    return answer.accepted


async def _tick_during(rows: asyncio.Future[None], tick: Callable[[], Awaitable[None]], own: str | None) -> None:
    """Call `tick` about once a second until the rows have ended.

    Return earlier if the flow run `own` is cancelled, or if its crew worker has ended its coroutine: the caller then
    has to end the rows. The end of the rows cuts off a `tick` that takes long. Raises the errors of the rows, else of
    `tick`.
    """

    async def look() -> None:
        held = held_flow_run.get()
        while not (await is_cancelled(own, every=LOOK_EVERY) or (held is not None and held.is_left)):
            await asyncio.sleep(TICK)
            await tick()

    looking = asyncio.ensure_future(look())
    try:
        await asyncio.wait((rows, looking), return_when=asyncio.FIRST_COMPLETED)
        (rows if rows.done() else looking).result()
    finally:
        await cancel_and_wait(looking)


async def _is_flow_run_cancelled(own: str | None) -> bool:
    try:
        return await asyncio.wait_for(cancelled_on_server(own), ASK_WITHIN) is not None
    except (*PREFECT_ERRORS, TimeoutError):
        return False


async def _is_done_within(seconds: float, work: Awaitable[None]) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)
        return True
    return False
