"""A hundred runs of a real two-task crew at once, through the HTTP server, which is a process of its own.

    python benchmarks/real_crews.py --runs 100

It tells the seconds from the first kickoff to the last run that was seen completed, and the server's peak memory. The
model is offline and takes no time: what is measured is CrewAI's own work and ours.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from figures import peak_mb, report

SPEC = str(Path(__file__).parents[1] / "examples" / "travel_crew.py") + ":build"
IN_FLIGHT = 8
"""Requests at once: with more, httpx's own pool becomes what is measured."""

SERVE = """
import sys
from prefect_crew.devserver import serve
serve(sys.argv[1], port=0, token=sys.argv[2], response_format="live")
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
                if body["state"] not in ("PENDING", "STARTED", "RUNNING"):
                    raise RuntimeError(f"run {number} is {body['state']}: {body['status']}")
                await asyncio.sleep(0.5)
            if f"Town {number} " not in body["result"] or body["progress"]["completed"] != 2:
                raise RuntimeError(f"run {number} has another's result: {body['result'][:200]}")

        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(runs)))
        return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=100)
    runs = options.parse_args().runs
    token = secrets.token_urlsafe(16)
    server = subprocess.Popen([sys.executable, "-c", SERVE, SPEC, token], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            sys.exit(f"the server did not start: {line!r}")
        asyncio.run(measure(found.group(), token, 1))  # which loads what all others use
        seconds = asyncio.run(measure(found.group(), token, runs))
        report("real crews", runs=runs, seconds=seconds, server_memory_mb=peak_mb(server.pid))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


if __name__ == "__main__":
    main()
