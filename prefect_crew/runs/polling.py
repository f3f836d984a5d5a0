"""The loop that waits for a run: how often to look at its status, and until when."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prefect_crew.artifacts.telemetry import count_waiting
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import RETRY_AFTER_CAP, WaitPolicy, fast_intervals
from prefect_crew.exceptions import (
    AuthenticationError,
    CrewAPIError,
    CrewConnectionError,
    CrewError,
    CrewLostError,
    CrewTimeoutError,
    RateLimitedError,
    ResponseFormatError,
)
from prefect_crew.records.model import RunRecord
from prefect_crew.states import CrewState

LOOK = 60.0
"""Seconds that a look may take, for the budget of errors."""
NO_ANSWER = (CrewConnectionError, ResponseFormatError, CrewAPIError)
"""What a look that tells nothing about the run raises."""


def poll_delays(
    policy: WaitPolicy, rng: Callable[[], float] = random.random, *, again: bool = False
) -> Iterator[float]:
    """Yield the pauses between looks, in seconds, without end.

    `rng` gives numbers in [0, 1). `again`: they begin anew, and `initial` is none that is longer than the later ones.
    """
    delay = min(policy.initial, policy.max_interval) if again else policy.initial
    while True:
        yield delay * (1 + policy.jitter * (2 * rng() - 1))
        delay = min(delay * policy.factor, policy.max_interval)


@dataclass
class Phases:
    """When the phases of a run began, in seconds since the epoch, and how long people have taken.

    `human_since` is set while a person is waited for. `human_extra` are the seconds that people got beyond the budget.
    """

    kicked_off_at: float
    human_seconds: float = 0.0
    human_since: float | None = None
    human_extra: float = 0.0

    @classmethod
    def of(cls, record: RunRecord | None) -> Phases:
        """Return what a record knows of them, so that they survive a restart; without one, the run begins now."""
        if record is None or record.kicked_off_at is None:
            return cls(time.time())
        since = record.human_since
        return cls(record.kicked_off_at.timestamp(), record.human_seconds, None if since is None else since.timestamp())

    def note_in(self, record: RunRecord) -> None:
        """Write into a record what a restart needs to know of people's time."""
        since = self.human_since
        record.human_seconds = self.human_seconds
        record.human_since = None if since is None else datetime.fromtimestamp(since, UTC)

    def see(self, state: CrewState, now: float) -> bool:
        """Note the state seen at `now`; True if a wait for a person began or ended with it."""
        waits, waited = state is CrewState.WAITING, self.human_since is not None
        if waits and not waited:
            self.human_since = now
        elif waited and not waits:
            self.human_seconds, self.human_since = self.human_time(now), None
        return waits != waited

    def human_time(self, now: float) -> float:
        """Return the seconds that people have had, with the wait that is under way."""
        return self.human_seconds + (0.0 if self.human_since is None else max(0.0, now - self.human_since))

    def left(self, policy: WaitPolicy, state: CrewState, now: float) -> tuple[str, float, float] | None:
        """Return the phase whose budget ends first, that budget and the seconds left of it; None without a limit."""
        human, since = self.human_time(now), now - self.kicked_off_at
        if state is CrewState.WAITING:
            limit = policy.human_timeout
            return None if limit is None else ("human", limit, limit + self.human_extra - human)
        budgets: list[tuple[str, float, float]] = []
        if policy.timeout is not None:
            phase = "running" if state is CrewState.RUNNING else "pending"
            budgets.append((phase, policy.timeout, policy.timeout - (since - human)))
        if policy.pending_timeout is not None and state is CrewState.PENDING:
            budgets.append(("pending", policy.pending_timeout, policy.pending_timeout - since))
        return min(budgets, key=lambda budget: budget[2], default=None)


class Watcher:
    """What `poll` tells, and asks. What these methods raise ends the wait."""

    async def on_status(self, status: CrewStatus) -> None:
        """Take in a good answer: each one in order, also the last."""

    async def on_human_wait(self, phases: Phases) -> None:
        """Handle that a wait for a person began (`human_since` is set) or ended: a restart needs to know."""

    async def on_error(self, error: CrewError) -> None:
        """Take in that a look failed."""

    async def pause(self, seconds: float) -> bool:
        """Wait so long, or until there is news: True then, and the pauses begin with `initial` again."""
        await asyncio.sleep(seconds)
        return False

    def next_pause(self, delay: float) -> float:
        """Return how long the next pause is where the policy says `delay`; a budget still cuts it."""
        return delay

    def has_answered(self) -> bool:
        """Return whether an answer was sent since this was last asked: the pauses then begin with `initial` again."""
        return False

    async def more_time(self) -> float:
        """Return how many more seconds people get, whose time is over; 0 ends the wait."""
        return 0.0

    async def stop(self, phase: str) -> bool:
        """Do what the policy says now that the budget of this phase is over; True if the crew was stopped."""
        del phase
        return False


