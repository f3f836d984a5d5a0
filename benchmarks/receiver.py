"""How many webhooks a second the receiver answers on one core, and how long its answers take.

`prefect-crew receiver start` runs pinned to one core, against the Prefect server of PREFECT_API_URL; this program,
pinned to another, delivers task webhooks with bodies of 2 KB over connections that are kept open: first as fast as
answers come, then at steady rates.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from statistics import quantiles
from urllib.parse import urlsplit

import httpx
import servers
from figures import memory_mb, report
from servers import SECRET

from prefect_crew.webhooks import Hook, hook_urls

RUNS = 100


@contextlib.contextmanager
def receiver(core: int | None) -> Iterator[tuple[str, int]]:
    with servers.receiver() as (url, pid):
        if core is not None:
            os.sched_setaffinity(pid, {core})
        yield url, pid


class Deliveries:
    """Makes requests that all differ, over a number of runs."""

    def __init__(self, url: str) -> None:
        expires = datetime.now(UTC) + timedelta(hours=1)
        hooks = [hook_urls(url, SECRET, Hook("task", f"benchmark/{number}", expires, 1)) for number in range(RUNS)]
        self.paths = [urlsplit(str(hook.task)).path for hook in hooks]
        self.number = 0

    def next(self) -> bytes:
        self.number += 1
        body = {"kickoff_id": "k", "task_id": str(self.number), "status": "completed", "agent": "Researcher"}
        content = json.dumps({**body, "output": "x" * 2000}).encode()
        path = self.paths[self.number % RUNS]
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        return f"{head}\r\n\r\n".encode() + content


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def deliver(self, request: bytes) -> float:
        started = time.perf_counter()
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head[:20], head
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        await self.reader.readexactly(length)
        return time.perf_counter() - started


async def connect(url: str, count: int) -> list[Connection]:
    port = urlsplit(url).port
    return [Connection(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(count)]


async def as_fast_as_it_goes(url: str, seconds: float, connections: int) -> list[float]:
    deliveries, took = Deliveries(url), list[float]()
    until = time.perf_counter() + seconds

    async def go_on(connection: Connection) -> None:
        while time.perf_counter() < until:
            took.append(await connection.deliver(deliveries.next()))

    await asyncio.gather(*(go_on(one) for one in await connect(url, connections)))
    return took


async def at_a_rate(url: str, seconds: float, rate: float) -> list[float]:
    deliveries, took = Deliveries(url), list[float]()
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for connection in await connect(url, 64):
        free.put_nowait(connection)

    async def one(due: float) -> None:
        connection = await free.get()
        await connection.deliver(deliveries.next())
        took.append(time.perf_counter() - due)  # from when it was due: waiting for a free connection counts
        free.put_nowait(connection)

    started, tasks = time.perf_counter(), list[asyncio.Task[None]]()
    for number in range(int(rate * seconds)):
        due = started + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    return took


def tell(name: str, took: list[float], seconds: float, url: str, pid: int) -> None:
    cut = quantiles(took, n=1000)
    time.sleep(2)
    state = httpx.get(f"{url}/ready").json()
    report(
        name,
        webhooks_a_second=len(took) / seconds,
        p50_ms=1000 * cut[499],
        p99_ms=1000 * cut[989],
        most_ms=1000 * max(took),
        memory_mb=memory_mb(pid),
        received=state["received"],
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="*", default=[100, 500, 1000])
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[-1]})
    with receiver(cores[0] if len(cores) > 1 else None) as (url, pid):
        took = await as_fast_as_it_goes(url, given.seconds, given.connections)
        tell("flat out", took, given.seconds, url, pid)
    for rate in given.rates:
        with receiver(cores[0] if len(cores) > 1 else None) as (url, pid):
            took = await at_a_rate(url, given.seconds, rate)
            tell(f"{rate:g} a second", took, given.seconds, url, pid)


if __name__ == "__main__":
    asyncio.run(main())
