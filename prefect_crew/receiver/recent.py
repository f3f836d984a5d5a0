"""The latest webhooks, for processes that wait for runs: each asks for what came after the last one that it has.

An answer is held back until there is something to say. So a webhook reaches a waiting process within milliseconds,
while Prefect's events, which everybody else reads, take a second, and longer when many come at once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import Any
from uuid import uuid4

from prefect_crew.receiver.events import WebhookEvent, event_name
from prefect_crew.webhooks import CALLED, WAKING

KEPT = 5000  # webhooks that are kept, about 400 bytes each
AT_ONCE = 1000  # webhooks in one answer
HOLD = 10.0  # Seconds for which an answer is held back at most. A server that is stopped waits for its answers.
GATHER = 0.02  # seconds for which more is waited for once there is something: runs often end together
MOST_HELD = 300  # answers that are held back at the same time


class RecentWebhooks:
    """The latest webhooks that end pauses or tell tokens, in the order in which they came. Of one event loop.

    A cursor names the last webhook that a process has, and the start of this receiver: another one has not the same.
    """

    def __init__(self) -> None:
        self._start = uuid4().hex[:8]
        self._last = 0
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._news = asyncio.Event()
        self._held = 0
        self._is_closing = False

    def add(self, event: WebhookEvent) -> None:
        """Keep a webhook that processes wait for, and answer them. Others are not kept."""
        name, hook = event_name(event), event.hook
        if name not in (*WAKING, CALLED):
            return
        self._kept.append(
            {
                "id": str(event.id),
                "event": name,
                "idempotency_key": hook.idempotency_key,
                "attempt": hook.attempt,
                "round": hook.round,
                "said": dict(event.said),
            }
        )
        self._last += 1
        self._news.set()
        self._news = asyncio.Event()

    def close(self) -> None:
        """Answer all who wait, and hold no answer back any more: the server is about to stop."""
        self._is_closing = True
        self._news.set()

    async def after(self, cursor: str) -> dict[str, Any] | None:
        """Return the webhooks after a cursor, the cursor after them, and whether some between were lost.

        A process without a cursor of this start gets the latest ones. Without a webhook it waits up to `HOLD` seconds
        for one. None: too many wait already.
        """
        start, _, number = cursor.partition("-")
        known = start == self._start and number.isdecimal() and len(number) < 20 and int(number) <= self._last
        seen = int(number) if known else max(0, self._last - AT_ONCE)
        if known and seen == self._last and not self._is_closing:
            if self._held >= MOST_HELD:
                return None
            await self._wait()
        first = self._last - len(self._kept)
        begin = max(0, seen - first)
        found = list(itertools.islice(self._kept, begin, begin + AT_ONCE))
        return {
            "cursor": f"{self._start}-{first + begin + len(found)}",
            # Without a cursor nothing was missed: the process has only just begun to wait.
            "missed": (bool(cursor) and not known) or seen < first,
            "webhooks": found,
        }

    async def _wait(self) -> None:
        self._held += 1
        try:
            async with asyncio.timeout(HOLD):
                await self._news.wait()
            await asyncio.sleep(GATHER)
        except TimeoutError:
            return
        finally:
            self._held -= 1
