"""Slots of a crew's shared limit, a Prefect global concurrency limit on its runs in flight.

A slot is taken before a run is started, and given back by whoever sees the run's end. In between it is a lease, which
the start and the wait renew and the record names, so that another process can wait on. A run that nobody waits for, or
whose process died, loses its slot when the lease runs out. A wait never waits for a slot: its run is in flight already.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
"""Seconds for which a slot is kept while nobody renews it."""
RENEW = 100.0
"""Seconds between two renewals."""
LOOK_AGAIN = (0.5, 1.5)
"""Seconds between two looks for a free slot: from, to. What the server proposes grows with how long runs take."""
_LOCKED, _GONE, _TOO_MANY = 423, 410, 422


@dataclass
class Slots:
    """Slots that are held, under one lease."""

    crew: Crew
    lease: UUID

    async def renew(self) -> bool:
        """Hold them for another lease; False if it has run out."""
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
        """Give them back. One that cannot be given back now runs out by itself."""
        try:
            async with get_client() as client:
                await client.release_concurrency_slots_with_lease(self.lease)
        except PREFECT_ERRORS as error:
            run_logger().debug("The slots of %s are free when their lease ends: %s", self.crew.label, error)

    @asynccontextmanager
    async def kept(self) -> AsyncGenerator[None]:
        """Renew the lease until the end of the block. A Prefect API that is away ends nothing: the runs go on at the
        crew's server."""
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
        run_logger().warning(
            "The slots of crew %s in the concurrency limit %s were lost: for now more of its runs may be in flight "
            "than the limit allows.",
            self.crew.label,
            self.crew.concurrency_limit,
        )


async def take_slots(crew: Crew, count: int = 1) -> Slots | None:
    """Take slots of a crew's limit, once that many are free; None if it has no limit.

    Raises:
        ConfigurationError: There is no such limit, or it never has that many.
    """
    if crew.concurrency_limit is None:
        return None
    if (lease := await _taken(crew, count)) is None:
        run_logger().info("Waiting for %d slots of the concurrency limit %s.", count, crew.concurrency_limit)
        # Each look that is in vain is a write on the server: of hundreds that wait here, one at a time looks.
        async with lock_here(f"limit {crew.concurrency_limit}"):
            while (lease := await _taken(crew, count)) is None:  # noqa: ASYNC110  the server tells nobody
                await asyncio.sleep(random.uniform(*LOOK_AGAIN))  # noqa: S311  no secret
    return Slots(crew, lease)


async def _taken(crew: Crew, count: int) -> UUID | None:
    """Return the lease of slots that are free, None if there are not enough."""
    assert crew.concurrency_limit is not None  # noqa: S101  the callers looked
    async with get_client() as client:
        try:
            response = await client.increment_concurrency_slots_with_lease(
                names=[crew.concurrency_limit],
                slots=count,
                mode="concurrency",
                lease_duration=LEASE,
            )
        except STATUS_ERRORS as error:
            if error.response.status_code == _TOO_MANY:
                raise ConfigurationError(
                    f"Crew {crew.label} has the concurrency limit {crew.concurrency_limit!r}, which is below {count}. "
                    f"Nothing was started. Raise it: prefect gcl update {crew.concurrency_limit} --limit N."
                ) from None
            if error.response.status_code != _LOCKED:
                raise
            return None
    answer = ConcurrencyLimitWithLeaseResponse.model_validate(response.json())
    if not answer.limits:
        raise missing_limit(crew)
    return answer.lease_id


def missing_limit(crew: Crew) -> ConfigurationError:
    """Return the error about a limit that does not exist, and so would limit nothing."""
    limit = crew.concurrency_limit
    return ConfigurationError(
        f"Crew {crew.label} names the concurrency limit {limit!r}, which does not exist. Nothing was started. Create "
        f"it: prefect gcl create {limit} --limit N, or remove it from the block."
    )


async def slot_of(crew: Crew, record: RunRecord | None) -> Slots | None:
    """Return the slot of a run that is waited for, or one in its place if there is a free one. The caller keeps it.

    A run in flight that finds no free slot is waited for all the same, and so is one of a crew whose limit is gone.
    """
    try:
        if record is not None and record.slot is not None:
            slots = Slots(crew, UUID(record.slot))
            if await slots.renew():
                return slots
        lease = await _taken(crew, 1)
        return None if lease is None else Slots(crew, lease)
    except (*PREFECT_ERRORS, ConfigurationError) as error:
        run_logger().warning("A run of crew %s in flight counts against no limit: %s", crew.label, error)
        return None
