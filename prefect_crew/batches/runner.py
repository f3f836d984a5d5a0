"""Runs rows concurrently: start a row's run or find it, and wait for it."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, held_flow_run, left_behind, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.batches.hold import Hold, cancelled_batch
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.report import RowEnd
from prefect_crew.batches.rows import RowJob
from prefect_crew.batches.throttle import Throttle
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import CrewStatus
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import (
    AuthenticationError,
    BatchBusyError,
    BudgetExceededError,
    ConfigurationError,
    CrewError,
    CrewFailedError,
    CrewStoppedError,
    DatasetError,
    FlowRunCancelledError,
    IdempotencyConflictError,
    KickoffUncertainError,
    OutputTypeError,
    SessionBlockedError,
    StoreError,
)
from prefect_crew.runs.database import in_store
from prefect_crew.runs.keys import Nonce, RunIdentity, escape_name
from prefect_crew.runs.news import Subscription, news_of
from prefect_crew.runs.owners import this_process
from prefect_crew.runs.polling import Wait
from prefect_crew.runs.request import BatchRow, RunOptions, RunRequest
from prefect_crew.runs.reviews.reviewer import People
from prefect_crew.runs.run import LiveRun, parse_data
from prefect_crew.runs.start import session_blocked, start_run
from prefect_crew.runs.stop import PERSON, cancelled_on_server, is_cancelled, stop_once
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState
from prefect_crew.store import attempts
from prefect_crew.store.batches import NewRow, Row, put_rows, rows_of_keys
from prefect_crew.store.decision import PREPARING, STARTS, TIMEOUT, Attempt, AttemptState, Decision

PAGE = 500
"""Rows that are read and written at once."""
READ_AHEAD = 1_000
"""Rows of sessions, at most, that wait for the rows before them, and have no place of `max_in_flight` yet."""
LOG_EVERY = 60.0
"""Seconds between two log lines of the same kind, for any number of rows."""
TICK = 1.0
"""Seconds between two looks at the progress of the batch."""
LOOK_EVERY = 2.0
"""Seconds between two looks at whether the flow run was cancelled: many kickoffs may be sent between them."""
ASK_WITHIN = 5.0
KICK_OFF_WITHIN = 10.0
STOP_WITHIN = 12.0
"""Seconds for each step of a cancellation: Prefect kills a cancelled process after about 30."""
MISFIT_WITHOUT_REASONS = "The result does not fit the output type. The reasons may quote secrets and are not shown."
"""A user's validator may quote a secret in other words than the crew."""


def row_key(batch: str, key: str) -> str:
    """Return the idempotency key of a row."""
    return f"batch/{escape_name(batch)}/{key}"


