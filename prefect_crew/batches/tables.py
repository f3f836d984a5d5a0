"""SQL databases of stored blocks of prefect-sqlalchemy: the rows of a query, and tables for results.

An address is `sql://BLOCK?query=…`, percent-encoded, or `sql://BLOCK/TABLE`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import quote, unquote

import sqlalchemy as sa
from prefect.exceptions import ObjectNotFound
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.pool import NullPool

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.batches.dataset import PART, Dataset, Spool, error_text, shown_address
from prefect_crew.client.redaction import Redactor
from prefect_crew.exceptions import ConfigurationError, CrewError, DatasetError

T = TypeVar("T")
SQL = "sql://"
_BLOCK = re.compile("[a-z0-9-]+")


class SqlDatabase:
    """The database of a stored block. All methods but `load` block, so they run in a thread."""

    def __init__(self, engine: Any, redact: Redactor) -> None:
        self._engine = engine
        self._redact = redact

    @property
    def kind(self) -> str:
        """The name of the database system, such as `postgresql`."""
        return str(self._engine.dialect.name)

    @classmethod
    async def load(cls, block: str, *, name: str) -> SqlDatabase:
        """Load a SqlAlchemyConnector or an AsyncSqlAlchemyConnector. `name` is the address that needs the block.

        Raises ConfigurationError.
        """
        if not _BLOCK.fullmatch(block):
            raise ConfigurationError(
                f"{name} names no block of Prefect. Store the database as a SqlAlchemyConnector, and give "
                "sql://BLOCK?query=… to read rows, or sql://BLOCK/TABLE for an export. Nothing was started."
            )
        try:
            import prefect_sqlalchemy as blocks  # pyright: ignore[reportMissingTypeStubs]
        except ImportError:
            raise ConfigurationError(
                f"{name} needs prefect-sqlalchemy: pip install 'prefect-crew[sql]'. Nothing was started."
            ) from None
        problem = (
            f"There is no SQLAlchemy block {block!r} for {name}. Make it with "
            f"SqlAlchemyConnector(connection_info='postgresql+psycopg://…').save({block!r})."
        )
        for kind in cast("list[Any]", [blocks.SqlAlchemyConnector, blocks.AsyncSqlAlchemyConnector]):
            try:
                return await cls._of(kind, block)
            except PREFECT_ERRORS:
                raise
            except Exception as error:  # noqa: BLE001  an error of its fields quotes the password
                if isinstance(error.__cause__, ObjectNotFound):
                    continue  # there is no such block of this kind
                reason = f": {error}" if isinstance(error, ImportError | NoSuchModuleError) else ""
                problem = f"The SQLAlchemy block {block!r} for {name} cannot be used{reason}. Save it again, corrected."
                break
        raise ConfigurationError(f"{problem} Nothing was started.")

    @classmethod
    async def _of(cls, kind: Any, block: str) -> SqlDatabase:
        stored = await kind.aload(block)
        engine = stored.get_engine(poolclass=NullPool)
        # Options of a connection may be secrets: a password, a token, the path of a key.
        return cls(engine, Redactor([engine.url.password or "", dict(engine.url.query), stored.connect_args or {}]))

    def run(self, work: Callable[[sa.Connection], T], failure: Callable[[str], CrewError]) -> T:
        """Run `work` in a transaction, which ends without a commit unless `work` commits it.

        Errors of the database become the error that `failure` makes of a text without statement, parameters and
        password.
        """
        try:
            if hasattr(self._engine, "sync_engine"):
                return asyncio.run(self._run_async(work))
            with self._engine.connect() as connection:
                return work(connection)
        except CrewError:
            raise
        except Exception as error:  # noqa: BLE001  each driver raises errors of its own
            problem = self._redact(error_text(error, ""))
        raise failure(problem)  # here, so that it has no context, whose frames hold parameters

    def prepare(self, connection: sa.Connection, table: sa.Table) -> str | None:
        """Make a table if there is none. Return the difference if there is one of other columns or another key."""
        if self.kind == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # else Python's driver commits a new table at once
        if not is_there(connection, table):
            if self.kind == "postgresql":  # of two that make the table at once, the second waits, and has it
                connection.execute(
                    sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(f"prefect-crew/{table}", 0)))
                )
            table.create(connection, checkfirst=True)
        inspector, place = sa.inspect(connection), (table.name, table.schema)
        there = [str(column["name"]) for column in inspector.get_columns(*place)]
        own = [column.name for column in table.c]
        lacks, has = [name for name in own if name not in there], [name for name in there if name not in own]
        key = inspector.get_pk_constraint(*place)["constrained_columns"]
        if not lacks and not has and set(key) == {column.name for column in table.primary_key}:
            return None
        parts = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {', '.join(has)}"] * bool(has)
        return " and ".join(parts) or f"has the primary key {', '.join(key) or 'of no column'}"

    def replace(
        self, connection: sa.Connection, table: sa.Table, batch: str, pages: Iterable[Sequence[Mapping[str, Any]]]
    ) -> None:
        """Replace all rows of a batch in a table."""
        connection.execute(sa.delete(table).where(table.c.batch == batch))
        for page in pages:
            if page:
                connection.execute(sa.insert(table), [{**_storable(row), "batch": batch} for row in page])

    def commit(self, connection: sa.Connection) -> None:
        """Commit the work of `run`."""
        connection.commit()

    async def _run_async(self, work: Callable[[sa.Connection], T]) -> T:
        async with self._engine.connect() as connection:
            return await connection.run_sync(work)


async def open_query(address: str, render: Callable[[str], str] = str) -> Dataset:
    """Return the rows of a query as a data set. `render` completes the text of the query.

    The query runs when the rows are first read, once. A second read reads the temporary file, so it does not matter
    whether the query has an order. The query is a text for the driver as it is, and its transaction is rolled back.

    Raises ConfigurationError, DatasetError, PREFECT_ERRORS.
    """
    block, has_query, text = address.removeprefix(SQL).partition("?query=")
    name = shown_address(f"{SQL}{block}")
    try:
        query = render(unquote(text, errors="strict"))
    except UnicodeDecodeError:
        query = ""
    if not has_query or not query.strip():
        raise DatasetError(
            "has no query. Give sql://BLOCK?query=SELECT…, percent-encoded: a % is %25, as urllib.parse.quote does it.",
            source=name,
        )
    database = await SqlDatabase.load(block, name=name)

    def fetch(spool: Spool) -> None:
        def read(connection: sa.Connection) -> None:
            if database.kind == "sqlite":
                connection.exec_driver_sql("BEGIN")  # else Python's driver commits some statements at once
            # Without parameters: then no driver takes a % or a colon of the query for the place of one.
            options: dict[str, Any] = {"stream_results": True, "max_row_buffer": PART, "no_parameters": True}
            result = connection.execution_options(**options).exec_driver_sql(query)
            if not result.returns_rows:
                raise DatasetError("has a statement that is no query, such as an UPDATE. Give a SELECT.", source=name)
            spool.fill(list(result.keys()), result.partitions(PART))

        database.run(read, lambda problem: DatasetError(f"cannot be read: {problem}.", source=name))

    spool = Spool(name, fetch)
    return Dataset(name, spool.rows, f"{SQL}{block}?query={quote(query)}")


def table_of(place: str, columns: Mapping[str, sa.types.TypeEngine[Any]]) -> sa.Table:
    """Return the table `SCHEMA.TABLE`, or `TABLE`, in which a batch has its own rows, told apart by the column `batch`.

    `columns` are its other columns and their types, of which the first identifies a row of the batch.
    """
    schema, _, name = place.rpartition(".")
    first = next(iter(columns))
    return sa.Table(
        name,
        sa.MetaData(schema=schema or None),
        sa.Column("batch", sa.String(255), primary_key=True),
        *(sa.Column(column, kind, primary_key=column == first) for column, kind in columns.items()),
    )


def is_there(connection: sa.Connection, table: sa.Table) -> bool:
    """Return whether a table exists."""
    return sa.inspect(connection).has_table(table.name, table.schema)


def _storable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose texts any database can keep: PostgreSQL takes no NUL."""
    return {name: value.replace("\0", "\ufffd") if isinstance(value, str) else value for name, value in row.items()}
