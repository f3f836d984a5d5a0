"""The latest webhooks, for processes that wait for runs: each asks for what came after the last one that it has.

An answer is held back until there is something to say. So a webhook reaches a waiting process within milliseconds,
while Prefect's events, which everybody else reads, take a second, and longer when many come at once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from typing import Any
from uuid import uuid4

from prefect_crew.client._parsing import tokens_of
from prefect_crew.client.models import TokenUsage
from prefect_crew.client.webhooks import LLM_CALL
from prefect_crew.receiver.events import WebhookEvent, event_name
from prefect_crew.webhooks import ASKED, WAKING

KEPT = 5000
"""Webhooks that are kept, about 400 bytes each."""
AT_ONCE = 1000
"""Webhooks in one answer."""
HOLD = 10.0
"""Seconds for which an answer is held back at most. A server that is stopped waits for its answers."""
GATHER = 0.02
"""Seconds for which more is waited for once there is something: runs often end together."""
MOST_HELD = 300
"""Answers that are held back at the same time."""
MOST_COUNTED = 5000
"""Runs of which the calls of models are added up, and calls that are not counted twice."""
MOST_MODELS = 20
"""Models of one run."""

_RunName = tuple[str, int | None, str | None]
"""An idempotency key, an attempt at it, and a kickoff id."""


class RecentWebhooks:
    """The latest webhooks that end pauses, in the order in which they came. Of one event loop.

    A cursor names the last webhook that a process has, and the start of this receiver: another one has not the same.
    """

    def __init__(self) -> None:
        self._start = uuid4().hex[:8]
        self._last = 0
        self._kept: dict[str, dict[str, Any]] = {}  # by their ids, in the order in which they came
        self._models: OrderedDict[_RunName, dict[str, Any]] = OrderedDict()
        self._counted: OrderedDict[str, None] = OrderedDict()
        self._ended: OrderedDict[_RunName, None] = OrderedDict()
        self._news = asyncio.Event()
        self._held = 0
        self._is_closing = False

    def add(self, event: WebhookEvent) -> None:
        """Keep a webhook that ends a pause, and answer those who wait for one. Calls of models are added up for it."""
        name, hook = event_name(event), event.hook
        run = hook.idempotency_key, hook.attempt, event.kickoff_id
        if event.name == f"stream.{LLM_CALL}":
            self._count(run, event)
            if run not in self._ended:
                return  # its run's end tells of it
        elif name not in WAKING:
            return
        if str(event.id) in self._kept:
            return
        self._kept[str(event.id)] = {
            "id": str(event.id),
            "event": name,
            "idempotency_key": hook.idempotency_key,
            "attempt": hook.attempt,
            "round": hook.round,
            "said": dict(event.said),
            **({"models": self._models[run]} if run in self._models else {}),
        }
        if name != ASKED:
            self._ended[run] = None
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        if len(self._ended) > KEPT:
            self._ended.popitem(last=False)
        self._last += 1
        self._news.set()
        self._news = asyncio.Event()

    def _count(self, run: _RunName, event: WebhookEvent) -> None:
        model, usage = event.said.get("model"), tokens_of(event.said)
        if usage is None or not isinstance(model, str) or str(event.id) in self._counted:
            return
        self._counted[str(event.id)] = None
        if len(self._counted) > MOST_COUNTED:
            self._counted.popitem(last=False)
        models = self._models.setdefault(run, {})
        self._models.move_to_end(run)
        if model in models or len(models) < MOST_MODELS:
            known = TokenUsage.sum(filter(None, [tokens_of(models.get(model)), usage]))
            models[model] = {} if known is None else known.model_dump(exclude_none=True)
        if len(self._models) > MOST_COUNTED:
            self._models.popitem(last=False)

    def close(self) -> None:
        """Answer all who wait, and hold no answer back any more: the server is about to stop."""
        self._is_closing = True
        self._news.set()

    async def after(self, cursor: str) -> dict[str, Any] | None:
        """Return the webhooks after a cursor, the cursor after them, and whether some between were lost.

        Without a webhook it waits up to `HOLD` seconds for one. None: too many wait already.
        """
        start, _, number = cursor.partition("-")
        known = start == self._start and number.isdecimal() and len(number) < 20 and int(number) <= self._last
        seen = int(number) if known else self._last
        if known and seen == self._last and not self._is_closing:
            if self._held >= MOST_HELD:
                return None
            await self._wait()
        first = self._last - len(self._kept)
        begin = max(0, seen - first)
        found = list(itertools.islice(self._kept.values(), begin, begin + AT_ONCE))
        return {
            "cursor": f"{self._start}-{max(seen, first) + len(found)}",
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
