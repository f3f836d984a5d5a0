"""Deleting old attempts: their idempotency keys start new runs then."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.exceptions import StoreError
from prefect_crew.runs.database import in_store
from prefect_crew.settings import CrewSettings
from prefect_crew.store import prune as pieces
from prefect_crew.store.attempts import time_now

YOUNGEST = timedelta(hours=1)
"""An attempt that ended within this time stays, whatever age a caller gives."""
EVERY = 3600.0
"""Seconds between two looks of a process for old attempts, if there are no more."""
# The monotonic time of the next look. Module-level: all runs of a process share it.
_next_look = 0.0


@dataclass(frozen=True)
class Pruned:
    """The number of attempts and of batches that `prune` deleted, or would delete."""

    runs: int
    batches: int


async def prune(*, older_than: timedelta | None = None, dry_run: bool = False) -> Pruned:
    """Delete the attempts of keys, and the batches, that ended long ago. Several processes may do it at the same time.

    What is open stays, and so does the last completed turn of a session.

    Args:
        older_than: The age since the last end, at least an hour. Default: the setting `keep_records_days`.
        dry_run: Only count.

    Raises:
        StoreError, PREFECT_ERRORS: The crew database cannot be used.
    """
    before = await _before(older_than)
    if dry_run:
        return Pruned(*await in_store(pieces.count_old, before))
    runs, batches = 0, set[str]()
    while keys := await in_store(pieces.keys_to_prune, before):
        deleted = await in_store(pieces.prune_keys, keys, before)
        if not deleted:
            break  # somebody else is deleting them
        runs += deleted
    while name := await in_store(pieces.prune_batch, before):
        batches.add(name)
    await in_store(pieces.prune_rest, before)
    return Pruned(runs, len(batches))


async def prune_in_passing() -> None:
    """Delete one piece of what is old: at most once an hour in a process, more often only while there is more."""
    global _next_look
    if time.monotonic() < _next_look:
        return
    _next_look = time.monotonic() + EVERY
    try:
        before = await _before(None)
        keys = await in_store(pieces.keys_to_prune, before)
        if keys:
            await in_store(pieces.prune_keys, keys, before)
        if await in_store(pieces.prune_batch, before) or len(keys) == pieces.PIECE:
            _next_look = 0.0
        else:
            await in_store(pieces.prune_rest, before)
    except (StoreError, *PREFECT_ERRORS) as error:
        run_logger().debug("Old attempts are not deleted now: %s", error)


async def _before(older_than: timedelta | None) -> float:
    age = timedelta(days=CrewSettings().keep_records_days) if older_than is None else max(older_than, YOUNGEST)
    return await in_store(time_now) - age.total_seconds()
