"""Slots of a crew's shared limit, a Prefect global concurrency limit on its runs in flight.

A call takes a slot before it starts a run, and the call that stores the run's end gives it back. In between, the slot
has a lease that the start and each wait renew. The record names the lease, so that another process can go on. A run
that nobody waits for, or whose process died, loses its slot when the lease ends. No two callers release one lease: of
two requests at the same time, the Prefect server counts both. A wait never waits for a slot: its run is
in flight already. The rows of a batch take their slots from a pool of the batch.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse
from prefect.exceptions import ObjectNotFound

from prefect_crew._internal.prefect_api import lock_here, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, STATUS_ERRORS
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect_crew.crew import Crew
    from prefect_crew.records.model import RunRecord


LEASE = 300.0
"""Seconds after which a slot is free again if nobody renews its lease."""
RENEW = 100.0
"""Seconds between two renewals."""
LOOK_AGAIN = (0.5, 1.5)
"""Seconds between two looks for a free slot: from, to. The pause that Prefect's server proposes is not used: it grows
with the duration of runs."""
PASSED_ON = 10.0
"""Seconds for which a slot goes from one row of a batch to the next. Then the batch gives it back: others may wait."""
UNUSED = 1.0
"""Seconds for which a batch keeps a slot that none of its rows uses."""
_LOCKED, _GONE, _TOO_MANY = 423, 410, 422


@dataclass
class Slots:
    """Slots that a caller holds, under one lease."""

    crew: Crew
    lease: UUID
    taken_at: float = field(default_factory=time.monotonic)

    async def renew(self) -> bool:
        """Renew the lease. Return False if it has ended."""
        async with get_client() as client:
            try:
                await client.renew_concurrency_lease(self.lease, LEASE)
            except ObjectNotFound:
                return False
            except STATUS_ERRORS as error:
                if error.response.status_code != _GONE:
                    raise
                return False
        return True

    async def release(self) -> None:
        """Give the slots back. If the Prefect API fails, they are free when their lease ends."""
        await release(self.lease, self.crew.label)

    @asynccontextmanager
    async def kept(self) -> AsyncGenerator[None]:
        """Renew the lease until the block ends. If the Prefect API does not answer, block and runs go on."""
        renewing = asyncio.create_task(self._renew_on())
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})

    async def _renew_on(self) -> None:
        held = True
        while held:
            await asyncio.sleep(RENEW)
            try:
                held = await self.renew()
            except PREFECT_ERRORS as error:
                run_logger().debug("The slots of crew %s could not be renewed now: %s", self.crew.label, error)
        _warn_of_lost(self.crew)


class SlotPool:
    """Slots of a crew's limit for the rows of one batch, an async context manager. Each row has one, by its key.

    A row takes a slot before its run is started, and gives it back at the run's end. The next row gets a slot that is
    at most `PASSED_ON` old, so that short runs need few requests; an older slot goes back to the Prefect server, since
    others wait for the limit as well.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._held: dict[str, Slots] = {}
        self._unused: dict[UUID, tuple[float, Slots]] = {}
        self._leaving = set[asyncio.Task[None]]()
        self._asking: asyncio.Task[UUID | None] | None = None
        self._ask_alone = asyncio.Lock()
        self._is_due = asyncio.Event()

    async def __aenter__(self) -> SlotPool:
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        with suppress(*PREFECT_ERRORS, ConfigurationError):
            if self._asking is not None and (lease := await self._asking) is not None:
                self._unused[lease] = (0.0, Slots(self._crew, lease))
        slots = [*self._held.values(), *(unused for _, unused in self._unused.values())]
        await asyncio.gather(*(slot.release() for slot in slots), *self._leaving)

    async def take(self, row: str) -> bool:
        """Take a slot for a row. Return False if none is free.

        Raises:
            ConfigurationError: The limit does not exist any more, or it allows no run.
            httpx.HTTPError, PrefectException: The Prefect API cannot be reached.
        """
        if row in self._held:
            return True
        now = time.monotonic()
        for lease, (_, slots) in self._unused.items():
            if now - slots.taken_at < PASSED_ON:
                self._held[row] = slots
                del self._unused[lease]
                return True
        async with self._ask_alone:
            # If the row is cancelled here, the next row takes the slot, or the pool gives it back at its end.
            asking = self._asking = self._asking or asyncio.create_task(_taken(self._crew))
            await asyncio.wait({asking})
            self._asking = None
        if (lease := asking.result()) is None:
            return False
        self._held[row] = Slots(self._crew, lease)
        return True

    @staticmethod
    def pause() -> float:
        """Return the seconds until the next look for a free slot."""
        return random.uniform(*LOOK_AGAIN)  # noqa: S311  no secret

    def give_back(self, row: str) -> None:
        """Give back the slot of a row, if it has one."""
        if (slots := self._held.pop(row, None)) is not None:
            now = time.monotonic()
            self._unused[slots.lease] = (now, slots)
            if now - slots.taken_at >= PASSED_ON:
                self._is_due.set()

    def leave(self, row: str) -> None:
        """Forget the slot of a row whose run may be in flight without a wait: the slot is free when its lease ends."""
        self._held.pop(row, None)

    async def _keep(self) -> None:
        """Give back the slots that no row uses, and renew the rest."""
        renew_at = time.monotonic() + RENEW
        while True:
            self._is_due.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_due.wait(), min(UNUSED, RENEW))
            now = time.monotonic()
            for lease, (since, slots) in list(self._unused.items()):
                if now - since >= UNUSED or now - slots.taken_at >= PASSED_ON:
                    if self._unused.pop(lease, None) is None:  # a row took it during the last release
                        continue
                    leaving = asyncio.create_task(slots.release())  # the pool's end does not cut it off
                    self._leaving.add(leaving)
                    leaving.add_done_callback(self._leaving.discard)
                    await asyncio.wait({leaving})
            if now >= renew_at:
                renew_at = now + RENEW
                for row, slots in list(self._held.items()):
                    try:
                        if not await slots.renew() and self._held.get(row) is slots:
                            del self._held[row]
                            _warn_of_lost(self._crew)
                    except PREFECT_ERRORS as error:
                        run_logger().debug("A slot of crew %s could not be renewed now: %s", self._crew.label, error)


