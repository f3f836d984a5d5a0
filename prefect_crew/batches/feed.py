"""From rows to Prefect tasks: rows that the ledger settles pass by, the others are run in chunks, a task each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import islice
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_crew.batches.engine import Engine
from prefect_crew.batches.rows import RowJob
from prefect_crew.batches.work import Work
from prefect_crew.interrupts import cancel_and_wait
from prefect_crew.logs import run_logger
from prefect_crew.records import RecordPhase, latest_purchase

__all__ = ["feed"]

PAGE = 400
"""Rows that are read, and looked up in the ledger, at once."""


class _Chunk:
    """Rows for one task. A plain class, so that Prefect does not look through thousands of parameters."""

    def __init__(self, engine: Engine, rows: Sequence[Work]) -> None:
        self.engine = engine
        self.rows = deque(rows)
        self.launched = asyncio.Event()
        self.begun = False
        first, last = rows[0].job.number + 1, rows[-1].job.number + 1
        self.label = f"row {first}" if first == last else f"rows {first}-{last}"


def _name(parameters: dict[str, Any]) -> str:
    return cast("_Chunk", parameters["chunk"]).label


# Without tags: for each task with any, Prefect asks its API for room, and the task fails if that has trouble.
@task(cache_policy=NO_CACHE, task_run_name=cast("Any", _name))
async def run_rows(chunk: _Chunk) -> None:
    """Run some rows of a batch."""
    chunk.begun = True
    await chunk.engine.run(chunk.rows, chunk.launched)


async def _run(chunk: _Chunk) -> None:
    """Run a chunk as a Prefect task, or without one where Prefect cannot begin it: that is no reason to fail rows."""
    try:
        await run_rows(chunk)
    except Exception as error:
        if chunk.begun:
            raise
        run_logger().warning("Prefect could not begin the task of %s, which run without one: %s", chunk.label, error)
        await chunk.engine.run(chunk.rows, chunk.launched)


async def feed(engine: Engine, jobs: Iterator[RowJob], *, chunk_size: int, new: bool) -> None:
    """Run all rows of a batch; return when all have ended or been left.

    Args:
        engine: What runs them.
        jobs: The rows, read as there is room for them.
        chunk_size: Rows a task.
        new: Whether the ledger knows none of them.

    Raises:
        CrewError: The ledger, the output or the data set failed. What is in flight is left.
    """
    running: set[asyncio.Task[None]] = set()
    try:
        rows: list[Work] = []
        async for work in _unsettled(engine, jobs, new=new):
            rows.append(work)
            if len(rows) == chunk_size:
                await _begin(_Chunk(engine, rows), running)
                rows = []
        if rows:
            await _begin(_Chunk(engine, rows), running)
        while running:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
            _let_go(running, done)
    finally:
        await cancel_and_wait(*running)


async def _begin(chunk: _Chunk, running: set[asyncio.Task[None]]) -> None:
    """Start a chunk's task and wait until its last row has begun: only then is there room for the next chunk."""
    begun = asyncio.ensure_future(_run(chunk))
    running.add(begun)
    launched = asyncio.ensure_future(chunk.launched.wait())
    try:
        while not launched.done():
            done, _ = await asyncio.wait({launched, *running}, return_when=asyncio.FIRST_COMPLETED)
            _let_go(running, done - {launched})
            if begun.done():
                return
    finally:
        launched.cancel()


def _let_go(running: set[asyncio.Task[None]], done: set[Any]) -> None:
    """Forget tasks that are done, and raise what one of them has raised."""
    for one in done:
        running.discard(one)
    for one in done:
        one.result()


async def _unsettled(engine: Engine, jobs: Iterator[RowJob], *, new: bool) -> AsyncGenerator[Work]:
    """Yield the rows that are not done. When the batch buys nothing more, those that it may still wait for."""
    while page := await asyncio.to_thread(lambda: list(islice(jobs, PAGE))):
        known = {} if new else await engine.ledger.attempts_of([job.key for job in page])
        for job in page:
            work = Work(job, known.get(job.key, ()))
            if work.attempts and await engine.settled(work):
                continue
            if engine.stopped is None or _in_flight(work):
                yield work
        if new and engine.stopped is not None:
            return


def _in_flight(work: Work) -> bool:
    latest = latest_purchase(work.attempts)
    return latest is not None and latest.phase is RecordPhase.STARTED
