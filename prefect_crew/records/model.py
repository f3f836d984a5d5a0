"""The record of a run: what is stored about it, what its parts say together, and what a call does about it. Pure."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

from prefect_crew.client.encoding import encode_inputs
from prefect_crew.client.models import CrewResult, Review, TaskResult, TokenUsage
from prefect_crew.states import CrewState

RECORD_VERSION = 2
MAX_KEY = 500
"""Characters of an idempotency key."""
SPARE = 5.0
"""Seconds added to the time that the owner of a permit may take, before it may be resolved. The store tells its time in
whole seconds, and one late."""


def utcnow() -> datetime:
    """Return the time, UTC, aware."""
    return datetime.now(UTC)


class RecordPhase(StrEnum):
    """How far the start of a run got."""

    CLAIMED = "claimed"
    """A caller is about to post, or died before it could write down what came of it."""
    STARTED = "started"
    """The kickoff id is known."""
    ENDED = "ended"
    """The end was seen; `state` says which."""
    UNCERTAIN = "uncertain"
    """Posted, and nobody knows whether that started a run."""
    NOT_STARTED = "not-started"
    """The kickoff surely did not start a run."""


def secret_mark(token: str, inputs: Mapping[str, Any], secret: Collection[str]) -> str | None:
    """Return a fingerprint of the secret inputs, keyed by the crew's token; None without a token or a secret."""
    if not token or not secret:
        return None
    texts = encode_inputs({name: inputs[name] for name in sorted(secret) if name in inputs})
    return hmac.new(_key(token), json.dumps(["secrets", texts], ensure_ascii=False).encode(), "sha256").hexdigest()[:8]


@lru_cache(maxsize=64)  # 20 ms, so that a token which a person made up is not found by trying words
def _key(token: str) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", token.encode(), b"prefect-crew secret inputs", 50_000)


class StoredResult(BaseModel):
    """The part of a result that is kept: in the end of its run, or in an artifact if it is too large for that."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    output: str
    data: Any = None
    tasks: list[TaskResult] = Field(default_factory=list[TaskResult])
    execution_time: float | None = None
    usage: TokenUsage | None = None

    @classmethod
    def of(cls, result: CrewResult) -> StoredResult:
        """Take a result's parts, without its raw bodies."""
        tasks = [task.model_copy(update={"raw": None}) for task in result.tasks]
        return cls.model_validate({**dict(result), "tasks": tasks})

    def result(self, kickoff_id: str) -> CrewResult:
        """Return it as a result again. Its `raw` is None: the record does not keep it."""
        return CrewResult(kickoff_id=kickoff_id, **dict(self))


class Outcome(BaseModel):
    """What became of a kickoff: an entry says what its creator knows, a record what all its entries say together."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    phase: RecordPhase = RecordPhase.CLAIMED
    kickoff_id: str | None = None
    kicked_off_at: datetime | None = None
    human_since: datetime | None = None
    human_seconds: float = 0.0
    human_task: str | None = None
    """The task that waits for a person, or was the last to do so."""
    state: CrewState | None = None
    ended_at: datetime | None = None
    reason: str | None = None
    error: str | None = None
    result: StoredResult | None = None
    result_id: str | None = None
    """The id of the artifact that holds the result, where that is too large for this."""
    usage: TokenUsage | None = None
    """Tokens that the run used, however it ended; None where nobody reported any."""
    cost: float | None = None
    """What it cost by the price that held when it ended; None where that is unknown."""
    estimates: dict[str, int] | None = None
    """What is counted for it in the counters of budgets, in slots by the counter's name."""

    @property
    def used(self) -> dict[str, float]:
        """What is known of what the run used, by what budgets measure."""
        amounts = {"cost": self.cost, "tokens": self.usage and self.usage.total_tokens}
        return {measure: amount for measure, amount in amounts.items() if amount is not None}

    @property
    def is_final(self) -> bool:
        """Whether the crew's server has said how the run ended. A person may say that it has forgotten the run: an end
        that is seen after all counts more."""
        return self.phase is RecordPhase.ENDED and self.state is not CrewState.UNKNOWN

    def outcome(self) -> dict[str, Any]:
        """Return these fields alone."""
        return {name: getattr(self, name) for name in Outcome.model_fields}


class Entry(Outcome):
    """One entry in the log of a claim. It is created once, under the next number: of two callers one creates it.

    A permit (phase CLAIMED) is the right to send one kickoff. Its creator changes it, to note what became of that, and
    those who wait for the run note there whether a person has to answer. A resolution (STARTED, NOT_STARTED) says what
    somebody else found out. The end (ENDED) closes the run; nobody changes it.
    """

    version: int = RECORD_VERSION
    idempotency_key: str
    attempt: int
    owner: str
    good_for: float = 0.0
    """Seconds from the creation of a permit within which the kickoff begins to be sent."""
    crew: str | None = None
    """In an end, with `crew_url` and `flow_run_id`: who adds up what runs cost reads ends, and no claims."""
    crew_url: str | None = None
    flow_run_id: str | None = None

    # What the store tells, and no part of what is stored.
    ref: str | None = Field(default=None, exclude=True)
    claim: str | None = Field(default=None, exclude=True)
    """The `ref` of its claim."""
    age: float = Field(default=0.0, exclude=True)
    """Seconds since it was created, by the store's clock, as of when it was read."""
    idle: float = Field(default=0.0, exclude=True)
    """Seconds since it was changed."""


