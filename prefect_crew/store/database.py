"""The crew database itself: its address, how it is opened, its threads, and transactions.

A function of the store gets a `Transaction` and runs in a thread of the store: `await store.run(begin, request)`. Its
writes are guarded by what they expect to find, so that it may be repeated after an answer of the database was lost.
SQLite and PostgreSQL differ here, and only here.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
import socket
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar
from urllib.parse import quote, quote_plus
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from prefect_crew.exceptions import ConfigurationError, StoreError
from prefect_crew.store import schema

P = ParamSpec("P")
T = TypeVar("T")
Started = Literal["yes", "no", "unknown"]
Lane = Literal["begin", "write", "read"]

LOCK_WITHIN = 20.0
"""Seconds that a transaction waits for another. The window in which a kickoff may be sent is longer."""
IDLE = 10.0
"""Seconds after which an unused connection is closed: hundreds of containers may share one PostgreSQL."""
GROUP = 100
"""Transactions of one process that SQLite commits together, at most. On PostgreSQL one that waits for its lock would
hold up the others."""
THREADS = 4
"""Of PostgreSQL: so many for `begin`, which may wait for locks, and so many for all else."""
CLOSE_WITHIN = 5.0
"""Seconds for transactions that are under way at the end of a process, or before a fork."""
OLDEST_SQLITE = (3, 35)


# Transactions


class Transaction:
    """One transaction of one function. Its statements are SQLAlchemy Core statements on `connection`. `nonce` is of its
    call: repeated after a lost answer to a commit, the function recognizes by it what it has written."""

    def __init__(self, connection: sa.Connection, store: Store, nonce: str = "") -> None:
        self.connection, self.nonce, self._store = connection, nonce, store
        self._is_sqlite = connection.dialect.name == "sqlite"
        self._clock = store.clock or (time.time if self._is_sqlite else None)

    def lock(self, *names: str) -> float:
        """Let no other transaction with one of these names run until the end of this one; return the time after that.

        Every writing function begins with it. A function that counts before it inserts names what it counts.
        """
        if not self._is_sqlite:  # SQLite's transaction has begun IMMEDIATE
            binds = {f"name{number}": name for number, name in enumerate(sorted({*names}))}
            return self.now(self.connection.execute(_head(len(binds)), binds).one()[-1])
        return self.now()

    def now(self, answer: float | None = None) -> float:
        """Return the time by the clock of the database, without a lock. `answer`: that of a statement which asked."""
        now = float(answer or self.connection.scalar(_TIME) or 0.0) if self._clock is None else self._clock()
        self._store.ahead = now - time.monotonic()
        return now

    def insert(self, table: sa.Table) -> Any:
        """Return an INSERT that takes ON CONFLICT."""
        return (sqlite if self._is_sqlite else postgresql).insert(table)

    def insert_once(self, table: sa.Table, **values: Any) -> bool:
        """Insert a row; return False if one of its keys was there."""
        return self.connection.execute(_insert_once(self._is_sqlite, table), values).first() is not None

    def changed(self, statement: sa.Executable, **binds: Any) -> int:
        """Execute an UPDATE or DELETE; return the number of its rows."""
        return self.connection.execute(statement, binds).rowcount


_CLOCK = "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
_TIME = sa.text(f"SELECT {_CLOCK}")
# Local to the transaction, since PgBouncer shares sessions: a commit is on disk, no wait is endless, and a process that
# freezes in the middle loses its locks.
_SETTINGS = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' "
    "ELSE current_setting('synchronous_commit') END, true)",
    f"set_config('lock_timeout', '{LOCK_WITHIN:g}s', true)",
    f"set_config('idle_in_transaction_session_timeout', '{LOCK_WITHIN:g}s', true)",
)


@cache
def _insert_once(is_sqlite: bool, table: sa.Table) -> Any:
    insert: Any = (sqlite if is_sqlite else postgresql).insert(table)
    return insert.on_conflict_do_nothing().returning(sa.literal_column("1"))


@cache
def _head(names: int) -> sa.TextClause:
    """Return the first statement of a transaction of PostgreSQL. A list is evaluated from left to right."""
    locks = [f"pg_advisory_xact_lock(hashtextextended(:name{number}, 0))" for number in range(names)]
    return sa.text(f"SELECT {', '.join([*_SETTINGS, *locks, _CLOCK])}")


def transaction(
    lane: Lane, *, started: Started = "unknown"
) -> Callable[[Callable[Concatenate[Transaction, P], T]], Callable[Concatenate[Transaction, P], T]]:
    """Mark a function of the store: the threads that run it, and whether a run was started if it fails."""

    def mark(work: Callable[Concatenate[Transaction, P], T]) -> Callable[Concatenate[Transaction, P], T]:
        work.__dict__["crew_store"] = (lane, started)
        return work

    return mark


# The address


@dataclass(frozen=True, kw_only=True)
class Registration:
    """The facts by which a Prefect server knows the store of its crews. `host` is that of a file."""

    id: str
    where: str
    host: str | None

    def is_same(self, other: Registration) -> bool:
        """Whether both are one store: a file is one at its place only, since a copy has the same id."""
        is_at_place = self.host is None or self.where == other.where
        return is_at_place and (self.id, self.host) == (other.id, other.host)


def _parse(url: str) -> sa.URL:
    problem = "is no URL of the form sqlite:///path/crew.db or postgresql://user:password@host/name"
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"The URL of the crew database {problem}.") from None
    kind = parsed.drivername.partition("+")[0]
    if kind == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return sa.URL.create("sqlite", database=os.path.realpath(Path(str(parsed.database)).expanduser()))
    if kind not in ("postgresql", "postgres"):
        raise ConfigurationError(f"The URL of the crew database {problem}.")
    if "@" in f"{parsed.host}{parsed.database}":  # the rest of a password that was cut at its own '@'
        raise ConfigurationError("The URL of the crew database has a second '@': write one of a password as '%40'.")
    # Prefect's own URL names asyncpg, and its word for `sslmode` is `ssl`.
    query = {"sslmode" if name == "ssl" else name: value for name, value in parsed.query.items()}
    return parsed.set(drivername="postgresql+psycopg", query=query)


NETWORK_MOUNTS = re.compile(r"nfs\d?|cifs|smb\w*|9p|afs|ceph|lustre|fuse\.(sshfs|s3fs|glusterfs|gcsfuse)")
"""File systems of several machines: SQLite's lock file is memory that these do not share."""
SHARED_MOUNTS = re.compile(r"fuse(\..*)?|virtiofs")


