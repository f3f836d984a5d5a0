"""How soon a wait sees its crew's end, what that costs in status requests, and what idle waits hold.

    python benchmarks/waiting.py lag [--runs 100]       crew end -> task end, webhooks on and polling alone
    python benchmarks/waiting.py idle [--runs 1000]     memory and CPU of one process with so many waits, webhooks on

One async flow holds all the runs, against the Prefect server of PREFECT_API_URL. The crew server and the receiver are
processes of their own. The end of a run is when the crew server closed it, that of its task is what Prefect has for
`wait_for_crew`. With --spread 0 all end within a moment. Goal: 0.25 s at p95, with at most 3 status requests a run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

SECRET = "a-secret-of-the-benchmark-that-is-long-enough"
HOOKS = {"PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL": "", "PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET": SECRET}


class Crew:
    """A crew server in a process of its own, that tells when its runs ended."""

    def __init__(self, seconds: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "crew", "--seconds", str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address = self._said()

    def _said(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._said()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def serve_crew(seconds: float) -> None:
    from prefect_crew.devserver import CrewScript, CrewServer

    tasks = [{"name": "work", "seconds": seconds, "output": "done"}]
    with CrewServer(CrewScript.model_validate({"name": "timed", "inputs": ["row"], "tasks": tasks})) as server:
        print(json.dumps({"url": server.url, "token": server.token}), flush=True)
        for _ in sys.stdin:
            ends = {run.id: run.created_at.timestamp() + run.execution_time for run in server.runs if run.state.ended}
            print(json.dumps({"ends": ends, "status": server.requests["status"]}), flush=True)


@contextlib.contextmanager
def receiver(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    env = {**HOOKS, "PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL": f"http://127.0.0.1:{port}"}
    process = subprocess.Popen(
        [Path(sys.executable).parent / "prefect-crew", "receiver", "start", "--port", str(port)],
        env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.environ.update(env)
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            time.sleep(0.1)
        yield
    finally:
        for name in env:
            os.environ.pop(name)
        process.terminate()
        process.wait()


async def lag(runs: int, seconds: float, spread: float, hooked: bool) -> None:
    from prefect import flow
    from prefect.context import FlowRunContext

    from prefect_crew import DeployedCrew, arun_crew

    with receiver(hooked), Crew(seconds) as server:
        crew = DeployedCrew(**server.address)
        ids: dict[str, str] = {}
        returned: dict[str, float] = {}

        async def one(row: int) -> None:
            await asyncio.sleep(spread * row / runs)
            result = await arun_crew(crew, {"row": row}, name=f"row-{row}")
            ids[f"row-{row}"], returned[result.kickoff_id] = result.kickoff_id, time.time()

        @flow(name="waiting", validate_parameters=False)
        async def run() -> str:
            await asyncio.gather(*map(one, range(runs)))
            context = FlowRunContext.get()
            assert context
            assert context.flow_run
            return str(context.flow_run.id)

        flow_run_id = await run()
        served = server.ask()
        tasks = {ids[name]: at for name, at in task_ends(flow_run_id, runs).items()}
        way = "webhooks on" if hooked else "polling alone"
        print(
            f"{runs} runs of {seconds:g} s begun within {spread:g} s, {way}: crew end -> task end "
            f"{shares(tasks, served['ends'])}, -> arun_crew returns {shares(returned, served['ends'])}; "
            f"{served['status'] / runs:.2f} status requests a run",
            flush=True,
        )


def shares(at: dict[str, float], ends: dict[str, float]) -> str:
    lags = sorted(at[kickoff_id] - end for kickoff_id, end in ends.items())
    cuts = quantiles(lags, n=100)
    return f"p50 {cuts[49]:.2f} p95 {cuts[94]:.2f} slowest {lags[-1]:.2f} s"


def task_ends(flow_run_id: str, runs: int) -> dict[str, float]:
    """Return when the task runs that waited ended, by the names of their steps: the server records them late."""
    body = {"flow_runs": {"id": {"any_": [flow_run_id]}}, "task_runs": {"name": {"like_": "wait for"}}}
    while True:
        found = httpx.post(f"{os.environ['PREFECT_API_URL']}/task_runs/filter", json=body, timeout=30).json()
        ended = [run for run in found if run["end_time"]]
        if len(ended) >= runs:
            return {run["name"].split()[-1]: datetime.fromisoformat(run["end_time"]).timestamp() for run in ended}
        time.sleep(1)


def memory() -> float:
    """Return this process's resident memory, MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


async def idle(runs: int, over: float) -> None:
    from prefect import flow

    from prefect_crew import DeployedCrew, kickoff_crew, wait_for_crew

    with receiver(True), Crew(100_000) as server:
        crew = DeployedCrew(**server.address)
        at_once, waiting = asyncio.Semaphore(20), 0

        async def one(row: int) -> None:
            nonlocal waiting
            async with at_once:
                kickoff_id = await kickoff_crew(crew, {"row": row})
            waiting += 1
            await wait_for_crew(crew, kickoff_id)

        @flow(name="idle", validate_parameters=False)
        async def run() -> None:
            print(f"before: {memory():.0f} MB", flush=True)
            rows = [asyncio.ensure_future(one(row)) for row in range(runs)]
            while waiting < runs:
                await asyncio.sleep(1)
                for row in rows:
                    if row.done():
                        row.result()
            print(f"all {runs} wait", flush=True)
            await asyncio.sleep(120)  # until the pauses have grown to what they are from then on
            cpu, asked, at = time.process_time(), server.ask()["status"], time.monotonic()
            await asyncio.sleep(over)
            took = time.monotonic() - at
            print(
                f"{runs} waits in one process, webhooks on: {memory():.0f} MB (at most "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}), "
                f"{(time.process_time() - cpu) / took:.1%} of a core, "
                f"{(server.ask()['status'] - asked) / took:.1f} status requests a second",
                flush=True,
            )
            for row in rows:
                row.cancel()
            await asyncio.gather(*rows, return_exceptions=True)

        await run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lag", "idle", "crew"])
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seconds", type=float, default=30.0, help="How long a crew works, for lag.")
    parser.add_argument("--spread", type=float, default=20.0, help="Seconds within which the runs begin, for lag.")
    parser.add_argument("--over", type=float, default=60.0, help="Seconds to measure over, for idle.")
    parser.add_argument("--way", choices=["webhooks", "polling", "both"], default="both")
    given = parser.parse_args()
    if given.what == "crew":
        serve_crew(given.seconds)
    elif not os.environ.get("PREFECT_API_URL"):
        raise SystemExit("Set PREFECT_API_URL to a server of its own.")
    elif given.what == "lag":
        for way in ("webhooks", "polling"):
            if given.way in (way, "both"):
                asyncio.run(lag(given.runs or 100, given.seconds, given.spread, way == "webhooks"))
    else:
        asyncio.run(idle(given.runs or 1000, given.over))


if __name__ == "__main__":
    main()
