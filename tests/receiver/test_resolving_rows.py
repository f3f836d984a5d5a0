"""Uncertain rows of a batch, resolved by the webhooks of the runs that their kickoffs did start."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from prefect_crew import WaitPolicy, arun_batch
from prefect_crew.batches.ledger import Ledger
from prefect_crew.receiver.app import create_receiver
from prefect_crew.records.model import RecordPhase
from prefect_crew.runs import kickoff
from prefect_crew.testing import CrewServerFactory
from support.batches import put
from support.scripts import script
from support.webhooks import SECRET, events_of, served, until

pytestmark = pytest.mark.usefixtures("prefect_api")

SLOW = script({"seconds": 0.2, "output": "on {{ topic }}"}, inputs=["topic"])
ROWS = [{"id": f"row {number}", "topic": f"topic {number}"} for number in range(4)]


async def test_a_row_is_resolved_by_its_webhook_when_the_batch_is_gone_on_with(
    crew_server: CrewServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(SLOW, port=True, faults=["kickoff:drop-after-accept@2"])
    name = f"hooked {uuid.uuid4().hex[:8]}"
    given: dict[str, Any] = {
        "name": name, "key": "id", "output": str(tmp_path / "out.jsonl"), "max_in_flight": 1,
        "wait": WaitPolicy(initial=0.1, max_interval=0.5),
    }  # fmt: skip
    receiver = create_receiver(SECRET)
    async with served(receiver) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
        first = await arun_batch(server.crew(), ROWS, **given)
        (key,) = first.uncertain_keys
        assert (first.completed, first.uncertain, server.kickoffs) == (3, 1, 4)
        idempotency_key = f"batch/{name}/{key}"
        known = {json.loads(line)["kickoff_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()}
        (lost,) = [run for run in server.runs if run.id not in known]
        await events_of(idempotency_key, at_least=2)
        await until(lambda: receiver.state.forwarder.report()["waiting"] == 0, "all is handed on")
        # Nobody has checked what comes without a secret.
        monkeypatch.delenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET")
        monkeypatch.delenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL")
        assert (await arun_batch(server.crew(), ROWS, **given)).uncertain == 1
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
        # A row of another ledger has the same key and number: its webhooks say nothing of this one.
        async with Ledger(f"{given['output']}.ledger.db", name) as ledger:
            (ours,) = await ledger.attempts(idempotency_key)
            await put(ledger, ours.model_copy(update={"owner": str(uuid.uuid4())}))
        assert (await arun_batch(server.crew(), ROWS, **given)).uncertain == 1
        async with Ledger(f"{given['output']}.ledger.db", name) as ledger:
            await put(ledger, ours)
        again = await arun_batch(server.crew(), ROWS, **given)
    assert (again.completed, again.uncertain, again.kickoffs, server.kickoffs) == (4, 0, 0, 4)
    async with Ledger(f"{given['output']}.ledger.db", name) as ledger:
        (record,) = await ledger.attempts(idempotency_key)
    assert (record.phase, record.kickoff_id) == (RecordPhase.ENDED, lost.id)


async def test_a_row_whose_process_dies_in_its_kickoff_is_one_that_webhooks_may_resolve(
    crew_server: CrewServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", "https://hooks.test")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr(kickoff, "FINISH", 0.1)
    server, name = crew_server(SLOW, faults=["kickoff:timeout@1"]), f"dying {uuid.uuid4().hex[:8]}"
    output = tmp_path / "out.jsonl"
    running = asyncio.ensure_future(arun_batch(server.crew(), ROWS[:1], name=name, key="id", output=str(output)))
    await until(lambda: server.requests["kickoff"] == 1, "the kickoff is sent")
    async with Ledger(f"{output}.ledger.db", name) as found_by_the_next:
        (record,) = await found_by_the_next.unresolved()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (record.phase, record.has_webhooks) == (RecordPhase.CLAIMED, True)
