"""How fast a batch starts runs: its rate, what the server asks for, and pauses while kickoffs or rows fail."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.batches.options import BatchOptions
from prefect_crew.client._client import CrewClient
from prefect_crew.client._transport import Answer, Call, Connections, PoolLane, poll_lane
from prefect_crew.crew import RETRY_AFTER_CAP, Crew
from prefect_crew.exceptions import ConfigurationError, CrewError, RateLimitedError, ServerError
from prefect_crew.runs.limits import SlotPool

POLLS_AT_ONCE = 256
"""Status calls at a time. They cost nothing but time: where answers take 0.2 s, 256 are 1,280 polls a second."""
FEWEST_KICKOFFS, MOST_KICKOFFS = 16, 256
"""Kickoffs under way at a time, where nobody says how many. They bound the rows that a crash leaves uncertain."""
KICKOFFS_A_SECOND, NEAR = 1250.0, 0.02
"""What that number aims at, and the seconds of an answer that do not count: a server that is near may take them."""
TRIALS = 3
"""Rows that are tried, one after another, before failures in a row stop a batch."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two kickoffs while the server refuses them."""
GIVE_UP_AFTER = 600.0
"""Seconds without an accepted kickoff after which refusals stop a batch."""


class Backoff:
    """Pauses that double from one failure to the next, until something succeeds. `until` is in the loop's time."""

    def __init__(self, first: float, longest: float = math.inf) -> None:
        self._first = first
        self._longest = longest
        self.reset()

    def reset(self) -> None:
        """Begin anew: something succeeded."""
        self.count, self.seconds, self.until = 0, 0.0, 0.0

    def pause(self) -> None:
        """Begin the next pause."""
        self.count += 1
        self.seconds = min(2 * self.seconds or self._first, self._longest)
        self.until = asyncio.get_running_loop().time() + self.seconds


