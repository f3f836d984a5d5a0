"""One answer a round, whoever gives it: function, task, command line, another process, a batch row."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prefect import flow

from prefect_crew import (
    CrewError,
    CrewTimeoutError,
    DeployedCrew,
    Review,
    ReviewRequest,
    WaitPolicy,
    arun_crew,
    kickoff_crew,
    resume_crew,
    wait_for_crew,
)
from prefect_crew.crew import CrewSession
from prefect_crew.records.model import SentReview
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import answer_question, resume_run
from prefect_crew.runs.run import OpenRun
from support.asking import AskingServer
from support.webhooks import served

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")
APPROVED = Review(approve=True)


@asynccontextmanager
async def asking(**options: Any) -> AsyncIterator[tuple[AskingServer, DeployedCrew]]:
    server = AskingServer(**options)
    async with served(server.app()) as url:
        yield server, DeployedCrew(url=url, token="secret-token")


def run_of(crew: DeployedCrew, review: Any = None, retries: int = 0, **policy: Any) -> Any:
    @flow(retries=retries, retry_delay_seconds=0)
    async def reviewed() -> str:
        return (await arun_crew(crew, {}, idempotency_key=crew.url, review=review, wait=WaitPolicy(**policy))).output

    return reviewed()


async def answers(crew: DeployedCrew) -> list[SentReview]:
    return await PrefectRecords().reviews((await PrefectRecords().attempts(crew.url))[-1])


async def _kicked_off(crew: DeployedCrew) -> str:
    @flow
    async def start() -> str:
        return await kickoff_crew(crew, {}, idempotency_key=crew.url)

    return await start()


@pytest.mark.parametrize("shown", [False, True], ids=["output-not-shown", "output-shown"])
async def test_a_sentence_that_changes_is_no_new_question(shown: bool) -> None:
    async with asking(lag=60, changing=True, shown=shown) as (server, crew):
        assert await run_of(crew, lambda _: APPROVED) == "done"
        assert len(server.resumes) == 1


async def test_an_answer_that_arrived_without_a_word_is_not_sent_again_and_the_run_goes_on() -> None:
    asked: list[int] = []

    def judge(request: ReviewRequest) -> Review:
        asked.append(request.round)
        return APPROVED

    async with asking(lag=200, changing=True, fails={1: 500}) as (server, crew):
        with pytest.raises(CrewError, match="not sent again on a guess"):
            await run_of(crew, judge, retries=1)
        record = (await PrefectRecords().attempts(crew.url))[-1]
        with pytest.raises(CrewError, match="not sent again on a guess"):
            await resume_run(crew.crew, str(record.kickoff_id), feedback="", approve=True)
        assert len(server.resumes) == 1
        assert asked == [1], "nobody is asked what could not be answered"
        assert [one.outcome for one in await answers(crew)] == ["uncertain"]
        server.lag = 0
        server._left = 0
        assert await run_of(crew, judge) == "done"
        assert (len(server.resumes), server.kickoffs) == (1, 1)


async def test_once_the_crew_went_on_its_next_question_is_answered_though_the_answer_before_is_uncertain() -> None:
    async with asking(rounds=2, fails={1: 502}) as (server, crew):
        with pytest.raises(CrewError):
            await run_of(crew, lambda _: APPROVED)
        assert await run_of(crew, lambda _: APPROVED) == "done"
        assert len(server.resumes) == 2
        assert [(one.outcome, one.moved_on) for one in await answers(crew)] == [("uncertain", True), ("sent", True)]


async def test_a_function_is_not_asked_again_because_of_time_alone_and_a_person_is() -> None:
    asked: list[int] = []

    def judge(request: ReviewRequest) -> Review:
        asked.append(request.round)
        return APPROVED

    # Nothing but time tells the second question from the first.
    async with asking(rounds=2, between=False) as (server, crew):
        with pytest.raises(CrewTimeoutError):
            await run_of(crew, judge, next_round_after=0.2, human_timeout=3)
        assert (asked, len(server.resumes)) == ([1], 1)
        kickoff_id = str((await PrefectRecords().attempts(crew.url))[-1].kickoff_id)
        patient = DeployedCrew(url=crew.url, token="secret-token")
        with pytest.raises(CrewError, match="still shows the same question"):
            await resume_run(patient.crew, kickoff_id, feedback="", approve=True)
        soon = DeployedCrew(url=crew.url, token="secret-token", wait=WaitPolicy(next_round_after=0.2))
        await resume_run(soon.crew, kickoff_id, feedback="", approve=True)
        assert len(server.resumes) == 2


async def test_a_retried_flow_does_not_answer_the_next_round_with_the_answer_of_the_last() -> None:
    attempts: list[int] = []

    async with asking(rounds=2, shown=True) as (server, crew):

        @flow(retries=1, retry_delay_seconds=0)
        async def answering() -> None:
            attempts.append(1)
            kickoff_id = await kickoff_crew(crew, {}, idempotency_key=crew.url)
            await resume_crew(crew, kickoff_id, approve=True, feedback=f"attempt {len(attempts)}")
            if len(attempts) == 1:
                raise RuntimeError("after the answer")
            await resume_crew(crew, kickoff_id, approve=True, feedback="the second question")
            await wait_for_crew(crew, kickoff_id)

        await answering()
        assert [sent["human_feedback"] for sent in server.resumes] == ["attempt 1", "the second question"]


async def test_of_several_who_answer_at_once_one_does() -> None:
    async with asking(lag=30) as (server, crew):
        kickoff_id = await _kicked_off(crew)
        answered = [resume_run(crew.crew, kickoff_id, feedback=str(n), approve=True) for n in range(5)]
        outcomes = await asyncio.gather(*answered, return_exceptions=True)
        assert len(server.resumes) == 1
        assert sum(isinstance(one, CrewError) for one in outcomes) == 4, outcomes


async def test_a_run_without_a_record_is_answered_once_as_well() -> None:
    async with asking(lag=30) as (server, crew):
        async with crew.client() as client:
            kickoff_id = await client.kickoff({})
        await resume_run(crew.crew, kickoff_id, feedback="", approve=True)
        with pytest.raises(CrewError, match="has its answer on record"):
            await resume_run(crew.crew, kickoff_id, feedback="", approve=True)
        assert len(server.resumes) == 1


async def test_nothing_is_sent_while_the_answers_on_record_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any) -> list[SentReview]:
        raise httpx.ConnectError("away")

    async with asking() as (server, crew):
        kickoff_id = await _kicked_off(crew)
        monkeypatch.setattr(PrefectRecords, "reviews", away)
        with pytest.raises(CrewError, match="Nothing was sent"):
            await resume_run(crew.crew, kickoff_id, feedback="", approve=True)
        assert server.resumes == []


async def test_a_function_is_given_the_meta_of_its_kickoff() -> None:
    seen: list[Any] = []

    def judge(request: ReviewRequest) -> Review:
        seen.append(request.meta)
        return APPROVED

    async with asking() as (_, crew):

        @flow
        async def reviewed() -> None:
            await arun_crew(crew, {}, review=judge, meta={"ticket": 7})

        await reviewed()
    assert seen == [{"ticket": 7}]


async def test_whoever_answers_a_round_that_has_its_answer_is_told() -> None:
    """A form, or a second person, that still shows the round before."""
    async with asking(rounds=2, shown=True) as (server, crew):
        kickoff_id = await _kicked_off(crew)
        run = OpenRun(crew=crew.crew, kickoff_id=kickoff_id, record=(await PrefectRecords().attempts(crew.url))[-1])
        async with CrewSession(crew.crew) as session:
            given = {"by": "Ada", "round": 1}
            await answer_question(run, session, PrefectRecords(), APPROVED, **given)
            with pytest.raises(CrewError, match=r"is at round 2, not 1\. Nothing was sent"):
                await answer_question(run, session, PrefectRecords(), APPROVED, **given)
        assert len(server.resumes) == 1
