"""What a long past costs: the same work on a server with many ended runs, and on an empty one.

    python benchmarks/past.py make --records 150000     so many runs; one for the empty server
    python benchmarks/past.py work --times 3            each work so often; medians

On the Prefect server of PREFECT_API_URL. `make` writes to its database, which BENCHMARK_DATABASE names as SQLAlchemy
does. The past is made of copies of a real run, under other keys and ids, spread over 29 days: they have the form that
this version writes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from figures import options_of, report, used
from lean_server import lean_server
from prefect import flow
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from prefect_crew import WaitPolicy, aget_result, arun_crew
from prefect_crew.costs import read_costs

TABLES = ("variable", "artifact")  # where a run is stored
Row = dict[str, Any]


async def make(records: int, crew: Any) -> None:
    """Run a crew once, and let it have run so many times more."""
    engine = create_async_engine(os.environ["BENCHMARK_DATABASE"], connect_args={"timeout": 60}, json_deserializer=str)

    async def read(table: str) -> list[Row]:
        async with engine.connect() as connection:
            return [dict(row) for row in (await connection.execute(text(f"SELECT * FROM {table}"))).mappings()]

    key = f"past {uuid.uuid4()}"
    before = {table: {str(row["id"]) for row in await read(table)} for table in TABLES}
    result = await arun_crew(crew, {"topic": "past"}, idempotency_key=key)
    for table, earlier in before.items():
        rows = [row for row in await read(table) if str(row["id"]) not in earlier]
        assert rows, f"the run wrote no {table}"
        names, values = ", ".join(rows[0]), ", ".join(f":{name}" for name in rows[0])
        insert = text(f"INSERT INTO {table} ({names}) VALUES ({values})")
        made = copies(rows, records, key=key, kickoff_id=result.kickoff_id)
        while page := list(islice(made, 5000)):
            async with engine.begin() as connection:
                await connection.execute(insert, page)
    await engine.dispose()
    report("the past", records=records)


def copies(rows: list[Row], number: int, *, key: str, kickoff_id: str) -> Iterator[Row]:
    """Yield a run's rows so many times, each under a key and ids of its own, from the oldest to the newest."""
    hashes = {digest for row in rows for digest in re.findall("[0-9a-f]{32}", row.get("name") or "")}
    ids = {str(row["id"]) for row in rows}
    now = datetime.now(UTC)
    for copy in range(number):
        names = {key: f"{key} {copy}", kickoff_id: f"{kickoff_id}-{copy}"}
        names |= {_digest(old): _digest(new) for old, new in names.items()}
        new_ids = {old: str(uuid.uuid5(uuid.NAMESPACE_OID, f"{old} {copy}")) for old in ids}
        names |= new_ids | {old.replace("-", ""): new.replace("-", "") for old, new in new_ids.items()}
        names |= {digest: _digest(f"{digest} {copy}") for digest in hashes - names.keys()}
        pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        moment = now - timedelta(days=29 * (1 - copy / number))  # records are pruned after 30 days
        for row in rows:
            yield {name: _copied(name, value, pattern, names, moment) for name, value in row.items()}


def _copied(name: str, value: Any, pattern: re.Pattern[str], names: dict[str, str], moment: datetime) -> Any:
    if name in ("created", "updated"):
        return moment if isinstance(value, datetime) else f"{moment:%Y-%m-%d %H:%M:%S.%f}"
    if isinstance(value, uuid.UUID):
        return uuid.UUID(names.get(str(value), str(value)))
    return pattern.sub(lambda match: names[match[0]], value) if isinstance(value, str) else value


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


async def work(times: int, crew: Any) -> None:
    """Start a run, call it again, read its result; list the open runs, and add up the costs of seven days."""
    walls: dict[str, list[float]] = {}

    async def timed(name: str, call: Awaitable[Any]) -> None:
        with used(walls.setdefault(name, [])):
            await call

    for _ in range(times + 1):  # the first loads and opens what the others use
        key = str(uuid.uuid4())
        await timed("start", arun_crew(crew, {"topic": "work"}, idempotency_key=key))
        await timed("second_call", arun_crew(crew, {"topic": "work"}, idempotency_key=key))
        await timed("get_result", aget_result(key))
    seconds = {f"{name}_seconds": median(several[1:]) for name, several in walls.items()}
    program = [Path(sys.executable).with_name("prefect-crew"), "runs", "ls"]
    await timed("runs_ls", asyncio.to_thread(subprocess.run, program, check=True, stdout=subprocess.DEVNULL))
    await timed("costs", read_costs(["crew"], since=(datetime.now(UTC) - timedelta(days=6)).date()))
    report("work", **seconds, runs_ls_seconds=walls["runs_ls"][0], costs_seconds=walls["costs"][0])


@flow(name="past", validate_parameters=False)
async def main(what: str, records: int, times: int) -> None:
    with lean_server(0.0) as server:
        crew = server.crew(wait=WaitPolicy(initial=0.05, factor=1, max_interval=0.05, jitter=0))
        await (make(records, crew) if what == "make" else work(times, crew))


if __name__ == "__main__":
    options = options_of(__doc__, "make", "work", records=150_000, times=3)
    asyncio.run(main(options.what, options.records, options.times))
