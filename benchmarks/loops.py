"""What a batch is compared with: loops without ledger, record or second chance, and an empty flow.

Each knows how long a run takes, looks when it is surely over, and forgets everything if its process dies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from lean_server import TOKEN, many_files

GATE = 8
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def rows(count: int) -> Iterator[dict[str, str]]:
    return ({"topic": f"topic {number}"} for number in range(count))


async def loop(given: argparse.Namespace) -> None:
    """The best loop that we can write: plain asyncio, a connection for each request under way, kept open."""
    many_files()
    parts, todo, free = urlsplit(given.url), rows(given.rows), list[_Connection]()
    head = f"Host: {parts.netloc}\r\nAuthorization: Bearer {TOKEN}\r\n"
    running = asyncio.get_running_loop()

    async def ask(request: str) -> Any:
        if free:
            connection = free.pop()
        else:
            _, connection = await running.create_connection(_Connection, parts.hostname, parts.port)
        answer = await connection.ask(request.encode())
        free.append(connection)
        return json.loads(answer)

    with Path(given.output).open("w") as output:

        async def work() -> None:
            for inputs in todo:
                body = json.dumps({"inputs": inputs})
                request = f"POST /kickoff HTTP/1.1\r\n{head}Content-Type: application/json\r\n"
                run = (await ask(f"{request}Content-Length: {len(body)}\r\n\r\n{body}"))["kickoff_id"]
                # It knows as much as the batch does: an answer that comes late does not delay the look.
                await asyncio.sleep(given.seconds - given.latency + 0.002)
                look = f"GET /status/{run} HTTP/1.1\r\n{head}\r\n"
                while (status := await ask(look))["status"] == "running":
                    await asyncio.sleep(0.05)
                output.write(json.dumps({"inputs": inputs, "kickoff_id": run, **status["result"]}) + "\n")

        async with asyncio.TaskGroup() as group:
            for _ in range(min(given.in_flight, given.rows)):
                group.create_task(work())


class _Connection(asyncio.Protocol):
    """One request at a time over one connection."""

    _transport: Any
    _answer: asyncio.Future[bytes]
    _buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if end and len(body) == int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]):
            self._buffer = b""
            self._answer.set_result(body)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError())


async def clients(given: argparse.Namespace) -> None:
    """Eight httpx clients of one connection each: httpcore looks through a pool of eight at each request."""
    posts, gets = (asyncio.Semaphore(GATE) for _ in range(2))
    room = asyncio.Semaphore(given.in_flight)

    async def ask(gate: asyncio.Semaphore, free: list[httpx.AsyncClient], method: str, path: str, body: Any) -> Any:
        async with gate:
            client = free.pop()
            try:
                return (await client.request(method, f"{given.url}{path}", json=body)).json()
            finally:
                free.append(client)

    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(httpx.AsyncClient(headers=HEADERS)) for _ in range(2 * GATE)]
        posting, getting = opened[:GATE], opened[GATE:]
        output = stack.enter_context(Path(given.output).open("w"))  # noqa: SIM115  the stack closes it

        async def row(inputs: dict[str, str]) -> None:
            try:
                run = (await ask(posts, posting, "POST", "/kickoff", {"inputs": inputs}))["kickoff_id"]
                await asyncio.sleep(given.seconds)
                while (status := await ask(gets, getting, "GET", f"/status/{run}", None))["status"] == "running":
                    await asyncio.sleep(0.1)
                output.write(json.dumps({"inputs": inputs, "kickoff_id": run, **status["result"]}) + "\n")
            finally:
                room.release()

        async with asyncio.TaskGroup() as group:
            for inputs in rows(given.rows):
                await room.acquire()
                group.create_task(row(inputs))


async def empty(given: argparse.Namespace) -> None:
    """A flow that does nothing."""
    del given
    from prefect import flow

    await flow(_nothing)()


async def _nothing() -> None:
    """Do nothing."""
