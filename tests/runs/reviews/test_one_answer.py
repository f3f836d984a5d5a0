"""One answer a round, whoever gives it: function, task, command line, another process, a batch row."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

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
from prefect_crew.client.models import CrewStatus
from prefect_crew.records.model import SentReview, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.actions import resume_run
from prefect_crew.runs.reviews.answer import Standing, _mark_of, asked_of, standing_of
from prefect_crew.states import CrewState
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


async def _kicked_off(crew: DeployedCrew) -> str:
    @flow
    async def start() -> str:
        return await kickoff_crew(crew, {}, idempotency_key=crew.url)

    return await start()


async def test_a_run_without_a_record_is_answered_once_as_well() -> None:
    async with asking(lag=30) as (server, crew):
        async with crew.client() as client:
            kickoff_id = await client.kickoff({})
        await resume_run(crew.crew, kickoff_id, feedback="", approve=True)
        with pytest.raises(CrewError, match="has its answer on record"):
            await resume_run(crew.crew, kickoff_id, feedback="", approve=True)
        assert len(server.resumes) == 1


async def test_nothing_is_sent_while_the_answers_on_record_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

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


# What tells one question from the next.


def waiting(**fields: Any) -> CrewStatus:
    raw = {"state": "PENDING_HUMAN_INPUT", **{key: value for key, value in fields.items() if key == "task_output"}}
    known = {key: value for key, value in fields.items() if key != "task_output"}
    return CrewStatus(kickoff_id="k", state=CrewState.WAITING, human_task_id="draft", raw=raw, **known)


def test_a_question_is_known_by_its_task_and_what_is_to_be_judged() -> None:
    assert asked_of(waiting(message="1 s", last_step="a")) is None
    first = asked_of(waiting(message="1 s", last_step="a", task_output="text"))
    assert first == asked_of(waiting(message="2 s", last_step="b", task_output="text"))
    assert first != asked_of(waiting(task_output="another"))


NOW = utcnow()
"""When the cases below are looked at: they are made when this module is loaded, which may be long before they run."""


def sent(**fields: Any) -> SentReview:
    at = NOW - timedelta(seconds=fields.pop("age", 1))
    given = {
        "task_id": "draft",
        "round": 1,
        "approve": True,
        "by": "Ada",
        "outcome": "sent",
        "shown_mark": _mark_of("draft"),
    }
    return SentReview(**{**given, "at": at, **fields})


CASES: dict[str, tuple[list[SentReview], dict[str, Any], Standing]] = {
    "nobody has answered": ([], {}, Standing.OPEN),
    "the same, a moment ago": ([sent()], {}, Standing.ANSWERED),
    "the same, long ago": ([sent(age=400)], {}, Standing.BY_TIME),
    "the same, long ago, for whom time tells nothing": ([sent(age=9e6)], {"next_round_after": None}, Standing.ANSWERED),
    "another output": ([sent(asked="a")], {"asked": "b"}, Standing.OPEN),
    "an output that came to be shown": ([sent()], {"asked": "b"}, Standing.ANSWERED),
    "an output that is not shown any more": ([sent(asked="a")], {}, Standing.ANSWERED),
    "another task": ([sent()], {"task": "print"}, Standing.OPEN),
    "a task that is not named": ([sent()], {"task": None}, Standing.ANSWERED),
    "answered under a name of the caller's": ([sent(task_id="7f3a")], {}, Standing.ANSWERED),
    "another state in between": ([sent(moved_on=True)], {}, Standing.OPEN),
    "a webhook of the next one": ([sent()], {"told": True}, Standing.OPEN),
    "uncertain, long ago": ([sent(outcome="uncertain", age=9e6)], {}, Standing.UNCERTAIN),
    "being sent, or its sender died": ([sent(outcome="intended", age=9e6)], {}, Standing.UNCERTAIN),
    "uncertain, and another output": ([sent(outcome="uncertain", asked="a")], {"asked": "b"}, Standing.OPEN),
    "uncertain, and another state in between": ([sent(outcome="uncertain", moved_on=True)], {}, Standing.OPEN),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_how_a_question_stands_to_the_answers_on_record(case: tuple[Any, dict[str, Any], Standing]) -> None:
    before, given, expected = case
    facts: dict[str, Any] = {"task": "draft", "asked": None, "next_round_after": 300.0, **given}
    assert standing_of(before, facts.pop("task"), facts.pop("asked"), now=NOW, **facts) is expected
