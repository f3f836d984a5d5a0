"""The connections for the polls of a batch, against real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from prefect_crew.client._polls import PollTransport
from prefect_crew.client._transport import tls_context
from support.frames import locals_of
from support.raw import Handler, answer, raw_server, read_request

TIMEOUTS = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}


class Talking:
    """A server that counts the requests of each connection, answers each with `reply`, and adds `after` or closes."""

    def __init__(self, reply: bytes = answer("{}"), after: bytes = b"", *, closes: bool = False) -> None:
        self.connections: list[int] = []
        self.gone = 0
        self._reply, self._after, self._closes = reply, after, closes

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.connections)
        self.connections.append(0)
        try:
            while await read_request(reader):
                self.connections[number] += 1
                writer.write(self._reply)
                await writer.drain()
                await asyncio.sleep(0.05)
                writer.write(self._after)
                if self._closes:
                    return
        finally:
            self.gone += 1


class Opened:
    """A transport to a server."""

    def __init__(self, url: str, most: int, keepalive: float) -> None:
        self._url = url
        self.transport = PollTransport(httpx.URL(url), tls=tls_context(), keepalive=keepalive, most=(most, most // 10))

    async def get(self) -> httpx.Response:
        headers = {"Authorization": "Bearer t0ken-0123456789"}
        request = httpx.Request("GET", f"{self._url}/status/1", headers=headers, extensions={"timeout": TIMEOUTS})
        response = await self.transport.handle_async_request(request)
        await response.aread()
        return response


@contextlib.asynccontextmanager
async def opened(server: Handler, *, most: int = 1_000_000, keepalive: float = 60.0) -> AsyncIterator[Opened]:
    async with raw_server(server) as url:
        client = Opened(url, most, keepalive)
        yield client
        await client.transport.aclose()


async def test_a_connection_is_used_again() -> None:
    server = Talking()
    async with opened(server) as client:
        for _ in range(3):
            response = await client.get()
            assert (response.status_code, response.content) == (200, b"{}")
    assert server.connections == [3]


async def test_an_idle_connection_is_used_for_a_while() -> None:
    server = Talking()
    async with opened(server, keepalive=0.3) as client:
        for seconds in (0.0, 0.6):
            await asyncio.sleep(seconds)
            await client.get()
    assert server.connections == [1, 1]


async def test_connections_of_a_burst_are_closed_once_they_are_old() -> None:
    server = Talking()
    async with opened(server, keepalive=0.3) as client:
        await asyncio.gather(*(client.get() for _ in range(10)))
        assert len(server.connections) == 10
        for _ in range(15):
            await asyncio.sleep(0.1)
            await client.get()
        assert server.gone >= 9


async def test_a_connection_whose_socket_is_gone_is_left() -> None:
    server = Talking()
    async with opened(server) as client:
        await client.get()
        await client.transport._idle[0].aclose()
        assert (await client.get()).status_code == 200
    assert server.connections == [1, 1]


@pytest.mark.parametrize("after", [b"", answer("", "408 Request Timeout")], ids=["closed", "said-more"])
async def test_a_connection_on_which_the_server_said_more_is_left(after: bytes) -> None:
    """A poll must not take an earlier word of the server for its answer."""
    server = Talking(after=after, closes=not after)
    async with opened(server) as client:
        assert (await client.get()).status_code == 200
        for _ in range(2):
            await asyncio.sleep(0.2)
            assert (await client.get()).status_code == 200
    assert max(server.connections) == 1


async def test_a_word_that_came_while_the_loop_was_busy_is_no_answer() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        """Answer one request of each connection, and say more a little later; in a thread, since the loop is busy."""
        for number in range(2):
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer(f"{number}"))
            time.sleep(0.1)
            connection.sendall(answer("stray"))

    threading.Thread(target=serve, daemon=True).start()
    client = Opened(f"http://127.0.0.1:{listener.getsockname()[1]}", 1000, 60.0)
    contents = [(await client.get()).content]
    time.sleep(0.3)
    contents.append((await client.get()).content)
    await client.transport.aclose()
    listener.close()
    assert contents == [b"0", b"1"]


@pytest.mark.parametrize(
    ("reply", "closes"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", False),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" + answer("{}"), False),
        (b"HTTP/1.0 200 OK\r\n\r\n{}", True),
        (answer("{}", headers=f"X-Long: {'x' * 60_000}\r\n"), False),
    ],
    ids=["chunked", "hints", "until-closed", "long-head"],
)
async def test_an_answer_of_any_framing_is_read(reply: bytes, closes: bool) -> None:
    async with opened(Talking(reply, closes=closes)) as client:
        response = await client.get()
    assert (response.status_code, response.content) == (200, b"{}")


async def test_a_broken_answer_is_an_error_of_httpx() -> None:
    server = Talking(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", closes=True)
    async with opened(server) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get()
    assert server.connections == [1]


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
async def test_no_more_of_an_answer_is_read_than_allowed(status: str) -> None:
    server = Talking(answer("x" * 3_000_000, status))
    async with opened(server, most=200_000) as client:
        bodies = [(await client.get()).content for _ in range(2)]
    assert max(map(len, bodies)) < 300_000
    assert server.connections == [1, 1], "the rest of an answer is not taken for the next one"


async def test_a_name_that_is_none_is_no_connection() -> None:
    for host in ("a" * 64 + ".example", "crew.invalid"):
        client = Opened(f"http://{host}", 1000, 60.0)
        with pytest.raises(httpx.ConnectError):
            await client.get()


async def test_a_cancelled_request_closes_its_connection_and_shows_no_token() -> None:
    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await read_request(reader)
        assert await reader.read() == b""
        closed.set()

    closed = asyncio.Event()
    async with opened(silent) as client:
        task = asyncio.ensure_future(client.get())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert "t0ken" not in locals_of(caught.value, but=__file__)
        await asyncio.wait_for(closed.wait(), 10)