class Throttle:
    """Decides when the next run of a batch is kicked off. One for a batch in one process, on one event loop.

    - Until a kickoff was accepted, and again once one was refused, they go one by one: a wrong token or a server that
      is away costs one row's time. Pauses between refused ones double; after 10 minutes of them the batch stops. While
      runs are in flight these minutes do not count: the server, or a budget, is full, and has room at the end of one.
    - A row takes a slot of the crew's limit, where it has one.
    - After `breaker` failed rows in a row there is a pause; then one row is tried, whose end is waited for. If that
      fails the next pause is twice as long. After three that failed the batch stops.

    Attributes:
        stopped: Why no more runs are kicked off; None as long as they are.
        kickoffs: How many were, or may have been, kicked off by all calls.
        under_way: How many are under way.
        in_flight: How many runs are waited for.
        slots: The slots of the crew's limit, None if it has none.
        waits_for_slot: Whether the next row waits for a slot of the crew's limit.
    """

    def __init__(self, options: BatchOptions) -> None:
        self.stopped: str | None = None
        self.kickoffs = 0
        self.under_way = self.in_flight = 0
        self.waits_for_slot = self._has_waited = False
        self.slots: SlotPool | None = None
        self._options = options
        self._fastest = math.inf
        self._interval = 0.0 if options.kickoffs_per_second is None else 1.0 / options.kickoffs_per_second
        self._next_kickoff = self._not_before = 0.0
        self._one_by_one = True
        self._refusals = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._refused_since: float | None = None
        self._failures = Backoff(options.breaker_pause)
        self._failed_in_a_row = 0
        self._trial: str | None = None
        self._queue = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def kickoffs_at_once(self) -> int:
        """How many kickoffs may be under way at a time: more where answers take long, unless somebody says how many."""
        if self._options.kickoffs_at_once is not None:
            return self._options.kickoffs_at_once
        number = FEWEST_KICKOFFS if self._fastest == math.inf else round(KICKOFFS_A_SECOND * (self._fastest - NEAR))
        return min(MOST_KICKOFFS, max(FEWEST_KICKOFFS, number))

    def answered(self, seconds: float) -> None:
        """Note how long the answer to a kickoff took. The fastest counts: a busy server is not sent more."""
        self._fastest = min(self._fastest, seconds)

    async def admit(self, row: str) -> bool:
        """Wait until the run of a row may be kicked off, first come, first served. After True, `leave` has to follow.

        False: nothing is kicked off any more.
        """
        async with self._queue:
            try:
                while self.stopped is None:
                    if (seconds := self._seconds_to_wait()) <= 0:
                        if await self._has_slot(row):
                            break
                        seconds = SlotPool.pause()
                    self._changed.clear()
                    await _wait(self._changed, seconds)
            finally:
                self.waits_for_slot = False
            if self.stopped is not None:
                return False
            self.under_way += 1
            now, next_one = asyncio.get_running_loop().time(), self._next_kickoff
            self._next_kickoff = (next_one if now - next_one < self._interval else now) + self._interval
            if self._failures.count:
                self._trial = row
            return True

    async def _has_slot(self, row: str) -> bool:
        """Return whether a row has a slot of the crew's limit, and may be kicked off now."""
        if self.slots is None:
            return True
        try:
            has_slot = await self.slots.take(row)
        except ConfigurationError as error:
            self.stop(str(error))
            return False
        except PREFECT_ERRORS as error:
            run_logger().debug("The Prefect server could not be asked for a slot: %s", error)
            has_slot = False
        if not has_slot and not self._has_waited:
            self._has_waited = True
            run_logger().info("The batch waits for a slot of the crew's concurrency limit.")
        self.waits_for_slot = not has_slot
        # Others may have stopped the batch, or have had it wait, in the meantime.
        may_go = has_slot and self.stopped is None and self._seconds_to_wait() <= 0
        if not may_go:
            self.slots.give_back(row)  # others need it while the batch waits
        return may_go

    def _seconds_to_wait(self) -> float:
        """Return how long the next kickoff has to wait; infinity: until something changes."""
        most = 1 if self._one_by_one else self.kickoffs_at_once
        if (limit := self._options.max_kickoffs) is not None:
            if self.kickoffs >= limit:
                self.stop(f"the limit of {limit} kickoffs is reached.")
                return 0.0
            most = min(most, limit - self.kickoffs)
        if self.under_way >= most or self._trial is not None:
            return math.inf
        until = max(self._not_before, self._next_kickoff, self._refusals.until, self._failures.until)
        return until - asyncio.get_running_loop().time()

    def leave(self) -> None:
        """Say that an admitted kickoff has its id, or came to nothing."""
        self.under_way -= 1
        self._changed.set()

    async def idle(self) -> None:
        """Wait until no kickoff is under way."""
        while self.under_way:
            self._changed.clear()
            await self._changed.wait()

    def stop(self, reason: str) -> None:
        """Let nothing be kicked off any more. The first reason stays."""
        if self.stopped is None:
            self.stopped = reason
            run_logger().warning("Nothing more is kicked off: %s", reason)
            self._changed.set()

    # What the server says.

    @property
    def held_for(self) -> float:
        """Seconds for which the server has asked the batch to stay away from now on; 0 or less if it has not."""
        return self._not_before - asyncio.get_running_loop().time()

    def heed(self, error: CrewError) -> None:
        """Hold everything back where the server asked one request to come back later."""
        if not isinstance(error, RateLimitedError | ServerError) or error.retry_after is None:
            return
        delay = min(error.retry_after, RETRY_AFTER_CAP)
        if delay > 1.0 and self.held_for <= 0:
            run_logger().info("The crew's server asks to wait %.0f s: the whole batch waits.", delay)
        self._not_before = max(self._not_before, asyncio.get_running_loop().time() + delay)

    def accepted(self) -> None:
        """Note that a kickoff was accepted."""
        self.kickoffs += 1
        self._one_by_one, self._refused_since = False, None
        self._refusals.reset()

    def refused(self, error: CrewError) -> None:
        """Note that a kickoff surely did not start a run, and may be sent again."""
        now = asyncio.get_running_loop().time()
        self._one_by_one = True
        if self._refused_since is None:
            run_logger().warning("%s The batch pauses and tries again.", error)
        if self._refused_since is None or self.in_flight:
            self._refused_since = now
        elif now - self._refused_since >= GIVE_UP_AFTER:
            self.stop(f"no kickoff was accepted for {GIVE_UP_AFTER / 60:.0f} minutes. Last error: {error}")
        if now >= self._refusals.until:
            self._refusals.pause()

    # How rows end.

    def wait_for(self, in_flight: int) -> None:
        """Note how many runs are in flight. Where one has ended, a server or a budget that was full has room."""
        if in_flight < self.in_flight:
            self._refusals.until = 0.0
            self._changed.set()
        self.in_flight = in_flight

    def completed(self) -> None:
        """Note that a run completed."""
        self._failed_in_a_row, self._trial = 0, None
        if self._failures.count:
            self._failures.reset()
            run_logger().info("A row has completed: the batch continues.")
            self._changed.set()

    def failed(self, row: str, why: str) -> None:
        """Note that a row's run failed, or that it has none."""
        self._failed_in_a_row += 1
        breaker = self._options.breaker
        if breaker is None or self._failed_in_a_row < breaker or (self._failures.count and self._trial != row):
            return  # it may have been in flight when the pause began
        if self._failures.count >= TRIALS:
            self.stop(f"{self._failed_in_a_row} rows failed in a row. Last error: {why}")
        else:
            self._failures.pause()
            run_logger().warning(
                "%d rows failed in a row. Last error: %s The batch pauses for %.0f s, then tries one row.",
                *(self._failed_in_a_row, why if why.endswith(".") else f"{why}.", self._failures.seconds),
            )
        self._trial = None
        self._changed.set()

    def left(self, row: str) -> None:
        """Note that a row has ended, or is left: its slot is free, and if it was tried, another one is."""
        if self.slots is not None:
            self.slots.give_back(row)
            self._changed.set()
        if self._trial == row:
            self._trial = None
            self._changed.set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(None if seconds == math.inf else seconds):
            await event.wait()


