"""The flow run that started a run and died over it: when that is known, it is set to Crashed by whoever goes on.

A flow run whose process was killed stays Running for ever where no worker looks after it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.settings import get_current_settings
from prefect.states import Crashed

from prefect_crew.logs import run_logger
from prefect_crew.processes import process_is_gone
from prefect_crew.stopping import flow_run_id

if TYPE_CHECKING:
    from prefect_crew.records import RunRecord

__all__ = ["crash_dead_owner"]

MISSED = 3
"""Heartbeats in a row that a flow run misses before it counts as dead."""
USUAL = 180
"""Seconds between two heartbeats, as Prefect comes."""
LATE = timedelta(seconds=10)
"""How late a heartbeat may be recorded."""


async def crash_dead_owner(record: RunRecord) -> None:
    """Set the flow run that started a run to Crashed if it is known to be dead.

    It is where its process ran on this machine and is gone, or where it has missed three heartbeats. A flow run that
    was begun again since, that is paused, or that does not send heartbeats is left alone. A Prefect API that is away
    is no obstacle for whoever goes on with the run.
    """
    own = flow_run_id()
    if record.flow_run_id is None or record.flow_run_id == own:
        return
    try:
        async with get_client() as client:
            await _crash_if_dead(client, record, UUID(record.flow_run_id), own)
    except ObjectNotFound:
        return
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("Whether flow run %s is dead could not be seen: %s", record.flow_run_id, error)


async def _crash_if_dead(client: PrefectClient, record: RunRecord, owner: UUID, own: str | None) -> None:
    flow_run = await client.read_flow_run(owner)
    state = flow_run.state
    if state is None or not state.is_running() or flow_run.run_count != record.flow_run_count:
        return
    if record.process is not None and process_is_gone(record.process):
        why = "Its process is gone"
    elif await _is_silent(client, owner):
        why = f"It has missed {MISSED} heartbeats"
    else:
        return
    went_on = f"flow run {own}" if own else "a script"
    await client.set_flow_run_state(owner, Crashed(message=f"{why}. Its crew's run goes on with {went_on}."))
    run_logger().warning("Flow run %s is set to Crashed. %s. Its crew's run is found and goes on here.", owner, why)


async def _is_silent(client: PrefectClient, owner: UUID) -> bool:
    """Return whether a flow run that used to send heartbeats has missed some, by the server's clock alone."""
    response = await client.request(
        "POST",
        "/events/filter",
        json={
            "filter": {
                "event": {"name": ["prefect.flow-run.heartbeat"]},
                "resource": {"id": [f"prefect.flow-run.{owner}"]},
            },
            "limit": MISSED + 1,
        },
    )
    events: list[dict[str, Any]] = response.json()["events"]
    beats = sorted(datetime.fromisoformat(str(event["received"])) for event in events)
    if not beats or "Date" not in response.headers:
        return False
    gaps = [(after - before).total_seconds() for before, after in pairwise(beats)]
    usual = max(gaps, default=0.0) or float(get_current_settings().flows.heartbeat_frequency or USUAL)
    return parsedate_to_datetime(response.headers["Date"]) - beats[-1] > MISSED * timedelta(seconds=usual) + LATE
