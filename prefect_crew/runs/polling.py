"""The loop that waits for a run: how often to look, and until when. Without Prefect or HTTP."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

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
from prefect_crew.states import CrewState

NO_ANSWER = (CrewConnectionError, ResponseFormatError, CrewAPIError)
"""What a look that tells nothing about the run raises."""


def poll_delays(policy: WaitPolicy, rng: Callable[[], float] = random.random) -> Iterator[float]:
    """Yield the pauses between looks, in seconds, without end. `rng` gives numbers in [0, 1)."""
    delay = policy.initial
    while True:
        yield delay * (1 + policy.jitter * (2 * rng() - 1))
        delay = min(delay * policy.factor, policy.max_interval)


@dataclass
class Phases:
    """When the phases of a run began, in seconds since the epoch. What a record keeps lets it survive a restart.

    `human_seconds` is the time that people have taken so far; `human_since` is set while one is being waited for.
    """

    kicked_off_at: float
    human_seconds: float = 0.0
    human_since: float | None = None
    human_extra: float = 0.0
    """Seconds that people have got beyond the budget."""

    def see(self, state: CrewState, now: float) -> bool:
        """Note the state seen at `now`; True if a person's turn began or ended with it."""
        if state is CrewState.WAITING:
            if self.human_since is None:
                self.human_since = now
                return True
            return False
        if self.human_since is not None:
            self.human_seconds += max(0.0, now - self.human_since)
            self.human_since = None
            return True
        return False

    def human_time(self, now: float) -> float:
        """Return the seconds that people have had, with the turn that is under way."""
        return self.human_seconds + (max(0.0, now - self.human_since) if self.human_since is not None else 0.0)

    def left(self, policy: WaitPolicy, state: CrewState, now: float) -> tuple[str, float, float] | None:
        """Return the phase whose budget ends first, that budget and the seconds left of it; None without a limit."""
        if state is CrewState.WAITING:
            limit = policy.human_timeout
            return None if limit is None else ("human", limit, limit + self.human_extra - self.human_time(now))
        budgets: list[tuple[str, float, float]] = []
        if policy.timeout is not None:
            spent = now - self.kicked_off_at - self.human_time(now)
            phase = "running" if state is CrewState.RUNNING else "pending"
            budgets.append((phase, policy.timeout, policy.timeout - spent))
        if policy.pending_timeout is not None and state is CrewState.PENDING:
            budgets.append(("pending", policy.pending_timeout, policy.pending_timeout - (now - self.kicked_off_at)))
        return min(budgets, key=lambda budget: budget[2], default=None)


class Watcher(Protocol):
    """What is told while a run is waited for. None of it may end the wait; errors in it are the watcher's to handle."""

    async def saw(self, status: CrewStatus) -> None:
        """Each good answer, also the last one, in order."""
        ...

    async def person_turn(self, phases: Phases) -> None:
        """A person's turn began (`human_since` is set) or ended: what a restart needs to know has changed."""
        ...

    async def trouble(self, error: CrewError, seconds: float) -> None:
        """A look failed; since the last good answer, failures have cost that many seconds. A 429 costs none."""
        ...

    async def refused(self, error: AuthenticationError) -> bool:
        """The token was refused. True: there is a new one, look again. False: end the wait."""
        ...


async def wait_until_ended(
    look: Callable[[], Awaitable[CrewStatus]],
    *,
    kickoff_id: str,
    policy: WaitPolicy,
    phases: Phases,
    watcher: Watcher,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    stretch: Callable[[float], float] | None = None,
    more_time: Callable[[], Awaitable[float]] | None = None,
    now: Callable[[], float] = time.time,
    first_look: bool = False,
    rng: Callable[[], float] = random.random,
) -> CrewStatus:
    """Look at a run until it has ended and return its last status, whichever end that is.

    An error while looking says nothing about the run: it is told to the watcher and costs from `error_timeout`; a 429
    costs nothing, and its `Retry-After` is obeyed. Whether the run has ended is looked at before the clock: the time
    budgets are checked only after a good answer.

    Args:
        look: Makes one status call.
        kickoff_id: The run, for the errors.
        policy: How to wait.
        phases: When the run was kicked off, and what people have taken so far. It is changed as the wait goes on.
        watcher: Is told what is seen.
        pause: Sleeps for some seconds; may return early when something has happened.
        stretch: Makes a pause longer where `pause` is sure to end early, or shorter; a budget still cuts it.
        more_time: Is asked when people's time is over, and returns how many more seconds they get; 0 ends the wait.
        now: The clock that `phases` is in, in seconds.
        first_look: Look at once instead of after `initial` seconds: for a run that was kicked off some time ago.
        rng: Numbers in [0, 1) for the jitter.

    Raises:
        CrewTimeoutError: A budget of the policy is over. The run may go on.
        CrewLostError: The server does not know the run, after the grace.
        AuthenticationError: The token was refused and there is no other.
        CrewError: No look succeeded for `error_timeout` seconds: the last look's error.
    """
    wait = _Wait(kickoff_id, policy, phases, watcher, now, rng, stretch, more_time)
    if not first_look:
        await pause(wait.first_pause())
    while True:
        at_least = 0.0
        try:
            status = await look()
        except AuthenticationError as error:
            if not await watcher.refused(error):
                raise
            continue
        except NO_ANSWER as error:
            at_least = min(getattr(error, "retry_after", None) or 0.0, RETRY_AFTER_CAP)
            await wait.failed_to_look(error)
            await pause(max(wait.next_delay(), at_least))
            continue
        if await wait.take(status):
            return status
        await pause(wait.next_pause())