class RunRecord(Outcome):
    """One attempt at one idempotency key. Times are UTC.

    `crew` is for people; `crew_url` and `inputs_digest` are what the run is compared by: the inputs are not kept.
    `owner` is a nonce of the call that claimed it: Prefect's client may send a request twice and then meets its own
    claim. `flow_run_id` and `flow_run_count` name the owner's flow run and which attempt of it.
    """

    version: int = RECORD_VERSION
    idempotency_key: str
    attempt: int = Field(ge=1)
    crew: str
    crew_url: str
    inputs_digest: str
    owner: str
    claimed_at: datetime
    good_for: float = 0.0
    """Seconds from the claim within which its owner takes a permit."""
    post_deadline: float = 0.0
    """Seconds that one kickoff takes at most."""
    forced_by: str | None = None
    """The call that started it whatever the record said (`force_new`)."""
    flow_run_id: str | None = None
    flow_run_count: int = 0
    process: str | None = None
    """The operating system process of the owner's flow run, as `owners.this_process` names it."""
    slot: str | None = None
    """The lease of its slot in the crew's shared limit, for whoever waits for the run."""
    step: str | None = None
    secret_inputs: list[str] = Field(default_factory=list[str])
    """Names of the inputs that hold one: without their values, nothing that the crew says may be shown."""
    secret_mark: str | None = None
    """The fingerprint of these inputs: a later call that gives the same ones can mask them."""
    has_webhooks: bool = False
    """Whether its kickoff asked for webhooks to this package's receiver."""

    # What the store tells, and no part of what is stored.
    ref: str | None = Field(default=None, exclude=True)
    """What the store knows this claim by: another claim of the same attempt has another."""
    entries: int = Field(default=0, exclude=True)
    """How many entries its log has."""
    idle: float = Field(default=0.0, exclude=True)
    """Seconds since it or an entry of it was changed, by the store's clock, as of when it was read."""
    strongest: Entry | None = Field(default=None, exclude=True)
    """The entry that counts. What becomes of the run until its end is written to it."""
    open_for: float = Field(default=0.0, exclude=True)
    """Seconds for which the kickoff may still be sent, or on its way, by the store's clock; 0 if it is not."""

    @property
    def counts(self) -> bool:
        """Whether this attempt started a run, or may have."""
        return self.phase is not RecordPhase.NOT_STARTED

    @property
    def is_unresolved(self) -> bool:
        """Whether nobody has written down what became of the kickoff."""
        return self.phase in (RecordPhase.CLAIMED, RecordPhase.UNCERTAIN)

    def completed(self, result: CrewResult) -> CrewResult:
        """Return the run's result with its key, and with the tokens and the cost that are on record."""
        facts = {"idempotency_key": self.idempotency_key, "usage": self.usage or result.usage, "cost": self.cost}
        return result.model_copy(update=facts)

    @property
    def sent(self) -> dict[str, str]:
        """What a person needs to find the run on the crew's page."""
        return {
            "crew": self.crew,
            "at": f"{self.claimed_at:%Y-%m-%d %H:%M:%S} UTC",
            "inputs digest": self.inputs_digest,
            "attempt": str(self.attempt),
        }


def digest(text: str, length: int = 32) -> str:
    """Return what stands for a text in the name of a Variable or a block."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def claim_of(owner: str) -> str:
    """Return what a webhook's URL says of the claim that it was made for."""
    return digest(owner, 16)


_RANK = {
    RecordPhase.CLAIMED: 0,
    RecordPhase.UNCERTAIN: 1,
    RecordPhase.NOT_STARTED: 2,
    RecordPhase.STARTED: 3,
    RecordPhase.ENDED: 4,
}
"""What counts where two say different things of one claim: an id is stronger than a word that there is none."""


def _rank(outcome: Outcome) -> tuple[int, bool]:
    return _RANK[outcome.phase], outcome.is_final


def fold(record: RunRecord, entries: Sequence[Entry], *, age: float) -> RunRecord:
    """Return what a claim and the entries of its log say together.

    The highest rank counts, and of equal ones the first, so that no write that arrives late takes anything back.

    Args:
        record: The claim.
        entries: Those of its log, in the order of their numbers.
        age: Seconds since the claim was made, by the store's clock.
    """
    held = next((entry for entry in entries if entry.estimates), record)
    update: dict[str, Any] = {"entries": len(entries), "open_for": max(0.0, record.good_for - age)}
    phase = record.phase
    if entries:
        strongest, last = max(entries, key=_rank), entries[-1]
        update["strongest"] = strongest
        update["open_for"] = max(0.0, last.good_for + record.post_deadline + SPARE - last.age)
        if _rank(strongest) > _rank(record):
            update |= strongest.outcome()
            phase = strongest.phase
    if phase not in (RecordPhase.CLAIMED, RecordPhase.UNCERTAIN):
        update["open_for"] = 0.0
    return record.model_copy(update={**update, "estimates": held.estimates})


