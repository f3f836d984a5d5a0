"""Deleting old attempts: their idempotency keys start new runs then."""

from __future__ import annotations

import time

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.exceptions import StoreError
from prefect_crew.runs.database import in_store
from prefect_crew.settings import CrewSettings
from prefect_crew.store import prune as pieces
from prefect_crew.store.attempts import time_now

DAY = 86_400.0
EVERY = 3600.0
"""Seconds between two looks of a process for old attempts, if there are no more."""
# The monotonic time of the next look. Module-level: all runs of a process share it.
_next_look = 0.0


async def prune_in_passing() -> None:
    """Delete one piece of what is old: at most once an hour in a process, more often only while there is more."""
    global _next_look
    if time.monotonic() < _next_look:
        return
    _next_look = time.monotonic() + EVERY
    try:
        before = await in_store(time_now) - CrewSettings().keep_records_days * DAY
        keys = await in_store(pieces.keys_to_prune, before)
        if keys:
            await in_store(pieces.prune_keys, keys, before)
        if await in_store(pieces.prune_batch, before) or len(keys) == pieces.PIECE:
            _next_look = 0.0
        else:
            await in_store(pieces.prune_rest, before)
    except (StoreError, *PREFECT_ERRORS) as error:
        run_logger().debug("Old attempts are not deleted now: %s", error)
