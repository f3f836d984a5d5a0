"""What one wait does about people: functions that answer, people's time, and how often they are asked."""

from __future__ import annotations

import asyncio
import threading
import zlib
from contextlib import suppress
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from prefect import flow
from prefect.runtime import flow_run as this_flow_run
from prefect.settings import PREFECT_API_URL

import prefect_crew as pc
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.kickoff import open_run
from prefect_crew.runs.options import RunOptions, RunRequest
from prefect_crew.runs.reviews import reviewer
from prefect_crew.runs.reviews.form import Form, ReviewForm
from prefect_crew.runs.reviews.reviewer import NOBODY, People
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.wait import wait_for_run
from prefect_crew.tasks import kickoff_crew, resume_crew
from prefect_crew.testing import CrewServerFactory
from support.asking import Asking
from support.proxy import Proxy
from support.scripts import script
from support.waiting import until

SCRIPT = script({"name": "draft", "agent": "Writer", "human": True, "output": "Draft. {{ feedback }}"})
APPROVED = pc.Review(approve=True)
pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


async def answers(idempotency_key: str) -> list[pc.Review]:
    records = PrefectRecords()
    return await records.reviews((await records.attempts(idempotency_key))[-1])


def key_of(server: CrewServer) -> str:
    """Return a key of this server alone. Its address is none: a later server may get its port."""
    return f"{server.url} {zlib.crc32(server.token.encode())}"


def run_with(server: CrewServer, review: Any = None, **policy: Any) -> Any:
    """A flow around one run of the server."""

    @flow
    async def reviewed() -> str:
        wait = pc.WaitPolicy(**policy)
        return (await pc.arun_crew(server.crew(), {}, idempotency_key=key_of(server), review=review, wait=wait)).output

    return reviewed()


@pytest.mark.parametrize("response_format", ["documented", "union", "live"])
async def test_a_function_answers_each_round_once(response_format: Any) -> None:
    asked: list[int] = []

    async def judge(request: pc.ReviewRequest) -> pc.Review:
        asked.append(request.round)
        return pc.Review(approve=request.round > 1, feedback=f"round {request.round}")

    asking = Asking()
    with CrewServer(SCRIPT if response_format == "union" else asking, response_format=response_format) as server:
        asking.polls = lambda: server.requests["status"]
        if response_format == "live":  # its status names no task: nothing can be answered, so nothing is
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(run_with(server, judge), 3)
            assert server.requests["resume"] == 0
            return
        await asyncio.wait_for(run_with(server, judge), 60)
        assert (asked, server.requests["resume"], server.kickoffs) == ([1, 2], 2, 1)
        given = [(sent.round, sent.approve, sent.outcome, sent.by) for sent in await answers(key_of(server))]
        assert given == [(1, False, "sent", "judge"), (2, True, "sent", "judge")]


async def test_a_plain_function_blocks_nothing() -> None:
    others_went_on = threading.Event()
    logged_by: list[str] = []

    def judge(request: pc.ReviewRequest) -> pc.Review:
        del request
        logged_by.append(str(this_flow_run.id))  # it is called in the context of the wait
        assert others_went_on.wait(60), "nothing else went on"
        return pc.Review(approve=True)

    async def another() -> None:
        await until(lambda: logged_by, "the function is called")
        others_went_on.set()

    with CrewServer(SCRIPT) as server:

        @flow
        async def reviewed() -> str:
            await asyncio.gather(pc.arun_crew(server.crew(), {}, review=judge), another())
            return str(this_flow_run.id)

        assert [await reviewed()] == logged_by


@pytest.mark.parametrize("is_async", [True, False])
async def test_peoples_time_includes_a_functions(is_async: bool) -> None:
    ended = threading.Event()

    async def think(request: pc.ReviewRequest) -> pc.Review:
        await asyncio.sleep(30)
        return pc.Review(approve=True)

    def think_in_a_thread(request: pc.ReviewRequest) -> pc.Review:
        ended.wait(30)
        return pc.Review(approve=True)

    with CrewServer(SCRIPT) as server:
        with pytest.raises(pc.CrewTimeoutError) as caught:
            await run_with(server, think if is_async else think_in_a_thread, human_timeout=1.0)
        ended.set()
        assert (caught.value.phase, server.requests["resume"]) == ("human", 0)


