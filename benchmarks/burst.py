"""A hundred runs at once in one flow, on a Prefect server as `prefect server start` makes it (SQLite).

    python benchmarks/burst.py                     three rounds of each way in turn, each in a process of its own
    python benchmarks/burst.py --ways polling --times 1 --profile polling.txt

`prefect` runs two tasks of Prefect's own for each run, the second of which sleeps as long as the crew works: nothing
that starts and awaits a run with two tasks is sooner. `polling` and `webhooks` gather so many calls of `arun_crew`.
`webhooks+away` is the same where the receiver is stopped. `seen` is from a run's end on the crew's server to the status
call that showed it. Requests to Prefect are counted in the process that runs the flow, logs and all; the receiver's and
those of Prefect's websockets are not among them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
from figures import FILE, family_cpu_seconds, lags, number, report
from lean_server import TOKEN, LeanServer, lean_server
from servers import PrefectServer, receiver

from support import prefect_server

WAYS = ("prefect", "polling", "webhooks")
SETTLE = 8.0
"""Seconds between two measurements: the server writes task runs and events down after their end."""
_IDS = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}|(?<=/name/)[^/]+")


class Requests:
    """The requests that this process makes to the Prefect server: how often each, and how long they took."""

    def __init__(self, prefix: str) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.answers: Counter[int] = Counter()
        self._prefix = prefix

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        send, send_sync = httpx.AsyncClient.send, httpx.Client.send

        async def asynchronous(client: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
            with self._measured(request) as answers:
                answers.append(answer := await send(client, request, **options))
            return answer

        def synchronous(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
            with self._measured(request) as answers:
                answers.append(answer := send_sync(client, request, **options))
            return answer

        httpx.AsyncClient.send, httpx.Client.send = asynchronous, synchronous  # type: ignore[method-assign]
        try:
            yield
        finally:
            httpx.AsyncClient.send, httpx.Client.send = send, send_sync  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _measured(self, request: httpx.Request) -> Iterator[list[httpx.Response]]:
        answers: list[httpx.Response] = []
        began = time.perf_counter()
        try:
            yield answers
        finally:
            if str(request.url).startswith(self._prefix):
                path = str(request.url).removeprefix(self._prefix)
                self.seconds[f"{request.method} {_IDS.sub('ID', path)}"].append(time.perf_counter() - began)
                self.answers[answers[0].status_code if answers else 0] += 1


async def burst(given: argparse.Namespace, server: LeanServer) -> dict[str, Any]:
    """Run the flow, and return what came of its runs."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    from prefect_crew import CrewState, DeployedCrew
    from prefect_crew.blocks import crew_of
    from prefect_crew.flows import run_loaded_crew
    from prefect_crew.runs.options import RunOptions

    seen: dict[str, float] = {}
    returned: dict[str, float] = {}

    def note(_: Any, status: Any) -> None:
        if status is not None and status.state is CrewState.COMPLETED:
            seen.setdefault(status.kickoff_id, time.time())

    crew = replace(crew_of(DeployedCrew(url=server.url, token=TOKEN)), on_status=note)  # type: ignore[arg-type]

    @task(cache_policy=NO_CACHE)
    async def start(number: int) -> int:
        return number

    @task(cache_policy=NO_CACHE)
    async def sleep(number: int) -> int:
        await asyncio.sleep(given.seconds)
        return number

    async def tasks(number: int) -> None:
        await sleep(await start(number))

    async def run(number: int) -> None:
        options = RunOptions.of(name=f"run-{number}")
        result = await run_loaded_crew(crew, {"topic": str(number)}, options)
        returned[result.kickoff_id] = time.time()

    one: Callable[[int], Awaitable[None]] = tasks if given.way == "prefect" else run

    @flow(name=f"burst-{given.way}", validate_parameters=False)
    async def many() -> float:
        began = time.perf_counter()
        await asyncio.gather(*map(one, range(given.runs)))
        return time.perf_counter() - began

    began = time.time()
    figures: dict[str, Any] = {"seconds": await many()}
    ends = server.ask("_ends") if returned else {}
    if ends:
        figures |= lags([end - began - given.seconds for end in ends.values()], "kicked_off_")
        figures |= lags([seen[run] - end for run, end in ends.items()], "seen_")
        figures |= lags([returned[run] - end for run, end in ends.items()], "returned_")
        figures["run_calls"] = server.counts()["status_calls"] / given.runs
    return figures


