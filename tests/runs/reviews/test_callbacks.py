"""Review by callback: a Flow asks by a signed webhook, and takes its answer once at the callback URL. All over HTTP."""

import asyncio
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, cast
from uuid import UUID

import httpx
import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from pydantic import ValidationError

from prefect_crew import CrewError, DeployedCrew, Review, ReviewRequest, arun_crew, cli, kickoff_crew
from prefect_crew.blocks import crew_of
from prefect_crew.client._callbacks import READ_BY_A_MODEL, FlowQuestion, parse_question
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import ConfigurationError, NotWaitingError
from prefect_crew.receiver import app
from prefect_crew.receiver.app import create_receiver
from prefect_crew.runs.database import in_store
from prefect_crew.runs.reviews import reviewer
from prefect_crew.runs.reviews.answer import read_question, resume_run
from prefect_crew.runs.reviews.callbacks import read_callback
from prefect_crew.runs.reviews.form import ReviewForm, masked_options
from prefect_crew.runs.run import LiveRun
from prefect_crew.store import attempts, questions
from prefect_crew.store.questions import FLOW, Question
from support.flow_runs import acall_in_flow
from support.links import answers_of, read
from support.review_callbacks import ReviewingServer, ReviewWebhook
from support.scripts import script
from support.waiting import soon, until
from support.webhooks import SECRET, served

REVIEW_SECRET = "whsec-of-the-tests"
PUBLISH = {"name": "publish", "human": True, "output": "Draft. {{ feedback }}"}
SCRIPT = script(PUBLISH)
OPTIONS = ("approve", "needs_revision")


@pytest.fixture
async def hook(prefect_api: Any, instant_polling: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ReviewWebhook]:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_REVIEW_SECRET", f"an-older-one {REVIEW_SECRET}")
    monkeypatch.setattr(reviewer, "OUTPUT_WITHIN", 60.0)  # a busy machine may take long to bring the request
    async with served(create_receiver(SECRET)) as url:
        yield ReviewWebhook(f"{url}/requests", REVIEW_SECRET, OPTIONS)


async def run_with(server: CrewServer, review: Any, key: str | None = None) -> str:
    options = {"idempotency_key": key or str(uuid.uuid4()), "review": review}
    return (await acall_in_flow(lambda: arun_crew(server.crew(), {}, **options)))[1].output


@pytest.mark.parametrize("shape", ["documented", "live"])
async def test_an_outcome_goes_to_the_callback_once(hook: ReviewWebhook, key: str, shape: Any) -> None:
    asked: list[ReviewRequest] = []

    def judge(request: ReviewRequest) -> Review:
        asked.append(request)
        return Review(approve=request.round > 1, feedback="Shorter.", option=OPTIONS[request.round == 1])

    with ReviewingServer(SCRIPT, review_webhook=hook, response_format=shape) as server:
        assert await run_with(server, judge, key) == "Draft. needs_revision: Shorter."
        assert server.requests["resume"] == 2
    assert [(one.round, one.options, one.message) for one in asked] == [
        (number, OPTIONS, "Please review publish.") for number in (1, 2)
    ]
    if shape == "live":  # the other shape knows no output
        assert [one.output for one in asked] == ["Draft. ", "Draft. needs_revision: Shorter."]
    given = await answers_of(key)
    assert [(one.outcome, one.option) for one in given] == [("sent", OPTIONS[1]), ("sent", OPTIONS[0])]
    (attempt,) = await in_store(attempts.of_key, key)
    assert not [each for each in await in_store(questions.questions_of, attempt.id) if await has_url(each)]


async def kept(kickoff_id: str) -> Question | None:
    """Return the question of a Flow that is open."""
    (attempt,) = await in_store(attempts.of_kickoff_id, kickoff_id)
    asked = await in_store(questions.questions_of, attempt.id)
    return asked[-1] if asked and FLOW in asked[-1].marks and asked[-1].answer is None else None


async def has_url(question: Question) -> bool:
    """Return whether Prefect still has the URL for the answer to a question."""
    try:
        await cast("Any", Secret).aload(f"crew-question-{question.marks[FLOW]}")
    except ValueError:
        return False
    return True


async def callback_of(kickoff_id: str) -> str:
    question = await kept(kickoff_id)
    assert question is not None
    return (await read_callback(kickoff_id, question.marks[FLOW])).get_secret_value()


async def answer(crew: DeployedCrew, kickoff_id: str, *, approve: bool = True) -> Any:
    return await resume_run(LiveRun(crew_of(crew), kickoff_id), feedback="", approve=approve)


async def _kicked_off(crew: DeployedCrew, key: str) -> str:
    _, kickoff_id = await acall_in_flow(lambda: kickoff_crew(crew, {}, idempotency_key=key))
    await until(lambda: kept(kickoff_id), "the question is kept")
    return kickoff_id


