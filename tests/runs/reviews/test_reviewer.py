"""What one wait does about people: functions that answer, people's time, and how often they are asked."""

import asyncio
import threading
import zlib
from contextlib import suppress
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.runtime import flow_run as this_flow_run
from prefect.settings import PREFECT_API_URL

import prefect_crew as pc
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import in_store
from prefect_crew.runs.reviews import reviewer
from prefect_crew.runs.reviews.reviewer import NOBODY
from prefect_crew.store import attempts
from prefect_crew.tasks import kickoff_crew, resume_crew
from prefect_crew.testing import CrewServerFactory
from support.asking import Asking, judging
from support.links import answers_of
from support.scripts import script
from support.waiting import LIMIT, soon, until

SCRIPT = script({"name": "draft", "agent": "Writer", "human": True, "output": "Draft. {{ feedback }}"})
APPROVED = pc.Review(approve=True)
pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.fixture
def server(crew_server: CrewServerFactory) -> CrewServer:
    """Provide the server of a crew that asks about its draft."""
    return crew_server(SCRIPT)


def key_of(server: CrewServer) -> str:
    """Return a key of this server alone. Its address is none: a later server may get its port."""
    return f"{server.url} {zlib.crc32(server.token.encode())}"


async def answers(server: CrewServer) -> list[pc.Review]:
    return await answers_of(key_of(server))


def run_with(server: CrewServer, review: Any = None, **policy: Any) -> Any:
    """A flow around one run of the server."""

    @flow
    async def reviewed() -> str:
        wait = pc.WaitPolicy(**policy)
        return (await pc.arun_crew(server.crew(), {}, idempotency_key=key_of(server), review=review, wait=wait)).output

    return reviewed()


@pytest.mark.parametrize("is_seen", [False, True], ids=["by-its-text", "by-the-state-in-between"])
async def test_a_function_answers_each_round_once(crew_server: CrewServerFactory, is_seen: bool) -> None:
    asking, asked = Asking(), list[pc.ReviewRequest]()
    server = crew_server(asking if is_seen else SCRIPT)
    asking.polls = lambda: server.requests["status"]
    judge = judging(asked, approves_at=2)
    await soon(run_with(server, judge))
    assert [one.round for one in asked] == [1, 2]
    assert server.requests["resume"] == 2
    assert server.kickoffs == 1
    given = [(sent.round, sent.approve, sent.outcome, sent.by) for sent in await answers(server)]
    assert given == [(1, False, "sent", "judge"), (2, True, "sent", "judge")]


async def test_a_plain_function_blocks_nothing(server: CrewServer) -> None:
    others_went_on, logged_by = threading.Event(), list[str]()

    def judge(request: pc.ReviewRequest) -> pc.Review:
        logged_by.append(str(this_flow_run.id))  # it is called in the context of the wait
        assert others_went_on.wait(LIMIT), "nothing else went on"
        return APPROVED

    async def another() -> None:
        await until(lambda: logged_by, "the function is called")
        others_went_on.set()

    @flow
    async def reviewed() -> str:
        await asyncio.gather(pc.arun_crew(server.crew(), {}, review=judge), another())
        return str(this_flow_run.id)

    assert [await reviewed()] == logged_by


@pytest.mark.parametrize("how", ["async", "sync", "insistent"])
async def test_peoples_time_includes_a_functions(server: CrewServer, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(reviewer, "STOP_WITHIN", 0.2)
    is_over = threading.Event()

    async def think(request: pc.ReviewRequest) -> pc.Review:
        await asyncio.sleep(30)
        return APPROVED

    async def insist(request: pc.ReviewRequest) -> pc.Review:
        while not is_over.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)
        return APPROVED

    def think_in_a_thread(request: pc.ReviewRequest) -> pc.Review:
        is_over.wait(LIMIT)
        return APPROVED

    review = {"async": think, "sync": think_in_a_thread, "insistent": insist}[how]
    running = asyncio.ensure_future(run_with(server, review, human_timeout=1.0))
    done, _ = await asyncio.wait({running}, timeout=LIMIT)
    is_over.set()
    with pytest.raises(pc.CrewTimeoutError) as caught:
        await running
    assert done, "the function does not hold the wait"
    assert caught.value.phase == "human"
    assert server.requests["resume"] == 0


async def test_a_value_that_is_no_review_is_refused(server: CrewServer) -> None:
    with pytest.raises(pc.CrewError, match="not a Review"):
        await run_with(server, lambda _: True)
    assert server.requests["resume"] == 0


@pytest.mark.parametrize("is_async", [True, False])
async def test_an_error_of_a_function_names_the_function(server: CrewServer, is_async: bool) -> None:
    mine = httpx.ConnectError("refused", request=httpx.Request("GET", PREFECT_API_URL.value()))

    async def ask_my_service(request: pc.ReviewRequest) -> pc.Review:
        raise mine

    def ask_my_service_in_a_thread(request: pc.ReviewRequest) -> pc.Review:
        raise mine

    with pytest.raises(pc.CrewError, match=r"The review function ask_my_service.* raised ConnectError") as caught:
        await run_with(server, ask_my_service if is_async else ask_my_service_in_a_thread)
    assert not isinstance(caught.value, pc.PrefectAwayError)
    assert caught.value.__cause__ is mine
    assert server.kickoffs == 1
    assert server.requests["resume"] == 0


