"""Answering for a person from outside of the wait, by the task or by `CrewRun.resume`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prefect_crew import CrewError, CrewRun, NotFoundError
from prefect_crew.testing import CrewServerFactory
from support.scripts import ASKS

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


async def waits(server: Any, run: CrewRun) -> None:
    while str(server.run(run.kickoff_id).state) != "waiting":
        await asyncio.sleep(0.02)


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
