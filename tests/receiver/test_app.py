"""The receiver as an ASGI app: what is taken, what each refusal says, and what a process that waits for runs hears."""

import asyncio
import gzip
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.receiver import forward
from prefect_crew.receiver.app import create_receiver
from prefect_crew.webhooks import recent_bearer
from support.webhooks import BODIES, SECRET, Kept, headers_of, served, until, url_of

BODY = json.dumps(BODIES["crew-first"]).encode()
MIB = 1024 * 1024


@pytest.mark.parametrize("which", BODIES)
async def test_each_kind_of_both_generations_is_taken(which: str, client: httpx.AsyncClient, kept: Kept, urls: Any):
    kind, hooks = which.partition("-")[0], urls()
    answer = await client.post(url_of(hooks, kind), json=BODIES[which], headers=headers_of(hooks, kind))
    assert answer.status_code == 200
    assert answer.json() == {"status": "accepted"}
    assert {event.name.partition(".")[0] for event in kept.events} == {kind}
    assert {event.hook.idempotency_key for event in kept.events} == {"city/lisbon"}


async def test_whatever_is_not_ours_gets_the_same_404(client: httpx.AsyncClient, kept: Kept, urls: Any):
    good, stale = urls(), urls(days=-1)
    crew = url_of(good, "crew")
    posts = [
        *(crew[:-1] + ("A" if crew[-1] != "A" else "B"), crew + "/", url_of(stale, "crew"), url_of(good, "stream")),
        *(crew.replace("/crew/", "/task/"), crew.replace("/crew/", "/nonsense/")),
        *("/hooks/crew/" + "A" * 5000, "/hooks/crew/%00%ff", "/hooks/crew", "/"),
    ]
    answers = [await client.post(url, json=BODIES["crew-first"]) for url in posts]
    answers += [await client.request(method, crew) for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS")]
    stream = url_of(good, "stream")
    answers.append(await client.post(stream, json={}, headers={"Authorization": "Bearer wrong"}))
    answers.append(await client.post("/hooks/crew/AAAA", content=unread()))
    answers.append(await client.get("/recent"))
    for value in ("", "Bearer ", "Bearer wrong", f"Basic {recent_bearer(SECRET)}"):
        answers.append(await client.get("/recent", headers={"Authorization": value}))
    kinds = {(answer.status_code, answer.text, tuple(sorted(answer.headers.items()))) for answer in answers}
    assert [kind[:2] for kind in kinds] == [(404, '{"error":"not found"}')]
    assert kept.events == []


async def unread() -> AsyncIterator[bytes]:
    raise AssertionError("a byte was read before the token was known")
    yield b""


async def parts(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 65536):
        yield body[start : start + 65536]


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        pytest.param(BODY, JSON, 200, id="json"),
        pytest.param(BODY, {"Content-Type": "Application/JSON; charset=utf-8"}, 200, id="charset"),
        pytest.param(BODY, {"Content-Type": "application/vnd.crew+json"}, 200, id="like-json"),
        pytest.param(BODY, {}, 200, id="no-type"),
        pytest.param(BODY, {"Content-Type": "text/plain"}, 415, id="text"),
        pytest.param(BODY, {"Content-Type": "image/svg+json"}, 415, id="image"),
        pytest.param(gzip.compress(BODY), {**JSON, "Content-Encoding": "gzip"}, 415, id="gzip"),
        pytest.param(b"nonsense", JSON, 400, id="no-json"),
        pytest.param(b"\xff\xfe\x00", JSON, 400, id="no-text"),
        pytest.param(b'{"kickoff_id":' * 60_000, JSON, 400, id="deep"),
        pytest.param(b'{"kickoff_id": ' + b"9" * 900_000 + b"}", JSON, 400, id="huge-number"),
        pytest.param(BODY.ljust(MIB), JSON, 200, id="as-large-as-may-be"),
        pytest.param(BODY.ljust(MIB + 1), JSON, 413, id="too-large"),
        *(
            pytest.param(b"{}", {"content-length": length}, 413, id=f"length-{length[:5]}")
            for length in ("-1", "1e3", "9" * 50, "x", "²")
        ),
    ],
)
async def test_bodies_that_are_taken_or_refused(
    content: bytes, headers: dict[str, str], status: int, client: httpx.AsyncClient, urls: Any, kept: Kept
):
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    answer = await client.post(url_of(urls(), "crew"), content=content, headers=sent)
    assert answer.status_code == status
    assert len(kept.events) == int(status == 200)
    if "content-length" not in headers:  # in chunks, which do not tell their length before
        assert (await client.post(url_of(urls(), "crew"), content=parts(content), headers=sent)).status_code == status


