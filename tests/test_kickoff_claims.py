"""Opening a run whose key has a claim already, or whose caller or Prefect API goes away in the middle."""

from __future__ import annotations

import asyncio
import logging
import signal
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.exceptions import TerminationSignal

from prefect_crew import DeployedCrew, posting, purchases, record_store, records
from prefect_crew.api.errors import (
    CrewError,
    KickoffUncertainError,
)
from prefect_crew.api.inputs import inputs_digest
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import Caller, RecordPhase, RunRecord, utcnow
from prefect_crew.run_keys import RunIdentity
from prefect_crew.server.local import InProcessCrewServer
from prefect_crew.sessions import CrewSession
from prefect_crew.testing import CrewServerFactory
from support.prefect_server import PrefectServer
from support.proxy import Proxy, through

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

RECORDS = PrefectRecords()


def key() -> str:
    return f"kickoff {uuid.uuid4()}"


async def attempts(run_key: str) -> list[RunRecord]:
    return [*await RECORDS.attempts(run_key)]


async def phases(run_key: str) -> list[RecordPhase]:
    return [record.phase for record in await attempts(run_key)]


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "prefect_crew")


# Claims of others


async def claim(run_key: str, crew: DeployedCrew, **fields: Any) -> RunRecord:
    """Claim a run with the input text: a, as somebody else."""
    now = utcnow()
    known: dict[str, Any] = {"claimed_at": now, "known_by": now + timedelta(seconds=60), "owner": "somebody else"}
    record = RunRecord(
        run_key=run_key,
        attempt=1,
        crew=crew.label,
        crew_url=crew.url,
        inputs_digest=inputs_digest({"text": "a"}),
        **known | fields,
    )
    assert await RECORDS.claim(record)
    return record


