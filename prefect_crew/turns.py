"""Turns at a Prefect server that cannot take two changes at once.

On SQLite a change that meets another one is refused (see `impatience`), so that four steps that begin side by side
spend most of their time on asking again. Once a server has shown that, the changes of one event loop go one after the
other: what a run waits for first, then the ends of runs, what people look at last. A server on PostgreSQL never shows
it, and nothing waits.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from enum import IntEnum

__all__ = ["Line", "Rank", "line_here"]

CROWDED_FOR = 300.0
"""Seconds for which a server is remembered to be one of those."""
LONGEST = 2.0
"""Seconds that a turn is waited for: a request that hangs must not hold up the others."""


class Rank(IntEnum):
    """What goes first."""

    RECORD = 0
    END = 1
    VIEW = 2


class Line:
    """The changes of one event loop, in a line where that is needed."""

    def __init__(self) -> None:
        self._until = float("-inf")
        self._busy = False
        self._waiting: list[tuple[Rank, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def form(self) -> None:
        """Go one after the other from now on: the server was seen to refuse two at once."""
        self._until = asyncio.get_running_loop().time() + CROWDED_FOR

    @asynccontextmanager
    async def turn(self, rank: Rank) -> AsyncGenerator[None]:
        """Make one change meanwhile."""
        held = await self._enter(rank)
        try:
            yield
        finally:
            if held:
                self._leave()

    async def _enter(self, rank: Rank) -> bool:
        loop = asyncio.get_running_loop()
        if loop.time() >= self._until:
            return False
        if not self._busy:
            self._busy = True
            return True
        mine: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiting, (rank, next(self._numbers), mine))
        try:
            await asyncio.wait({mine}, timeout=LONGEST)
        except asyncio.CancelledError:
            if not mine.cancel():  # it was given at this moment
                self._leave()
            raise
        return not mine.cancel()

    def _leave(self) -> None:
        while self._waiting:
            *_, other = heapq.heappop(self._waiting)
            if not other.done():
                other.set_result(None)
                return
        self._busy = False


_lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Line] = weakref.WeakKeyDictionary()


def line_here() -> Line:
    """Return the line of the running event loop."""
    return _lines.setdefault(asyncio.get_running_loop(), Line())
