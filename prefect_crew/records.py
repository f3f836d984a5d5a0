"""The record of a run, and the decision about it.

A kickoff cannot be undone, so what is known about it is written down: the claim before the request, the id right after
the answer, the end when it is seen. Whoever comes later with the same run key, in another process or on another
machine, decides by the record and by nothing else. Nothing here does any I/O: stores are behind `RecordStore`.

Facts behind the design: the crew API has no idempotency key; Prefect retries flows, tasks and even its own requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from prefect_crew.api.certainty import post_deadline
from prefect_crew.api.errors import RunKeyConflictError
from prefect_crew.api.models import CrewResult, CrewState, TaskResult, TokenUsage

__all__ = [
    "MAX_RUN_KEY",
    "RECORD_VERSION",
    "Caller",
    "Decision",
    "RecordPhase",
    "RecordStore",
    "ReviewStore",
    "RunRecord",
    "SentReview",
    "StoredResult",
    "check_same_run",
    "decide",
    "latest_purchase",
]

RECORD_VERSION = 1
MAX_RUN_KEY = 500
"""Characters of a run key."""
MARGIN = 10.0
"""Seconds on top of the deadline of a POST after which the owner of a claim must know whether it started a run."""


class RecordPhase(str, Enum):
    """How far the purchase got."""

    CLAIMED = "claimed"
    """Somebody is about to post, or has died over it."""
    STARTED = "started"
    """The kickoff id is known."""
    ENDED = "ended"
    """The end was seen; `state` says which."""
    UNCERTAIN = "uncertain"
    """Posted, and nobody knows what became of it."""
    NOT_STARTED = "not-started"
    """The kickoff surely did not start a run. It does not count as a purchase."""

    def __str__(self) -> str:
        return self.value


class StoredResult(BaseModel):
    """The part of a result that a record keeps, where it is small enough."""

    model_config = ConfigDict(frozen=True)

    output: str
    data: Any = None
    tasks: list[TaskResult] = Field(default_factory=list[TaskResult])
    execution_time: float | None = None
    usage: TokenUsage | None = None

    @classmethod
    def of(cls, result: CrewResult) -> StoredResult:
        """Take a result's parts, without its raw bodies."""
        return cls(
            output=result.output,
            data=result.data,
            tasks=[task.model_copy(update={"raw": None}) for task in result.tasks],
            execution_time=result.execution_time,
            usage=result.usage,
        )

    def result(self, kickoff_id: str) -> CrewResult:
        """Return it as a result again. Its `raw` is None: the record does not keep it."""
        return CrewResult(kickoff_id=kickoff_id, state=CrewState.COMPLETED, **dict(self))


class SentReview(BaseModel):
    """An answer for a person, written down before it was sent. `outcome` says what became of it.

    `asked` is a digest of what was to be judged, which tells the next question from the same one; None where that was
    not known. `task_id` is masked, as all that is stored; `mark` is a digest of the crew's own id where that differs,
    and `shown_mark` one of the task as the status named it. `moved_on`: the crew was seen in another state after it, so
    that whatever it asks then is another question. `call` names the call of a flow that gave it, the same on every
    retry. `request` and `option`: which request of a Flow it answers at its callback, and with which outcome.
    """

    task_id: str
    mark: str | None = None
    round: int
    approve: bool
    feedback: str = ""
    by: str
    at: datetime
    asked: str | None = None
    shown_mark: str | None = None
    moved_on: bool = False
    call: str | None = None
    request: str | None = None
    option: str | None = None
    outcome: Literal["intended", "sent", "uncertain"] = "intended"


class RunRecord(BaseModel):
    """One attempt at one run key. Times are UTC.

    `crew` is for people; `crew_url` and `inputs_digest` are what the run is compared by. `owner` is a nonce of the call
    that claimed it, since Prefect's client may send a request twice and then meets its own claim. `known_by` is when
    the owner must know whether it started a run. `flow_run_id` and `flow_run_count` name the owner's flow run and which
    attempt of it. Inputs are not kept, only their digest.
    """

    model_config = ConfigDict(extra="ignore")

    version: int = RECORD_VERSION
    run_key: str
    attempt: int = Field(ge=1)
    phase: RecordPhase = RecordPhase.CLAIMED
    crew: str
    crew_url: str
    inputs_digest: str
    owner: str
    claimed_at: datetime
    known_by: datetime
    forced_by: str | None = None
    flow_run_id: str | None = None
    flow_run_count: int = 0
    process: str | None = None
    """The operating system process of the owner's flow run, as `processes.this_process` names it."""
    slot: str | None = None
    """The lease of its slot in the crew's shared limit, for whoever waits for the run."""
    step: str | None = None
    secret_inputs: list[str] = Field(default_factory=list[str])
    """Names of the inputs that hold a secret: without their values, nothing that the crew says may be shown."""
    hooked: bool = False
    """Whether its kickoff asked for webhooks to this package's receiver."""
    kickoff_id: str | None = None
    kicked_off_at: datetime | None = None
    human_since: datetime | None = None
    human_seconds: float = 0.0
    human_task: str | None = None
    """The task that waits for a person, or was the last to do so."""
    state: CrewState | None = None
    ended_at: datetime | None = None
    error: str | None = None
    reason: str | None = None
    result: StoredResult | None = None

    @property
    def counts(self) -> bool:
        """Whether this attempt is, or may be, a purchase."""
        return self.phase is not RecordPhase.NOT_STARTED

    @property
    def sent(self) -> dict[str, str]:
        """What a person needs to find the run on the crew's page."""
        return {
            "crew": self.crew,
            "at": f"{self.claimed_at:%Y-%m-%d %H:%M:%S} UTC",
            "inputs digest": self.inputs_digest,
            "attempt": str(self.attempt),
        }


