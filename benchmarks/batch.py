"""One batch, or one of the ways that it is compared with: wall time, CPU, peak memory.

    python benchmarks/batch.py batch --rows 10000 --in-flight 5000
    python benchmarks/batch.py loop --rows 1000 --seconds 1 --latency 0.2 --in-flight 500

A crew of lean_server.py runs in another process, which counts its own CPU: below the wall time it limits nothing.
`loop`, `clients` and `empty` are those of loops.py. A batch looks first when a run is surely over, as they do.
Seconds and CPU are those of the work, without the import; memory is the peak of the process, with it. All but the loops
need the Prefect server of PREFECT_API_URL.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import tempfile
from pathlib import Path

import loops
from figures import report, used
from lean_server import TOKEN, LeanServer, lean_server


async def batch(given: argparse.Namespace) -> None:
    from prefect_crew import DeployedCrew, WaitPolicy, arun_batch

    crew = DeployedCrew(url=given.url, token=TOKEN)  # type: ignore[arg-type]
    # From the answer to the kickoff, which is late.
    first = max(given.seconds - given.latency, 0.001)
    found = await arun_batch(
        crew, given.dataset, name=f"bench {os.getpid()}", export=given.output,
        max_in_flight=given.in_flight, wait=WaitPolicy(initial=first, factor=1, max_interval=10, jitter=0),
    )  # fmt: skip
    assert found.completed == given.rows, str(found)


WAYS = {"batch": batch, "loop": loops.loop, "clients": loops.clients, "empty": loops.empty}


def write_rows(path: Path, count: int) -> None:
    """Write a data set of so many rows."""
    with path.open("w") as file:
        file.write("topic\n")
        file.writelines(f"{row['topic']}\n" for row in loops.rows(count))


def measure(given: argparse.Namespace, server: LeanServer, folder: Path) -> None:
    given.url, given.dataset = server.url, str(folder / "rows.csv")
    given.output = str(folder / "out.jsonl")
    write_rows(Path(given.dataset), given.rows)
    importlib.import_module("prefect_crew.batches.run")  # which is not what is measured
    with used() as work:
        asyncio.run(WAYS[given.way](given))
    counts = server.counts()
    assert counts["keys"] in (0, counts["kickoffs"]), "a row was started twice"
    assert counts["kickoffs"] == (0 if given.way == "empty" else given.rows)
    report(
        given.way,
        rows=given.rows,
        **work.figures(),
        row_cpu_ms=1000 * work.cpu_seconds / given.rows,
        row_polls=counts["status_calls"] / given.rows,
        crew_cpu_seconds=counts["cpu_seconds"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a run takes")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds that each answer takes")
    parser.add_argument("--in-flight", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, lean_server(given.seconds, latency=given.latency) as server:
        measure(given, server, Path(folder))


if __name__ == "__main__":
    main()
