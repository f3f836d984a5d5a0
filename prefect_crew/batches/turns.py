"""The turns of rows: the rows of one session run one after the other, and wait for the turns of other calls too."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.rows import RowJob
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import SessionBlockedError, UnreadableRecordError
from prefect_crew.records.decision import Caller
from prefect_crew.records.model import RecordPhase, utcnow
from prefect_crew.records.sessions import Turn, record_of, settle_last_turn
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.turns import wait_for_turn


class RowTurns:
    """The sessions of the rows of one batch."""

    def __init__(self, crew: Crew, ledger: Ledger) -> None:
        self._crew = crew
        self._ledger = ledger
        self._locks = WeakValueDictionary[str, asyncio.Lock]()

    @asynccontextmanager
    async def of(self, job: RowJob) -> AsyncGenerator[None]:
        """Let one row of a session at a time through. After the block, note in the row's turn that it is over."""
        session = job.inputs.session
        if session is None:
            yield
            return
        async with self._locks.setdefault(session, asyncio.Lock()):
            yield
            try:
                await settle_last_turn(self._crew.url, session, self._ledger)
            except (*PREFECT_ERRORS, UnreadableRecordError) as error:  # the next start of this batch does it
                run_logger().debug("The turn of row %r could not be noted as over: %s", job.key, error)

    async def wait(self, earlier: Turn, caller: Caller, policy: WaitPolicy) -> None:
        """Wait until an earlier turn of another call is over.

        Raises:
            SessionBlockedError: The turn is of a row of this batch that has no end, or as for `wait_for_turn`.
            CrewError, PREFECT_ERRORS: As for `wait_for_turn`.
        """
        record = await record_of(earlier, self._ledger) if earlier.is_row else None
        if record is not None:
            key, advice = shlex.quote(record.idempotency_key), "Call the batch again, which waits for that row first."
            if record.phase is not RecordPhase.STARTED:
                advice = f"Look at the crew's page, then run: prefect-crew runs resolve {key} --kickoff-id ID, or "
                advice += "--never-started. Then call the batch again."
            raise SessionBlockedError(
                session=earlier.session,
                turn=earlier.number,
                run=record.idempotency_key,
                reason=f"the run of row {self._ledger.row_key(record.idempotency_key)!r} is {record.phase}",
                advice=advice,
            )
        await wait_for_turn(earlier, self._crew, PrefectRecords(), caller=caller, policy=policy, asked_at=utcnow())
