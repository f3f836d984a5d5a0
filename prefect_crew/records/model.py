"""The record of a run: its fields, the log of its entries, and the rules that combine both (`fold`). No I/O."""

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
"""Extra seconds, after the time that the owner of a permit may take, before anybody may resolve the run. The server's
`Date` header has whole seconds, and may be one second late."""


def utcnow() -> datetime:
    """Return the time, UTC, aware."""
    return datetime.now(UTC)


class RecordPhase(StrEnum):
    """How far the start of a run got."""

    CLAIMED = "claimed"
    """A caller is about to send `POST /kickoff`, or died before it could store the outcome."""
    STARTED = "started"
    """The kickoff id is known."""
    ENDED = "ended"
    """The run has ended; `state` says how."""
    UNCERTAIN = "uncertain"
    """A caller sent `POST /kickoff`, and nobody knows whether the request started a run."""
    NOT_STARTED = "not-started"
    """The kickoff surely did not start a run."""


def secret_mark(token: str, inputs: Mapping[str, Any], secret: Collection[str]) -> str | None:
    """Return a fingerprint of the secret inputs, keyed by the crew's token; None without a token or a secret."""
    if not token or not secret:
        return None
    texts = encode_inputs({name: inputs[name] for name in sorted(secret) if name in inputs})
    return hmac.new(_key(token), json.dumps(["secrets", texts], ensure_ascii=False).encode(), "sha256").hexdigest()[:8]


@lru_cache(maxsize=64)  # one call takes 20 ms, so that nobody finds a short token by trying words
def _key(token: str) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", token.encode(), b"prefect-crew secret inputs", 50_000)


class StoredResult(BaseModel):
    """The stored part of a result: in the end of the run's log, or in an artifact if it is too large for a Variable."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    output: str
    data: Any = None
    tasks: list[TaskResult] = Field(default_factory=list[TaskResult])
    execution_time: float | None = None
    usage: TokenUsage | None = None

    @classmethod
    def of(cls, result: CrewResult) -> StoredResult:
        """Copy a result without the raw bodies of the server's answers."""
        tasks = [task.model_copy(update={"raw": None}) for task in result.tasks]
        return cls.model_validate({**dict(result), "tasks": tasks})

    def result(self, kickoff_id: str) -> CrewResult:
        """Return a `CrewResult` with these parts. Its `raw` is None: the record does not store the raw body."""
        return CrewResult(kickoff_id=kickoff_id, **dict(self))


class Outcome(BaseModel):
    """The outcome of a kickoff. An entry has the facts that its creator knows; a record combines all its entries."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    phase: RecordPhase = RecordPhase.CLAIMED
    kickoff_id: str | None = None
    kicked_off_at: datetime | None = None
    human_since: datetime | None = None
    human_seconds: float = 0.0
    human_task: str | None = None
    """The crew's task that waits for a person, or the last task that did."""
    state: CrewState | None = None
    ended_at: datetime | None = None
    reason: str | None = None
    error: str | None = None
    result: StoredResult | None = None
    result_id: str | None = None
    """The id of the artifact that holds the result, if the result is too large for a Variable."""
    usage: TokenUsage | None = None
    """Tokens that the run used, however it ended; None if nobody reported any."""
    cost: float | None = None
    """The cost of the run, by the crew's price at its end; None if unknown."""
    crew_version: str | None = None
    """The digest of the crew's definition that was deployed, as the process that started the run knew it."""
    estimates: dict[str, int] | None = None
    """The estimate of the run in each counter of a budget: slots by the counter's name."""
    turn: int | None = None
    """The number of the run in its session, known from the permit on."""

    @property
    def used(self) -> dict[str, float]:
        """The known use of the run: amounts by `cost` and `tokens`, without unknown ones."""
        amounts = {"cost": self.cost, "tokens": self.usage and self.usage.total_tokens}
        return {measure: amount for measure, amount in amounts.items() if amount is not None}

    @property
    def is_final(self) -> bool:
        """Whether the crew's server has reported the end of the run. A person's declaration that the server has
        forgotten the run is not final: an end that the server reports later replaces the declaration."""
        return self.phase is RecordPhase.ENDED and self.state is not CrewState.UNKNOWN

    @property
    def rank(self) -> tuple[int, bool]:
        """The rank of the outcome: of two that disagree, the higher one counts."""
        return RANK[self.phase], self.is_final

    def outcome(self) -> dict[str, Any]:
        """Return these fields alone."""
        return {name: getattr(self, name) for name in Outcome.model_fields}