class _Wait:
    """The state of one `wait_until_ended`, between its looks."""

    def __init__(
        self,
        kickoff_id: str,
        policy: WaitPolicy,
        phases: Phases,
        watcher: Watcher,
        now: Callable[[], float],
        rng: Callable[[], float],
        stretch: Callable[[float], float] | None,
        more_time: Callable[[], Awaitable[float]] | None,
    ) -> None:
        self.stretch = stretch
        self.more_time = more_time
        self.kickoff_id = kickoff_id
        self.policy = policy
        self.phases = phases
        self.watcher = watcher
        self.now = now
        self.rng = rng
        self.delays = poll_delays(policy, rng)
        self.began = now()
        self.seen: CrewState | None = None
        self.trouble = 0.0
        self.troubled_at: float | None = None
        self.unknown = 0

    @property
    def left(self) -> tuple[str, float, float] | None:
        return self.phases.left(self.policy, self.seen or CrewState.PENDING, self.now())

    def next_delay(self) -> float:
        return min([next(self.delays), *fast_intervals])

    def next_pause(self) -> float:
        """Cut the next delay to the end of the budget that ends first: the last look falls on it, not after it."""
        delay, left = self.next_delay(), self.left
        if self.stretch is not None:
            delay = self.stretch(delay)
        if left is None or left[2] <= 0:
            return delay
        # Not less than a clock of seconds since the epoch can show: the look must not fall just before the end.
        return min(delay, max(left[2], 0.001))

    def first_pause(self) -> float:
        """Count the first delay from the kickoff: what was written down since is no reason to look later."""
        since = self.now() - self.phases.kicked_off_at
        return max(0.0, self.next_pause() - max(0.0, since))

    async def take(self, status: CrewStatus) -> bool:
        """Take a good answer in; True if the run has ended. First its end, then the clock."""
        self.trouble, self.troubled_at = 0.0, None
        if status.state is CrewState.UNKNOWN:
            self._check_lost()
        else:
            self.unknown = 0
            if self.seen is not None and status.state is not self.seen:
                self.delays = poll_delays(self.policy, self.rng)
            self.seen = status.state
            if self.phases.see(self.seen, self.now()) and not self.seen.ended:
                await self.watcher.person_turn(self.phases)
            await self.watcher.saw(status)
            if self.seen.ended:
                return True
        if self.unknown and not self._in_grace:
            return False  # the second look tells whether it is lost, which is worth more than what the clock says
        left = self.left
        if left is not None and left[2] <= 0 and not await self._given_more(left):
            raise self._timed_out(left)
        return False

    async def _given_more(self, left: tuple[str, float, float]) -> bool:
        if left[0] != "human" or self.more_time is None:
            return False
        more = await self.more_time()
        self.phases.human_extra += more
        return more > 0

    async def failed_to_look(self, error: CrewError) -> None:
        """Raise if there has been no answer for too long."""
        moment, left = self.now(), self.left
        # Without an answer nobody knows whether the run has ended: a budget that is over gets this much longer, and so
        # does a wait that begins after it was over, as after a restart.
        if left is not None and min(-left[2], moment - self.began) >= self.policy.error_timeout:
            raise self._timed_out(left) from error
        if isinstance(error, RateLimitedError):
            self.troubled_at = None
        else:
            if self.troubled_at is not None:
                self.trouble += moment - self.troubled_at
            self.troubled_at = moment
        await self.watcher.trouble(error, self.trouble)
        if self.trouble >= self.policy.error_timeout:
            raise error

    def _check_lost(self) -> None:
        """Raise CrewLostError if a run that the server does not know is beyond hope.

        Right after the kickoff it may not be visible yet. Later it is given a second look, since one answer of a load
        balancer between two releases is no proof.
        """
        self.unknown += 1
        if self.unknown >= 2 and not self._in_grace:
            raise CrewLostError(kickoff_id=self.kickoff_id, last_state=self._last)

    @property
    def _in_grace(self) -> bool:
        return self.seen is None and self.now() - self.phases.kicked_off_at < self.policy.grace

    def _timed_out(self, left: tuple[str, float, float]) -> CrewTimeoutError:
        phase, budget, _ = left
        return CrewTimeoutError(kickoff_id=self.kickoff_id, phase=phase, budget=budget, last_state=self._last)

    @property
    def _last(self) -> str | None:
        return None if self.seen is None else str(self.seen)
