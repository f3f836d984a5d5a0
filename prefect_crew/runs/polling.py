"""The wait for the end of a run: the pauses between status calls, the time limits, and how long people take."""

from __future__ import annotations

import asyncio
import random
import shlex
import time
from collections.abc import Iterator
from functools import cached_property

from prefect_crew.artifacts.events import emit
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import RETRY_AFTER_CAP, WaitPolicy, fast_intervals
from prefect_crew.exceptions import (
    AuthenticationError,
    CrewAPIError,
    CrewConnectionError,
    CrewError,
    CrewLostError,
    CrewTimeoutError,
    ResponseFormatError,
)
from prefect_crew.runs.database import find_store, in_store
from prefect_crew.runs.news import Subscription
from prefect_crew.runs.reviews.reviewer import People
from prefect_crew.runs.run import LiveRun, read_status, write_end
from prefect_crew.states import CrewState
from prefect_crew.store import attempts
from prefect_crew.webhooks import UNLIMITED

LOOK = 60.0
"""Seconds of one failed status call that count towards `error_timeout`, at most."""
NO_ANSWER = (CrewConnectionError, ResponseFormatError, CrewAPIError)
"""The errors of a status call that say nothing about the run."""


class Wait:
    """One wait for one run in an open session. A subclass says what to do with each status and each failed call.

    A failed status call says nothing about the run, but the seconds from one failed call to the next count towards
    `error_timeout`. A 429 does not count, and the wait obeys its `Retry-After`. Time limits are checked after a
    successful status call, so that a run that has ended does not time out. While calls fail, or are answered with 429,
    each limit is `error_timeout` longer. While the server no longer knows the run, only `lost_after` counts.

    Args:
        run: The run. Its attempt has the time of the kickoff and of people, so that these survive a restart.
        policy: How to wait.
        is_new: Whether it was kicked off just now: the first status call comes after `initial` seconds, and the server
            may not know the run yet. Else it comes at once.
    """

    def __init__(self, run: LiveRun, policy: WaitPolicy, *, is_new: bool) -> None:
        self.run, self.policy, self.is_new = run, policy, is_new
        self.news: Subscription | None = None
        self.people: People | None = None
        self.first_pause = 0.0
        """Seconds, at least, before the next status call, in place of a shorter pause by the policy."""
        attempt = run.attempt
        started_at = None if attempt is None else attempt.started_at
        self.kicked_off_at = self.now() if started_at is None else started_at
        self.human_seconds = 0.0 if attempt is None else attempt.human_seconds
        self.human_since = None if attempt is None else attempt.human_since
        self._human_extra = 0.0  # seconds that people got beyond their limit
        self._was_alive = attempt is not None and not is_new  # else an unknown run may not be visible yet
        self._seen: CrewState | None = None
        self._unknown_since: float | None = None
        self._failing_for = 0.0  # seconds of failed status calls since the last successful one
        self._failed_at: float | None = None
        self._paused = 0.0

    # What a subclass does

    def now(self) -> float:
        """Return the time of the crew database when this wait began, plus what has passed since: other clocks may
        differ, and somebody may set them."""
        return time.monotonic() + self._ahead

    @cached_property
    def _ahead(self) -> float:
        return find_store().ahead

    async def look(self) -> CrewStatus:
        """Make one status call."""
        return await read_status(self.run)

    async def on_status(self, status: CrewStatus) -> bool:
        """Handle a status: each one in order, including the last. Return True if somebody has sent an answer since the
        last one: the pauses then restart with `initial`."""
        raise NotImplementedError

    async def on_error(self, error: CrewError) -> None:
        """Handle a failed status call, or that the server knows a run no more that was alive. It is polled on."""

    async def end(self, status: CrewStatus) -> None:
        """Write the end of the run."""
        await write_end(self.run, status)

    async def stop(self) -> bool:
        """Stop the crew after a time limit. Return True if its server accepted that."""
        return False

    async def pause(self, seconds: float) -> bool:
        """Wait for some seconds, or until there is news. Return True for news: the pauses restart with `initial`."""
        pause = _sleep if self.news is None else self.news.pause
        return await (pause(seconds) if self.people is None else self.people.pause(pause, seconds))

    async def hold_slot(self, *, is_human: bool | None = None) -> None:
        """Say that this call waits for the run, and whether the run waits for a person: so long it holds its slot."""
        run, limit = self.run, self.policy.human_timeout if is_human else self.policy.timeout
        if run.attempt is not None:
            seconds = UNLIMITED if limit is None else limit
            run.attempt = await in_store(attempts.waited_for, run.attempt, seconds, is_human=is_human) or run.attempt

    # The loop

    async def until_end(self) -> CrewStatus:
        """Poll the run until it has ended, write its end, and return its last status: completed, failed or stopped.

        Raises:
            CrewTimeoutError: A time limit of the policy is over. The run may go on.
            CrewLostError: The server does not know the run any more, or still does not know it.
            AuthenticationError: The server refused the token.
            CrewError: No status call succeeded for `error_timeout` seconds. This is the last call's error.
        """
        began, self._delays = self.now(), poll_delays(self.policy)
        if self.is_new:
            # Counted from the kickoff: the time for writing the attempt must not delay the first status call.
            await self._pause(max(0.0, self._next_pause() - max(0.0, self.now() - self.kicked_off_at)))
        while True:
            try:
                status = await self.look()
            except AuthenticationError:
                raise
            except NO_ANSWER as error:
                await self._take_failure(error, began)
                least = min(getattr(error, "retry_after", None) or 0.0, RETRY_AFTER_CAP)
                await self._pause(max(next(self._delays), least))
                continue
            polled = self.run.current_id
            if await self._take(status):
                if status.usage is None and self.news is not None:
                    status = status.model_copy(update={"usage": self.news.usage})
                if self.run.current_id == polled:
                    await self.end(status)
                if self.run.current_id == polled:
                    return status  # else the run has left this id, and goes on
            await self._pause(self._next_pause())

    def _next_pause(self) -> float:
        """Shorten the next pause so that the last status call happens exactly when the first time limit ends."""
        delay, limit = max(next(self._delays), self.first_pause), self._limit()
        self.first_pause = 0.0
        if self.people is not None:
            delay = self.people.next_pause(delay)
        # At least 1 ms, since the clock is not finer: the status call must not happen just before the end.
        return delay if limit is None or limit[2] <= 0 else min(delay, max(limit[2], 0.001))

    async def _pause(self, seconds: float) -> None:
        self._paused = seconds
        if await self.pause(seconds):
            self._delays = poll_delays(self.policy, again=True)

    def _limit(self) -> tuple[str, float, float] | None:
        """Return the phase whose time limit ends first, that limit and its remaining seconds; None without a limit."""
        policy, now = self.policy, self.now()
        human = self.human_seconds + (0.0 if self.human_since is None else max(0.0, now - self.human_since))
        since, phase = now - self.kicked_off_at, "running" if self._seen is CrewState.RUNNING else "pending"
        if self._seen is CrewState.WAITING:
            limits = [("human", policy.human_timeout, human - self._human_extra)]
        else:
            limits = [(phase, policy.timeout, since - human)]
            if self._seen in (None, CrewState.PENDING):
                limits.append(("pending", policy.pending_timeout, since))
        left = [(name, limit, limit - used) for name, limit, used in limits if limit is not None]
        return min(left, key=lambda each: each[2], default=None)

    async def _take(self, status: CrewStatus) -> bool:
        """Handle a status. Return True if the run has ended. Check its end first, then the clock."""
        self._failing_for, self._failed_at = 0.0, None
        if status.state is CrewState.UNKNOWN:
            if await self._take_unknown():
                return False
        else:
            self._unknown_since, self._was_alive = None, True
            has_changed = self._seen not in (None, status.state)
            self._seen = status.state
            await self._count_human_time(status.state)
            if await self.on_status(status) or has_changed:
                self._delays = poll_delays(self.policy, again=True)
            if status.state.ended:
                return True
        if (limit := self._limit()) is not None and limit[2] <= 0:
            more = await self.people.more_time() if limit[0] == "human" and self.people is not None else 0.0
            self._human_extra += more
            if more <= 0:
                raise await self._timed_out(*limit[:2])
        return False

    async def _count_human_time(self, state: CrewState) -> None:
        waits, now = state is CrewState.WAITING, self.now()
        if waits == (self.human_since is not None):
            return
        if self.human_since is not None:
            self.human_seconds += max(0.0, now - self.human_since)
        self.human_since = now if waits else None
        if not state.ended:
            if not waits and self.run.attempt is not None:
                emit("resumed", self.run.attempt)
            await self.hold_slot(is_human=waits)

    async def _take_unknown(self) -> bool:
        """Handle that the server does not know the run. Return whether no other time limit counts meanwhile: it may
        wait for a person."""
        # One answer proves nothing, since it may come from an old server during a release.
        is_first, since, limit = self._unknown_since is None, self._unknown_since or self.now(), self.policy.lost_after
        self._unknown_since = since
        if not self._was_alive:  # right after the kickoff a run may not be visible yet
            since, limit = self.kicked_off_at, self.policy.grace
        elif is_first:
            unknown = "is not known to its server now. A hosted crew that waits for a person looks the same."
            await self.on_error(CrewError(f"Run {self.run.kickoff_id} {unknown}"))
        is_over = self.now() - since >= limit
        if is_over and not is_first:
            raise CrewLostError(**self.run.names, last_state=None if self._seen is None else str(self._seen))
        return is_over or self._was_alive

    async def _take_failure(self, error: CrewError, began: float) -> None:
        """Handle the error of a status call. Raise if no status call has succeeded for too long."""
        now, limit, most = self.now(), self._limit(), self.policy.error_timeout
        # Without an answer nobody knows whether the run has ended: so a time limit is extended by `error_timeout`. A
        # wait that begins after the limit, for example after a restart, gets the same time.
        if limit is not None and min(-limit[2], now - began) >= most:
            raise await self._timed_out(*limit[:2]) from error
        if isinstance(error, CrewAPIError) and error.status_code == 429:
            self._failed_at = None
        else:
            if self._failed_at is not None:
                # While a laptop sleeps, it makes no status calls: that time does not count.
                self._failing_for += min(now - self._failed_at, self._paused + LOOK)
            self._failed_at = now
        await self.on_error(error)
        if self._failing_for >= most:
            raise error

    async def _timed_out(self, phase: str, limit: float) -> CrewTimeoutError:
        run, last_state = self.run, None if self._seen is None else str(self._seen)
        stopped = self.policy.stops(phase) and await self.stop()
        advice = "Look"
        if (key := run.names["idempotency_key"]) is not None:
            to_do = "start another" if stopped else "go on waiting"
            advice = f"To {to_do}, run again with idempotency key {key!r} and a larger timeout, or look"
        return CrewTimeoutError(
            f"Run {run.kickoff_id} of crew {run.names['crew']} was still {last_state or 'unseen'} after its {phase} "
            f"time limit of {limit:g} s. {'It was stopped' if stopped else 'It was left running'}. {advice}: "
            f"prefect-crew runs inspect {shlex.quote(run.kickoff_id)}.",
            **run.names,
            phase=phase,
            limit=limit,
            last_state=last_state,
            stopped=stopped,
        )


def poll_delays(policy: WaitPolicy, *, again: bool = False) -> Iterator[float]:
    """Yield the pauses between status calls, in seconds, without end.

    `again`: the pauses restart, and the first is `initial` or `max_interval`, whichever is shorter. Within
    `fast_polling` no pause is longer than its interval.
    """
    delay = min(policy.initial, policy.max_interval) if again else policy.initial
    while True:
        yield min([delay * (1 + policy.jitter * random.uniform(-1, 1)), *fast_intervals])  # noqa: S311  no secret
        delay = min(delay * policy.factor, policy.max_interval)


async def _sleep(seconds: float) -> bool:
    await asyncio.sleep(seconds)
    return False
