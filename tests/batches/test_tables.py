"""Tables of SQLite and PostgreSQL as data sets and as exports, through a stored block, with drivers of both kinds."""

import asyncio
import io
import json
import re
import sys
import tracemalloc
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from pydantic import BaseModel

from prefect_crew import ConfigurationError, aplan_batch
from prefect_crew.batches.batch import find_batch
from prefect_crew.batches.dataset import Dataset
from prefect_crew.batches.output import COLUMNS, TableOutput, open_output
from prefect_crew.batches.tables import Spool, open_query
from prefect_crew.cli.batch import resume
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import CrewError, DatasetError
from support.batches import CREW, Batches, nothing, row, write
from support.frames import locals_of
from support.tables import POSTGRESQL, SQLITE, StoredDatabase, new_database

FILL = "INSERT INTO topics VALUES (2, 'milk'), (1, '100% tea'), (3, 'a :b')"


@pytest.fixture(params=[*SQLITE, *(pytest.param(name, marks=pytest.mark.postgres) for name in POSTGRESQL)])
async def database(request: pytest.FixtureRequest, tmp_path: Path, prefect_api: object) -> StoredDatabase:
    """Give a stored database with a table `topics` of three rows, for a driver of each kind."""
    driver = request.param
    if driver == "postgresql+psycopg":
        pytest.importorskip("psycopg", reason="needs psycopg")
    database = new_database(driver, tmp_path, None if driver in SQLITE else request.getfixturevalue("postgres"))
    await database.save()
    await database.run("CREATE TABLE topics (id INTEGER, topic TEXT)", FILL)
    return database


async def read(dataset: Dataset) -> list[dict[str, Any]]:
    """Read a data set as a batch does: in a thread."""
    return await asyncio.to_thread(lambda: [dict(row.values) for row in dataset.rows()])


async def opened(database: StoredDatabase, output_type: type[BaseModel] | None = None, batch: str = "b") -> TableOutput:
    """Return the table `results` as the output of a batch."""
    output = open_output(database.table("results"), batch, output_type=output_type)
    assert isinstance(output, TableOutput)
    await output.open()
    return output


def lines(*keys: str, **more: Any) -> io.BytesIO:
    """Return lines without a result but for `more`, as the crew database gives them."""
    rows = [dict.fromkeys(COLUMNS) | {"key": key, "tasks": [], **more} for key in keys]
    return io.BytesIO(b"".join(json.dumps(line).encode() + b"\n" for line in rows))


async def fill(target: TableOutput, *keys: str, **more: Any) -> None:
    """Write lines of a batch into the table."""
    await asyncio.to_thread(target._replace, lines(*keys, **more), nothing)


# Queries


async def test_second_read_equals_the_first(database: StoredDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (spool := tmp_path / "spool").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    dataset = await open_query(database.query("SELECT id, topic FROM topics"))
    first = await read(dataset)
    await database.run("DELETE FROM topics")
    two_readers_at_once = zip(dataset.rows(), dataset.rows(), strict=True)
    assert [row.values for rows in two_readers_at_once for row in rows] == [row for row in first for _ in range(2)]
    assert sorted(row["topic"] for row in first) == ["100% tea", "a :b", "milk"]
    assert list(spool.iterdir()) == [], "the rows have no file with a name"


async def test_query_goes_to_the_driver_as_it_is(database: StoredDatabase):
    query = "SELECT topic, '%s' AS a, ':x::y' AS b, 'é+&#?=' AS c FROM topics WHERE topic LIKE '%te%' OR id = 0"
    dataset = await open_query(database.query(query))
    (row,) = await read(dataset)
    assert [*row.values()] == ["100% tea", "%s", ":x::y", "é+&#?="]
    assert dataset.name == f"sql://{database.block}", "the text of a query may hold a secret"


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("SELECT 1 FROM nowhere", "cannot be read: .*nowhere"),
        ("SELEKT 'sesame-open'", "cannot be read: .*SELEKT"),
        ("SELECT 1 AS a, 2 AS a", "the columns 'a' appear twice"),
    ],
)
async def test_query_that_fails_names_the_problem(database: StoredDatabase, query: str, problem: str):
    with pytest.raises(DatasetError, match=f"sql://{database.block}: {problem}.*Nothing of this data set was started"):
        await read(await open_query(database.query(query)))


async def test_query_that_writes_is_rolled_back(database: StoredDatabase):
    for query in ("DELETE FROM topics", "CREATE TABLE more (a INTEGER)"):
        with pytest.raises(DatasetError, match=r"a statement that is no query|cannot be read"):
            await read(await open_query(database.query(query)))
    dataset = await open_query(database.query("DELETE FROM topics RETURNING topic"))
    if database.driver == "postgresql+psycopg":  # it declares a cursor, which takes SELECT alone
        with pytest.raises(DatasetError):
            await read(dataset)
    else:
        assert len(await read(dataset)) == 3
    assert await database.run("SELECT count(*) FROM topics") == [(3,)]
    await database.run("CREATE TABLE more (a INTEGER)")


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("sql://store", "sql://store: has no query"),
        ("sql://store?query=", "has no query"),
        ("sql://store/table", "has no query"),
        ("sql://ada:sesame-open@host/db?query=SELECT 1", "sql://host/db names no block of Prefect"),
        ("sql://nowhere?query=SELECT 1", "There is no SQLAlchemy block 'nowhere'.*save"),
    ],
)
async def test_address_without_query_or_block_is_refused(prefect_api: object, address: str, problem: str):
    with pytest.raises((DatasetError, ConfigurationError), match=problem) as caught:
        await open_query(address)
    assert "sesame" not in str(caught.value)


