"""A crew server for benchmarks, in a process of its own: as little as the crew API allows, so that it is not a
bottleneck.

    python benchmarks/lean_server.py --seconds 2 --latency 0.2

`--latency` is how many seconds each answer takes, as over a network. It answers in the documented format over plain
asyncio, holds no tasks (a run has ended once its time is over), and calls the crew webhook that a kickoff asked for,
and no other. Benchmarks ask it, at an address without latency:

    GET  /_counts    kickoffs, distinct keys, status calls, stops, connections, the CPU seconds of this process
    GET  /_looks     how often each run was asked for its status, by its id
    GET  /_ends      when each run ended or will end, by its id, in seconds since 1970
    POST /_end       end all runs now: with `--seconds inf` they go on until then
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import re
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

TOKEN = "bench-token"  # of a server that only this machine reaches
WEBHOOKS_AT_ONCE = 32
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_RUNNING = b'{"status":"running","current_task":"work","progress":{"completed_tasks":0,"total_tasks":1}}'
_COMPLETED = (
    b'{"status":"completed","result":{"output":"Done with run %s.","tasks":[{"task_id":"work","output":'
    b'"Done.","agent":"Worker","execution_time":%g}]},"execution_time":%g}'
)


class Crew:
    """All runs: when each ends, by its number. Its id is that number after what no other server of this kind has."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends: list[float] = []
        self.looks: list[int] = []
        self.webhooks: dict[int, tuple[str, Any]] = {}
        self.keys: set[str] = set()
        self.stops = self.connections = 0
        self.name = secrets.token_hex(4)
        self.outgoing: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    def answer(self, method: bytes, path: bytes, body: bytes) -> bytes:
        if path == b"/kickoff":
            return self._kick_off(json.loads(body))
        _, _, number = path.rpartition(b"-")
        if path.startswith(b"/status/"):
            self.looks[int(number) - 1] += 1
            if time.monotonic() < self.ends[int(number) - 1]:
                return _RUNNING
            took = 0.0 if math.isinf(self.seconds) else self.seconds
            return _COMPLETED % (path[8:], took, took)
        if path.startswith(b"/stop/"):
            self.stops += 1
            self.ends[int(number) - 1] = time.monotonic()
            return b'{"status":"stopped","kickoffId":"%s"}' % path[6:]
        if path == b"/inputs":
            return b'{"inputs":["topic"]}'
        return json.dumps(self._said(path)).encode()

    def _kick_off(self, body: dict[str, Any]) -> bytes:
        self.ends.append(time.monotonic() + self.seconds)
        self.looks.append(0)
        number, meta = len(self.ends), body.get("meta") or {}
        self.keys.add(meta.get("idempotency_key", ""))
        if url := body.get("crewWebhookUrl"):
            self.webhooks[number] = url, meta
            if not math.isinf(self.seconds):
                asyncio.get_running_loop().call_later(self.seconds, self._send, number)
        return b'{"kickoff_id":"%s-%d"}' % (self.name.encode(), number)

    def _send(self, number: int) -> None:
        url, meta = self.webhooks.pop(number)
        body = {"kickoff_id": f"{self.name}-{number}", "result": "Done.", "meta": meta}
        self.outgoing.put_nowait((url, json.dumps(body).encode()))

    def _said(self, path: bytes) -> Any:
        past = time.time() - time.monotonic()
        if path == b"/_end":
            now = time.monotonic()
            self.ends = [min(end, now) for end in self.ends]
            for number in list(self.webhooks):
                self._send(number)
            return past + now
        if path == b"/_ends":
            return {f"{self.name}-{number}": past + end for number, end in enumerate(self.ends, 1)}
        if path == b"/_looks":
            return {f"{self.name}-{number}": looks for number, looks in enumerate(self.looks, 1)}
        counts = {"kickoffs": len(self.ends), "keys": len(self.keys - {""}), "status_calls": sum(self.looks)}
        return {**counts, "stops": self.stops, "connections": self.connections, "cpu_seconds": time.process_time()}

    async def send_webhooks(self) -> None:
        """Send what is to be sent, over one connection that is kept open. Several of these run at the same time."""
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        while True:
            url, body = await self.outgoing.get()
            parts = urlsplit(url)
            head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            for _ in range(3):
                try:
                    if reader is None or writer is None:
                        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
                    writer.write(request)
                    answer = await reader.readuntil(b"\r\n\r\n")
                    length = _LENGTH.search(answer)
                    await reader.readexactly(int(length[1]) if length else 0)
                    break
                except (OSError, asyncio.IncompleteReadError):  # it closes a connection that was idle
                    reader = writer = None


class Connection(asyncio.Protocol):
    """Reads requests one after another and answers each at once, or after the latency."""

    def __init__(self, crew: Crew, latency: float = 0.0, *, counts: bool = True) -> None:
        self._crew = crew
        self._latency = latency
        self._counts = counts
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._crew.connections += self._counts

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = _LENGTH.search(head)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < size:
                return
            body, self._buffer = self._buffer[end + 4 : size], self._buffer[size:]
            method, path, _ = head.split(b" ", 2)
            answer = self._crew.answer(method, path, body)
            if self._latency:
                asyncio.get_running_loop().call_later(self._latency, self._write, answer)
            else:
                self._write(answer)

    def _write(self, answer: bytes) -> None:
        self._transport.write(  # type: ignore[attr-defined]
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer)
        )


async def serve(seconds: float, port: int, latency: float) -> None:
    crew, loop = Crew(seconds), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(crew, latency), "127.0.0.1", port, backlog=4000)
    control = await loop.create_server(lambda: Connection(crew, counts=False), "127.0.0.1", 0)
    senders = [loop.create_task(crew.send_webhooks()) for _ in range(WEBHOOKS_AT_ONCE)]
    print(server.sockets[0].getsockname()[1], control.sockets[0].getsockname()[1], flush=True)
    await asyncio.gather(server.serve_forever(), *senders)


def many_files() -> None:
    """Let this process have as many connections as the system allows it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@dataclass
class LeanServer:
    """One that runs: its address for clients, and what it says of itself."""

    url: str
    control: int
    pid: int

    def ask(self, path: str, method: str = "GET") -> Any:
        with contextlib.closing(HTTPConnection("127.0.0.1", self.control, timeout=60)) as connection:
            connection.request(method, f"/{path}")
            return json.loads(connection.getresponse().read())

    def counts(self) -> dict[str, Any]:
        return self.ask("_counts")


@contextlib.contextmanager
def lean_server(seconds: float, *, port: int = 0, latency: float = 0.0) -> Iterator[LeanServer]:
    """Run one in a process of its own, on a free port unless one is given."""
    command = [sys.executable, __file__, f"--seconds={seconds}", f"--port={port}", f"--latency={latency}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port, control = map(int, process.stdout.readline().split())
        yield LeanServer(f"http://127.0.0.1:{port}", control, process.pid)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    given = parser.parse_args()
    many_files()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(given.seconds, given.port, given.latency))
