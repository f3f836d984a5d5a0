"""What became of a row, and whether it is started again. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from prefect_crew.batches.rows import RowJob
from prefect_crew.crew import Crew
from prefect_crew.exceptions import (
    CrewError,
    CrewLostError,
    CrewTimeoutError,
    IdempotencyConflictError,
    KickoffUncertainError,
    OutputTypeError,
)
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.runs.run import OpenRun, typed
from prefect_crew.states import CrewState

STOPPED_WITH_BATCH = "stopped since the batch was cancelled"
"""The reason, in a record, of a run that we stopped. Going on with the batch means to have that row after all."""
Retries = int | Mapping[str, int]
RETRYABLE = ("CrewFailedError", "CrewStoppedError", "OutputTypeError", "CrewLostError")
"""The errors after which a row may be bought again. All others bought nothing, or left a run that may go on."""


@dataclass(frozen=True)
class RetryRule:
    """What the user has asked for.

    Attributes:
        retries: Further purchases of a row, for all errors but a lost run, or by the class of its error.
        retry_failed: Rows that failed in earlier calls and are bought again: all but lost ones, or those of these keys.
    """

    retries: Retries = 0
    retry_failed: bool | Collection[str] = False

    def again(self, end: RowEnd, *, count: int, before: int, most: int) -> bool:
        """Say whether a row is bought once more.

        Args:
            end: How it has ended.
            count: Its purchases so far.
            before: Those of them that were made in earlier calls.
            most: How many the crew's block allows.
        """
        if end.kind not in RETRYABLE:
            return False
        if isinstance(self.retries, int):
            more = 0 if end.state == LOST else self.retries
        else:
            more = self.retries.get(end.kind, 0)
        if end.found and end.record is not None and end.record.reason == STOPPED_WITH_BATCH:
            more = max(more, before)
        chosen = self.retry_failed
        asked = (chosen and end.state != LOST) if isinstance(chosen, bool) else end.job.key in chosen
        return count < min((before + 1 if asked else 1) + more, most)


def purchases(attempts: Sequence[RunRecord]) -> int:
    """Return how many attempts at a row were, or may have been, a purchase."""
    return sum(attempt.counts for attempt in attempts)


MISFIT = "misfit"
"""Completed, with a result of another type than was asked for."""
UNCERTAIN = "uncertain"
NOT_STARTED = "not-started"
TIMED_OUT = "timed-out"
LOST = "lost"
REFUSED = "refused"
"""The ledger's word for a row that was not started for a reason; "not-started" alone is one that is still to be."""
UNSEEN = "unseen"
"""The ledger's word for a run that is in flight as far as is known, and whose end no look has brought."""
FINAL = {str(state) for state in CrewState if state.ended}
"""States after which a row is not looked at again. After any other, the next call goes on with it."""
FAILED = (str(CrewState.FAILED), str(CrewState.STOPPED), MISFIT, LOST, TIMED_OUT, REFUSED, UNSEEN)
"""The ledger's words for rows without a result, but for those that are uncertain or that somebody waits for."""
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
        """Whether a person has to resolve it."""
        return self.state == UNCERTAIN


_KINDS: Mapping[CrewState | None, str] = {
    CrewState.FAILED: "CrewFailedError",
    CrewState.STOPPED: "CrewStoppedError",
}


def ended(
    job: RowJob,
    record: RunRecord,
    *,
    crew: Crew,
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
    run = OpenRun(crew.hiding(job.hidden), str(record.kickoff_id), record, job.inputs)
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
    elif isinstance(error, IdempotencyConflictError):
        reason = (
            f"Not started: {error.difference}. What it brought then stays on record. Give the row another key, or the "
            "batch another name."
        )
    elif isinstance(error, CrewTimeoutError):
        state = TIMED_OUT
    elif isinstance(error, CrewLostError):
        state, reason = LOST, _lost(job, error, batch)
    elif record is not None and record.phase is RecordPhase.STARTED:
        state = str(RecordPhase.STARTED)
    return RowEnd(job, state, record, reason[:ERROR_CAP], type(error).__name__, found=found)


def note(record: RunRecord | None, end: RowEnd) -> bool:
    """Write into a record why its row has no result, where nothing there says so; return whether that changed it."""
    if record is None or record.error is not None or end.uncertain:
        return False
    record.error = end.error
    if record.reason is None:
        record.reason = end.kind
    return True


_OUT_OF_SIGHT = {CrewLostError.__name__: LOST, CrewTimeoutError.__name__: TIMED_OUT}


def standing_word(record: RunRecord) -> str | None:
    """Return the word for how a row stands by its record; None where only the phase tells."""
    if record.state is CrewState.COMPLETED and record.error is not None:
        return MISFIT
    if record.state is not None or record.error is None:
        return None if record.state is None else str(record.state)
    if record.phase is RecordPhase.NOT_STARTED:
        return REFUSED
    return _OUT_OF_SIGHT.get(record.reason or "", UNSEEN) if record.phase is RecordPhase.STARTED else None


def unresolved(job: RowJob, record: RunRecord, *, batch: str) -> RowEnd:
    """Return the end of a row that was found uncertain."""
    reason = record.reason or "whoever sent it ended before its answer was written down"
    return RowEnd(job, UNCERTAIN, record, _uncertain(job, reason, batch), KickoffUncertainError.__name__, found=True)


def _lost(job: RowJob, error: CrewLostError, batch: str) -> str:
    seen = f", last seen {error.last_state}," if error.last_state else ""
    return (
        f"Run {error.kickoff_id}{seen} is not known to the crew's server. "
        f"It is not bought again on a guess: "
        f"prefect-crew batch retry {shlex.quote(batch)} --key {shlex.quote(job.key)} does."
    )


def _uncertain(job: RowJob, reason: str, batch: str) -> str:
    return (
        f"Nobody knows whether its kickoff started a run: {reason.rstrip('.')}. Look at the crew's page, then: "
        f"prefect-crew batch resolve {shlex.quote(batch)} {shlex.quote(job.key)} --kickoff-id ID, or --never-started."
    )
