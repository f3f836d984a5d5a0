"""The loop that polls a run: the pauses between status calls, and the time limits."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

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
from prefect_crew.store.decision import Attempt

LOOK = 60.0
"""Seconds of one failed status call that count towards `error_timeout`, at most."""
NO_ANSWER = (CrewConnectionError, ResponseFormatError, CrewAPIError)
"""The errors of a status call that say nothing about the run."""


def poll_delays(
    policy: WaitPolicy, rng: Callable[[], float] = random.random, *, again: bool = False
) -> Iterator[float]:
    """Yield the pauses between status calls, in seconds, without end.

    `rng` returns numbers in [0, 1). `again`: the pauses restart, and the first is `initial` or `max_interval`,
    whichever is shorter. Within `fast_polling` no pause is longer than its interval.
    """
    delay = min(policy.initial, policy.max_interval) if again else policy.initial
    while True:
        yield min([delay * (1 + policy.jitter * (2 * rng() - 1)), *fast_intervals])
        delay = min(delay * policy.factor, policy.max_interval)


@dataclass
class Phases:
    """The times at which the phases of a run began, in seconds since the epoch, and the seconds that people have taken.

    `human_since` is set while the run waits for a person. `human_extra` are the seconds that people got beyond the
    budget.
    """

    kicked_off_at: float
    human_seconds: float = 0.0
    human_since: float | None = None
    human_extra: float = 0.0

    @classmethod
    def of(cls, attempt: Attempt | None) -> Phases:
        """Return the phases of an attempt, so that they survive a restart. Without one, the run begins now."""
        if attempt is None or attempt.started_at is None:
            return cls(time.time())
        return cls(attempt.started_at, attempt.human_seconds, attempt.human_since)

    def see(self, state: CrewState, now: float) -> bool:
        """Note the state of a status at `now`. Return True if a wait for a person began or ended."""
        waits, waited = state is CrewState.WAITING, self.human_since is not None
        if waits and not waited:
            self.human_since = now
        elif waited and not waits:
            self.human_seconds, self.human_since = self.human_time(now), None
        return waits != waited

    def human_time(self, now: float) -> float:
        """Return the seconds that people have had, including the current wait for a person."""
        return self.human_seconds + (0.0 if self.human_since is None else max(0.0, now - self.human_since))


class Watcher:
    """The methods that `poll` calls. An error of one of them ends the wait."""

    async def on_status(self, status: CrewStatus) -> bool:
        """Handle a status: each one in order, including the last. Return True if somebody has sent an answer since the
        last one: the pauses then restart with `initial`."""
        del status
        return False

    async def on_human_wait(self, phases: Phases) -> None:
        """Handle that a wait for a person began (`human_since` is set) or ended (it is None), for a later process."""

    async def on_error(self, error: CrewError) -> None:
        """Handle the error of a status call, or that the server knows a run no more that was alive. It is polled on."""

    async def pause(self, seconds: float) -> bool:
        """Wait for some seconds, or until there is news. Return True for news: the pauses restart with `initial`."""
        await asyncio.sleep(seconds)
        return False

    def next_pause(self, delay: float) -> float:
        """Return the next pause. A watcher may change `delay`, the pause by the policy; a time limit may shorten it."""
        return delay

    async def more_time(self) -> float:
        """Return the extra seconds for people after their time is over; 0 ends the wait."""
        return 0.0

    async def stop(self, phase: str) -> bool:
        """Do as the policy says after the time limit of a phase. Return True if the crew was stopped."""
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
    was_alive: bool = False,
    now: Callable[[], float] = time.time,
    rng: Callable[[], float] = random.random,
) -> CrewStatus:
    """Poll a run until it has ended, and return its last status: completed, failed or stopped.

    A failed status call says nothing about the run, but the seconds from one failed call to the next count towards
    `error_timeout`. A 429 does not count, and `poll` obeys its `Retry-After`. `poll` checks the time limits after a
    successful status call, so that a run that has ended does not time out. While calls fail, or are answered with 429,
    each limit is `error_timeout` longer. While the server no longer knows the run, only `lost_after` counts.

    Args:
        look: Makes one status call.
        kickoff_id, crew, idempotency_key: The run, for the errors.
        policy, watcher: The policy, and the receiver of statuses and errors.
        phases: The time of the kickoff, and the seconds that people have taken, to which `poll` adds.
        first_look: Make the first status call at once instead of after `initial` seconds: for a run that was kicked off
            some time ago.
        was_alive: Whether the server has known the run: an unknown run is then polled for `policy.lost_after` seconds,
            since a hosted crew that waits for a person looks the same. Else for `policy.grace` from the kickoff.
        now, rng: The clock of `phases`, in seconds, and numbers in [0, 1) for the jitter.

    Raises:
        CrewTimeoutError: A time limit of the policy is over. The run may go on.
        CrewLostError: The server does not know the run any more, or still does not know it.
        AuthenticationError: The server refused the token.
        CrewError: No status call succeeded for `error_timeout` seconds. This is the last call's error.
    """
    names: dict[str, Any] = {"kickoff_id": kickoff_id, "crew": crew, "idempotency_key": idempotency_key}
    state = _Poll(
        names, policy, phases, watcher, now, rng, began=now(), delays=poll_delays(policy, rng), was_alive=was_alive
    )
    if not first_look:
        # Counted from the kickoff: the time for writing the attempt must not delay the first status call.
        await state.pause(max(0.0, state.next_pause() - max(0.0, now() - phases.kicked_off_at)))
    while True:
        try:
            status = await look()
        except AuthenticationError:
            raise
        except NO_ANSWER as error:
            await state.failed(error)
            least = min(getattr(error, "retry_after", None) or 0.0, RETRY_AFTER_CAP)
            await state.pause(max(next(state.delays), least))
            continue
        if await state.take(status):
            return status
        await state.pause(state.next_pause())


@dataclass
class _Poll:
    """The state of one `poll` between its status calls."""

    names: dict[str, Any]
    policy: WaitPolicy
    phases: Phases
    watcher: Watcher
    now: Callable[[], float]
    rng: Callable[[], float]
    began: float
    delays: Iterator[float]
    was_alive: bool
    seen: CrewState | None = None
    unknown_since: float | None = None
    failing_for: float = 0.0
    """Seconds of failed status calls since the last successful one."""
    failed_at: float | None = None
    paused: float = 0.0
    """The planned seconds of the last pause."""

    def begin_anew(self) -> None:
        """Restart the pauses with `initial`."""
        self.delays = poll_delays(self.policy, self.rng, again=True)

    async def pause(self, seconds: float) -> None:
        """Pause before the next status call."""
        self.paused = seconds
        if await self.watcher.pause(seconds):
            self.begin_anew()

    @property
    def left(self) -> tuple[str, float, float] | None:
        """The phase whose time limit ends first, that limit and its remaining seconds; None without a limit."""
        policy, state, now = self.policy, self.seen or CrewState.PENDING, self.now()
        human, since = self.phases.human_time(now), now - self.phases.kicked_off_at
        if state is CrewState.WAITING:
            limit = policy.human_timeout
            return None if limit is None else ("human", limit, limit + self.phases.human_extra - human)
        limits: list[tuple[str, float, float]] = []
        if policy.timeout is not None:
            phase = "running" if state is CrewState.RUNNING else "pending"
            limits.append((phase, policy.timeout, policy.timeout - (since - human)))
        if policy.pending_timeout is not None and state is CrewState.PENDING:
            limits.append(("pending", policy.pending_timeout, policy.pending_timeout - since))
        return min(limits, key=lambda limit: limit[2], default=None)

    def next_pause(self) -> float:
        """Shorten the next pause so that the last status call happens exactly when the first time limit ends."""
        delay, time_left = self.watcher.next_pause(next(self.delays)), self.left
        if time_left is None or time_left[2] <= 0:
            return delay
        # At least 1 ms, since the clock is not finer: the status call must not happen just before the end.
        return min(delay, max(time_left[2], 0.001))

    async def take(self, status: CrewStatus) -> bool:
        """Handle a status. Return True if the run has ended. Check its end first, then the clock."""
        self.failing_for, self.failed_at = 0.0, None
        if status.state is CrewState.UNKNOWN:
            if await self.take_unknown():
                return False
        else:
            self.unknown_since, self.was_alive = None, True
            if self.seen is not None and status.state is not self.seen:
                self.begin_anew()
            self.seen = status.state
            if self.phases.see(self.seen, self.now()) and not self.seen.ended:
                await self.watcher.on_human_wait(self.phases)
            if await self.watcher.on_status(status):
                self.begin_anew()
            if self.seen.ended:
                return True
        if (time_left := self.left) is not None and time_left[2] <= 0:
            more = await self.watcher.more_time() if time_left[0] == "human" else 0.0
            self.phases.human_extra += more
            if more <= 0:
                raise await self.timed_out(time_left)
        return False

    async def take_unknown(self) -> bool:
        """Handle that the server does not know the run. Return whether no other time limit counts meanwhile: it may
        wait for a person."""
        # One answer proves nothing, since it may come from an old server during a release.
        is_first, since, limit = self.unknown_since is None, self.unknown_since or self.now(), self.policy.lost_after
        self.unknown_since = since
        if not self.was_alive:  # right after the kickoff a run may not be visible yet
            since, limit = self.phases.kicked_off_at, self.policy.grace
        elif is_first:
            unknown = "is not known to its server now. A hosted crew that waits for a person looks the same."
            await self.watcher.on_error(CrewError(f"Run {self.names['kickoff_id']} {unknown}"))
        is_over = self.now() - since >= limit
        if is_over and not is_first:
            raise CrewLostError(**self.names, last_state=None if self.seen is None else str(self.seen))
        return is_over or self.was_alive

    async def failed(self, error: CrewError) -> None:
        """Handle the error of a status call. Raise if no status call has succeeded for too long."""
        moment, time_left = self.now(), self.left
        # Without an answer nobody knows whether the run has ended: so a time limit is extended by `error_timeout`. A
        # wait that begins after the limit, for example after a restart, gets the same time.
        if time_left is not None and min(-time_left[2], moment - self.began) >= self.policy.error_timeout:
            raise await self.timed_out(time_left) from error
        if isinstance(error, RateLimitedError):
            self.failed_at = None
        else:
            if self.failed_at is not None:
                # While a laptop sleeps, it makes no status calls: that time does not count.
                self.failing_for += min(moment - self.failed_at, self.paused + LOOK)
            self.failed_at = moment
        await self.watcher.on_error(error)
        if self.failing_for >= self.policy.error_timeout:
            raise error

    async def timed_out(self, time_left: tuple[str, float, float]) -> CrewTimeoutError:
        phase, limit, _ = time_left
        stopped, last = await self.watcher.stop(phase), None if self.seen is None else str(self.seen)
        return CrewTimeoutError(**self.names, phase=phase, limit=limit, last_state=last, stopped=stopped)
