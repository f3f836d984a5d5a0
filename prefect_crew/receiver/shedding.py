"""A bounded queue that gives up what matters least first. Safe to use from several threads."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable

from prefect_crew.receiver.news import News, Rank

__all__ = ["SheddingQueue"]


class SheddingQueue:
    """Holds at most `limit` pieces of news; the oldest of the lowest rank goes when there is no room.

    What matters most is taken first, and what came first among equals.

    Attributes:
        limit: How many it holds.
        shed: How many were given up, by kind.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.shed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._queues: dict[Rank, deque[News]] = {rank: deque() for rank in sorted(Rank, reverse=True)}
        self._held = 0

    def __len__(self) -> int:
        return self._held

    @property
    def full(self) -> bool:
        """Whether something has to go for whatever comes next."""
        return self._held >= self.limit

    def put(self, news: News) -> None:
        """Take a piece of news in, or give it up if all that is held matters more."""
        with self._lock:
            if self._held >= self.limit and not self._make_room(news.rank):
                self.shed[news.hook.kind] += 1
                return
            self._queues[news.rank].append(news)
            self._held += 1

    def put_back(self, batch: Iterable[News]) -> None:
        """Take back what `take` gave, before all that has come since; the newest of it goes where there is no room."""
        with self._lock:
            for news in reversed(list(batch)):
                if self._held >= self.limit and not self._make_room(news.rank, below=True):
                    self.shed[news.hook.kind] += 1
                    continue
                self._queues[news.rank].appendleft(news)
                self._held += 1

    def take(self, most: int) -> list[News]:
        """Return up to `most` pieces of news, and hold them no more."""
        taken: list[News] = []
        with self._lock:
            for queue in self._queues.values():
                while queue and len(taken) < most:
                    taken.append(queue.popleft())
            self._held -= len(taken)
        return taken

    def _make_room(self, rank: Rank, *, below: bool = False) -> bool:
        """Give up the oldest of the lowest rank, which must be at most `rank`, or `below` it."""
        lowest = next((one for one in reversed(self._queues) if self._queues[one]), None)
        if lowest is None or lowest > rank or (below and lowest == rank):
            return False
        self.shed[self._queues[lowest].popleft().hook.kind] += 1
        self._held -= 1
        return True
