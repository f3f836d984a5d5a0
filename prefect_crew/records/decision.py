"""The decision of a call with an idempotency key (start, reattach, return, …) by the records of that key. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from prefect_crew.exceptions import IdempotencyConflictError
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.states import CrewState


class Counted(Protocol):
    """An attempt at an idempotency key, in any store."""

    @property
    def counts(self) -> bool:
        """Whether the attempt started a run, or may have started one."""
        ...


T = TypeVar("T", bound=Counted)


class Caller(BaseModel):
    """The caller: the nonce of its call (`owner`), and in a flow run the flow run's id, its attempt and its process."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    owner: str
    flow_run_id: str | None = None
    flow_run_count: int = 0
    process: str | None = None


class Decision(StrEnum):
    """The next step of a call with an idempotency key."""

    START = "start"
    """No run has this key: claim the key and kick off."""
    REATTACH = "reattach"
    """A run is in flight: wait for that run."""
    RETURN = "return"
    """The run has ended and the call does not start another: return its result, or raise its failure."""
    START_AGAIN = "start again"
    """The run failed: start another under the same key."""
    UNCERTAIN = "uncertain"
    """Somebody sent a kickoff, and nobody knows whether it started a run: a person has to resolve it."""
    CLAIMED_ELSEWHERE = "claimed elsewhere"
    """Another call holds the claim and may send the kickoff now: wait for its kickoff id."""
    VOID = "void"
    """Another call holds the claim and surely sent nothing: void its claim, and decide again."""


STARTS = (Decision.START, Decision.START_AGAIN)
"""The decisions that lead to a kickoff."""


def latest_start(attempts: Sequence[T]) -> T | None:
    """Return the last attempt that started a run, or may have, without attempts that surely did not start."""
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
        record: The latest attempt at the key that counts (`RunRecord.counts`), or None.
        caller: The caller.
        kickoffs, max_attempts: The number of attempts at this key that count, `record` among them, and its limit.
        owner_ended: Whether the flow run that claimed the record has surely ended.
        is_own: Whether this very call made the claim, in a try that has ended, and surely sent no kickoff for it.
        force_new: Start a run, whatever the record says.
        asked_at: The time of the call, UTC. If a run was in flight then, the call is about that run, even if the run
            has failed since.

    A record's `state` is the last status of the crew that somebody read. If a run ended while nobody polled it, the
    call reattaches, and so reads the status first. So a call starts a failed crew again only after a stored failure.
    """
    if record is None or record.phase is RecordPhase.NOT_STARTED or force_new:
        return Decision.START
    if record.phase is RecordPhase.STARTED:
        return Decision.REATTACH
    if record.phase is RecordPhase.UNCERTAIN:
        return Decision.UNCERTAIN
    # An earlier attempt of the caller's own flow run has ended, or the caller's attempt would not exist.
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

    An attempt that surely did not start is no conflict: a caller may correct refused inputs under the same key.
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
