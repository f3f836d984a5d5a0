"""The states of rows, and the states that a row may leave by a new start."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from prefect_crew.client.models import CrewStatus
from prefect_crew.client.redaction import MASK
from prefect_crew.exceptions import CrewLostError, CrewTimeoutError, OutputTypeError
from prefect_crew.records.decision import latest_start
from prefect_crew.records.model import RecordPhase, RunRecord, StoredResult
from prefect_crew.runs.run import WITHHELD, LiveRun, end_of, parse_data
from prefect_crew.states import CrewState


class RowState(StrEnum):
    """The state of a row, with the same name in the ledger, the output, `batch inspect` and `batch failures`."""

    PENDING = "pending"
    """No kickoff has started a run of it yet: it is kicked off later."""
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
    """Its run may be in flight, but the status call has not answered for too long."""
    CONFLICT = "conflict"
    """Its key was kicked off before with other inputs, or for another crew."""

    @property
    def is_final(self) -> bool:
        """Whether the row stays as it is, but for retries and a new `output_type`. The next call may start a stopped
        row again."""
        return self in (RowState.COMPLETED, RowState.FAILED, RowState.INVALID_OUTPUT)

    @property
    def is_unfinished(self) -> bool:
        """Whether the next call continues with the row by itself, although it has no result in this one."""
        return self in (RowState.TIMED_OUT, RowState.NO_ANSWER, RowState.NOT_STARTED)

    @property
    def has_line(self) -> bool:
        """Whether the output has a line for the row."""
        return self is RowState.COMPLETED or self.is_failed

    @property
    def is_failed(self) -> bool:
        """Whether the row has no result, and nobody waits for one in this call."""
        return self.value not in ("pending", "claimed", "started", "uncertain", "completed")


def state_of(record: RunRecord) -> RowState:
    """Return the state of a row by the record of the attempt that counts."""
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
STOPPED_WITH_BATCH = "stopped because the batch was cancelled"
"""The reason, in a record, of a run that we stopped. The next call of the batch starts its row again."""
SENDER_ENDED = "the process that sent it ended before it recorded the answer"
CONFLICT_REASON = (
    "Not started: this key was kicked off before with other inputs, or for another crew. Give the row another key, or "
    "the batch another name. A row whose runs have all failed is started with its new inputs when failed rows are "
    "retried."
)
RETRYABLE = {
    RowState.FAILED: "CrewFailedError",
    RowState.STOPPED: "CrewStoppedError",
    RowState.INVALID_OUTPUT: "OutputTypeError",
    RowState.LOST: "CrewLostError",
}
"""The states from which a row may start again, and the error class of each. In any other state no run was started, or a
run may go on."""
CORRECTABLE = (RowState.FAILED, RowState.STOPPED)
"""The states in which a row that is started again may have other inputs than before: its run surely has no result."""
ERROR_CAP = 2_000
MISFIT_WITHOUT_REASONS = "The result does not fit the output type. The reasons may quote secrets and are not stored."
"""The error of a row whose result was masked: a user's validator may quote a secret in other words than the crew."""


def misfit(run: LiveRun, record: RunRecord, output_type: type[BaseModel] | None) -> str | None:
    """Return why the result of a completed run does not fit `output_type`; None if it does."""
    if output_type is not None and record.result is not None:
        try:
            parse_data(record.completed(record.result.result(run.kickoff_id)), output_type, run=run)
        except OutputTypeError as error:
            return str(error)[:ERROR_CAP]
    return None


def end_of_row(
    run: LiveRun, record: RunRecord, status: CrewStatus, human: float, output_type: type[BaseModel] | None
) -> dict[str, Any]:
    """Return the end of a run, masked, and with an error if its result does not fit `output_type`; `human`: `end_of`.

    The end has this error when it is saved, since the process may be killed right after.
    """
    if status.state is not CrewState.COMPLETED:
        error = run.redact_text(status.error or "The crew gave no reason.")[:ERROR_CAP]
        return end_of(run.crew, status, human, error, None)
    stored = StoredResult.of(status.result())
    withheld: dict[str, Any] = {"output": WITHHELD, "data": None, "tasks": []}
    result = stored.model_copy(update=withheld) if run.is_blind else run.redact.model(stored)
    end = end_of(run.crew, status, human, None, result)
    unmasked = record.model_copy(update={**end, "result": stored})  # a masked email address is none
    if (error := misfit(run, unmasked, output_type)) is not None:
        end["error"] = error if result == stored else MISFIT_WITHOUT_REASONS
    return end


def kickoffs_of(attempts: Sequence[RunRecord]) -> int:
    """Return the number of attempts at a row that started a run, or may have."""
    return sum(attempt.counts for attempt in attempts)


def owed_to(attempts: Sequence[RunRecord]) -> int:
    """Return how many kickoffs a row gets besides the first because a cancelled batch stopped its latest run; or 0."""
    latest = latest_start(attempts)
    return kickoffs_of(attempts) if latest is not None and latest.reason == STOPPED_WITH_BATCH else 0


def is_masked(result: StoredResult | None) -> bool:
    """Return whether a stored result may lack secrets that the crew's result had."""
    text = "" if result is None else result.model_dump_json()
    return MASK in text or WITHHELD in text


def explain_lost(error: CrewLostError, key: str, batch: str) -> str:
    """Return the message for a row whose run is lost, with the reason and the next step."""
    state = f", last seen {error.last_state}," if error.last_state else ""
    return (
        f"Run {error.kickoff_id}{state} is not known to the crew's server. The row does not start again by itself. To "
        f"start it again, run: prefect-crew batch retry {shlex.quote(batch)} --row {shlex.quote(key)}."
    )
