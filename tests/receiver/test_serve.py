"""The receiver on a port: its limits, its signals, and what is not HTTP."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.receiver import app as receiver_app
from prefect_crew.receiver import serve
from prefect_crew.receiver.app import create_receiver
from support.prefect_server import PrefectServer
from support.processes import Process
from support.proxy import Proxy
from support.webhooks import BODIES, SECRET, Kept, events_of, receiver_of, served, until, url_of
from support.wire import exchange, request


@pytest.fixture
async def port(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr("prefect_crew.receiver.bodies.BODY_TIMEOUT", 0.3)
    async with served(create_receiver(SECRET, forwarder=kept)) as url:
        yield int(url.rpartition(":")[2])


def raw(urls: Any, body: object = BODIES["crew-first"], **facts: object) -> bytes:
    content = httpx.Request("POST", "http://x", json=body).content
    return request("POST", httpx.URL(url_of(urls(base="http://x", **facts), "crew")).path, content)


async def test_no_http_and_half_a_body_harm_nothing(port: int, urls: Any, kept: Kept):
    garbage = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ]
    for content in garbage:
        assert await exchange(port, content) in (None, 400, 404)
    assert await exchange(port, raw(urls)[:-10]) == 408
    assert kept.events == []
    assert await exchange(port, raw(urls)) == 200


@pytest.mark.programs
async def test_the_command_takes_webhooks_and_ends_on_a_signal(
    receiver_process: tuple[Process, int], urls: Any, key: str
):
    process, url = receiver_process[0], f"http://127.0.0.1:{receiver_process[1]}"
    assert url in process.output
    hook = url_of(urls(key, base=url), "crew")
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/ready")).status_code == 200
        assert (await client.post(hook, json=BODIES["crew-first"])).status_code == 200
        assert (await client.post(hook + "x", json={})).status_code == 404
    process.send(signal.SIGTERM)
    await until(lambda: not process.running, "it ends", seconds=30)
    assert process.popen.returncode == 0
    (event,) = await events_of(key)
    assert event["event"] == "crew.webhook.crew"
    # No log line holds what protects the receiver.
    assert SECRET not in process.output
    assert hook.rpartition("/")[2] not in process.output


@pytest.mark.programs
@pytest.mark.parametrize("signals", [1, 2])
async def test_the_command_ends_without_prefect(
    prefect_api: PrefectServer, urls: Any, key: str, tmp_path: Path, signals: int
):
    """Python's exit waits for Prefect's thread, which tries to send each event for 7 s."""
    with (
        Proxy(prefect_api.port) as proxy,
        receiver_of(prefect_api.env(PREFECT_API_URL=f"{proxy.url}/api"), tmp_path) as (process, port),
    ):
        assert await exchange(port, raw(urls, key=key)) == 200
        await events_of(key)
        proxy.cut()
        for attempt in range(2, 7):
            assert await exchange(port, raw(urls, key=key, attempt=attempt)) == 200
        await until(lambda: "Unable to connect" in process.output, "the log says what is wrong")
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw(urls)[:-10])  # uvicorn waits for the rest, or for a second signal
        for _ in range(signals):
            await asyncio.sleep(0.3)
            process.send(signal.SIGINT)
        await until(lambda: not process.running, "it ends", seconds=20)
        assert process.popen.returncode == 0
        assert ("did not take all events" in process.output) is (signals == 1)
        assert "lifespan" not in process.output
        writer.close()


async def test_heads_and_connections_have_limits(kept: Kept, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "CONNECTIONS", 3)
    async with served(create_receiver(SECRET, forwarder=kept)) as url:
        port = int(url.rpartition(":")[2])
        assert await exchange(port, b"GET / HTTP/1.1\r\nX-Long: " + b"y" * serve.MAX_HEAD) == 400
        await until(lambda: exchange(port, request("GET", "/health")), "an answer")
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        assert await exchange(port, request("GET", "/health")) == 503
        for _, writer in opened:
            writer.transport.abort()


async def test_a_large_body_is_parsed_in_a_thread(port: int, urls: Any, kept: Kept, monkeypatch: Any):
    threads, parse = list[threading.Thread](), receiver_app.read_events

    def parse_here(*facts: Any) -> object:
        threads.append(threading.current_thread())
        return parse(*facts)

    monkeypatch.setattr(receiver_app, "read_events", parse_here)
    large = raw(urls, {**BODIES["crew-later"], "result": "x" * 300_000})
    assert await asyncio.gather(exchange(port, large), exchange(port, large)) == [200, 200]
    assert await exchange(port, raw(urls, BODIES["crew-later"])) == 200
    assert [thread is threading.main_thread() for thread in threads] == [False, False, True]
    assert len({event.id for event in kept.events}) == 2, "the same delivery has the same id"
