"""The database of a ledger: its address, its tables in SQLite or PostgreSQL, and writes of attempts in groups."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from prefect.blocks.system import Secret
from pydantic_core import to_json
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.batches.attempts import Attempt, Place, Write, decide_writes
from prefect_crew.batches.dataset import is_remote, shown_address, whole_address
from prefect_crew.batches.outcomes import RowState
from prefect_crew.exceptions import ConfigurationError, InvalidCallError, LedgerError
from prefect_crew.records.decision import latest_start
from prefect_crew.records.model import RecordPhase

T = TypeVar("T")
_HARMLESS = {"ssl", "sslmode", "host", "port", "target_session_attrs", "application_name", "connect_timeout"}
"""Options of a URL that hold no secret. asyncpg also takes `password`, `passfile`, `sslpassword` and any `options`."""
SECRET = "secret://"  # noqa: S105  the beginning of a name, not a secret
OPEN_TRIES = 5


def create_private(path: Path) -> None:
    """Create an empty file, if there is none, that only its owner may read under any umask. Raises OSError."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


@dataclass(frozen=True)
class LedgerAddress:
    """The address of a ledger. `full` is its path or URL with the password; `public` is without it."""

    full: str = field(repr=False)
    public: str

    @property
    def is_local(self) -> bool:
        """Whether the address is a file on this machine."""
        return open_url(self.full).drivername == "sqlite"

    @property
    def is_missing(self) -> bool:
        """Whether the address is a file that does not exist. To open the ledger would create the file."""
        return self.is_local and not Path(str(open_url(self.full).database)).exists()


async def ledger_address(ledger: str | None, export: str) -> LedgerAddress:
    """Return the address of a ledger: a path, a URL, or `secret://NAME` for a Prefect Secret block that holds one.

    Without `ledger`, the ledger is a file next to the export. Raises ConfigurationError.
    """
    address = ledger or default_ledger(export)
    if address.startswith(SECRET):
        name = address.removeprefix(SECRET)
        try:
            value = str((await cast("Any", Secret).aload(name)).get())
        except ValueError:
            raise ConfigurationError(
                f"There is no Prefect Secret block {name!r} for the ledger. Make it with "
                f"Secret(value='postgresql://…').save({name!r})."
            ) from None
        open_url(value)
        return LedgerAddress(value, address)
    url = open_url(address)
    if url.drivername == "sqlite":
        return LedgerAddress(address, str(url.database))
    hidden = url.set(drivername="postgresql", password=None, query={}).render_as_string()
    return LedgerAddress(address, hidden if holds_password(address) else address)


def holds_password(ledger: str) -> bool:
    """Return whether the address of a ledger may hold a password. Raises ConfigurationError."""
    if ledger.startswith(SECRET):
        return False
    url = open_url(ledger)
    return url.password is not None or any(name.lower() not in _HARMLESS for name in url.query)


def default_ledger(export: str) -> str:
    """Return the path of the ledger next to a local export. Raises ConfigurationError."""
    if is_remote(export):
        raise ConfigurationError(
            f"The export {shown_address(export)} is no file of this machine, so the ledger cannot be stored next to "
            "it. Give a ledger: a path, or the URL of a PostgreSQL database."
        )
    path = Path(export.removeprefix("file://"))
    if not path.name:
        raise ConfigurationError(f"The export {export!r} names no file: give a file's path. Nothing was started.")
    return str(path.with_name(f"{path.name}.ledger.db"))


def open_url(ledger: str) -> sa.URL:
    """Return the SQLAlchemy URL of a ledger that is given as a path or a URL. Raises ConfigurationError."""
    if "://" not in ledger:
        return sa.URL.create("sqlite", database=whole_address(ledger))
    try:
        url = sa.make_url(ledger)
    except (ArgumentError, ValueError):
        raise ConfigurationError("The ledger's URL is not of the form postgresql://user@host/database.") from None
    kind = url.drivername.partition("+")[0]
    if kind == "sqlite" and url.database:
        return sa.URL.create("sqlite", database=whole_address(url.database))
    if kind in ("postgresql", "postgres"):
        # A second `@` ends the password too early, and the rest of the password would be shown.
        if "@" in f"{url.host}" or ("@" in f"{url.database}" and "%40" not in ledger):
            raise ConfigurationError("The ledger's URL has a second '@'. Write an '@' of a name or password as '%40'.")
        # asyncpg's name for `sslmode` is `ssl`.
        query = {"ssl" if name == "sslmode" else name: value for name, value in url.query.items()}
        return url.set(drivername="postgresql+asyncpg", query=query)
    raise ConfigurationError(f"A ledger is a SQLite file or a PostgreSQL database, not {kind!r}.")


