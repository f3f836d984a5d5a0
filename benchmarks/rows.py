"""One batch, or a bare loop over the same rows: wall time, CPU, peak memory.

    python benchmarks/rows.py batch --rows 5000 --seconds 2 --in-flight 2000
    python benchmarks/rows.py loop                                               without record or second chance

The loop knows how long a run takes, looks when it is surely over, and forgets everything if its process dies. The batch
looks first at that time too. It needs the Prefect server of PREFECT_API_URL. Seconds and CPU are those of the work,
without the import; memory is the peak of the process, with it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from figures import memory_mb, options_of, report, used
from lean_server import TOKEN, LeanServer, lean_server

CLIENTS = 16


async def batch(options: argparse.Namespace, server: LeanServer, dataset: Path, output: Path) -> None:
    from prefect_crew import WaitPolicy, arun_batch

    crew = server.crew(wait=WaitPolicy(initial=max(options.seconds, 0.001), factor=1, max_interval=10, jitter=0))
    name, most = f"bench {os.getpid()}", options.in_flight
    outcome = await arun_batch(crew, dataset, name=name, export=str(output), max_in_flight=most)
    assert outcome.completed == options.rows, str(outcome)
    server.assert_each_once(options.rows)


async def loop(options: argparse.Namespace, server: LeanServer, dataset: Path, output: Path) -> None:
    """Run the rows with httpx clients of one connection each: httpcore looks through a whole pool at each request."""
    room = asyncio.Semaphore(options.in_flight)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with AsyncExitStack() as stack:
        free = asyncio.Queue[httpx.AsyncClient]()
        for _ in range(CLIENTS):
            free.put_nowait(await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, headers=headers)))
        file = stack.enter_context(output.open("w"))

        async def ask(method: str, path: str, body: Any = None) -> Any:
            client = await free.get()
            try:
                return (await client.request(method, path, json=body)).json()
            finally:
                free.put_nowait(client)

        async def run(topic: str) -> None:
            inputs = {"topic": topic}
            run_id = (await ask("POST", "/kickoff", {"inputs": inputs}))["kickoff_id"]
            await asyncio.sleep(options.seconds)
            while (status := await ask("GET", f"/status/{run_id}"))["status"] == "running":
                await asyncio.sleep(0.1)
            file.write(json.dumps({"inputs": inputs, "kickoff_id": run_id, **status["result"]}) + "\n")
            room.release()

        async with asyncio.TaskGroup() as group:
            for topic in dataset.read_text().splitlines()[1:]:
                await room.acquire()
                group.create_task(run(topic))


if __name__ == "__main__":
    options = options_of(__doc__, "batch", "loop", rows=5000, seconds=2.0, in_flight=2000)
    wall, cpu = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder, lean_server(options.seconds) as server:
        dataset, output = Path(folder, "rows.csv"), Path(folder, "out.jsonl")
        dataset.write_text("topic\n" + "".join(f"topic {number}\n" for number in range(options.rows)))
        importlib.import_module("prefect_crew.batches.run")  # which is not what is measured
        with used(wall, cpu):
            asyncio.run({"batch": batch, "loop": loop}[options.what](options, server, dataset, output))
        assert len(output.read_text().splitlines()) == options.rows
    peak_mb = memory_mb(field="VmHWM")
    report(options.what, rows=options.rows, seconds=wall[0], cpu_seconds=cpu[0], memory_mb=peak_mb)
