"""SQL databases of stored blocks of prefect-sqlalchemy: the rows of a query, and tables for results.

An address is `sql://BLOCK?query=…`, percent-encoded, or `sql://BLOCK/TABLE`.
"""

from __future__ import annotations

import pickle
import re
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import sqlalchemy as sa
from prefect.exceptions import ObjectNotFound
from sqlalchemy.pool import NullPool

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.batches.dataset import PART, Dataset, Row, check_columns, error_text, shown_address
from prefect_crew.client.redaction import Redactor
from prefect_crew.exceptions import ConfigurationError, CrewError, DatasetError

T = TypeVar("T")
SQL = "sql://"
_BLOCK = re.compile("[a-z0-9-]+")


class SqlDatabase:
    """The database of a stored block. All methods but `load` block, so they run in a thread."""

    def __init__(self, stored: Any) -> None:
        self._engine: Any = stored.get_engine(poolclass=NullPool)
        url = self._engine.url
        # Options of a connection may be secrets: a password, a token, the path of a key.
        self._redact = Redactor([url.password or "", dict(url.query), stored.connect_args or {}])

    @classmethod
    async def load(cls, block: str, *, name: str) -> SqlDatabase:
        """Load a SqlAlchemyConnector. `name` is the address that needs the block.

        Raises ConfigurationError.
        """
        problem = (
            f"{name} names no block of Prefect. Store the database as a SqlAlchemyConnector, and give "
            "sql://BLOCK?query=… to read rows, or sql://BLOCK/TABLE for an export."
        )
        try:
            from prefect_sqlalchemy import SqlAlchemyConnector  # pyright: ignore[reportMissingTypeStubs]

            if _BLOCK.fullmatch(block):
                return cls(await SqlAlchemyConnector.aload(block))
        except ModuleNotFoundError as error:
            problem = f"{name} needs prefect-sqlalchemy: pip install 'prefect-crew[sql]'."
            if error.name != "prefect_sqlalchemy":
                problem = f"{name} needs the driver {error.name}, which is not installed."
        except PREFECT_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001  an error of its fields quotes the password
            problem = f"The SQLAlchemy block {block!r} for {name} cannot be used. Save it again, corrected."
            if isinstance(error.__cause__, ObjectNotFound):
                problem = (
                    f"There is no SQLAlchemy block {block!r} for {name}. Make it with "
                    f"SqlAlchemyConnector(connection_info='postgresql+psycopg://…').save({block!r})."
                )
        raise ConfigurationError(f"{problem} Nothing was started.")

    def run(self, work: Callable[[sa.Connection], T], failure: Callable[[str], CrewError]) -> T:
        """Run `work` in a transaction, which ends without a commit unless `work` commits it.

        Errors of the database become the error that `failure` makes of a text without statement, parameters and
        password.
        """
        try:
            with self._engine.connect() as connection:
                return work(connection)
        except CrewError:
            raise
        except Exception as error:  # noqa: BLE001  each driver raises errors of its own
            problem = self._redact(error_text(error, ""))
        raise failure(problem)  # here, so that it has no context, whose frames hold parameters

    def prepare(self, connection: sa.Connection, table: sa.Table) -> None:
        """Make a table if there is none."""
        begin(connection, "BEGIN IMMEDIATE")
        table.create(connection, checkfirst=True)

    def replace(
        self, connection: sa.Connection, table: sa.Table, batch: str, pages: Iterable[Sequence[Mapping[str, Any]]]
    ) -> None:
        """Replace all rows of a batch in a table."""
        connection.execute(sa.delete(table).where(table.c.batch == batch))
        for page in pages:
            connection.execute(sa.insert(table), [{**_storable(row), "batch": batch} for row in page])

    def commit(self, connection: sa.Connection) -> None:
        """Commit the work of `run`."""
        connection.commit()


def begin(connection: sa.Connection, statement: str) -> None:
    """Begin the transaction of SQLite, whose driver else commits some statements at once."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(statement)


async def open_query(address: str, render: Callable[[str], str] = str) -> Dataset:
    """Return the rows of a query as a data set. `render` completes the text of the query.

    The query runs when the rows are first read, once. A second read reads the temporary file, so it does not matter
    whether the query has an order. The query is a text for the driver as it is, and its transaction is rolled back.

    Raises ConfigurationError, DatasetError, PREFECT_ERRORS.
    """
    block, _, text = address.removeprefix(SQL).partition("?query=")
    name, query = shown_address(f"{SQL}{block}"), render(unquote(text))
    if not query.strip():
        raise DatasetError("has no query. Give sql://BLOCK?query=SELECT…, percent-encoded.", source=name)
    database = await SqlDatabase.load(block, name=name)

    @cache
    def spool() -> Spool:
        def read(connection: sa.Connection) -> Spool:
            begin(connection, "BEGIN")
            # Without parameters: then no driver takes a % or a colon of the query for the place of one.
            options: dict[str, Any] = {"stream_results": True, "max_row_buffer": PART, "no_parameters": True}
            result = connection.execution_options(**options).exec_driver_sql(query)
            check_columns(columns := list(result.keys()), name)
            return Spool(columns, result.partitions(PART))

        return database.run(read, lambda problem: DatasetError(f"cannot be read: {problem}.", source=name))

    return Dataset(name, lambda: spool().rows(), f"{SQL}{block}?query={quote(query)}")


class Spool:
    """The rows of a query in a temporary file, from which they are read again."""

    def __init__(self, columns: Sequence[str], parts: Iterable[Sequence[Any]]) -> None:
        self._columns = columns
        # It has no name: a killed process leaves no rows on the disk.
        self._file = tempfile.TemporaryFile(prefix="prefect-crew-")  # noqa: SIM115  the rows are read later
        weakref.finalize(self, self._file.close)
        for part in parts:
            pickle.dump([[*row] for row in part], self._file)

    def rows(self) -> Iterator[Row]:
        """Yield the rows, in the order in which they came."""
        number, position = 0, 0
        while True:
            self._file.seek(position)  # readers share the file
            try:
                part = pickle.load(self._file)  # noqa: S301  a private file that this process has written
            except EOFError:
                return
            position = self._file.tell()
            for number, values in enumerate(part, start=number + 1):  # noqa: B020  it counts on
                yield Row(number, dict(zip(self._columns, values, strict=True)))


def _storable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose texts any database can keep: PostgreSQL takes no NUL."""
    return {name: value.replace("\0", "\ufffd") if isinstance(value, str) else value for name, value in row.items()}
