"""How soon runs end and their waits see it, what that costs in status calls, and what idle waits hold.

    python benchmarks/waiting.py lag --runs 100                       all end at once, on command, webhooks on
    python benchmarks/waiting.py lag --way polling --seconds 60       runs of a minute
    python benchmarks/waiting.py lag --way prefect --seconds 8 --at-once 100
    python benchmarks/waiting.py idle --runs 1000                     memory and CPU of idle waits, webhooks on
    python benchmarks/waiting.py floor --runs 1000                    the same of tasks of Prefect, two a run

One async flow holds all the runs, against the Prefect server of PREFECT_API_URL. The crew server and the receiver are
processes of their own. `prefect` runs two tasks of Prefect's own for each run, of which the second sleeps as long as a
crew works: nothing that starts and awaits a run with two tasks is sooner. A lag is from a run's end on the crew's
server to the return of `arun_crew`; `seen` is until the status call that showed it, so the rest is what is stored on
the Prefect server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import math
import os
import time
from dataclasses import replace
from typing import Any

from figures import cpu_seconds, lags, memory_mb, report
from lean_server import TOKEN, LeanServer, lean_server
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from servers import prefect_server_of, receiver

from prefect_crew import CrewState, DeployedCrew, kickoff_crew, wait_for_crew
from prefect_crew.blocks import crew_of
from prefect_crew.flows import run_loaded_crew
from prefect_crew.runs.options import RunOptions


@task(cache_policy=NO_CACHE)
async def sleep(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "slept"


async def lag(given: argparse.Namespace, server: LeanServer) -> None:
    seen: dict[str, float] = {}
    returned: dict[str, float] = {}
    kicked_off = 0

    def note(_: Any, status: Any) -> None:
        nonlocal kicked_off
        if status is None:
            kicked_off += 1
        elif status.state is CrewState.COMPLETED:
            seen.setdefault(status.kickoff_id, time.time())

    crew = replace(crew_of(DeployedCrew(url=server.url, token=TOKEN)), on_status=note)  # type: ignore[arg-type]

    async def one(number: int) -> None:
        nonlocal kicked_off
        if given.way == "prefect":
            await sleep(0.0)
            kicked_off += 1
            await sleep(given.seconds)
            return
        options = RunOptions.of(name=f"run-{number}")
        result = await run_loaded_crew(crew, {"topic": str(number)}, options)
        returned[result.kickoff_id] = time.time()

    @flow(name="waiting", validate_parameters=False)
    async def run() -> tuple[float, float]:
        runs: list[asyncio.Task[None]] = []
        began = time.perf_counter()
        while kicked_off < given.runs:
            while len(runs) < min(given.runs, kicked_off + given.at_once):
                runs.append(asyncio.ensure_future(one(len(runs))))
            await asyncio.sleep(0.02)
            for failed in (run for run in runs if run.done()):
                failed.result()
        if math.isinf(given.seconds):
            await asyncio.sleep(given.settle + given.runs / 100)
            await asyncio.to_thread(server.ask, "_end", "POST")
        cpu = time.process_time()
        await asyncio.gather(*runs)
        return time.perf_counter() - began, time.process_time() - cpu

    seconds, cpu = await run()
    ends, figures = server.ask("_ends"), dict[str, float]()
    if ends:
        figures |= lags([returned[run] - end for run, end in ends.items()])
        figures |= lags([seen[run] - end for run, end in ends.items()], "seen_")
        figures["run_calls"] = server.counts()["status_calls"] / given.runs
    report(f"lag with {given.way}", runs=given.runs, seconds=seconds, run_cpu_ms=1000 * cpu / given.runs, **figures)


async def idle(given: argparse.Namespace, server: LeanServer) -> None:
    crew: Any = DeployedCrew(url=server.url, token=TOKEN)  # type: ignore[arg-type]
    at_once = asyncio.Semaphore(given.at_once)
    waiting = 0

    async def one(number: int) -> None:
        nonlocal waiting
        async with at_once:
            begun = await (sleep(0.0) if given.what == "floor" else kickoff_crew(crew, {"topic": str(number)}))
        waiting += 1
        await (sleep(1e6) if given.what == "floor" else wait_for_crew(crew, begun))

    async def begin(count: int) -> list[asyncio.Task[None]]:
        expected = waiting + count
        runs = [asyncio.create_task(one(expected + number)) for number in range(count)]
        while waiting < expected:
            await asyncio.sleep(0.5)
            for run in runs:
                if run.done():
                    run.result()
        await asyncio.sleep(given.settle)
        gc.collect()
        return runs

    @flow(name="idle", validate_parameters=False)
    async def run() -> None:
        runs = await begin(given.at_once)  # what is loaded and opened once is no run's
        before = memory_mb()
        runs += await begin(given.runs)
        held = memory_mb() - before
        cpu, calls, began = cpu_seconds(os.getpid()), server.counts()["status_calls"], time.monotonic()
        await asyncio.sleep(given.over)
        took = time.monotonic() - began
        report(
            given.what,
            runs=given.runs,
            run_kb=1024 * held / given.runs,
            memory_mb=memory_mb(),
            core_percent=100 * (cpu_seconds(os.getpid()) - cpu) / took,
            calls_a_second=(server.counts()["status_calls"] - calls) / took,
        )
        for one in runs:
            one.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    await run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lag", "idle", "floor"])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--way", choices=["webhooks", "polling", "prefect"], default="webhooks")
    parser.add_argument("--seconds", type=float, default=math.inf, help="how long a crew works; else until a command")
    parser.add_argument("--at-once", type=int, default=20, help="runs that are kicked off at the same time")
    parser.add_argument("--over", type=float, default=20.0, help="seconds over which idle waits are watched")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds from the last kickoff to what is measured")
    given = parser.parse_args()
    prefect_server_of()
    with contextlib.ExitStack() as stack:
        if given.way == "webhooks":
            stack.enter_context(receiver())
        server = stack.enter_context(lean_server(given.seconds))
        asyncio.run(lag(given, server) if given.what == "lag" else idle(given, server))


if __name__ == "__main__":
    main()
