"""Where a ledger is: tables in SQLite or PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.context import FlowRunContext
from sqlalchemy import (
    JSON,
    URL,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    make_url,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from prefect_crew._internal.files import create_private
from prefect_crew.batches.dataset import shown_address
from prefect_crew.exceptions import ConfigurationError, InvalidCallError, LedgerError

_HARMLESS = {"ssl", "sslmode", "host", "port", "target_session_attrs", "application_name", "connect_timeout"}
"""Options of a URL that hold no secret. asyncpg also takes `password`, `passfile`, `sslpassword` and any `options`."""
HEARTBEAT = 30
"""Seconds between a worker's heartbeats where it does not tell."""
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
    def exists(self) -> bool:
        """Whether a ledger that is a file is there."""
        return self.is_local and Path(str(open_url(self.full).database)).exists()

    @property
    def is_public(self) -> bool:
        """Whether `public` is all that another machine needs."""
        return self.public.startswith(SECRET) or not _is_secret(open_url(self.full))


async def check_adoptable(address: LedgerAddress, batch: str) -> None:
    """Refuse a ledger in a file where the batch may have to go on elsewhere: on a pool of several crew workers.

    A worker that was stopped or killed stays online for a while. So another one counts once it has sent a heartbeat.

    Raises:
        ConfigurationError: Another worker of the pool would adopt this flow run, and find no ledger.
    """
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    pool = getattr(flow_run, "work_pool_name", None)
    if flow_run is None or pool is None or not address.is_local:
        return
    own = (flow_run.infrastructure_pid or "").rpartition("/")[0]
    begun = time.monotonic()
    first: dict[str, Any] = {}
    async with get_client() as client:
        if (await client.read_work_pool(pool)).type != "crew":
            return
        while True:
            workers = await client.read_workers_for_work_pool(pool)
            others = [one for one in workers if one.name != own and one.status == WorkerStatus.ONLINE]
            for one in others:
                if first.setdefault(one.name, one.last_heartbeat_time) != one.last_heartbeat_time:
                    raise ConfigurationError(
                        f"Batch {batch!r} has its ledger in a file of this machine ({address.public}), but the work "
                        f"pool {pool} has a second worker, {one.name}, which could not go on with the batch. Give it a "
                        "ledger in PostgreSQL: ledger='postgresql://…'. Nothing was started."
                    )
            intervals = [float(one.heartbeat_interval_seconds or HEARTBEAT) for one in others]
            if not others or time.monotonic() - begun > 1.5 * max(intervals):
                return
            await asyncio.sleep(1)


async def ledger_address(ledger: str | None, output: str) -> LedgerAddress:
    """Return where a ledger is.

    Args:
        ledger: A path, the URL of a PostgreSQL database, `secret://NAME` for a Prefect Secret block that holds one of
            them, or None for a file next to the output.
        output: Where the lines go.

    Raises:
        ConfigurationError: There is no such block, or no place next to the output.
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
        raise ConfigurationError(f"The Prefect Secret block {name!r} holds no text, and so no ledger.")
    open_url(value)
    return LedgerAddress(value, given)


def _is_secret(url: URL) -> bool:
    """Return whether a URL holds what is not for everyone: a password, or an option that may."""
    return url.password is not None or any(name.lower() not in _HARMLESS for name in url.query)


T = TypeVar("T")

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
"""A row a batch. `call` is what `batch retry` needs to run it again. `set_aside` are the rows that cannot be run,
`line_options` what its lines depend on, and `exported` what the output was last written with. `generation` grows while
rows are started; the Prefect server has it as well, by which an older copy of the ledger is known."""
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
"""A row a row of the data set, from when the batch comes to it. `number` is its place in the data set, from 0, and NULL
once it has left the data set; `digest` is that of the inputs that it was kicked off with; `inputs` are JSON, secret
ones masked. `state` is a RowState, and `attempt` the attempt that it is that of: 0 for none."""
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
"""A row an attempt. `record` is the whole of it, as JSON; the other columns are what is searched and added up.

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
MOUNTS = Path("/proc/self/mountinfo")
"""Where Linux tells what is mounted; elsewhere it is not there."""


