"""What is done beside the work of one event loop, and waited for at its end only: no run waits for it before.

Two kinds of work go there: what people look at, which may be given up, and the end of a run on record, which may not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from prefect.context import AsyncClientContext

PATIENCE = 15.0
"""Seconds at the end for what may be given up; for the rest, where the work was cut off: a cancelled process has 30."""


class Beside:
    """What is under way beside the work."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        self._views: set[asyncio.Task[None]] = set()
        self._records: set[asyncio.Task[None]] = set()

    def show(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin something that may be given up at the end."""
        task = asyncio.ensure_future(job)
        self._views.add(task)
        task.add_done_callback(self._views.discard)
        return task

    def write_down(self, job: Coroutine[Any, Any, None]) -> None:
        """Begin something that is seen to its end. What it raises is raised where the work ends, if that ends well."""
        self._records.add(asyncio.ensure_future(job))

    async def rest(self, seconds: float, over: asyncio.Event) -> None:
        """Wait so long, or until `over` is set, or until the end of the work."""
        signs = {asyncio.ensure_future(sign.wait()) for sign in (self._ending, over)}
        try:
            await asyncio.wait(signs, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for sign in signs:
                sign.cancel()

    async def end(self, *, within: float | None) -> set[asyncio.Task[None]]:
        """Wait for all of it, and return what was seen to its end.

        `within`: seconds at most for that, None without a limit.
        """
        self._ending.set()
        done = set[asyncio.Task[None]]()
        if self._records:
            done, _ = await asyncio.wait(self._records, timeout=within)
        if self._views:
            await asyncio.wait(set(self._views), timeout=PATIENCE)
        return done


_beside: ContextVar[Beside | None] = ContextVar("prefect_crew_beside", default=None)


@asynccontextmanager
async def work_beside() -> AsyncGenerator[None]:
    """Let work go on beside what is done meanwhile. Within another one, that one's end is the end."""
    if beside_here() is not None:
        yield
        return
    # Where no flow around has a client on this event loop, each task would make one and close it, and what it has begun
    # beside the work outlives it.
    async with AsyncClientContext.get_or_create():
        beside = Beside()
        token = _beside.set(beside)
        try:
            yield
        except Exception:
            await beside.end(within=None)
            raise
        except BaseException:  # a cancellation, or Prefect's signal to suspend
            await beside.end(within=PATIENCE)
            raise
        else:
            for job in await beside.end(within=None):
                job.result()
        finally:
            _beside.reset(token)


def beside_here() -> Beside | None:
    """Return what goes on beside the work that this is called from, if anything may."""
    beside = _beside.get()
    # A sync call from within runs on a loop of its own, which ends before ours.
    return beside if beside is not None and beside.loop is asyncio.get_running_loop() else None
