"""The receiver on a port."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.receiver import serve
from prefect_crew.receiver.app import create_receiver
from support.environment import program
from support.prefect_server import PrefectServer, free_port
from support.processes import Process
from support.webhooks import BODIES, SECRET, Kept, events_of, served, until, url_of
from support.wire import exchange, request

Urls = Callable[..., Webhooks]


@pytest.fixture
async def port(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(serve, "HEAD_TIMEOUT", 0.3)
    async with served(create_receiver(SECRET, hand_on=kept, body_timeout=0.3)) as url:
        yield int(url.rpartition(":")[2])


def raw(urls: Urls, which: str = "crew-first", body: bytes | None = None, **facts: object) -> bytes:
    kind = which.partition("-")[0]
    content = httpx.Request("POST", "http://x", json=BODIES[which]).content if body is None else body
    return request("POST", httpx.URL(url_of(urls(**facts), kind)).path, content)


async def test_a_webhook_over_the_wire(port: int, urls: Urls, kept: Kept):
    assert await exchange(port, raw(urls)) == 200
    assert len(kept.news) == 1


@pytest.mark.parametrize(
    "cut",
    [pytest.param(0, id="nothing-comes"), pytest.param(20, id="half-a-head"), pytest.param(-2, id="almost-a-head")],
)
async def test_a_head_that_does_not_come_is_not_waited_for(cut: int, port: int, urls: Urls):
    whole = raw(urls)
    head = whole[: whole.index(b"\r\n\r\n") + 4]
    started = time.monotonic()
    assert await exchange(port, head[:cut]) is None
    assert time.monotonic() - started < 20


async def test_a_head_that_dribbles_is_not_waited_for(port: int):
    dribble = [b"POST /hooks/crew/x HTTP/1.1\r\n"] + [f"X-{n}: y\r\n".encode() for n in range(100)]
    assert await exchange(port, *dribble, pause=0.05) is None


async def test_the_next_head_on_a_connection_has_its_time_as_well(port: int, urls: Urls, kept: Kept):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in range(2):
        writer.write(raw(urls, attempt=number + 1).replace(b"Connection: close\r\n", b""))
        assert b" 200 " in await reader.readline()
        while (await reader.readline()).strip():
            pass
        await reader.readexactly(len(b'{"status":"accepted"}'))
    writer.write(b"POST /hooks")
    assert await asyncio.wait_for(reader.read(), 20) == b"", "it is closed without an answer"
    writer.close()
    assert len(kept.news) == 2


async def test_a_body_that_does_not_come_is_not_waited_for(port: int, urls: Urls, kept: Kept):
    whole = raw(urls)
    assert await exchange(port, whole[:-10]) == 408
    assert kept.news == []


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="tls"),
        pytest.param(b"GET\r\n\r\n", id="no-http"),
        pytest.param(b"\0" * 1000 + b"\r\n\r\n", id="zeros"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", id="two-lengths"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", id="no-chunk"),
    ],
)
async def test_what_is_no_http_harms_nothing(garbage: bytes, port: int, urls: Urls):
    assert await exchange(port, garbage) in (None, 400, 404)
    assert await exchange(port, raw(urls)) == 200


async def test_a_client_that_leaves_harms_nothing(port: int, urls: Urls, kept: Kept):
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw(urls)[:-5])
        writer.transport.abort()
    assert await exchange(port, raw(urls)) == 200
    assert len(kept.news) == 1


def test_it_is_served_until_a_signal(kept: Kept, capsys: pytest.CaptureFixture[str]):
    answers: list[int] = []

    def ask(line: str) -> None:
        answers.append(httpx.get(line.split()[-3]).status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    def announce(line: str) -> None:
        threading.Thread(target=ask, args=(line,), daemon=True).start()

    before = signal.getsignal(signal.SIGTERM)
    assert serve.serve_receiver(create_receiver(SECRET, hand_on=kept), port=0, announce=announce) == 0
    assert answers == [200]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_port_that_is_taken_is_said(kept: Kept):
    taken = serve.listener("127.0.0.1", 0)
    taken.listen()
    with taken, pytest.raises(OSError, match="in use"):
        serve.serve_receiver(create_receiver(SECRET, hand_on=kept), port=taken.getsockname()[1])


@pytest.fixture
def program_under_test(prefect_api: PrefectServer, tmp_path: Path) -> Iterator[tuple[Process, str]]:
    """`prefect-crew webhooks` as a process of its own, and its address."""
    port = free_port()
    env = prefect_api.env(PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET=SECRET, PREFECT_LOGGING_LEVEL="DEBUG")
    command = [program("prefect-crew"), "webhooks", "--port", str(port)]
    with Process(command, log=tmp_path / "webhooks.log", env=env) as process:
        yield process, f"http://127.0.0.1:{port}"


async def test_the_command_takes_webhooks_and_ends_when_told(program_under_test: tuple[Process, str], urls: Urls):
    process, url = program_under_test
    await until(lambda: url in process.output, "it listens", seconds=60)
    hooks = urls("served/lisbon", base=url)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/ready")).status_code == 200
        assert (await client.post(url_of(hooks, "crew"), json=BODIES["crew-first"])).status_code == 200
        assert (await client.post(url_of(hooks, "crew") + "x", json={})).status_code == 404
    process.send(signal.SIGTERM)
    await until(lambda: not process.running, "it ends", seconds=30)
    assert process.popen.returncode == 0
    (event,) = await events_of("served/lisbon")
    assert event["event"] == "crew.webhook.crew"
    # No log line holds what protects the receiver.
    assert SECRET not in process.output
    assert url_of(hooks, "crew").rpartition("/")[2] not in process.output
