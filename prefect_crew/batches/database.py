"""The database of a ledger: its address, its tables in SQLite or PostgreSQL, and writes of attempts in groups."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect.blocks.system import Secret
from pydantic_core import to_json
from sqlalchemy import (
    JSON,
    URL,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TextClause,
    create_engine,
    event,
    inspect,
    literal_column,
    make_url,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from prefect_crew._internal.files import create_private
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.batches.dataset import is_remote, shown_address
from prefect_crew.exceptions import ConfigurationError, InvalidCallError, LedgerError

T = TypeVar("T")
_HARMLESS = {"ssl", "sslmode", "host", "port", "target_session_attrs", "application_name", "connect_timeout"}
"""Options of a URL that hold no secret. asyncpg also takes `password`, `passfile`, `sslpassword` and any `options`."""
SECRET = "secret://"  # noqa: S105  the beginning of a name, not a secret


@dataclass(frozen=True)
class LedgerAddress:
    """Where a ledger is. `full` is its path or URL, with what it takes to open it; `public` has no password."""

    full: str = field(repr=False)
    public: str

    @property
    def is_local(self) -> bool:
        """Whether it is a file on this machine."""
        return open_url(self.full).drivername == "sqlite"

    @property
    def is_missing(self) -> bool:
        """Whether it is a file that is not there; to open it would make it."""
        return self.is_local and not Path(str(open_url(self.full).database)).exists()

    @property
    def is_public(self) -> bool:
        """Whether `public` is all that another machine needs."""
        return self.public.startswith(SECRET) or not _is_secret(open_url(self.full))


async def ledger_address(ledger: str | None, output: str) -> LedgerAddress:
    """Return where a ledger is.

    That is a path, the URL of a PostgreSQL database, or `secret://NAME` for a Prefect Secret block that holds one of
    them; left out, a file next to the output. Raises ConfigurationError.
    """
    given = ledger or default_ledger(output)
    if not given.startswith(SECRET):
        url = open_url(given)
        public = str(url.database) if url.drivername == "sqlite" else given
        if _is_secret(url):
            public = url.set(drivername="postgresql", password=None, query={}).render_as_string()
        return LedgerAddress(given, public)
    name = given.removeprefix(SECRET)
    try:
        value = (await cast("Any", Secret).aload(name)).get()
    except ValueError:
        raise ConfigurationError(
            f"There is no Prefect Secret block {name!r} for the ledger. Make it: "
            f"Secret(value='postgresql://…').save({name!r})."
        ) from None
    if not isinstance(value, str):
        raise ConfigurationError(
            f"The Prefect Secret block {name!r} does not hold text: store the URL of the ledger in it."
        )
    open_url(value)
    return LedgerAddress(value, given)


def _is_secret(url: URL) -> bool:
    """Return whether a URL holds what is not for everyone: a password, or an option that may."""
    return url.password is not None or any(name.lower() not in _HARMLESS for name in url.query)


_metadata = MetaData()
batches = Table(
    "crew_batches",
    _metadata,
    Column("name", String(255), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("ledger_id", String(36), nullable=False),
    Column("crew_url", Text, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("total", Integer, nullable=False),
    Column("call", JSON(none_as_null=True)),
    Column("set_aside", JSON(none_as_null=True)),
    Column("line_options", JSON(none_as_null=True)),
    Column("exported", JSON(none_as_null=True)),
    Column("generation", Integer, nullable=False, default=0),
)
"""A row for each batch: a `BatchEntry`."""
rows = Table(
    "crew_rows",
    _metadata,
    Column("batch", String(255), primary_key=True),
    Column("row_key", String(255), primary_key=True),
    Column("number", Integer),
    Column("digest", String(64), nullable=False),
    Column("inputs", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Index("crew_rows_state", "batch", "state", "number"),
    Index("crew_rows_number", "batch", "number", "row_key"),
)
"""A row for each row of the data set that the batch has come to. `number` counts them from 0; it is NULL once the row
has left the data set. `digest` is that of the inputs that it was kicked off with; `inputs` are JSON, secret ones
masked. `state` is a RowState, and `attempt` the attempt that it is that of: 0 for none."""
attempts = Table(
    "crew_attempts",
    _metadata,
    Column("batch", String(255), primary_key=True),
    Column("row_key", String(255), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("phase", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("kickoff", String(64)),
    Column("owner", String(36), nullable=False),
    Column("seconds", Float),
    Column("usage", JSON),
    Column("record", Text, nullable=False),
    Column("posts_until", Float),
    Index("crew_attempts_kickoff", "kickoff"),
    Index("crew_attempts_phase", "batch", "phase"),
)
"""A row for each attempt. `record` is the whole of it, as JSON; the other columns are what is searched and added up.