async def test_nobody_in_time_is_one_rejection(server: CrewServer) -> None:
    policy = {"human_timeout": 4.0, "on_human_timeout": "reject", "human_message": "Too late for today."}
    running = asyncio.ensure_future(run_with(server, **policy))

    async def rejected() -> bool:
        return bool(await in_store(attempts.of_key, key_of(server))) and [a.outcome for a in await answers(server)] == [
            "sent"
        ]

    await until(rejected, "the rejection")
    await resume_crew(server.crew(), server.runs[0].id, approve=True)
    assert "Too late for today." in await running
    assert [(one.by == NOBODY, one.approve) for one in await answers(server)] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("choice", "on_timeout", "stops"),
    [("leave", "stop", False), ("stop", "leave", True), (None, "leave", False), (None, "stop", True)],
)
async def test_the_end_of_peoples_time_is_chosen(server: CrewServer, choice: Any, on_timeout: Any, stops: bool) -> None:
    with pytest.raises(pc.CrewTimeoutError) as raised:
        await run_with(server, human_timeout=0.3, on_human_timeout=choice, on_timeout=on_timeout)
    assert raised.value.stopped is stops
    assert server.requests["stop"] == int(stops)
    assert server.requests["resume"] == 0


@pytest.mark.parametrize("choice", ["leave", "stop"])
async def test_rounds_are_limited_by_choice(server: CrewServer, choice: Any) -> None:
    asked: list[pc.ReviewRequest] = []
    with pytest.raises(pc.CrewTimeoutError, match="more than 2 times") as raised:
        await run_with(server, judging(asked, approves_at=9), max_rounds=2, on_human_timeout=choice)
    assert [one.round for one in asked] == [1, 2]
    assert raised.value.stopped is (choice == "stop")
    assert server.requests["stop"] == int(choice == "stop")


async def test_every_step_of_a_pipeline_can_be_reviewed(server: CrewServer) -> None:
    shared, own = list[pc.ReviewRequest](), list[pc.ReviewRequest]()

    @flow
    async def reviewed() -> None:
        first = pc.CrewStep("first", server.crew())
        second = pc.CrewStep("second", server.crew(), after=["first"], review=judging(own))
        await pc.arun_pipeline([first, second], {}, review=judging(shared))

    await reviewed()
    assert [one.kickoff_id for one in shared + own] == [run.id for run in server.runs]
    assert [one.task_id for one in shared + own] == ["draft", "draft"]


async def test_each_answer_names_own_webhooks_again(server: CrewServer) -> None:
    """The server does not carry them over."""
    own = pc.Webhooks(task="http://127.0.0.1:9/t", step="http://127.0.0.1:9/s", crew="http://127.0.0.1:9/c")
    after: list[Any] = []

    def judge(request: pc.ReviewRequest) -> pc.Review:
        after.append(server.run(request.kickoff_id).targets)
        return pc.Review(approve=request.round > 1, feedback="again")

    result = await pc.arun_crew(server.crew(), {}, review=judge, webhooks=own)
    after.append(server.run(result.kickoff_id).targets)
    assert after == [after[0]] * 3
    assert after[0].crew == own.crew


async def test_an_answer_names_the_receivers_webhooks(server: CrewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds a run that somebody else has started does not take its webhooks away."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", "http://127.0.0.1:9/hooks")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", "a-secret-of-thirty-two-characters")
    mine, options = pc.Webhooks(crew="http://127.0.0.1:9/mine"), {"idempotency_key": key_of(server)}
    kickoff_id = await kickoff_crew(server.crew(), {}, **options)
    found = await pc.arun_crew(server.crew(), {}, webhooks=mine, review=lambda _: APPROVED, **options)
    assert found.kickoff_id == kickoff_id
    assert str(server.run(kickoff_id).targets.crew).startswith("http://127.0.0.1:9/hooks/")


async def test_an_answer_from_elsewhere_ends_no_wait(server: CrewServer) -> None:
    asked: list[int] = []

    async def slow(request: pc.ReviewRequest) -> pc.Review:
        asked.append(request.round)
        if request.round == 1:
            # While this one thinks, a person answers.
            await resume_crew(server.crew(), request.kickoff_id, approve=False, feedback="by hand")
        return APPROVED

    assert "by hand" in await run_with(server, slow)
    assert asked == [1, 2]
    assert server.requests["resume"] == 2
    given = [(one.round, one.approve, one.by) for one in await answers(server)]
    assert given == [(1, False, "resume_crew"), (2, True, "slow")]
