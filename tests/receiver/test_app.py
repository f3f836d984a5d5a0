from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.receiver.app import create_receiver
from prefect_crew.webhooks import recent_bearer
from support.webhooks import BODIES, SECRET, Kept, headers_of, url_of

Urls = Callable[..., Webhooks]


@pytest.mark.parametrize("which", BODIES)
async def test_each_kind_of_both_generations_is_taken(which: str, client: httpx.AsyncClient, kept: Kept, urls: Urls):
    kind, hooks = which.partition("-")[0], urls()
    answer = await client.post(url_of(hooks, kind), json=BODIES[which], headers=headers_of(hooks, kind))
    assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
    assert {event.name.partition(".")[0] for event in kept.events} == {kind}
    assert {event.hook.idempotency_key for event in kept.events} == {"city/lisbon"}


STALE = {"expires": datetime.now(UTC) - timedelta(seconds=1)}


async def test_whatever_is_not_ours_gets_the_same_404(client: httpx.AsyncClient, kept: Kept, urls: Urls):
    good, stale = urls(), urls(**STALE)
    crew, human = url_of(good, "crew"), url_of(good, "human_input")
    posts = [
        crew[:-1] + ("A" if crew[-1] != "A" else "B"),
        crew + "/",
        crew.replace("/crew/", "/task/"),
        crew.replace("/crew/", "/nonsense/"),
        url_of(stale, "crew"),
        human,  # without its bearer token
        url_of(good, "stream"),
        "/hooks/crew/" + "A" * 5000,
        "/hooks/crew/%00%ff",
        "/hooks/crew",
        "/",
    ]
    answers = [await client.post(url, json=BODIES["crew-first"]) for url in posts]
    answers += [await client.request(method, crew) for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS")]
    answers.append(await client.post(human, json={}, headers={"Authorization": "Bearer wrong"}))
    seen = {(answer.status_code, answer.text, tuple(sorted(answer.headers.items()))) for answer in answers}
    assert len(seen) == 1
    assert seen.pop()[:2] == (404, '{"error":"not found"}')
    assert kept.events == []


async def test_no_byte_of_a_body_is_read_before_its_token_is_known(client: httpx.AsyncClient):
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    answer = await client.post("/hooks/crew/AAAA", content=body())
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("type_", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.crew+json", 200),
        ("", 200),
        ("text/plain", 415),
        ("image/svg+json", 415),
        ("gzip", 415),
    ],
)
async def test_json_only(type_: str, status: int, client: httpx.AsyncClient, urls: Urls, kept: Kept):
    body, headers = json.dumps(BODIES["crew-first"]).encode(), {"Content-Type": type_} if type_ else {}
    if type_ == "gzip":
        body, headers = gzip.compress(body), {"Content-Type": "application/json", "Content-Encoding": type_}
    answer = await client.post(url_of(urls(), "crew"), content=body, headers=headers)
    assert answer.status_code == status
    assert len(kept.events) == (status == 200)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"nonsense", id="no-json"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'{"status": "completed"}', id="names-no-run"),
        pytest.param(b"\xff\xfe\x00", id="no-text"),
        pytest.param(b'{"kickoff_id":' * 60_000, id="deep"),
        pytest.param(b'{"kickoff_id": ' + b"9" * 900_000 + b"}", id="huge-number"),
    ],
)
async def test_what_is_no_webhooks_body_gets_a_400(body: bytes, client: httpx.AsyncClient, urls: Urls, kept: Kept):
    answer = await client.post(url_of(urls(), "crew"), content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert kept.events == []


@pytest.mark.parametrize("chunked", [pytest.param(False, id="length"), pytest.param(True, id="chunked")])
async def test_bodies_are_capped(chunked: bool, client: httpx.AsyncClient, urls: Urls, kept: Kept):
    async def parts(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    for size, status in ((1024 * 1024, 200), (1024 * 1024 + 1, 413)):
        body = json.dumps(BODIES["crew-first"]).encode().ljust(size)
        answer = await client.post(url_of(urls(), "crew"), content=parts(body) if chunked else body)
        assert answer.status_code == status
    assert len(kept.events) == 1


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 50, "x", "²"])
async def test_a_length_that_is_none_is_too_much(length: str, client: httpx.AsyncClient, urls: Urls):
    answer = await client.post(
        url_of(urls(), "crew"), content=b"{}", headers=[(b"content-length", length.encode("latin-1"))]
    )
    assert answer.status_code == 413


async def test_health_and_readiness(client: httpx.AsyncClient, kept: Kept, urls: Urls):
    await client.post(url_of(urls(), "crew"), json=BODIES["crew-first"])
    await client.post("/hooks/crew/nonsense", json={})
    assert (await client.get("/health")).json() == {"status": "ok"}
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "answers": {"200": 1, "404": 1}, "received": 1})
    kept.ready = False
    assert (await client.get("/ready")).status_code == 503


async def test_it_can_be_mounted_into_an_app(kept: Kept, urls: Urls):
    app = Starlette(routes=[Mount("/of/crews", create_receiver(SECRET, forwarder=kept))])
    hooks = urls(base="http://mine.example/of/crews")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mine.example") as client:
        answer = await client.post(url_of(hooks, "crew"), json=BODIES["crew-first"])
        assert answer.status_code == 200
        assert (await client.get("/of/crews/health")).status_code == 200
        assert (await client.post("/of/crews/hooks/crew/x")).json() == {"error": "not found"}
    assert len(kept.events) == 1


def test_a_receiver_needs_a_secret(monkeypatch: pytest.MonkeyPatch, kept: Kept):
    monkeypatch.delenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", raising=False)
    with pytest.raises(ConfigurationError, match="WEBHOOK_SECRET"):
        create_receiver(forwarder=kept)
    with pytest.raises(ConfigurationError, match="5 characters"):
        create_receiver("short", forwarder=kept)


async def test_a_receiver_with_a_new_secret_still_takes_what_the_old_one_signed(kept: Kept, urls: Urls):
    app = create_receiver(f"{'n' * 40} {SECRET}", forwarder=kept)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://receiver") as client:
        for kind in ("crew", "human_input"):
            hooks, body = urls(), BODIES[f"{kind}-first"]
            answer = await client.post(url_of(hooks, kind), json=body, headers=headers_of(hooks, kind))
            assert answer.status_code == 200
        for signer in (SECRET, "n" * 40):
            bearer = {"Authorization": f"Bearer {recent_bearer(signer)}"}
            assert (await client.get("/recent", headers=bearer)).status_code == 200
        bearer = {"Authorization": f"Bearer {recent_bearer('o' * 40)}"}
        assert (await client.get("/recent", headers=bearer)).status_code == 404
    assert len(kept.events) == 2


def test_a_receiver_needs_a_prefect_api(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigurationError, match="PREFECT_API_URL"):
        create_receiver(SECRET)