async def test_health_and_readiness(client: httpx.AsyncClient, kept: Kept, urls: Any):
    await client.post(url_of(urls(), "crew"), json=BODIES["crew-first"])
    await client.post("/hooks/crew/nonsense", json={})
    assert (await client.get("/health")).json() == {"status": "ok"}
    answer = await client.get("/ready")
    assert answer.status_code == 200
    assert answer.json() == {"ready": True, "answers": {"200": 1, "404": 1}, "received": 1}
    kept.ready = False
    assert (await client.get("/ready")).status_code == 503


def test_a_receiver_needs_a_secret_and_a_prefect_api(monkeypatch: pytest.MonkeyPatch, kept: Kept):
    monkeypatch.delenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigurationError, match="WEBHOOK_SECRET"):
        create_receiver(forwarder=kept)
    with pytest.raises(ConfigurationError, match="5 characters"):
        create_receiver("short", forwarder=kept)
    with pytest.raises(ConfigurationError, match="PREFECT_API_URL"):
        create_receiver(SECRET)


# What a process that waits for runs hears

BEARER = {"Authorization": f"Bearer {recent_bearer(SECRET)}"}


async def ask(client: httpx.AsyncClient, after: str = "") -> dict[str, Any]:
    answer = await client.get("/recent", params={"after": after}, headers=BEARER)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


async def deliver(client: httpx.AsyncClient, hooks: Webhooks, which: str = "crew-first") -> None:
    kind = which.partition("-")[0]
    answer = await client.post(url_of(hooks, kind), json=BODIES[which], headers=headers_of(hooks, kind))
    assert answer.status_code == 200


async def test_an_answer_is_held_back_until_a_webhook_comes(client: httpx.AsyncClient, kept: Kept, urls: Any):
    cursor = str((await ask(client))["cursor"])
    asking = [asyncio.create_task(ask(client, cursor)) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in asking)
    began = time.monotonic()
    await deliver(client, urls(), "step-first")  # it ends no pause
    await deliver(client, urls())
    answers = await asyncio.gather(*asking)
    assert time.monotonic() - began < 5
    webhook = {
        "id": str(kept.events[-1].id),
        "event": "crew.webhook.crew",
        "idempotency_key": "city/lisbon",
        "attempt": 1,
        "round": 0,
        "said": {"kickoff_id": "k-1", "state": "completed", "execution_time": 9.0},
    }
    assert answers == [{"cursor": answers[0]["cursor"], "missed": False, "webhooks": [webhook]}] * 3


async def test_a_cursor_of_no_start_gets_the_latest(client: httpx.AsyncClient, urls: Any):
    await deliver(client, urls())
    for after in ("", "other-1", "nonsense", "-", "9" * 50, "\u2603"):
        answer = await ask(client, after)
        assert answer["missed"] is bool(after)
        assert len(answer["webhooks"]) == 1
        assert answer["cursor"].endswith("-1")


async def test_an_answer_has_a_limit(client: httpx.AsyncClient, kept: Kept, urls: Any, monkeypatch: Any):
    monkeypatch.setattr(forward, "MOST_IN_ANSWER", 2)
    kept.recent._kept = deque(maxlen=4)
    begin = cursor = str((await ask(client))["cursor"])
    keys: list[str] = []
    for number in range(4):
        await deliver(client, urls(f"city/{number}"))
    while len(keys) < 4:
        answer = await ask(client, cursor)
        assert answer["missed"] is False
        cursor = answer["cursor"]
        keys += [webhook["idempotency_key"] for webhook in answer["webhooks"]]
    assert keys == [f"city/{number}" for number in range(4)]
    await deliver(client, urls("city/4"))
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