`usage` holds the counts of tokens and, where it is known, the cost.
`kickoff` is a digest of the id, which may hold what PostgreSQL cannot (NUL); within JSON such characters are escaped.
`posts_until` is when the kickoff of a claim, or of one that is uncertain, is surely not on its way any more, in seconds
since 1970 by the clock of the database.
"""
Index(
    "crew_attempts_seconds",
    *(attempts.c.batch, attempts.c.seconds, attempts.c.row_key),
    sqlite_where=attempts.c.seconds.is_not(None),
    postgresql_where=attempts.c.seconds.is_not(None),
)
answers = Table(
    "crew_answers",
    _metadata,
    Column("batch", String(255), primary_key=True),
    Column("row_key", String(255), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("review", Text, nullable=False),
)
"""A row for each answer of a person to an attempt, counted from 1. `review` is all of it, as JSON."""
OPEN_TRIES = 5


def default_ledger(output: str) -> str:
    """Return the path of the ledger next to a local output. Raises ConfigurationError."""
    if is_remote(output):
        raise ConfigurationError(
            f"The output {shown_address(output)} is not on this machine, so the ledger cannot be stored next to it: "
            "give ledger=…, a path or the URL of a PostgreSQL database."
        )
    path = Path(output.removeprefix("file://"))
    if not path.name:
        raise ConfigurationError(f"The output {output!r} names no file. Nothing was started.")
    return str(path.with_name(f"{path.name}.ledger.db"))


def open_url(ledger: str) -> URL:
    """Return the SQLAlchemy URL of a ledger that is given as a path or a URL. Raises ConfigurationError."""
    if "://" not in ledger:
        return URL.create("sqlite", database=str(Path(ledger).absolute()))
    try:
        url = make_url(ledger)
    except (ArgumentError, ValueError):
        raise ConfigurationError("The ledger's URL cannot be read: postgresql://user@host/database.") from None
    kind = url.drivername.partition("+")[0]
    if kind == "sqlite" and url.database:
        return URL.create("sqlite", database=str(Path(url.database).absolute()))
    if kind in ("postgresql", "postgres"):
        # asyncpg calls `ssl` what everybody else calls `sslmode`.
        query = {"ssl" if name == "sslmode" else name: value for name, value in url.query.items()}
        return url.set(drivername="postgresql+asyncpg", query=query)
    raise ConfigurationError(f"A ledger is a SQLite file or a PostgreSQL database, not {kind!r}.")


class Database:
    """One database, as an async context manager on one event loop.

    What is done in it is written once, as functions of a plain SQLAlchemy connection: SQLite runs them in one thread of
    its own, which costs one change of threads and not one a statement; PostgreSQL runs them over asyncpg.

    Attributes:
        url, address: Where it is; `address` is for people.
        server: SQLAlchemy's async engine of a PostgreSQL that is open; None for SQLite.
    """

    def __init__(self, ledger: str) -> None:
        self.url = open_url(ledger)
        self.address = _shown(self.url)
        if self.url.drivername == "sqlite":
            # One ledger has one lock, by whatever name it is reached.
            self.url = self.url.set(database=os.path.realpath(str(self.url.database)))
        self.server: Any = None
        self._stat: os.stat_result | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._connection: Connection | None = None

    @property
    def path(self) -> Path | None:
        """The SQLite file, None for PostgreSQL."""
        return Path(str(self.url.database)) if self.url.drivername == "sqlite" else None

    @property
    def is_in_place(self) -> bool:
        """Whether the SQLite file that is open is the one at its path; it may have been removed or replaced."""
        try:
            return self.path is None or self._stat is None or os.path.samestat(self._stat, self.path.stat())
        except OSError:
            return False

    async def __aenter__(self) -> Database:
        try:
            await self._open()
        except LedgerError:
            await self._close()
            raise
        except (SQLAlchemyError, OSError) as error:
            await self._close()
            raise LedgerError(f"cannot be opened: {short(error)}.", ledger=self.address) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _open(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._check_names(self.path)
            create_private(self.path)  # SQLite's other files get the mode of this one
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="crew ledger")
        else:
            from sqlalchemy.ext.asyncio import create_async_engine

            # Every process of a batch keeps two of them busy at most: its writer, and a reader.
            self.server = create_async_engine(self.url, pool_size=2, max_overflow=2, pool_pre_ping=True)
            event.listen(self.server.sync_engine, "connect", _prepare_session)
        for remaining in reversed(range(OPEN_TRIES)):
            try:
                await self.run(lambda connection: _make_tables(connection, self.address))
                break
            except DBAPIError:
                # Of several processes that make the tables at once, all but one may fail, and then find them.
                if not remaining:
                    raise
                await asyncio.sleep(0.2)
        if self.path is not None:
            self._stat = self.path.stat()

    def _check_names(self, path: Path) -> None:
        """Refuse a file with names that are no symlinks: SQLite keeps its last commits in a file next to each of them.

        Whoever opens it by another name does not see these commits.
        """
        if path.exists() and (names := path.stat().st_nlink) > 1:
            raise LedgerError(
                f"has {names} names (hard links), and SQLite does not work with them. Copy it to a new file.",
                ledger=self.address,
            )
        if os.path.ismount(path):
            raise LedgerError(
                "is mounted as a single file, and SQLite keeps its last commits in another file next to it. Mount its "
                "folder instead.",
                ledger=self.address,
            )

    async def _close(self) -> None:
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close_file)
            self._thread.shutdown()
            self._thread = None
        if self.server is not None:
            await self.server.dispose()
            self.server = None

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Do something in a transaction of its own, and return what it returns once that is committed.

        Raises:
            SQLAlchemyError, OSError: As the database does.
        """
        if self.server is not None:
            return await self._on_server(work)
        if self._thread is None:
            raise InvalidCallError("This ledger is not open: use it in `async with`.")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._in_file, work)

    async def _on_server(self, work: Callable[[Connection], T]) -> T:
        try:
            async with self.server.begin() as connection:
                return await connection.run_sync(work)
        except Exception as error:
            # Of connecting to a server that starts or stops: SQLAlchemy leaves the driver's own error as it is.
            if type(error).__module__.partition(".")[0] != "asyncpg":
                raise
            raise OSError(short(error)) from error

    def _in_file(self, work: Callable[[Connection], T]) -> T:
        if self._connection is None:
            self._connection = _sqlite(self.url).connect()
        with self._connection.begin():
            return work(self._connection)

    def _close_file(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection.engine.dispose()
            self._connection = None

    def insert(self, table: Table) -> Any:
        """Return an INSERT of this database's dialect, which knows ON CONFLICT."""
        return (sqlite if self.path is not None else postgresql).insert(table)


def _sqlite(url: URL) -> Engine:
    # One thread uses its connection; only its closing may happen elsewhere, at an interpreter's end.
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

    def prepare(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        # A commit is on disk when it returns, which is what makes a claim a claim; readers do not wait for it.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    event.listen(engine, "connect", prepare)
    return engine


def _prepare_session(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    # A commit is on disk when it returns, also where the server does not say so by itself.
    cursor.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    # A plan that was made while a table was small goes through all of it once it is large.
    cursor.execute("SET plan_cache_mode = force_custom_plan")
    # Every statement finds its rows by a key. PostgreSQL guesses that a group of writes has a hundred rows, and would
    # rather read the whole table once for it, which costs seconds of CPU for each thousand rows of a batch.
    cursor.execute("SET enable_hashjoin = off")
    cursor.execute("SET enable_mergejoin = off")
    cursor.close()
    connection.commit()


def _make_tables(connection: Connection, address: str) -> None:
    known = inspect(connection).get_table_names()
    if attempts.name in known and rows.name not in known:
        raise LedgerError(
            "was written by an earlier version of prefect-crew, and this one cannot read it.",
            ledger=address,
            advice="Finish its batches with that version, or give them another ledger and another name.",
        )
    rows.create(connection, checkfirst=True)  # first: that is what a ledger of this version is known by
    _metadata.create_all(connection)


def _shown(url: URL) -> str:
    """Return an address for people: the path of a file, or a URL without password and options."""
    if url.drivername == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


def short(error: Exception) -> str:
    """Return the first line of a database's error."""
    said = str(getattr(error, "orig", None) or error).splitlines()
    return (said[0] if said else type(error).__name__)[:300].rstrip(".")


# Writes of attempts in groups: what comes in while one commit is under way goes into the next one together. What the
# ledger says of an attempt never goes backwards: a write is made only where it follows from what is there, in the
# statement that makes it. It may land late, after others have written, and nobody can call it back.


UNHURRIED = 0.05
"""Seconds that a write which is not urgent may wait for others."""
LINGER = 40.0
"""Seconds for which a cancelled writer waits for more: longer than a kickoff that is cancelled is seen to its end."""


@dataclass(slots=True, eq=False)
class _Write:
    """One write that waits for its commit: the values of `_GIVEN`."""

    values: dict[str, Any]
    is_claim: bool
    done: asyncio.Future[bool] = field(repr=False)

    @property
    def identity(self) -> tuple[str, int]:
        return self.values["row_key"], self.values["attempt"]

    @property
    def marks(self) -> tuple[Any, ...]:
        """What no other write of the same statement may have."""
        return (self.identity, self.values["kickoff"]) if self.values["alone"] else (self.identity,)


class GroupWriter:
    """Writes attempts of one batch; one event loop.

    Attributes:
        retry_for: Seconds for which a database that is away is tried again, before LedgerError.
        commits, writes: How many there were.
    """

    def __init__(self, database: Database, batch: str) -> None:
        self._database = database
        self._batch = batch
        self._statements = _ON_SQLITE if database.path is not None else _ON_POSTGRESQL
        self.retry_for = 120.0
        self.commits = 0
        self.writes = 0
        self._pending: list[_Write] = []
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._cancelled = False

    def start(self) -> None:
        """Begin to write, on the running loop."""
        self._task = asyncio.create_task(self._write_groups())

    async def close(self) -> None:
        """Write what is left, and end."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    async def put(self, values: dict[str, Any], *, is_claim: bool, urgent: bool = True) -> bool:
        """Write an attempt, and return once it is on disk whether it was written.

        It is not where somebody else's claim is in its place, or what is there is later than it.

        Args:
            values: The columns of `attempts` but `posts_until`; `good_for`, for how many more seconds a claim may be
                posted; `mine`, 1 if whoever writes has claimed it; `was`, the phase that alone it may replace, None for
                any; `alone`, 1 if it is to be made only where no other attempt holds the kickoff.
            is_claim: Whether it claims its place; else it replaces what is there.
            urgent: Whether a commit is begun for it; else it goes with the next one, or with one of its own soon.

        Raises:
            LedgerError: It could not be written for `retry_for` seconds, or the writer is closed.
        """
        if self._task is None or self._task.done():
            raise LedgerError("is closed.", ledger=self._database.address)
        write = _Write(values, is_claim, asyncio.get_running_loop().create_future())
        self._pending.append(write)
        if urgent:
            self._wake.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(UNHURRIED, self._wake.set)
        # A caller that is cancelled here leaves the write to its commit: only the answer is not waited for any more.
        return await write.done

    async def _write_groups(self) -> None:
        """Write until `close`, also when this task is cancelled with all others, as at the end of a process.

        What is to be written then matters most: the ids of kickoffs whose POST was just answered.
        """
        while not self._closing or self._pending:
            if not await self._wait_for_writes():
                return
            group, self._pending = self._pending, []
            if group:
                await self._write_group(group)

    async def _wait_for_writes(self) -> bool:
        """Wait for a write, or for `close`; False if this task was cancelled and none has come for long."""
        try:
            if self._cancelled:
                await asyncio.wait_for(self._wake.wait(), LINGER)
            else:
                await self._wake.wait()
        except asyncio.CancelledError:
            self._cancelled = True
        except TimeoutError:
            return False
        self._wake.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return True

    async def _write_group(self, group: Sequence[_Write]) -> None:
        """Commit a group, and tell each write of it whether it was made.

        A commit of which nobody knows whether it took place can be made again: a claim that is there is known by its
        owner, and an update follows from itself.
        """
        while True:
            try:
                made = await self.keep_trying(lambda connection: self._commit(connection, group), "written")
                break
            except asyncio.CancelledError:
                self._cancelled = True
            except (SQLAlchemyError, OSError) as error:
                failure = LedgerError(f"cannot be written: {short(error)}.", ledger=self._database.address)
                for write in group:
                    if not write.done.done():
                        write.done.set_exception(failure)
                        write.done.exception()  # a caller that was cancelled does not read it
                return
        self.commits += 1
        self.writes += len(group)
        for write in group:
            if not write.done.done():
                write.done.set_result(write in made)

    async def keep_trying(self, work: Callable[[Connection], T], what: str) -> T:
        """Do something in the database that can be done twice, and try again while it is away.

        `what` cannot be done until then, for the log: "read" or "written". Raises SQLAlchemyError, OSError.
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
                        "The ledger %s cannot be %s (%s). The batch pauses; it is tried again for %.0f s.",
                        *(self._database.address, what, short(error), self.retry_for),
                    )
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    def _commit(self, connection: Connection, group: Sequence[_Write]) -> set[_Write]:
        made = set[_Write]()
        for part in _in_order(group):
            for statement, is_claim in ((self._statements.claim, True), (self._statements.change, False)):
                writes = {write.identity: write for write in part if write.is_claim is is_claim}
                if writes:
                    values = to_json([[write.values[name] for name in _GIVEN] for write in writes.values()]).decode()
                    done: Any = connection.execute(statement, {"writes": values})
                    made |= {writes[key, attempt] for key, attempt in done}
        if made:
            self.follow_rows(connection, sorted({write.values["row_key"] for write in made}))
        return made

    def follow_rows(self, connection: Connection, keys: Sequence[str]) -> None:
        """Have some rows be in the state of the attempt that counts."""
        values = {"batch": self._batch, "keys": to_json(list(keys)).decode()}
        connection.execute(self._statements.follow, values).close()


def _in_order(writes: Iterable[_Write]) -> list[list[_Write]]:
    """Return writes in parts, in their order. A part has each attempt once, and each kickoff that is to be alone."""
    parts: list[dict[Any, _Write]] = []
    for write in writes:
        at = max((number for number, part in enumerate(parts, 1) if not part.keys().isdisjoint(write.marks)), default=0)
        if at == len(parts):
            parts.append({})
        parts[at] |= dict.fromkeys(write.marks, write)
    return [list(dict.fromkeys(part.values())) for part in parts]


def _is_transient(error: Exception) -> bool:
    """Return whether a database may be back in a while: one that restarts, is locked, or whose disk is full."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError)
    is_gone = "no such" in str(error.orig)  # SQLite's word for a table or a column that is not there
    return not is_gone and (isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated)


_COLUMNS = ("batch", "row_key", "attempt", "phase", "state", "kickoff", "owner", "seconds", "usage", "record")
_GIVEN = (*_COLUMNS, "good_for", "mine", "was", "alone")
_TYPES = {
    "attempt": "integer",
    "seconds": "double precision",
    "usage": "json",
    "good_for": "double precision",
    "mine": "integer",
    "alone": "integer",
}
_CHANGING = ("phase", "state", "kickoff", "seconds", "usage", "record")

_IS_ALONE = f"""
    new_alone = 0 OR NOT EXISTS (
        SELECT 1 FROM {attempts.name} AS other WHERE other.kickoff = new_kickoff
            AND (other.batch, other.row_key, other.attempt) <> (a.batch, a.row_key, a.attempt)
    )
"""  # noqa: S608  no value of anybody is in it
_FOLLOWS = """
    CASE a.phase
        WHEN 'claimed' THEN new_mine = 1 OR (new_phase <> 'claimed' AND coalesce(a.posts_until, 0) <= {clock})
        WHEN 'not-started' THEN new_phase IN ('not-started', 'started', 'ended')
        WHEN 'uncertain' THEN new_phase NOT IN ('claimed', 'not-started') OR
            (new_phase = 'not-started' AND coalesce(a.posts_until, 0) <= {clock})
        ELSE new_phase IN (a.phase, 'ended') AND coalesce(a.kickoff, '') = coalesce(new_kickoff, '')
    END
"""
"""Whether a write may follow what is there. The age of a claim is measured by the database's clock alone: a kickoff
whose sender knows it to be uncertain may be on its way as long as any other."""


@dataclass(frozen=True)
class _Statements:
    """What claims and what changes attempts, each a whole group at once; and what has rows follow their attempts.

    In SQLite a statement a row would give Python's lock away and take it again for each, which costs a busy event loop
    more than the writing does.
    """

    claim: TextClause
    change: TextClause
    follow: TextClause


def _statements(*, writes: str, keys: str, clock: str) -> _Statements:
    """Return the statements for a database that takes JSON so, and tells its time so."""
    until = f"CASE new_phase WHEN 'claimed' THEN {clock} + coalesce(new_good_for, 0)"
    changes = ", ".join(f"{name} = new_{name}" for name in _CHANGING)
    # One that is made again since nobody knew of its commit changes nothing, and counts as made.
    claim = f"""
        INSERT INTO {attempts.name} AS a ({", ".join(_COLUMNS)}, posts_until)
        SELECT {", ".join(f"new_{name}" for name in _COLUMNS)}, {until} END FROM ({writes}) AS new WHERE true
        ON CONFLICT (batch, row_key, attempt) DO UPDATE SET owner = excluded.owner
            WHERE a.owner = excluded.owner AND a.phase = 'claimed'
        RETURNING row_key, attempt
    """  # noqa: S608  no value of anybody is in it
    change = f"""
        UPDATE {attempts.name} AS a
        SET {changes}, posts_until = {until} WHEN 'uncertain' THEN a.posts_until END
        FROM ({writes}) AS new
        WHERE a.batch = new_batch AND a.row_key = new_row_key AND a.attempt = new_attempt AND a.owner = new_owner
            AND (coalesce(new_was, a.phase) = a.phase OR a.record = new_record) AND {_FOLLOWS.format(clock=clock)}
            AND ({_IS_ALONE})
        RETURNING row_key, attempt
    """  # noqa: S608
    # The attempt that counts is the last one that is, or may be, a kickoff, and else the last one.
    follow = f"""
        UPDATE {rows.name} SET (attempt, state) = (
            SELECT a.attempt, a.state FROM {attempts.name} AS a
            WHERE a.batch = {rows.name}.batch AND a.row_key = {rows.name}.row_key
            ORDER BY CASE a.phase WHEN 'not-started' THEN 1 ELSE 0 END, a.attempt DESC LIMIT 1
        ) WHERE batch = :batch AND row_key {keys}
    """  # noqa: S608
    return _Statements(text(claim), text(change), text(follow))


_SQLITE_CLOCK = "((julianday('now') - 2440587.5) * 86400.0)"
_POSTGRESQL_CLOCK = "extract(epoch FROM clock_timestamp())"
_SQLITE_VALUES = [f"json_extract(value, '$[{at}]') AS new_{name}" for at, name in enumerate(_GIVEN)]
_POSTGRESQL_VALUES = [
    f"CAST(value ->> {at} AS {_TYPES.get(name, 'text')}) AS new_{name}" for at, name in enumerate(_GIVEN)
]
_ON_SQLITE = _statements(
    writes=f"SELECT {', '.join(_SQLITE_VALUES)} FROM json_each(:writes)",  # noqa: S608
    keys="IN (SELECT value FROM json_each(:keys))",
    clock=_SQLITE_CLOCK,
)
_ON_POSTGRESQL = _statements(
    writes=f"SELECT {', '.join(_POSTGRESQL_VALUES)} FROM json_array_elements(CAST(:writes AS json)) AS value",  # noqa: S608
    # As an array, each of them is looked up in the index. As a subquery, each row of the batch would be compared.
    keys="= ANY (ARRAY(SELECT json_array_elements_text(CAST(:keys AS json))))",
    clock=_POSTGRESQL_CLOCK,
)


def seconds_left(database: Database) -> ColumnElement[float]:
    """Return the column of for how many more seconds a kickoff may be sent or on its way, by the database's clock."""
    clock = _SQLITE_CLOCK if database.path is not None else _POSTGRESQL_CLOCK
    return attempts.c.posts_until - literal_column(clock)
