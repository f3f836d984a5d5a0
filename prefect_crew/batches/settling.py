"""Settling uncertain rows by the webhooks of the runs that their kickoffs did start.

The receiver cannot: it knows no ledger. But what it was told stands on the Prefect server as events, under the row's
run key, and a batch that is gone on with looks there before it lists a row as uncertain.
"""

from __future__ import annotations

from typing import Any, cast

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

from prefect_crew.batches.ledger import Ledger
from prefect_crew.crew import Crew
from prefect_crew.events import emit
from prefect_crew.logs import run_logger
from prefect_crew.receiver.settling import Settlement, settle_from_webhook
from prefect_crew.receiver.signing import claim_of
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import RunRecord
from prefect_crew.settings import CrewSettings

__all__ = ["settle_by_webhooks"]

MOST = 200
"""Uncertain rows that are looked for. A process that dies leaves 16."""


async def settle_by_webhooks(ledger: Ledger, crew: Crew) -> None:
    """Settle what webhooks have told of, under the conditions of `settle_from_webhook`. An error leaves it uncertain.

    Without a secret nobody has checked where a webhook came from, so none is believed.

    Raises:
        LedgerError: The ledger cannot be used.
    """
    if not CrewSettings().webhook_secret:
        return
    for record in [one for one in await ledger.unsettled() if one.hooked][:MOST]:
        try:
            ids = [one for one in await _told(record) if await PrefectRecords().of_kickoff(one) is None]
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().warning("What webhooks told of uncertain rows cannot be read: %s", error)
            return
        for kickoff_id in ids:
            outcome = await settle_from_webhook(
                record.run_key, kickoff_id, ledger, attempt=record.attempt, load=lambda found: _same(crew, found)
            )
            if outcome is Settlement.SETTLED:
                run_logger().info(
                    "Row %r of batch %s is settled: its kickoff started run %s, a webhook says.",
                    *(ledger.row_key(record.run_key), ledger.batch, kickoff_id),
                )
                emit("settled", record.model_copy(update={"kickoff_id": kickoff_id}))
                break


async def _same(crew: Crew, record: RunRecord) -> Crew | None:
    return crew if record.crew_url == crew.url else None


async def _told(record: RunRecord) -> list[str]:
    """Return the kickoff ids that webhooks of this very claim have named, each once."""
    about = {
        "resource": {"labels": {"prefect-crew.run-key": [record.run_key]}},
        "event": {"prefix": ["crew.webhook."]},
        "occurred": {"since": record.claimed_at.isoformat()},
    }
    async with get_client() as client:
        answer = await client.request("POST", "/events/filter", json={"filter": about, "limit": 50})
    found: dict[str, None] = {}
    for event in cast("list[dict[str, Any]]", answer.json()["events"]):
        payload: dict[str, Any] = event["payload"]
        said: dict[str, Any] = payload.get("said") or {}
        if payload.get("claim") == claim_of(record.owner) and said.get("kickoff_id"):
            found[str(said["kickoff_id"])] = None
    return list(found)
