"""A flow run that is suspended with its form and begun again: in this process, without a worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import run_flow_async

from prefect_crew import WaitPolicy, arun_crew
from prefect_crew.reviewing import forms
from prefect_crew.server import InProcessCrewServer
from prefect_crew.suspending import standstill
from prefect_crew.suspending.resuming import Attended, attend, resume_once
from prefect_crew.suspending.suspended import SuspendedWaits
from support.scripts import ASKS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api", "instant_polling")]

SUSPEND = WaitPolicy(mode="suspend")


@flow
async def reviewed(url: str) -> str:
    crew = SERVERS[url].crew()
    return (await arun_crew(crew, {}, run_key=url + "#run", wait=SUSPEND, review="form")).output


SERVERS: dict[str, InProcessCrewServer] = {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessCrewServer]:
    monkeypatch.setattr("prefect_crew.reviewing.review_form.LOOK_EVERY", 0.1)
    monkeypatch.setitem(standstill.Standstill.__init__.__kwdefaults__, "see_first", 0.5)
    with InProcessCrewServer(ASKS, dialect="union") as server:
        SERVERS[server.url] = server
        yield server


async def planned(url: str) -> UUID:
    """Make a flow run that has a deployment."""
    async with get_client() as client:
        flow_id = await client.create_flow(reviewed)
        deployment = await client.create_deployment(flow_id, f"here-{uuid4()}")
        return (await client.create_flow_run_from_deployment(deployment, parameters={"url": url})).id


async def read(flow_run_id: UUID) -> FlowRun:
    async with get_client() as client:
        return await client.read_flow_run(flow_run_id)


async def begun(flow_run_id: UUID) -> State[Any]:
    """Begin a flow run, and return the state in which its process would end."""
    standstill._standstills.clear()  # of what this process has seen, as if it were a new one
    flow_run = await read(flow_run_id)
    try:
        await asyncio.wait_for(run_flow_async(reviewed, flow_run=flow_run, parameters=flow_run.parameters), 60)
    except BaseException as signal:
        if type(signal).__name__ != "Pause":
            raise
    state = (await read(flow_run_id)).state
    assert state is not None
    return state


async def fill_in(flow_run_id: UUID, **fields: str) -> str:
    async with get_client() as client:
        answer = await client.request(
            "POST", "/flow_runs/{id}/resume", path_params={"id": flow_run_id}, json={"run_input": fields}
        )
    return answer.json()["status"]


async def looked_after(server: InProcessCrewServer) -> list[Attended]:
    """Do what a sweep does about the run."""
    waits = await SuspendedWaits().of(f"{server.url}#run", 1)

    async def load(_: Any) -> Any:
        return server.crew()

    return list((await attend(waits, load=load)).values())


async def brought_back(server: InProcessCrewServer) -> None:
    """Wait until a sweep brings the suspended flow run back."""
    until = time.monotonic() + 60
    while (found := await looked_after(server)) != [Attended.RESUMED]:
        assert time.monotonic() < until, f"it is not brought back: {found}, its crew is {server.runs[0].state}"
        await asyncio.sleep(0.1)


# On a busy machine a flow run is suspended once more while its crew prints.


async def asked(flow_run_id: UUID, server: InProcessCrewServer) -> State[Any]:
    """Begin a flow run until it is suspended with a form, and return that state."""
    while not (state := await begun(flow_run_id)).state_details.run_input_keyset:
        assert state.name == "Suspended"
        await brought_back(server)
    return state


async def ended(flow_run_id: UUID, server: InProcessCrewServer) -> str | None:
    """Begin a flow run until it has ended."""
    while (state := await begun(flow_run_id)).name == "Suspended":
        await brought_back(server)
    return state.name


async def test_it_asks_and_goes_on_with_the_answer(server: InProcessCrewServer):
    flow_run_id = await planned(server.url)
    state = await asked(flow_run_id, server)
    assert state.name == "Suspended"
    assert await forms.shown_with(state, str(flow_run_id))
    assert await looked_after(server) == [Attended.PERSON]
    assert await fill_in(flow_run_id) == "REJECT"
    assert await fill_in(flow_run_id, decision="approve", name="Ada") == "ACCEPT"
    assert await ended(flow_run_id, server) == "Completed"
    assert [server.requests["resume"], server.kickoffs] == [1, 1]
    assert await looked_after(server) == []


async def test_it_is_brought_back_without_an_answer_and_asks_again(server: InProcessCrewServer):
    flow_run_id = await planned(server.url)
    first = await asked(flow_run_id, server)
    assert await resume_once(str(flow_run_id)) is Attended.RESUMED
    assert await resume_once(str(flow_run_id)) is Attended.NOT_YET
    again = await asked(flow_run_id, server)
    assert again.name == "Suspended"
    assert again.state_details.pause_key != first.state_details.pause_key
    assert again.state_details.run_input_keyset == first.state_details.run_input_keyset
    assert await fill_in(flow_run_id) == "REJECT", "a decision is required again"
    assert await fill_in(flow_run_id, decision="reject", feedback="Warmer.") == "ACCEPT"
    await asked(flow_run_id, server)
    assert await fill_in(flow_run_id, decision="approve") == "ACCEPT"
    assert await ended(flow_run_id, server) == "Completed"
    assert [server.requests["resume"], server.kickoffs] == [2, 1]


async def test_a_form_that_is_missing_is_put_up_by_whoever_looks_after_it(server: InProcessCrewServer):
    flow_run_id = await planned(server.url)
    state = await asked(flow_run_id, server)
    async with get_client() as client:
        await client.delete_flow_run_input(flow_run_id, (state.state_details.run_input_keyset or {})["schema"])
    assert not await forms.shown_with(state, str(flow_run_id))
    assert await looked_after(server) == [Attended.RESUMED]
    state = await asked(flow_run_id, server)
    assert await forms.shown_with(state, str(flow_run_id))
    assert await looked_after(server) == [Attended.PERSON]


async def test_an_answer_that_came_too_late_is_taken_away(
    server: InProcessCrewServer, caplog: pytest.LogCaptureFixture
):
    flow_run_id = await planned(server.url)
    await asked(flow_run_id, server)
    async with server.crew().client() as client:
        run = server.runs[0]
        await client.resume(run.id, "draft", "", True)
    assert await fill_in(flow_run_id, decision="reject") == "ACCEPT"
    assert await ended(flow_run_id, server) == "Completed"
    assert "an answer in the form (reject) was not needed" in caplog.text
    assert server.requests["resume"] == 1
    async with get_client() as client:
        left = await client.filter_flow_run_input(flow_run_id, "crew-review-", limit=10, exclude_keys=set())
    assert left == []
