"""Runs rows concurrently: claim, kick off, poll, record."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel

from prefect_crew._internal.interrupts import cancel_and_wait
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions
from prefect_crew.batches.outcomes import (
    LOST,
    MISFIT,
    STOPPED_WITH_BATCH,
    RetryRule,
    RowEnd,
    broken,
    ended,
    note,
    purchases,
    unresolved,
)
from prefect_crew.batches.polling import RowWaiter
from prefect_crew.batches.rows import RowJob
from prefect_crew.batches.throttle import BatchSession, Breaker, Pace
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewError,
    IdempotencyConflictError,
    KickoffUncertainError,
    LedgerError,
)
from prefect_crew.records.keys import RunIdentity
from prefect_crew.records.model import Caller, RecordPhase, RunRecord, latest_start
from prefect_crew.runs.kickoff import Start, Started, start_run
from prefect_crew.runs.limits import missing_limit, take_slots
from prefect_crew.settings import CrewSettings

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks


@dataclass(frozen=True)
class EngineOptions:
    """How rows are run.

    `stop_when` gets the failed and the ended rows of this call, and says why nothing more is to be bought.
    """

    max_in_flight: int
    rule: RetryRule = field(default_factory=RetryRule)
    max_kickoffs: int | None = None
    stop_when: Callable[[int, int], str | None] = lambda failed, ended: None
    output_type: type[BaseModel] | None = None
    meta: Mapping[str, object] | None = None
    webhooks: Webhooks | None = None


@dataclass(slots=True)
class Work:
    """A row, and what the ledger knows of it."""

    job: RowJob
    attempts: Sequence[RunRecord] = ()


_OVER = (RecordPhase.NOT_STARTED, RecordPhase.ENDED)


class Engine:
    """Runs rows. One per batch and process, on one event loop.

    Attributes:
        stopped: Why nothing more is bought, None while there is no reason.
        shut: Whether nothing is waited for either.
        kickoffs: How many this engine has bought.
        failed, ended: Rows of this engine.
        exhausted: Whether it has stopped since it may buy no more kickoffs.
        waiting: The runs that are waited for, by row key.
    """

    def __init__(
        self,
        session: CrewSession,
        ledger: Ledger,
        waiter: RowWaiter,
        options: EngineOptions,
        *,
        pace: Pace,
        breaker: Breaker,
        on_end: Callable[[RowEnd], Awaitable[None]],
        flow_run: tuple[str | None, int] = (None, 0),
        bought: int = 0,
    ) -> None:
        self.session = session
        self.ledger = ledger
        self.options = options
        self.stopped: str | None = None
        self.shut = False
        self.exhausted = False
        self.kickoffs = 0
        self.failed = 0
        self.ended = 0
        self.in_flight = 0
        self.waiting: dict[str, RunRecord] = {}
        self._waiter = waiter
        self._pace = pace
        self._breaker = breaker
        self._on_end = on_end
        self._flow_run = flow_run
        self._bought = bought
        self._buying = 0
        self._slots = asyncio.Semaphore(options.max_in_flight)
        self._settings = CrewSettings()
        self._shut = asyncio.Event()

    def stop(self, reason: str, *, shut: bool = False) -> None:
        """Buy nothing more from now on; `shut`: wait for nothing new either."""
        self.shut = self.shut or shut
        if self.stopped is None:
            self.stopped = reason
            self._breaker.release()
            self._pace.close()
            run_logger().warning("Nothing more is kicked off: %s", reason)
        if self.shut:
            self._shut.set()

    async def bought_out(self) -> None:
        """Wait until every kickoff that is under way has its id, or came to nothing."""
        await self._pace.idle()

    # Rows that this call has nothing to do for.

    async def resolved(self, work: Work) -> bool:
        """Report a row that the ledger alone resolves, and return whether it does."""
        job, latest = work.job, latest_start(work.attempts)
        if latest is None:
            return False
        if latest.inputs_digest != job.digest:
            await self._on_end(await self._broken(job, latest, _other_inputs(job)))
            return True
        if latest.phase is RecordPhase.UNCERTAIN or (
            latest.phase is RecordPhase.CLAIMED and await self.ledger.owner_ended(latest)
        ):
            await self._on_end(unresolved(job, latest, batch=self.ledger.batch))
            return True
        if latest.phase is not RecordPhase.ENDED:
            return False
        end = await self._ended(job, latest, found=True)
        count = purchases(work.attempts)
        if self._again(end, count=count, before=count):
            return False
        await self._on_end(end)
        return True

    # Rows that it has.

    async def run(self, rows: deque[Work], launched: asyncio.Event) -> None:
        """Run some rows, each as soon as there is room, and return when all have ended or been left.

        Args:
            rows: The rows. They are taken away as they begin.
            launched: Set once all have begun, so that the next rows can.

        Raises:
            LedgerError: The ledger cannot be used; nothing more is bought.
        """
        running: set[asyncio.Task[None]] = set()
        broken_by: list[BaseException] = []
        shut = asyncio.create_task(self._shut.wait())
        over = asyncio.Event()
        ended = asyncio.create_task(over.wait())

        def done(row: asyncio.Task[None]) -> None:
            running.discard(row)
            self._slots.release()
            self.in_flight -= 1
            if not row.cancelled() and (error := row.exception()) is not None:
                broken_by.append(error)
                self.stop(str(error))
            if launched.is_set() and (broken_by or not running):
                over.set()

        try:
            while rows and not broken_by:
                await self._slots.acquire()
                work = rows.popleft()
                try:
                    begun = await self._begin(work)
                except BaseException:
                    self._slots.release()
                    raise
                if begun is None:
                    self._slots.release()
                    continue
                self.in_flight += 1
                running.add(begun)
                begun.add_done_callback(done)
            launched.set()
            if running and not broken_by and not self.shut:
                # Not for each row: `asyncio.wait` looks at all of them each time that it is called.
                await asyncio.wait({shut, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            launched.set()
            # Cancelled, shut, or the ledger failed: the runs stay in flight at the crew's server, to be found again.
            await cancel_and_wait(shut, ended, *running)
        if broken_by:
            raise broken_by[0]

    async def _begin(self, work: Work) -> asyncio.Task[None] | None:
        latest = latest_start(work.attempts)
        if latest is not None and latest.phase is RecordPhase.STARTED and latest.crew_url == self.session.crew.url:
            return None if self.shut else asyncio.create_task(self._row(work, found=latest))
        if latest is not None and latest.phase is RecordPhase.CLAIMED:
            return None if self.stopped else asyncio.create_task(self._row_of_others(work, latest))
        tried = await self._breaker.admit()
        if await self._enter():
            return asyncio.create_task(self._row(work, entered=True, tried=tried))
        if tried:
            self._breaker.not_tried()
        return None

    async def _enter(self) -> bool:
        """Wait for a kickoff's turn; False if there is none any more. After True, `_buy` has to follow."""
        if self.stopped is None:
            await self._pace.enter()
            if self.stopped is None:
                return True
            self._pace.leave()
        return False

    async def _row_of_others(self, work: Work, claimed: RunRecord) -> None:
        """Wait until whoever has claimed a row must know its fate, without holding up any other row."""
        while claimed.open_for and claimed.phase is RecordPhase.CLAIMED and self.stopped is None:
            await asyncio.sleep(1.0)
            work.attempts = await self.ledger.attempts(claimed.idempotency_key)
            claimed = latest_start(work.attempts) or claimed
        if claimed.phase is RecordPhase.UNCERTAIN or (claimed.phase is RecordPhase.CLAIMED and self.stopped is None):
            # Not a failure of the crew at this moment, which is what the breaker counts.
            await self._on_end(unresolved(work.job, claimed, batch=self.ledger.batch))
            return
        await self._row(work, found=claimed if claimed.phase is RecordPhase.STARTED else None)

    async def _row(
        self, work: Work, *, entered: bool = False, tried: bool = False, found: RunRecord | None = None
    ) -> None:
        end = await self._to_its_end(work, entered, tried, found)
        if end is None:
            return
        self._count(end)
        await self._on_end(end)

    async def _to_its_end(self, work: Work, entered: bool, tried: bool, found: RunRecord | None) -> RowEnd | None:
        """Start or find a row's run and wait for it, once more for each retry.

        Args:
            work: The row.
            entered: Whether it has a kickoff's turn already.
            tried: Whether it is the row that the circuit breaker tries.
            found: Its run, if it has one.

        Returns:
            How its last run has ended; None if there is none since the batch starts nothing more.
        """
        job, before = work.job, purchases(work.attempts)
        count, place, end = before, None, None
        while True:
            first_look = found is not None
            if found is None:
                if not entered:
                    tried = tried or await self._breaker.admit()
                    if not await self._enter():
                        self._not_tried(tried)
                        return end
                entered = False
                bought = await self._buy(job, place)
                if isinstance(bought, RowEnd):
                    self._judge(bought, tried)
                    return bought
                if bought is None:
                    continue
                found, first_look = bought.record, not bought.is_new
                count += bought.is_new
            record, found = found, None
            end = await self._wait(job, record, first_look=first_look)
            if end is None:
                self._not_tried(tried)
                return None
            self._judge(end, tried)
            tried = False
            if not self._again(end, count=count, before=before):
                return end
            # A run that has completed, or that nobody knows any more, is bought again by force only.
            place = f"{self.ledger.batch}/{job.key}/{record.attempt}" if end.state in (MISFIT, LOST) else None

    async def _buy(self, job: RowJob, place: str | None) -> Started | RowEnd | None:
        """Buy a row's run, or find the one that it has; None if it surely did not start, and may be tried again.

        `place` is what a purchase by force is known by; None buys only where the record allows it.
        """
        if not self._reserve():
            self._pace.leave()
            await asyncio.sleep(0.05)  # those that are being bought tell whether any are left
            return None
        try:
            bought = await start_run(self._purchase(job, place), self.ledger, self.session)
        except LedgerError:
            raise
        except CrewError as error:
            return await self._not_bought(job, error)
        finally:
            self._buying -= 1
            self._pace.leave()
        if bought.is_new:
            self._note_purchase()
            self._pace.taken()
        return bought

    def _purchase(self, job: RowJob, place: str | None) -> Start:
        flow_run_id, flow_run_count = self._flow_run
        return Start(
            crew=self.session.crew.hiding(job.hidden),
            identity=RunIdentity(
                idempotency_key=self.ledger.idempotency_key(job.key),
                place=place or self.ledger.batch,
                caller=Caller(owner=str(uuid4()), flow_run_id=flow_run_id, flow_run_count=flow_run_count),
            ),
            inputs=job.inputs,
            digest=job.digest,
            name=None,
            meta=self.options.meta,
            webhooks=self.options.webhooks,
            force_new=place is not None,
            quiet=True,
            settings=self._settings,
        )

    def _reserve(self) -> bool:
        """Take one of the kickoffs that may be bought in all; False if there is none left."""
        limit = self.options.max_kickoffs
        if limit is not None and self._bought + self._buying >= limit:
            if self._bought >= limit:
                self.exhausted = True
                self.stop(f"the limit of {limit} kickoffs is reached.")
            return False
        self._buying += 1
        return True

    def _note_purchase(self) -> None:
        self.kickoffs += 1
        self._bought += 1

    async def _not_bought(self, job: RowJob, error: CrewError) -> RowEnd | None:
        """Return the end of a row whose kickoff brought no run, None if it is to be tried again or left."""
        first = self.stopped is None
        if isinstance(error, KickoffUncertainError):
            self._note_purchase()
        elif kickoff_fate(error) is KickoffFate.RETRY:
            if reason := self._pace.refused(error):
                self.stop(reason)
            return None
        attempts = await self.ledger.attempts(self.ledger.idempotency_key(job.key))
        end = None
        if first or not isinstance(error, AuthenticationError):
            end = await self._broken(job, attempts[-1] if attempts else None, error)
        if isinstance(error, AuthenticationError):
            # After what is done in the ledger: it ends the tasks of rows, once they wait for something again.
            self.stop(str(error), shut=True)
        return end

    async def _broken(self, job: RowJob, record: RunRecord | None, error: CrewError) -> RowEnd:
        """Return the end of a row that has none, and write down why, for those who ask the ledger."""
        end = broken(job, record, error, batch=self.ledger.batch)
        # What goes on may be another process's to write: of that only its own wait notes anything.
        ours = record is not None and (record.phase in _OVER or job.key in self.waiting)
        if record is not None and ours and note(record, end):
            await self.ledger.save(record)
        return end

    async def _wait(self, job: RowJob, record: RunRecord, *, first_look: bool) -> RowEnd | None:
        if record.phase is not RecordPhase.ENDED:
            self.waiting[job.key] = record
            try:
                if record.error is not None:
                    await self._forget(record)
                await self._waiter.wait(job, record, first_look=first_look)
            except LedgerError:
                raise
            except AuthenticationError as error:
                self.stop(str(error), shut=True)  # the run is left in flight
                return None
            except CrewError as error:
                if record.ended_at is None:
                    return await self._broken(job, record, error)
            finally:
                self.waiting.pop(job.key, None)
        return await self._ended(job, record)

    async def _forget(self, record: RunRecord) -> None:
        """Take back what an earlier call noted of a run that it left: it is waited for again."""
        record.error = None
        if record.reason != STOPPED_WITH_BATCH:
            record.reason = None
        await self.ledger.save(record)

    async def _ended(self, job: RowJob, record: RunRecord, *, found: bool = False) -> RowEnd:
        noted = record.error
        end = ended(job, record, crew=self.session.crew, output_type=self.options.output_type, found=found)
        if record.error != noted:
            await self.ledger.save(record)  # what does not fit, or did not with another `output_type`
        return end

    def _again(self, end: RowEnd, *, count: int, before: int) -> bool:
        most = self.session.crew.max_kickoffs
        return self.stopped is None and self.options.rule.again(end, count=count, before=before, most=most)

    def _judge(self, end: RowEnd, tried: bool) -> None:
        """Tell the circuit breaker how a run has ended, that of a retry too, and stop where it gives up."""
        if end.completed:
            self._breaker.worked()
        elif reason := self._breaker.failed(end.error or end.state, tried=tried):
            self.stop(reason)

    def _not_tried(self, tried: bool) -> None:
        if tried:
            self._breaker.not_tried()

    def _count(self, end: RowEnd) -> None:
        """Count a row that has ended, and stop where the policy says so."""
        self.ended += 1
        self.failed += not end.completed
        if reason := self.options.stop_when(self.failed, self.ended):
            self.stop(reason)


