"""News for the waits of an event loop: one reader asks the crew database for all of them.

News only end a pause early, and bring the tokens of a run: a webhook proves nothing and may never come. Polls go on as
the policy says, so no end is seen later than without webhooks.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.client._parsing import as_id, as_object
from prefect_crew.client.models import TokenUsage
from prefect_crew.runs.database import in_store
from prefect_crew.store.news import News, Place, read_news
from prefect_crew.webhooks import COMPLETED

READ_EVERY = (2.0, 0.5)
"""Seconds between two reads: for one wait, for several."""


@dataclass(eq=False)
class Subscription:
    """The news of one topic since a wait began, and some seconds before."""

    news: list[News] = field(default_factory=list[News])
    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, event: News) -> None:
        """Add news, and end the pause."""
        self.news.append(event)
        self._event.set()

    async def pause(self, seconds: float) -> bool:
        """Sleep for some seconds, or until there is news. Return True for news."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True

    @property
    def usage(self) -> TokenUsage | None:
        """The tokens of the whole run, else those of its crews together, with each delivery of an event counted once;
        None if no webhook reported any."""
        whole, crews = None, dict[str | int, TokenUsage]()
        for event in self.news:
            body = as_object(event.body)
            if usage := body.get("usage"):
                reported = TokenUsage.model_validate(usage)
                if event.kind == COMPLETED:
                    whole = reported
                else:
                    crews[as_id(body.get("id")) or event.n] = reported
        return whole or TokenUsage.sum(crews.values())


class _Reader:
    """Reads the news of the subscriptions of one event loop, as long as there are any."""

    def __init__(self) -> None:
        self.topics: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._reading: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        place: Place | None = None
        while self.topics:
            await asyncio.sleep(READ_EVERY[len(self.topics) > 1])
            try:
                fresh, place = await in_store(read_news, [*self.topics], place)
            except Exception as error:  # noqa: BLE001  waits that began before would get none any more
                run_logger().debug("News could not be read: %r", error)
                continue
            for event in fresh:
                for subscription in self.topics.get(event.topic, ()):
                    subscription.tell(event)


# By event loop, whose waits are of independent flows.
_readers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Reader] = weakref.WeakKeyDictionary()


@asynccontextmanager
async def news_of(topic: str) -> AsyncGenerator[Subscription]:
    """Subscribe to the news of an attempt, by its id, or of a batch, by its name."""
    reader = _readers.setdefault(asyncio.get_running_loop(), _Reader())
    subscription = Subscription()
    reader.topics[topic].add(subscription)
    reader.start()
    try:
        yield subscription
    finally:
        reader.topics[topic].discard(subscription)
        if not reader.topics[topic]:
            del reader.topics[topic]
