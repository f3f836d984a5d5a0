"""How fast a batch may go: kickoffs a second, what the server asks for, and a pause when everything fails."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.client._client import CrewClient
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import AuthenticationError, CrewError, RateLimitedError, ServerError

if TYPE_CHECKING:
    from prefect_crew.client.models import CrewStatus
    from prefect_crew.client.webhooks import Webhooks


TRIES = 3
"""Rows that are tried, one after another, before the batch gives up."""


class Breaker:
    """Counts failures in a row over the rows of one batch, on one event loop.

    Args:
        limit: Failures in a row, without one row that completed, after which the batch pauses; None never does.
        pause: Seconds of the first pause; each further one is twice as long.
    """

    def __init__(self, limit: int | None, pause: float) -> None:
        self._limit = limit
        self._pause = pause
        self._in_a_row = 0
        self._tries = 0
        self._until: float | None = None
        self._trying = False
        self._changed = asyncio.Event()

    @property
    def open(self) -> bool:
        """Whether it holds rows back."""
        return self._until is not None

    async def admit(self) -> bool:
        """Wait until one more row may be bought; at once while things go well.

        Returns:
            Whether the row is the one that is tried: what becomes of it is told to `failed` or `not_tried`.
        """
        while self._until is not None:
            left = self._until - asyncio.get_running_loop().time()
            if left <= 0 and not self._trying:
                self._trying = True
                return True
            self._changed.clear()
            if left <= 0:
                await self._changed.wait()
            else:
                await _wait(self._changed, left)
        return False

    def not_tried(self) -> None:
        """Say that the row that was to be tried was not bought after all."""
        self._trying = False
        self._changed.set()

    def worked(self) -> None:
        """Note a row that completed."""
        self._in_a_row = self._tries = 0
        if self._until is not None:
            self._until, self._trying = None, False
            run_logger().info("A row has completed: the batch goes on.")
            self._changed.set()

    def failed(self, why: str, *, tried: bool = False) -> str | None:
        """Note a row that did not; `tried` is what `admit` has said of it.

        Returns:
            Why the batch gives up, None if it does not.
        """
        self._in_a_row += 1
        if self._limit is None or self._in_a_row < self._limit:
            return None
        if self._until is not None and not tried:
            return None  # it was in flight when the breaker opened
        if self._tries >= TRIES:
            return f"{self._in_a_row} rows failed in a row, the last one so: {why}"
        pause = self._pause * 2**self._tries
        self._tries += 1
        self._until, self._trying = asyncio.get_running_loop().time() + pause, False
        self._changed.set()
        run_logger().warning(
            "%d rows failed in a row, the last one so: %s The batch pauses for %.0f s, then tries one.",
            self._in_a_row,
            why if why.endswith(".") else f"{why}.",
            pause,
        )
        return None

    def release(self) -> None:
        """Hold nobody back any more: the batch buys nothing more, and those who wait are to see it."""
        self._until = None
        self._changed.set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


KICKOFFS_AT_ONCE = 16
"""Kickoffs under way at a time. They bound the rows that a crash leaves uncertain, so they are few."""
POLLS_AT_ONCE = 64
"""Status calls at a time. Nothing depends on them but how soon an end is seen: where answers take 0.2 s, 64 are 320
polls a second."""
RETRY_AFTER_CAP = 300.0
REST = 60.0
"""Seconds, at most, between two kickoffs of a batch whose server takes none."""
PATIENCE = 600.0
"""Seconds without one kickoff that was taken after which a batch gives up."""


class Pace:
    """The pace of one batch in one process: shared by all of its rows, on one event loop.

    Until one kickoff has been taken, and again while none is, they go one by one: a wrong token or a server that is
    away costs one row's time, not a thousand's.
    """

    def __init__(self, *, kickoffs_per_second: float | None = None, kickoffs_at_once: int = KICKOFFS_AT_ONCE) -> None:
        self.kickoffs_at_once = kickoffs_at_once
        self._buying = 0
        self._careful = True
        self._free = asyncio.Event()
        self._over = asyncio.Event()
        self._interval = 0.0 if kickoffs_per_second is None else 1.0 / kickoffs_per_second
        self._next_kickoff = 0.0
        self._not_before = 0.0
        self._rest = 0.0
        self._refused_since: float | None = None

    async def enter(self) -> None:
        """Wait for a kickoff's turn. `leave` follows."""
        while True:
            await self._may_go_on()
            if self._over.is_set() or self._buying < (1 if self._careful else self.kickoffs_at_once):
                break
            self._free.clear()
            await self._free.wait()
        self._buying += 1
        try:
            await self._turn()
            await self._may_go_on()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Say that a kickoff has its id, or came to nothing."""
        self._buying -= 1
        self._free.set()

    async def idle(self) -> None:
        """Wait until no kickoff is under way."""
        while self._buying:
            self._free.clear()
            await self._free.wait()

    def close(self) -> None:
        """Let nobody wait for a turn any more: nothing more is bought."""
        self._over.set()
        self._free.set()

    @property
    def held_for(self) -> float:
        """Seconds for which the server has asked the batch to stay away from now on; 0 or less if it has not."""
        return self._not_before - asyncio.get_running_loop().time()

    async def _may_go_on(self) -> None:
        while (left := self.held_for) > 0 and not self._over.is_set():
            await self._sleep(left)

    async def _turn(self) -> None:
        if not self._interval:
            return
        loop = asyncio.get_running_loop()
        turn = max(loop.time(), self._next_kickoff)
        self._next_kickoff = turn + self._interval
        await self._sleep(turn - loop.time())

    async def _sleep(self, seconds: float) -> None:
        """Sleep, unless the batch is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            return

    def taken(self) -> None:
        """Note that a kickoff was taken."""
        if self._careful:
            self._careful = False
            self._free.set()
        self._rest, self._refused_since = 0.0, None

    def refused(self, error: CrewError) -> str | None:
        """Note that a kickoff surely did not start, and may be tried again; rest before the next one.

        Returns:
            Why the batch gives up, None while it has patience.
        """
        now = asyncio.get_running_loop().time()
        self._careful = True
        if self._refused_since is None:
            self._refused_since = now
            run_logger().warning("%s The batch stands still and tries again.", error)
        elif now - self._refused_since >= PATIENCE:
            return f"no kickoff was taken for {PATIENCE / 60:.0f} minutes, the last one so: {error}"
        if now >= self._not_before:
            self._rest = min(max(self._rest * 2, 1.0), REST)
            self._not_before = now + self._rest
        return None

    def heed(self, error: CrewError) -> None:
        """Hold everything back where the server asked one request to come back later."""
        if not isinstance(error, RateLimitedError | ServerError) or error.retry_after is None:
            return
        now = asyncio.get_running_loop().time()
        delay = min(error.retry_after, RETRY_AFTER_CAP)
        if delay > 1.0 and now >= self._not_before:
            run_logger().info("The crew's server asks to come back in %.0f s: the whole batch waits.", delay)
        self._not_before = max(self._not_before, now + delay)


