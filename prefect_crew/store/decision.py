"""Attempts as values, and the decision of a call with an idempotency key by the attempts of that key. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

SEND_WITHIN = 25.0
"""Seconds from before the last `begin` or `go_on` of a caller, within which it begins to send its kickoff."""
SPARE = 5.0
"""Seconds more until somebody else may touch the attempt."""


class AttemptState(StrEnum):
    """How far an attempt is."""

    POSTING = "posting"
    """Its owner may send the kickoff, or has it on its way."""
    BACKING_OFF = "backing_off"
    """Its owner waits after an answer that surely started nothing."""
    UNCERTAIN = "uncertain"
    """The kickoff was sent, and nobody knows whether it started a run."""
    NOT_STARTED = "not_started"
    """It surely started no run."""
    STARTED = "started"
    """Its kickoff id is known."""
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"
    """The crew's server does not know the run, and a person has said that it is over."""


PREPARING = (AttemptState.POSTING, AttemptState.BACKING_OFF)
"""The states in which the owner alone may change the attempt, until the deadline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try to start a run for an idempotency key: a row of `schema.attempts`. `first_id` is the id of its run, and
    `kickoff_id` the last one. An attempt that did not start has an `ended_at` as well. `error` is the crew's, or why
    the kickoff is uncertain."""

    id: str
    key: str
    number: int
    state: AttemptState
    replaced: bool
    crew: str
    crew_url: str
    inputs_digest: str
    input_digests: Mapping[str, str] | None
    secret_names: Sequence[str] | None
    has_webhooks: bool
    crew_version: str | None
    owner: str
    flow_run_id: str | None
    flow_run_count: int
    process: str | None
    begun_at: float
    deadline: float | None
    started_at: float | None
    ended_at: float | None
    counts_until: float
    human_since: float | None
    human_seconds: float
    stop_asked_at: float | None
    stop_asked_by: str | None
    resolved_by: str | None
    error: str | None
    usage: Any
    tokens: int | None
    cost: float | None
    estimates: Mapping[str, Sequence[float]] | None
    """By scope of `spending`: the expected tokens and cost."""
    session: str | None
    turn: int | None
    restored: str | None
    batch: str | None
    row_key: str | None
    step: str | None
    first_id: str | None
    kickoff_id: str | None

    def is_free(self, now: float) -> bool:
        """Whether others than its owner may touch this attempt without a kickoff id."""
        return self.deadline is None or self.deadline <= now

    def may_count(self, now: float) -> bool:
        """Whether it started a run or may have. In a pause that is over, it surely did not."""
        if self.state is AttemptState.BACKING_OFF:
            return not self.is_free(now)
        return self.state is not AttemptState.NOT_STARTED


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """A limit for one scope of `spending`, and what the next run is expected to use of it.

    `scope` is a crew's URL, or the name of a budget, a batch, a pipeline or a flow run.
    """

    scope: str
    per: Literal["day", "month", "all"]
    name: str = ""
    """For people."""
    max_runs: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    estimate_tokens: int = 0
    estimate_cost: float = 0.0
    is_warning: bool = False
    """Whether a run without room is started, and the decision reports it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The wish of a call. `look` needs the first block; `begin` writes the rest into the attempt.

    `owner` is a nonce of a call that has not sent a kickoff yet: after its first byte may have left, and `uncertain`
    or `not_started` could not be written, a call never comes back with the same one.
    """

    key: str
    crew_url: str
    inputs_digest: str
    owner: str
    input_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    """By name, without those of secret inputs: a conflict names the inputs that differ."""
    flow_run_id: str | None = None
    flow_run_count: int = 0
    retried_since: float | None = None
    """When the flow run around the call began, not this try of it; None unless the call is in a retry."""
    asked_at: float | None = None
    """The time of the call's first `look`: a run that fails later is this call's failure."""
    max_attempts: int = 3

    crew: str = ""
    process: str | None = None
    post_seconds: float = 30.0
    """The most that `POST /kickoff` may take."""
    limit: int | None = None
    """Runs of the crew that may be in flight."""
    allowances: Sequence[Allowance] = ()
    session: str | None = None
    step: str | None = None
    batch: str | None = None
    row_key: str | None = None
    batch_owner: str | None = None
    secret_names: Sequence[str] = ()
    has_webhooks: bool = False
    crew_version: str | None = None