class Caller(BaseModel):
    """Who asks: a nonce of the call, and the flow run and attempt of it that it is made from, if any."""

    model_config = ConfigDict(frozen=True)

    owner: str
    flow_run_id: str | None = None
    flow_run_count: int = 0
    process: str | None = None


class Decision(str, Enum):
    """What to do about a run key."""

    START = "start"
    """Nothing was bought under this key: claim and kick off."""
    REATTACH = "reattach"
    """A run is in flight: wait for that one."""
    RETURN = "return"
    """The run has ended and is not bought again: give its result, or its failure."""
    BUY_AGAIN = "buy again"
    """The run failed, and a call with its key asks for another."""
    UNCERTAIN = "uncertain"
    """A kickoff was sent and nobody knows its fate: a person has to settle it."""
    CLAIMED_ELSEWHERE = "claimed elsewhere"
    """Another call is posting at this moment: wait for its id."""

    def __str__(self) -> str:
        return self.value


def latest_purchase(attempts: Sequence[RunRecord]) -> RunRecord | None:
    """Return the last attempt that is, or may be, a purchase: one that surely did not start hides none before it."""
    return next((attempt for attempt in reversed(attempts) if attempt.counts), None)


def decide(
    record: RunRecord | None,
    *,
    caller: Caller,
    now: datetime,
    bought: int = 0,
    max_kickoffs: int = 3,
    owner_ended: bool = False,
    force_new: bool = False,
    asked_at: datetime | None = None,
) -> Decision:
    """Decide what a call with a run key does.

    Args:
        record: The latest attempt at the key that counts, None if there is none.
        caller: Who asks.
        now: The time, UTC.
        bought: How many attempts at this key count as purchases, `record` among them.
        max_kickoffs: How many may.
        owner_ended: Whether the flow run that claimed the record is known to have ended.
        force_new: Buy whatever the record says.
        asked_at: When the call was made, UTC. A run that was in flight then is the one that it is about, also if it
            has failed meanwhile.

    A record's `state` is the crew's status as it was last read; a started run that ended while nobody looked is
    reattached to, which looks at its status first. That way a failed crew is only ever bought again by somebody who
    was told of the failure.
    """
    if record is None or record.phase is RecordPhase.NOT_STARTED:
        return Decision.START
    if force_new:
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
        if earlier or owner_ended or now >= record.known_by:
            return Decision.UNCERTAIN
        return Decision.CLAIMED_ELSEWHERE
    if record.state is CrewState.COMPLETED or bought >= max_kickoffs:
        return Decision.RETURN
    if asked_at is not None and record.ended_at is not None and record.ended_at > asked_at and not earlier:
        return Decision.RETURN
    return Decision.BUY_AGAIN


def check_same_run(record: RunRecord, *, crew_url: str, inputs_digest: str) -> None:
    """Raise RunKeyConflictError if the record is of another crew or other inputs.

    An attempt that surely did not start binds nobody: the inputs that were refused may be mended under the same key.
    """
    if record.phase is RecordPhase.NOT_STARTED:
        return
    differences: list[str] = []
    if record.crew_url != crew_url:
        differences.append(f"it ran crew {record.crew} at {record.crew_url}, not {crew_url}")
    if record.inputs_digest != inputs_digest:
        differences.append(f"its inputs have the digest {record.inputs_digest}, these have {inputs_digest}")
    if differences:
        raise RunKeyConflictError(
            run_key=record.run_key, difference="; ".join(differences), kickoff_id=record.kickoff_id
        )


def known_by(now: datetime, request_timeout: float, delay: float = 0.0) -> datetime:
    """Return when the owner of a claim made at `now`, posting after `delay` seconds, must know its outcome."""
    return now + timedelta(seconds=delay + post_deadline(request_timeout) + MARGIN)


def utcnow() -> datetime:
    """Return the time, UTC, aware."""
    return datetime.now(timezone.utc)


class ReviewStore(Protocol):
    """Where people's answers live, beside the record of the run that they are about."""

    async def reviews(self, record: RunRecord) -> list[SentReview]:
        """Return what people have answered to a run, in order."""
        ...

    async def add_review(self, record: RunRecord, number: int, review: SentReview) -> bool:
        """Write down an answer that is about to be sent; False if somebody else's of this number stands there."""
        ...

    async def save_review(self, record: RunRecord, number: int, review: SentReview) -> None:
        """Write down what became of it."""
        ...

    async def remove_review(self, record: RunRecord, number: int) -> None:
        """Take back an answer that the crew's server refused."""
        ...


class RecordStore(Protocol):
    """Where records live. Every method may raise whatever its storage raises."""

    async def claim(self, record: RunRecord) -> bool:
        """Write a new record; False if somebody else's stands in its place. Atomic among all callers."""
        ...

    async def save(self, record: RunRecord) -> None:
        """Replace a record that this caller owns."""
        ...

    async def attempts(self, run_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key, the first one first."""
        ...

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the record that holds a kickoff id, if any."""
        ...

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return whether the flow run that claimed the record is known to have ended."""
        ...