async def test_database_that_is_away_names_no_password(prefect_api: object, tmp_path: Path):
    for driver in POSTGRESQL:
        if driver.endswith("psycopg"):
            pytest.importorskip("psycopg", reason="needs psycopg")
        store = StoredDatabase(driver, "postgresql://ada:sesame-open@127.0.0.1:9/db")
        await store.save()
        with pytest.raises(DatasetError, match="cannot be read") as caught:
            await read(await open_query(store.query("SELECT 1")))
        assert "sesame-open" not in str(caught.value) + locals_of(caught.value, but=__file__)


@pytest.mark.parametrize("driver", ["oracle+nothing", "postgresql+asyncpg"])
async def test_block_that_cannot_be_used_shows_no_field(prefect_api: object, tmp_path: Path, driver: str):
    store = new_database("sqlite", tmp_path, None)
    await store.save()
    async with get_client() as client:  # a sync block itself refuses the URL of an async driver
        stored = await client.read_block_document_by_name(store.block, "sqlalchemy-connector")
        data = {**stored.data, "connection_info": f"{driver}://ada:sesame-open@host/db"}
        await client.update_block_document(stored.id, BlockDocumentUpdate(data=data))
    with pytest.raises(ConfigurationError, match=r"cannot be used.*Save it again") as caught:
        await open_query(store.query("SELECT 1"))
    assert "sesame-open" not in str(caught.value) + locals_of(caught.value, but=__file__)


async def test_query_with_a_range_is_refused(prefect_api: object):
    with pytest.raises(ConfigurationError, match=r"WHERE of the query.*Nothing was started"):
        await aplan_batch(CREW, "sql://store?query=SELECT 1", rows="0:2")


async def test_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prefect_sqlalchemy", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'prefect-crew\[sql\]'"):
        await open_query("sql://store?query=SELECT 1")
    with pytest.raises(ConfigurationError, match=r"pip install 'prefect-crew\[sql\]'"):
        await open_output("sql://store/results", "b").open()


async def test_rows_of_a_query_are_read_in_bounded_memory(database: StoredDatabase):
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000) SELECT i FROM n"
    wide = f"SELECT i, '{'x' * 500}' AS text FROM ({numbers}) AS all_of_them"
    dataset = await open_query(database.query(wide))

    def count() -> int:
        tracemalloc.start()
        try:
            for _ in range(2):
                assert sum(1 for _ in dataset.rows()) == 40_000
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert await asyncio.to_thread(count) < 16_000_000, "20 MB of text, and more as objects"


# Exports


async def test_from_table_into_table(batch: Batches, database: StoredDatabase, echo: CrewServer):
    await echo.crew().asave("writer", overwrite=True)  # type: ignore[misc]
    await fill(await opened(database, batch="other"), "1")  # another batch shares the table
    name, address = f"nightly {uuid.uuid4().hex[:6]}", database.table("results")
    options: dict[str, Any] = {"name": name, "key": "id", "export": address}
    report = await batch("writer", database.query("SELECT * FROM topics"), **options)  # type: ignore[arg-type]
    assert report.completed == 3
    assert report.export == address
    query = "SELECT batch, key, state, output FROM results WHERE batch <> 'other' ORDER BY key"
    rows = await database.run(query)
    texts = ("on 100% tea", "on milk", "on a :b")
    assert rows == [(name, str(number), "completed", text) for number, text in enumerate(texts, 1)]
    assert await resume(name) == 0
    stored = await find_batch(name)
    await database.run("UPDATE results SET output = 'spoiled' WHERE key = '1'")
    assert await stored.export() == (address, 3)
    assert await stored.export(database.table("copy")) == (database.table("copy"), 3)
    assert await database.run(query) == rows == await database.run(query.replace("results", "copy"))
    assert echo.kickoffs == 3
    await database.run("INSERT INTO topics VALUES (4, 'rye')")
    assert await resume(name) == 0
    assert len(await database.run(query)) == echo.kickoffs == 4
    assert await database.run("SELECT key FROM results WHERE batch = 'other'") == [("1",)]


async def test_quoted_query_gets_the_scheduled_time(batch: Batches, database: StoredDatabase, echo: CrewServer):
    await echo.crew().asave("writer", overwrite=True)  # type: ignore[misc]
    name, query = f"timed {uuid.uuid4().hex[:6]}", "SELECT '{scheduled_start:%Y} 100%' AS topic"
    await batch("writer", database.query(query), name=name)  # type: ignore[arg-type]
    (line,) = batch.lines().values()
    assert re.fullmatch(r"on 20\d\d 100%", line["output"])
    rendered = query.replace("{scheduled_start:%Y}", line["output"][3:7])
    assert (await find_batch(name)).arguments()["dataset"] == database.query(rendered)


