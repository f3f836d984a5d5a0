"""What became of a row, and whether it is started again."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

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
from prefect_crew.records.keys import escape_name
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.runs.run import OpenRun, parse_data
from prefect_crew.states import CrewState


class RowState(StrEnum):
    """How a row stands: in the ledger, in the output, in `batch inspect` and `batch failures`."""

    PENDING = "pending"
    """No kickoff of it was sent, or none that started a run: it is kicked off when its turn comes."""
    CLAIMED = "claimed"
    """Its kickoff is being sent."""
    STARTED = "started"
    """Its run is in flight."""
    UNCERTAIN = "uncertain"
    """Nobody knows whether its kickoff started a run: a person has to resolve it."""
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    INVALID_OUTPUT = "invalid-output"
    """Completed, with a result that does not fit `output_type`."""
    NOT_STARTED = "not-started"
    """The crew's server refused its kickoff."""
    TIMED_OUT = "timed-out"
    LOST = "lost"
    """The crew's server does not know its run any more."""
    NO_ANSWER = "no-answer"
    """Its run is in flight as far as is known, and the status call has not answered for too long."""
    CONFLICT = "conflict"
    """Its key was kicked off before with other inputs, or for another crew."""

    @property
    def is_final(self) -> bool:
        """Whether the next call leaves the row as it is."""
        return self in (RowState.COMPLETED, RowState.FAILED, RowState.STOPPED, RowState.INVALID_OUTPUT)

    @property
    def is_failed(self) -> bool:
        """Whether the row has no result, and nobody waits for one in this call."""
        return self not in (
            *(RowState.PENDING, RowState.CLAIMED, RowState.STARTED, RowState.UNCERTAIN, RowState.COMPLETED),
        )


def state_of(record: RunRecord) -> RowState:
    """Return how a row stands by the attempt that counts."""
    if record.phase is RecordPhase.NOT_STARTED:
        return RowState.PENDING if record.error is None else RowState.NOT_STARTED
    if record.phase in (RecordPhase.CLAIMED, RecordPhase.UNCERTAIN):
        return RowState(str(record.phase))
    if record.phase is RecordPhase.STARTED:
        return RowState.STARTED if record.error is None else _OUT_OF_SIGHT.get(record.reason or "", RowState.NO_ANSWER)
    if record.state is CrewState.COMPLETED:
        return RowState.COMPLETED if record.error is None else RowState.INVALID_OUTPUT
    return _ENDS.get(record.state, RowState.LOST)


_OUT_OF_SIGHT = {CrewLostError.__name__: RowState.LOST, CrewTimeoutError.__name__: RowState.TIMED_OUT}
_ENDS: dict[CrewState | None, RowState] = {CrewState.FAILED: RowState.FAILED, CrewState.STOPPED: RowState.STOPPED}
STOPPED_WITH_BATCH = "stopped since the batch was cancelled"
"""The reason, in a record, of a run that we stopped. Going on with the batch means to have that row after all."""
RETRYABLE = ("CrewFailedError", "CrewStoppedError", "OutputTypeError", "CrewLostError")
"""The errors after which a row may be started again. All others started nothing, or left a run that may go on."""


@dataclass(frozen=True)
class RetryRule:
    """Which failed rows are started again.

    Attributes:
        retries: Further kickoffs of a row, for all errors but a lost run, or by the class of its error.
        retry_failed: Rows that failed in earlier calls and are started again: all but lost ones, or some by their keys.
    """

    retries: int | Mapping[str, int] = 0
    retry_failed: bool | Collection[str] = False

    def __bool__(self) -> bool:
        return bool(self.retries or self.retry_failed)

    def applies_to(self, end: RowEnd, *, count: int, before: int, most: int) -> bool:
        """Return whether a row is started once more.

        Args:
            end: How it has ended.
            count: Its kickoffs so far.
            before: Those of them that were made in earlier calls.
            most: How many the crew's block allows.
        """
        if end.kind not in RETRYABLE:
            return False
        if isinstance(self.retries, int):
            more = 0 if end.state is RowState.LOST else self.retries
        else:
            more = self.retries.get(end.kind, 0)
        if end.found and end.record is not None and end.record.reason == STOPPED_WITH_BATCH:
            more = max(more, before)
        chosen = self.retry_failed
        asked = (chosen and end.state is not RowState.LOST) if isinstance(chosen, bool) else end.job.key in chosen
        return count < min((before + 1 if asked else 1) + more, most)