async def test_who_finds_a_claim_waits_for_its_id(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo"), key()
    standing = await claim(run_key, server.crew())
    finding = asyncio.ensure_future(server.crew().trigger({"text": "a"}, run_key=run_key))
    done, _ = await asyncio.wait({finding}, timeout=0.5)
    assert not done
    standing.phase, standing.kickoff_id, standing.kicked_off_at = RecordPhase.STARTED, "theirs", utcnow()
    await RECORDS.save(standing)
    assert (await finding).kickoff_id == "theirs"


async def test_who_waits_for_a_claim_buys_where_it_was_given_back(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo"), key()
    standing = await claim(run_key, server.crew())
    finding = asyncio.ensure_future(server.crew().trigger({"text": "a"}, run_key=run_key))
    await asyncio.sleep(0.3)
    standing.phase = RecordPhase.NOT_STARTED
    await RECORDS.save(standing)
    assert (await finding).kickoff_id in {run.id for run in server.runs}
    assert await phases(run_key) == [RecordPhase.NOT_STARTED, RecordPhase.STARTED]


async def test_a_claim_whose_time_is_up_is_uncertain(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo"), key()
    await claim(run_key, server.crew(), known_by=utcnow() + timedelta(seconds=0.3))
    with pytest.raises(KickoffUncertainError, match="ended before its answer was written down"):
        await server.crew().trigger({"text": "a"}, run_key=run_key)
    assert server.requests["kickoff"] == 0


async def test_a_claim_of_a_flow_run_that_is_gone_is_uncertain_at_once(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo"), key()
    await claim(run_key, server.crew(), flow_run_id=str(uuid.uuid4()))
    with pytest.raises(KickoffUncertainError):
        await asyncio.wait_for(server.crew().trigger({"text": "a"}, run_key=run_key), 20)


# Claims that grew old before their kickoff was sent


@pytest.fixture
def old_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every claim is as old, when it has been made, as after a long sleep of the machine."""
    make = posting.Purchase.record

    def old(purchase: posting.Purchase, attempt: int, *, delay: float = 0.0) -> records.RunRecord:
        record = make(purchase, attempt, delay=delay)
        record.known_by = utcnow() - timedelta(seconds=1)
        return record

    monkeypatch.setattr(posting.Purchase, "record", old)


async def settled(crew_server: CrewServerFactory, **fields: Any) -> tuple[Any, Any]:
    """Kick a crew off, and settle the claim while its inputs are checked."""
    server, run_key = crew_server("echo", faults=["inputs:latency=1"]), key()
    calling = asyncio.ensure_future(server.crew().trigger({"text": "a"}, run_key=run_key))
    while not server.requests["inputs"]:
        await asyncio.sleep(0.01)
    (standing,) = await attempts(run_key)
    for name, value in fields.items():
        setattr(standing, name, value)
    await RECORDS.save(standing)
    try:
        return (await calling).kickoff_id, server
    except CrewError as error:
        return error, server


@pytest.mark.usefixtures("old_claims")
async def test_an_old_claim_that_still_stands_is_used(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo", faults=["kickoff:429=0.1@1"]), key()
    await server.crew().trigger({"text": "a"}, run_key=run_key)
    assert (server.requests["kickoff"], server.kickoffs) == (2, 1)


@pytest.mark.usefixtures("old_claims")
async def test_an_old_claim_of_an_uncertain_kickoff_says_so(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo", faults=["kickoff:500"]), key()
    with pytest.raises(KickoffUncertainError):
        await server.crew().trigger({"text": "a"}, run_key=run_key)
    assert await phases(run_key) == [RecordPhase.UNCERTAIN]


@pytest.mark.usefixtures("old_claims")
async def test_an_old_claim_that_was_settled_meanwhile_is_not_posted(crew_server: CrewServerFactory):
    started, server = await settled(
        crew_server, phase=RecordPhase.STARTED, kickoff_id=f"theirs {uuid.uuid4()}", kicked_off_at=utcnow()
    )
    assert str(started).startswith("theirs ")
    assert server.requests["kickoff"] == 0
    doubtful, server = await settled(crew_server, phase=RecordPhase.UNCERTAIN, reason="somebody looked")
    assert isinstance(doubtful, KickoffUncertainError)
    assert server.requests["kickoff"] == 0


@pytest.mark.usefixtures("old_claims")
async def test_claims_that_are_lost_again_and_again_end_in_an_error(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(purchases, "LIMITED_FOR", 0.5)
    server, run_key = crew_server("echo", faults=["inputs:latency=0.3"]), key()
    calling = asyncio.ensure_future(server.crew().trigger({"text": "a"}, run_key=run_key))
    while not calling.done():
        for standing in await attempts(run_key):
            if standing.phase is RecordPhase.CLAIMED:
                standing.phase = RecordPhase.NOT_STARTED
                await RECORDS.save(standing)
        await asyncio.sleep(0.01)
    with pytest.raises(CrewError, match="each claim of it has grown old"):
        await calling
    assert server.requests["inputs"] >= 2
    assert server.requests["kickoff"] == 0


# Where nothing more is to be bought


async def only_found(server: Any, run_key: str) -> purchases.Purchased:
    crew = server.crew()
    purchase = posting.Purchase(
        crew=crew,
        identity=RunIdentity(run_key=run_key, place="here", caller=Caller(owner=str(uuid.uuid4()))),
        inputs={"text": "a"},
        digest=inputs_digest({"text": "a"}),
        name=None,
        meta=None,
        webhooks=None,
        quiet=True,
    )
    async with CrewSession(crew) as session:
        return await purchases.purchase_run(purchase, RECORDS, session, problem=CrewError("the budget is spent"))


async def test_what_runs_or_is_done_is_found_and_nothing_is_bought(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo"), key()
    with pytest.raises(CrewError, match="the budget is spent"):
        await only_found(server, run_key)
    run = await server.crew().trigger({"text": "a"}, run_key=run_key)
    found = await only_found(server, run_key)
    assert (found.record.kickoff_id, found.bought) == (run.kickoff_id, False)
    assert server.kickoffs == 1


# Cancelled callers


async def cancelled_at(request: str, server: InProcessCrewServer, run_key: str) -> None:
    """Cancel a call shortly after the server got a request of it."""
    calling = asyncio.ensure_future(server.crew().trigger({"text": "a"}, run_key=run_key))
    while not server.requests[request]:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


async def test_a_kickoff_in_flight_is_seen_to_its_end_although_its_caller_is_cancelled(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    server, run_key = crew_server("echo", faults=["kickoff:latency=1.0@1"]), key()
    await cancelled_at("kickoff", server, run_key)
    (record,) = await attempts(run_key)
    assert (record.phase, record.kickoff_id) == (RecordPhase.STARTED, server.runs[0].id)
    assert "is left running" in caplog.text
    assert server.requests["stop"] == 0
    found = await server.crew().trigger({"text": "a"}, run_key=run_key)
    assert found.kickoff_id == record.kickoff_id


async def test_a_refused_kickoff_of_a_cancelled_caller_did_not_start(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo", faults=["kickoff:latency=1.0@1", "kickoff:404@1"]), key()
    await cancelled_at("kickoff", server, run_key)
    assert await phases(run_key) == [RecordPhase.NOT_STARTED]


async def test_an_uncertain_kickoff_of_a_cancelled_caller_is_uncertain(crew_server: CrewServerFactory):
    server, run_key = crew_server("echo", faults=["kickoff:latency=1.0@1", "kickoff:500@1"]), key()
    await cancelled_at("kickoff", server, run_key)
    assert await phases(run_key) == [RecordPhase.UNCERTAIN]


@pytest.mark.parametrize(
    ("fault", "request_of_it"),
    [("inputs:latency=30", "inputs"), ("kickoff:429=30", "kickoff")],
    ids=["at the check", "in a pause"],
)
async def test_a_caller_that_is_cancelled_before_its_kickoff_gives_the_claim_back(
    crew_server: CrewServerFactory, fault: str, request_of_it: str
):
    server, run_key = crew_server("echo", faults=[fault]), key()
    await cancelled_at(request_of_it, server, run_key)
    assert await phases(run_key) == [RecordPhase.NOT_STARTED]
    assert server.kickoffs == 0


async def test_a_post_that_does_not_end_is_not_waited_for_for_ever(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(posting, "FINISH", 0.2)
    server, run_key = crew_server("echo", faults=["kickoff:timeout"]), key()
    await asyncio.wait_for(cancelled_at("kickoff", server, run_key), 10)
    assert await phases(run_key) == [RecordPhase.CLAIMED]


async def test_a_signal_in_the_midst_of_a_kickoff_is_not_taken_for_a_refusal(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    async def interrupted(*_: Any) -> None:
        raise TerminationSignal(signal.SIGTERM)

    monkeypatch.setattr(posting, "_keep_claim", interrupted)
    server, run_key = crew_server("echo"), key()
    with pytest.raises(TerminationSignal):
        await server.crew().trigger({"text": "a"}, run_key=run_key)
    assert await phases(run_key) == [RecordPhase.CLAIMED]


# A Prefect API that is away


@pytest.fixture
def proxy(prefect_server: PrefectServer) -> Iterator[Proxy]:
    with through(prefect_server) as way:
        yield way


async def test_nothing_is_sent_where_no_claim_can_be_written(crew_server: CrewServerFactory, proxy: Proxy):
    server = crew_server("echo")
    proxy.cut()
    with pytest.raises(httpx.HTTPError):
        await server.crew().trigger({"text": "a"}, run_key=key())
    assert not server.requests


async def test_an_id_that_cannot_be_written_down_is_told_with_what_to_do(
    crew_server: CrewServerFactory,
    proxy: Proxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setattr(record_store, "SAVE_FOR", 0.5)
    server, run_key = crew_server("echo", faults=["kickoff:latency=1.0"]), key()
    calling = asyncio.ensure_future(server.crew().trigger({"text": "a"}, run_key=run_key))
    while not server.requests["kickoff"]:
        await asyncio.sleep(0.01)
    proxy.cut()
    run = await calling
    assert f"prefect-crew runs settle '{run_key}' --kickoff-id {run.kickoff_id}" in caplog.text
    assert "has no artifact" in caplog.text
    proxy.restore()
    assert await phases(run_key) == [RecordPhase.CLAIMED]


async def test_a_kickoff_costs_the_prefect_api_two_requests_and_the_end_one(
    crew_server: CrewServerFactory, proxy: Proxy
):
    server = crew_server("echo")
    run = await server.crew().trigger({"text": "a"}, run_key=key())
    made = [request.rpartition("/")[0] for request in proxy.requests if "/variables" in request]
    assert made == ["POST /api/variables", "PATCH /api/variables/name"]
    await run.wait_for_completion()
    assert proxy.count("/variables") == 3
    assert proxy.count("/flow_runs") == proxy.count("/task_runs") == 0


async def test_a_claim_that_cannot_be_kept_fresh_is_used_all_the_same(
    crew_server: CrewServerFactory, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    server, run_key = crew_server("echo", faults=["kickoff:429=0.2@1"]), key()
    proxy.refuse = "PATCH /api/variables"
    run = await server.crew().trigger({"text": "a"}, run_key=run_key)
    assert f"Others may take the claim of run {run_key} for given up" in caplog.text
    assert f"--kickoff-id {run.kickoff_id}" in caplog.text
    assert server.kickoffs == 1
