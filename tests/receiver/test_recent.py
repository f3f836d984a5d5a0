"""What a process that waits for runs hears from the receiver itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.receiver import recent
from prefect_crew.receiver.app import create_receiver
from prefect_crew.receiver.forward import Forwarder
from prefect_crew.webhooks import recent_bearer
from support.webhooks import BODIES, SECRET, Kept, headers_of, served, until, url_of

Urls = Callable[..., Webhooks]
BEARER = {"Authorization": f"Bearer {recent_bearer(SECRET)}"}


async def ask(client: httpx.AsyncClient, after: str = "") -> dict[str, Any]:
    answer = await client.get("/recent", params={"after": after}, headers=BEARER)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


async def deliver(client: httpx.AsyncClient, hooks: Webhooks, which: str) -> None:
    kind = which.partition("-")[0]
    answer = await client.post(url_of(hooks, kind), json=BODIES[which], headers=headers_of(hooks, kind))
    assert answer.status_code == 200


async def test_an_answer_is_held_back_until_a_webhook_comes(client: httpx.AsyncClient, kept: Kept, urls: Urls):
    cursor = str((await ask(client))["cursor"])
    asking = [asyncio.create_task(ask(client, cursor)) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in asking)
    began = time.monotonic()
    await deliver(client, urls(), "step-first")  # it ends no pause
    await deliver(client, urls(), "crew-first")
    answers = await asyncio.gather(*asking)
    assert time.monotonic() - began < 5
    assert answers[0] == answers[1] == answers[2]
    (webhook,) = answers[0]["webhooks"]
    assert webhook == {
        "id": str(kept.events[-1].id),
        "event": "crew.webhook.crew",
        "idempotency_key": "city/lisbon",
        "attempt": 1,
        "round": 0,
        "said": {"kickoff_id": "k-1", "state": "completed", "execution_time": 9.0},
    }
    assert answers[0]["missed"] is False
    assert "the output" not in str(answers)


async def test_calls_of_models_are_added_up_for_the_end_of_their_run(client: httpx.AsyncClient, urls: Urls):
    cursor, hooks = str((await ask(client))["cursor"]), urls()
    url, headers = url_of(hooks, "stream"), headers_of(hooks, "stream")

    async def call(number: int, model: object, usage: object, run: str = "k-1") -> None:
        data = {"model": model, "usage": usage, "messages": [{"content": "the prompt"}], "response": "the output"}
        event = {"id": f"e-{number}", "execution_id": run, "type": "llm_call_completed", "data": data}
        assert (await client.post(url, json={"events": [event]}, headers=headers)).status_code == 200

    whole = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    await call(1, "openai/gpt-4o", whole)
    await call(1, "openai/gpt-4o", whole)  # a delivery that is repeated
    await call(2, "openai/gpt-4o", {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2})
    await call(3, "claude", whole)
    await call(4, "the model that says a secret", whole)
    await call(5, "claude", "many")
    await call(6, "claude", whole, run="k-2")
    await deliver(client, hooks, "crew-first")
    (webhook,) = (await ask(client, cursor))["webhooks"]
    assert webhook["models"] == {
        "openai/gpt-4o": {"prompt_tokens": 11, "completion_tokens": 6, "total_tokens": 17},
        "claude": whole,
    }
    assert "the prompt" not in str(webhook)
    cursor = str((await ask(client))["cursor"])
    await call(7, "claude", whole)  # it comes after the end of its run
    (late,) = (await ask(client, cursor))["webhooks"]
    assert late["models"]["claude"]["total_tokens"] == 30


@pytest.mark.parametrize("authorization", [None, "", "Bearer ", "Bearer wrong", f"Basic {recent_bearer(SECRET)}"])
async def test_whoever_has_not_the_secret_gets_the_same_404(client: httpx.AsyncClient, authorization: str | None):
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = await client.get("/recent", headers=headers)
    assert (answer.status_code, answer.json()) == (404, {"error": "not found"})


@pytest.mark.parametrize("cursor", ["other-1", "nonsense", "-", "9" * 50, "\u2603"])
async def test_a_cursor_of_another_start_says_that_some_were_missed(client: httpx.AsyncClient, cursor: str):
    answer = await ask(client, cursor)
    assert (answer["missed"], answer["webhooks"]) == (True, [])
    assert str(answer["cursor"]).endswith("-0")


async def test_a_process_that_asks_too_late_hears_that_some_were_missed(
    client: httpx.AsyncClient, urls: Urls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recent, "KEPT", 2)
    cursor = str((await ask(client))["cursor"])
    for number in range(5):
        await deliver(client, urls(f"city/{number}"), "crew-first")
    late = await ask(client, cursor)
    assert [webhook["idempotency_key"] for webhook in late["webhooks"]] == ["city/3", "city/4"]
    assert late["missed"] is True


async def test_an_answer_has_a_limit_and_the_next_one_goes_on(
    client: httpx.AsyncClient, urls: Urls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recent, "AT_ONCE", 2)
    cursor, found = str((await ask(client))["cursor"]), []
    for number in range(5):
        await deliver(client, urls(f"city/{number}"), "crew-first")
    for _ in range(3):
        answer = await ask(client, cursor)
        assert answer["missed"] is False
        cursor = str(answer["cursor"])
        found += [webhook["idempotency_key"] for webhook in answer["webhooks"]]
    assert found == [f"city/{number}" for number in range(5)]


async def test_so_many_are_held_back_and_no_more(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recent, "MOST_HELD", 1)
    monkeypatch.setattr(recent, "HOLD", 0.3)
    cursor = str((await ask(client))["cursor"])
    asking = asyncio.create_task(ask(client, cursor))
    await asyncio.sleep(0.1)
    assert (await client.get("/recent", params={"after": cursor}, headers=BEARER)).status_code == 503
    assert (await asking)["webhooks"] == []


async def test_a_server_that_stops_waits_for_no_answer_that_is_held_back(kept: Kept, caplog: pytest.LogCaptureFixture):
    async with httpx.AsyncClient() as client:
        async with served(create_receiver(SECRET, forwarder=kept)) as url:
            client.base_url = url
            cursor = str((await ask(client))["cursor"])
            asking = [asyncio.create_task(ask(client, cursor)) for _ in range(3)]
            await until(lambda: kept.recent._held == 3, "all are held back")
            began = time.monotonic()
        answers = await asyncio.gather(*asking)
    assert time.monotonic() - began < 1.5
    assert [answer["webhooks"] for answer in answers] == [[], [], []]
    assert "Traceback" not in caplog.text


@pytest.mark.usefixtures("prefect_api")
async def test_a_question_is_reported_when_what_it_asks_can_be_read(urls: Urls):
    forwarder = Forwarder()
    kept: list[int] = []

    async def keep_slowly(*_: object) -> None:
        await asyncio.sleep(0.3)
        kept.append(len(forwarder.recent._kept))

    forwarder._notes.append((keep_slowly, ()))
    app = create_receiver(SECRET, forwarder=forwarder)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://receiver") as client:
        await deliver(client, urls(), "human_input-first")
        await until(lambda: forwarder.recent._kept, "the question is reported")
    assert kept == [0], "the note was kept before"
    await forwarder.aclose()
