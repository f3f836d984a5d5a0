"""Thousands of connections without a byte, to a receiver in a process that may open 1,024 files and no more."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from prefect_crew.client.webhooks import Webhooks
from prefect_crew.receiver import app as receiver_app
from prefect_crew.receiver import serve
from prefect_crew.receiver.app import create_receiver
from support.prefect_server import free_port
from support.processes import Process
from support.webhooks import BODIES, SECRET, Kept, served, until, url_of
from support.wire import exchange, request

SILENT = 2_000
PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from prefect_crew.receiver.serve import serve_receiver
from prefect_crew.receiver import create_receiver

class Sink:
    ready = True
    def start(self): pass
    def put(self, news): pass
    def report(self): return {}
    async def aclose(self): pass

serve_receiver(create_receiver(sys.argv[1], hand_on=Sink()), port=int(sys.argv[2]))
"""


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process open as many connections as it wants to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * SILENT + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} open files; this machine allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_it_answers_beside_two_thousand_silent_connections(
    many_files: None, tmp_path: Path, urls: Callable[..., Webhooks]
):
    port = free_port()
    with Process([sys.executable, "-c", PROGRAM, SECRET, str(port)], log=tmp_path / "receiver.log") as process:
        await until(lambda: "Taking webhooks" in process.output, "it listens", seconds=60)
        silent: list[asyncio.StreamWriter] = []

        async def be_silent() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            silent.append(writer)

        async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            for _ in range(2):  # those that were closed come again
                await asyncio.gather(*(be_silent() for _ in range(SILENT)))
                for number in range(5):
                    assert (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200
                    hooks = urls(f"silent/{len(silent)}/{number}", base=f"http://127.0.0.1:{port}")
                    answered = await client.post(url_of(hooks, "crew"), json=BODIES["crew-first"])
                    assert answered.status_code == 200
        for writer in silent:
            writer.transport.abort()
        assert process.running
        assert len(process.output) < 10_000, "its log is flooded"


@pytest.fixture
async def port(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(serve, "IDLE", 3)
    async with served(create_receiver(SECRET, hand_on=kept)) as url:
        yield int(url.rpartition(":")[2])


async def test_beyond_its_limit_the_connection_that_was_idle_for_longest_is_closed(port: int):
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
    first, second, third = opened
    # What has just been answered is the newest again.
    first[1].write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 200 " in await first[0].readline()
    fourth = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):  # it may be reset
        assert await asyncio.wait_for(second[0].read(), 30) == b""
    for reader, writer in (first, third, fourth):
        assert not reader.at_eof()
        writer.transport.abort()


async def test_that_there_is_no_room_is_said_once(kept: Kept, caplog: pytest.LogCaptureFixture):
    server = serve.ReceiverServer(create_receiver(SECRET, hand_on=kept))
    loop = asyncio.get_running_loop()
    for _ in range(1_000):
        no_room = OSError(24, "Too many open files")
        server._on_trouble(loop, {"message": "socket.accept() out of system resource", "exception": no_room})
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    server._on_trouble(loop, {"message": "another trouble", "exception": OSError(5, "I/O")})
    assert "another trouble" in caplog.text


async def test_a_large_body_is_parsed_apart_from_the_event_loop(
    port: int, urls: Callable[..., Webhooks], kept: Kept, monkeypatch: pytest.MonkeyPatch
):
    loops: list[bool] = []
    parse = receiver_app.parse_webhook

    def seen(kind: object, body: bytes) -> object:
        loops.append(threading.current_thread() is threading.main_thread())
        return parse(kind, body)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(receiver_app, "parse_webhook", seen)
    large = httpx.Request("POST", "http://x", json={**BODIES["crew-later"], "result": "x" * 300_000}).content
    path = httpx.URL(url_of(urls(), "crew")).path
    assert await asyncio.gather(*(exchange(port, request("POST", path, large)) for _ in range(2))) == [200, 200]
    small = httpx.Request("POST", "http://x", json=BODIES["crew-later"]).content
    assert await exchange(port, request("POST", path, small)) == 200
    assert (loops[0], loops[-1]) == (False, True)
    assert len(kept.news) == 2, "the same delivery counts once"