def _other_inputs(job: RowJob) -> IdempotencyConflictError:
    return IdempotencyConflictError(
        idempotency_key=job.key, difference="the row of this key was run with other inputs before"
    )


def engine_of(
    session: BatchSession,
    ledger: Ledger,
    options: BatchOptions,
    *,
    on_end: Callable[[RowEnd], Awaitable[None]],
    most: int,
    bought: int,
) -> Engine:
    """Return what runs the rows of a batch in this process.

    Args:
        session: A session for the crew, whose pace is the batch's.
        ledger: Where the records live.
        options: The batch's options.
        on_end: Called with what became of each row.
        most: Runs in flight at once.
        bought: Kickoffs that count against `max_kickoffs` already.
    """
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    return Engine(
        session,
        ledger,
        RowWaiter(
            session,
            ledger,
            options.wait or session.crew.wait,
            learn=options.wait is None,
            webhooks=options.webhooks,
        ),
        EngineOptions(
            max_in_flight=most,
            rule=RetryRule(options.retries, options.retry_failed),
            max_kickoffs=options.max_kickoffs,
            stop_when=options.stop_when,
            output_type=options.output_type,
            meta={**(options.meta or {}), "batch": ledger.batch},
            webhooks=options.webhooks,
        ),
        pace=session.pace,
        breaker=Breaker(options.breaker, options.breaker_pause),
        on_end=on_end,
        flow_run=(None, 0) if flow_run is None else (str(flow_run.id), flow_run.run_count),
        bought=bought,
    )