_metadata = sa.MetaData()
batches = sa.Table(
    "crew_batches",
    _metadata,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("ledger_id", sa.String(36), nullable=False),
    sa.Column("crew_url", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("call", sa.JSON(none_as_null=True)),
    sa.Column("bad", sa.JSON(none_as_null=True)),
    sa.Column("line_options", sa.JSON(none_as_null=True)),
    sa.Column("exported", sa.JSON(none_as_null=True)),
    sa.Column("generation", sa.Integer, nullable=False, default=0),
)
"""A row for each batch: a `BatchEntry`."""
rows = sa.Table(
    "crew_rows",
    _metadata,
    sa.Column("batch", sa.String(255), primary_key=True),
    sa.Column("row_key", sa.String(255), primary_key=True),
    sa.Column("number", sa.Integer),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("inputs", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Index("crew_rows_state", "batch", "state", "number"),
    sa.Index("crew_rows_number", "batch", "number", "row_key"),
)
"""A row for each row of the data set that the batch has reached. `number` counts them from 0; it is NULL once the row
has left the data set. `digest` is the digest of the inputs of its kickoff; `inputs` are JSON, secret ones masked.
`state` is a RowState, and `attempt` the number of the attempt that has this state: 0 for none."""
attempts = sa.Table(
    "crew_attempts",
    _metadata,
    sa.Column("batch", sa.String(255), primary_key=True),
    sa.Column("row_key", sa.String(255), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("kickoff", sa.String(64)),
    sa.Column("owner", sa.String(36), nullable=False),
    sa.Column("seconds", sa.Float),
    sa.Column("usage", sa.JSON(none_as_null=True)),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("posts_until", sa.Float),
    sa.Index("crew_attempts_kickoff", "kickoff"),
    sa.Index("crew_attempts_phase", "batch", "phase"),
)
"""A row for each attempt. `record` is the whole attempt as JSON; the other columns are for searches and sums.

`usage` holds the counts of tokens and, where it is known, the cost.
`kickoff` is a digest of the kickoff id, which may hold a character that PostgreSQL refuses (NUL). JSON escapes it.
After `posts_until` the kickoff of a claim, or of an uncertain attempt, is surely not on its way any more. It is in
seconds since 1970 by the clock of the database.
"""
sa.Index(
    "crew_attempts_seconds",
    *(attempts.c.batch, attempts.c.seconds, attempts.c.row_key),
    sqlite_where=attempts.c.seconds.is_not(None),
    postgresql_where=attempts.c.seconds.is_not(None),
)
answers = sa.Table(
    "crew_answers",
    _metadata,
    sa.Column("batch", sa.String(255), primary_key=True),
    sa.Column("row_key", sa.String(255), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("review", sa.Text, nullable=False),
)
"""A row for each answer of a person to an attempt, counted from 1. `review` is the whole answer as JSON."""


class Database:
    """One database, as an async context manager on one event loop.

    All work is in functions of a plain SQLAlchemy connection. SQLite runs a function in one thread of its own, so that
    threads change once, and not for each statement. PostgreSQL runs it over asyncpg.

    Attributes:
        path: The SQLite file, None for PostgreSQL.
        address: Its address for people.
        server: SQLAlchemy's async engine while a PostgreSQL database is open; None for SQLite.
    """

    def __init__(self, ledger: str) -> None:
        self._url = open_url(ledger)
        self.path: Path | None = None
        self.address = self._url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)
        if self._url.drivername == "sqlite":
            self.address = str(self._url.database)
            # One ledger has one lock, by whatever name it is reached.
            self.path = Path(os.path.realpath(self.address))
        self.server: Any = None
        self._stat: os.stat_result | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sa.Connection | None = None

    @property
    def is_in_place(self) -> bool:
        """Whether the open SQLite file is still at its path; somebody may have removed or replaced it."""
        try:
            return self.path is None or self._stat is None or os.path.samestat(self._stat, self.path.stat())
        except OSError:
            return False

    async def __aenter__(self) -> Database:
        try:
            await self._open()
        except LedgerError:
            await self.__aexit__()
            raise
        except (SQLAlchemyError, OSError) as error:
            await self.__aexit__()
            raise LedgerError(f"cannot be opened: {short(error)}.", ledger=self.address) from error
        return self

    async def _open(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._check_names(self.path)
            create_private(self.path)  # SQLite's other files get the mode of this one
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="crew ledger")
        else:
            from sqlalchemy.ext.asyncio import create_async_engine

            # A process of a batch uses at most three connections: for its lock, its writer, and a reader.
            pool: dict[str, Any] = {"pool_size": 2, "max_overflow": 2, "pool_pre_ping": True}
            # Not the server's default: a read after the lock has to see all earlier writes.
            self.server = create_async_engine(self._url, isolation_level="READ COMMITTED", **pool)
            event.listen(self.server.sync_engine, "connect", _prepare_session)
        for remaining in reversed(range(OPEN_TRIES)):
            try:
                await self.run(_metadata.create_all)
                break
            except DBAPIError:
                # Where several processes create the tables at once, all but one may fail; then the tables exist.
                if not remaining:
                    raise
                await asyncio.sleep(0.2)
        if self.path is not None:
            self._stat = self.path.stat()

    def _check_names(self, path: Path) -> None:
        """Refuse a file with several names, since SQLite keeps the last commits next to the name that it opened."""
        problem = None
        if path.exists() and (names := path.stat().st_nlink) > 1:
            problem = f"has {names} names (hard links), and SQLite does not work with them. Copy it to a new file."
        elif os.path.ismount(path):
            problem = (
                "is mounted as a single file, but SQLite keeps the last commits in a second file next to it. Mount "
                "the folder instead."
            )
        if problem is not None:
            raise LedgerError(problem, ledger=self.address)

    async def __aexit__(self, *_: object) -> None:
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close_file)
            self._thread.shutdown()
            self._thread = None
        if self.server is not None:
            await self.server.dispose()
            self.server = None

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in a transaction; return its result after the commit. Raises SQLAlchemyError, OSError."""
        if self.server is not None:
            try:
                async with asyncio.timeout(ANSWER_WITHIN), self.server.begin() as connection:
                    return await connection.run_sync(work)
            except TimeoutError as error:
                await self.server.dispose(close=False)  # its other connections hang too
                raise OSError(f"no answer within {ANSWER_WITHIN:g} s") from error
            except Exception as error:
                # While a server starts or stops, SQLAlchemy passes on the driver's own error of the connection. While
                # connections hang, it raises TimeoutError: the pool has none left.
                if type(error).__module__.partition(".")[0] != "asyncpg" and not isinstance(error, PoolTimeoutError):
                    raise
                raise OSError(short(error)) from error
        if self._thread is None:
            raise InvalidCallError("This ledger is not open: use it in `async with`.")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._in_file, work)

    def _in_file(self, work: Callable[[sa.Connection], T]) -> T:
        if self._connection is None:
            self._connection = _sqlite(str(self.path)).connect()
        with self._connection.begin():
            return work(self._connection)

    def _close_file(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection.engine.dispose()
            self._connection = None

    def lock(self, connection: sa.Connection, batch: str, *, kickoffs: bool = False) -> float:
        """Let this transaction alone write to a batch, until it ends; return the time by the clock of the database.

        A transaction that writes new kickoff ids says so with `kickoffs`. It then waits for those of other batches
        too, since an id belongs to one attempt of all batches. It takes its locks before its first read, so nobody
        writes between its reads and its writes. All transactions take them in the same order, so no two wait for each
        other.
        """
        if self.path is not None:
            connection.exec_driver_sql("BEGIN IMMEDIATE").close()
            return float(connection.execute(_SQLITE_TIME).scalar_one())
        now = connection.execute(_LOCK, {"key": lock_key(f"prefect-crew/ledger/{batch}")}).scalar_one()
        if kickoffs:
            now = connection.execute(_LOCK, {"key": _KICKOFFS}).scalar_one()
        return float(now)

    def insert(self, table: sa.Table) -> Any:
        """Return an INSERT that supports ON CONFLICT, in this database's SQL."""
        return (postgresql if self.path is None else sqlite).insert(table)

    def texts(self, name: str) -> Any:
        """Return a table of the texts that the statement's parameter `name` holds as a JSON array.

        The table's column is `value`. An outer join looks each text up in an index of the table of attempts. For an
        inner join, or `IN`, a database that has no statistics of the attempts may read all attempts of the batch.
        """
        array = sa.bindparam(name, type_=sa.Text)
        if self.path is not None:
            return sa.func.json_each(array).table_valued("value")
        return sa.func.json_array_elements_text(sa.cast(array, sa.JSON)).table_valued("value")

    def is_one_of(self, column: sa.Column[str], name: str) -> sa.ColumnElement[bool]:
        """Return the condition that a column has one of the texts that the parameter `name` holds as a JSON array."""
        texts = sa.select(self.texts(name).c.value)
        # PostgreSQL looks up each item of an array in the index, but compares a subquery with each row of the batch.
        return column.in_(texts) if self.path is not None else column == sa.any_(sa.func.array(texts.scalar_subquery()))

    def read_rows(self, name: str, columns: Sequence[sa.Column[Any]]) -> Any:
        """Return a SELECT of the rows that the statement's parameter `name` holds as a JSON array.

        With one statement for each row, SQLite would release the GIL each time, and asyncpg would encode each value.
        """
        array = sa.bindparam(name, type_=sa.Text)
        if self.path is not None:
            value = sa.func.json_each(array).table_valued("value").c.value
            items: list[Any] = [sa.func.json_extract(value, f"$[{at}]") for at in range(len(columns))]
        else:
            value = sa.func.json_array_elements(sa.cast(array, sa.JSON)).table_valued("value").c.value
            fields = [value.op("->>")(sa.literal_column(str(at))) for at in range(len(columns))]
            items = [sa.cast(field, column.type) for field, column in zip(fields, columns, strict=True)]
        return sa.select(*items).where(sa.true())  # SQLite cannot tell ON CONFLICT from a join without WHERE


def lock_key(name: str) -> int:
    """Return the number of an advisory lock of PostgreSQL."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


_SQLITE_CLOCK = "((julianday('now') - 2440587.5) * 86400.0)"
_POSTGRESQL_CLOCK = "extract(epoch FROM clock_timestamp())"
_SQLITE_TIME = sa.text(f"SELECT {_SQLITE_CLOCK}")
_KICKOFFS = lock_key("prefect-crew/kickoff ids")
_LOCK = sa.text(f"SELECT {_POSTGRESQL_CLOCK} FROM pg_advisory_xact_lock(:key)")  # noqa: S608  all constant


def _sqlite(path: str) -> sa.Engine:
    # One thread uses its connection; only its closing may happen elsewhere, at an interpreter's end.
    connect_args = {"timeout": 30, "check_same_thread": False}
    engine = sa.create_engine(sa.URL.create("sqlite", database=path), connect_args=connect_args)

    def prepare(connection: Any, _: Any) -> None:
        # A claim needs a commit that is on disk when it returns (FULL). Readers do not wait for a commit (WAL).
        for setting in ("journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {setting}").close()

    event.listen(engine, "connect", prepare)
    return engine


ANSWER_WITHIN = 100.0
"""Seconds for one transaction in PostgreSQL: otherwise the client waits for ever for a machine that has vanished.
`GroupWriter.retry_for` leaves time for another try."""
KEEPALIVES = {"tcp_keepalives_idle": 30, "tcp_keepalives_interval": 10, "tcp_keepalives_count": 3}
"""Settings of a PostgreSQL session: a machine that vanishes must not hold its locks for hours."""
TIMEOUTS = ("55P03", "57014")
"""The codes of PostgreSQL for `lock_timeout` and `statement_timeout`."""
_SESSION = {
    # A plan from a time when a table was small would later read all of the large table.
    "plan_cache_mode": "force_custom_plan",
    # Every statement finds its rows by a key. PostgreSQL guesses that a group of writes has a hundred rows, and would
    # rather read all attempts of the batch for it, which costs seconds of CPU for each thousand rows.
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    # A process that has stopped in the middle of a commit holds up all others: they log that, and try again.
    "lock_timeout": "'30s'",
    **KEEPALIVES,
}


def _prepare_session(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    # A commit is on disk when it returns, also where the server's default is another.
    cursor.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    for setting, value in _SESSION.items():
        cursor.execute(f"SET {setting} = {value}")
    cursor.close()
    connection.commit()


def short(error: BaseException) -> str:
    """Return the first line of a database's error."""
    lines = str(getattr(error, "orig", None) or error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


# Writes of attempts in groups: the writes that come in while one commit is under way go into the next one together.
# Each transaction that writes to a batch holds its lock, reads the attempts, decides by `may_follow`, and writes. A
# write may land late, after others have written, and nobody can call it back.

_KEY = [column.name for column in attempts.primary_key]
_READ: list[sa.ColumnElement[Any]] = [
    attempts.c[name] for name in ("batch", "row_key", "attempt", "phase", "state", "kickoff", "owner")
]
# The record of an earlier attempt may be large. It is read only where a write may repeat it.
_READ.append(sa.case((attempts.c.attempt >= sa.bindparam("least"), attempts.c.record), else_="").label("record"))
_READ.append(attempts.c.posts_until)
NO_ATTEMPT = 2**31 - 1
"""A number that no attempt reaches."""
UNHURRIED = 0.05
"""Seconds that a write which is not urgent may wait for others."""


class GroupWriter:
    """Writes attempts of one batch, on one event loop.

    While the database cannot be reached, the writer tries again for `retry_for` seconds, and then raises LedgerError.
    """

    def __init__(self, database: Database, batch: str) -> None:
        self._database = database
        self._batch = batch
        names = Attempt._fields
        values = database.read_rows("attempts", [attempts.c[name] for name in names])
        insert = database.insert(attempts).from_select(names, values)
        replaced = {name: insert.excluded[name] for name in names[len(_KEY) :]}
        self._replace = insert.on_conflict_do_update(index_elements=_KEY, set_=replaced)
        keys, kickoffs = database.texts("keys"), database.texts("kickoffs")
        own = sa.and_(attempts.c.batch == batch, attempts.c.row_key == keys.c.value)
        self._select = sa.union_all(
            sa.select(*_READ).select_from(keys.outerjoin(attempts, own)),
            sa.select(*_READ).select_from(kickoffs.outerjoin(attempts, attempts.c.kickoff == kickoffs.c.value)),
        )
        # A row in conflict has other inputs than its run had, whose end is not the state of the row. The UPDATE leaves
        # it out: for a decision in Python, each commit would have to read the rows as well as the attempts.
        is_ours = rows.c.state != str(RowState.CONFLICT)
        moved = (rows.c.batch == batch, database.is_one_of(rows.c.row_key, "keys"), is_ours)
        latest: dict[str, Any] = {"attempt": sa.bindparam("latest"), "state": sa.bindparam("now")}
        self._follow = sa.update(rows).where(*moved).values(latest)
        self.retry_for = 120.0
        self.commits = 0
        self._pending: list[tuple[Write, asyncio.Future[bool]]] = []
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    async def close(self) -> None:
        """Write the attempts that are left, and end."""
        self._is_closed = True
        self._write_soon()
        if self._task is not None:
            await self._task

    async def put(self, write: Write, *, urgent: bool = True) -> bool:
        """Write an attempt. Return, once the commit is on disk, whether the ledger took the write (`may_follow`).

        Args:
            write: The write.
            urgent: Whether to begin a commit at once; else it joins the next commit, after `UNHURRIED` at the latest.

        Raises:
            LedgerError: The attempt could not be written for `retry_for` seconds, or the writer is closed.
        """
        if self._is_closed:
            raise LedgerError("is closed.", ledger=self._database.address)
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self._pending.append((write, done))
        if urgent:
            self._write_soon()
        elif self._timer is None:
            self._timer = loop.call_later(UNHURRIED, self._write_soon)
        # If the caller is cancelled here, its write is still committed: only nobody waits for the answer.
        return await done

    def _write_soon(self) -> None:
        self._is_due = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write_groups())

    async def _write_groups(self) -> None:
        while self._is_due:
            self._is_due = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            group, self._pending = self._pending, []
            if group:
                await self._write_group(group)

    async def _write_group(self, group: Sequence[tuple[Write, asyncio.Future[bool]]]) -> None:
        """Commit a group, and tell the caller of each write whether the ledger took it.

        This commits even if all tasks are cancelled at the end of a process, because the group may hold the ids of
        kickoffs that a server has just answered. A commit of unknown success is repeated, which changes nothing: a
        stored claim has its owner, and `may_follow` takes a repeated update.
        """
        writes = [write for write, _ in group]
        answers, failure, ending = list[bool](), None, None
        while True:
            try:
                answers = await self.keep_trying(lambda connection: self._commit(connection, writes), "written")
            except asyncio.CancelledError:
                continue
            except BaseException as error:  # noqa: BLE001  a row whose write nobody answers waits for ever
                is_of_database = isinstance(error, SQLAlchemyError | OSError)
                reason = short(error) if is_of_database else f"{type(error).__name__}: {short(error)}"
                failure = LedgerError(f"cannot be written: {reason}.", ledger=self._database.address)
                failure.__cause__ = error
                ending = None if isinstance(error, Exception) else error
            break
        self.commits += 1
        for number, (_, done) in enumerate(group):
            if done.done():
                continue
            if failure is None:
                done.set_result(answers[number])
            else:
                done.set_exception(failure)
                done.exception()  # a caller that was cancelled does not read it
        if ending is not None:
            raise ending

    async def keep_trying(self, work: Callable[[sa.Connection], T], deed: str) -> T:
        """Run `work`, and repeat it while the database cannot be reached. `work` may run twice; `deed` is for the log.

        Raises SQLAlchemyError, OSError.
        """
        loop = asyncio.get_running_loop()
        until, delay, logged = loop.time() + self.retry_for, 0.5, False
        while True:
            try:
                return await self._database.run(work)
            except (DBAPIError, OSError) as error:
                if not _is_transient(error) or loop.time() + delay > until:
                    raise
                if not logged:
                    logged = True
                    run_logger().warning(
                        "The ledger %s cannot be %s (%s). The batch waits and tries again, for at most %.0f s in all.",
                        self._database.address,
                        deed,
                        short(error),
                        self.retry_for,
                    )
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    def _commit(self, connection: sa.Connection, writes: Sequence[Write]) -> list[bool]:
        """Decide about a group of writes, store those that the ledger takes, and return the decisions."""
        keys = {write.attempt.row_key for write in writes}
        ids = {write.attempt.kickoff for write in writes if write.is_first and write.attempt.kickoff is not None}
        now = self._database.lock(connection, self._batch, kickoffs=bool(ids))
        stored = self._read(connection, keys, ids, least=min(write.attempt.attempt for write in writes))
        answers, changed = decide_writes(stored, writes, now=now)
        if changed:
            connection.execute(self._replace, {"attempts": to_json(list(changed.values())).decode()}).close()
            latest = self._latest({attempt.place: attempt for attempt in stored} | changed)
            by_state = defaultdict[tuple[int, RowState], list[str]](list)
            for key in {attempt.row_key for attempt in changed.values()}:
                by_state[latest[key].attempt, latest[key].state].append(key)
            for (number, state), moved in by_state.items():
                values = {"latest": number, "now": state, "keys": to_json(moved).decode()}
                connection.execute(self._follow, values).close()
        return answers

    def latest(self, connection: sa.Connection, keys: Collection[str]) -> dict[str, Attempt]:
        """Return each row's attempt that counts: the last that started a run or may have, else the last."""
        stored = self._read(connection, keys, (), least=NO_ATTEMPT)
        return self._latest({attempt.place: attempt for attempt in stored})

    def _latest(self, stored: dict[Place, Attempt]) -> dict[str, Attempt]:
        by_row: dict[str, list[Attempt]] = {}
        for batch, key, number in sorted(stored):
            if batch == self._batch:
                by_row.setdefault(key, []).append(stored[batch, key, number])
        return {key: latest_start(own) or own[-1] for key, own in by_row.items()}

    def _read(
        self, connection: sa.Connection, keys: Collection[str], kickoffs: Collection[str], *, least: int
    ) -> list[Attempt]:
        """Return the attempts at some rows, and the attempts of any batch that hold one of these kickoff ids.

        Attempts with a lower number than `least` come without their record.
        """
        texts = {"keys": to_json(list(keys)).decode(), "kickoffs": to_json(list(kickoffs)).decode(), "least": least}
        read: Any = connection.execute(self._select, texts)
        return [
            Attempt(batch, key, attempt, RecordPhase(phase), RowState(state), *others)
            for batch, key, attempt, phase, state, *others in read
            if batch is not None
        ]


def _is_transient(error: Exception) -> bool:
    """Return whether the database may soon work again, because it restarts, is locked, or has a full disk."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError)
    if getattr(error.orig, "sqlstate", None) in TIMEOUTS:
        return True
    is_gone = "no such" in str(error.orig)  # SQLite's word for a table or a column that is not there
    return not is_gone and (isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated)


def seconds_left(database: Database) -> sa.ColumnElement[float]:
    """Return the column of the seconds for which a kickoff may still be on its way, by the database's clock."""
    return attempts.c.posts_until - sa.literal_column(_POSTGRESQL_CLOCK if database.path is None else _SQLITE_CLOCK)