async def test_an_uncertain_answer_is_held(hook: ReviewWebhook, key: str) -> None:
    with ReviewingServer(SCRIPT, review_webhook=hook, faults=["resume:500-before-accept@1"]) as server:
        crew = server.crew()
        kickoff_id = await _kicked_off(crew, key)
        for known in (crew_of(crew), None):
            (attempt,) = await in_store(attempts.of_key, key)
            question = await read_question(attempt, known)
            assert question is not None
            assert question.task_id == "publish"
            assert question.options == OPTIONS
            assert question.output == "Draft. "
        with pytest.raises(ConfigurationError, match="has the outcomes approve, needs_revision"):
            await answer(crew, kickoff_id, approve=False)
        assert server.requests["resume"] == 0
        token = (await callback_of(kickoff_id)).rpartition("/")[2]
        with pytest.raises(CrewError) as raised:
            await answer(crew, kickoff_id)
        assert token not in str(raised.value)
        with pytest.raises(CrewError, match="not sent again automatically"):
            await answer(crew, kickoff_id)
        assert server.requests["resume"] == 1


async def test_a_question_answered_elsewhere_is_forgotten(hook: ReviewWebhook, key: str) -> None:
    with ReviewingServer(
        script(PUBLISH, {"name": "more", "seconds": 600, "output": ""}), review_webhook=hook
    ) as server:
        kickoff_id = await _kicked_off(server.crew(), key)
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.post(await callback_of(kickoff_id), json={"feedback": "approve"})
        with pytest.raises(NotWaitingError, match="does not wait for a person"):
            await answer(server.crew(), kickoff_id)
        assert await answers_of(key) == []


async def test_a_wait_goes_on_after_an_answer_that_came_too_late(hook: ReviewWebhook, key: str, caplog: Any) -> None:
    """The platform has taken another answer, and the Flow goes on some time later."""
    asked: list[ReviewRequest] = []

    def judge(request: ReviewRequest) -> Review:
        asked.append(request)
        return Review(approve=True)

    with ReviewingServer(SCRIPT, review_webhook=hook) as server:
        server.has_other_answer = True
        waiting = asyncio.create_task(run_with(server, judge, key))
        await until(lambda: "was answered elsewhere" in caplog.text, "the answer is refused")
        assert "via dashboard at 2026-10-06" in caplog.text
        polls = server.requests["status"]
        await until(lambda: server.requests["status"] > polls + 3, "the wait goes on")
        with pytest.raises(NotWaitingError, match=r"answered elsewhere.*by e-mail"):
            await answer(server.crew(), server.runs[0].id)
        assert await answers_of(key) == []
        server.has_other_answer = False
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.post(await callback_of(server.runs[0].id), json={"feedback": "approve"})
        assert await soon(waiting) == "Draft. "
        assert server.requests["resume"] == 3
    assert len(asked) == 1, "nobody is asked what takes no answer"


async def test_the_url_for_an_answer_goes_with_the_run_that_ended_while_nobody_waited(
    hook: ReviewWebhook, key: str
) -> None:
    with ReviewingServer(SCRIPT, review_webhook=hook) as server:
        kickoff_id = await _kicked_off(server.crew(), key)
        question = await kept(kickoff_id)
        assert question is not None
        assert await has_url(question)
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.post(await callback_of(kickoff_id), json={"feedback": "approve"})
        await until(lambda: server.run(kickoff_id).state.ended, "the end")
        assert await run_with(server, None, key) == "Draft. "
        assert not await has_url(question)


TWO = script(
    {"name": "outline", "human": True, "output": "Outline."}, {"name": "publish", "human": True, "output": "Text."}
)


async def answer_on_the_platform(kickoff_id: str, task: str) -> None:
    """Answer a request at its callback URL as the platform's own page does, and wait for what is asked next."""
    before = await kept(kickoff_id)
    assert before is not None
    assert before.task == task
    async with httpx.AsyncClient(trust_env=False) as client:
        answered = await client.post(await callback_of(kickoff_id), json={"feedback": "approve"})
    assert answered.status_code == 200

    async def is_another() -> bool:
        question = await kept(kickoff_id)
        return question is not None and question.id != before.id

    await until(is_another, "the next question")


async def test_the_latest_request_is_what_is_asked(hook: ReviewWebhook, key: str) -> None:
    """Nothing tells of an answer that was given on the platform. It goes with its run."""
    with ReviewingServer(TWO, review_webhook=hook) as server:
        for number in range(2):
            kickoff_id = await _kicked_off(server.crew(), this_key := f"{key} {number}")
            await answer_on_the_platform(kickoff_id, "outline")
            question = await kept(kickoff_id)
            assert question is not None
            assert question.task == "publish"
            assert await run_with(server, lambda _: Review(approve=True), this_key) == "Text."


