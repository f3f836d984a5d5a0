"""Finding a run by its id, and reading the result of one that has ended, without waiting."""

from __future__ import annotations

import httpx
from prefect.exceptions import PrefectException

from prefect_crew.api.errors import CrewLostError
from prefect_crew.api.models import CrewResult, CrewState
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.logs import run_logger
from prefect_crew.open_runs import OpenRun, recall, reopened
from prefect_crew.outcomes import failure, result_of
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import RecordPhase

__all__ = ["find_run", "read_result", "recorded_result"]


async def find_run(crew: Crew, kickoff_id: str, run_key: str | None = None, *, take: bool = True) -> OpenRun:
    """Return a run by its id, with its record where one is found. A Prefect API that is away leaves it without.

    `take`: what this process remembers of it is for the caller alone, who waits for its end and closes its record.
    """
    run = recall(crew, kickoff_id, take=take)
    if run is not None:
        return run
    records = PrefectRecords()
    try:
        if run_key is None:
            record = await records.of_kickoff(kickoff_id)
        else:
            attempts = await records.attempts(run_key)
            record = next((attempt for attempt in attempts if attempt.kickoff_id == kickoff_id), None)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().warning("The record of run %s could not be read (%s): going on without it.", kickoff_id, error)
        record = None
    return reopened(crew, kickoff_id, record)


async def recorded_result(run: OpenRun, session: CrewSession) -> CrewResult:
    """Return the result of a run whose end is on record: from the record, else from the status call.

    Raises:
        CrewFailedError, CrewStoppedError: How it ended instead.
        CrewLostError: It completed, and the remote side has forgotten the result.
        CrewError: The status call failed.
    """
    record = run.record
    assert record is not None  # noqa: S101  the caller looked
    if record.state is not CrewState.COMPLETED:
        raise failure(run, record.state, record.error)
    if record.result is not None:
        return record.result.result(run.kickoff_id)
    return await _asked(run, session, last_state=str(record.state))


async def read_result(run: OpenRun) -> CrewResult:
    """Return the result of a run that has completed, by its record or by its status.

    Raises:
        CrewError: It has not completed; the message says where it stands.
    """
    async with CrewSession(run.crew, withhold=run.withholding()) as session:
        if run.record is not None and run.record.phase is RecordPhase.ENDED:
            return await recorded_result(run, session)
        return await _asked(run, session, last_state=None if run.record is None else "started")


async def _asked(run: OpenRun, session: CrewSession, *, last_state: str | None) -> CrewResult:
    status = await session.asked(lambda client: client.status(run.kickoff_id))
    if status.state is CrewState.UNKNOWN:
        raise CrewLostError(kickoff_id=run.kickoff_id, crew=run.crew.label, run_key=run.run_key, last_state=last_state)
    return result_of(run, status)