async def test_a_late_function_answers_nothing() -> None:
    asked: list[str] = []

    async def think(request: pc.ReviewRequest) -> pc.Review:
        asked.append(request.kickoff_id)
        await asyncio.sleep(30)
        return pc.Review(approve=False, feedback="Too late.")

    with CrewServer(SCRIPT) as server:
        running = asyncio.ensure_future(run_with(server, think))
        await until(lambda: asked, "the function thinks")
        await resume_crew(server.crew(), asked[0], feedback="Fine.", approve=True)
        assert "Too late." not in await asyncio.wait_for(running, 25)
        assert server.requests["resume"] == 1


async def test_a_value_that_is_no_review_is_refused() -> None:
    with CrewServer(SCRIPT) as server:
        with pytest.raises(pc.CrewError, match="not a Review"):
            await run_with(server, lambda _: True)
        assert server.requests["resume"] == 0


@pytest.mark.parametrize("is_async", [True, False])
async def test_an_error_of_a_function_names_the_function(is_async: bool) -> None:
    mine = httpx.ConnectError("refused", request=httpx.Request("GET", PREFECT_API_URL.value()))

    async def ask_my_service(request: pc.ReviewRequest) -> pc.Review:
        raise mine

    def ask_my_service_in_a_thread(request: pc.ReviewRequest) -> pc.Review:
        raise mine

    with CrewServer(SCRIPT) as server:
        with pytest.raises(pc.CrewError, match=r"The review function ask_my_service.* raised ConnectError") as caught:
            await run_with(server, ask_my_service if is_async else ask_my_service_in_a_thread)
        assert not isinstance(caught.value, pc.PrefectAwayError)
        assert caught.value.__cause__ is mine
        assert (server.kickoffs, server.requests["resume"]) == (1, 0)


async def test_an_insistent_function_does_not_hold_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviewer, "STOP_WITHIN", 0.2)
    ended = asyncio.Event()

    async def insist(request: pc.ReviewRequest) -> pc.Review:
        while not ended.is_set():
            with suppress(asyncio.CancelledError):
                await ended.wait()
        return pc.Review(approve=True)

    with CrewServer(SCRIPT) as server:
        running = asyncio.ensure_future(run_with(server, insist, human_timeout=0.5))
        done, _ = await asyncio.wait({running}, timeout=20)
        ended.set()
        with pytest.raises(pc.CrewTimeoutError):
            await running
        assert (len(done), server.requests["resume"]) == (1, 0)


async def test_nobody_in_time_is_one_rejection() -> None:
    with CrewServer(SCRIPT, response_format="union") as server:
        policy = {"human_timeout": 4.0, "on_human_timeout": "reject", "human_message": "Too late for today."}
        running = asyncio.ensure_future(run_with(server, **policy))

        async def rejected() -> str | None:
            attempts = await PrefectRecords().attempts(key_of(server))
            outcomes = [one.outcome for one in await PrefectRecords().reviews(attempts[-1])] if attempts else []
            return attempts[-1].kickoff_id if outcomes == ["sent"] else None

        await resume_crew(server.crew(), await until(rejected, "the rejection"), approve=True)
        assert "Too late for today." in await running
        assert [(one.by == NOBODY, one.approve) for one in await answers(key_of(server))] == [
            (True, False),
            (False, True),
        ]