class Step(StrEnum):
    """The next step of a call."""

    START = "start"
    """The key has no run: kick off."""
    START_AGAIN = "start again"
    """The run of the key failed: kick off another."""
    REATTACH = "reattach"
    """The run is in flight: wait for it."""
    RETURN = "return"
    """The run has ended: return its result, or raise its failure."""
    BUSY = "busy"
    """Another call may send the kickoff until `attempt.deadline`: look again then, or sooner."""
    UNCERTAIN = "uncertain"
    """Nobody knows whether the kickoff started a run. Others may resolve it from `attempt.deadline` on."""
    CONFLICT = "conflict"
    """The key belongs to another crew or other inputs: `differences`."""
    STOPPED = "stopped"
    """A person stopped the run for which this flow run waited: its retry does not start another."""
    FULL = "full"
    """`begin` only: as many runs of the crew are in flight as it may have."""
    OVER_BUDGET = "over budget"
    """`begin` only: an allowance has no room: `overruns`."""
    TURN = "turn"
    """`begin` only: `attempt`, an earlier turn of the session, is not over."""
    NOT_HELD = "not held"
    """`begin` only: the caller does not hold the batch any more."""


STARTS = (Step.START, Step.START_AGAIN)
"""The steps that lead to a kickoff."""


@dataclass(frozen=True, kw_only=True)
class Overrun:
    """An allowance without room: one of its measures, its use so far with that of runs in flight, its limit, and what
    the next run is expected to use."""

    allowance: Allowance
    measure: Literal["runs", "tokens", "cost"]
    used: float
    limit: float
    estimate: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The next step of a call, the attempt that it is about (of `begin`: the new one), and the store's time."""

    step: Step
    now: float
    attempt: Attempt | None = None
    differences: Sequence[str] = ()
    """`crew`, and the names of the inputs that differ; `inputs` where no name is known."""
    overruns: Sequence[Overrun] = ()
    """Also those of a start that has only warnings."""


def decide(attempts: Sequence[Attempt], request: Request, now: float) -> Decision:
    """Return the step of a call by all attempts of its key, the first one first.

    An attempt that did not start neither counts nor conflicts. The state of a run is the last one that somebody wrote:
    a run that ended while nobody looked is reattached to, so that its end is read before anything else.
    """
    counting = [attempt for attempt in attempts if attempt.may_count(now) and not is_own(attempt, request)]
    if not counting:
        return Decision(step=Step.START, now=now)
    last = counting[-1]
    # A row of a batch that failed is started with its new inputs.
    is_corrected = request.batch is not None and last.state in _FAILURES and last.crew_url == request.crew_url
    if not is_corrected and (differences := _differences(last, request)):
        return Decision(step=Step.CONFLICT, now=now, attempt=last, differences=differences)
    return Decision(step=_step(last, request, now, len(counting)), now=now, attempt=last)


def is_own(attempt: Attempt, request: Request) -> bool:
    """Return whether this very call made the attempt, and lost the answer of the store: nothing was sent for it."""
    return attempt.owner == request.owner and attempt.state in PREPARING


_FAILURES = (AttemptState.FAILED, AttemptState.STOPPED, AttemptState.LOST)


def _step(last: Attempt, request: Request, now: float, count: int) -> Step:
    match last.state:
        case AttemptState.STARTED:
            return Step.REATTACH
        case AttemptState.UNCERTAIN:
            return Step.UNCERTAIN
        case AttemptState.POSTING | AttemptState.BACKING_OFF:
            return Step.UNCERTAIN if last.is_free(now) else Step.BUSY
        case AttemptState.COMPLETED:
            return Step.RETURN
        case _:
            return _after_failure(last, request, count)


def is_stopped_by_person(attempt: Attempt) -> bool:
    """Return whether somebody stopped a run, and not the time limit of a wait."""
    return attempt.state is AttemptState.STOPPED and attempt.stop_asked_by != TIMEOUT


def _after_failure(last: Attempt, request: Request, count: int) -> Step:
    ended_at = last.ended_at or 0.0
    is_retry_since = request.retried_since is not None and request.retried_since < ended_at
    if is_stopped_by_person(last) and is_retry_since:
        return Step.STOPPED
    is_of_earlier_try = last.flow_run_id is not None and (
        last.flow_run_id == request.flow_run_id and last.flow_run_count < request.flow_run_count
    )
    is_own_failure = request.asked_at is not None and ended_at > request.asked_at and not is_of_earlier_try
    return Step.RETURN if count >= request.max_attempts or is_own_failure else Step.START_AGAIN


TIMEOUT = "timeout"
"""The `by` of `ask_to_stop` where a policy asked, and no person."""


def _differences(attempt: Attempt, request: Request) -> list[str]:
    differences = ["crew"] if attempt.crew_url != request.crew_url else []
    if attempt.inputs_digest != request.inputs_digest:
        before, now = attempt.input_digests or {}, request.input_digests
        names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        differences += names or ["inputs"]
    return differences
