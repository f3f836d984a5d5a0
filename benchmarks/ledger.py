"""A ledger of many rows that are all done: what `batch inspect` takes, and a done batch that is called again.

    python benchmarks/ledger.py make FOLDER --rows 1000000     a data set, and a batch of it that is done
    python benchmarks/ledger.py inspect FOLDER                 `prefect-crew batch inspect`, from its start to its end
    python benchmarks/ledger.py again FOLDER                   the same call once more; the first one writes the output

All on the Prefect server of PREFECT_API_URL, which knows the batch by its name. The first rows are run by a batch that
stops at its limit of kickoffs. The others are entered by the ledger's own code, and get copies of an attempt in SQL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from figures import report, used

RUN = 8
COPY = """
INSERT INTO crew_attempts (batch, row_key, attempt, phase, state, kickoff, owner, seconds, usage, record)
SELECT crew_rows.batch, crew_rows.row_key, 1, one.phase, one.state, lower(hex(randomblob(32))), one.owner, one.seconds,
    one.usage, replace(replace(one.record, one_digest, crew_rows.digest), one_id, lower(hex(randomblob(16))))
FROM crew_rows, (
    SELECT *, json_extract(record, '$.kickoff_id') AS one_id, json_extract(record, '$.inputs_digest') AS one_digest
    FROM crew_attempts WHERE state = 'completed' LIMIT 1
) AS one
WHERE crew_rows.state = 'pending'
"""


async def call(folder: Path, **more: Any) -> Any:
    from lean_server import TOKEN

    from prefect_crew import DeployedCrew, WaitPolicy, arun_batch

    place = json.loads((folder / "place.json").read_text())
    crew = DeployedCrew(url=place["url"], token=TOKEN)  # type: ignore[arg-type]
    output = str(folder / "out.jsonl")
    policy = WaitPolicy(initial=0.01, factor=1, jitter=0)
    return await arun_batch(crew, str(folder / "rows.csv"), name=place["name"], export=output, wait=policy, **more)


async def make(folder: Path, given: argparse.Namespace) -> None:
    from batch import write_rows
    from lean_server import TOKEN, lean_server
    from sqlalchemy import text

    from prefect_crew import DeployedCrew
    from prefect_crew.batches.dataset import open_dataset
    from prefect_crew.batches.ledger import PAGE, Ledger
    from prefect_crew.batches.options import BatchOptions
    from prefect_crew.batches.rows import RowPlan
    from prefect_crew.blocks import crew_of
    from prefect_crew.client.models import CrewInput

    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.csv", given.rows)
    name = f"ledger {os.getpid()}"
    with lean_server(0.0) as server:
        port = int(server.url.rpartition(":")[2])
        (folder / "place.json").write_text(json.dumps({"name": name, "url": server.url, "port": port}))
        with used() as work:
            found = await call(folder, max_kickoffs=RUN)
            assert found.completed == RUN, str(found)
            crew = crew_of(DeployedCrew(url=server.url, token=TOKEN))  # type: ignore[arg-type]
            plan = RowPlan(open_dataset(str(folder / "rows.csv")), BatchOptions(), crew, [CrewInput(name="topic")])
            async with Ledger(str(folder / "out.jsonl.ledger.db"), name) as ledger:
                jobs, page = plan.jobs(), list[Any]()
                for job in jobs:
                    page.append(job)
                    if len(page) == PAGE:
                        await ledger.enter_rows(page, crew)
                        page = []
                await ledger.enter_rows(page, crew)
                await ledger.database.run(lambda connection: connection.execute(text(COPY)).close())
                done = text("UPDATE crew_rows SET state = 'completed', attempt = 1")
                await ledger.database.run(lambda connection: connection.execute(done).close())
                counts = await ledger.counts()
    assert list(counts.values()) == [given.rows], counts
    (folder / "out.jsonl").unlink()  # it has the lines of the first rows
    size = (folder / "out.jsonl.ledger.db").stat().st_size / 1e6
    report("make", rows=given.rows, ledger_mb=size, **work.figures())


def inspect(folder: Path) -> None:
    name = json.loads((folder / "place.json").read_text())["name"]
    program = str(Path(sys.executable).with_name("prefect-crew"))
    began = time.perf_counter()
    # This process is small: what the system tells of a child's memory is never less than what its parent had.
    with (folder / "inspect.txt").open("w") as file:
        pid = os.posix_spawn(
            program, [program, "batch", "inspect", name], dict(os.environ),
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - began
    assert os.waitstatus_to_exitcode(status) == 0, (folder / "inspect.txt").read_text()
    cpu = usage.ru_utime + usage.ru_stime
    report("inspect", seconds=seconds, cpu_seconds=cpu, memory_mb=usage.ru_maxrss / 1024)


def again(folder: Path) -> None:
    import importlib

    from lean_server import lean_server

    importlib.import_module("prefect_crew.batches.run")
    place = json.loads((folder / "place.json").read_text())
    had_output = (folder / "out.jsonl").exists()
    with lean_server(0.0, port=place["port"]) as server, used() as work:
        found = asyncio.run(call(folder))
        assert found.completed == found.total, str(found)
        assert not server.counts()["kickoffs"], "it started what was done"
    report("again" if had_output else "first", rows=found.total, **work.figures())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "inspect", "again"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    if given.what == "make":
        asyncio.run(make(given.folder, given))
    else:
        {"inspect": inspect, "again": again}[given.what](given.folder)


if __name__ == "__main__":
    main()