def measure(given: argparse.Namespace) -> None:
    """Measure one way, in this process."""
    from support.prefect_server import drain

    url = os.environ["PREFECT_API_URL"]
    requests, pid, receiver_pid = Requests(url), int(os.environ["BENCHMARK_PREFECT_PID"]), 0
    with contextlib.ExitStack() as stack:
        if given.way.startswith("webhooks"):
            running = stack.enter_context(contextlib.ExitStack())
            _, receiver_pid = running.enter_context(receiver())
            if given.way == "webhooks+away":
                env = {name: os.environ[name] for name in os.environ if "WEBHOOK" in name}
                running.close()
                os.environ.update(env)
        server = stack.enter_context(lean_server(given.seconds))
        stack.enter_context(requests.counted())
        before, client_before = family_cpu_seconds(pid), time.process_time()
        profiler = stack.enter_context(_profiled(given.profile)) if given.profile else None
        figures = asyncio.run(burst(given, server))
        if profiler is not None:
            profiler.disable()
        drain()
        figures["client_cpu_seconds"] = time.process_time() - client_before
        if given.way == "webhooks":
            figures["receiver_cpu_seconds"] = family_cpu_seconds(receiver_pid)
    time.sleep(SETTLE)
    figures["server_cpu_seconds"] = family_cpu_seconds(pid) - before
    figures["run_requests"] = sum(map(len, requests.seconds.values())) / given.runs
    figures["answers_503"] = requests.answers[503]
    shapes = {
        name: {"times": len(took), "mean_ms": round(1000 * mean(took), 1), "most_ms": round(1000 * max(took))}
        for name, took in sorted(requests.seconds.items(), key=lambda item: -len(item[1]))
    }
    report(given.way, **figures, shapes=shapes)


@contextlib.contextmanager
def _profiled(path: str) -> Iterator[Any]:
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.enable()
    try:
        yield profiler
    finally:
        profiler.disable()
        with Path(path).open("w") as file:
            stats = pstats.Stats(profiler, stream=file)
            stats.sort_stats("cumulative").print_stats(120)
            stats.sort_stats("tottime").print_stats(80)


def compare(given: argparse.Namespace) -> None:
    """Measure the ways in turn, and print how they compare."""
    prefect_server.QUICK.clear()  # a server as it comes
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in given.ways}
    with tempfile.TemporaryDirectory(prefix="prefect-crew-burst-") as name:
        folder = Path(name)
        with PrefectServer(folder) as server:
            kept = folder / "figures.jsonl"
            more = {"BENCHMARK_PREFECT_PID": str(server.process.pid), FILE: str(kept)}
            env = {**server.env(home=folder / "client"), **more}
            for _ in range(given.times):
                for way in given.ways:
                    command = [sys.executable, __file__, "--way", way, "--runs", str(given.runs)]
                    command += ["--seconds", str(given.seconds)]
                    command += ["--profile", given.profile] if given.profile else []
                    subprocess.run(command, env=env, check=True)
                    found[way].append(json.loads(kept.read_text().splitlines()[-1]))
    if given.shapes:
        for way, several in found.items():
            for shape, figures in several[-1]["shapes"].items():
                print(f"  {way:10} {shape:60} {figures}")
    least = median(one["seconds"] for one in found["prefect"]) if "prefect" in found else None
    for way, several in found.items():
        middle = {
            name: median(one[name] for one in several)
            for name in several[0]
            if isinstance(several[0][name], float | int)
        }
        times = f"{middle['seconds'] / least:.2f} times Prefect's own; " if least else ""
        print(f"{way}: {times}" + ", ".join(f"{name} {number(value)}" for name, value in middle.items()))
    report("burst", **{f"{way}_seconds": median(one["seconds"] for one in several) for way, several in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long a crew works")
    parser.add_argument("--shapes", action="store_true", help="print the requests of the last measurement of each way")
    parser.add_argument("--profile", help="write a profile of the process that runs the flow to this file")
    given = parser.parse_args()
    measure(given) if given.way else compare(given)


if __name__ == "__main__":
    main()