async def test_nobody_in_time_rejects_an_unknown_question(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be judged may come by a webhook: a wait that begins after people's time is over holds back a while."""
    monkeypatch.setattr(reviewer, "OUTPUT_WITHIN", 0.5)
    server = crew_server(Asking())
    opened = await open_run(
        RunRequest.of(crew_of(server.crew()), Inputs.of({}), RunOptions(idempotency_key=key_of(server)))
    )
    await until(lambda: server.runs[0].state == "waiting", "it asks")
    assert opened.record is not None
    opened.record.has_webhooks = True
    opened.record.human_since = utcnow() - timedelta(hours=30)
    async with opened.session as session:
        policy = pc.WaitPolicy(human_timeout=86400, on_human_timeout="reject")
        people = People(opened, policy, None, stop=AsyncMock())
        await people.see_status(await session.client.status(opened.kickoff_id))
        assert people.question is None, "it is held back"
        assert await people.more_time() == 0.5
        assert server.requests["resume"] == 0
        await asyncio.sleep(0.6)
        await people.see_status(await session.client.status(opened.kickoff_id))
        assert await people.more_time() == 86400
        assert server.requests["resume"] == 1
        assert await people.more_time() == 0, "once"
    assert [one.by for one in await answers(key_of(server))] == [NOBODY]


async def test_a_filled_form_is_kept_for_an_unknown_run(
    crew_server: CrewServerFactory,
) -> None:
    server = crew_server(SCRIPT)
    opened = await open_run(
        RunRequest.of(crew_of(server.crew()), Inputs.of({}), RunOptions(idempotency_key=key_of(server)))
    )
    await until(lambda: server.runs[0].state == "waiting", "it asks")
    async with opened.session as session:
        people = People(opened, pc.WaitPolicy(), None, stop=AsyncMock())
        await people.see_status(await session.client.status(opened.kickoff_id))
        form = AsyncMock(spec=Form)
        form.look.return_value = ReviewForm(decision="approve", name="Ada")
        people._form = form
        server.faults.add("status:404@1")
        await people.answer()
        assert not people.has_answered()
        form.forget_answer.assert_not_called()
        await people.see_status(await session.client.status(opened.kickoff_id))
        await people.answer()
        assert people.has_answered()
        form.forget_answer.assert_awaited_once()
    assert server.requests["resume"] == 1


@pytest.mark.parametrize(
    ("choice", "on_timeout", "stops"),
    [("leave", "stop", False), ("stop", "leave", True), (None, "leave", False), (None, "stop", True)],
)
async def test_the_end_of_peoples_time_is_a_choice(choice: Any, on_timeout: Any, stops: bool) -> None:
    with CrewServer(SCRIPT) as server:
        with pytest.raises(pc.CrewTimeoutError) as raised:
            await run_with(server, human_timeout=0.3, on_human_timeout=choice, on_timeout=on_timeout)
        assert raised.value.stopped is stops
        assert (server.requests["stop"], server.requests["resume"]) == (int(stops), 0)


@pytest.mark.parametrize("choice", ["leave", "stop"])
async def test_rounds_are_limited_by_choice(choice: Any) -> None:
    asked: list[int] = []

    def never(request: pc.ReviewRequest) -> pc.Review:
        asked.append(request.round)
        return pc.Review(approve=False, feedback=f"no {request.round}")

    with CrewServer(SCRIPT, response_format="union") as server:
        with pytest.raises(pc.ReviewLimitError, match="more than 2 times") as raised:
            await run_with(server, never, max_rounds=2, on_human_timeout=choice)
        assert asked == [1, 2]
        assert raised.value.stopped is (choice == "stop")
        assert server.requests["stop"] == int(choice == "stop")


async def test_every_step_of_a_pipeline_can_be_reviewed() -> None:
    asked: list[str] = []

    def judge(name: str) -> Any:
        def answer(request: pc.ReviewRequest) -> pc.Review:
            asked.append(f"{name} {request.task_id}")
            return pc.Review(approve=True)

        return answer

    with CrewServer(SCRIPT) as server:

        @flow
        async def reviewed() -> None:
            first = pc.CrewStep("first", server.crew())
            second = pc.CrewStep("second", server.crew(), after=["first"], review=judge("own"))
            await pc.arun_pipeline([first, second], {}, review=judge("shared"))

        await reviewed()
    assert asked == ["shared draft", "own draft"]


async def test_each_answer_names_own_webhooks_again() -> None:
    """The server does not carry them over."""
    own = pc.Webhooks(task="http://127.0.0.1:9/t", step="http://127.0.0.1:9/s", crew="http://127.0.0.1:9/c")
    after: list[Any] = []

    def judge(request: pc.ReviewRequest) -> pc.Review:
        after.append(server.run(request.kickoff_id).targets)
        return pc.Review(approve=request.round > 1, feedback="again")

    with CrewServer(SCRIPT, response_format="union") as server:
        result = await pc.arun_crew(server.crew(), {}, review=judge, webhooks=own)
        after.append(server.run(result.kickoff_id).targets)
    assert after == [after[0]] * 3
    assert after[0].crew == own.crew


async def test_an_answer_names_the_receivers_webhooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds a run that somebody else has started does not take its webhooks away."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", "http://127.0.0.1:9/hooks")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", "a-secret-of-thirty-two-characters")
    with CrewServer(SCRIPT) as server:
        crew, mine = server.crew(), pc.Webhooks(crew="http://127.0.0.1:9/mine")
        kickoff_id = await kickoff_crew(crew, {}, idempotency_key="hooked")
        approve = {"idempotency_key": "hooked", "review": lambda _: pc.Review(approve=True)}
        assert (await pc.arun_crew(crew, {}, webhooks=mine, **approve)).kickoff_id == kickoff_id
        assert str(server.run(kickoff_id).targets.crew).startswith("http://127.0.0.1:9/hooks/")


