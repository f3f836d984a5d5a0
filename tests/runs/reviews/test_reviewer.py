"""What one wait does about people: functions that answer, people's time, and how often they are asked."""

import asyncio
import threading
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
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
from support.asking import Asking, judging
from support.proxy import Proxy
from support.scripts import script
from support.servers import unseen
from support.waiting import until

SCRIPT = script({"name": "draft", "agent": "Writer", "human": True, "output": "Draft. {{ feedback }}"})
APPROVED = pc.Review(approve=True)
RECORDS = PrefectRecords()
pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.fixture
def server(crew_server: CrewServerFactory) -> CrewServer:
    """Provide the server of a crew that asks about its draft."""
    return crew_server(SCRIPT)


def key_of(server: CrewServer) -> str:
    """Return a key of this server alone. Its address is none: a later server may get its port."""
    return f"{server.url} {zlib.crc32(server.token.encode())}"


async def answers(server: CrewServer) -> list[pc.Review]:
    return await RECORDS.reviews((await RECORDS.attempts(key_of(server)))[-1])


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
    await asyncio.wait_for(run_with(server, judge), 60)
    assert [one.round for one in asked] == [1, 2]
    assert server.requests["resume"] == 2
    assert server.kickoffs == 1
    given = [(sent.round, sent.approve, sent.outcome, sent.by) for sent in await answers(server)]
    assert given == [(1, False, "sent", "judge"), (2, True, "sent", "judge")]


async def test_a_plain_function_blocks_nothing(server: CrewServer) -> None:
    others_went_on, logged_by = threading.Event(), list[str]()

    def judge(request: pc.ReviewRequest) -> pc.Review:
        logged_by.append(str(this_flow_run.id))  # it is called in the context of the wait
        assert others_went_on.wait(60), "nothing else went on"
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
        is_over.wait(30)
        return APPROVED

    review = {"async": think, "sync": think_in_a_thread, "insistent": insist}[how]
    running = asyncio.ensure_future(run_with(server, review, human_timeout=1.0))
    done, _ = await asyncio.wait({running}, timeout=20)
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
        return bool(await RECORDS.attempts(key_of(server))) and [a.outcome for a in await answers(server)] == ["sent"]

    await until(rejected, "the rejection")
    await resume_crew(server.crew(), server.runs[0].id, approve=True)
    assert "Too late for today." in await running
    assert [(one.by == NOBODY, one.approve) for one in await answers(server)] == [(True, False), (False, True)]


@asynccontextmanager
async def met_people(server: CrewServer, **policy: Any) -> AsyncIterator[tuple[LiveRun, People, Any]]:
    """Give a run that asks, what its wait knows of people, and a function that has it see the status."""
    options = RunOptions(idempotency_key=key_of(server))
    opened = await open_run(RunRequest.of(crew_of(server.crew()), Inputs.of({}), options))
    await until(lambda: server.runs[0].state == "waiting", "it asks")
    async with opened.session as session:
        people = People(opened, pc.WaitPolicy(**policy), None, stop=AsyncMock())

        async def see() -> None:
            await people.see_status(await session.client.status(opened.kickoff_id))

        yield opened, people, see