async def test_a_late_function_is_asked_the_next_question(hook: ReviewWebhook) -> None:
    asked: list[str] = []

    async def judge(request: ReviewRequest) -> Review:
        asked.append(request.task_id)
        if request.task_id == "outline":
            await answer_on_the_platform(request.kickoff_id, "outline")
        return Review(approve=True)

    with ReviewingServer(TWO, review_webhook=hook) as server:
        assert await run_with(server, judge) == "Text."
    assert asked == ["outline", "publish"]


# What a person has to judge can be only in the state of the Flow.

ASKS = {"name": "review_contacts", "human": True, "output": "Awaiting Input"}
PLACEHOLDER = script(ASKS, inputs=["contacts", "draft", "count", "error"])
STATE = {"contacts": [{"name": "Apollo"}, "Ada"], "draft": "# On *tea*\n\nSteep it.", "count": 0, "error": ""}
TOO_LONG = "The state of the Flow is too long to be shown here. Look at the crew's page."
SHOWN = """\
Awaiting Input

**contacts**

- {"name":"Apollo"}
- Ada

**draft**

# On *tea*

Steep it.

**count**

0"""


@pytest.mark.parametrize(
    ("shape", "state", "output"),
    [
        ("live", STATE, SHOWN),
        ("documented", STATE, SHOWN.removeprefix("Awaiting Input\n\n")),
        ("live", {"draft": "Awaiting Input"}, "Awaiting Input"),
        ("live", {"draft": "x" * 300_000}, f"Awaiting Input\n\n{TOO_LONG}"),
    ],
    ids=["flat", "nested", "the-same", "too-long"],
)
async def test_a_function_judges_the_state_of_the_flow(
    hook: ReviewWebhook, key: str, shape: Any, state: dict[str, Any], output: str
) -> None:
    asked: list[ReviewRequest] = []

    def judge(request: ReviewRequest) -> Review:
        asked.append(request)
        return Review(approve=True)

    with ReviewingServer(PLACEHOLDER, review_webhook=hook, response_format=shape) as server:
        inputs = {"contacts": [], "draft": "", "count": None, "error": ""} | state
        await acall_in_flow(lambda: arun_crew(server.crew(), inputs, idempotency_key=key, review=judge))
    assert [request.output for request in asked] == [output]


async def test_the_state_counts_also_where_a_status_showed_the_output_before(hook: ReviewWebhook, key: str) -> None:
    options: dict[str, Any] = {"response_format": "documented", "faults": ["webhook:delay=5"]}
    with ReviewingServer(PLACEHOLDER, review_webhook=hook, **options) as server:
        crew = server.crew()
        _, kickoff_id = await acall_in_flow(lambda: kickoff_crew(crew, STATE, idempotency_key=key))
        (attempt,) = await in_store(attempts.of_key, key)
        await until(lambda: read_question(attempt, crew_of(crew)), "the status shows the question")
        question = await until(lambda: kept(kickoff_id), "the webhook comes")
        assert "Apollo" in question.text