async def poll(
    look: Callable[[], Awaitable[CrewStatus]],
    *,
    kickoff_id: str,
    policy: WaitPolicy,
    phases: Phases,
    watcher: Watcher,
    crew: str | None = None,
    idempotency_key: str | None = None,
    first_look: bool = False,
    now: Callable[[], float] = time.time,
    rng: Callable[[], float] = random.random,
) -> CrewStatus:
    """Look at a run until it has ended and return its last status, whichever end that is.

    An error while looking says nothing about the run and costs from `error_timeout`; a 429 costs nothing, and its
    `Retry-After` is obeyed. Whether the run has ended is looked at before the clock: the time budgets are checked only
    after a good answer.

    Args:
        look: Makes one status call.
        kickoff_id, crew, idempotency_key: The run, for the errors.
        policy, watcher: How to wait, and who gets what is seen.
        phases: When the run was kicked off, and what people have taken so far. It is changed as the wait goes on.
        first_look: Look at once instead of after `initial` seconds: for a run that was kicked off some time ago.
        now, rng: The clock that `phases` is in, in seconds, and numbers in [0, 1) for the jitter.

    Raises:
        CrewTimeoutError: A budget of the policy is over. The run may go on.
        CrewLostError: The server does not know the run, after the grace.
        AuthenticationError: The token was refused.
        CrewError: No look succeeded for `error_timeout` seconds: the last look's error.
    """
    names: dict[str, Any] = {"kickoff_id": kickoff_id, "crew": crew, "idempotency_key": idempotency_key}
    state = _Poll(names, policy, phases, watcher, now, rng)
    if not first_look:
        # Counted from the kickoff: what was written down since is not a reason to look later.
        await state.pause(max(0.0, state.next_pause() - max(0.0, now() - phases.kicked_off_at)))
    try:
        while True:
            try:
                status = await look()
            except AuthenticationError:
                raise
            except NO_ANSWER as error:
                await state.failed(error)
                least = min(getattr(error, "retry_after", None) or 0.0, RETRY_AFTER_CAP)
                await state.pause(max(state.next_delay(), least))
                continue
            if await state.take(status):
                return status
            if watcher.has_answered():
                state.begin_anew()
            await state.pause(state.next_pause())
    finally:
        if state.waits:
            count_waiting(crew, -1)


@dataclass
class _Poll:
    """The state of one `poll` between its looks."""

    names: dict[str, Any]
    policy: WaitPolicy
    phases: Phases
    watcher: Watcher
    now: Callable[[], float]
    rng: Callable[[], float]
    seen: CrewState | None = None
    unknown: int = 0
    waits: bool = False
    failing_for: float = 0.0
    """Seconds that failed looks have cost since the last good answer."""
    failed_at: float | None = None
    paused: float = 0.0
    """Seconds that the last pause was to take."""

    def __post_init__(self) -> None:
        self.delays, self.began = poll_delays(self.policy, self.rng), self.now()

    def begin_anew(self) -> None:
        """Have the pauses begin with `initial` again."""
        self.delays = poll_delays(self.policy, self.rng, again=True)

    async def pause(self, seconds: float) -> None:
        """Pause before the next look."""
        self.paused = seconds
        if await self.watcher.pause(seconds):
            self.begin_anew()

    @property
    def left(self) -> tuple[str, float, float] | None:
        return self.phases.left(self.policy, self.seen or CrewState.PENDING, self.now())

    def next_delay(self) -> float:
        return min([next(self.delays), *fast_intervals])

    def next_pause(self) -> float:
        """Cut the next delay to the end of the budget that ends first: the last look falls on it, not after it."""
        delay, time_left = self.watcher.next_pause(self.next_delay()), self.left
        if time_left is None or time_left[2] <= 0:
            return delay
        # Not less than a clock of seconds since the epoch can show: the look must not fall just before the end.
        return min(delay, max(time_left[2], 0.001))

    async def take(self, status: CrewStatus) -> bool:
        """Take a good answer in; True if the run has ended. First its end, then the clock."""
        self.failing_for, self.failed_at = 0.0, None
        if status.state is CrewState.UNKNOWN:
            self.unknown += 1
            # Right after the kickoff a run may not be visible yet. Later a second look is worth more than the clock:
            # one answer of a load balancer between two releases proves nothing.
            if self.seen is not None or self.now() - self.phases.kicked_off_at >= self.policy.grace:
                if self.unknown >= 2:
                    raise CrewLostError(**self.names, last_state=self.last)
                return False
        else:
            self.unknown = 0
            if self.seen is not None and status.state is not self.seen:
                self.begin_anew()
            self.seen = status.state
            waits = self.seen is CrewState.WAITING
            if waits is not self.waits:
                self.waits = waits
                count_waiting(self.names["crew"], 1 if waits else -1)
            if self.phases.see(self.seen, self.now()) and not self.seen.ended:
                await self.watcher.on_human_wait(self.phases)
            await self.watcher.on_status(status)
            if self.seen.ended:
                return True
        time_left = self.left
        if time_left is not None and time_left[2] <= 0:
            more = await self.watcher.more_time() if time_left[0] == "human" else 0.0
            self.phases.human_extra += more
            if more <= 0:
                raise await self.timed_out(time_left)
        return False

    async def failed(self, error: CrewError) -> None:
        """Raise if there has been no answer for too long."""
        moment, time_left = self.now(), self.left
        # Without an answer nobody knows whether the run has ended: a budget that is over gets this much longer, and so
        # does a wait that begins after it was over, as after a restart.
        if time_left is not None and min(-time_left[2], moment - self.began) >= self.policy.error_timeout:
            raise await self.timed_out(time_left) from error
        if isinstance(error, RateLimitedError):
            self.failed_at = None
        else:
            if self.failed_at is not None:
                # A laptop that slept in between did not ask anybody.
                self.failing_for += min(moment - self.failed_at, self.paused + LOOK)
            self.failed_at = moment
        await self.watcher.on_error(error)
        if self.failing_for >= self.policy.error_timeout:
            raise error

    async def timed_out(self, time_left: tuple[str, float, float]) -> CrewTimeoutError:
        phase, limit, _ = time_left
        stopped = await self.watcher.stop(phase)
        return CrewTimeoutError(**self.names, phase=phase, limit=limit, last_state=self.last, stopped=stopped)

    @property
    def last(self) -> str | None:
        return None if self.seen is None else str(self.seen)