async def test_rows_of_a_namesake_are_refused(batch: Batches, database: StoredDatabase, echo: CrewServer):
    name, rows = f"nightly {uuid.uuid4().hex[:8]}", [{"topic": "tea"}]
    await fill(await opened(database, batch=name), "old")
    options: dict[str, Any] = {"name": name, "key": "topic"}
    with pytest.raises(CrewError, match=f"of another batch, which is also named '{name}'.*Nothing was started"):
        await batch(echo.crew(), rows, export=database.table("results"), **options)
    assert echo.kickoffs == 0
    await batch(echo.crew(), rows, **options)
    stored = await find_batch(name)
    with pytest.raises(CrewError, match="overwrite=True"):
        await stored.export(database.table("results"))
    assert (await stored.export(database.table("results"), overwrite=True))[1] == 1
    assert await database.run("SELECT key FROM results") == [("tea",)]


async def test_table_of_something_else_is_refused_at_first(batch: Batches, database: StoredDatabase, echo: CrewServer):
    tables = {"topics": r"cannot be written: .*batch.*Nothing was started\.$"}
    for table, problem in tables.items():
        with pytest.raises(CrewError, match=problem):
            await batch(echo.crew(), [{"topic": "tea"}], export=database.table(table))
    assert echo.kickoffs == 0
    assert sorted(await database.run("SELECT * FROM topics")) == [(1, "100% tea"), (2, "milk"), (3, "a :b")]


class Trip(BaseModel):
    nights: int
    begins: date
    places: list[str]


async def test_fields_of_the_type_are_columns_of_text(database: StoredDatabase):
    data = {"nights": 2**62, "begins": "2026-01-02", "places": ["Rome\0"]}
    await fill(await opened(database, Trip), "a", data=data, output="x\0", seconds=1.5)
    names = "output, seconds, data_nights, data_begins, data_places"
    ((text, seconds, nights, begins, places),) = await database.run(f"SELECT {names} FROM results")
    assert (text, seconds, nights, begins) == ("x\ufffd", 1.5, str(2**62), "2026-01-02")
    assert places.startswith('["Rome')


def test_values_of_a_query_keep_their_types():
    day = {"at": datetime(2026, 1, 2, 3, tzinfo=UTC), "price": Decimal("1.10")}
    (row,) = Spool([*day], [[(*day.values(),)]]).rows()
    assert row.values == day


@pytest.mark.parametrize("kind", ["error", "database"])
async def test_export_that_is_cut_off_leaves_the_table(database: StoredDatabase, kind: str):
    output = await opened(database)
    await fill(output, "a", output="before")

    def cut() -> Iterator[bytes]:
        yield from lines("a", "b", output="after")
        if kind == "error":
            raise OSError(28, "No space left on device")
        yield from lines("a")  # its key is there

    with pytest.raises(CrewError, match=r"results cannot be written: .*All results are in the crew database") as caught:
        await asyncio.to_thread(output._replace, cut(), nothing)  # type: ignore[arg-type]
    assert "INSERT" not in str(caught.value)
    assert await database.run("SELECT key, output FROM results") == [("a", "before")]


async def test_cancelled_export_leaves_the_table(database: StoredDatabase, monkeypatch: pytest.MonkeyPatch):
    output, begun, threads = await opened(database), asyncio.Event(), ThreadPoolExecutor()
    loop, replace = asyncio.get_running_loop(), TableOutput._replace
    loop.set_default_executor(threads)

    def slowly(self: TableOutput, file: Any, guard: Any) -> None:
        def lines() -> Iterator[bytes]:
            for line in file:
                loop.call_soon_threadsafe(begun.set)
                yield line
                while line.startswith(b'{"key":"k250"') and not file.closed:
                    pass

        replace(self, lines(), guard)  # type: ignore[arg-type]

    monkeypatch.setattr(TableOutput, "_replace", slowly)
    rows = [row(f"k{number}", is_conflict=True) for number in range(500)]
    writing = asyncio.create_task(write(output, *rows))
    await begun.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    threads.shutdown()  # once the transaction has ended
    loop.set_default_executor(ThreadPoolExecutor())
    exists = "SELECT count(*) FROM results"
    with pytest.raises(Exception, match="results"):  # it made the table in the same transaction
        await database.run(exists)
    monkeypatch.undo()
    assert await write(output, *rows) == 500
    assert await database.run(exists) == [(500,)]


@pytest.mark.parametrize("address", ["sql://store", "sql://store/", "sql://store?query=SELECT 1"])
def test_address_without_a_table_is_refused(address: str):
    with pytest.raises(ConfigurationError, match=r"names no table\. Give sql://BLOCK/TABLE"):
        open_output(address, "b")
