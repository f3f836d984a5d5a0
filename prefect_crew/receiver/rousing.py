"""What the receiver does for flow runs that are suspended until a crew ends: it looks at the run, and resumes them.

A webhook may come before the status says the same, or before the flow run's process has ended. So it is tried again for
a while; whatever is missed for all that is found by the sweep.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import httpx
from prefect.exceptions import PrefectException

from prefect_crew.logs import OneLine
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import RunRecord
from prefect_crew.suspending.resuming import Attended, attend
from prefect_crew.suspending.suspended import SuspendedWaits

__all__ = ["Rouser"]

logger = OneLine(logging.getLogger("prefect_crew.receiver"), {})

PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Seconds before each attempt."""
AT_ONCE = 200
"""Runs that are looked after at the same time."""
DONE = frozenset({Attended.RESUMED, Attended.OVER, Attended.PERSON})


class Rouser:
    """Looks after the runs of which there is news. Of the event loop that `rouse` is called on."""

    def __init__(self, records: PrefectRecords, *, pauses: Sequence[float] = PAUSES) -> None:
        self._records = records
        self._pauses = pauses
        self._jobs: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._again: set[tuple[str, int]] = set()

    def rouse(self, record: RunRecord) -> None:
        """Begin to look after a run, beside everything else."""
        key = (record.run_key, record.attempt)
        if key in self._jobs:
            self._again.add(key)
        elif len(self._jobs) < AT_ONCE:
            self._jobs[key] = asyncio.create_task(self._look_after(record))
            self._jobs[key].add_done_callback(lambda job: self._done(record, job))

    def close(self) -> None:
        """Give up what is under way: the sweep goes on with it."""
        for job in self._jobs.values():
            job.cancel()

    def _done(self, record: RunRecord, job: asyncio.Task[None]) -> None:
        key = (record.run_key, record.attempt)
        self._jobs.pop(key, None)
        if job.cancelled():
            return
        if (error := job.exception()) is not None:
            logger.error("Whoever is suspended for run %s could not be resumed: %r", record.run_key, error)
        if key in self._again:
            self._again.discard(key)
            self.rouse(record)

    async def _look_after(self, record: RunRecord) -> None:
        for pause in self._pauses:
            await asyncio.sleep(pause)
            try:
                waits = await SuspendedWaits(self._records).of(record.run_key, record.attempt)
            except (httpx.HTTPError, PrefectException):
                continue
            outcomes = await attend(waits, self._records, eager=True)
            for flow_run_id, outcome in outcomes.items():
                if outcome is Attended.RESUMED:
                    logger.info("Flow run %s is resumed: there is news of run %s.", flow_run_id, record.run_key)
            if DONE.issuperset(outcomes.values()):
                return
