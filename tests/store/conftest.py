"""Every test of the store runs on SQLite and on PostgreSQL; where there is none, the latter are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from prefect_crew.store.database import Store
from prefect_crew.store.schema import METADATA
from support.crew_database import Clock
from support.postgres import Postgres


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database_url" in metafunc.fixturenames:
        metafunc.parametrize(
            "database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)], indirect=True
        )


@pytest.fixture(scope="session")
def empty_postgres(request: pytest.FixtureRequest) -> Callable[[], str]:
    """Return the URL of a database of PostgreSQL in which a store, if there is one, is empty."""
    server: Postgres = request.getfixturevalue("postgres")
    url = server.create_database("crews").replace("+asyncpg", "")
    engine = sa.create_engine(url.replace("postgresql", "postgresql+psycopg"))

    def empty() -> str:
        with engine.begin() as connection:
            if sa.inspect(connection).has_table("crew_store"):
                names = [name for name in METADATA.tables if name != "crew_store"]
                connection.exec_driver_sql(f"TRUNCATE {', '.join(names)} CASCADE")
        return url

    return empty


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'crew.db'}"
    return request.getfixturevalue("empty_postgres")()


@pytest.fixture
def clock() -> Clock:
    """The time of `store`."""
    return Clock()


@pytest.fixture
def store(database_url: str, clock: Clock) -> Iterator[Store]:
    """A fresh store whose time the test sets."""
    store = Store(database_url, clock=clock)
    yield store
    store.close()


@pytest.fixture
def timed_store(database_url: str) -> Iterator[Store]:
    """A fresh store with the time of its database."""
    store = Store(database_url)
    yield store
    store.close()
