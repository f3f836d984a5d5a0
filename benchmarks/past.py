"""What a server with a past costs: the same work beside many ended records, and on an empty server.

    python benchmarks/past.py make --records 150000     so many records; one for the empty server
    python benchmarks/past.py work --times 3            each work so often in a flow run; medians

On the Prefect server of PREFECT_API_URL. `make` writes to its database, which BENCHMARK_DATABASE names as SQLAlchemy
does. The records of the past are copies of a real run: its Variables and its artifact, under other keys and ids, spread
over 29 days. So they have the form that this version writes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from statistics import median
from typing import Any

from figures import report
from lean_server import TOKEN, lean_server
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from servers import DATABASE, prefect_server_of
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from prefect_crew import DeployedCrew, WaitPolicy, arun_crew, kickoff_crew
from prefect_crew.costs import read_costs
from prefect_crew.pool import stop_crews_of
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.resolve import resolve_never_started, unresolved
from prefect_crew.records.store import PrefectRecords
from support.records import new_record, put

DAYS = 29
"""The past reaches back so far; records are pruned after 30 days."""
PAGE = 5000
HEX = re.compile(r"[0-9a-f]{32}")
Row = dict[str, Any]
Ready = Callable[[], Awaitable[Any]]
"""A work whose preparation, which is not measured, is done."""


# The past


async def make(given: argparse.Namespace, crew: Any) -> None:
    """Run a crew once, and let it have run so many times more."""
    engine = create_async_engine(os.environ[DATABASE], connect_args={"timeout": 60}, json_deserializer=str)

    async def read(table: str) -> list[Row]:
        async with engine.connect() as connection:
            return [dict(row) for row in (await connection.execute(text(f"SELECT * FROM {table}"))).mappings()]

    began, key = time.perf_counter(), f"past {uuid.uuid4()}"
    before = {table: {str(row["id"]) for row in await read(table)} for table in ("variable", "artifact")}
    result = await arun_crew(crew, {"topic": "past"}, idempotency_key=key)
    for table, earlier in before.items():
        rows = [row for row in await read(table) if str(row["id"]) not in earlier]
        assert rows, f"the run wrote no {table}"
        names, values = ", ".join(rows[0]), ", ".join(f":{name}" for name in rows[0])
        insert = text(f"INSERT INTO {table} ({names}) VALUES ({values})")
        made = copies(rows, given.records, key=key, kickoff_id=result.kickoff_id)
        while page := list(islice(made, PAGE)):
            async with engine.begin() as connection:
                await connection.execute(insert, page)
        if engine.dialect.name == "postgresql":
            async with engine.begin() as connection:
                await connection.execute(text(f"ANALYZE {table}"))
    await engine.dispose()
    report("the past", records=given.records, seconds=time.perf_counter() - began)


def copies(rows: list[Row], number: int, *, key: str, kickoff_id: str) -> Iterator[Row]:
    """Yield a run's rows so many times, each under a key and ids of its own, from the oldest to the newest."""
    hashes = {text for row in rows for text in HEX.findall(row.get("name") or "")}
    ids = {str(row["id"]) for row in rows}
    now = datetime.now(UTC)
    for copy in range(number):
        new_key, new_kickoff_id = f"{key} {copy}", f"{kickoff_id}-{copy}"
        new_ids = {old: str(uuid.uuid5(uuid.NAMESPACE_OID, f"{old} {copy}")) for old in ids}
        texts = {key: new_key, _digest(key): _digest(new_key)}
        texts |= {kickoff_id: new_kickoff_id, _digest(kickoff_id): _digest(new_kickoff_id)}
        texts |= new_ids | {old.replace("-", ""): new.replace("-", "") for old, new in new_ids.items()}
        texts |= {text: _digest(f"{text} {copy}") for text in hashes - texts.keys()}
        pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        moment = now - timedelta(days=DAYS * (1 - copy / number))
        for row in rows:
            yield {name: _copied(name, value, pattern, texts, moment) for name, value in row.items()}


