"""SIGKILL at each step of an export into a table, and the same call again: each row is there once, with its last value.

The process is real, and so are SQLite and PostgreSQL. After its death the table has the rows of the export before, or
those of this one, and never a part. The rows of another batch in the table, with the same keys, stay as they are.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from proof.kills import Kill
from proof.zygote import Script, Zygote
from support.scripts import script
from support.tables import SQLITE, StoredDatabase, new_database

PICKY = script({"output": "on {{ topic }}", "fail": "{{ 'no ' + topic if 'bad' in topic }}"}, inputs=["topic"])
WAIT = {"initial": 0.02, "factor": 1.0, "jitter": 0, "timeout": 60}
PAGE = 3
BEFORE = ["tea", "bad milk", "juice", "bad water"]
AFTER = ["tea", "milk", "juice", "bad water", "wine", "beer", "rum"]
"""The topics of two calls. The second call corrects a row, and has further ones."""

# Each call first checks the table: it makes the table if there is none, and writes one row. All that is rolled back.
IN_CHECK = [Kill("table-prepare", "after"), Kill("table-row", "before"), Kill("table-replace", "after")]
IN_EXPORT = [
    Kill("export-noted", "before"),
    Kill("export-noted", "after"),
    Kill("table-prepare", "before", 2),
    Kill("table-replace", "before", 2),
    *(Kill("table-row", "before", 2 + PAGE * page) for page in (0, 1, 2)),
    Kill("table-replace", "after", 2),
    Kill("table-commit", "before"),
    Kill("table-commit", "after"),
    Kill("hold-end", "before"),
    Kill("hold-end", "after"),
]
WHILE_MADE = [Kill("table-create", when, nth) for nth in (1, 2) for when in ("before", "after")]
"""In a database without the table: in the check, and in the export."""
COMMITTED = ("after table-commit", "before hold-end", "after hold-end")
FIXED = ("before table-row 5", "after table-create 2")
"""The points that run each time, with a driver for each database."""
Rows = list[tuple[Any, ...]]


def points(kills: list[Kill]) -> list[Any]:
    return [pytest.param(kill, id=str(kill), marks=() if str(kill) in FIXED else pytest.mark.slow) for kill in kills]


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql+psycopg", marks=pytest.mark.postgres),
    ]
)
def database(request: pytest.FixtureRequest, tmp_path: Path, prefect_api: object) -> StoredDatabase:
    """Give an empty database, and store its block."""
    driver = request.param
    if driver == "postgresql+psycopg":
        pytest.importorskip("psycopg", reason="needs psycopg")
    postgres = None if driver in SQLITE else request.getfixturevalue("postgres")
    empty = new_database(driver, tmp_path, postgres)
    asyncio.run(empty.save())
    return empty


class Exports:
    """A batch that is exported into the table `results`, and what the table has."""

    def __init__(self, database: StoredDatabase, zygote: Zygote, server: CrewServer, folder: Path) -> None:
        self.name = f"proof {uuid.uuid4().hex[:12]}"
        self._database = database
        self._zygote = zygote
        self._crew = {"url": server.url, "token": server.token}
        self._data = folder / "rows.csv"
        self._options: dict[str, Any] = {
            "name": self.name,
            "export": database.table("results"),
            "key": "id",
            "wait": WAIT,
            "breaker": None,
        }

    def call(self, topics: list[str], kill: Kill | None = None) -> None:
        lines = [f"{number},{topic}" for number, topic in enumerate(topics)]
        self._data.write_text("\n".join(["id,topic", *lines]))
        call = {"dataset": str(self._data), **self._options}
        ended = self._zygote.run_one(Script(self._crew, call, kill, page=PAGE))
        assert not ended.error
        assert ended.killed is (kill is not None)

    def run(self, *statements: str) -> Rows:
        return asyncio.run(self._database.run(*statements))

    def rows(self, batch: str) -> Rows:
        return self.run(f"SELECT key, state, output FROM results WHERE batch = '{batch}' ORDER BY key")


def lines(topics: list[str]) -> Rows:
    """Return the rows of the table for a data set of these topics."""
    states = ["failed" if "bad" in topic else "completed" for topic in topics]
    named = enumerate(zip(topics, states, strict=True))
    return [(str(at), state, f"on {topic}" if state == "completed" else None) for at, (topic, state) in named]


@pytest.fixture
def exports(database: StoredDatabase, zygote: Zygote, tmp_path: Path) -> Iterator[Exports]:
    with CrewServer(PICKY) as server:
        yield Exports(database, zygote, server, tmp_path)


@pytest.mark.parametrize("kill", points([*IN_CHECK, *IN_EXPORT]))
def test_rows_are_replaced_as_a_whole_wherever_the_export_dies(kill: Kill, exports: Exports) -> None:
    exports.call(BEFORE)
    assert exports.rows(exports.name) == lines(BEFORE)
    exports.run("INSERT INTO results (batch, key, state, output) SELECT 'other', key, 'x', 'theirs' FROM results")
    theirs = exports.rows("other")
    exports.call(AFTER, kill)
    assert exports.rows(exports.name) == lines(AFTER if str(kill) in COMMITTED else BEFORE)
    assert exports.rows("other") == theirs
    exports.call(AFTER)
    assert exports.rows(exports.name) == lines(AFTER)
    assert exports.rows("other") == theirs


@pytest.mark.parametrize("kill", points([*IN_CHECK, *WHILE_MADE, *IN_EXPORT]))
def test_table_is_made_with_its_rows_wherever_the_export_dies(kill: Kill, exports: Exports) -> None:
    exports.run("CREATE TABLE theirs (a INTEGER)", "INSERT INTO theirs VALUES (1)")
    exports.call(AFTER, kill)
    if str(kill) in COMMITTED:
        assert exports.rows(exports.name) == lines(AFTER)
    else:
        exports.run("CREATE TABLE results (a INTEGER)", "DROP TABLE results")  # there is none
    exports.call(AFTER)
    assert exports.rows(exports.name) == lines(AFTER)
    assert exports.run("SELECT a FROM theirs") == [(1,)]