def default_ledger(output: str) -> str:
    """Return the path of the ledger next to a local output.

    Raises:
        ConfigurationError: The output is remote, so there is no place next to it; or it names no file.
    """
    if "://" in output and not output.startswith("file://"):
        raise ConfigurationError(
            f"The output {shown_address(output)} is not on this machine, so there is no place for the ledger next "
            "to it: give a path or the URL of a PostgreSQL database, ledger=…."
        )
    path = Path(output.removeprefix("file://"))
    if not path.name:
        raise ConfigurationError(f"The output {output!r} names no file. Nothing was started.")
    return str(path.with_name(f"{path.name}.ledger.db"))


def open_url(ledger: str) -> URL:
    """Return the SQLAlchemy URL of a ledger that is given as a path or a URL.

    Raises:
        ConfigurationError: It is neither SQLite nor PostgreSQL.
    """
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
    raise ConfigurationError(f"A ledger lives in a SQLite file or in PostgreSQL, not in {kind!r}.")


class Database:
    """One database, as an async context manager on one event loop.

    What is done in it is written once, as functions of a plain SQLAlchemy connection: SQLite runs them in one thread of
    its own, which costs one change of threads and not one a statement; PostgreSQL runs them over asyncpg.
    """

    def __init__(self, ledger: str) -> None:
        self.url = open_url(ledger)
        self.address = _shown(self.url)
        if self.url.drivername == "sqlite":
            # One ledger has one lock, by whatever name it is reached.
            self.url = self.url.set(database=os.path.realpath(str(self.url.database)))
        self._stat: os.stat_result | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._file: Engine | None = None
        self._connection: Connection | None = None
        self._server: Any = None

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

    @property
    def server(self) -> Any:
        """SQLAlchemy's async engine of a PostgreSQL that is open; None for SQLite."""
        return self._server

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
            self._file = _sqlite(self.url)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="crew ledger")
        else:
            from sqlalchemy.ext.asyncio import create_async_engine

            # Every process of a batch keeps two of them busy at most: its writer, and a reader.
            self._server = create_async_engine(self.url, pool_size=2, max_overflow=2, pool_pre_ping=True)
            event.listen(self._server.sync_engine, "connect", _prepare_session)
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
        if not path.exists():
            return
        if (names := path.stat().st_nlink) > 1:
            raise LedgerError(
                f"has {names} names (hard links), and what is written by one of them is not seen by the others. Copy "
                "it to a file of its own.",
                ledger=self.address,
            )
        if _is_mounted(path):
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
        if self._server is not None:
            await self._server.dispose()
            self._server = None

    def _close_file(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._file is not None:
            self._file.dispose()

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Do something in a transaction of its own, and return what it returns once that is committed.

        Raises:
            SQLAlchemyError, OSError: As the database does.
        """
        if self._server is not None:
            return await self._on_server(work)
        if self._thread is None:
            raise InvalidCallError("This ledger is not open: use it in `async with`.")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._in_file, work)

    async def _on_server(self, work: Callable[[Connection], T]) -> T:
        try:
            async with self._server.begin() as connection:
                return await connection.run_sync(work)
        except Exception as error:
            # Of connecting to a server that starts or stops: SQLAlchemy leaves the driver's own error as it is.
            if type(error).__module__.partition(".")[0] != "asyncpg":
                raise
            raise OSError(short(error)) from error

    def _in_file(self, work: Callable[[Connection], T]) -> T:
        if self._connection is None:
            assert self._file is not None  # noqa: S101  _open made it
            self._connection = self._file.connect()
        try:
            done = work(self._connection)
            self._connection.commit()
        except BaseException:
            self._connection.rollback()
            raise
        return done

    def insert(self, table: Table) -> Any:
        """Return an INSERT of this database's dialect, which knows ON CONFLICT."""
        return (sqlite if self.path is not None else postgresql).insert(table)


def _sqlite(url: URL) -> Engine:
    # The connection is made and used in the one thread; only its closing may happen elsewhere, at an interpreter's end.
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


def _is_mounted(path: Path) -> bool:
    """Return whether a file is a mount of its own, where the system tells."""
    try:
        mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    return any(_unescaped(mount.split(" ")[4]) == str(path) for mount in mounts)


def _unescaped(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def _shown(url: URL) -> str:
    """Return an address for people: the path of a file, or a URL without password and options."""
    if url.drivername == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


def short(error: Exception) -> str:
    """Return the first line of a database's error."""
    said = str(getattr(error, "orig", None) or error).splitlines()
    return (said[0] if said else type(error).__name__)[:300].rstrip(".")
