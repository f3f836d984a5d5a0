"""A crew server for benchmarks, in a process of its own: as little as the crew API allows, so that it is not a
bottleneck.

    python benchmarks/lean_server.py --seconds 2 --port 0 --latency 0.2

`--latency` is how many seconds each answer takes, as over a network. It answers in the documented format over plain
asyncio, holds no tasks (a run has ended once its time is over), and counts. `GET /_counts` gives kickoffs, distinct
idempotency keys, status calls and the CPU seconds that this process has used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator

TOKEN = "bench-token"  # of a server that only this machine reaches
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Crew:
    """All runs: when each began, by its number, which is its id."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began: list[float] = []
        self.keys: set[str] = set()
        self.looks = 0

    def answer(self, method: bytes, path: bytes, body: bytes) -> bytes:
        if path == b"/kickoff":
            self.began.append(time.monotonic())
            self.keys.add((json.loads(body).get("meta") or {}).get("idempotency_key", ""))
            return b'{"kickoff_id":"%d"}' % len(self.began)
        if path.startswith(b"/status/"):
            self.looks += 1
            if time.monotonic() - self.began[int(path[8:]) - 1] < self.seconds:
                return b'{"status":"running","current_task":"work","progress":{"completed_tasks":0,"total_tasks":1}}'
            return (
                b'{"status":"completed","result":{"output":"Done with run %s.","tasks":[{"task_id":"work","output":'
                b'"Done.","agent":"Worker","execution_time":%g}]},"execution_time":%g}'
            ) % (path[8:], self.seconds, self.seconds)
        if path == b"/inputs":
            return b'{"inputs":["topic"]}'
        counts = {
            "kickoffs": len(self.began),
            "keys": len(self.keys - {""}),
            "looks": self.looks,
            "cpu": time.process_time(),
        }
        return json.dumps(counts).encode()


class Connection(asyncio.Protocol):
    """Reads requests one after another and answers each at once."""

    def __init__(self, crew: Crew, latency: float) -> None:
        self._crew = crew
        self._latency = latency
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

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


async def serve(seconds: float, port: int, latency: float = 0.0) -> None:
    crew, loop = Crew(seconds), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(crew, latency), "127.0.0.1", port, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def lean_server(seconds: float, port: int = 0, latency: float = 0.0) -> Iterator[str]:
    """Run one in a process of its own, on a free port unless one is given; give its URL."""
    command = [sys.executable, __file__, "--seconds", str(seconds), "--port", str(port), "--latency", str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(given.seconds, given.port, given.latency))