class Entry(Outcome):
    """One entry in the log of a claim. A caller creates it under the next number: of two callers, only one succeeds.

    A permit (phase CLAIMED) is the right to send one kickoff. Its creator later writes the outcome of the kickoff to
    it, and waiting callers write to it whether a person has to answer. A resolution (STARTED, NOT_STARTED) is the
    outcome that somebody else found out. The end (ENDED) closes the run; nobody changes it.
    """

    version: int = RECORD_VERSION
    idempotency_key: str
    attempt: int
    owner: str
    good_for: float = 0.0
    """Seconds, from the creation of a permit, within which its creator begins to send the kickoff."""
    crew: str | None = None
    """Set in an end, as are `crew_url` and `flow_run_id`: the report of costs reads ends, and no claims."""
    crew_url: str | None = None
    flow_run_id: str | None = None

    # The store fills these fields when it reads the entry; the Variable does not contain them.
    ref: str | None = Field(default=None, exclude=True)
    claim: str | None = Field(default=None, exclude=True)
    """The `ref` of its claim."""
    age: float = Field(default=0.0, exclude=True)
    """Seconds from the creation of the entry to this read, by the store's clock."""
    idle: float = Field(default=0.0, exclude=True)
    """Seconds from the last change of the entry to this read, by the store's clock."""


class RunRecord(Outcome):
    """One attempt at one idempotency key. Times are UTC.

    `crew` is for people. A later call with the key compares `crew_url` and `inputs_digest`: the record has no inputs.
    `owner` is a nonce of the call that made the claim. With it a call recognizes its own claim when Prefect's client
    has sent the request twice. `flow_run_id` and `flow_run_count` are the owner's flow run and its attempt's number.
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
    """Seconds, from the creation of the claim, within which its owner takes a permit."""
    post_deadline: float = 0.0
    """Seconds that one `POST /kickoff` takes at most."""
    forced_by: str | None = None
    """The call that started the run with `force_new`, whatever the earlier attempts said."""
    flow_run_id: str | None = None
    flow_run_count: int = 0
    process: str | None = None
    """The operating system process of the owner's flow run, as `owners.this_process` names it."""
    slot: str | None = None
    """The lease of the run's slot in the crew's concurrency limit, for each caller that waits for the run."""
    step: str | None = None
    secret_inputs: list[str] = Field(default_factory=list[str])
    """Names of the secret inputs. A process without their values cannot mask them, and shows no text of the crew."""
    secret_mark: str | None = None
    """The fingerprint of the secret inputs: a later call with the same values can mask them."""
    has_webhooks: bool = False
    """Whether the kickoff asked for webhooks to this package's receiver."""
    session: str | None = None
    """The session of Flow runs to which the run belongs (records/sessions.py)."""

    # The store fills these fields when it reads the record; the Variable does not contain them.
    ref: str | None = Field(default=None, exclude=True)
    """The store's id of this claim. Another claim of the same attempt has another id."""
    entries: int = Field(default=0, exclude=True)
    """The number of entries in its log."""
    idle: float = Field(default=0.0, exclude=True)
    """Seconds from the last change of the claim or of one of its entries to this read, by the store's clock."""
    strongest: Entry | None = Field(default=None, exclude=True)
    """The entry with the highest rank (`fold`). Callers write to it until the run ends."""
    restored: str | None = Field(default=None, exclude=True)
    """The kickoff id of the run whose state the run of a session takes up; set when the owner takes the turn."""
    open_for: float = Field(default=0.0, exclude=True)
    """Seconds for which the owner may still send the kickoff or have it on its way, by the store's clock; else 0."""

    @property
    def counts(self) -> bool:
        """Whether this attempt started a run, or may have."""
        return self.phase is not RecordPhase.NOT_STARTED

    @property
    def is_unresolved(self) -> bool:
        """Whether the record does not say if the kickoff started a run."""
        return self.phase in (RecordPhase.CLAIMED, RecordPhase.UNCERTAIN)

    def completed(self, result: CrewResult) -> CrewResult:
        """Return the run's result with its key, and with the tokens and the cost of the record."""
        facts = {"idempotency_key": self.idempotency_key, "usage": self.usage or result.usage, "cost": self.cost}
        return result.model_copy(update=facts)

    @property
    def sent(self) -> dict[str, str]:
        """The facts by which a person finds the run on the crew's page."""
        return {
            "crew": self.crew,
            "at": f"{self.claimed_at:%Y-%m-%d %H:%M:%S} UTC",
            "inputs digest": self.inputs_digest,
            "attempt": str(self.attempt),
        }