def mount_kind(path: str, mountinfo: str) -> str:
    """Return the file system of a path, by the text of /proc/self/mountinfo; empty if that does not tell."""
    longest, kind = "", ""
    for line in mountinfo.splitlines():
        place, _, source = line.partition(" - ")
        if len(fields := place.split()) < 5 or not source:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        # Of two on one place, the later one hides the other.
        if f"{path}/".startswith(f"{mount.rstrip('/')}/") and len(mount) >= len(longest):
            longest, kind = mount, source.split()[0]
    return kind


# Threads


@dataclass(eq=False)
class _Job:
    """A function of the store and its caller's future. Whoever acquires `turn` first, thread or caller, decides whether
    the function runs."""

    work: Callable[[Transaction], Any]
    operation: str
    started: Started
    future: asyncio.Future[Any]
    nonce: str
    turn: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, value: Any, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(value)
        else:
            self.future.set_exception(error)
            self.future.exception()  # nobody may ask for it


_Answer = tuple[_Job, Any, Exception | None]


def _tell(answers: Sequence[_Answer]) -> None:
    """Give callers their answers, with one call for each of their event loops."""
    loops: dict[asyncio.AbstractEventLoop, list[_Answer]] = {}
    for answer in answers:
        loops.setdefault(answer[0].future.get_loop(), []).append(answer)

    def tell(own: Sequence[_Answer]) -> None:
        for job, value, error in own:
            job.answer(value, error)

    for loop, own in loops.items():
        with suppress(RuntimeError):  # the loop was closed, and its callers are gone
            loop.call_soon_threadsafe(tell, own)


