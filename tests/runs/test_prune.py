"""Pruning: what ended long ago goes, by hand or in passing, and what is open stays."""

from datetime import timedelta

import pytest

from prefect_crew import arun_crew
from prefect_crew._internal.clock import utcnow
from prefect_crew.devserver import CrewServer
from prefect_crew.runs import prune as pruning
from prefect_crew.runs.database import in_store
from prefect_crew.store.attempts import of_key
from prefect_crew.store.decision import AttemptState
from support.past import aput, new_attempt

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


async def ended(days: float) -> str:
    """Write a run that ended so many days ago; return its key."""
    at = (utcnow() - timedelta(days=days)).timestamp()
    return (await aput(new_attempt(state=AttemptState.COMPLETED, begun_at=at, ended_at=at))).key


async def test_what_ended_long_ago_goes(monkeypatch: pytest.MonkeyPatch):
    old, young = [await ended(days) for days in (31, 29)]
    assert (await pruning.prune(dry_run=True)).runs == 1
    with monkeypatch.context() as patch:
        patch.setenv("PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS", "60")
        assert (await pruning.prune()).runs == 0, "the setting says longer"
    assert (await pruning.prune(older_than=timedelta(days=32))).runs == 0
    assert (await pruning.prune()).runs == 1
    assert not await in_store(of_key, old)
    assert await in_store(of_key, young)
    assert (await pruning.prune(older_than=timedelta(0))).runs == 1


async def test_a_process_that_ends_runs_prunes_in_passing(scripted_crew: CrewServer, monkeypatch: pytest.MonkeyPatch):
    old = await ended(31)
    monkeypatch.setattr(pruning, "_next_look", 0.0)
    await arun_crew(scripted_crew.crew(), {"text": "a"}, idempotency_key="new")
    assert not await in_store(of_key, old)
    later = await ended(31)
    await arun_crew(scripted_crew.crew(), {"text": "b"}, idempotency_key="newer")
    await arun_crew(scripted_crew.crew(), {"text": "b"}, idempotency_key="newest")
    assert await in_store(of_key, later), "it looks once an hour"
