"""Pruning: what ended long ago goes in passing, and what is younger stays."""

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


async def test_a_process_that_ends_runs_prunes_in_passing(scripted_crew: CrewServer, monkeypatch: pytest.MonkeyPatch):
    old, young = [await ended(days) for days in (31, 29)]
    for keep, key, is_kept in ((60, "long", True), (30, "new", False)):
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS", str(keep))
        monkeypatch.setattr(pruning, "_next_look", 0.0)
        await arun_crew(scripted_crew.crew(), {"text": "a"}, idempotency_key=key)
        assert bool(await in_store(of_key, old)) is is_kept
    assert await in_store(of_key, young)
    later = await ended(31)
    await arun_crew(scripted_crew.crew(), {"text": "b"}, idempotency_key="newer")
    await arun_crew(scripted_crew.crew(), {"text": "b"}, idempotency_key="newest")
    assert await in_store(of_key, later), "it looks once an hour"