async def limited(session: CrewSession, options: BatchOptions, stack: AsyncExitStack) -> int:
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


PAGE = 400
"""Rows that are read, and looked up in the ledger, at once."""


class _Chunk:
    """Rows for one task. A plain class, so that Prefect does not look through thousands of parameters."""

    def __init__(self, engine: Engine, rows: Sequence[Work]) -> None:
        self.engine = engine
        self.rows = deque(rows)
        self.launched = asyncio.Event()
        self.begun = False
        first, last = rows[0].job.number + 1, rows[-1].job.number + 1
        self.label = f"row {first}" if first == last else f"rows {first}-{last}"


def _name(parameters: dict[str, Any]) -> str:
    return cast("_Chunk", parameters["chunk"]).label


# Without tags: for each task with any, Prefect asks its API for room, and the task fails if that has trouble.
@task(cache_policy=NO_CACHE, task_run_name=cast("Any", _name))
async def run_rows(chunk: _Chunk) -> None:
    """Run some rows of a batch."""
    chunk.begun = True
    await chunk.engine.run(chunk.rows, chunk.launched)


async def _run(chunk: _Chunk) -> None:
    """Run a chunk as a Prefect task, or without one where Prefect cannot begin it: that is no reason to fail rows."""
    try:
        await run_rows(chunk)
    except Exception as error:
        if chunk.begun:
            raise
        run_logger().warning("Prefect could not begin the task of %s, which run without one: %s", chunk.label, error)
        await chunk.engine.run(chunk.rows, chunk.launched)


