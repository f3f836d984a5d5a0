"""What a process that waits for runs hears from the receiver itself."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.receiver import forward
from prefect_crew.receiver.app import create_receiver
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
    about = {"event": "crew.webhook.crew", "idempotency_key": "city/lisbon", "attempt": 1, "round": 0}
    said = {"kickoff_id": "k-1", "state": "completed", "execution_time": 9.0}
    assert webhook == {**about, "id": str(kept.events[-1].id), "said": said}
    assert answers[0]["missed"] is False
    assert "the output" not in str(answers)


async def test_whoever_has_no_cursor_of_this_start_gets_the_latest(client: httpx.AsyncClient, urls: Urls):
    await deliver(client, urls(), "crew-first")
    for after in ("", "other-1", "nonsense", "-", "9" * 50, "\u2603"):
        answer = await ask(client, after)
        assert (answer["missed"], len(answer["webhooks"])) == (bool(after), 1)
        assert str(answer["cursor"]).endswith("-1")


async def test_an_answer_has_a_limit(
    client: httpx.AsyncClient, kept: Kept, urls: Urls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forward, "MOST_IN_ANSWER", 2)
    kept.recent._kept = deque(maxlen=4)
    begin = cursor = str((await ask(client))["cursor"])
    found: list[Any] = []
    for number in range(4):
        await deliver(client, urls(f"city/{number}"), "crew-first")
    while len(found) < 4:
        answer = await ask(client, cursor)
        assert answer["missed"] is False
        cursor = str(answer["cursor"])
        found += [webhook["idempotency_key"] for webhook in answer["webhooks"]]
    assert found == [f"city/{number}" for number in range(4)]
    await deliver(client, urls("city/4"), "crew-first")
    late = await ask(client, begin)
    assert [webhook["idempotency_key"] for webhook in late["webhooks"]] == ["city/1", "city/2"]
    assert late["missed"] is True


async def test_so_many_are_held_back_and_no_more(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forward, "MOST_HELD", 1)
    monkeypatch.setattr(forward, "HOLD", 0.3)
    cursor = str((await ask(client))["cursor"])
    asking = asyncio.create_task(ask(client, cursor))
    await asyncio.sleep(0.1)
    assert (await client.get("/recent", params={"after": cursor}, headers=BEARER)).status_code == 503
    assert (await asking)["webhooks"] == []


async def test_a_stop_waits_for_no_held_answer(kept: Kept, caplog: pytest.LogCaptureFixture):
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
