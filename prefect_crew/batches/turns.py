"""The turns of rows: the rows of one session run one after the other, and wait for the turns of other calls too."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.outcomes import RowState, state_of
from prefect_crew.batches.rows import RowJob
from prefect_crew.batches.throttle import Throttle
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import LedgerError, SessionBlockedError, UnreadableRecordError
from prefect_crew.records.decision import Caller
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.records.sessions import Turn, is_over, note_given_up, note_over, record_of
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.turns import LOOK_AGAIN, wait_for_turn
from prefect_crew.states import CrewState

NOTED_WITHIN = 5.0
"""Seconds for noting that turns are over, for which a cancelled batch waits."""


async def note_before_rows_leave(ledger: Ledger) -> None:
    """Note for all rows that have ended that their turns are over: later calls do not look at rows that have left the
    data set.

    Raises:
        LedgerError, PREFECT_ERRORS: The ledger or the Prefect API cannot be reached.
        UnreadableRecordError: A newer version has written a turn.
    """
    async for keys in ledger.keys():
        by_row = await ledger.attempts_of(keys)
        attempts = [attempt for of_row in by_row.values() for attempt in of_row]
        await note_over(attempts)
        await note_given_up(attempts, ledger)


class RowTurns:
    """The sessions of the rows of one batch. `places` are its places of `max_in_flight`."""

    def __init__(self, crew: Crew, ledger: Ledger, throttle: Throttle, places: asyncio.Semaphore) -> None:
        self._crew = crew
        self._ledger = ledger
        self._throttle = throttle
        self._places = places
        self._locks = WeakValueDictionary[str, asyncio.Lock]()
        self._blocked: dict[str, SessionBlockedError] = {}

    @asynccontextmanager
    async def of(self, job: RowJob) -> AsyncGenerator[None]:
        """Let one row of a session at a time through, once it has a place. A row without a session has one already.

        After the block, note in the row's turns that they are over.
        """
        session = job.inputs.session
        if session is None:
            yield
            return
        async with self._locks.setdefault(session, asyncio.Lock()), self._places:
            try:
                yield
            finally:
                noting = asyncio.create_task(self.note([job]))
                try:
                    await asyncio.wait({noting})
                finally:
                    await asyncio.wait({noting})  # a batch that is cancelled waits for it

    async def note(self, jobs: Iterable[RowJob]) -> None:
        """Note in the turns of some rows that they are over, for callers that cannot read the ledger.

        If this fails, other callers of the sessions wait until the next call of the batch notes it.
        """
        keys = [job.key for job in jobs if job.inputs.session is not None]
        if not keys:
            return

        async def note() -> None:
            attempts = await self._ledger.attempts_of(keys)
            await note_over(record for of_row in attempts.values() for record in of_row)

        try:
            await asyncio.wait_for(note(), NOTED_WITHIN)
        except (*PREFECT_ERRORS, LedgerError, UnreadableRecordError, TimeoutError) as error:
            kind = type(error).__name__
            text = "The turns of %d rows could not be noted as over (%s: %s). The next call of the batch notes them."
            run_logger().warning(text, len(keys), kind, error)

    def blocked(self, job: RowJob) -> SessionBlockedError | None:
        """Return the error that blocks a row's session in this call, None if a run of the row may start.

        Later rows would overtake the row that met the error. The row whose own turn blocks the session may start again.
        """
        error = self._blocked.get(job.inputs.session or "")
        return None if error is None or error.run == self._ledger.idempotency_key(job.key) else error

    async def wait(self, job: RowJob, earlier: Turn, caller: Caller, policy: WaitPolicy) -> None:
        """Wait until an earlier turn of a row's session is over, or the batch starts nothing more.

        Raises:
            SessionBlockedError: The turn is of a row of this batch that has no end, or as for `wait_for_turn`.
            CrewError, PREFECT_ERRORS: As for `wait_for_turn`.
        """
        waiting = asyncio.ensure_future(self._wait(job, earlier, caller, policy))
        try:
            while self._throttle.stopped is None:
                if (await asyncio.wait({waiting}, timeout=LOOK_AGAIN))[0]:
                    await waiting
                    return
        finally:
            await cancel_and_wait(waiting)

    async def _wait(self, job: RowJob, earlier: Turn, caller: Caller, policy: WaitPolicy) -> None:
        record = await record_of(earlier, self._ledger) if earlier.is_row else None
        try:
            if record is None:
                records, now = PrefectRecords(), utcnow()
                await wait_for_turn(earlier, self._crew, records, caller=caller, policy=policy, asked_at=now)
            elif state_of(record) is RowState.LOST and record.idempotency_key == self._ledger.idempotency_key(job.key):
                # A person has asked for another run of the row.
                lost = {"state": CrewState.UNKNOWN, "reason": record.reason}
                await self._ledger.resolve(record, RecordPhase.ENDED, **lost)
            elif not is_over(earlier, record):
                raise self._has_no_end(earlier, record)
        except SessionBlockedError as error:
            if earlier.session not in self._blocked:
                run_logger().warning("%s Later rows of the session are not started in this call.", error)
            self._blocked[earlier.session] = error
            raise

    def _has_no_end(self, turn: Turn, record: RunRecord) -> SessionBlockedError:
        key, state, batch = record.idempotency_key, state_of(record), shlex.quote(self._ledger.batch)
        row = shlex.quote(self._ledger.row_key(key))
        if state is RowState.LOST:
            lost = f"prefect-crew runs resolve {shlex.quote(key)} --lost"
            advice = f"To start another run of it: prefect-crew batch retry {batch} --row {row}. To give it up: {lost}."
        elif record.phase is RecordPhase.STARTED:
            advice = "Call the batch again, which waits for that row first."
        else:
            resolve = f"prefect-crew runs resolve {shlex.quote(key)} --kickoff-id ID, or --never-started"
            advice = f"Look at the crew's page, then run: {resolve}. Then call the batch again."
        reason = f"the run of row {row} is {state}"
        return SessionBlockedError(session=turn.session, turn=turn.number, run=key, reason=reason, advice=advice)
