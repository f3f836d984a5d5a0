"""The rows of a batch under way: each is bought once, waited for, and written down, thousands at a time on one loop.

No Prefect task a row: what a row needs of Prefect's promises it gets from the ledger.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from uuid import uuid4

from prefect_crew.api.errors import (
    AuthenticationError,
    CrewError,
    CrewTimeoutError,
    InvalidInputsError,
    KickoffUncertainError,
    OutputTypeError,
)
from prefect_crew.api.models import CrewState, CrewStatus
from prefect_crew.batches.ledger import Ledger, LedgerError
from prefect_crew.batches.rows import RowJob
from prefect_crew.blocks import DeployedCrew
from prefect_crew.logs import run_logger
from prefect_crew.outcomes import typed
from prefect_crew.purchases import Purchase, purchase_run
from prefect_crew.records import Caller, RecordPhase, RunRecord, StoredResult, utcnow
from prefect_crew.run_keys import RunIdentity
from prefect_crew.sessions import CrewSession
from prefect_crew.stopping import close_stopped
from prefect_crew.waiting import Phases, WaitPolicy, wait_until_ended

__all__ = ["Engine", "EngineOptions", "RowEnd", "Stop"]

BREAKER = 20
"""Failures in a row, without one row that ended, after which nothing more is bought."""


class Stop(Exception):  # noqa: N818  it is no error: it says why a batch buys nothing more
    """Why nothing more is bought. What is in flight is waited for."""


@dataclass(frozen=True)
class RowEnd:
    """What became of a row in this call. `record` is its latest attempt, None if nothing was ever claimed."""

    job: RowJob
    record: RunRecord | None
    error: CrewError | None = None
    found: bool = False
    """It had ended before this call."""


@dataclass(frozen=True)
class EngineOptions:
    """How rows are run. `retries` counts further purchases of a failed row, in all or by the class of its error."""

    wait: WaitPolicy
    max_in_flight: int
    retries: int | Mapping[str, int] = 0
    retry_failed: bool = False
    max_kickoffs: int | None = None
    stop_when: Callable[[int, int], str | None] = lambda failed, ended: None
    output_type: type | None = None
    meta: Mapping[str, object] | None = None


@dataclass
class Tally:
    """Counts of one call, for progress and the report."""

    in_flight: int = 0
    kickoffs: int = 0
    ended: int = 0
    failed: int = 0
    in_a_row: int = 0
    seconds: list[float] = field(default_factory=list[float])
    errors: Counter[str] = field(default_factory=Counter[str])


class Engine:
    """Runs rows. One per batch and process, on one event loop."""

    def __init__(
        self,
        crew: DeployedCrew,
        session: CrewSession,
        ledger: Ledger,
        options: EngineOptions,
        *,
        ended: Callable[[RowEnd], Awaitable[None]],
        flow_run_id: str | None = None,
        flow_run_count: int = 0,
    ) -> None:
        self.crew = crew
        self.session = session
        self.ledger = ledger
        self.options = options
        self.tally = Tally()
        self.stopped: Stop | None = None
        self.in_flight: dict[str, RunRecord] = {}
        self._ended = ended
        self._slots = asyncio.Semaphore(options.max_in_flight)
        self._flow_run = (flow_run_id, flow_run_count)
        # Until one kickoff has been taken they go one by one: a wrong token costs one row, not eight or a thousand.
        self._opening = asyncio.Lock()
        self._opened = False

    def stop(self, reason: str) -> None:
        """Buy nothing more from now on."""
        if self.stopped is None:
            self.stopped = Stop(reason)
            run_logger().warning("Nothing more is kicked off: %s What is in flight is waited for.", reason)

    async def stop_all(self, records: Mapping[str, RunRecord]) -> None:
        """Ask the crew's server once for each run to stop it, and write down what came of it."""

        async def stop(record: RunRecord) -> None:
            try:
                answer = await self.session.client.stop(str(record.kickoff_id))
                await close_stopped(record, answer, self.ledger)
            except CrewError as error:
                run_logger().warning("Run %s could not be stopped: %s", record.kickoff_id, error)

        await asyncio.gather(*(stop(record) for record in records.values()))

    async def run(self, jobs: Sequence[RowJob]) -> None:
        """Run some rows, each as soon as there is room, and return when all have ended or been left.

        Raises:
            LedgerError: The ledger cannot be used; nothing more is bought.
        """
        known = await self.ledger.attempts_of([job.key for job in jobs])
        rows: list[asyncio.Task[None]] = []
        try:
            for job in jobs:
                attempts = known.get(job.key, [])
                if await self._settled(job, attempts):
                    continue
                await self._slots.acquire()
                task = asyncio.create_task(self._row(job, bool(attempts)))
                task.add_done_callback(lambda _: self._slots.release())
                rows.append(task)
            await asyncio.gather(*rows)
        finally:
            # Cancelled, or the ledger failed: the runs stay in flight at the crew's server, to be found again.
            for task in rows:
                task.cancel()
            await asyncio.gather(*rows, return_exceptions=True)

    async def _settled(self, job: RowJob, attempts: Sequence[RunRecord]) -> bool:
        """Report a row that this call has nothing to do for, by its ledger alone."""
        if not attempts:
            return False
        latest = attempts[-1]
        if latest.inputs_digest != job.digest and latest.phase is not RecordPhase.NOT_STARTED:
            error = CrewError(f"Row {job.key!r} was run with other inputs before: it is not bought again.")
            await self._ended(RowEnd(job, latest, error, found=True))
            return True
        done = latest.phase is RecordPhase.ENDED and (
            latest.state is CrewState.COMPLETED or not self.options.retry_failed
        )
        if done or latest.phase is RecordPhase.UNCERTAIN:
            await self._ended(RowEnd(job, latest, found=True))
            return True
        return False

    async def _row(self, job: RowJob, known: bool) -> None:
        retries = 0
        while True:
            if self.stopped is not None and not known:
                return
            end = await self._attempt(job)
            if end is None:
                return
            if not self._again(end, retries):
                self._count(end)
                await self._ended(end)
                return
            retries += 1

    async def _attempt(self, job: RowJob) -> RowEnd | None:
        """Buy or find a row's run and wait for it; None if it was left because the batch buys nothing more."""
        flow_run_id, flow_run_count = self._flow_run
        purchase = Purchase(
            crew=self.crew,
            identity=RunIdentity(
                run_key=self.ledger.run_key(job.key),
                place=self.ledger.batch,
                caller=Caller(owner=str(uuid4()), flow_run_id=flow_run_id, flow_run_count=flow_run_count),
            ),
            inputs=job.inputs,
            digest=job.digest,
            name=None,
            meta=self.options.meta,
            webhooks=None,
            quiet=True,
        )
        problem: CrewError | None = None
        self.tally.in_flight += 1
        try:
            async with self._one_by_one_at_first():
                problem = self._no_more()
                bought = await purchase_run(purchase, self.ledger, self.session, problem=problem)
                self._opened = True
            self.tally.kickoffs += bought.bought
            record = bought.record
            if record.phase is not RecordPhase.ENDED:
                self.in_flight[job.key] = record
                await self._wait(record, first_look=not bought.bought)
            return RowEnd(job, record, self._misfit(record))
        except LedgerError:
            raise
        except CrewError as error:
            if error is problem:
                return None
            latest = await self.ledger.attempts(purchase.identity.run_key)
            return RowEnd(job, latest[-1] if latest else None, error)
        finally:
            self.tally.in_flight -= 1
            self.in_flight.pop(job.key, None)

    @asynccontextmanager
    async def _one_by_one_at_first(self) -> AsyncGenerator[None]:
        if self._opened:
            yield
            return
        async with self._opening:
            try:
                yield
            except AuthenticationError as error:
                self.stop(str(error))
                raise

    def _no_more(self) -> CrewError | None:
        limit = self.options.max_kickoffs
        if self.stopped is None and limit is not None and self.tally.kickoffs + self.tally.in_flight >= limit:
            self.stop(f"the limit of {limit} kickoffs is reached.")
        return None if self.stopped is None else CrewError(str(self.stopped))

    async def _wait(self, record: RunRecord, *, first_look: bool) -> None:
        kickoff_id = str(record.kickoff_id)
        kicked_off_at = record.kicked_off_at or utcnow()
        phases = Phases(
            kicked_off_at=kicked_off_at.timestamp(),
            human_seconds=record.human_seconds,
            human_since=None if record.human_since is None else record.human_since.timestamp(),
        )
        status = await wait_until_ended(
            lambda: self.session.client.status(kickoff_id),
            kickoff_id=kickoff_id,
            policy=self.options.wait,
            phases=phases,
            watcher=_Watcher(self.ledger, self.session, record),
            first_look=first_look,
        )
        record.phase, record.state, record.ended_at = RecordPhase.ENDED, status.state, utcnow()
        if status.state is CrewState.COMPLETED:
            record.result = StoredResult.of(status.result())
        else:
            record.error = (status.error or "The crew gave no reason.")[:2000]
        await self.ledger.save(record)

    def _misfit(self, record: RunRecord) -> CrewError | None:
        if self.options.output_type is None or record.result is None or record.kickoff_id is None:
            return None
        try:
            typed(record.result.result(record.kickoff_id), self.options.output_type)
        except OutputTypeError as error:
            return error
        return None

    def _again(self, end: RowEnd, retries: int) -> bool:
        record = end.record
        if self.stopped is not None or record is None or record.phase is not RecordPhase.ENDED:
            return False
        if record.state is CrewState.COMPLETED:
            return False
        allowed = self.options.retries
        if not isinstance(allowed, int):
            allowed = allowed.get("CrewFailedError" if record.state is CrewState.FAILED else "CrewStoppedError", 0)
        return retries < allowed

    def _count(self, end: RowEnd) -> None:
        """Count an end, and stop buying where the policy says so or everything fails in a row."""
        tally = self.tally
        failed = end.error is not None or end.record is None or end.record.state is not CrewState.COMPLETED
        tally.ended += 1
        tally.failed += failed
        if end.record is not None and end.record.kicked_off_at and end.record.ended_at:
            tally.seconds.append((end.record.ended_at - end.record.kicked_off_at).total_seconds())
        if not failed:
            tally.in_a_row = 0
            return
        tally.in_a_row += 1
        error = end.error or CrewError("failed")
        tally.errors[type(error).__name__ if end.error else "CrewFailedError"] += 1
        if reason := self.options.stop_when(tally.failed, tally.ended):
            self.stop(reason)
        refused = not isinstance(error, InvalidInputsError | KickoffUncertainError | CrewTimeoutError)
        if tally.in_a_row >= BREAKER and refused and tally.in_a_row == tally.ended:
            self.stop(f"the first {tally.in_a_row} rows all failed, the last one so: {error}")


class _Watcher:
    """What the wait for a row tells: only what its record must survive a restart with."""

    def __init__(self, ledger: Ledger, session: CrewSession, record: RunRecord) -> None:
        self._ledger = ledger
        self._session = session
        self._record = record

    async def saw(self, status: CrewStatus) -> None:
        del status

    async def person_turn(self, phases: Phases) -> None:
        self._record.human_seconds = phases.human_seconds
        since = phases.human_since
        self._record.human_since = None if since is None else datetime.fromtimestamp(since, timezone.utc)
        await self._ledger.save(self._record)

    async def trouble(self, error: CrewError, seconds: float) -> None:
        del error, seconds

    async def refused(self, error: AuthenticationError) -> bool:
        del error
        return await self._session.renew()
