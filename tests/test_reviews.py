from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prefect import flow

from prefect_crew import (
    CrewError,
    DeployedCrew,
    Review,
    ReviewRequest,
    arun_crew,
    kickoff_crew,
    resume_crew,
    wait_for_crew,
)
from prefect_crew.record_store import PrefectRecords
from prefect_crew.server import CrewScript, InProcessCrewServer

SCRIPT = CrewScript.model_validate(
    {
        "name": "reviewed",
        "inputs": [],
        "tasks": [{"name": "draft", "agent": "Writer", "human": True, "output": "Draft. {{ feedback }}"}],
    }
)
pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


def crew_of(server: InProcessCrewServer) -> DeployedCrew:
    return DeployedCrew(url=server.url, token=server.token)


@pytest.mark.parametrize("dialect", ["documented", "union", "live"])
async def test_a_function_answers_each_round_once(dialect: str) -> None:
    asked: list[ReviewRequest] = []

    async def judge(request: ReviewRequest) -> Review:
        asked.append(request)
        return Review(approve=request.round > 1, feedback=f"round {request.round}")

    with InProcessCrewServer(SCRIPT, dialect=dialect) as server:

        @flow
        async def reviewed() -> tuple[str, str]:
            result = await arun_crew(crew_of(server), {}, review=judge)
            return result.kickoff_id, result.output

        if dialect == "live":  # its status names no task: nothing can be answered, so nothing is
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(reviewed(), 3)
            assert server.requests["resume"] == 0
            return
        kickoff_id, _ = await asyncio.wait_for(reviewed(), 60)
        assert [request.round for request in asked] == [1, 2]
        assert server.requests["resume"] == 2
        assert server.kickoffs == 1
        record = await PrefectRecords().of_kickoff(kickoff_id)
        assert record is not None
        assert [
            (sent.round, sent.approve, sent.outcome, sent.by) for sent in await PrefectRecords().reviews(record)
        ] == [
            (1, False, "sent", "judge"),
            (2, True, "sent", "judge"),
        ]


async def test_an_answer_that_may_have_arrived_is_not_sent_again() -> None:
    with InProcessCrewServer(SCRIPT, faults=["resume:drop-before-accept@1"]) as server:

        @flow
        async def reviewed() -> str:
            return (
                await arun_crew(crew_of(server), {}, review=lambda _: Review(approve=True), run_key=server.url)
            ).output

        with pytest.raises(CrewError):
            await reviewed()
        with pytest.raises(CrewError, match="not sent again on a guess"):
            await reviewed()
        assert server.requests["resume"] == 1
        assert server.kickoffs == 1


async def test_a_person_answers_by_task_while_the_wait_goes_on() -> None:
    with InProcessCrewServer(SCRIPT) as server:
        crew = crew_of(server)

        @flow
        async def asked() -> str:
            kickoff_id = await kickoff_crew(crew, {})
            waiting = asyncio.ensure_future(wait_for_crew(crew, kickoff_id))
            await asyncio.sleep(0.5)
            await resume_crew(crew, kickoff_id, approve=True, feedback="fine")
            return (await waiting).output

        assert "Draft" in await asked()


async def test_what_is_no_review_is_refused_before_it_is_sent() -> None:
    with InProcessCrewServer(SCRIPT) as server:

        @flow
        async def reviewed(answer: Any = None) -> str:
            return (await arun_crew(crew_of(server), {}, review=lambda _: True)).output  # type: ignore[arg-type, return-value]

        with pytest.raises(CrewError, match="not a Review"):
            await reviewed()
        assert server.requests["resume"] == 0
