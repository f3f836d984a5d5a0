"""One answer a round, whoever gives it: function, task, command line, another process, a batch row."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from prefect import flow
from starlette.applications import Starlette
from starlette.routing import Mount

import prefect_crew as pc
from prefect_crew._internal.clock import utcnow
from prefect_crew.blocks import crew_of
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import in_store
from prefect_crew.runs.reviews import answer as answer_module
from prefect_crew.runs.reviews import questions as questions_module
from prefect_crew.runs.reviews.answer import list_open_questions, resume_run
from prefect_crew.runs.run import LiveRun
from prefect_crew.store import attempts, questions
from prefect_crew.tasks import kickoff_crew, resume_crew, wait_for_crew
from prefect_crew.testing import CrewServerFactory
from prefect_crew.webhooks import read_token
from support.asking import AskingServer, judging
from support.flow_runs import acall_in_flow
from support.links import answers_of
from support.scripts import script
from support.waiting import soon, until
from support.webhooks import SECRET, served

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")
APPROVED = pc.Review(approve=True)
DAY = 86_400.0


@asynccontextmanager
async def asking(**options: Any) -> AsyncIterator[tuple[AskingServer, pc.DeployedCrew]]:
    server = AskingServer(**options)
    # The URL is the key of runs, and a later server may get the port.
    async with served(Starlette(routes=[Mount(f"/{server.run_id}", server.app())])) as url:
        yield server, pc.DeployedCrew(url=f"{url}/{server.run_id}", token="secret-token")


def run_of(crew: pc.DeployedCrew, review: Any = None, retries: int = 0, **policy: Any) -> Any:
    @flow(retries=retries, retry_delay_seconds=0)
    async def reviewed() -> str:
        options = {"idempotency_key": crew.url, "meta": {"ticket": 7}, "wait": pc.WaitPolicy(**policy)}
        return (await pc.arun_crew(crew, {}, review=review, **options)).output

    return reviewed()


async def _kicked_off(crew: pc.DeployedCrew) -> str:
    return (await acall_in_flow(lambda: kickoff_crew(crew, {}, idempotency_key=crew.url)))[1]


async def approve(crew: pc.DeployedCrew, kickoff_id: str | None = None, feedback: str = "") -> Any:
    """Approve the question of a run, by default that of the only run, from outside of its wait."""
    kickoff_id = kickoff_id or str((await in_store(attempts.of_key, crew.url))[-1].kickoff_id)
    return await resume_run(LiveRun(crew_of(crew), kickoff_id), feedback=feedback, approve=True)


async def test_an_uncertain_answer_is_not_sent_again() -> None:
    asked: list[pc.ReviewRequest] = []
    async with asking(lag=200, changing=True, fails={1: 500}) as (server, crew):
        with pytest.raises(pc.CrewError, match="not sent again automatically"):
            await run_of(crew, judging(asked), retries=1)
        with pytest.raises(pc.CrewError, match="not sent again automatically"):
            await approve(crew)
        assert len(server.resumes) == 1
        assert len(asked) == 1, "nobody is asked what could not be answered"
        assert [one.outcome for one in await answers_of(crew.url)] == ["uncertain"]
        server.lag = server._left = 0
        assert await run_of(crew, judging(asked)) == "done"
        assert len(server.resumes) == 1
        assert server.kickoffs == 1


async def test_the_question_after_an_uncertain_answer() -> None:
    async with asking(rounds=2, fails={1: 502}) as (server, crew):
        with pytest.raises(pc.CrewError):
            await run_of(crew, lambda _: APPROVED)
        assert await run_of(crew, lambda _: APPROVED) == "done"
        assert len(server.resumes) == 2
        assert [one.outcome for one in await answers_of(crew.url)] == ["sent", "sent"], "the first one arrived"


async def test_time_alone_makes_no_question_after_an_approval() -> None:
    asked: list[pc.ReviewRequest] = []
    # Nothing but time tells the second question from the first.
    async with asking(rounds=2, between=False) as (server, crew):
        with pytest.raises(pc.CrewTimeoutError):
            await run_of(crew, judging(asked), human_timeout=3)
        assert [(one.round, one.meta) for one in asked] == [(1, {"ticket": 7})]
        soon = pc.DeployedCrew(url=crew.url, token="secret-token", wait=pc.WaitPolicy(next_round_after=0.2))
        for same in (crew, soon):
            with pytest.raises(pc.NotWaitingError, match="still shows the same question"):
                await approve(same)
        assert len(server.resumes) == 1


async def test_a_repeated_question_is_the_next_round() -> None:
    asked: list[pc.ReviewRequest] = []
    async with asking(rounds=2, between=False) as (server, crew):
        assert await run_of(crew, judging(asked, approves_at=2), next_round_after=1.0) == "done"
        assert [one.round for one in asked] == [1, 2]
        assert [one["is_approve"] for one in server.resumes] == [False, True]


async def test_a_retried_flow_answers_each_round_once() -> None:
    tries: list[int] = []

    async with asking(rounds=2, shown=True) as (server, crew):

        @flow(retries=1, retry_delay_seconds=0)
        async def answering() -> None:
            tries.append(1)
            kickoff_id = await kickoff_crew(crew, {}, idempotency_key=crew.url)
            await resume_crew(crew, kickoff_id, approve=True, feedback=f"attempt {len(tries)}")
            if len(tries) == 1:
                raise RuntimeError("after the answer")
            await resume_crew(crew, kickoff_id, approve=True, feedback="the second question")
            await wait_for_crew(crew, kickoff_id)

        await answering()
        assert [sent["human_feedback"] for sent in server.resumes] == ["attempt 1", "the second question"]


async def test_one_of_several_answers_is_sent() -> None:
    async with asking(lag=30) as (server, crew):
        await _kicked_off(crew)
        answered = [approve(crew, None, str(number)) for number in range(5)]
        outcomes = await asyncio.gather(*answered, return_exceptions=True)
        assert len(server.resumes) == 1
        assert sum(isinstance(one, pc.CrewError) for one in outcomes) == 4, outcomes


# What a reviewer sees of a question whose status shows nothing: what the webhook brought, else where to look

SCRIPT = script({"name": "draft", "human": True, "output": "Draft {{ round }} on {{ topic }}."}, inputs=["topic"])
PAGE = "https://app.example.com/crews/7"


@pytest.fixture
def judged(crew_server: CrewServerFactory) -> CrewServer:
    return crew_server(SCRIPT)


async def reviewed(crew: pc.DeployedCrew, review: Any, key: str, **policy: Any) -> None:
    options = {"idempotency_key": key, "review": review, "wait": pc.WaitPolicy(**policy)}
    await acall_in_flow(lambda: pc.arun_crew(crew, {"topic": "tea"}, **options))


async def test_a_function_sees_the_webhooks_output(receiver: str, judged: CrewServer, key: str) -> None:
    asked: list[pc.ReviewRequest] = []
    await reviewed(judged.crew(), judging(asked, approves_at=2, feedback="again"), key)
    assert [one.output for one in asked] == ["Draft 1 on tea.", "Draft 2 on tea."]


@pytest.mark.parametrize("secret", [(), ("topic",)], ids=["not secret", "secret"])
async def test_secret_inputs_keep_no_webhook_output(receiver: str, judged: CrewServer, key: str, secret: Any) -> None:
    crew = judged.crew(secret_inputs=secret)
    with pytest.raises(pc.CrewTimeoutError):
        await reviewed(crew, None, key, human_timeout=8)
    ((_, question),) = await list_open_questions()
    assert question.output == (None if secret else "Draft 1 on tea.")


async def test_webhooks_live_as_long_as_the_policy_of_the_run(receiver: str) -> None:
    long = {"timeout": 7 * DAY, "human_timeout": 14 * DAY}
    async with asking() as (server, crew):
        await run_of(crew, lambda _: APPROVED, **long)
    async with asking() as (elsewhere, other):
        await approve(other, await _kicked_off(other))  # it does not know the policy
    for body in (*server.starts, *server.resumes, *elsewhere.resumes):
        hook = read_token("crew", body["crewWebhookUrl"].rpartition("/")[2], SECRET, now=utcnow())
        assert hook is not None
        assert hook.expires - utcnow() > timedelta(days=21)


async def test_an_answer_that_ends_webhooks_says_so(receiver: str, monkeypatch: Any, caplog: Any) -> None:
    async with asking(rounds=2) as (server, crew):
        id_ = await _kicked_off(crew)
        await approve(crew, id_)
        assert "no webhooks" not in caplog.text
        monkeypatch.delenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL")
        await approve(crew, id_)
    assert ["crewWebhookUrl" in body for body in server.resumes] == [True, False]
    assert f"After this answer run {id_} sends no webhooks" in caplog.text


@pytest.mark.parametrize("is_shown", [False, True])
async def test_the_log_says_where_the_output_is(crew_server: Any, key: str, is_shown: bool, caplog: Any) -> None:
    server = crew_server(SCRIPT if is_shown else script({"name": "draft", "human": True}))
    with pytest.raises(pc.CrewTimeoutError):
        await reviewed(server.crew(page_url=PAGE), None, key, human_timeout=0.3)
    (said,) = [one.getMessage() for one in caplog.records if "waits for a person: task draft" in one.getMessage()]
    assert (f"Look at the crew's page: {PAGE}" in said) is not is_shown
    assert ("See what is to be judged: prefect-crew reviews inspect" in said) is is_shown
    assert f"--crew {server.url}" in said, "the crew is not a stored block"


async def test_an_answer_that_was_left_behind_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its giver died before `/resume`."""
    monkeypatch.setattr(questions_module, "LEFT_AFTER", 0.3)
    async with asking() as (server, crew):
        waiting = asyncio.create_task(run_of(crew))
        opened = await until(lambda: in_store(questions.open_questions), "the question")
        assert await in_store(questions.answer, opened[0].id, {"approve": True, "feedback": "Good."}, "Ada")
        assert await waiting == "done"
        assert [sent["human_feedback"] for sent in server.resumes] == ["Good."]


async def test_a_cancelled_giver_sends_the_answer_that_only_it_may_send(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, go_on = asyncio.Event(), asyncio.Event()

    async def held(work: Any, *args: Any) -> Any:
        done = await in_store(work, *args)
        if work is questions.send:
            taken.set()
            await go_on.wait()
        return done

    async with asking() as (server, crew):
        waiting = asyncio.create_task(run_of(crew))
        await until(lambda: in_store(questions.open_questions), "the question")
        monkeypatch.setattr(answer_module, "in_store", held)
        giving = asyncio.create_task(approve(crew, server.run_id, "Good."))
        await soon(taken.wait(), "the right to send")
        giving.cancel()
        go_on.set()
        assert await soon(waiting) == "done"
        assert [sent["human_feedback"] for sent in server.resumes] == ["Good."]
        with pytest.raises(asyncio.CancelledError):
            await giving
