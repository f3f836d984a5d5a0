"""Stopping a run, and answering for a person, from outside of its wait."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest
from prefect import flow

from prefect_crew import (
    AuthenticationError,
    CrewAPIError,
    CrewError,
    CrewRun,
    CrewStoppedError,
    DeployedCrew,
    NotFoundError,
    kickoff_crew,
    resume_crew,
    stop_crew,
)
from prefect_crew.client.models import StopOutcome
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.stop import stop_run
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.held import Held
from support.prefect_server import PrefectServer
from support.proxy import through
from support.scripts import ASKS, slow

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

RECORDS = PrefectRecords()


async def waits(server: Any, run: CrewRun) -> None:
    while str(server.run(run.kickoff_id).state) != "waiting":
        await asyncio.sleep(0.02)


# Stop


async def test_a_stopped_run_is_closed_on_record(crew_server: CrewServerFactory):
    server = crew_server(slow(60))
    run = await server.crew().trigger({})
    answer = await run.stop()
    assert (answer.outcome, answer.accepted) == (StopOutcome.STOPPED, True)
    record = await RECORDS.of_kickoff(run.kickoff_id)
    assert record is not None
    assert (record.phase, record.state) == (RecordPhase.ENDED, CrewState.STOPPED)
    assert record.ended_at is not None
    with pytest.raises(CrewStoppedError):
        await run.wait_for_completion()


async def test_stopping_leaves_the_wait_what_it_needs(crew_server: CrewServerFactory):
    server = crew_server(slow(0.5), stop=False)
    run = await server.crew(secret_inputs=["pin"]).trigger({"pin": "4711471"})
    assert (await run.stop()).outcome is StopOutcome.UNSUPPORTED
    await run.wait_for_completion()
    assert (await run.fetch_result()).output == "done"
    record = await RECORDS.of_kickoff(run.kickoff_id)
    assert record is not None
    assert record.result is not None, "the secret inputs are known to this process, so the result may be kept"


@pytest.mark.parametrize(
    ("script", "options", "outcome"),
    [
        ("echo", {}, StopOutcome.NOT_STOPPABLE),
        (slow(60), {"stop": False}, StopOutcome.UNSUPPORTED),
    ],
    ids=["ended", "no stop"],
)
async def test_what_cannot_be_stopped_is_an_answer_and_changes_nothing(
    crew_server: CrewServerFactory, script: str, options: dict[str, Any], outcome: StopOutcome
):
    server = crew_server(script, **options)
    run = await server.crew().trigger({"text": "a"})
    answer = await run.stop()
    assert (answer.outcome, answer.accepted) == (outcome, False)
    record = await RECORDS.of_kickoff(run.kickoff_id)
    assert record is not None
    assert record.phase is RecordPhase.STARTED


async def test_a_run_that_nobody_knows_is_an_answer(crew_server: CrewServerFactory):
    assert (await CrewRun(crew_server("echo").crew(), "nobody").stop()).outcome is StopOutcome.UNKNOWN_RUN


async def test_a_server_that_cannot_be_asked_is_an_error(crew_server: CrewServerFactory):
    server = crew_server(slow(60), faults=["stop:500"])
    run = await server.crew().trigger({})
    with pytest.raises(CrewAPIError, match="500"):
        await run.stop()
    assert server.requests["stop"] == 1


async def test_stop_and_resume_take_up_a_rotated_token(crew_server: CrewServerFactory):
    server, name = crew_server(Held("draft", "print"), response_format="union"), f"actions-{uuid.uuid4().hex[:8]}"
    await server.crew().asave(name)
    run = await (await DeployedCrew.aload(name)).trigger({})
    await waits(server, run)
    server.token = "the-new-token"
    with pytest.raises(AuthenticationError):
        await run.stop()
    await server.crew().asave(name, overwrite=True)
    assert (await run.resume("fine", approve=True)).status == "resumed"
    assert (await run.stop()).accepted


async def test_a_stop_that_cannot_be_written_down_is_told(
    crew_server: CrewServerFactory, prefect_server: PrefectServer, caplog: pytest.LogCaptureFixture
):
    run = await crew_server(slow(60)).crew().trigger({})

    def refused() -> Any:
        with through(prefect_server) as proxy:
            proxy.refuse = "POST /api/variables/$"
            return asyncio.run(stop_run(run.crew, run.kickoff_id))

    assert (await asyncio.to_thread(refused)).accepted
    assert f"That run {run.kickoff_id} was stopped is not on record" in caplog.text


# Resume


async def test_an_answer_is_for_the_task_that_the_status_names(crew_server: CrewServerFactory):
    server = crew_server(ASKS, response_format="union")
    run = await server.crew().trigger({})
    await waits(server, run)
    assert (await run.resume("shorter", approve=False)).status == "retrying"
    await waits(server, run)
    assert (await run.resume("fine", approve=True, task_id="draft")).status == "resumed"
    await run.wait_for_completion()


@pytest.mark.parametrize("state", ["completed", "unknown"])
async def test_a_run_that_waits_for_nobody_takes_no_answer(crew_server: CrewServerFactory, state: str):
    server = crew_server("echo")
    run = await server.crew().trigger({"text": "a"})
    await run.wait_for_completion()
    if state == "unknown":
        run = CrewRun(server.crew(), "nobody")
    with pytest.raises(CrewError, match=f"does not wait for a person: it is {state}"):
        await run.resume("fine", approve=True)
    assert server.requests["resume"] == 0


async def test_a_task_that_the_status_does_not_name_has_to_be_given(crew_server: CrewServerFactory):
    server = crew_server(ASKS, response_format="live")
    run = await server.crew().trigger({})
    await waits(server, run)
    with pytest.raises(CrewError, match=r"does not name the task\. Give it \(task_id=…, --task\)"):
        await run.resume("fine", approve=True)
    assert (await run.resume("fine", approve=True, task_id="draft")).status == "resumed"


async def test_an_answer_that_the_server_refuses_may_be_given_again(crew_server: CrewServerFactory):
    server = crew_server(ASKS, response_format="union", faults=["resume:404@1"])
    run = await server.crew().trigger({})
    await waits(server, run)
    with pytest.raises(NotFoundError):
        await run.resume("fine", approve=True)
    assert (await run.resume("fine", approve=True)).status == "resumed"


async def test_an_answer_that_may_have_arrived_is_not_sent_again(crew_server: CrewServerFactory):
    server = crew_server(ASKS, response_format="union", faults=["resume:drop@1"])
    run = await server.crew().trigger({})
    await waits(server, run)
    with pytest.raises(CrewError):
        await run.resume("fine", approve=True)
    with pytest.raises(CrewError, match="not sent again on a guess"):
        await run.resume("fine", approve=True)
    assert server.requests["resume"] == 1


# As tasks


def test_both_are_tasks_of_anyones_flow(crew_server: CrewServerFactory):
    server = crew_server(Held("draft", "print"), response_format="union")

    @flow
    def trip() -> list[Any]:
        kickoff_id = kickoff_crew(server.crew())
        while str(server.run(kickoff_id).state) != "waiting":
            time.sleep(0.02)
        return [resume_crew(server.crew(), kickoff_id, approve=True), stop_crew(server.crew(), kickoff_id)]

    resumed, stopped = trip()
    assert (resumed.status, stopped.accepted) == ("resumed", True)
