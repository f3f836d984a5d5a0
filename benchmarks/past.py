"""What a server with a past costs: the same work beside many ended records, and on an empty server, in turn.

    python benchmarks/past.py --on sqlite                       150,000 ended records against none
    python benchmarks/past.py --on postgres --records 20000

It starts a crew server and two Prefect servers of its own. The records of the past are copies of a real run: its
Variables and its artifact, under other keys and ids, spread over 29 days. So they have the form that this version
writes. Each round does each work on both servers, one after the other. Reported is the median on each server and the
ratio; on PostgreSQL also how many rows of the table of Variables the server read for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import re
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from figures import report
from lean_server import TOKEN, LeanServer, lean_server
from servers import postgres

from support.postgres import Postgres
from support.prefect_server import PrefectServer, drain, environment

DAYS = 29
"""The past reaches back so far; records are pruned after 30 days."""
HEX = re.compile(r"[0-9a-f]{32}")
Row = dict[str, Any]


# The past


class Database:
    """The tables of one Prefect server, in the form of rows."""

    def read(self, table: str) -> list[Row]:
        raise NotImplementedError

    def write(self, table: str, rows: Iterator[Row]) -> None:
        raise NotImplementedError

    def rows_read(self) -> int | None:
        """Return how many Variables the server has read so far; None where the database does not count them."""
        return None


class Sqlite(Database):
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, table: str) -> list[Row]:
        with contextlib.closing(sqlite3.connect(self._path)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(f"SELECT * FROM {table}")]

    def write(self, table: str, rows: Iterator[Row]) -> None:
        first = next(rows)
        statement = f"INSERT INTO {table} ({', '.join(first)}) VALUES ({', '.join('?' * len(first))})"
        with contextlib.closing(sqlite3.connect(self._path, timeout=60)) as database, database:
            database.execute(statement, list(first.values()))
            database.executemany(statement, (list(row.values()) for row in rows))


class PostgresDatabase(Database):
    def __init__(self, url: str) -> None:
        self._url = url.replace("+asyncpg", "")

    def _run(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        import asyncpg

        async def run() -> Any:
            connection = await asyncpg.connect(self._url)
            try:
                return await work(connection)
            finally:
                await connection.close()

        # The caller may be on an event loop of its own.
        with contextlib.ExitStack() as stack:
            from concurrent.futures import ThreadPoolExecutor

            return stack.enter_context(ThreadPoolExecutor(1)).submit(asyncio.run, run()).result()

    def read(self, table: str) -> list[Row]:
        return [dict(row) for row in self._run(lambda database: database.fetch(f"SELECT * FROM {table}"))]

    def write(self, table: str, rows: Iterator[Row]) -> None:
        first = next(rows)

        def values() -> Iterator[list[Any]]:
            yield list(first.values())
            yield from (list(row.values()) for row in rows)

        async def copy(database: Any) -> None:
            await database.copy_records_to_table(table, records=values(), columns=list(first))
            await database.execute(f"ANALYZE {table}")

        self._run(copy)

    def rows_read(self) -> int | None:
        async def ask(database: Any) -> int:
            await database.execute("SELECT pg_stat_clear_snapshot()")
            return await database.fetchval(
                "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables WHERE relname = 'variable'"
            )

        return int(self._run(ask))


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


async def make_past(database: Database, crew: Any, number: int) -> None:
    """Run a crew once, and let it have run so many times more."""
    from prefect_crew import arun_crew

    key = f"past {uuid.uuid4()}"
    before = {table: {str(row["id"]) for row in database.read(table)} for table in ("variable", "artifact")}
    result = await arun_crew(crew, {"topic": "past"}, idempotency_key=key)
    for table, known in before.items():
        rows = [row for row in database.read(table) if str(row["id"]) not in known]
        if not rows:
            raise RuntimeError(f"The run wrote no {table}.")
        made = copies(rows, number, key=key, kickoff_id=result.kickoff_id)
        await asyncio.to_thread(database.write, table, made)


# The work


class Work:
    """Everything that is measured, by its name. `kept` is what the work needs and is made before, not measured."""

    def __init__(self, crew: Any, server: LeanServer) -> None:
        self.crew = crew
        self.server = server

    async def start(self) -> Callable[[], Awaitable[Any]]:
        from prefect_crew import arun_crew

        key = f"start {uuid.uuid4()}"
        return lambda: arun_crew(self.crew, {"topic": "start"}, idempotency_key=key)

    async def second_call(self) -> Callable[[], Awaitable[Any]]:
        from prefect_crew import arun_crew

        key = f"second {uuid.uuid4()}"
        await arun_crew(self.crew, {"topic": "second"}, idempotency_key=key)
        return lambda: arun_crew(self.crew, {"topic": "second"}, idempotency_key=key)

    async def resolve_by_key(self) -> Callable[[], Awaitable[Any]]:
        from prefect_crew.records.model import RecordPhase
        from prefect_crew.records.resolve import resolve_never_started, unresolved
        from prefect_crew.records.store import PrefectRecords
        from support.records import new_record, put

        record = await put(new_record(phase=RecordPhase.UNCERTAIN, reason="the answer was lost"))

        async def resolve() -> None:
            store = PrefectRecords()
            await resolve_never_started(await unresolved(record.idempotency_key, store), store)

        return resolve

    async def look_up_by_kickoff_id(self) -> Callable[[], Awaitable[Any]]:
        from prefect_crew import arun_crew
        from prefect_crew.records.store import PrefectRecords

        run = await arun_crew(self.crew, {"topic": "id"}, idempotency_key=f"id {uuid.uuid4()}")

        async def look_up() -> None:
            if await PrefectRecords().of_kickoff(run.kickoff_id) is None:
                raise RuntimeError("The run was not found by its id.")

        return look_up

    async def cancel(self) -> Callable[[], Awaitable[Any]]:
        """One flow run whose crew is in flight, as a worker cancels it: its crews are looked up and stopped."""
        from prefect import flow
        from prefect.client.orchestration import get_client
        from prefect.runtime import flow_run

        from prefect_crew import kickoff_crew
        from prefect_crew.pool import stop_crews_of

        @flow(name="to cancel", validate_parameters=False)
        async def start() -> str:
            await kickoff_crew(self.crew, {"topic": "cancel"})
            return str(flow_run.id)

        run_id = uuid.UUID(await start())

        async def cancel() -> None:
            async with get_client() as client:
                await stop_crews_of(client, await client.read_flow_run(run_id))

        return cancel

    async def flow_run_of_a_deployment(self) -> Callable[[], Awaitable[Any]]:
        """A flow run that a page, an automation or `run_deployment` makes: Prefect reads all Variables for it."""
        from prefect.client.orchestration import get_client

        async with get_client() as client:
            flow_id = await client.create_flow_from_name("deployed")
            deployment_id = await client.create_deployment(flow_id, name="by hand")

        async def create() -> None:
            async with get_client() as client:
                await client.create_flow_run_from_deployment(deployment_id)

        return create

    async def list_open_runs(self) -> Callable[[], Awaitable[Any]]:
        from prefect_crew.records.model import RecordPhase
        from prefect_crew.records.store import PrefectRecords

        async def read() -> None:
            [_ async for _ in PrefectRecords().all(RecordPhase.STARTED)]

        return read

    async def costs_of_7_days(self) -> Callable[[], Awaitable[Any]]:
        from prefect_crew.costs import read_costs

        since = (datetime.now(UTC) - timedelta(days=6)).date()
        return lambda: read_costs(["crew"], since=since)


RATIO = ("start", "second_call", "resolve_by_key", "look_up_by_kickoff_id", "cancel")
LISTS = ("flow_run_of_a_deployment", "list_open_runs", "costs_of_7_days")


async def measure(work: Work, name: str, database: Database) -> tuple[float, int | None]:
    """Do one work once, in a flow run that is under way, and return its seconds and the Variables that were read."""
    run = await getattr(work, name)()
    if database.rows_read() is not None:
        await asyncio.sleep(1.2)  # PostgreSQL's backends report what they have read once a second
    rows = database.rows_read()
    began = time.perf_counter()
    await run()
    seconds = time.perf_counter() - began
    if rows is not None:
        await asyncio.sleep(1.2)
        rows = (database.rows_read() or 0) - rows
    return seconds, rows


def servers_of(kind: str, folder: Path, stack: contextlib.ExitStack) -> dict[str, tuple[PrefectServer, Database]]:
    """Start an empty Prefect server, and the one that gets a past."""
    cluster: Postgres | None = stack.enter_context(postgres()) if kind == "postgres" else None
    servers: dict[str, tuple[PrefectServer, Database]] = {}
    for name in ("empty", "past"):
        url = cluster.create_database(name) if cluster else None
        server = stack.enter_context(PrefectServer(folder / name, database_url=url))
        servers[name] = server, PostgresDatabase(url) if url else Sqlite(folder / name / "home" / "prefect.db")
    return servers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--records", type=int, default=150_000)
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--work", nargs="+", choices=[*RATIO, *LISTS], default=[*RATIO, *LISTS])
    options = parser.parse_args()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefect-crew-past-")))
        server = stack.enter_context(lean_server(0.0))
        servers = servers_of(options.on, folder, stack)

        def on(name: str, run: Callable[[Work, Database], Awaitable[Any]]) -> Any:
            prefect, database = servers[name]
            with environment({"PREFECT_API_URL": prefect.api_url, "PREFECT_HOME": str(folder / "client")}):
                try:
                    return asyncio.run(_in_flow(run, server, database))
                finally:
                    drain()

        began = time.perf_counter()
        on("past", lambda work, database: make_past(database, work.crew, options.records))
        on("empty", lambda work, database: make_past(database, work.crew, 1))
        report("the past", records=options.records, seconds=time.perf_counter() - began)
        for name in options.work:
            times = options.times if name in RATIO else 2
            taken: dict[str, list[float]] = {"empty": [], "past": []}
            rows: dict[str, list[int]] = {"empty": [], "past": []}
            for turn in range(times + 1):
                for where in ("empty", "past") if turn % 2 else ("past", "empty"):
                    seconds, read = on(where, lambda work, database, name=name: measure(work, name, database))
                    if turn:  # the first loads and opens what the others use
                        taken[where].append(seconds)
                        rows[where] += [] if read is None else [read]
            empty, past = median(taken["empty"]), median(taken["past"])
            read_rows = {f"{where}_rows": int(median(counts)) for where, counts in rows.items() if counts}
            report(
                f"{name} on {options.on}",
                empty_seconds=empty,
                past_seconds=past,
                ratio=past / empty,
                **read_rows,
                each=json.loads(json.dumps(taken)),
            )


async def _in_flow(run: Callable[[Work, Database], Awaitable[Any]], server: LeanServer, database: Database) -> Any:
    from prefect import flow

    from prefect_crew import DeployedCrew, WaitPolicy

    often = WaitPolicy(initial=0.05, factor=1, max_interval=0.05, jitter=0)
    crew: Any = DeployedCrew(url=server.url, token=TOKEN, wait=often)  # type: ignore[arg-type]

    @flow(name="past", validate_parameters=False)
    async def measured() -> Any:
        return await run(Work(crew, server), database)

    return await measured()


if __name__ == "__main__":
    main()
