"""The receiver as an ASGI app: what is taken, and what each refusal says."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Callable

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
BODY = json.dumps(BODIES["crew-first"]).encode()
MIB = 1024 * 1024


@pytest.mark.parametrize("which", BODIES)
async def test_each_kind_of_both_generations_is_taken(which: str, client: httpx.AsyncClient, kept: Kept, urls: Urls):
    kind, hooks = which.partition("-")[0], urls()
    answer = await client.post(url_of(hooks, kind), json=BODIES[which], headers=headers_of(hooks, kind))
    assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
    found = {(event.name.partition(".")[0], event.hook.idempotency_key) for event in kept.events}
    assert found == {(kind, "city/lisbon")}


async def test_whatever_is_not_ours_gets_the_same_404(client: httpx.AsyncClient, kept: Kept, urls: Urls):
    good, stale = urls(), urls(days=-1)
    crew, human = url_of(good, "crew"), url_of(good, "human_input")
    posts = [
        *(crew[:-1] + ("A" if crew[-1] != "A" else "B"), crew + "/", url_of(stale, "crew"), url_of(good, "stream")),
        *(crew.replace("/crew/", "/task/"), crew.replace("/crew/", "/nonsense/"), human),  # without its bearer token
        *("/hooks/crew/" + "A" * 5000, "/hooks/crew/%00%ff", "/hooks/crew", "/"),
    ]
    answers = [await client.post(url, json=BODIES["crew-first"]) for url in posts]
    answers += [await client.request(method, crew) for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS")]
    answers.append(await client.post(human, json={}, headers={"Authorization": "Bearer wrong"}))
    for given in (None, "", "Bearer ", "Bearer wrong", f"Basic {recent_bearer(SECRET)}"):
        headers = {} if given is None else {"Authorization": given}
        answers.append(await client.get("/recent", headers=headers))
    seen = {(answer.status_code, answer.text, tuple(sorted(answer.headers.items()))) for answer in answers}
    assert [one[:2] for one in seen] == [(404, '{"error":"not found"}')]
    assert kept.events == []


async def test_no_byte_of_a_body_is_read_before_its_token_is_known(client: httpx.AsyncClient):
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    assert (await client.post("/hooks/crew/AAAA", content=body())).status_code == 404


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
        pytest.param(b"", JSON, 400, id="empty"),
        pytest.param(b"nonsense", JSON, 400, id="no-json"),
        pytest.param(b"[]", JSON, 400, id="list"),
        pytest.param(b'{"status": "completed"}', JSON, 400, id="names-no-run"),
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
    content: bytes, headers: dict[str, str], status: int, client: httpx.AsyncClient, urls: Urls, kept: Kept
):
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    answer = await client.post(url_of(urls(), "crew"), content=content, headers=sent)
    assert (answer.status_code, len(kept.events)) == (status, int(status == 200))
    if "content-length" not in headers:  # in chunks, which do not tell their length before
        assert (await client.post(url_of(urls(), "crew"), content=parts(content), headers=sent)).status_code == status


async def test_health_and_readiness(client: httpx.AsyncClient, kept: Kept, urls: Urls):
    await client.post(url_of(urls(), "crew"), json=BODIES["crew-first"])
    await client.post("/hooks/crew/nonsense", json={})
    assert (await client.get("/health")).json() == {"status": "ok"}
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "answers": {"200": 1, "404": 1}, "received": 1})
    kept.ready = False
    assert (await client.get("/ready")).status_code == 503


async def test_a_mounted_receiver_takes_an_older_secret(kept: Kept, urls: Urls):
    app = Starlette(routes=[Mount("/of/crews", create_receiver(f"{'n' * 40} {SECRET}", forwarder=kept))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mine.example") as client:
        url = url_of(urls(base="http://mine.example/of/crews"), "crew")
        assert (await client.post(url, json=BODIES["crew-first"])).status_code == 200
        assert (await client.get("/of/crews/health")).status_code == 200
        assert (await client.post("/of/crews/hooks/crew/x")).json() == {"error": "not found"}
    assert len(kept.events) == 1


def test_a_receiver_needs_a_secret_and_a_prefect_api(monkeypatch: pytest.MonkeyPatch, kept: Kept):
    monkeypatch.delenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigurationError, match="WEBHOOK_SECRET"):
        create_receiver(forwarder=kept)
    with pytest.raises(ConfigurationError, match="5 characters"):
        create_receiver("short", forwarder=kept)
    with pytest.raises(ConfigurationError, match="PREFECT_API_URL"):
        create_receiver(SECRET)
