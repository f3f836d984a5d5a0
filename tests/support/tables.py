"""Databases that a stored block of prefect-sqlalchemy names, with each driver that tests use."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from support.postgres import Postgres

SQLITE = ("sqlite",)
POSTGRESQL = ("postgresql+psycopg",)


class StoredDatabase:
    """An empty database, and the block that names it. `run` sends it a statement."""

    def __init__(self, driver: str, url: str) -> None:
        self.block = f"db-{uuid.uuid4().hex[:8]}"
        self.driver = driver
        self.url = make_url(url)

    async def save(self, block: str | None = None, **more: Any) -> None:
        """Store the block; `more` are fields of it."""
        blocks: Any = pytest.importorskip("prefect_sqlalchemy", reason="needs the extra `sql`")
        url = self.url.set(drivername=self.driver).render_as_string(hide_password=False)
        stored = blocks.SqlAlchemyConnector(**{"connection_info": url, **more})
        await stored.asave(block or self.block, overwrite=True)

    def query(self, text: str) -> str:
        """Return the address of a query's rows."""
        return f"sql://{self.block}?query={quote(text)}"

    def table(self, name: str) -> str:
        """Return the address of a table."""
        return f"sql://{self.block}/{name}"

    async def run(self, *statements: str) -> list[Any]:
        """Run statements in a transaction, and return the rows of the last one."""
        driver = "sqlite+aiosqlite" if self.driver in SQLITE else "postgresql+asyncpg"
        engine = create_async_engine(self.url.set(drivername=driver))
        rows: Sequence[Any] = []
        async with engine.begin() as connection:
            for statement in statements:
                result = await connection.exec_driver_sql(statement)
                rows = result.all() if result.returns_rows else []
        await engine.dispose()
        return [tuple(row) for row in rows]


def new_database(driver: str, folder: Path, postgres: Postgres | None) -> StoredDatabase:
    """Return an empty database for a driver."""
    if driver in SQLITE:
        return StoredDatabase(driver, f"sqlite:///{folder / 'store.db'}")
    assert postgres is not None
    return StoredDatabase(driver, postgres.create_database(f"store_{uuid.uuid4().hex[:12]}"))
