"""Runs rows concurrently: claim, kick off, poll, record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from uuid import uuid4

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from prefect_crew.batches.ledger import PAGE, Ledger
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions
from prefect_crew.batches.outcomes import (
    STOPPED_WITH_BATCH,
    RetryRule,
    RowEnd,
    RowState,
    conflict,
    end_of_run,
    end_uncertain,
    end_without_run,
    note_reason,
)
from prefect_crew.batches.polling import RowPoller
from prefect_crew.batches.rows import RowJob
from prefect_crew.batches.throttle import BatchSession, Throttle
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewError,
    KickoffUncertainError,
    LedgerError,
)
from prefect_crew.records.keys import RunIdentity
from prefect_crew.records.model import Caller, RecordPhase, RunRecord, latest_start
from prefect_crew.runs.kickoff import Start, Started, start_run
from prefect_crew.runs.limits import missing_limit, take_slots
from prefect_crew.settings import CrewSettings

FORCED = (RowState.INVALID_OUTPUT, RowState.LOST)
"""States after which a row is started again by force only: a run that has completed, or that nobody knows any more."""
CLAIM_LOOK_EVERY = 1.0
"""Seconds between two looks at a claim that another process made."""


class Runner:
    """Runs the rows of one batch. One for a call, on one event loop.

    Args:
        session, throttle, ledger: What rows are run with.
        options: Those of the batch.
        max_in_flight: Runs in flight at a time.
        on_end: Called with what became of each row in this call.
        judge_again: Whether the results of earlier calls are judged and shown differently than then.

    Attributes:
        shut: Whether nothing is waited for any more either.
        waiting: The runs that are in flight, by row key.
        started: How many this call has kicked off.
    """

    def __init__(
        self,
        session: BatchSession,
        throttle: Throttle,
        ledger: Ledger,
        options: BatchOptions,
        *,
        max_in_flight: int,
        on_end: Callable[[RowEnd], None],
        judge_again: bool = False,
    ) -> None:
        self.session = session
        self.throttle = throttle
        self.ledger = ledger
        self.shut = False
        self.waiting: dict[str, RunRecord] = {}
        self.started = 0
        self._options = options
        self._rule = RetryRule(options.retries, options.retry_failed)
        self._poller = RowPoller(session, ledger, options)
        self._on_end = on_end
        self._judge_again = judge_again
        self._failed = self._ended = 0
        self._slots = asyncio.Semaphore(max_in_flight)
        self._running: set[asyncio.Task[None]] = set()
        self._settings = CrewSettings()
        context = FlowRunContext.get()
        flow_run = None if context is None else context.flow_run
        self._flow_run = (None, 0) if flow_run is None else (str(flow_run.id), flow_run.run_count)

    def stop(self, reason: str, *, shut: bool = False) -> None:
        """Kick off nothing more; `shut`: wait for nothing either. The next call reattaches to what is in flight."""
        self.throttle.stop(reason)
        if shut and not self.shut:
            self.shut = True
            for row in self._running - {asyncio.current_task()}:
                row.cancel()

    async def run(self, jobs: Iterator[RowJob]) -> None:
        """Run all rows, and return when each has ended or been left.

        Args:
            jobs: The rows, read as there is room for them.

        Raises:
            CrewError: The ledger, the output or the data set failed. What is in flight is left.
        """
        try:
            async with asyncio.TaskGroup() as group:
                async for job, attempts in self._rows_to_run(jobs):
                    await self._slots.acquire()
                    if self.shut:
                        self._slots.release()
                        continue
                    row = group.create_task(self._run_row(job, attempts))
                    self._running.add(row)
                    row.add_done_callback(self._row_done)
        except BaseExceptionGroup as errors:
            first = errors.exceptions[0]
            self.throttle.stop(str(first))
            raise first from first.__cause__

    def _row_done(self, row: asyncio.Task[None]) -> None:
        self._running.discard(row)
        self._slots.release()

    async def _rows_to_run(self, jobs: Iterator[RowJob]) -> AsyncGenerator[tuple[RowJob, Sequence[RunRecord]]]:
        """Yield the rows that are not done, with their attempts. Once the batch has stopped: those in flight."""
        is_new = await self.ledger.is_empty()
        while page := await asyncio.to_thread(lambda: list(islice(jobs, PAGE))):
            states = await self.ledger.enter_rows(page, self.session.crew, anew=self._judge_again)
            for job in page:
                if states[job.key] is RowState.CONFLICT:
                    self._on_end(conflict(job))
            page = [job for job in page if not self._is_settled(states[job.key])]
            begun = [job.key for job in page if states[job.key] is not RowState.PENDING]
            known = await self.ledger.attempts_of(begun) if begun else {}
            for job in page:
                attempts = known.get(job.key, ())
                latest = latest_start(attempts)
                if latest is not None and latest.phase is RecordPhase.ENDED:
                    end, count = await self._with_result(job, latest, found=True), _kickoffs(attempts)
                    if not self._runs_again(end, count=count, before=count):
                        continue
                if self.throttle.stopped is None or (latest is not None and latest.phase is RecordPhase.STARTED):
                    yield job, attempts
            if is_new and self.throttle.stopped is not None:
                return

    def _is_settled(self, state: RowState) -> bool:
        """Whether this call has surely nothing to do for a row that stands so."""
        if state in (RowState.UNCERTAIN, RowState.CONFLICT):
            return True
        if state is RowState.COMPLETED or (state in (RowState.FAILED, RowState.INVALID_OUTPUT) and not self._rule):
            return not self._judge_again
        return False

    async def _run_row(self, job: RowJob, attempts: Sequence[RunRecord]) -> None:
        """Bring one row to its end: find its run or start one, wait for it, once more for each retry.

        A row that never got so far, since the batch stops, is left without an end.
        """
        found = latest_start(attempts)
        while found is not None and found.phase is RecordPhase.CLAIMED and found.open_for:
            if self.throttle.stopped is not None:
                return
            await asyncio.sleep(CLAIM_LOOK_EVERY)
            attempts = await self.ledger.attempts(found.idempotency_key)
            found = latest_start(attempts)
        if found is not None and found.phase in (RecordPhase.CLAIMED, RecordPhase.UNCERTAIN):
            # Says nothing about the crew at this moment, which is what the throttle and the policy count.
            self._on_end(end_uncertain(job, found, batch=self.ledger.batch))
            return
        try:
            end = await self._to_its_end(job, attempts)
        finally:
            self.throttle.left(job.key)
        if end is not None:
            self._ended += 1
            self._failed += end.state is not RowState.COMPLETED
            if reason := self._options.why_stop(self._failed, self._ended):
                self.stop(reason)
            self._on_end(end)

    async def _to_its_end(self, job: RowJob, attempts: Sequence[RunRecord]) -> RowEnd | None:
        """Return how the last run of a row has ended; None if it has none since the batch starts nothing more."""
        before = count = _kickoffs(attempts)
        latest = latest_start(attempts)
        record, place, end = None, None, None
        if latest is not None and latest.phase is RecordPhase.STARTED and latest.crew_url == self.session.crew.url:
            record = latest
        found = record is not None
        while True:
            if record is None:
                if not await self.throttle.admit(job.key):
                    return end
                opened = await self._kick_off(job, place)
                if isinstance(opened, RowEnd):
                    self.throttle.failed(job.key, opened.error or opened.state)
                    return opened
                if opened is None:
                    self.throttle.left(job.key)
                    continue
                record, found = opened.record, not opened.is_new
                count += opened.is_new
            end = await self._wait(job, record, first_look=found)
            if end is None:
                return None
            if end.state is RowState.COMPLETED:
                self.throttle.completed()
            else:
                self.throttle.failed(job.key, end.error or end.state)
            if not self._runs_again(end, count=count, before=before):
                return end
            place = f"{self.ledger.batch}/{job.key}/{record.attempt}" if end.state in FORCED else None
            record = None

    async def _kick_off(self, job: RowJob, place: str | None) -> Started | RowEnd | None:
        """Start a row's run, or find the one that it has; None if it surely did not start, and may be tried again.

        `place` is what a start by force is known by; None starts only where the record allows it.
        """
        flow_run_id, flow_run_count = self._flow_run
        start = Start(
            crew=self.session.crew.hiding(job.hidden),
            identity=RunIdentity(
                idempotency_key=self.ledger.idempotency_key(job.key),
                place=place or self.ledger.batch,
                caller=Caller(owner=str(uuid4()), flow_run_id=flow_run_id, flow_run_count=flow_run_count),
            ),
            inputs=job.inputs,
            digest=job.digest,
            name=None,
            meta={**(self._options.meta or {}), "batch": self.ledger.batch},
            webhooks=self._options.webhooks,
            force_new=place is not None,
            quiet=True,
            settings=self._settings,
        )
        try:
            opened = await start_run(start, self.ledger, self.session)
        except LedgerError:
            raise
        except CrewError as error:
            return await self._no_run(job, error)
        finally:
            self.throttle.leave()
        if opened.is_new:
            self.started += 1
            self.throttle.accepted()
        return opened

    async def _no_run(self, job: RowJob, error: CrewError) -> RowEnd | None:
        """Return the end of a row whose kickoff brought no run, None if it is to be tried again or left."""
        first = self.throttle.stopped is None
        if isinstance(error, KickoffUncertainError):
            self.started += 1
            self.throttle.kickoffs += 1
        elif kickoff_fate(error) is KickoffFate.RETRY:
            self.throttle.refused(error)
            return None
        refused_token = isinstance(error, AuthenticationError)
        end = None
        if first or not refused_token:
            attempts = await self.ledger.attempts(self.ledger.idempotency_key(job.key))
            end = await self._without_result(job, attempts[-1] if attempts else None, error)
        if refused_token:
            self.stop(str(error), shut=True)
        return end

    async def _wait(self, job: RowJob, record: RunRecord, *, first_look: bool) -> RowEnd | None:
        """Wait for a run and return how it has ended; None if it is left in flight since the token is refused."""
        if record.phase is not RecordPhase.ENDED:
            self.waiting[job.key] = record
            try:
                if record.error is not None:
                    # Noted by an earlier call that has left the run, which is waited for again.
                    record.error = None
                    record.reason = record.reason if record.reason == STOPPED_WITH_BATCH else None
                    await self.ledger.save(record)
                await self._poller.wait(job, record, first_look=first_look)
            except LedgerError:
                raise
            except AuthenticationError as error:
                self.stop(str(error), shut=True)
                return None
            except CrewError as error:
                if record.ended_at is None:
                    return await self._without_result(job, record, error)
            finally:
                del self.waiting[job.key]
        return await self._with_result(job, record)

    async def _with_result(self, job: RowJob, record: RunRecord, *, found: bool = False) -> RowEnd:
        """Return how a run has ended, and write down whether its result fits `output_type`."""
        noted = record.error
        end = end_of_run(job, record, crew=self.session.crew, output_type=self._options.output_type, found=found)
        if record.error != noted:
            await self.ledger.save(record)
        return end

    async def _without_result(self, job: RowJob, record: RunRecord | None, error: CrewError) -> RowEnd:
        """Return the end of a row whose run has none, and write down why, for those who ask the ledger."""
        end = end_without_run(job, record, error, batch=self.ledger.batch)
        if end.state is RowState.CONFLICT:
            await self.ledger.note_conflict(job.key)
        over = record is not None and record.phase in (RecordPhase.NOT_STARTED, RecordPhase.ENDED)
        # What goes on may be another process's to write: of that only its own wait notes anything.
        if record is not None and (over or job.key in self.waiting) and note_reason(record, end):
            await self.ledger.save(record)
        return end

    def _runs_again(self, end: RowEnd, *, count: int, before: int) -> bool:
        most = self.session.crew.max_kickoffs
        return self.throttle.stopped is None and self._rule.applies_to(end, count=count, before=before, most=most)


def _kickoffs(attempts: Sequence[RunRecord]) -> int:
    """Return how many attempts at a row are, or may be, a kickoff."""
    return sum(attempt.counts for attempt in attempts)


async def hold_concurrency_slots(session: CrewSession, options: BatchOptions, stack: AsyncExitStack) -> int:
    """Hold slots of the crew's shared limit for as many rows as are in flight at once; return how many that are.

    Raises:
        ConfigurationError: There is no such limit, or it is smaller than what was asked for.
    """
    crew, chosen = session.crew, options.max_in_flight
    limit = crew.concurrency_limit
    if limit is None:
        return chosen or IN_FLIGHT
    async with get_client() as client:
        try:
            found = await client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            raise missing_limit(crew) from None
    most = chosen or min(IN_FLIGHT, found.limit)
    if most > found.limit:
        raise ConfigurationError(
            f"max_in_flight is {most}, and crew {crew.label} allows {found.limit} runs in flight in all "
            f"(concurrency limit {limit!r}). Give max_in_flight={found.limit} or less."
        )
    slots = await take_slots(crew, most)
    if slots is not None:
        stack.push_async_callback(slots.release)
        await stack.enter_async_context(slots.kept())
    return most
