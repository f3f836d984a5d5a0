"""Where a batch's ledger is, as its caller says it and as others find it again: never with a password."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.context import FlowRunContext
from sqlalchemy import URL

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.batches.database import default_ledger, open_url

__all__ = ["SECRET", "LedgerPlace", "check_adoptable", "ledger_place"]

_HARMLESS = {"ssl", "sslmode", "host", "port", "target_session_attrs", "application_name", "connect_timeout"}
"""Options of a URL that hold no secret. asyncpg also takes `password`, `passfile`, `sslpassword` and any `options`."""
HEARTBEAT = 30
"""Seconds between a worker's heartbeats where it does not tell."""
SECRET = "secret://"  # noqa: S105  the beginning of a name, not a secret


@dataclass(frozen=True)
class LedgerPlace:
    """A ledger. `ledger` is its path or URL, with what it takes to open it; `told` is the same without a password."""

    ledger: str
    told: str

    def __repr__(self) -> str:
        return f"LedgerPlace({self.told!r})"

    @property
    def local(self) -> bool:
        """Whether it is a file on this machine."""
        return open_url(self.ledger).drivername == "sqlite"

    @property
    def exists(self) -> bool:
        """Whether a ledger that is a file is there."""
        return self.local and Path(str(open_url(self.ledger).database)).exists()

    @property
    def open_to_all(self) -> bool:
        """Whether `told` is all that another machine needs."""
        return self.told.startswith(SECRET) or not _is_secret(open_url(self.ledger))


async def check_adoptable(place: LedgerPlace, batch: str) -> None:
    """Refuse a ledger in a file where the batch may have to go on elsewhere: on a pool of several crew workers.

    A worker that was stopped or killed stays online for a while. So another one counts once it has sent a heartbeat.

    Raises:
        ConfigurationError: Another worker of the pool would adopt this flow run, and find no ledger.
    """
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    pool = getattr(flow_run, "work_pool_name", None)
    if flow_run is None or pool is None or not place.local:
        return
    own = (flow_run.infrastructure_pid or "").rpartition("/")[0]
    begun = time.monotonic()
    first: dict[str, Any] = {}
    async with get_client() as client:
        if (await client.read_work_pool(pool)).type != "crew":
            return
        while True:
            workers = await client.read_workers_for_work_pool(pool)
            others = [one for one in workers if one.name != own and one.status == WorkerStatus.ONLINE]
            for one in others:
                if first.setdefault(one.name, one.last_heartbeat_time) != one.last_heartbeat_time:
                    raise ConfigurationError(
                        f"Batch {batch!r} has its ledger in a file of this machine ({place.told}), but the work pool "
                        f"{pool} has a second worker, {one.name}, which could not go on with the batch. Give it a "
                        "ledger in PostgreSQL: ledger='postgresql://…'. Nothing was started."
                    )
            intervals = [float(one.heartbeat_interval_seconds or HEARTBEAT) for one in others]
            if not others or time.monotonic() - begun > 1.5 * max(intervals):
                return
            await asyncio.sleep(1)


async def ledger_place(ledger: str | None, output: str) -> LedgerPlace:
    """Return where a ledger is.

    Args:
        ledger: A path, the URL of a PostgreSQL database, `secret://NAME` for a Prefect Secret block that holds one of
            them, or None for a file beside the output.
        output: Where the lines go.

    Raises:
        ConfigurationError: There is no such block, or no place beside the output.
    """
    given = ledger or default_ledger(output)
    if not given.startswith(SECRET):
        url = open_url(given)
        told = str(url.database) if url.drivername == "sqlite" else given
        if _is_secret(url):
            told = url.set(drivername="postgresql", password=None, query={}).render_as_string()
        return LedgerPlace(given, told)
    name = given.removeprefix(SECRET)
    try:
        block = await cast("Any", Secret).aload(name)
    except ValueError:
        raise ConfigurationError(
            f"The ledger is said to be in the Prefect Secret block {name!r}, which does not exist. Make it: "
            f"Secret(value='postgresql://…').save({name!r})."
        ) from None
    value = block.get()
    if not isinstance(value, str):
        raise ConfigurationError(f"The Prefect Secret block {name!r} holds no text, and so no ledger.")
    open_url(value)
    return LedgerPlace(value, given)


def _is_secret(url: URL) -> bool:
    """Return whether a URL holds what is not for everyone: a password, or an option that may."""
    return url.password is not None or any(name.lower() not in _HARMLESS for name in url.query)
