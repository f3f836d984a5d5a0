"""The hold of a batch: one process at a time runs its rows and writes its export. Another takes over a dead one's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from uuid import uuid4

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.exceptions import BatchBusyError, FlowRunCancelledError, StoreError
from prefect_crew.runs.database import in_store
from prefect_crew.runs.news import news_of
from prefect_crew.runs.owners import crash_dead_owner, process_is_gone, this_process
from prefect_crew.store.batches import HELD_FOR, Batch, get_batch, hold_batch, let_go, renew_hold

RENEW_EVERY = 10.0
"""Seconds between two renewals of a hold."""
LOOK_AGAIN = 1.0
"""Seconds between two looks at whether the holder of a batch is alive."""


def cancelled_batch(name: str) -> FlowRunCancelledError:
    """Return the error about a batch whose flow run was cancelled."""
    return FlowRunCancelledError(f"Batch {name!r} was cancelled. The same call continues where it stopped.")


class Hold:
    """This process's hold of one batch, an async context manager. `owner` fences each start of a row.

    Entering raises BatchBusyError if another process holds the batch. `on_end` is called once, if the hold is lost or
    somebody cancels the batch.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner = uuid4().hex
        self.is_lost = self.is_cancelled = False
        self.stopped_because: str | None = None
        self.on_end: Callable[[], None] = lambda: None
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Hold:
        self.batch = await self._take()
        self._keeping = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeping is not None:
            await cancel_and_wait(self._keeping)
        try:
            await asyncio.shield(in_store(let_go, self.name, self.owner, self.stopped_because))
        except (StoreError, *PREFECT_ERRORS) as error:
            run_logger().warning("The hold of batch %s ends only in %g s: %s", self.name, HELD_FOR, error)

    async def _take(self) -> Batch:
        """Take the batch: at once from a process of this machine that has ended, and from another machine once its hold
        was not renewed for 30 s."""
        process, own = this_process(), flow_run_id()
        before, until = await in_store(get_batch, self.name), time.monotonic() + HELD_FOR + 2 * LOOK_AGAIN
        while before is not None:
            is_gone = before.owner is not None and before.process is not None and process_is_gone(before.process)
            dead = before.process if is_gone else None
            batch = await in_store(
                hold_batch, self.name, self.owner, flow_run_id=own, process=process, dead_process=dead
            )
            if batch is not None:
                if is_gone:
                    await crash_dead_owner(before.flow_run_id, None, before.process, before.owner_seen, work="batch")
                return batch
            now = await in_store(get_batch, self.name)
            is_alive = now is None or now.owner_seen != before.owner_seen or _is_here(now.process, process)
            if (is_alive and not is_gone) or time.monotonic() > until:
                break
            before = now
            await asyncio.sleep(LOOK_AGAIN)
        raise BatchBusyError(name=self.name)

    async def _keep(self) -> None:
        async with news_of(self.name) as news:
            while not (self.is_lost or self.is_cancelled):
                await news.pause(RENEW_EVERY)
                try:
                    await self.renew()
                except BatchBusyError:
                    break
                except (StoreError, *PREFECT_ERRORS) as error:
                    run_logger().debug("The hold of batch %s could not be renewed: %s", self.name, error)
        self.on_end()

    async def renew(self) -> None:
        """Renew the hold, right before a file or a table is changed. Raises BatchBusyError if it is lost."""
        batch = await in_store(renew_hold, self.name, self.owner)
        if batch is None:
            self.is_lost = True
            raise BatchBusyError(name=self.name)
        self.is_cancelled = self.is_cancelled or batch.cancelled_at is not None

    def check(self) -> None:
        """Raise FlowRunCancelledError or BatchBusyError if this process must not go on."""
        if self.is_lost:
            raise BatchBusyError(name=self.name)
        if self.is_cancelled:
            raise cancelled_batch(self.name)


def _is_here(holder: str | None, own: str | None) -> bool:
    """Return whether a holder runs on this machine, so that its process id tells whether it is alive."""
    return holder is not None and own is not None and holder.partition(" ")[0] == own.partition(" ")[0]