@pytest.mark.parametrize("show", ["full", "summary"])
async def test_form_command_and_page_show_the_state_of_the_flow(
    hook: ReviewWebhook, key: str, show: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with ReviewingServer(PLACEHOLDER, review_webhook=hook) as server:
        name = f"placeholder-{key[-12:]}"
        await server.crew(show=show).asave(name)
        options: dict[str, Any] = {"idempotency_key": key, "review": "form"}
        waiting = asyncio.create_task(acall_in_flow(lambda: arun_crew(name, STATE, **options)))

        async def form() -> Any:
            found = await in_store(attempts.of_key, key)
            async with get_client() as client:
                return found and await client.filter_flow_run_input(
                    UUID(found[0].flow_run_id), "crew-review-", limit=9, exclude_keys=set()
                )

        (attempt,) = (await until(form, "the form")) and await in_store(attempts.of_key, key)
        question = await kept(str(attempt.kickoff_id))
        assert question is not None
        texts = [" ".join(str(each.value) for each in await form())]
        assert await asyncio.to_thread(cli.main, ("reviews", "inspect", key)) == 0
        texts.append(capsys.readouterr().out)
        texts.append((await read(hook.url.replace("/requests", f"/answer/{question.id}"))).said)
        told = ("Please review review_contacts.", "Apollo", "Steep it.")
        assert [[word in text for word in told] for text in texts] == [[show == "full"] * 3] * 3
        assert [READ_BY_A_MODEL in text for text in texts] == [True] * 3
        assert (question.text == SHOWN) is (show == "full")
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.post(await callback_of(str(attempt.kickoff_id)), json={"feedback": "approve"})
        await soon(waiting)


async def test_a_rejection_on_the_command_line_can_be_the_outcome_alone(
    hook: ReviewWebhook, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ReviewingServer(SCRIPT, review_webhook=hook) as server:
        monkeypatch.setenv("CREW_TOKEN", server.token)
        kickoff_id = await _kicked_off(server.crew(), key)
        options = ("--option", OPTIONS[1], "--crew", server.url)
        assert await asyncio.to_thread(cli.main, ("reviews", "reject", key, *options)) == 0
        question = await until(lambda: kept(kickoff_id), "the next question")
        assert question.text == f"Draft. {OPTIONS[1]}"
    assert [(one.approve, one.option, one.feedback) for one in await answers_of(key)] == [(False, OPTIONS[1], "")]


# What the receiver believes.


def ask(*, at: float | None = None, secret: str = REVIEW_SECRET, names: str = "X-", **changes: Any) -> dict[str, Any]:
    facts = {
        "event_type": "new_request",
        "id": "r-1",
        "flow_execution_id": "k-1",
        "callback_url": "https://x.example/r?token=t0k3n",
    }
    body = json.dumps({**facts, "emit": ["yes", "no"], **changes}).encode()
    now = str(int(time.time() if at is None else at))
    digest = hmac.new(secret.encode(), now.encode() + b"." + body, hashlib.sha256).hexdigest()
    return {"content": body, "headers": {f"{names}Timestamp": now, f"{names}Signature": f"sha256={digest}"}}


@pytest.mark.parametrize(
    ("given", "status"),
    [
        pytest.param(ask, 200, id="signed"),
        pytest.param(lambda: ask(names="X-CrewAI-"), 200, id="signed-with-the-longer-names"),
        pytest.param(lambda: ask(secret="another"), 404, id="another-secret"),
        pytest.param(lambda: ask(at=time.time() - 100_000), 404, id="old"),
        pytest.param(lambda: ask(at=time.time() + 100_000), 404, id="from-the-future"),
        pytest.param(lambda: {**ask(), "content": b"{}"}, 404, id="another-body"),
        pytest.param(lambda: {"content": b"{}"}, 404, id="unsigned"),
        pytest.param(ask, 404, id="without-a-secret-here"),
        pytest.param(lambda: ask(callback_url="javascript:alert(1)"), 400, id="no-address"),
        pytest.param(lambda: ask(flow_execution_id=None), 400, id="no-run"),
        pytest.param(lambda: ask(event_type="other"), 200, id="another-event"),
    ],
)
async def test_only_signed_requests_are_kept(
    given: Callable[[], Any],
    status: int,
    prefect_api: Any,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if "without-a-secret-here" not in request.node.name:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_REVIEW_SECRET", REVIEW_SECRET)
    monkeypatch.setattr(app, "KNOWN_AFTER", (0.0,))
    transport = httpx.ASGITransport(create_receiver(SECRET))
    async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
        assert (await client.post("/requests", **given())).status_code == status


def asked_with(**changes: Any) -> ReviewRequest:
    question = parse_question(ask(**changes)["content"])
    assert isinstance(question, FlowQuestion)
    return ReviewRequest(kickoff_id="k-1", task_id=question.task_id, options=question.options)


@pytest.mark.parametrize(
    ("options", "approving"),
    [
        (("Accept", "reject"), ["Accept"]),
        (("no-go", "yes"), ["yes"]),
        (("No", "publish", "archive"), ["publish"]),
        (("reject", "denied"), []),
    ],
)
def test_the_form_knows_which_outcome_approves(options: tuple[str, ...], approving: list[str]) -> None:
    question = asked_with(emit=options)
    form = ReviewForm.about(question, "text")
    assert form.model_json_schema()["properties"]["decision"]["enum"] == list(options)
    answers = [form.model_validate({"decision": option}).review(question) for option in options]
    assert [answer.option for answer in answers] == list(options)
    assert [answer.option for answer in answers if answer.approve] == approving


@pytest.mark.parametrize("are_alike", [False, True], ids=["unlike", "alike"])
def test_the_form_masks_the_flows_options_and_knows_each(are_alike: bool) -> None:
    run = LiveRun(crew_of(DeployedCrew(url="https://crew.test", token="secret-token")), "k1")  # type: ignore[arg-type]
    options = ("send secret-token", run.redact("send secret-token") if are_alike else "keep")
    question = asked_with(emit=options)
    shown = masked_options(run, question)
    form = ReviewForm.about(question, "text", options=shown)
    assert "secret-token" not in str(form.model_json_schema())
    answers = [form.model_validate({"decision": option}).review(question, shown) for option in shown]
    assert [answer.option for answer in answers] == list(question.options)
    with pytest.raises(ValidationError, match="decision"):
        form.model_validate({"decision": "send secret-token"})  # as a process without the secret has shown it