class _Lane:
    """A queue of jobs and the threads that take them, up to `most` and begun as they are needed."""

    def __init__(self, serve: Callable[[_Lane], None], *, most: int, group: int = 1, writes: bool = True) -> None:
        self.serve, self.most, self.group, self.writes = serve, most, group, writes
        self.threads: list[threading.Thread] = []
        self._jobs = deque[_Job]()
        self._waiting = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, job: _Job) -> None:
        with self._changed:
            self._jobs.append(job)
            if self._waiting >= len(self._jobs):
                self._changed.notify()
            elif len(self.threads) < self.most:
                # A thread that is killed at the end of the process loses nothing: its transaction is rolled back.
                thread = threading.Thread(target=self.serve, args=(self,), name="crew database", daemon=True)
                self.threads.append(thread)
                thread.start()

    def take(self, timeout: float | None) -> list[_Job] | None:
        """Wait for jobs and return up to `group` of them, none after the timeout, None once the lane is closed."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._jobs or self._is_closed, timeout)
            self._waiting -= 1
            if not self._jobs and self._is_closed:
                return None
            return [self._jobs.popleft() for _ in range(min(self.group, len(self._jobs)))]

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class Store:
    """The crew database of a process: one object for all its event loops and threads.

    `clock` replaces the clock of the database, for tests. The database is opened, and its tables are made, at its first
    use. `where` is its address for people, without a password; `ahead` are the seconds by which its clock was ahead of
    `time.monotonic` when a transaction last read it.

    Raises:
        ConfigurationError: The URL cannot be used, or the driver of PostgreSQL is not installed.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        self._url, self.clock = _parse(url), clock
        self.ahead = time.time() - time.monotonic()
        self.path = Path(str(self._url.database)) if self._url.drivername == "sqlite" else None
        public = self._url._replace(drivername="postgresql", username=None, password=None, query={})
        self.where = str(self.path) if self.path else public.render_as_string()
        self._engine = self._create_engine()
        self._id: str | None = None
        self._file: os.stat_result | None = None
        self._lanes: dict[str, _Lane] | None = None
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        _stores.add(self)

    async def run(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function of the store in a transaction; return its result after the commit.

        If the caller is cancelled, the transaction does not happen, or is over before CancelledError is raised: the
        caller can then take back what it did (`not_started`). That takes up to `LOCK_WITHIN`.

        Raises:
            StoreError: The database cannot be used. Of a lost answer to a commit nobody knows whether it happened.
        """
        lane, started = work.__dict__["crew_store"]
        future = asyncio.get_running_loop().create_future()
        nonce = uuid.uuid4().hex
        job = _Job(lambda transaction: work(transaction, *args, **kwargs), work.__name__, started, future, nonce)
        with self._lock:
            if self._lanes is None:
                self._lanes = self._create_lanes()
            self._lanes[lane].put(job)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not job.turn.acquire(blocking=False):
                await asyncio.wait([future])
            raise

    async def registration(self) -> Registration:
        """Return the value that names this store for a Prefect server. Raises StoreError."""
        await self.run(_touch)
        host = None if self.path is None else socket.gethostname()
        return Registration(id=str(self._id), where=self.where, host=host)

    def close(self) -> None:
        """Finish the transactions under way, and close all connections; the next use opens the store again."""
        with self._lock:
            self._end(CLOSE_WITHIN)

    def before_fork(self) -> None:
        """Close all connections, and keep them closed until `after_fork`.

        A child inherits SQLite's table of the files that the process has open. A connection that the child opens then
        takes no lock, and what it commits is lost once the parent has closed its own.
        """
        self._lock.acquire()
        self._end(CLOSE_WITHIN)

    def after_fork(self, *, in_child: bool) -> None:
        """Let parent or child open connections of their own. The child forgets those that could not be closed."""
        if in_child:
            self._lock, self._opening = threading.Lock(), threading.Lock()
        else:
            self._lock.release()

    def _end(self, timeout: float) -> None:
        lanes, self._lanes = self._lanes or {}, None
        threads = [thread for lane in {*lanes.values()} for thread in lane.threads]
        for lane in lanes.values():
            lane.close()
        until = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _create_lanes(self) -> dict[str, _Lane]:
        if self.path is None:
            other = _Lane(self._serve, most=THREADS)
            return {"begin": _Lane(self._serve, most=THREADS), "write": other, "read": other}
        # Two writers of one process would only wait for each other.
        writer = _Lane(self._serve, most=1, group=GROUP)
        return {"begin": writer, "write": writer, "read": _Lane(self._serve, most=1, group=GROUP, writes=False)}

    def _serve(self, lane: _Lane) -> None:
        connection: sa.Connection | None = None
        while (jobs := lane.take(None if connection is None else IDLE)) is not None:
            if not jobs:
                connection = _closed(connection)
            elif jobs := [job for job in jobs if job.turn.acquire(blocking=False)]:
                connection = self._do(jobs, connection, lane)
        _closed(connection)

    def _do(
        self, jobs: Sequence[_Job], connection: sa.Connection | None, lane: _Lane, *, may_repeat: bool = True
    ) -> sa.Connection | None:
        """Run jobs in one transaction, and answer them. Return the connection if it is still of use."""
        may_be_old = connection is not None
        try:
            connection = self._connect(lane) if connection is None else connection
            self._check_file()
            values = self._transact(connection, jobs)
        except BaseException as error:  # noqa: BLE001  a caller whose job nobody answers waits for ever
            _closed(connection)
            if may_repeat and (_is_conflict(error) or (may_be_old and _is_gone(error))):
                return self._do(jobs, None, lane, may_repeat=False)
            if len(jobs) > 1 and not _is_busy(error):
                for job in jobs:  # one of them is at fault; the others have not happened
                    _closed(self._do([job], None, lane))
                return None
            _tell([(job, None, self._error(error, job)) for job in jobs])
            return None
        _tell([(job, value, None) for job, value in zip(jobs, values, strict=True)])
        return connection

    def _transact(self, connection: sa.Connection, jobs: Sequence[_Job]) -> list[Any]:
        with connection.begin():
            return [job.work(Transaction(connection, self, job.nonce)) for job in jobs]

    # Opening

    def _create_engine(self) -> sa.Engine:
        options: dict[str, Any] = {"poolclass": NullPool, "hide_parameters": True}
        if self.path is not None:
            engine = sa.create_engine(self._url, connect_args={"timeout": LOCK_WITHIN}, **options)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        settings: dict[str, Any] = {
            "prepare_threshold": None,  # PgBouncer
            "application_name": "prefect-crew",
            "connect_timeout": 10,
            # A machine that vanishes is noticed.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        }
        settings = {name: value for name, value in settings.items() if name not in self._url.query}
        try:
            return sa.create_engine(self._url, connect_args=settings, isolation_level="READ COMMITTED", **options)
        except ModuleNotFoundError:
            raise ConfigurationError(
                "A crew database in PostgreSQL needs psycopg: pip install 'prefect-crew[postgres]'."
            ) from None

    def _connect(self, lane: _Lane) -> sa.Connection:
        with self._opening:
            if self._id is None:
                self._open()
        return self._engine.connect().execution_options(crew_writes=lane.writes)

    def _open(self) -> None:
        """Make the file and the tables if there are none, and check the version."""
        if self.path is not None:
            self._make_file(self.path)
        with self._engine.connect().execution_options(crew_writes=True) as connection:
            if self.path is not None:
                _switch_to_wal(connection)
            with connection.begin():
                now = Transaction(connection, self).lock("store")
                if not sa.inspect(connection).has_table(schema.store.name):
                    schema.METADATA.create_all(connection)
                    values = {"id": str(uuid.uuid4()), "version": schema.VERSION, "created_at": now}
                    connection.execute(schema.store.insert().values(values))
                store_id, version = connection.execute(sa.select(schema.store.c.id, schema.store.c.version)).one()
        if version != schema.VERSION:
            self._refuse(
                f"has version {version} of its tables, and this prefect-crew knows version {schema.VERSION}: install "
                "the prefect-crew that made it, or set another database"
            )
        self._id = store_id
        self._file = None if self.path is None else self.path.stat()

    def _make_file(self, path: Path) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            self._refuse(f"needs SQLite 3.35, and this Python has {sqlite3.sqlite_version}")
        mounts = Path("/proc/self/mountinfo")
        kind = mount_kind(str(path), mounts.read_text(errors="replace") if mounts.exists() else "")
        if NETWORK_MOUNTS.fullmatch(kind):
            self._refuse(f"is on a network mount ({kind}), where SQLite loses commits: use PostgreSQL, or a local disk")
        if SHARED_MOUNTS.fullmatch(kind):
            _log.warning("The crew database %s is on a %s mount: let one machine only use it.", path, kind)
        if path.exists() and (path.stat().st_nlink > 1 or path.is_mount()):
            self._refuse("has two names, and SQLite keeps its last commits by name: mount its folder, or copy the file")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(file).st_size == 0:  # also under an umask that takes the owner's rights
                os.fchmod(file, 0o600)  # SQLite gives its other files the mode of this one
        finally:
            os.close(file)

    def _check_file(self) -> None:
        """Refuse to write to a file that nobody will ever read again."""
        if self.path is None or self._file is None:
            return
        try:
            is_same = os.path.samestat(self.path.stat(), self._file)
        except FileNotFoundError:
            is_same = False
        if not is_same:
            self._refuse("was removed or replaced while this process had it open: put it back, or start again")

    # Errors

    def _refuse(self, problem: str) -> NoReturn:
        raise StoreError(problem, operation="open", started="no")

    def _error(self, error: BaseException, job: _Job) -> Exception:
        if not isinstance(error, (DBAPIError, OSError, StoreError)):
            return error if isinstance(error, Exception) else RuntimeError(repr(error))
        if isinstance(error, StoreError):
            problem = str(error)
        elif _is_busy(error):
            problem = f"was locked by another process for {LOCK_WITHIN:g} s"
        else:
            lines = str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__]
            problem = f"cannot be used ({self._masked(lines[0].strip()[:300]).rstrip('.')})"
        end = {"no": " Nothing was started.", "yes": " The run was started and goes on.", "unknown": ""}[job.started]
        text = f"The crew database {self.where} {problem}.{end}"
        return StoreError(text, operation=job.operation, started=job.started)

    def _masked(self, text: str) -> str:
        secrets = [self._url.password, *(value for value in self._url.query.values() if isinstance(value, str))]
        for secret in filter(None, secrets):
            for form in (secret, quote(secret), quote_plus(secret)):
                text = text.replace(form, "***")
        return text


@transaction("read")
def _touch(transaction: Transaction) -> None:
    """Open the store."""


_log = logging.getLogger(__name__)


def _closed(connection: sa.Connection | None) -> None:
    if connection is not None:
        try:
            connection.invalidate()
            connection.close()
        except Exception:  # noqa: BLE001  it is gone either way
            _log.debug("A connection of the crew database could not be closed.", exc_info=True)


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # else pysqlite begins transactions by itself, and savepoints do not nest
    for setting in ("synchronous=FULL", "foreign_keys=ON"):  # a commit is on disk when it returns
        connection.execute(f"PRAGMA {setting}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("crew_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _switch_to_wal(connection: sa.Connection) -> None:
    """Let readers and a writer work at the same time. SQLite does not wait here for another process that does so."""
    driver: Any = connection.connection.driver_connection
    until = time.monotonic() + LOCK_WITHIN
    while True:
        try:
            driver.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def _sqlstate(error: BaseException) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _is_busy(error: BaseException) -> bool:
    """Return whether another transaction held its locks for `LOCK_WITHIN`."""
    driver: Any = getattr(error, "orig", None) or error
    return (getattr(driver, "sqlite_errorcode", None) or 0) & 0xFF == sqlite3.SQLITE_BUSY or _sqlstate(error) == "55P03"


def _is_conflict(error: BaseException) -> bool:
    """Return whether PostgreSQL has ended one of two transactions that waited for each other."""
    return _sqlstate(error) in ("40P01", "40001")


def _is_gone(error: BaseException) -> bool:
    """Return whether the server has ended the connection, such as by a restart or an idle timeout."""
    return isinstance(error, DBAPIError) and (error.connection_invalidated or _sqlstate(error)[:3] in ("57P", "25P"))


# Processes

_stores: WeakSet[Store] = WeakSet()
"""All stores of this process: its end and its forks close them."""


def _close_all() -> None:
    for store in [*_stores]:
        store.close()


def _survive_forks() -> None:
    held: list[Store] = []

    def before() -> None:
        held.extend(_stores)
        for store in held:
            store.before_fork()

    def after(*, in_child: bool) -> None:
        while held:
            held.pop().after_fork(in_child=in_child)

    os.register_at_fork(
        before=before,
        after_in_parent=lambda: after(in_child=False),
        after_in_child=lambda: after(in_child=True),
    )


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    _survive_forks()
