"""What a call with an idempotency key does, decided by the records of that key. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from prefect_crew.exceptions import IdempotencyConflictError
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.states import CrewState


class Caller(BaseModel):
    """Who asks: a nonce of the call, and the flow run and attempt of it that it is made from, if any."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    owner: str
    flow_run_id: str | None = None
    flow_run_count: int = 0
    process: str | None = None


class Decision(StrEnum):
    """What a call does about an idempotency key."""

    START = "start"
    """Nothing was started under this key: claim and kick off."""
    REATTACH = "reattach"
    """A run is in flight: wait for that one."""
    RETURN = "return"
    """The run has ended and is not started again: give its result, or its failure."""
    START_AGAIN = "start again"
    """The run failed, and a call with its key asks for another."""
    UNCERTAIN = "uncertain"
    """A kickoff was sent and nobody knows whether it started a run: a person has to resolve it."""
    CLAIMED_ELSEWHERE = "claimed elsewhere"
    """Another call is posting at this moment: wait for its id."""
    VOID = "void"
    """Another call claimed it and surely sent nothing: void its claim, and decide again."""

    @property
    def starts(self) -> bool:
        """Whether it leads to a kickoff."""
        return self in (Decision.START, Decision.START_AGAIN)


def latest_start(attempts: Sequence[RunRecord]) -> RunRecord | None:
    """Return the last attempt that started a run, or may have. One that surely did not start hides none before it."""
    return next((attempt for attempt in reversed(attempts) if attempt.counts), None)


def decide(
    record: RunRecord | None,
    *,
    caller: Caller,
    kickoffs: int = 0,
    max_attempts: int = 3,
    owner_ended: bool = False,
    is_own: bool = False,
    force_new: bool = False,
    asked_at: datetime | None = None,
) -> Decision:
    """Decide what a call with an idempotency key does.

    Args:
        record: The latest attempt at the key that counts, None if there is none.
        caller: Who asks.
        kickoffs, max_attempts: How many attempts at this key count, `record` among them, and how many may.
        owner_ended: Whether the flow run that claimed the record is known to have ended.
        is_own: Whether this very call has claimed the record, in a try that has ended, and surely sent nothing for it.
        force_new: Start whatever the record says.
        asked_at: When the call was made, UTC. A run that was in flight then is the one that it is about, also if it
            has failed since.

    A record's `state` is the crew's status as it was last read. A started run that ended while nobody looked is
    reattached to, which looks at its status first: so a failed crew is only started again by somebody who knows of
    the failure.
    """
    if record is None or record.phase is RecordPhase.NOT_STARTED or force_new:
        return Decision.START
    if record.phase is RecordPhase.STARTED:
        return Decision.REATTACH
    if record.phase is RecordPhase.UNCERTAIN:
        return Decision.UNCERTAIN
    # An earlier attempt of the very flow run that asks has ended, or this attempt would not be.
    earlier = record.flow_run_id is not None and (
        record.flow_run_id == caller.flow_run_id and record.flow_run_count < caller.flow_run_count
    )
    if record.phase is RecordPhase.CLAIMED:
        if is_own:
            return Decision.VOID
        if not (earlier or owner_ended) and record.open_for:
            return Decision.CLAIMED_ELSEWHERE
        return Decision.UNCERTAIN if record.entries else Decision.VOID
    if record.state is CrewState.COMPLETED or kickoffs >= max_attempts:
        return Decision.RETURN
    if asked_at is not None and record.ended_at is not None and record.ended_at > asked_at and not earlier:
        return Decision.RETURN
    return Decision.START_AGAIN


def check_same_run(record: RunRecord, *, crew_url: str, inputs_digest: str) -> None:
    """Raise IdempotencyConflictError if the record is of another crew or other inputs.

    An attempt that surely did not start binds nobody: refused inputs may be corrected under the same key.
    """
    if record.phase is RecordPhase.NOT_STARTED:
        return
    differences: list[str] = []
    if record.crew_url != crew_url:
        differences.append(f"it ran crew {record.crew} at {record.crew_url}, not {crew_url}")
    if record.inputs_digest != inputs_digest:
        differences.append(f"its inputs differ: their digest is {record.inputs_digest}, now it is {inputs_digest}")
    if differences:
        raise IdempotencyConflictError(
            idempotency_key=record.idempotency_key, difference="; ".join(differences), kickoff_id=record.kickoff_id
        )
