"""The pace of a batch: its kickoffs at once, the pauses that the server asks for, and its stop."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.client._client import CrewClient
from prefect_crew.client._transport import Answer, Call
from prefect_crew.crew import RETRY_AFTER_CAP, Crew
from prefect_crew.exceptions import CrewAPIError, CrewError

REFUSED_PAUSE = 5.0
"""Seconds from a refused kickoff to the next one. The end of a run ends this pause."""
GIVE_UP_AFTER = 600.0
"""Seconds without an accepted kickoff, and with nothing in flight, after which refusals stop a batch."""
WARN_EVERY = 60.0
"""Seconds between two warnings about refused kickoffs: a full server or budget refuses one at the end of each run."""
REQUESTS_AT_ONCE = 256
"""Status calls at a time, and likewise stops: where answers take 0.2 s, 256 are 1,280 polls a second."""


class Throttle:
    """Decides when a batch kicks off its next run. A batch has one throttle in a process, on one event loop.

    - At most `kickoffs_at_once` kickoffs are under way.
    - At first, and after a refused kickoff, one row is tried. Each accepted kickoff doubles the number, up to
      `kickoffs_at_once`. So a server that is down, and a budget that is full, get few kickoffs.
    - After a refused kickoff the batch pauses for the time that the server names (`Retry-After`), or for 5 seconds. The
      end of a run ends such 5 seconds early, since a server or a budget that was full then has room. After 10 minutes
      of refusals with nothing in flight the batch stops.
    - After `breaker` failed rows in a row the batch stops.

    Attributes:
        stopped: The reason why the batch kicks off no more runs; None while it does.
        under_way: Kickoffs under way.
        in_flight: Runs in flight.
    """

    def __init__(self, options: BatchOptions) -> None:
        self.stopped: str | None = None
        self.under_way = self.in_flight = 0
        self._options = options
        self._not_before = self._paused_until = 0.0
        self._at_once = 1
        self._refused_since: float | None = None
        self._warn_after = 0.0
        self._failed_in_a_row = 0
        self._queue = asyncio.Lock()
        self._changed = asyncio.Event()

    async def admit(self) -> bool:
        """Wait until the run of a row may be kicked off, first come, first served.

        Return True, after which the caller has to call `leave`, or False if the batch kicks off nothing more.
        """
        async with self._queue:
            while self.stopped is None and (seconds := self._seconds_to_wait()) > 0:
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if seconds == math.inf else seconds):
                        await self._changed.wait()
            if self.stopped is not None:
                return False
            self.under_way += 1
            return True

    def _seconds_to_wait(self) -> float:
        """Return the seconds until the next kickoff, infinity if the wait lasts until something changes."""
        if self.under_way >= self._at_once:
            return math.inf
        return max(self._not_before, self._paused_until) - asyncio.get_running_loop().time()

    def leave(self) -> None:
        """Note that an admitted kickoff has its id, or started nothing."""
        self.under_way -= 1
        self._changed.set()

    async def idle(self) -> None:
        """Wait until no kickoff is under way."""
        while self.under_way:
            self._changed.clear()
            await self._changed.wait()

    def stop(self, reason: str) -> None:
        """Kick off nothing more. The first reason stays."""
        if self.stopped is None:
            self.stopped = reason
            run_logger().warning("Nothing more is kicked off: %s", reason)
            self._changed.set()

    # The answers of the server.

    def accepted(self) -> None:
        """Note that a kickoff was accepted."""
        self._refused_since, self._paused_until = None, 0.0
        self._at_once = min(2 * self._at_once, self._options.kickoffs_at_once)

    def refused(self, error: CrewError) -> None:
        """Note that a kickoff surely started no run and may be sent again."""
        now = asyncio.get_running_loop().time()
        if self._refused_since is None and now >= self._warn_after:
            self._warn_after = now + WARN_EVERY
            run_logger().warning("%s The batch pauses and tries again.", error)
        if self._refused_since is None or self.in_flight:
            self._refused_since = now
        elif now - self._refused_since >= GIVE_UP_AFTER:
            self.stop(f"no kickoff was accepted for {GIVE_UP_AFTER / 60:.0f} minutes. Last error: {error}")
        self._paused_until, self._at_once = now + REFUSED_PAUSE, 1
        if isinstance(error, CrewAPIError) and error.retry_after is not None:
            self._not_before = max(self._not_before, now + min(error.retry_after, RETRY_AFTER_CAP))

    # How rows end.

    def wait_for(self, in_flight: int) -> None:
        """Note how many runs are in flight. If one has ended, a server or a budget that was full has room again."""
        if in_flight < self.in_flight:
            self._paused_until = 0.0
            self._changed.set()
        self.in_flight = in_flight

    def completed(self) -> None:
        """Note that a run completed."""
        self._failed_in_a_row = 0

    def failed(self, why: str) -> None:
        """Note that a row's run failed, or that the row has no run."""
        self._failed_in_a_row += 1
        if self._options.breaker is not None and self._failed_in_a_row >= self._options.breaker:
            self.stop(f"{self._failed_in_a_row} rows failed in a row. Last error: {why}")


class BatchClient(CrewClient):
    """A crew client with a limit on its requests at a time, so that thousands of polls need few connections."""

    def __init__(self, crew: Crew, kickoffs_at_once: int) -> None:
        super().__init__(
            crew.url,
            crew.token,
            request_timeout=crew.request_timeout,
            allow_http=crew.allow_http,
            flow=crew.flow,
        )
        at_once = max(REQUESTS_AT_ONCE, kickoffs_at_once)
        self._gates = {"GET": asyncio.Semaphore(REQUESTS_AT_ONCE), "POST": asyncio.Semaphore(at_once)}

    async def _send(self, call: Call) -> Answer:
        async with self._gates[call.method]:
            return await super()._send(call)
