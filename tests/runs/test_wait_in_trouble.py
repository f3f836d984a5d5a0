"""Waiting for a run under Prefect while something fails: the status call, the token, Prefect's own API."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow

from prefect_crew import (
    AuthenticationError,
    CrewError,
    CrewLostError,
    CrewRun,
    CrewStoppedError,
    CrewTimeoutError,
    DeployedCrew,
    WaitPolicy,
    arun_crew,
    kickoff_crew,
    wait_for_crew,
)
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.store import PrefectRecords
from prefect_crew.testing import CrewServerFactory
from support.held import Held
from support.prefect_server import PrefectServer
from support.proxy import Proxy, through
from support.scripts import ASKS, slow

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

RECORDS = PrefectRecords()
BRIEF = WaitPolicy(initial=0.1, timeout=0.5)


def key() -> str:
    return f"wait {uuid.uuid4()}"


async def ended(run: CrewRun) -> Any:
    await run.wait_for_completion()
    return await run.fetch_result()


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "prefect_crew")


# Trouble with the status call


TROUBLE = [
    "500",
    "503=0.05",
    "429=0.05",
    "429-bare",
    "html",
    "garbage",
    "empty",
    "drop",
    "reset",
    "cut",
    "redirect",
]


@pytest.mark.parametrize("fault", TROUBLE)
async def test_trouble_with_the_status_call_does_not_end_the_wait(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, fault: str
):
    server = crew_server(slow(0.2), faults=[f"status:{fault}@1-3", f"status:{fault}@5"])
    run = await server.crew().trigger({})
    assert (await ended(run)).output == "done"
    assert server.kickoffs == 1
    assert caplog.text.count("This says nothing about the run") <= 2, "no log line a poll"
    assert "the status call answers again" in caplog.text


async def test_a_run_that_is_not_known_at_first_is_waited_for(crew_server: CrewServerFactory):
    run = await crew_server("echo", faults=["kickoff:early-404=3"]).crew().trigger({"text": "a"})
    assert (await ended(run)).output == "a"


async def test_errors_end_the_wait_in_the_end_and_the_run_is_found_again(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server("echo", faults=["status:500"]), key()
    run = await server.crew().trigger({"text": "a"}, idempotency_key=idempotency_key)
    with pytest.raises(CrewError, match="500") as caught:
        await run.wait_for_completion(WaitPolicy(initial=0.1, error_timeout=0.3))
    assert run.kickoff_id in str(caught.value)
    assert f"run again with idempotency key {idempotency_key!r} to wait for it" in str(caught.value)
    server.faults.clear()
    assert (await ended(await server.crew().trigger({"text": "a"}, idempotency_key=idempotency_key))).output == "a"
    assert server.kickoffs == 1


# Tokens


async def test_a_token_that_is_rotated_during_the_wait_is_taken_up(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    server, name = crew_server(slow(60)), f"rotated-{uuid.uuid4().hex[:8]}"
    await asyncio.to_thread(server.crew().save, name)
    run = await (await DeployedCrew.aload(name)).trigger({})
    await asyncio.to_thread(lambda: server.crew(token="the-new-token").save(name, overwrite=True))
    waiting = asyncio.ensure_future(run.wait_for_completion())
    while not server.requests["status"]:
        await asyncio.sleep(0.01)
    server.token = "the-new-token"
    while "has a new token" not in caplog.text:
        await asyncio.sleep(0.01)
    looked = server.requests["status"]
    while server.requests["status"] < looked + 3:
        await asyncio.sleep(0.01)
    assert server.counters.unauthorized == 1
    assert not waiting.done()
    await run.stop()
    with pytest.raises(CrewStoppedError):
        await waiting


async def test_a_refused_token_ends_the_wait_and_keeps_the_run(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(slow(0.3)), key()
    run = await server.crew().trigger({}, idempotency_key=idempotency_key)
    server.token = "the-new-token"
    with pytest.raises(AuthenticationError) as caught:
        await run.wait_for_completion()
    assert caught.value.kickoff_id == run.kickoff_id
    assert (await ended(await server.crew().trigger({}, idempotency_key=idempotency_key))).output == "done"
    assert server.kickoffs == 1


# A Prefect API that is away


@pytest.fixture
def proxy(prefect_server: PrefectServer) -> Iterator[Proxy]:
    with through(prefect_server) as way:
        yield way


async def test_a_prefect_api_that_is_away_for_a_while_does_not_end_the_wait(
    crew_server: CrewServerFactory, proxy: Proxy
):
    held = Held("task_1", "task_2", "task_3")
    server = crew_server(held)

    @flow
    async def trip() -> str:
        return (await arun_crew(server.crew())).output

    running = asyncio.ensure_future(trip())
    while not server.requests["status"]:
        await asyncio.sleep(0.01)
    proxy.cut()
    held.release()
    while not server.runs[0].state.ended:
        await asyncio.sleep(0.01)
    await asyncio.sleep(1.0)  # for what must not happen
    assert not running.done()
    proxy.restore()
    assert await asyncio.wait_for(running, 60) == "done"
    (record,) = [one async for one in RECORDS.all() if one.kickoff_id == server.runs[0].id]
    assert record.phase is RecordPhase.ENDED


async def test_a_run_is_waited_for_although_its_record_cannot_be_read(
    crew_server: CrewServerFactory, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    server = crew_server("echo")
    async with server.crew().client() as client:
        kickoff_id = await client.kickoff({"text": "a"})
    proxy.cut()
    assert (await ended(CrewRun(server.crew(), kickoff_id))).output == "a"
    assert f"The record of run {kickoff_id} could not be read" in caplog.text


async def test_notes_of_who_waits_may_fail(
    crew_server: CrewServerFactory, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    server, idempotency_key = crew_server(slow(0.5)), key()
    await server.crew().trigger({}, idempotency_key=idempotency_key)

    @flow
    async def trip() -> str:
        return (await arun_crew(server.crew(), idempotency_key=idempotency_key)).output

    proxy.refuse = "DELETE /api/variables"
    assert await trip() == "done"
    proxy.refuse = None


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ("PATCH /api/variables", "is not on record"),
        ("POST /api/variables/filter", "could not be read"),
        ("/artifacts", "could not be updated"),
    ],
    ids=["saving", "finding", "showing"],
)
async def test_whatever_prefect_refuses_the_result_is_there(
    crew_server: CrewServerFactory, proxy: Proxy, caplog: pytest.LogCaptureFixture, refused: str, says: str
):
    server = crew_server(slow(0.2))
    run = await server.crew().trigger({})
    run = CrewRun(server.crew(), str(run.kickoff_id))  # as in another process
    proxy.refuse = refused
    assert (await ended(run)).output == "done"
    assert says in caplog.text


async def test_a_persons_turn_that_cannot_be_written_down_is_told(
    crew_server: CrewServerFactory, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    server = crew_server(ASKS, response_format="union")
    run = await server.crew().trigger({})
    proxy.refuse = "PATCH /api/variables"
    with pytest.raises(CrewTimeoutError):
        await run.wait_for_completion(WaitPolicy(initial=0.1, human_timeout=0.3))
    assert f"Whether run {run.kickoff_id} waits for a person is not on record" in caplog.text


async def test_a_wait_that_cannot_join_goes_on(crew_server: CrewServerFactory, proxy: Proxy):
    server, idempotency_key = crew_server(slow(0.5)), key()
    await server.crew().trigger({}, idempotency_key=idempotency_key)

    @flow
    async def trip() -> str:
        kickoff_id = await kickoff_crew(server.crew(), idempotency_key=idempotency_key)
        proxy.refuse = "POST /api/variables/"
        return (await wait_for_crew(server.crew(), kickoff_id)).output

    assert await trip() == "done"


# Runs without a record


async def foreign(crew_server: CrewServerFactory, text: str, **options: Any) -> tuple[Any, CrewRun]:
    """Kick a crew off as somebody else would, who leaves no record."""
    server = crew_server(text, **options)
    async with server.crew().client() as client:
        return server, CrewRun(server.crew(), await client.kickoff({}))


async def test_without_a_record_a_person_is_told_of_as_well(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    _, run = await foreign(crew_server, ASKS, response_format="union")
    with pytest.raises(CrewTimeoutError):
        await run.wait_for_completion(WaitPolicy(initial=0.1, human_timeout=0.3))
    assert "waits for a person" in caplog.text


async def test_without_a_record_a_late_crew_can_be_stopped(crew_server: CrewServerFactory):
    server, run = await foreign(crew_server, slow(60))
    with pytest.raises(CrewTimeoutError, match="It was stopped"):
        await run.wait_for_completion(BRIEF.model_copy(update={"on_timeout": "stop"}))
    assert server.requests["stop"] == 1


async def test_without_a_record_a_loss_is_a_loss(crew_server: CrewServerFactory):
    _, run = await foreign(crew_server, slow(60), faults=["status:forgotten@2"])
    with pytest.raises(CrewLostError, match="last seen running"):
        await run.wait_for_completion()


async def test_without_a_record_a_cancelled_wait_leaves_the_crew_alone(crew_server: CrewServerFactory):
    server, run = await foreign(crew_server, slow(60))
    waiting = asyncio.ensure_future(run.wait_for_completion())
    while not server.requests["status"]:
        await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert server.requests["stop"] == 0
