"""The rows of a batch under way: each is bought once, waited for, and written down, thousands at a time on one loop.

No Prefect task a row: what a row needs of Prefect's promises it gets from the ledger.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from uuid import uuid4

from prefect_crew.api.certainty import KickoffFate, kickoff_fate
from prefect_crew.api.errors import (
    AuthenticationError,
    CrewError,
    KickoffUncertainError,
    RunKeyConflictError,
)
from prefect_crew.batches.breaker import Breaker
from prefect_crew.batches.ends import LOST, MISFIT, RowEnd, broken, ended, note, unsettled
from prefect_crew.batches.ledger import Ledger, LedgerError
from prefect_crew.batches.pacing import Pace
from prefect_crew.batches.retries import STOPPED_WITH_BATCH, purchases
from prefect_crew.batches.row_waits import RowWaiter
from prefect_crew.batches.rows import RowJob
from prefect_crew.batches.work import EngineOptions, Work
from prefect_crew.crew import CrewSession
from prefect_crew.interrupts import cancel_and_wait
from prefect_crew.logs import run_logger
from prefect_crew.posting import Purchase
from prefect_crew.purchases import Purchased, purchase_run
from prefect_crew.records import Caller, RecordPhase, RunRecord, latest_purchase
from prefect_crew.run_keys import RunIdentity
from prefect_crew.settings import CrewSettings

__all__ = ["Engine"]


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

    async def settled(self, work: Work) -> bool:
        """Report a row that the ledger alone settles, and return whether it does."""
        job, latest = work.job, latest_purchase(work.attempts)
        if latest is None:
            return False
        if latest.inputs_digest != job.digest:
            await self._on_end(await self._broken(job, latest, _other_inputs(job)))
            return True
        if latest.phase is RecordPhase.UNCERTAIN or (
            latest.phase is RecordPhase.CLAIMED and await self.ledger.owner_ended(latest)
        ):
            await self._on_end(unsettled(job, latest, batch=self.ledger.batch))
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
        latest = latest_purchase(work.attempts)
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
            work.attempts = await self.ledger.attempts(claimed.run_key)
            claimed = latest_purchase(work.attempts) or claimed
        if claimed.phase is RecordPhase.UNCERTAIN or (claimed.phase is RecordPhase.CLAIMED and self.stopped is None):
            # Not a failure of the crew at this moment, which is what the breaker counts.
            await self._on_end(unsettled(work.job, claimed, batch=self.ledger.batch))
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
                found, first_look = bought.record, not bought.bought
                count += bought.bought
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

    async def _buy(self, job: RowJob, place: str | None) -> Purchased | RowEnd | None:
        """Buy a row's run, or find the one that it has; None if it surely did not start, and may be tried again.

        `place` is what a purchase by force is known by; None buys only where the record allows it.
        """
        if not self._reserve():
            self._pace.leave()
            await asyncio.sleep(0.05)  # those that are being bought tell whether any are left
            return None
        try:
            bought = await purchase_run(self._purchase(job, place), self.ledger, self.session)
        except LedgerError:
            raise
        except CrewError as error:
            return await self._not_bought(job, error)
        finally:
            self._buying -= 1
            self._pace.leave()
        if bought.bought:
            self._note_purchase()
            self._pace.taken()
        return bought

    def _purchase(self, job: RowJob, place: str | None) -> Purchase:
        flow_run_id, flow_run_count = self._flow_run
        return Purchase(
            crew=self.session.crew.hiding(job.hidden),
            identity=RunIdentity(
                run_key=self.ledger.run_key(job.key),
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
        attempts = await self.ledger.attempts(self.ledger.run_key(job.key))
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


def _other_inputs(job: RowJob) -> RunKeyConflictError:
    return RunKeyConflictError(run_key=job.key, difference="the row of this key was run with other inputs before")