async def release(lease: UUID, crew: str) -> None:
    """End a lease of slots. If the Prefect API fails, the slots are free when the lease ends by itself."""
    try:
        async with get_client() as client:
            await client.release_concurrency_slots_with_lease(lease)
    except PREFECT_ERRORS as error:
        run_logger().debug("The slots of %s are taken until their lease ends: %s", crew, error)


def _warn_of_lost(crew: Crew) -> None:
    run_logger().warning(
        "The slots of crew %s in the concurrency limit %s were lost: for now more of its runs may be in flight than "
        "the limit allows.",
        crew.label,
        crew.concurrency_limit,
    )


async def take_slots(crew: Crew) -> Slots:
    """Wait for a free slot of a crew's limit and take it.

    Raises:
        ConfigurationError: The limit does not exist, or it allows no run.
    """
    if (lease := await _taken(crew)) is None:
        run_logger().info("Waiting for a slot of the concurrency limit %s.", crew.concurrency_limit)
        # Each look makes the server write, even if no slot is free: of hundreds of waiting runs, one at a time looks.
        async with lock_here(f"limit {crew.concurrency_limit}"):
            while (lease := await _taken(crew)) is None:  # noqa: ASYNC110  the server reports no free slot
                await asyncio.sleep(random.uniform(*LOOK_AGAIN))  # noqa: S311  no secret
    return Slots(crew, lease)


async def most_at_once(crew: Crew) -> int | None:
    """Return the number of runs that a crew's limit allows at a time, None if the crew has no limit.

    Raises:
        ConfigurationError: The limit does not exist, or it allows no run.
    """
    if crew.concurrency_limit is None:
        return None
    async with get_client() as client:
        try:
            limit = await client.read_global_concurrency_limit_by_name(crew.concurrency_limit)
        except ObjectNotFound:
            raise missing_limit(crew) from None
    if limit.limit < 1:
        raise _too_small(crew)
    return limit.limit


async def _taken(crew: Crew) -> UUID | None:
    """Take a free slot and return its lease, None if no slot is free."""
    assert crew.concurrency_limit is not None  # noqa: S101  the callers looked
    async with get_client() as client:
        try:
            response = await client.increment_concurrency_slots_with_lease(
                names=[crew.concurrency_limit],
                slots=1,
                mode="concurrency",
                lease_duration=LEASE,
            )
        except STATUS_ERRORS as error:
            if error.response.status_code == _TOO_MANY:
                raise _too_small(crew) from None
            if error.response.status_code != _LOCKED:
                raise
            return None
    answer = ConcurrencyLimitWithLeaseResponse.model_validate(response.json())
    if not answer.limits:
        raise missing_limit(crew)
    return answer.lease_id


def _too_small(crew: Crew) -> ConfigurationError:
    return ConfigurationError(
        f"Crew {crew.label} has the concurrency limit {crew.concurrency_limit!r}, which is below 1. "
        f"Nothing was started. Raise it: prefect gcl update {crew.concurrency_limit} --limit N."
    )


def missing_limit(crew: Crew) -> ConfigurationError:
    """Return the error about a limit that does not exist, and so would limit nothing."""
    limit = crew.concurrency_limit
    return ConfigurationError(
        f"Crew {crew.label} names the concurrency limit {limit!r}, which does not exist. Nothing was started. Create "
        f"it: prefect gcl create {limit} --limit N, or remove it from the block."
    )


async def slot_of(crew: Crew, record: RunRecord | None) -> Slots | None:
    """Return the slot of a run in flight; the run's wait renews it. If the slot's lease has ended, take a free slot.

    Return None if no slot is free or the limit does not exist. The wait then goes on without a slot.
    """
    try:
        if record is not None and record.slot is not None:
            slots = Slots(crew, UUID(record.slot))
            if await slots.renew():
                return slots
        lease = await _taken(crew)
        return None if lease is None else Slots(crew, lease)
    except (*PREFECT_ERRORS, ConfigurationError) as error:
        run_logger().warning("A run of crew %s in flight counts against no limit: %s", crew.label, error)
        return None
