"""Batches compared with a bare loop and with Prefect's own mapping: wall time, CPU, memory, a restart.

    python benchmarks/batch.py                      all of it, some minutes
    python benchmarks/batch.py rows-10k rows-1k     only these parts
    python benchmarks/batch.py old-new --old PATH   4,000 rows of an instant crew, alternating with another checkout

Every measurement is a process of its own, against a crew server in another one (lean_server.py, which counts the CPU
that it uses: below its wall time it is not a bottleneck) and the Prefect server of PREFECT_API_URL. "loop" is a bare
script of asyncio and httpx with eight requests at a time: it knows how long a run takes, keeps nothing, and forgets
everything if it dies. "map" is Prefect's `kick.map` and `wait.map`. Seconds and CPU are those of the work, without the
import; memory is the peak of the process (VmHWM), with it. On a machine that others use too, compare the CPU.

Goals: at most 1.25 times the loop; for 1,000 rows plus what an empty flow costs, and a third of map; at most 160 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from lean_server import TOKEN, lean_server

GATE = 8
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def rows(count: int) -> Iterator[dict[str, str]]:
    return ({"topic": f"topic {number}"} for number in range(count))


# What is measured: each runs in a process of its own.


async def loop(given: argparse.Namespace) -> None:
    """Eight clients of one connection each: httpcore looks through a pool of eight at each request."""
    posts, gets = (asyncio.Semaphore(GATE) for _ in range(2))
    room = asyncio.Semaphore(given.in_flight)

    async def ask(gate: asyncio.Semaphore, free: list[httpx.AsyncClient], method: str, path: str, body: Any) -> Any:
        async with gate:
            client = free.pop()
            try:
                return (await client.request(method, f"{given.url}{path}", json=body)).json()
            finally:
                free.append(client)

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(httpx.AsyncClient(headers=HEADERS)) for _ in range(2 * GATE)]
        posting, getting = clients[:GATE], clients[GATE:]
        output = stack.enter_context(open(given.output, "w"))  # noqa: SIM115, PTH123  the stack closes it

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
    del given
    from prefect import flow

    await flow(_nothing)()


async def _nothing() -> None:
    """Do nothing."""


async def mapped(given: argparse.Namespace) -> None:
    from prefect import flow, task
    from prefect.task_runners import ThreadPoolTaskRunner

    client = httpx.Client(headers=HEADERS, limits=httpx.Limits(max_connections=GATE), timeout=60)

    @task
    def kick(inputs: dict[str, str]) -> str:
        return client.post(f"{given.url}/kickoff", json={"inputs": inputs}).json()["kickoff_id"]

    @task
    def wait(run: str) -> str:
        time.sleep(given.seconds)
        while (status := client.get(f"{given.url}/status/{run}").json())["status"] == "running":
            time.sleep(0.1)
        return status["result"]["output"]

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=given.in_flight))
    def batch() -> list[str]:
        return wait.map(kick.map(list(rows(given.rows)))).result()

    await asyncio.to_thread(batch)


async def batch(given: argparse.Namespace) -> None:
    """With a policy that knows how long a run takes, as the loop does."""
    from prefect_crew import DeployedCrew, WaitPolicy, arun_batch

    crew = DeployedCrew(url=given.url, token=TOKEN)  # type: ignore[arg-type]
    wait = WaitPolicy(initial=max(given.seconds, 0.001), factor=1, max_interval=10, jitter=0)
    report = await arun_batch(
        crew, given.dataset, name=given.name, output=given.output, ledger=given.ledger,
        max_in_flight=given.in_flight, wait=wait,
    )  # fmt: skip
    assert report.completed == given.rows, str(report)


WAYS: dict[str, Callable[[argparse.Namespace], Awaitable[None]]] = {
    "loop": loop, "empty": empty, "map": mapped, "batch": batch,
}  # fmt: skip


# The parts.


class Bench:
    """Runs measurements and prints them. `old` is another checkout of the package, to be measured in its place."""

    def __init__(self, folder: Path, ledger: str | None, old: str | None) -> None:
        self.folder = folder
        self.ledger = ledger
        self.old = old
        self.number = 0
        self.ports: dict[str, int] = {}

    def measure(
        self, way: str, count: int, *, seconds: float = 2.0, in_flight: int = 1000, name: str = "", old: bool = False
    ) -> Any:
        """Measure one way in a process of its own; print and return what it says."""
        self.number += 1
        name = name or f"bench {os.getpid()} {self.number}"
        dataset = self.folder / f"rows-{count}.csv"
        if not dataset.exists():
            dataset.write_text("topic\n" + "".join(f"{row['topic']}\n" for row in rows(count)))
        # A batch that is gone on with has to find its crew under the same address.
        with lean_server(seconds, self.ports.get(name, 0)) as url:
            self.ports[name] = httpx.URL(url).port or 0
            given = {
                "rows": count, "seconds": seconds, "in_flight": in_flight, "url": url, "name": name,
                "dataset": str(dataset), "output": str(self.folder / f"{name.replace(' ', '-')}.jsonl"),
                "ledger": self.ledger,
            }  # fmt: skip
            command = [sys.executable, __file__, "--measure", way, json.dumps(given)]
            env = {**os.environ, "PYTHONPATH": self.old} if old and self.old else None
            measured = json.loads(
                subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=env).stdout
            )
            counts = httpx.get(f"{url}/_counts").json()
        assert counts["keys"] in (0, counts["kickoffs"]), "a row was started twice"
        measured["kickoffs"] = counts["kickoffs"]
        per_row = f"{measured['cpu'] / count * 1000:.2f} ms a row, {counts['looks'] / count:.1f} polls a row"
        print(
            f"  {'old ' if old else ''}{way:8} {count:>7,} rows {measured['seconds']:7.2f} s CPU "
            f"{measured['cpu']:6.2f} s, {per_row}, {measured['memory']:.0f} MB, "
            f"server's CPU {counts['cpu']:.1f} s, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        return measured


def rows_10k(bench: Bench) -> None:
    print("10,000 rows of a 2 s crew, 5,000 in flight")
    found = {way: [bench.measure(way, 10_000, in_flight=5000) for _ in range(3)] for way in ("loop", "batch")}
    median = {
        way: {what: statistics.median(one[what] for one in several) for what in ("seconds", "cpu", "memory")}
        for way, several in found.items()
    }
    wall, cpu = (median["batch"][what] / median["loop"][what] for what in ("seconds", "cpu"))
    print(f"  median: {median['batch']['seconds']:.2f} s, {wall:.2f} times the loop (goal 1.25); CPU {cpu:.2f} times")
    print(f"  memory {median['batch']['memory']:.0f} MB (goal 160)")


def rows_1k(bench: Bench) -> None:
    print("1,000 rows of a 2 s crew, all in flight")
    best = {
        way: statistics.median(bench.measure(way, 1000)["seconds"] for _ in range(3))
        for way in ("loop", "empty", "batch")
    }
    best["map"] = bench.measure("map", 1000)["seconds"]
    print(
        f"  median: {best['batch']:.2f} s; goals {1.25 * best['loop'] + best['empty']:.2f} s (1.25 times the loop and "
        f"an empty flow) and {best['map'] / 3:.2f} s (a third of map)"
    )


def rows_100k(bench: Bench) -> None:
    print("an instant crew, 1,000 in flight")
    few = bench.measure("batch", 10_000, seconds=0.0)
    name = f"many {os.getpid()}"
    many = bench.measure("batch", 100_000, seconds=0.0, name=name)
    print(f"  memory {few['memory']:.0f} MB for 10,000 rows and {many['memory']:.0f} MB for 100,000")
    again = bench.measure("batch", 100_000, seconds=0.0, name=name)
    assert not again["kickoffs"], "it started again what was done"
    print(f"  a restart of those 100,000, which are done: {again['seconds']:.1f} s")


def old_new(bench: Bench) -> None:
    print("4,000 rows of an instant crew, 1,000 in flight")
    found: dict[bool, list[float]] = {True: [], False: []}
    for old in (True, False) * 3:
        found[old].append(bench.measure("batch", 4000, seconds=0.0, old=old)["cpu"] / 4)
    print(
        f"  median CPU a row: old {statistics.median(found[True]):.2f} ms, new {statistics.median(found[False]):.2f} ms"
    )


PARTS = {"rows-10k": rows_10k, "rows-1k": rows_1k, "rows-100k": rows_100k, "old-new": old_new}


def peak() -> float:
    """Return the peak memory of this process in MB."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all but the last if left out")
    parser.add_argument("--ledger", help="the URL of a PostgreSQL for the ledger, in place of SQLite")
    parser.add_argument("--old", help="the folder of another checkout, for old-new")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        os.environ["PREFECT_LOGGING_LEVEL"] = "ERROR"
        way, given = asked.measure
        importlib.import_module("prefect_crew.batches.run")  # which is not what is measured
        began, before = time.perf_counter(), time.process_time()
        asyncio.run(WAYS[way](argparse.Namespace(**json.loads(given))))  # type: ignore[arg-type]
        measured = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - before, "memory": peak()}
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), asked.ledger, asked.old)
        for part in asked.parts or list(PARTS)[:-1]:
            PARTS[part](bench)


if __name__ == "__main__":
    main()
