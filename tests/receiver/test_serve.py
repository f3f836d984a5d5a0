"""The receiver on a port: its limits, its signals, and what is not HTTP."""

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from prefect_crew.receiver import serve
from prefect_crew.receiver.app import create_receiver
from support.prefect_server import PrefectServer
from support.processes import Process
from support.webhooks import BODIES, SECRET, events_of, served, until, url_of
from support.wire import exchange, request


@pytest.fixture
async def port(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr("prefect_crew.receiver.bodies.BODY_TIMEOUT", 0.3)
    async with served(create_receiver(SECRET)) as url:
        yield int(url.rpartition(":")[2])


def raw(urls: Any, attempt: Any, body: object = BODIES["crew-first"]) -> bytes:
    content = httpx.Request("POST", "http://x", json=body).content
    return request("POST", httpx.URL(url_of(urls(attempt, base="http://x"), "crew")).path, content)


async def test_no_http_and_half_a_body_harm_nothing(port: int, urls: Any, new_attempt: Any):
    whole = raw(urls, await new_attempt())
    garbage = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ]
    for content in garbage:
        assert await exchange(port, content) in (None, 400, 404)
    assert await exchange(port, whole[:-10]) == 408
    assert await exchange(port, whole) == 200


@pytest.mark.programs
async def test_the_command_takes_webhooks_and_ends_on_a_signal(
    receiver_process: tuple[Process, int], urls: Any, new_attempt: Any, key: str
):
    process, url = receiver_process[0], f"http://127.0.0.1:{receiver_process[1]}"
    assert url in process.output
    hook = url_of(urls(await new_attempt(), base=url), "crew")
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/health")).status_code == 200
        assert (await client.post(hook, json=BODIES["crew-first"])).status_code == 200
        assert (await client.post(hook + "x", json={})).status_code == 404
    process.send(signal.SIGTERM)
    await until(lambda: not process.running, "it ends")
    assert process.popen.returncode == 0
    (event,) = await events_of(key)
    assert event["event"] == "crew.webhook.crew"
    # No log line holds what protects the receiver.
    assert SECRET not in process.output
    assert hook.rpartition("/")[2] not in process.output


async def test_heads_and_connections_have_limits(prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "CONNECTIONS", 3)
    async with served(create_receiver(SECRET)) as url:
        port = int(url.rpartition(":")[2])
        assert await exchange(port, b"GET / HTTP/1.1\r\nX-Long: " + b"y" * serve.MAX_HEAD) == 400
        await until(lambda: exchange(port, request("GET", "/health")), "an answer")
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        assert await exchange(port, request("GET", "/health")) == 503
        for _, writer in opened:
            writer.transport.abort()