def resolution(record: RunRecord, phase: RecordPhase, **facts: Any) -> dict[str, Any]:
    """Return the outcome of a record for which somebody found out that it is STARTED with a `kickoff_id`, ENDED in a
    `state`, or NOT_STARTED."""
    outcome: dict[str, Any] = {**record.outcome(), "phase": phase, "reason": None, **facts}
    if phase is RecordPhase.STARTED:
        # The kickoff was sent right after the claim; nobody knows the moment better.
        outcome["kicked_off_at"] = record.kicked_off_at or record.claimed_at
    if phase is RecordPhase.ENDED:
        outcome |= {"ended_at": facts.get("ended_at", utcnow()), "human_since": None}
    return outcome


@dataclass
class Lease:
    """For how long a claim or a permit may be used by whoever asked for it. Make it before asking.

    The store begins it anew right before its request is sent for the first time: not later, since that request may make
    what it asks for, and not earlier, since the request may wait a long time for others of this process.

    Of two clocks the one counts that says more: one stands still while a machine sleeps, the other can be set back.
    """

    seconds: float
    _wall: float = field(default_factory=lambda: time.time())
    _monotonic: float = field(default_factory=lambda: time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether it may be used no more."""
        return max(time.time() - self._wall, time.monotonic() - self._monotonic) > self.seconds

    def begin(self) -> None:
        """Let its time begin now."""
        self._wall, self._monotonic = time.time(), time.monotonic()

    def end(self) -> None:
        """Let it be used no more."""
        self.seconds = -1.0


class RecordStore(Protocol):
    """Where records live, and what people answered. Every method may raise whatever its storage raises."""

    async def claim(self, record: RunRecord, lease: Lease | None = None) -> bool:
        """Write a new record, and note its `ref` in it; False if somebody else's stands in its place. Atomic.

        `lease` begins when this is asked of the store.
        """
        ...

    async def withdraw(self, record: RunRecord) -> None:
        """Take back a claim that no permit was asked of, while nobody else may resolve it."""
        ...

    async def confirm(self, record: RunRecord, earlier: Sequence[RunRecord]) -> bool:
        """Return whether the attempts at the key are a claim and those that it was decided by, and no others."""
        ...

    async def permit(
        self, record: RunRecord, good_for: float, *, before: Lease | None = None, lease: Lease | None = None
    ) -> bool:
        """Take the right to send the kickoff of a claim that this caller owns; False if somebody has resolved it.

        Atomic among all callers. `before` is the lease of the claim, or of its last permit: where it is over once this
        permit stands, the record may have been resolved and removed in between. `lease` begins when this is asked of
        the store.
        """
        ...

    async def resolve(self, record: RunRecord, phase: RecordPhase, **facts: Any) -> bool:
        """Write down what was found out about a record as it was read, as `resolution`, and note it there.

        False if somebody else has found something out since. It is for the caller to see that the claim's owner can
        send no more (`RunRecord.open_for`); where nothing was sent yet, it needs no waiting.
        """
        ...

    async def save(self, record: RunRecord) -> None:
        """Write down what became of a run that this caller started or waits for."""
        ...

    async def end(self, record: RunRecord, **end: Any) -> bool:
        """Write down how a run ended, as `resolution`, and note it in the record. Atomic: one caller closes a run.

        False if somebody else has: the record then says how, unless it is gone.
        """
        ...

    async def unlist(self, record: RunRecord) -> None:
        """Take a run that has ended off the list of those that are open. Where that fails, the list reads its end."""
        ...

    async def save_started(self, record: RunRecord) -> str | None:
        """Write down the kickoff id of a claim; return the key of another record that holds the same id.

        Then the caller takes the id back.
        """
        ...

    async def other_holder(self, record: RunRecord) -> str | None:
        """Return the key of another record that holds the kickoff id of a record that was found, None if there is none.

        Then the caller takes the id back.
        """
        ...

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key, the first one first."""
        ...

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the record that holds a kickoff id, if any."""
        ...

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return whether the flow run that claimed the record is known to have ended."""
        ...

    def may_ask(self) -> AsyncIterator[RunRecord]:
        """Yield the runs in flight, or those of them that are known to have waited for a person."""
        ...

    async def reviews(self, record: RunRecord) -> list[Review]:
        """Return what people have answered to a run, in order."""
        ...

    async def add_review(self, record: RunRecord, number: int, review: Review) -> bool:
        """Write down an answer that is about to be sent; False if another answer, by its nonce, has this number."""
        ...

    async def save_review(self, record: RunRecord, number: int, review: Review) -> None:
        """Write down what became of it."""
        ...

    async def remove_review(self, record: RunRecord, number: int) -> None:
        """Take back an answer that the crew's server refused."""
        ...