async def test_nobody_in_time_rejects_the_unseen(crew_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be judged may come by a webhook: a wait that begins after people's time is over holds back a while."""
    monkeypatch.setattr(reviewer, "OUTPUT_WITHIN", 0.5)
    server = unseen(crew_server(Asking()))
    async with met_people(server, human_timeout=86400, on_human_timeout="reject") as (opened, people, see):
        assert opened.record is not None
        opened.record.has_webhooks = True
        opened.record.human_since = utcnow() - timedelta(hours=30)
        await see()
        assert people.question is None, "it is held back"
        assert await people.more_time() == 0.5
        assert server.requests["resume"] == 0
        await asyncio.sleep(0.6)
        await see()
        assert await people.more_time() == 86400
        assert server.requests["resume"] == 1
        assert await people.more_time() == 0, "once"
    assert [one.by for one in await answers(server)] == [NOBODY]


async def test_a_filled_form_is_kept_for_an_unknown_run(server: CrewServer) -> None:
    async with met_people(server) as (_, people, see):
        await see()
        people._form = form = AsyncMock(spec=Form)
        form.look.return_value = ReviewForm(decision="approve", name="Ada")
        server.faults.add("status:404@1")
        await people.answer()
        assert not people.has_answered()
        form.forget_answer.assert_not_called()
        await see()
        await people.answer()
        assert people.has_answered()
        form.forget_answer.assert_awaited_once()
    assert server.requests["resume"] == 1


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
    with pytest.raises(pc.ReviewLimitError, match="more than 2 times") as raised:
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


# The Prefect API is away, or refuses


async def waiting_for(server: CrewServer, review: Any = lambda _: APPROVED) -> Any:
    """Start a run outside a flow; return a task that waits for it with a review function."""
    run = await server.crew().atrigger({}, idempotency_key=key_of(server))
    waited = wait_for_run(LiveRun(run._crew, run.kickoff_id), RunOptions(review=review))
    return asyncio.ensure_future(asyncio.wait_for(waited, 60))


async def test_an_unsaved_outcome_does_not_hold_the_polls(server: CrewServer, proxy: Proxy) -> None:
    proxy.refuse, proxy.answer = "PATCH /api/variables/name/crew_answer", "503"
    assert (await (await waiting_for(server))).output == "Draft. "
    assert server.requests["resume"] == 1
    assert proxy.count("PATCH /api/variables/name/crew_answer") > 1


async def test_an_answer_waits_for_an_absent_prefect(server: CrewServer, proxy: Proxy) -> None:
    asked: list[str] = []

    async def judge(request: pc.ReviewRequest) -> pc.Review:
        asked.append(request.kickoff_id)
        proxy.cut()
        return APPROVED

    waiting = await waiting_for(server, judge)
    await until(lambda: asked, "the function has answered")
    polls = server.requests["status"]
    await until(lambda: server.requests["status"] > polls + 3 or waiting.done(), "the run is polled meanwhile")
    assert waiting.done() is False
    assert server.requests["resume"] == 0
    proxy.restore()
    assert (await waiting).output == "Draft. "
    assert len(asked) == 1
    assert server.requests["resume"] == 1


async def test_a_written_answer_is_known_as_ones_own(server: CrewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, lost = PrefectRecords.add_review, list[int]()

    async def lose(self: PrefectRecords, record: Any, number: int, review: pc.Review) -> bool:
        is_ours = await genuine(self, record, number, review)
        if not lost:
            lost.append(number)
            raise httpx.ReadError("the reply was lost")
        return is_ours

    monkeypatch.setattr(PrefectRecords, "add_review", lose)
    assert (await (await waiting_for(server))).output == "Draft. "
    assert lost == [1]
    assert server.requests["resume"] == 1
    assert [one.outcome for one in await answers(server)] == ["sent"]


@pytest.mark.parametrize("refused", ["POST /api/variables/$", "POST /api/variables/filter"], ids=["writing", "reading"])
async def test_a_refusing_prefect_ends_the_wait(refused: str, server: CrewServer, proxy: Proxy) -> None:
    run = await server.crew().atrigger({})
    proxy.refuse = refused
    waited = wait_for_run(LiveRun(run._crew, run.kickoff_id), RunOptions(review=lambda _: APPROVED))
    with pytest.raises(pc.PrefectRefusedError, match=r"The Prefect API \S+ refuses a request \(HTTP 403\)") as caught:
        await asyncio.wait_for(waited, 60)
    assert run.kickoff_id in str(caught.value)
    assert "wait for the run again under its key" in str(caught.value)
    assert not isinstance(caught.value, pc.PrefectAwayError)
    assert server.requests["resume"] == 0