async def feed(engine: Engine, jobs: Iterator[RowJob], *, chunk_size: int, new: bool) -> None:
    """Run all rows of a batch; return when all have ended or been left.

    Args:
        engine: What runs them.
        jobs: The rows, read as there is room for them.
        chunk_size: Rows a task.
        new: Whether the ledger knows none of them.

    Raises:
        CrewError: The ledger, the output or the data set failed. What is in flight is left.
    """
    running: set[asyncio.Task[None]] = set()
    try:
        rows: list[Work] = []
        async for work in _unresolved(engine, jobs, new=new):
            rows.append(work)
            if len(rows) == chunk_size:
                await _begin(_Chunk(engine, rows), running)
                rows = []
        if rows:
            await _begin(_Chunk(engine, rows), running)
        while running:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
            _let_go(running, done)
    finally:
        await cancel_and_wait(*running)


async def _begin(chunk: _Chunk, running: set[asyncio.Task[None]]) -> None:
    """Start a chunk's task and wait until its last row has begun: only then is there room for the next chunk."""
    begun = asyncio.ensure_future(_run(chunk))
    running.add(begun)
    launched = asyncio.ensure_future(chunk.launched.wait())
    try:
        while not launched.done():
            done, _ = await asyncio.wait({launched, *running}, return_when=asyncio.FIRST_COMPLETED)
            _let_go(running, done - {launched})
            if begun.done():
                return
    finally:
        launched.cancel()


def _let_go(running: set[asyncio.Task[None]], done: set[Any]) -> None:
    """Forget tasks that are done, and raise what one of them has raised."""
    for one in done:
        running.discard(one)
    for one in done:
        one.result()


async def _unresolved(engine: Engine, jobs: Iterator[RowJob], *, new: bool) -> AsyncGenerator[Work]:
    """Yield the rows that are not done. When the batch buys nothing more, those that it may still wait for."""
    while page := await asyncio.to_thread(lambda: list(islice(jobs, PAGE))):
        known = {} if new else await engine.ledger.attempts_of([job.key for job in page])
        for job in page:
            work = Work(job, known.get(job.key, ()))
            if work.attempts and await engine.resolved(work):
                continue
            if engine.stopped is None or _in_flight(work):
                yield work
        if new and engine.stopped is not None:
            return


def _in_flight(work: Work) -> bool:
    latest = latest_start(work.attempts)
    return latest is not None and latest.phase is RecordPhase.STARTED
