"""A crew server for benchmarks, in a process of its own: as little as the crew API allows, so that it limits nothing.

It answers in the documented format over plain asyncio. A run has ended once its time is over. Benchmarks ask it:

    GET /_facts     distinct idempotency keys, and how often each run was asked for its status, by its id
    GET /_end       the same, and end all runs now: runs of `inf` seconds go on until then
"""

from __future__ import annotations

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
from typing import Any

import httpx

TOKEN = "bench-token"  # of a server that only this machine reaches
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
        self.keys: set[str] = set()
        self.name = secrets.token_hex(4)

    def answer(self, path: bytes, body: bytes) -> bytes:
        _, _, number = path.rpartition(b"-")
        if path == b"/kickoff":
            self.ends.append(time.monotonic() + self.seconds)
            self.looks.append(0)
            self.keys.add((json.loads(body).get("meta") or {}).get("idempotency_key", ""))
            return b'{"kickoff_id":"%s-%d"}' % (self.name.encode(), len(self.ends))
        if path.startswith(b"/status/"):
            self.looks[int(number) - 1] += 1
            if time.monotonic() < self.ends[int(number) - 1]:
                return _RUNNING
            took = 0.0 if math.isinf(self.seconds) else self.seconds
            return _COMPLETED % (path[8:], took, took)
        if path == b"/inputs":
            return b'{"inputs":["topic"]}'
        if path == b"/_end":
            self.ends = [min(end, time.monotonic()) for end in self.ends]
        looks = {f"{self.name}-{number}": looks for number, looks in enumerate(self.looks, 1)}
        return json.dumps({"keys": len(self.keys - {""}), "looks": looks}).encode()


class Connection(asyncio.Protocol):
    """Reads requests one after another and answers each at once."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = _LENGTH.search(head)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < size:
                return
            body, self._buffer = self._buffer[end + 4 : size], self._buffer[size:]
            content = self._crew.answer(head.split(b" ", 2)[1], body)
            kind = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
            self._transport.write(kind + b"content-length: %d\r\n\r\n%s" % (len(content), content))


async def serve(seconds: float) -> None:
    crew = Crew(seconds)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(crew), "127.0.0.1", 0, backlog=4000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@dataclass
class LeanServer:
    """A server that runs."""

    url: str

    def ask(self, path: str) -> Any:
        return httpx.get(f"{self.url}/{path}", timeout=60).json()

    def assert_each_once(self, runs: int) -> None:
        facts = self.ask("_facts")
        assert len(facts["looks"]) == facts["keys"] == runs, f"{runs} runs, but {facts}"

    def crew(self, **fields: Any) -> Any:
        """Return the block of the crew."""
        from prefect_crew import DeployedCrew

        return DeployedCrew(url=self.url, token=TOKEN, **fields)  # type: ignore[arg-type]


@contextlib.contextmanager
def lean_server(seconds: float) -> Iterator[LeanServer]:
    """Run a server of its own process on a free port."""
    process = subprocess.Popen([sys.executable, __file__, str(seconds)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield LeanServer(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(float(sys.argv[1])))