async def test_an_answer_from_elsewhere_ends_no_wait() -> None:
    with CrewServer(SCRIPT, response_format="union") as server:
        crew = server.crew()
        asked: list[int] = []

        async def slow(request: pc.ReviewRequest) -> pc.Review:
            asked.append(request.round)
            if request.round == 1:
                # While this one thinks, a person answers.
                await resume_crew(crew, request.kickoff_id, approve=False, feedback="by hand")
            return pc.Review(approve=True)

        assert "by hand" in await run_with(server, slow)
        assert (asked, server.requests["resume"]) == ([1, 2], 2)
        given = [(one.round, one.approve, one.by) for one in await answers(key_of(server))]
        assert given == [(1, False, "resume_crew"), (2, True, "slow")]


# The Prefect API is away, or refuses


async def test_an_unsaved_outcome_does_not_hold_the_polls(crew_server: CrewServerFactory, proxy: Proxy) -> None:
    proxy.refuse, proxy.answer = "PATCH /api/variables/name/crew_answer", "503"
    server = crew_server(SCRIPT)
    run = await server.crew().atrigger({})
    result = await asyncio.wait_for(
        wait_for_run(LiveRun(run._crew, run.kickoff_id), RunOptions(review=lambda _: APPROVED)), 60
    )
    assert result.output == "Draft. "
    assert (server.requests["resume"], proxy.count("PATCH /api/variables/name/crew_answer") > 1) == (1, True)


async def test_an_answer_waits_for_an_absent_prefect(crew_server: CrewServerFactory, proxy: Proxy) -> None:
    asked: list[str] = []

    async def judge(request: pc.ReviewRequest) -> pc.Review:
        asked.append(request.kickoff_id)
        proxy.cut()
        return APPROVED

    server = crew_server(SCRIPT)
    run = await server.crew().atrigger({})
    waiting = asyncio.ensure_future(wait_for_run(LiveRun(run._crew, run.kickoff_id), RunOptions(review=judge)))
    await until(lambda: asked, "the function has answered")
    polls = server.requests["status"]
    await until(lambda: server.requests["status"] > polls + 3 or waiting.done(), "the run is polled meanwhile")
    assert (waiting.done(), server.requests["resume"]) == (False, 0)
    proxy.restore()
    assert (await asyncio.wait_for(waiting, 60)).output == "Draft. "
    assert (len(asked), server.requests["resume"]) == (1, 1)


async def test_a_written_answer_is_known_as_ones_own(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, lost = PrefectRecords.add_review, list[int]()

    async def lose(self: PrefectRecords, record: Any, number: int, review: pc.Review) -> bool:
        is_ours = await genuine(self, record, number, review)
        if not lost:
            lost.append(number)
            raise httpx.ReadError("the reply was lost")
        return is_ours

    monkeypatch.setattr(PrefectRecords, "add_review", lose)
    server = crew_server(SCRIPT)
    run = await server.crew().atrigger({}, idempotency_key=key_of(server))
    result = await asyncio.wait_for(
        wait_for_run(LiveRun(run._crew, run.kickoff_id), RunOptions(review=lambda _: APPROVED)), 60
    )
    assert (result.output, lost, server.requests["resume"]) == ("Draft. ", [1], 1)
    assert [one.outcome for one in await answers(key_of(server))] == ["sent"]


@pytest.mark.parametrize("refused", ["POST /api/variables/$", "POST /api/variables/filter"], ids=["writing", "reading"])
async def test_a_refusing_prefect_ends_the_wait(refused: str, crew_server: CrewServerFactory, proxy: Proxy) -> None:
    def judge(request: pc.ReviewRequest) -> pc.Review:
        return APPROVED

    server = crew_server(SCRIPT)
    run = await server.crew().atrigger({})
    proxy.refuse = refused
    with pytest.raises(pc.PrefectRefusedError, match=r"The Prefect API \S+ refuses a request \(HTTP 403\)") as caught:
        await asyncio.wait_for(wait_for_run(LiveRun(run._crew, run.kickoff_id), RunOptions(review=judge)), 60)
    assert run.kickoff_id in str(caught.value)
    assert "wait for the run again under its key" in str(caught.value)
    assert not isinstance(caught.value, pc.PrefectAwayError)
    assert server.requests["resume"] == 0
