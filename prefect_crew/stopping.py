"""Stopping a crew when its wait is cancelled: only where somebody asked for that, and nobody else waits for it.

Under Prefect a cancelled flow run, a timeout, a worker that is shut down and Ctrl-C all arrive as one and the same
cancellation. What tells them apart is the flow run's state on the server, and the signal itself. A worker that is shut
down or evicted leaves the crew running: the run is found again.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled

from prefect_crew.api.errors import CrewError
from prefect_crew.api.models import CrewState, StopAnswer, StopOutcome
from prefect_crew.events import emit
from prefect_crew.interrupts import ctrl_c_pressed, started_by_runner
from prefect_crew.logs import run_logger
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import RecordPhase, RecordStore, RunRecord, utcnow
from prefect_crew.sessions import CrewSession

__all__ = [
    "cancellation_asked",
    "cancelled_meanwhile",
    "close_stopped",
    "flow_run_cancelled",
    "flow_run_id",
    "mark_cancelled",
    "stop_if_asked",
    "stop_once",
]

LOOK_EVERY = 10.0
"""Seconds between looks of one process at whether a flow run of its own has been cancelled."""
STOP_WITHIN = 20.0
"""Seconds for all that is done on a cancellation: Prefect kills a cancelled process after about 30."""


def flow_run_id() -> str | None:
    """Return the id of the flow run around this call."""
    context = FlowRunContext.get()
    return None if context is None or context.flow_run is None else str(context.flow_run.id)


async def flow_run_cancelled(run_id: str | None) -> bool:
    """Return whether the server says that a flow run is cancelled or being cancelled.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    if run_id is None:
        return False
    async with get_client() as client:
        try:
            state = (await client.read_flow_run(UUID(run_id))).state
        except ObjectNotFound:
            return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


_looked: OrderedDict[str, tuple[float, bool]] = OrderedDict()


async def cancelled_meanwhile(run_id: str | None) -> bool:
    """Return the same, asking at most every ten seconds for one flow run; an API that is away is no cancellation."""
    if run_id is None or started_by_runner():
        # A runner sends a signal, and ends the run itself.
        return False
    at, cancelled = _looked.get(run_id, (0.0, False))
    if cancelled or time.monotonic() - at < LOOK_EVERY:
        return cancelled
    _looked[run_id] = (time.monotonic(), False)
    _looked.move_to_end(run_id)
    while len(_looked) > 1000:
        _looked.popitem(last=False)
    try:
        cancelled = await flow_run_cancelled(run_id)
    except (httpx.HTTPError, PrefectException):
        return False
    _looked[run_id] = (time.monotonic(), cancelled)
    return cancelled


async def mark_cancelled(run_id: str) -> None:
    """Bring a flow run that is being cancelled, and that no runner ends, to Cancelled."""
    async with get_client() as client:
        await client.set_flow_run_state(UUID(run_id), Cancelled(message="The crew was asked to stop."), force=True)


async def cancellation_asked(own: str | None) -> bool:
    """Return whether somebody wants the crew stopped: the flow run is being cancelled, or Ctrl-C was pressed.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    return (ctrl_c_pressed() and not started_by_runner()) or await flow_run_cancelled(own)


async def stop_if_asked(session: CrewSession, record: RunRecord, records: RecordStore) -> None:
    """On a cancellation: stop the crew if that was asked for. Raises nothing but a further cancellation."""
    try:
        await asyncio.wait_for(_stop_if_asked(session, record, records), STOP_WITHIN)
    except (CrewError, httpx.HTTPError, PrefectException, TimeoutError, asyncio.TimeoutError) as error:
        run_logger().warning(
            "Crew run %s could not be stopped (%s: %s): it runs on at %s.",
            record.kickoff_id,
            type(error).__name__,
            error,
            record.crew_url,
        )


async def _stop_if_asked(session: CrewSession, record: RunRecord, records: RecordStore) -> None:
    log = run_logger()
    own = flow_run_id()
    if not await cancellation_asked(own):
        log.warning(
            "Crew run %s is left running at %s: nobody asked to stop it. A retry of this flow run, or a call "
            "with run key %r, waits for it again.",
            record.kickoff_id,
            record.crew_url,
            record.run_key,
        )
        return
    others = await _other_waiters(record, own)
    if others:
        log.warning("Crew run %s is left running: flow run %s waits for it too.", record.kickoff_id, ", ".join(others))
        return
    answer = await stop_once(session, record)
    await close_stopped(record, answer, records)


async def _other_waiters(record: RunRecord, own: str | None) -> list[str]:
    return await PrefectRecords().other_waiters(record, own)


async def stop_once(session: CrewSession, record: RunRecord) -> StopAnswer:
    """Ask the crew's server to stop a run, once, and say in the log what came of it."""
    kickoff_id = str(record.kickoff_id)
    answer = await session.client.stop(kickoff_id)
    log = run_logger()
    if answer.accepted:
        log.info("Crew run %s was asked to stop: %s.", kickoff_id, answer.outcome)
    elif answer.outcome is StopOutcome.UNSUPPORTED:
        log.warning(
            "Crew run %s runs on at %s: its server has no /stop. Its result is still there for run key %r.",
            kickoff_id,
            record.crew_url,
            record.run_key,
        )
    else:
        log.warning("Crew run %s was not stopped: %s. %s", kickoff_id, answer.outcome, answer.message or "")
    return answer


async def close_stopped(record: RunRecord, answer: StopAnswer, records: RecordStore) -> None:
    """Write down what a stop came to: the end where the server says so, else only that it was asked for.

    An end is told to automations as well, by whoever brought it about: nobody else will see it.
    """
    if answer.outcome is StopOutcome.NOT_STOPPABLE:
        return  # it has ended: whoever looks sees how, and writes it down
    standing = await records.of_kickoff(str(record.kickoff_id))
    if standing is not None and standing.phase is RecordPhase.ENDED:
        return  # somebody else saw the end, and what is here is older
    if answer.outcome is StopOutcome.STOPPED:
        record.phase, record.state, record.ended_at = RecordPhase.ENDED, CrewState.STOPPED, utcnow()
    else:
        record.reason = f"stop was asked for: {answer.outcome}"
    await records.save(record)
    if record.phase is RecordPhase.ENDED:
        emit("stopped", record, once=True, state=str(record.state))