def _copied(name: str, value: Any, pattern: re.Pattern[str], texts: dict[str, str], moment: datetime) -> Any:
    if isinstance(value, datetime):
        return moment
    if name in ("created", "updated"):
        return f"{moment:%Y-%m-%d %H:%M:%S.%f}"
    if isinstance(value, uuid.UUID):
        return uuid.UUID(texts.get(str(value), str(value)))
    return pattern.sub(lambda match: texts[match[0]], value) if isinstance(value, str) else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# The work


async def start(crew: Any) -> Ready:
    key = f"start {uuid.uuid4()}"
    return lambda: arun_crew(crew, {"topic": "start"}, idempotency_key=key)


async def second_call(crew: Any) -> Ready:
    key = f"second {uuid.uuid4()}"
    await arun_crew(crew, {"topic": "second"}, idempotency_key=key)
    return lambda: arun_crew(crew, {"topic": "second"}, idempotency_key=key)


async def resolve_by_key(_: Any) -> Ready:
    record = await put(new_record(phase=RecordPhase.UNCERTAIN, reason="the answer was lost"))

    async def resolve() -> None:
        store = PrefectRecords()
        await resolve_never_started(await unresolved(record.idempotency_key, store), store)

    return resolve


async def look_up_by_kickoff_id(crew: Any) -> Ready:
    run = await arun_crew(crew, {"topic": "id"}, idempotency_key=f"id {uuid.uuid4()}")

    async def look_up() -> None:
        assert await PrefectRecords().of_kickoff(run.kickoff_id), "the run was not found by its id"

    return look_up


async def cancel(crew: Any) -> Ready:
    """One flow run whose crew is in flight, as a worker cancels it: its crews are looked up and stopped."""

    @flow(name="to cancel", validate_parameters=False)
    async def begin() -> str:
        await kickoff_crew(crew, {"topic": "cancel"})
        return str(flow_run.id)

    run_id = uuid.UUID(await begin())

    async def stop() -> None:
        async with get_client() as client:
            await stop_crews_of(client, await client.read_flow_run(run_id))

    return stop


async def list_open_runs(_: Any) -> Ready:
    async def read() -> None:
        [_ async for _ in PrefectRecords().all(RecordPhase.STARTED)]

    return read


async def costs_of_7_days(_: Any) -> Ready:
    since = (datetime.now(UTC) - timedelta(days=6)).date()
    return lambda: read_costs(["crew"], since=since)


async def flow_run_of_a_deployment(_: Any) -> Ready:
    """A flow run that a page, an automation or `run_deployment` makes: Prefect reads all Variables for it."""
    async with get_client() as client:
        flow_id = await client.create_flow_from_name("deployed")
        deployment_id = await client.create_deployment(flow_id, name="by hand")

    async def create() -> None:
        async with get_client() as client:
            await client.create_flow_run_from_deployment(deployment_id)

    return create


QUICK = (start, second_call, resolve_by_key, look_up_by_kickoff_id, cancel)
SLOW = (list_open_runs, costs_of_7_days, flow_run_of_a_deployment)
"""Each of these is done once: it may take minutes."""


async def work(given: argparse.Namespace, crew: Any) -> None:
    async def measured(prepare: Callable[[Any], Awaitable[Ready]]) -> float:
        ready = await prepare(crew)
        began = time.perf_counter()
        await ready()
        return time.perf_counter() - began

    taken = {one.__name__: [await measured(one) for _ in range(given.times + 1)] for one in QUICK}
    # The first time loads and opens what the others use.
    seconds = {name: median(several[1:]) for name, several in taken.items()}
    seconds |= {one.__name__: await measured(one) for one in SLOW}
    report("work", **{f"{name}_seconds": value for name, value in seconds.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "work"])
    parser.add_argument("--records", type=int, default=150_000)
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    prefect_server_of()
    often = WaitPolicy(initial=0.05, factor=1, max_interval=0.05, jitter=0)

    @flow(name="past", validate_parameters=False)
    async def run() -> None:
        await (make if given.what == "make" else work)(given, crew)

    with lean_server(0.0) as server:
        crew: Any = DeployedCrew(url=server.url, token=TOKEN, wait=often)  # type: ignore[arg-type]
        asyncio.run(run())


if __name__ == "__main__":
    main()