ERROR_CAP = 2_000
SENDER_ENDED = "its sender ended before the answer was written down"


@dataclass(frozen=True, slots=True)
class RowEnd:
    """What became of a row in a call of its batch.

    Attributes:
        job: The row.
        state: How it stands.
        record: Its latest attempt, None if nothing was ever claimed.
        error: Why it is not completed, for people; secret inputs are masked in it.
        kind: The class of the error.
        found: It had ended before this call.
    """

    job: RowJob
    state: RowState
    record: RunRecord | None
    error: str | None = None
    kind: str | None = None
    found: bool = False


def end_of_run(
    job: RowJob, record: RunRecord, *, crew: Crew, output_type: type[BaseModel] | None, found: bool = False
) -> RowEnd:
    """Return the end of a row whose run has ended. What does not fit `output_type` is noted in the record's error."""
    if record.state is not CrewState.COMPLETED:
        stopped = record.state is CrewState.STOPPED
        reason = record.error or ("it was stopped" if stopped else "the crew gave no reason")
        kind = "CrewStoppedError" if stopped else "CrewFailedError" if record.state is CrewState.FAILED else None
        return RowEnd(job, state_of(record), record, reason, kind, found)
    record.error = None
    if output_type is not None and record.result is not None:
        run = OpenRun(crew.hiding(job.hidden), str(record.kickoff_id), record, job.inputs)
        try:
            parse_data(record.result.result(run.kickoff_id), output_type, run=run)
        except OutputTypeError as error:
            record.error = str(error)[:ERROR_CAP]
            return RowEnd(job, RowState.INVALID_OUTPUT, record, record.error, type(error).__name__, found)
    return RowEnd(job, RowState.COMPLETED, record, found=found)


def end_without_run(job: RowJob, record: RunRecord | None, error: CrewError, *, batch: str) -> RowEnd:
    """Return the end, for this call, of a row that has none: nothing was started, or its run is out of sight."""
    state, reason = RowState.NOT_STARTED, str(error)
    if isinstance(error, KickoffUncertainError):
        state, reason = RowState.UNCERTAIN, _uncertain(job, error.reason, batch)
    elif isinstance(error, IdempotencyConflictError):
        state, reason = RowState.CONFLICT, CONFLICT_REASON
    elif isinstance(error, CrewTimeoutError):
        state = RowState.TIMED_OUT
    elif isinstance(error, CrewLostError):
        state, reason = RowState.LOST, _lost(job, error, batch)
    elif record is not None and record.phase is RecordPhase.STARTED:
        state = RowState.NO_ANSWER
    return RowEnd(job, state, record, reason[:ERROR_CAP], type(error).__name__)


def conflict(job: RowJob) -> RowEnd:
    """Return the end of a row whose key was kicked off before with something else."""
    return RowEnd(job, RowState.CONFLICT, None, CONFLICT_REASON, IdempotencyConflictError.__name__)


def end_uncertain(job: RowJob, record: RunRecord, *, batch: str) -> RowEnd:
    """Return the end of a row that was found uncertain."""
    reason = record.reason or SENDER_ENDED
    error = _uncertain(job, reason, batch)
    return RowEnd(job, RowState.UNCERTAIN, record, error, KickoffUncertainError.__name__, found=True)


def note_reason(record: RunRecord | None, end: RowEnd) -> bool:
    """Write into a record why its row has no result, where nothing there says so; return whether that changed it."""
    if record is None or record.error is not None or end.state in (RowState.UNCERTAIN, RowState.CONFLICT):
        return False
    record.error = end.error
    if record.reason is None:
        record.reason = end.kind
    return True


CONFLICT_REASON = (
    "Not started: this key was kicked off before with other inputs, or for another crew. Give the row another key, or "
    "the batch another name."
)


def _lost(job: RowJob, error: CrewLostError, batch: str) -> str:
    seen = f", last seen {error.last_state}," if error.last_state else ""
    return (
        f"Run {error.kickoff_id}{seen} is not known to the crew's server. It is not started again on a guess: "
        f"prefect-crew batch retry {shlex.quote(batch)} --key {shlex.quote(job.key)} does."
    )


def _uncertain(job: RowJob, reason: str, batch: str) -> str:
    idempotency_key = shlex.quote(f"batch/{escape_name(batch)}/{job.key}")
    return (
        f"Nobody knows whether its kickoff started a run: {reason.rstrip('.')}. Look at the crew's page, then: "
        f"prefect-crew runs resolve {idempotency_key} --kickoff-id ID, or --never-started."
    )