class Runner:
    """Runs the rows of one batch. Each call of `run_batch` has one runner, on one event loop.

    `on_end` is called for each row that has ended, or was found to have. `waiting` has the runs in flight by row key.
    `shut`: whether the runner ends its waits for runs too. `is_whole`: whether it has read the whole data set.
    """

    def __init__(
        self,
        session: CrewSession,
        throttle: Throttle,
        hold: Hold,
        options: BatchOptions,
        *,
        max_in_flight: int,
        on_end: Callable[[RowEnd], None],
    ) -> None:
        self.session = session
        self.throttle = throttle
        self.hold = hold
        self.shut = self.is_whole = False
        self.waiting: dict[str, LiveRun] = {}
        self.policy = options.wait or session.crew.wait
        self._options = options
        self._on_end = on_end
        self._failed = self._ended = 0
        self._seconds = deque[float](maxlen=20)
        self._logged_at: dict[str, float] = {}
        self._places = asyncio.Semaphore(max_in_flight)
        self._room = asyncio.Semaphore(max_in_flight + (READ_AHEAD if options.session is not None else 0))
        self._last_of: dict[str, asyncio.Task[None]] = {}
        self._blocked = set[str]()
        self._running: set[asyncio.Task[None]] = set()
        self._settings = CrewSettings()
        meta = {**(options.meta or {}), "batch": hold.name}
        self._run_options = RunOptions.of(meta=meta, wait=options.wait, webhooks=options.webhooks)
        # Without its number: a retry of the flow run goes on with rows that were stopped.
        self._identity = RunIdentity("", flow_run_id=flow_run_id(), process=this_process())

    @property
    def first_pause(self) -> float:
        """Seconds from a kickoff to its first poll: the shortest of the last runs, unless the caller gives a policy."""
        return 0.0 if self._options.wait else min(self._seconds, default=0.0)

    def stop(self, reason: str, *, shut: bool = False) -> None:
        """Kick off nothing more; with `shut`, end the waits too. The next call reattaches to the runs in flight."""
        self.throttle.stop(reason)
        if shut and not self.shut:
            self.shut = True
            for row in self._running - {asyncio.current_task()}:
                row.cancel()

    # Cancellation

    async def run_until_cancelled(self, jobs: Iterator[RowJob], tick: Callable[[], Awaitable[None]]) -> None:
        """Run all rows. If a person cancels the batch or its flow run, stop the runs; if only the task is cancelled,
        leave them. This calls `tick` about once a second, until the rows have ended.

        Raises:
            FlowRunCancelledError: The batch or its flow run was cancelled, and nobody else ends it.
            asyncio.CancelledError: The task was cancelled, or outlives its flow run. The runs in flight were stopped or
                left.
            CrewError: A row or a tick raised it.
        """
        own, held = flow_run_id(), held_flow_run.get()
        rows = asyncio.ensure_future(self.run(jobs))

        async def look() -> None:
            while not ((held is not None and held.is_left) or self.hold.is_cancelled):
                if await is_cancelled(own, every=LOOK_EVERY):
                    return
                await asyncio.sleep(TICK)
                await tick()

        looking = asyncio.ensure_future(look())
        try:
            await asyncio.wait((rows, looking), return_when=asyncio.FIRST_COMPLETED)
            (rows if rows.done() else looking).result()
            if held is not None and held.is_left:
                await self._end(rows, is_stopped=False)
                raise left_behind(held)
            if not rows.done():
                await self._end(rows, is_stopped=True)
            elif self.throttle.stopped is None or not await is_cancelled(own):
                return
            raise cancelled_batch(self.hold.name)
        except asyncio.CancelledError:
            if not rows.done():
                await self._end(rows, is_stopped=await _is_flow_run_cancelled(own))
            raise
        finally:
            await cancel_and_wait(looking, rows)

    async def _end(self, rows: asyncio.Future[None], *, is_stopped: bool) -> None:
        """Kick off nothing more; stop the runs in flight, or leave them."""
        self.stop("the batch was cancelled.")
        # A kickoff under way gets its id first. If it were cut off, it would be uncertain.
        await _is_done_within(KICK_OFF_WITHIN, self.throttle.idle())
        if not is_stopped:
            name = self.hold.name
            run_logger().warning(
                "%d runs of batch %s are left in flight. The same call waits for them. To stop them, run: "
                "prefect-crew batch cancel %s",
                *(len(self.waiting), name, shlex.quote(name)),
            )
        elif not await _is_done_within(STOP_WITHIN, self._stop_runs()):
            run_logger().warning("Not every run in flight could be stopped in %.0f s.", STOP_WITHIN)
        await cancel_and_wait(rows)

    async def _stop_runs(self) -> None:
        stopped = await asyncio.gather(*(self.stop_run(run, PERSON) for run in [*self.waiting.values()]))
        failed = len(stopped) - sum(stopped)
        run_logger().info("Stop requested for %d runs, %d could not be stopped.", len(stopped), failed)

    async def stop_run(self, run: LiveRun, by: str) -> bool:
        """Ask the crew's server to stop a run, write the outcome, and return whether the server accepted it."""
        try:
            return (await stop_once(run, by)).accepted
        except CrewError as error:
            self.log_seldom("stop", "Run %s could not be stopped: %s", run.kickoff_id, error)
            return False

    # Rows

    async def run(self, jobs: Iterator[RowJob]) -> None:
        """Run all rows, read each when there is room for it, and return when all have ended or were left.

        Raises CrewError if the crew database or the data set failed, and leaves the runs in flight.
        """
        try:
            async with asyncio.TaskGroup() as group:
                async for job, row in self._rows_to_run(jobs):
                    await self._room.acquire()
                    if self.shut:
                        break
                    session = job.inputs.session
                    before = None if session is None else self._last_of.get(session)
                    task = group.create_task(self._run_row(job, row, before))
                    if session is not None:
                        self._last_of[session] = task
                    self._running.add(task)
                    task.add_done_callback(partial(self._row_done, session))
        except BaseExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, DatasetError):
                first = DatasetError(first.reason, source=first.source, line=first.line, begun=True)
            self.throttle.stop(str(first))
            raise first from errors.exceptions[0].__cause__

    def _row_done(self, session: str | None, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._room.release()
        if session is not None and self._last_of.get(session) is task:
            del self._last_of[session]

    async def _rows_to_run(self, jobs: Iterator[RowJob]) -> AsyncGenerator[tuple[RowJob, Row]]:
        """Write the rows page by page, and yield those that are not done; only those in flight once the batch has
        stopped. Last come the rows whose kickoff a dead process may have on its way: they wait for its deadline."""
        hold, later = self.hold, list[tuple[RowJob, Row]]()
        while page := await asyncio.to_thread(lambda: list(islice(jobs, PAGE))):
            if self.shut:
                return
            crew = self.session.crew
            new = [
                NewRow(
                    row_key=job.key,
                    position=job.number,
                    inputs=job.inputs.shown(crew.redactor(job.inputs)),
                    inputs_digest=job.inputs.digest,
                )
                for job in page
            ]
            if not await in_store(put_rows, hold.name, hold.owner, new):
                raise BatchBusyError(name=hold.name)
            rows = await in_store(rows_of_keys, hold.name, [job.key for job in page])
            for job in page:
                row = rows[job.key]
                if self._is_over(row):
                    continue
                if row.state in PREPARING:
                    later.append((job, row))
                elif self.throttle.stopped is None or row.state is AttemptState.STARTED:
                    yield job, row
            if self.throttle.stopped is not None and hold.batch.passes == 1:
                return
        self.is_whole = True
        for each in later:
            yield each

    def _is_over(self, row: Row) -> bool:
        """Return whether this call has nothing to do for a row, and note a row that needs a person."""
        if row.state is AttemptState.UNCERTAIN:
            self._on_end(RowEnd(row.row_key, "uncertain", is_new=False))
            return True
        if row.is_conflict:
            kind = IdempotencyConflictError.__name__
            self._on_end(RowEnd(row.row_key, "conflict", kind, kickoff_id=row.kickoff_id, is_new=False))
        return row.state is AttemptState.COMPLETED

    async def _run_row(self, job: RowJob, row: Row, before: asyncio.Task[None] | None) -> None:
        """Bring one row to its end, after the row before it in its session. If the batch stops, it is left."""
        if before is not None:
            await asyncio.wait({before})
        async with self._places:
            end = await self._to_its_end(job, row)
        if end is None:
            return
        if job.inputs.session is not None and end.is_unfinished:
            self._blocked.add(job.inputs.session)
        if end.is_new:
            self._ended += 1
            is_blocked = end.kind == SessionBlockedError.__name__  # one session must not stop the batch
            self._failed += end.state != "completed" and not is_blocked
            if end.state == "completed":
                self.throttle.completed()
            elif not is_blocked and end.error is not None:
                self.throttle.failed(end.error)
            if reason := self._options.why_stop(self._failed, self._ended):
                self.stop(reason)
        self._on_end(end)

    async def _to_its_end(self, job: RowJob, row: Row) -> RowEnd | None:
        """Find or start a row's run, wait for it, and return its end.

        There is no end if the batch starts nothing more or the token was refused.
        """
        end = None
        if row.state is AttemptState.STARTED:
            attempt = await in_store(attempts.get, str(row.attempt_id))
            assert attempt is not None  # noqa: S101  the batch is this process's, and nobody prunes it
            end = await self._wait(job, attempt, is_found=True)
            # One that was stopped before this call, such as by `batch cancel`, is started again.
            if end is None or end.state != "stopped" or attempt.stop_asked_at is None:
                return end
        if job.inputs.session in self._blocked:
            reason, advice = "an earlier row of it has no end in this call", "The same call goes on with it."
            session = str(job.inputs.session)
            return self._refused(job, session_blocked(session, 0, reason, advice))
        while await self.throttle.admit():
            outcome = await self._kick_off(job)
            if isinstance(outcome, RowEnd):
                return outcome
            if outcome is not None and (attempt := outcome.attempt) is not None:
                if attempt.ended_at is None:
                    return await self._wait(job, attempt, is_found=outcome.step not in STARTS)
                return RowEnd(
                    job.key, str(attempt.state), error=attempt.error, kickoff_id=attempt.first_id, is_new=False
                )
        return end

    def _request(self, job: RowJob, on_wait: Callable[[], None] | None = None) -> RunRequest:
        row = BatchRow(self.hold.name, job.key, self.hold.owner, on_wait)
        return RunRequest(self.session.crew, job.inputs, self._run_options, row=row, settings=self._settings)

    async def _kick_off(self, job: RowJob) -> Decision | RowEnd | None:
        """Start a row's run, or find the run that it has. Return its end if it gets none, None to try it again."""
        key, throttle, is_under_way = row_key(self.hold.name, job.key), self.throttle, True

        def leave() -> None:
            nonlocal is_under_way
            if is_under_way:
                is_under_way = False
                throttle.leave()

        # Others, in flight or being kicked off, may use less of a budget than their estimates.
        has_others = bool(self.waiting) or throttle.under_way > 1
        identity = replace(self._identity, idempotency_key=key, nonce=Nonce())
        try:
            # While it waits for a turn, a limit or another call, others may kick off.
            decision = await start_run(LiveRun(self.session, request=self._request(job, leave)), identity)
        except (StoreError, BatchBusyError):
            raise
        except BudgetExceededError as error:
            if has_others and error.measure != "kickoffs":
                throttle.refused(error)
            else:
                self.stop(str(error))
            return None
        except CrewError as error:
            return self._refused(job, error)
        finally:
            leave()
        if decision.step in STARTS:
            throttle.accepted()
        return decision

    def _refused(self, job: RowJob, error: CrewError) -> RowEnd | None:
        """Return the end of a row whose kickoff gave no run; None if it is tried again, or left for a later call.

        Raises:
            ConfigurationError: The settings are wrong, so that no row can start.
        """
        state, is_end = "not-started", True
        if type(error) is ConfigurationError:
            raise error
        if isinstance(error, FlowRunCancelledError):
            is_end = False
            self.stop(str(error))
        elif isinstance(error, AuthenticationError):
            is_end = self.throttle.stopped is None  # other kickoffs under way are refused as well: the first one counts
            self.stop(str(error), shut=True)
        elif isinstance(error, KickoffUncertainError):
            state = "uncertain"
        elif kickoff_fate(error) is KickoffFate.RETRY:
            is_end = False
            self.throttle.refused(error)
        elif isinstance(error, IdempotencyConflictError):
            state = "conflict"
        kind = None if state == "uncertain" else type(error).__name__
        return RowEnd(job.key, state, kind, str(error)) if is_end else None

    # The wait for a row's run

    async def _wait(self, job: RowJob, attempt: Attempt, *, is_found: bool) -> RowEnd | None:
        """Wait for a run and return its end; None if the token is refused, which leaves the run in flight."""
        run = LiveRun(
            self.session,
            str(attempt.first_id),
            attempt,
            self._request(job),
            owned=not is_found,
            is_found=is_found,
        )
        self.waiting[job.key] = run
        self.throttle.wait_for(len(self.waiting))
        try:
            with withholding(run.redact_text):
                status = await self._poll(run)
        except StoreError:
            raise
        except AuthenticationError as error:
            self.stop(str(error), shut=True)
            return None
        except CrewError as error:
            return RowEnd(job.key, "unfinished", type(error).__name__, str(error), run.kickoff_id)
        finally:
            del self.waiting[job.key]
            self.throttle.wait_for(len(self.waiting))
        return self._judge(job, run, status)

    async def _poll(self, run: LiveRun) -> CrewStatus:
        """Wait until a run has ended. Raises the errors of `Wait.until_end`."""
        async with AsyncExitStack() as stack:
            attempt_id = run.attempt.id if run.attempt is not None else ""
            news = await stack.enter_async_context(news_of(attempt_id)) if run.has_webhooks else None
            wait = _RowWait(self, run, news)
            if run.is_found and run.crew.concurrency_limit is not None:
                await wait.hold_slot()
            status = await wait.until_end()
        ended = run.attempt
        if status.state is CrewState.COMPLETED and ended is not None and ended.ended_at and ended.started_at:
            # We saw the end up to a pause too late. A tenth less each time approaches the truth from above.
            self._seconds.append(status.execution_time or 0.9 * (ended.ended_at - ended.started_at))
        return status

    def _judge(self, job: RowJob, run: LiveRun, status: CrewStatus) -> RowEnd:
        """Return the end of a row by the last status of its run."""
        end = partial(RowEnd, job.key, kickoff_id=run.kickoff_id)
        if status.state is not CrewState.COMPLETED:
            failed = status.state is CrewState.FAILED
            error = run.redact_text(status.error or "The crew gave no reason.")
            kind = (CrewFailedError if failed else CrewStoppedError).__name__
            return end(state="failed" if failed else "stopped", kind=kind, error=error)
        if run.attempt is not None and run.attempt.inputs_digest != job.inputs.digest:
            return end(state="conflict", kind=IdempotencyConflictError.__name__)
        try:
            parse_data(status.result(), self._options.output_type, run=run)
        except OutputTypeError as error:
            text = MISFIT_WITHOUT_REASONS if job.inputs.secret_names else str(error)
            return end(state="invalid-output", kind=OutputTypeError.__name__, error=text)
        return end(state="completed")

    def log_seldom(self, kind: str, message: str, *args: object) -> None:
        """Log a warning, but not again for a minute."""
        now = time.monotonic()
        if kind not in self._logged_at or now - self._logged_at[kind] > LOG_EVERY:
            self._logged_at[kind] = now
            run_logger().warning(message, *args)


class _RowWait(Wait):
    """The wait for one row's run."""

    def __init__(self, runner: Runner, run: LiveRun, news: Subscription | None) -> None:
        super().__init__(run, runner.policy, is_new=not run.is_found)
        self.news = news
        self._runner = runner
        self.first_pause = runner.first_pause

    async def stop(self) -> bool:
        return await self._runner.stop_run(self.run, TIMEOUT)

    async def on_status(self, status: CrewStatus) -> bool:
        runner, run = self._runner, self.run
        run.notify(status)
        # Most rows ask nobody.
        if self.people is None and (status.state is CrewState.WAITING or (status.state.ended and self.human_seconds)):
            self.people = People(run, runner.policy, None, stop=self.stop, quiet=True)
        if self.people is None:
            return False
        if status.state.ended:
            await self.people.aclose(ended=True)
            return False
        await self.people.see_status(status)
        if status.state is not CrewState.WAITING:
            return False
        runner.log_seldom(
            "person",
            "A row of batch %s waits for a person: run %s. prefect-crew reviews ls lists all that do.",
            *(runner.hold.name, run.kickoff_id),
        )
        return await self.people.answer()

    async def on_error(self, error: CrewError) -> None:
        self._runner.log_seldom("trouble", "%s The runs may be fine; they are polled again.", error)


async def _is_flow_run_cancelled(own: str | None) -> bool:
    try:
        return await asyncio.wait_for(cancelled_on_server(own), ASK_WITHIN) is not None
    except (*PREFECT_ERRORS, TimeoutError):
        return False


async def _is_done_within(seconds: float, work: Awaitable[Any]) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)
        return True
    return False