class _Lanes:
    """Connections for one request at a time each, those that were used last first; opened when they are needed.

    httpcore looks through all connections of a pool at each request: a kickoff and a poll over one pool for all took
    twice the CPU time.
    """

    def __init__(self, connect: Callable[[], Connections], number: int) -> None:
        self._connect = connect
        self._free: list[Connections] = []
        self._gate = asyncio.Semaphore(number)

    async def exchange(self, call: Call) -> Answer:
        async with self._gate:
            lane = self._free.pop() if self._free else self._connect()
            try:
                return await lane.exchange(call)
            finally:
                self._free.append(lane)

    async def aclose(self) -> None:
        for lane in self._free:
            await lane.aclose()


class BatchClient(CrewClient):
    """A crew client that tells a throttle what the server asks for."""

    def __init__(self, crew: Crew, throttle: Throttle) -> None:
        super().__init__(
            crew.url,
            crew.token,
            request_timeout=crew.request_timeout,
            allow_http=crew.allow_http,
            inputs_as_json=crew.inputs_as_json,
        )
        self._throttle = throttle
        most = max(MOST_KICKOFFS, throttle.kickoffs_at_once)
        own = {"url": self.url, "token": self._token, "timeout": self.request_timeout}
        self._polling = _Lanes(partial(poll_lane, **own), POLLS_AT_ONCE)
        self._posting = _Lanes(partial(PoolLane, **own), most)

    async def __aenter__(self) -> BatchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        for lanes in (self._polling, self._posting):
            await lanes.aclose()

    def _error(self, call: Any, answer: Any, kind: Any = None) -> Any:
        error = super()._error(call, answer, kind)
        self._throttle.heed(error)
        return error

    async def _send(self, call: Call) -> Answer:
        if call.method == "GET":
            if (seconds := self._throttle.held_for) > 0:
                await asyncio.sleep(seconds)
            return await self._polling.exchange(call)
        began = time.monotonic()
        answer = await self._posting.exchange(call)
        if call.path == "/kickoff" and answer.is_success:
            self._throttle.answered(time.monotonic() - began)
        return answer