def digest(text: str, length: int = 32) -> str:
    """Return the SHA-256 of a text, cut to a length, for the name of a Variable or a block."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def claim_of(owner: str) -> str:
    """Return the digest of a claim's owner that stands in the URLs of its webhooks."""
    return digest(owner, 16)


RANK = {
    RecordPhase.CLAIMED: 0,
    RecordPhase.UNCERTAIN: 1,
    RecordPhase.NOT_STARTED: 2,
    RecordPhase.STARTED: 3,
    RecordPhase.ENDED: 4,
}
"""The rank of a phase if two entries of one claim disagree: a kickoff id is stronger than "no run started"."""


def fold(record: RunRecord, entries: Sequence[Entry], *, age: float) -> RunRecord:
    """Return the record that a claim and the entries of its log make together.

    The entry with the highest rank counts; of several with that rank, the first. So a late write cannot undo an earlier
    one.

    Args:
        record: The claim.
        entries: The entries of its log, in the order of their numbers.
        age: Seconds since the claim was made, by the store's clock.
    """
    held = next((entry for entry in entries if entry.estimates), record)
    update: dict[str, Any] = {"entries": len(entries), "open_for": max(0.0, record.good_for - age)}
    phase = record.phase
    if entries:
        strongest, last = max(entries, key=lambda entry: entry.rank), entries[-1]
        update["strongest"] = strongest
        update["open_for"] = max(0.0, last.good_for + record.post_deadline + SPARE - last.age)
        if strongest.rank > record.rank:
            update |= strongest.outcome()
            phase = strongest.phase
    if phase not in (RecordPhase.CLAIMED, RecordPhase.UNCERTAIN):
        update["open_for"] = 0.0
    turn = next((entry.turn for entry in entries if entry.turn is not None), record.turn)
    return record.model_copy(update={**update, "estimates": held.estimates, "turn": turn})


def resolution(record: RunRecord, phase: RecordPhase, **facts: Any) -> dict[str, Any]:
    """Return the outcome of a record after somebody found out that the run is STARTED with a `kickoff_id`, ENDED in a
    `state`, or NOT_STARTED."""
    outcome: dict[str, Any] = {**record.outcome(), "phase": phase, "reason": None, **facts}
    if phase is RecordPhase.STARTED:
        # The owner sends the kickoff right after the claim; nobody knows the moment better.
        outcome["kicked_off_at"] = record.kicked_off_at or record.claimed_at
    if phase is RecordPhase.ENDED:
        outcome |= {"ended_at": facts.get("ended_at", utcnow()), "human_since": None}
    return outcome


