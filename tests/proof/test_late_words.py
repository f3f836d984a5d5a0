"""What somebody says of a run who has looked too early, or writes too late, on a simulated Prefect server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from unittest import mock

import pytest
from pydantic import SecretStr

from prefect_crew.blocks import DeployedCrew, crew_of
from prefect_crew.client.models import CrewStatus, StopAnswer, StopOutcome
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records import resolve, store, variables
from prefect_crew.records.decision import Caller, Decision, decide
from prefect_crew.records.model import RecordPhase, RunRecord, StoredResult, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import run, stop
from prefect_crew.states import CrewState
from proof.sim import prefect_api
from proof.sim.prefect_api import SimPrefect

RECORDS = PrefectRecords()
CREW = crew_of(DeployedCrew(url="https://c.test", token=SecretStr("t")))
SILENT = mock.Mock(status=mock.AsyncMock(side_effect=CrewError("no answer")))
"""A client whose crew does not say what the run has used."""


@pytest.fixture(autouse=True)
def prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimPrefect]:
    """Put a simulated Prefect server in the real one's place, whose slow answers take a second."""
    server = SimPrefect(latency=lambda: 0.0)
    monkeypatch.setattr(prefect_api, "SLOW", 1.0)
    monkeypatch.setattr(resolve, "LOOK_AGAIN", 0.01)
    for module in (store, variables):
        monkeypatch.setattr(module, "get_client", server.client)
    with mock.patch.object(run, "emit"):
        yield server


async def posting() -> RunRecord:
    """Claim a run and take a permit of it, as its owner."""
    now = utcnow()
    record = RunRecord(
        idempotency_key="k",
        attempt=1,
        crew="c",
        crew_url="https://c.test",
        inputs_digest="d",
        owner="the owner",
        claimed_at=now,
        good_for=30,
        post_deadline=1,
    )
    assert await RECORDS.claim(record)
    assert await RECORDS.permit(record, 30.0)
    return record


async def started() -> RunRecord:
    record = await posting()
    record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.STARTED, "run", utcnow()
    await RECORDS.save(record)
    return record


async def completed(record: RunRecord) -> None:
    """Write the end down, as whoever waits for the run."""
    await RECORDS.end(record, state=CrewState.COMPLETED, result=StoredResult(output="42"))


async def stored() -> RunRecord:
    (record,) = await RECORDS.attempts("k")
    return record


async def forgotten(kickoff_id: str) -> CrewStatus:
    return CrewStatus(kickoff_id=kickoff_id, state=CrewState.UNKNOWN)


@pytest.mark.parametrize("first", ["the word", "the end"])
async def test_a_word_that_a_run_is_lost_takes_back_no_end_that_was_seen(prefect: SimPrefect, first: str):
    owner = await started()
    person = await resolve.in_flight("k", RECORDS)
    if first == "the word":
        prefect.faults = {f"write@{prefect.counts['write'] + 1}": "slow"}
        saying = asyncio.ensure_future(resolve.resolve_lost(person, RECORDS, look=forgotten))
        await asyncio.sleep(0.3)
        await completed(owner)
    else:
        await completed(owner)
        saying = asyncio.ensure_future(resolve.resolve_lost(person, RECORDS, look=forgotten))
    with pytest.raises(CrewError, match=r"somebody else\. Now it is completed, run run"):
        await saying
    found = await stored()
    assert found.result is not None
    assert decide(found, caller=Caller(owner="next"), kickoffs=1) is Decision.RETURN


async def test_an_end_that_is_seen_after_all_counts_more_than_a_word_that_the_run_is_lost():
    owner = await started()
    await resolve.resolve_lost(await resolve.in_flight("k", RECORDS), RECORDS, look=forgotten)
    lost = await stored()
    assert (lost.phase, lost.state, lost.kickoff_id) == (RecordPhase.ENDED, CrewState.UNKNOWN, "run")
    assert [one.state async for one in RECORDS.all(RecordPhase.ENDED)] == [CrewState.UNKNOWN]
    await completed(owner)
    assert (await stored()).state is CrewState.COMPLETED


async def test_a_run_that_the_crew_knows_at_the_second_look_is_not_lost():
    await started()
    states = iter([CrewState.UNKNOWN, CrewState.RUNNING])

    async def look(kickoff_id: str) -> CrewStatus:
        return CrewStatus(kickoff_id=kickoff_id, state=next(states))

    with pytest.raises(ConfigurationError, match="knows run run: it is running"):
        await resolve.resolve_lost(await resolve.in_flight("k", RECORDS), RECORDS, look=look)
    assert (await stored()).phase is RecordPhase.STARTED


async def test_a_stop_takes_back_no_end_that_was_seen(prefect: SimPrefect):
    owner = await started()
    other = await stored()
    prefect.faults = {f"write@{prefect.counts['write'] + 1}": "slow"}
    answer = StopAnswer(kickoff_id="run", outcome=StopOutcome.STOPPED)
    closing = asyncio.ensure_future(stop.close_stopped(SILENT, CREW, other, answer, RECORDS))
    await asyncio.sleep(0.3)
    await completed(owner)
    await closing
    assert (await stored()).state is CrewState.COMPLETED


async def test_a_stop_that_the_server_confirms_is_the_end():
    record = await started()
    answer = StopAnswer(kickoff_id="run", outcome=StopOutcome.STOPPED)
    await stop.close_stopped(SILENT, CREW, record, answer, RECORDS)
    assert (record.phase, record.state) == (RecordPhase.ENDED, CrewState.STOPPED)
    assert (await stored()).state is CrewState.STOPPED


async def test_a_waiter_that_writes_to_a_verdict_does_not_make_it_the_owners():
    owner = await posting()
    resolver = await stored()
    assert await RECORDS.resolve(resolver, RecordPhase.STARTED, kickoff_id="run")
    waiter = await stored()
    waiter.human_since = utcnow()
    await RECORDS.save(waiter)
    assert not await RECORDS.permit(owner, 30.0), "the owner would send a second kickoff"
    assert (await stored()).human_since == waiter.human_since


async def test_a_permit_that_was_used_is_not_held():
    """Prefect's client sends a request again after a read timeout, maybe once the permit of the first has served."""
    owner = await posting()
    again = owner.model_copy(update={"entries": 0})
    assert await RECORDS.permit(again.model_copy(), 30.0)
    owner.phase, owner.kickoff_id = RecordPhase.STARTED, "run"
    await RECORDS.save(owner)
    assert not await RECORDS.permit(again, 30.0)
