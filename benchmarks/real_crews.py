"""A hundred runs of a real two-task crew at once, through the HTTP server, which is a process of its own.

    python benchmarks/real_crews.py [--runs 100] [--repeat 3] [--spec examples/travel_crew.py:build]

It tells the median of the seconds from the first kickoff to the last run that was seen completed, and the server's peak
memory. The model is offline and takes no time: what is measured is CrewAI's own work and ours.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
from figures import report

ROOT = Path(__file__).parents[1]
IN_FLIGHT = 8
"""Requests at once: with more, httpx's own pool becomes what is measured."""

SERVE = """
import sys
from prefect_crew.devserver import serve
serve(sys.argv[1], port=0, token=sys.argv[2], response_format="union")
"""


async def measure(url: str, token: str, runs: int) -> float:
    """Return the seconds that `runs` runs take at once."""
    gate = asyncio.Semaphore(IN_FLIGHT)
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as client:

        async def one(number: int) -> None:
            inputs = {"topic": f"Town {number}", "audience": "families"}
            async with gate:
                answer = await client.post("/kickoff", json={"inputs": inputs})
            kickoff_id = answer.raise_for_status().json()["kickoff_id"]
            while True:
                async with gate:
                    body = (await client.get(f"/status/{kickoff_id}")).raise_for_status().json()
                if body["state"] == "SUCCESS":
                    break
                if body["state"] not in ("PENDING", "STARTED"):
                    raise RuntimeError(f"run {number} is {body['state']}: {body['error']}")
                await asyncio.sleep(0.5)
            if f"Town {number} " not in body["output"] or len(body["tasks"]) != 2:
                raise RuntimeError(f"run {number} has another's result: {body['output'][:200]}")

        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(runs)))
        return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--runs", type=int, default=100)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--spec", default=str(ROOT / "examples" / "travel_crew.py") + ":build")
    chosen = options.parse_args()

    token = secrets.token_urlsafe(16)
    began = time.perf_counter()
    command = [sys.executable, "-c", SERVE, chosen.spec, token]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            sys.exit(f"the server did not start: {line!r}")
        started = time.perf_counter() - began
        asyncio.run(measure(found.group(), token, 1))
        seconds = [asyncio.run(measure(found.group(), token, chosen.runs)) for _ in range(chosen.repeat)]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    report(
        "real crews",
        runs=chosen.runs,
        seconds=statistics.median(seconds),
        start_seconds=started,
        server_memory_mb=peak,
        each_seconds=seconds,
    )


if __name__ == "__main__":
    main()
