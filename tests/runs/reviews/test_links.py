"""Answer links: their notification, and what happens when it cannot be sent. tests/receiver/test_answers.py has the
pages."""

import asyncio
import logging
import uuid
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client

import prefect_crew as pc
from prefect_crew._internal.prefect_api import lock_here
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import ReviewRequest
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.reviews import links
from prefect_crew.runs.reviews.links import describe_link
from prefect_crew.runs.run import LiveRun
from support.flow_runs import acall_in_flow
from support.links import QUICK, Chat, notifying, running
from support.scripts import ASKS, script
from support.waiting import soon, until
from support.webhooks import SECRET, events_of

UNSENT = "the link to its question was not sent"


def question(**facts: Any) -> ReviewRequest:
    return ReviewRequest(**{"kickoff_id": "run-1", "task_id": "draft", **facts})


def run_of(crew: pc.DeployedCrew, key: str) -> LiveRun:
    attempt: Any = SimpleNamespace(key=key, secret_names=None, turn=None)
    return LiveRun(crew_of(crew), "run-1", attempt)


# The message


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        ("draft", True),
        ("Entwurf für Ada", True),
        ("<https://evil.example|click here>", False),
        ("evil.example", False),
        ("[click](https://evil.example)", False),
        ("*bold* _it_ ~no~ `code`", False),
        ("\u202etfard", False),
        ("x" * 500, False),
    ],
)
def test_a_message_has_no_text_that_a_chat_would_read(task: str, shown: bool):
    run = run_of(pc.DeployedCrew(url="https://crew.example", token="secret-token"), f"key {task}")
    subject, body = describe_link(run, question(task_id=task), "https://hooks.example/answer/x", 2e9)
    assert (task in body) is shown
    assert "\n" not in subject
    assert subject == "Crew crew.example asks a person"
    assert body.count("https://") == 1
    assert "\nhttps://hooks.example/answer/x\n" in body


def test_a_message_names_no_task_of_a_crew_that_shows_nothing():
    crew = pc.DeployedCrew(url="https://crew.example", token="secret-token", show="none")
    _, body = describe_link(run_of(crew, "tea"), question(), "https://h/answer/x", 2e9)
    assert "draft" not in body
    assert "run tea, question 1." in body


# Sending it


@pytest.fixture
def key() -> str:
    """Provide a key that may be the name of a block as well: without a space."""
    return f"link-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def links_on(prefect_api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_ANSWER_URL", "https://hooks.example/crews/")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)


async def _labels(key: str, *, at_least: int = 1) -> list[str]:
    events = await events_of(key, at_least=at_least, prefix="crew.waiting")
    return [event["resource"]["prefect-crew.answer-link"] for event in events]


async def _approve(server: CrewServer) -> None:
    await until(lambda: server.runs and str(server.runs[0].state) == "waiting", "it asks")
    async with server.crew().client() as client:
        await client.resume(server.runs[0].id, "draft", "", True)


@pytest.mark.parametrize("review", [None, "form", "function"])
async def test_a_question_is_sent_once_but_no_functions(review: Any, links_on: None, key: str):
    how = (lambda _: pc.Review(approve=True)) if review == "function" else review
    with Chat() as chat, CrewServer(ASKS) as server:
        async with notifying(chat), running(server.crew(wait=QUICK), key, review=how) as flow_run:
            if review != "function":
                assert (await chat.link()).startswith("https://hooks.example/crews/answer/")
                await _approve(server)
            await flow_run
        assert len(chat.links) == (review != "function")
        assert review == "function" or len(chat.got) == 1, "without a link the server sends its own alert"
        assert await _labels(key) == ["no" if review == "function" else "yes"]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("refused", "the block custom-webhook raised"),
        ("slow", "the block custom-webhook took more than 1 s"),
        ("unnamed", "no block is named for links: prefect-crew automations apply --notify TYPE/NAME"),
        ("bad url", "PREFECT_INTEGRATIONS_CREW_ANSWER_URL 'hooks.example' does not start with https://"),
        ("not stored", "the crew is no stored block, so the receiver has no token for it"),
    ],
)
async def test_an_unsent_link_is_in_the_log(
    trouble: str, reason: str, links_on: None, key: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    {
        "slow": lambda: monkeypatch.setattr(links, "NOTIFY_WITHIN", 1.0),
        "bad url": lambda: monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_ANSWER_URL", "hooks.example"),
    }.get(trouble, lambda: None)()
    chat = Chat(answer=500 if trouble == "refused" else 200, delay=4.0 if trouble == "slow" else 0.0)
    with chat, CrewServer(ASKS) as server, caplog.at_level(logging.WARNING):
        crew = server.crew(wait=QUICK)
        if trouble != "not stored":
            await crew.asave(key)
        async with notifying(chat) as automation:
            if trouble == "unnamed":
                async with get_client() as client:
                    await client.delete_automation(UUID(automation))
            flow_run = asyncio.create_task(acall_in_flow(lambda: pc.arun_crew(crew, {}, idempotency_key=key)))
            (message,) = await until(lambda: [line for line in caplog.messages if UNSENT in line], "the warning")
            assert f"Crew run {server.runs[0].id}: {UNSENT}: {reason}" in message
            assert f"Answer: prefect-crew reviews approve {server.runs[0].id}" in message
            await _approve(server)
            assert (await flow_run)[1].output == "printed"
        assert bool(chat.links) is (trouble in ("refused", "slow"))
    assert await _labels(key, at_least=2) == ["yes", "no"], "the automation sends its alert"


async def test_a_link_in_the_queue_is_not_sent_too_late(links_on: None, key: str, caplog: pytest.LogCaptureFixture):
    crew = script({"name": "draft", "human": True, "output": "x"}, {"name": "print", "seconds": 2})
    with Chat() as chat, CrewServer(crew) as server:
        async with notifying(chat), running(server.crew(wait=QUICK), key) as flow_run:
            async with lock_here("notifications"):
                await until(lambda: "waits for a person" in caplog.text, "the wait sees the question")
                await _approve(server)
                await asyncio.sleep(1)
            await flow_run
        assert chat.links == []


async def test_a_disabled_alert_sends_nothing(links_on: None, key: str, caplog: pytest.LogCaptureFixture):
    with Chat() as chat, CrewServer(ASKS) as server:
        async with notifying(chat) as automation:
            async with get_client() as client:
                await client.pause_automation(UUID(automation))
            async with running(server.crew(wait=QUICK), key) as flow_run:
                await asyncio.sleep(1)
                await _approve(server)
                await flow_run
        assert chat.got == []
        assert UNSENT not in caplog.text


def test_a_slow_chat_holds_up_no_sync_flow(links_on: None, key: str):
    with Chat(delay=3600) as chat, CrewServer(script({"name": "draft", "human": True, "output": "x"})) as server:

        @flow
        def asks() -> str:
            return pc.run_crew(key, {}, idempotency_key=key).output

        async def both() -> None:
            await server.crew(wait=QUICK).asave(key, overwrite=True)
            async with notifying(chat):
                running_flow = asyncio.create_task(asyncio.to_thread(asks))
                await until(lambda: chat.got, "the message is on its way")
                polls = server.requests["status"]
                await until(lambda: server.requests["status"] > polls + 2, "the polls go on")
                await _approve(server)
                await soon(running_flow)

        asyncio.run(both())