class _Lanes:
    """Clients for one request at a time each, the one that was used last first; made when they are needed.

    httpcore looks through all connections of a pool, twice a request, each time for all the others: a request over one
    pool of eight took 0.91 ms of CPU, over eight pools of one 0.50 ms.
    """

    def __init__(self, crew: Crew, number: int) -> None:
        self._crew = crew
        self._free: list[CrewClient] = []
        self._gate = asyncio.Semaphore(number)
        self._open = AsyncExitStack()

    async def close(self) -> None:
        await self._open.aclose()

    @asynccontextmanager
    async def lane(self) -> AsyncGenerator[CrewClient]:
        async with self._gate:
            lane = self._free.pop() if self._free else await self._open.enter_async_context(self._crew.client())
            try:
                yield lane
            finally:
                self._free.append(lane)


class BatchClient(CrewClient):
    """A crew client that keeps to a pace, and goes on with a newer one where its token has been rotated."""

    def __init__(self, crew: Crew, pace: Pace, fresher_than: Callable[[CrewClient], Any] | None = None) -> None:
        super().__init__(
            crew.url,
            crew.token,
            request_timeout=crew.request_timeout,
            allow_http=crew.allow_http,
            inputs_as_json=crew.inputs_as_json,
        )
        self._pace = pace
        self._fresher_than = fresher_than
        self._polling, self._posting = _Lanes(crew, POLLS_AT_ONCE), _Lanes(crew, pace.kickoffs_at_once)

    async def __aenter__(self) -> BatchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        for lanes in (self._polling, self._posting):
            await lanes.close()

    async def kickoff(
        self,
        inputs: Mapping[str, Any],
        *,
        meta: Mapping[str, Any] | None = None,
        webhooks: Webhooks | None = None,
        restore_from: str | None = None,
        redact: Callable[[str], str] | None = None,
        before_sending: Callable[[], None] | None = None,
    ) -> str:
        """Start a run."""
        given: dict[str, Any] = {"meta": meta, "webhooks": webhooks, "restore_from": restore_from, "redact": redact}
        given["before_sending"] = before_sending
        try:
            return await super().kickoff(inputs, **given)
        except AuthenticationError:
            fresh = await self._fresher()
            if fresh is None:
                raise
            return await fresh.kickoff(inputs, **given)
        except (RateLimitedError, ServerError) as error:
            self._pace.heed(error)
            raise

    async def status(self, kickoff_id: str, *, redact: Callable[[str], str] | None = None) -> CrewStatus:
        """Return the status of a run."""
        try:
            return await super().status(kickoff_id, redact=redact)
        except AuthenticationError:
            fresh = await self._fresher()
            if fresh is None:
                raise
            return await fresh.status(kickoff_id, redact=redact)
        except (RateLimitedError, ServerError) as error:
            self._pace.heed(error)
            raise

    async def _fresher(self) -> CrewClient | None:
        return None if self._fresher_than is None else await self._fresher_than(self)

    async def _send(self, call: Any) -> Any:
        if call.method == "GET":
            if (left := self._pace.held_for) > 0:
                await asyncio.sleep(left)
            lanes = self._polling
        else:
            lanes = self._posting
        async with lanes.lane() as lane:
            return await lane._send(call)  # noqa: SLF001  a client like this one


class BatchSession(CrewSession):
    """A session in which many rows meet a refused token at once, and the first of them renews it for all."""

    def __init__(self, crew: Crew, pace: Pace) -> None:
        super().__init__(crew, lambda fresh: BatchClient(fresh, pace, self.fresher_than))
        self.pace = pace
        self._renewing = asyncio.Lock()

    async def fresher_than(self, client: CrewClient) -> CrewClient | None:
        """Return the client that took the place of one whose token was refused, None if there is no newer token."""
        async with self._renewing:
            if self.client is not client or await self.renew():
                return self.client
        return None


class Rhythm:
    """How long runs take, learned from those that have ended, so that the first look does not come long before.

    It waits for the fastest tenth of them: a run that takes longer is looked at as its policy says from then on.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=200)
        self._since = 0
        self.first_look = 0.0
        """Seconds after a kickoff; 0 while nothing is known."""

    def take(self, seconds: float) -> None:
        """Take in how long a run took, by the server's clock where it says so."""
        self._seconds.append(seconds)
        self._since += 1
        if self._since >= 20 or len(self._seconds) in (5, 10):
            self._since = 0
            self.first_look = sorted(self._seconds)[len(self._seconds) // 10]
