"""How fast a batch may go: requests at a time, kickoffs a second, and what the server asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect_crew.api.client import CrewClient
from prefect_crew.api.errors import RateLimitedError, ServerError

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks
    from prefect_crew.blocks import DeployedCrew

__all__ = ["BatchClient", "Pace"]

REQUESTS = 8
"""Requests at a time: httpx's pool degrades with a long queue (1,000 rows: 17.6 s let loose, 3.0 s with eight)."""
RETRY_AFTER_CAP = 300.0


class Pace:
    """The pace of one batch in one process: shared by all of its rows, on one event loop."""

    def __init__(self, *, kickoffs_per_second: float | None = None, requests: int = REQUESTS) -> None:
        self.gate = asyncio.Semaphore(requests)
        self._interval = 0.0 if kickoffs_per_second is None else 1.0 / kickoffs_per_second
        self._next_kickoff = 0.0
        self._not_before = 0.0

    async def before_kickoff(self) -> None:
        """Wait for this kickoff's turn."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            if now < self._not_before:
                await asyncio.sleep(self._not_before - now)
                continue
            if not self._interval:
                return
            turn = max(now, self._next_kickoff)
            self._next_kickoff = turn + self._interval
            if turn > now:
                await asyncio.sleep(turn - now)
            if loop.time() >= self._not_before:
                return

    def heed(self, error: Exception) -> None:
        """Hold all kickoffs back where the server asked one request to come back later."""
        if isinstance(error, RateLimitedError | ServerError) and error.retry_after is not None:
            until = asyncio.get_running_loop().time() + min(error.retry_after, RETRY_AFTER_CAP)
            self._not_before = max(self._not_before, until)


class BatchClient(CrewClient):
    """A crew client that keeps to a pace."""

    def __init__(self, crew: DeployedCrew, pace: Pace) -> None:
        super().__init__(
            crew.url,
            crew.token,
            request_timeout=crew.request_timeout,
            allow_http=crew.allow_http,
            inputs_as_json=crew.inputs_as_json,
        )
        self._pace = pace

    async def kickoff(
        self,
        inputs: Mapping[str, Any],
        *,
        meta: Mapping[str, Any] | None = None,
        webhooks: Webhooks | None = None,
        secrets: Any = (),
    ) -> str:
        """Start a run when it is its turn."""
        await self._pace.before_kickoff()
        try:
            return await super().kickoff(inputs, meta=meta, webhooks=webhooks, secrets=secrets)
        except (RateLimitedError, ServerError) as error:
            self._pace.heed(error)
            raise

    async def _send(self, call: Any, body: Mapping[str, Any] | None = None) -> Any:
        async with self._pace.gate:
            return await super()._send(call, body)
