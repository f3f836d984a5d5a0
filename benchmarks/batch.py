"""Batches beside a bare loop and beside Prefect's own mapping: wall time, memory, the ledger, a restart.

    python benchmarks/batch.py                      all of it, some minutes
    python benchmarks/batch.py rows-10k rows-1k     only these parts

Every measurement is a process of its own, against a crew server in another one (lean_server.py, which counts the CPU
that it uses: below its wall time it is no bottleneck) and the Prefect server of PREFECT_API_URL. "loop" is a bare
script of asyncio and httpx with eight requests at a time: it knows how long a run takes, keeps nothing, and forgets
everything if it dies. "loop, pool" is the same over one httpx client, as most people write it. "map" is Prefect's
`kick.map` and `wait.map`. Seconds and CPU are those of the work, without the import; memory is the peak of the process
(VmHWM), with it. On a machine that others use too, compare the CPU.

Goals: at most 1.25 times the loop; for 1,000 rows plus what an empty flow costs, and a third of map; at most 160 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
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


# What is measured: each runs in a process of its own and returns what it has to say beside its seconds.


async def loop(given: argparse.Namespace) -> dict[str, Any]:
    """Eight clients of one connection each: httpcore looks through a pool of eight at each request."""
    async with contextlib.AsyncExitStack() as stack:
        lanes = [await stack.enter_async_context(httpx.AsyncClient(headers=HEADERS)) for _ in range(GATE)]
        return await _loop(given, lanes)


async def loop_pool(given: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(headers=HEADERS, limits=httpx.Limits(max_connections=GATE)) as client:
        return await _loop(given, [client] * GATE)


async def _loop(given: argparse.Namespace, lanes: list[httpx.AsyncClient]) -> dict[str, Any]:
    posts, gets = (asyncio.Semaphore(GATE) for _ in range(2))
    posting, getting = list(lanes), list(lanes)
    room = asyncio.Semaphore(given.in_flight)
    started = time.perf_counter()

    async def ask(gate: asyncio.Semaphore, free: list[httpx.AsyncClient], method: str, path: str, body: Any) -> Any:
        async with gate:
            client = free.pop()
            try:
                return (await client.request(method, f"{given.url}{path}", json=body)).json()
            finally:
                free.append(client)

    with Path(given.output).open("w") as output:

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
    return {"seconds": time.perf_counter() - started}


async def empty(given: argparse.Namespace) -> dict[str, Any]:
    del given
    from prefect import flow

    started = time.perf_counter()
    await flow(_nothing)()
    return {"seconds": time.perf_counter() - started}


async def _nothing() -> None:
    """Do nothing."""


async def mapped(given: argparse.Namespace) -> dict[str, Any]:
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

    started = time.perf_counter()
    await asyncio.to_thread(batch)
    return {"seconds": time.perf_counter() - started}


async def batch_default(given: argparse.Namespace) -> dict[str, Any]:
    """With the policy of a block that was left alone: it looks after a second, and learns from what has ended."""
    return await batch(given, knows=False)


async def batch(given: argparse.Namespace, *, knows: bool = True) -> dict[str, Any]:
    """With a policy that knows how long a run takes, as the loop does."""
    from prefect_crew import DeployedCrew, WaitPolicy, arun_batch
    from prefect_crew.batches import batch as batch_module

    ledgers: list[Any] = []

    class Seen(batch_module.Ledger):
        async def __aenter__(self) -> Any:
            ledgers.append(self)
            return await super().__aenter__()

    batch_module.Ledger = Seen  # type: ignore[misc]
    crew = DeployedCrew(url=given.url, token=TOKEN)  # type: ignore[arg-type]
    wait = WaitPolicy(initial=max(given.seconds, 0.001), factor=1, max_interval=10, jitter=0) if knows else None
    started = time.perf_counter()
    report = await arun_batch(
        crew, given.dataset, name=given.name, output=given.output, ledger=given.ledger,
        max_in_flight=given.in_flight, wait=wait,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    assert report.completed == given.rows, str(report)
    writer = ledgers[-1].writer
    return {
        "seconds": seconds,
        "kickoffs": report.kickoffs,
        "ledger": {"commits": writer.commits, "writes": writer.writes, "seconds": round(writer.seconds, 2)},
    }


async def ledger(given: argparse.Namespace) -> dict[str, Any]:
    """Three writes a row, as a batch makes them, and nothing else."""
    import uuid

    from prefect_crew.batches.ledger import Ledger
    from prefect_crew.records.model import RecordPhase, RunRecord, known_by, utcnow

    started = time.perf_counter()
    async with Ledger(given.ledger or f"{given.output}.ledger.db", "bench") as ledger:

        async def row(number: int) -> None:
            now = utcnow()
            record = RunRecord(
                idempotency_key=ledger.idempotency_key(f"row {number}"), attempt=1, crew="c", crew_url=given.url,
                inputs_digest="d" * 32, owner=uuid.uuid4().hex, claimed_at=now, known_by=known_by(now, 30),
            )  # fmt: skip
            await ledger.claim(record)
            record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.STARTED, str(number), now
            await ledger.save(record)
            record.phase, record.ended_at = RecordPhase.ENDED, now
            await ledger.save(record)

        async with asyncio.TaskGroup() as group:
            room = asyncio.Semaphore(500)
            for number in range(given.rows):
                await room.acquire()
                group.create_task(row(number)).add_done_callback(lambda _: room.release())
        return {"seconds": time.perf_counter() - started, "commits": ledger.writer.commits}


WAYS: dict[str, Callable[[argparse.Namespace], Awaitable[dict[str, Any]]]] = {
    "loop": loop, "loop, pool": loop_pool, "empty": empty, "map": mapped,
    "batch": batch, "batch, default": batch_default, "ledger": ledger,
}  # fmt: skip


# The parts.

KNOWN = ("seconds", "cpu", "memory", "server_cpu", "looks")


class Bench:
    """Runs measurements and prints them. A context manager over a folder of its own."""

    def __init__(self, folder: Path, ledger: str | None) -> None:
        self.folder = folder
        self.ledger = ledger
        self.number = 0
        self.ports: dict[str, int] = {}

    def measure(self, way: str, count: int, *, seconds: float = 2.0, in_flight: int = 1000, name: str = "") -> Any:
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
            told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
            counts = httpx.get(f"{url}/_counts").json()
        assert counts["keys"] in (0, counts["kickoffs"]), "a row was bought twice"
        told |= {"server_cpu": counts["cpu"], "looks": counts["looks"]}
        load = os.getloadavg()[0]
        more = {key: value for key, value in told.items() if key not in KNOWN}
        print(
            f"  {way:14} {count:>7,} rows {told['seconds']:7.2f} s CPU {told['cpu']:6.2f} s {told['memory']:4.0f} MB"
            f"   {told['looks'] / count:4.1f} looks a row, server's CPU {told['server_cpu']:5.1f} s, load {load:.1f}"
            f"   {more or ''}",
            flush=True,
        )
        return told


def rows_10k(bench: Bench) -> None:
    print("10,000 rows of a 2 s crew, 5,000 in flight")
    ways = {way: [bench.measure(way, 10_000, in_flight=5000) for _ in range(3)] for way in ("loop", "batch")}
    best = {way: sorted(one["seconds"] for one in found)[1] for way, found in ways.items()}
    bench.measure("loop, pool", 10_000, in_flight=5000)
    written = [one["ledger"] for one in ways["batch"]][1]
    cpu = {way: sorted(one["cpu"] for one in found)[1] for way, found in ways.items()}
    print(
        f"  median: {best['batch']:.2f} s, {best['batch'] / best['loop']:.2f} times the loop (goal 1.25); "
        f"CPU {cpu['batch'] / cpu['loop']:.2f} times"
    )
    print(f"  memory {max(one['memory'] for one in ways['batch']):.0f} MB (goal 160)")
    print(
        f"  ledger: {written['writes'] / best['batch']:,.0f} writes/s; a commit was under way for "
        f"{written['seconds'] / best['batch']:.0%} of the wall time"
    )


def rows_1k(bench: Bench) -> None:
    print("1,000 rows of a 2 s crew, all in flight")
    ways = {way: [bench.measure(way, 1000)["seconds"] for _ in range(3)] for way in ("loop", "empty", "batch")}
    best = {way: sorted(found)[1] for way, found in ways.items()}
    best["map"] = bench.measure("map", 1000)["seconds"]
    allowed = 1.25 * best["loop"] + best["empty"]
    print(
        f"  median: {best['batch']:.2f} s; goals {allowed:.2f} s (1.25 times the loop and an empty flow) and "
        f"{best['map'] / 3:.2f} s (a third of map); without the empty flow "
        f"{(best['batch'] - best['empty']) / best['loop']:.2f} times the loop"
    )


def rows_100k(bench: Bench) -> None:
    print("an instant crew, 1,000 in flight")
    few = bench.measure("batch", 10_000, seconds=0.0)
    name = f"many {os.getpid()}"
    many = bench.measure("batch", 100_000, seconds=0.0, name=name)
    print(
        f"  {100_000 / many['seconds']:,.0f} rows/s; memory {few['memory']:.0f} MB for 10,000 rows and "
        f"{many['memory']:.0f} MB for 100,000"
    )
    bench.measure("loop", 10_000, seconds=0.0)
    again = bench.measure("batch", 100_000, seconds=0.0, name=name)
    assert not again["kickoffs"], "it bought again what was done"
    print(f"  a restart of those 100,000, which are done: {again['seconds']:.1f} s")


def ledger_alone(bench: Bench) -> None:
    print("the ledger alone, three writes a row, 500 rows at a time")
    told = bench.measure("ledger", 20_000)
    print(f"  {20_000 / told['seconds']:,.0f} rows/s, {60_000 / told['seconds']:,.0f} writes/s")


PARTS = {"rows-10k": rows_10k, "rows-1k": rows_1k, "rows-100k": rows_100k, "ledger": ledger_alone}


def peak() -> float:
    """Return the peak memory of this process in MB."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--ledger", help="the URL of a PostgreSQL for the ledger, in place of SQLite")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        os.environ["PREFECT_LOGGING_LEVEL"] = "ERROR"
        way, given = asked.measure

        importlib.import_module("prefect_crew.batches.run")  # which is not what is measured
        before = time.process_time()
        told = asyncio.run(WAYS[way](argparse.Namespace(**json.loads(given))))  # type: ignore[arg-type]
        print(json.dumps({**told, "cpu": time.process_time() - before, "memory": peak()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), asked.ledger)
        for part in asked.parts or PARTS:
            PARTS[part](bench)


if __name__ == "__main__":
    main()