@dataclass
class Lease:
    """The time for which a caller may use its claim or permit (`Entry`). Make the lease before the caller's request.

    The store restarts the lease right before it sends the request for the first time: not later, since that request may
    create the claim or permit, and not earlier, since the request may wait long for other requests of this process.

    Two clocks measure, and the longer time counts, because the monotonic clock stands still while a machine sleeps, and
    somebody can set back the wall clock.
    """

    seconds: float
    _wall: float = field(default_factory=lambda: time.time())
    _monotonic: float = field(default_factory=lambda: time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return max(time.time() - self._wall, time.monotonic() - self._monotonic) > self.seconds

    def begin(self) -> None:
        """Restart the time."""
        self._wall, self._monotonic = time.time(), time.monotonic()

    def end(self) -> None:
        """End the time now."""
        self.seconds = -1.0


class RecordStore(Protocol):
    """A store of run records and of people's answers. Every method may raise the errors of its storage."""

    async def claim(self, record: RunRecord, lease: Lease | None = None) -> bool:
        """Write a new record and set its `ref`. Return False if another caller has claimed this attempt before. Atomic.

        `lease` begins when the store sends the request that writes the record.
        """
        ...

    async def withdraw(self, record: RunRecord) -> None:
        """Take back a claim for which the caller has asked no permit, while nobody else may resolve it."""
        ...

    async def confirm(self, record: RunRecord, earlier: Sequence[RunRecord]) -> bool:
        """Return whether the key has exactly these attempts: this claim, and the earlier ones that the caller read
        before it decided to claim."""
        ...

    async def permit(
        self, record: RunRecord, good_for: float, *, before: Lease | None = None, lease: Lease | None = None
    ) -> bool:
        """Take the right to send the kickoff of this caller's claim. Return False if somebody has resolved the claim.

        Atomic among all callers. `before` is the lease of the claim, or of its last permit. If it is over when this
        permit exists, somebody may have resolved and deleted the record in between. `lease` begins when the store sends
        the request.
        """
        ...

    async def resolve(self, record: RunRecord, phase: RecordPhase, **facts: Any) -> bool:
        """Write the outcome of a run (`resolution`) to the store, and set it in the record.

        Return False if somebody else has written an entry since the record was read. The caller makes sure that the
        claim's owner cannot send any more (`RunRecord.open_for`). Without a permit there is nothing to wait for.
        """
        ...

    async def save(self, record: RunRecord) -> None:
        """Write the current outcome of a run that this caller started or waits for."""
        ...

    async def end(self, record: RunRecord, **end: Any) -> bool:
        """Write the end of a run (`resolution`), and set it in the record. Atomic: only one caller closes a run.

        Return False if somebody else has closed the run. The record then has that end, unless it was deleted.
        """
        ...

    async def unlist(self, record: RunRecord) -> None:
        """Take an ended run off the list of open runs. If that fails, the list finds the run and reads its end."""
        ...

    async def save_started(self, record: RunRecord) -> str | None:
        """Write the kickoff id of a claim. Return the key of another record that holds the same id, else None.

        If there is another record, the caller removes the id from this one.
        """
        ...

    async def other_holder(self, record: RunRecord) -> str | None:
        """Return the key of another record that holds the kickoff id of this record, or None.

        If there is another record, the caller removes the id from this one.
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
        """Yield the runs in flight that may wait for a person: all of them, or fewer if the store knows which."""
        ...

    async def reviews(self, record: RunRecord) -> list[Review]:
        """Return people's answers to the questions of a run, in order."""
        ...

    async def add_review(self, record: RunRecord, number: int, review: Review) -> bool:
        """Write an answer before it is sent. Return False if an answer with another nonce has this number."""
        ...

    async def save_review(self, record: RunRecord, number: int, review: Review) -> None:
        """Replace the run's answer `number` by `review`, whose `outcome` or `moved_on` has changed."""
        ...

    async def remove_review(self, record: RunRecord, number: int, review: Review) -> None:
        """Take back an answer that the crew's server refused. An answer with another nonce stays."""
        ...
