"""What became of a row: one word for it, its record, and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from prefect_crew.api.errors import CrewError, CrewLostError, CrewTimeoutError, KickoffUncertainError, OutputTypeError
from prefect_crew.api.models import CrewState
from prefect_crew.batches.rows import RowJob
from prefect_crew.blocks import DeployedCrew
from prefect_crew.open_runs import OpenRun
from prefect_crew.outcomes import typed
from prefect_crew.records import RecordPhase, RunRecord

__all__ = ["FINAL", "LOST", "MISFIT", "NOT_STARTED", "TIMED_OUT", "UNCERTAIN", "RowEnd", "broken", "ended", "unsettled"]

MISFIT = "misfit"
"""Completed, with a result of another type than was asked for."""
UNCERTAIN = "uncertain"
NOT_STARTED = "not-started"
TIMED_OUT = "timed-out"
LOST = "lost"
FINAL = {str(state) for state in CrewState if state.ended}
"""States after which a row is not looked at again. After any other, the next call goes on with it."""
ERROR_CAP = 2_000


@dataclass(frozen=True, slots=True)
class RowEnd:
    """What became of a row in a call of its batch.

    Attributes:
        job: The row.
        state: completed, failed, stopped, misfit, uncertain, not-started, timed-out, lost; or started, for a run whose
            status call gave no answer for too long.
        record: Its latest attempt, None if nothing was ever claimed.
        error: Why it is not completed, for people; secret inputs are masked in it.
        kind: The class of the error.
        data: The structured result, as JSON values of the type that was asked for.
        found: It had ended before this call.
    """

    job: RowJob
    state: str
    record: RunRecord | None
    error: str | None = None
    kind: str | None = None
    data: Any = None
    found: bool = False

    @property
    def completed(self) -> bool:
        """Whether there is a result as it was asked for."""
        return self.state == str(CrewState.COMPLETED)

    @property
    def uncertain(self) -> bool:
        """Whether a person has to settle it."""
        return self.state == UNCERTAIN


_KINDS: Mapping[CrewState | None, str] = {
    CrewState.FAILED: "CrewFailedError",
    CrewState.STOPPED: "CrewStoppedError",
}


def ended(
    job: RowJob,
    record: RunRecord,
    *,
    crew: DeployedCrew,
    output_type: type[BaseModel] | None,
    found: bool = False,
) -> RowEnd:
    """Return the end of a row whose run has ended. What does not fit `output_type` is noted in the record's error."""
    if record.state is not CrewState.COMPLETED:
        reason = record.error or ("it was stopped" if record.state is CrewState.STOPPED else "the crew gave no reason")
        return RowEnd(job, str(record.state), record, reason, _KINDS.get(record.state), found=found)
    if output_type is None or record.result is None:
        record.error = None
        data = None if record.result is None else record.result.data
        return RowEnd(job, str(record.state), record, data=data, found=found)
    run = OpenRun(crew, str(record.kickoff_id), record, job.inputs)
    try:
        data = typed(record.result.result(run.kickoff_id), output_type, run=run).data
    except OutputTypeError as error:
        record.error = str(error)[:ERROR_CAP]
        return RowEnd(job, MISFIT, record, record.error, "OutputTypeError", found=found)
    record.error = None
    return RowEnd(job, str(record.state), record, data=data.model_dump(mode="json"), found=found)


def broken(job: RowJob, record: RunRecord | None, error: CrewError, *, batch: str, found: bool = False) -> RowEnd:
    """Return the end, for this call, of a row that has none: nothing was bought, or its run is out of sight."""
    state, reason = NOT_STARTED, str(error)
    if isinstance(error, KickoffUncertainError):
        state, reason = UNCERTAIN, _uncertain(job, error.reason, batch)
    elif isinstance(error, CrewTimeoutError):
        state = TIMED_OUT
    elif isinstance(error, CrewLostError):
        state = LOST
    elif record is not None and record.phase is RecordPhase.STARTED:
        state = str(RecordPhase.STARTED)
    return RowEnd(job, state, record, reason[:ERROR_CAP], type(error).__name__, found=found)


def unsettled(job: RowJob, record: RunRecord, *, batch: str) -> RowEnd:
    """Return the end of a row that was found uncertain."""
    reason = record.reason or "whoever sent it ended before its answer was written down"
    return RowEnd(job, UNCERTAIN, record, _uncertain(job, reason, batch), KickoffUncertainError.__name__, found=True)


def _uncertain(job: RowJob, reason: str, batch: str) -> str:
    return (
        f"Nobody knows whether its kickoff started a run: {reason.rstrip('.')}. Look at the crew's page, then: "
        f"prefect-crew batch settle {batch!r} {job.key!r} --kickoff-id ID, or --never-started."
    )
