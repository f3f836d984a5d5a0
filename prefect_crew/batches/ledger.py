"""The ledger of a batch: the second store behind the record protocol, in SQLite or PostgreSQL.

Its promises are those of the records on the Prefect server, for thousands of rows a minute: the claim is on disk before
the POST leaves. Writes that come in while one commit is under way go into the next one together, so a row pays a share
of a commit and not a whole one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    Column,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    bindparam,
    event,
    func,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from prefect_crew.api.errors import CrewError
from prefect_crew.api.models import CrewState
from prefect_crew.records import RecordPhase, RunRecord

__all__ = ["BatchEntry", "Ledger", "LedgerError", "ledger_url"]

_metadata = MetaData()
_batches = Table(
    "crew_batches",
    _metadata,
    Column("name", String(255), primary_key=True),
    Column("ledger_id", String(36), nullable=False),
    Column("crew_url", Text, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("total", Integer, nullable=False),
)
_attempts = Table(
    "crew_attempts",
    _metadata,
    Column("batch", String(255), primary_key=True),
    Column("row_key", String(255), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("phase", String(16), nullable=False),
    Column("state", String(16)),
    Column("kickoff_id", Text),
    Column("owner", String(36), nullable=False),
    Column("record", Text, nullable=False),
    Index("crew_attempts_kickoff", "kickoff_id"),
    Index("crew_attempts_phase", "batch", "phase"),
)
_KEYS = 400
"""Row keys a query: SQLite allows 32,766 bound values, PostgreSQL's driver as many."""


class LedgerError(CrewError):
    """The ledger cannot be read or written. Attributes: ledger (its address without a password)."""

    def __init__(self, reason: str, *, ledger: str) -> None:
        self.ledger = ledger
        super().__init__(
            f"The ledger {ledger}: {reason} No row is kicked off without it; mend it and run the batch again with the "
            "same name, which goes on where it stopped."
        )


@dataclass(frozen=True)
class BatchEntry:
    """What a ledger knows of a batch as a whole. `fingerprint` is that of its rows' keys and inputs."""

    name: str
    ledger_id: str
    crew_url: str
    fingerprint: str
    total: int


def ledger_url(ledger: str | None, output: str) -> str:
    """Return the SQLAlchemy URL of a ledger: that of `ledger`, a path or a URL, else a file beside a local output.

    Raises:
        LedgerError: The output is remote, so there is no place beside it.
    """
    if ledger is None:
        if "://" in output and not output.startswith("file://"):
            raise LedgerError("an output that is not on this machine needs one of its own: ledger=….", ledger=output)
        path = Path(output.removeprefix("file://"))
        ledger = str(path.with_name(f"{path.name}.ledger.db"))
    if "://" not in ledger:
        return f"sqlite+aiosqlite:///{Path(ledger).absolute()}"
    scheme, rest = ledger.split("://", 1)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
    return f"{drivers.get(scheme, scheme)}://{rest}"


@dataclass
class _Write:
    """One write that waits for its commit. `values` are those of a row of the table."""

    values: dict[str, Any]
    new: bool
    done: asyncio.Future[bool] = field(repr=False)


class Ledger:
    """The ledger of one batch, as an async context manager; one event loop, any number of processes.

    It implements the record protocol: a record's run key is `batch/NAME/ROW KEY`.
    """

    def __init__(self, url: str, batch: str) -> None:
        self._engine: AsyncEngine = create_async_engine(url, pool_size=5) if "sqlite" not in url else _sqlite(url)
        self.batch = batch
        self.address = self._engine.url.render_as_string(hide_password=True)
        self._pending: list[_Write] = []
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._closing = False
        self.commits = 0
        self.writes = 0

    async def __aenter__(self) -> Ledger:
        try:
            async with self._engine.begin() as connection:
                await connection.run_sync(_metadata.create_all)
        except (SQLAlchemyError, OSError) as error:
            await self._engine.dispose()
            raise LedgerError(f"cannot be opened: {_short(error)}.", ledger=self.address) from error
        self._writer = asyncio.create_task(self._write_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._wake.set()
        if self._writer is not None:
            await self._writer
        await self._engine.dispose()

    def run_key(self, row_key: str) -> str:
        """Return the run key of a row."""
        return f"batch/{self.batch}/{row_key}"

    def row_key(self, run_key: str) -> str:
        """Return the row of a run key."""
        return run_key.removeprefix(f"batch/{self.batch}/")

    # The batch as a whole.

    async def entry(self) -> BatchEntry | None:
        """Return what is known of the batch, None if it is new here."""
        async with self._reading() as connection:
            row = (await connection.execute(select(_batches).where(_batches.c.name == self.batch))).mappings().first()
        return None if row is None else BatchEntry(**dict(row))

    async def enter(self, *, crew_url: str, fingerprint: str, total: int) -> BatchEntry:
        """Write down a batch, or its changed rows, and return the entry that stands."""
        values = {"crew_url": crew_url, "fingerprint": fingerprint, "total": total}
        insert = self._insert(_batches).values(name=self.batch, ledger_id=str(uuid4()), **values)
        async with self._writing() as connection:
            await connection.execute(insert.on_conflict_do_update(index_elements=["name"], set_=values))
        entry = await self.entry()
        if entry is None:
            raise LedgerError("lost what was just written.", ledger=self.address)
        return entry

    # The record protocol.

    async def claim(self, record: RunRecord) -> bool:
        """Write a new attempt; False if somebody else's stands in its place."""
        return await self._put(record, new=True)

    async def save(self, record: RunRecord) -> None:
        """Replace an attempt that this caller owns."""
        await self._put(record, new=False)

    async def attempts(self, run_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a row, the first one first."""
        key = self.row_key(run_key)
        return (await self.attempts_of([key])).get(key, [])

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the attempt that holds a kickoff id, if any."""
        query = select(_attempts.c.record).where(_attempts.c.kickoff_id == kickoff_id)
        async with self._reading() as connection:
            found = (await connection.execute(query)).scalars().first()
        return None if found is None else _record(found)

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return False: whose claim it was is told by its age alone, and by the flow run's own earlier attempts."""
        del record
        return False

    # Many rows at once.

    async def attempts_of(self, row_keys: Sequence[str]) -> dict[str, list[RunRecord]]:
        """Return the attempts at some rows by row key; a row without any is left out."""
        found: dict[str, list[RunRecord]] = {}
        async with self._reading() as connection:
            for start in range(0, len(row_keys), _KEYS):
                query = (
                    select(_attempts.c.row_key, _attempts.c.record)
                    .where(_attempts.c.batch == self.batch, _attempts.c.row_key.in_(row_keys[start : start + _KEYS]))
                    .order_by(_attempts.c.attempt)
                )
                for key, text in (await connection.execute(query)).all():
                    found.setdefault(key, []).append(_record(text))
        return found

    async def in_phase(self, *phases: RecordPhase) -> AsyncIterator[tuple[str, RunRecord]]:
        """Yield row keys and the attempts that are in one of the phases, in the order of their keys."""
        query = (
            select(_attempts.c.row_key, _attempts.c.record)
            .where(_attempts.c.batch == self.batch, _attempts.c.phase.in_([str(phase) for phase in phases]))
            .order_by(_attempts.c.row_key, _attempts.c.attempt)
        )
        async with self._reading() as connection:
            async for key, text in await connection.stream(query):
                yield key, _record(text)

    async def counts(self) -> dict[str, int]:
        """Return how many attempts are in each phase; ended ones are counted by their state."""
        word = func.coalesce(_attempts.c.state, _attempts.c.phase)
        query = select(word, func.count()).where(_attempts.c.batch == self.batch).group_by(word)
        async with self._reading() as connection:
            return {str(key): int(count) for key, count in (await connection.execute(query)).all()}

    async def past(self) -> tuple[int, float | None]:
        """Return how many rows have completed, and the mean of their seconds from kickoff to end."""
        done, seconds = 0, 0.0
        async for _, record in self.in_phase(RecordPhase.ENDED):
            if record.state is CrewState.COMPLETED and record.kicked_off_at and record.ended_at:
                done += 1
                seconds += (record.ended_at - record.kicked_off_at).total_seconds()
        return done, seconds / done if done else None

    # Writing.

    async def _put(self, record: RunRecord, *, new: bool) -> bool:
        values = {
            "batch": self.batch,
            "row_key": self.row_key(record.run_key),
            "attempt": record.attempt,
            "phase": str(record.phase),
            "state": str(record.state) if record.state is not None else None,
            "kickoff_id": record.kickoff_id,
            "owner": record.owner,
            "record": record.model_dump_json(exclude_none=True),
        }
        write = _Write(values, new, asyncio.get_running_loop().create_future())
        self._pending.append(write)
        self._wake.set()
        # Whoever is cancelled here leaves the write to its commit.
        return await asyncio.shield(write.done)

    async def _write_on(self) -> None:
        while not self._closing or self._pending:
            await self._wake.wait()
            self._wake.clear()
            group, self._pending = self._pending, []
            if not group:
                continue
            try:
                won = await self._commit(group)
            except (SQLAlchemyError, OSError) as error:
                failure = LedgerError(f"cannot be written: {_short(error)}.", ledger=self.address)
                for write in group:
                    if not write.done.done():
                        write.done.set_exception(failure)
                        write.done.exception()
                continue
            self.commits += 1
            self.writes += len(group)
            for write in group:
                if not write.done.done():
                    write.done.set_result(not write.new or (*_identity(write.values), write.values["owner"]) in won)

    async def _commit(self, group: Sequence[_Write]) -> set[tuple[str, int, str]]:
        """Write a group in one transaction and return which claims of it are ours."""
        new = [write.values for write in group if write.new]
        # The last write of an attempt is the one that counts: one caller owns it, and its writes are in order.
        changed = {_identity(write.values): write.values for write in group if not write.new}
        won: set[tuple[str, int, str]] = set()
        async with self._engine.begin() as connection:
            if new:
                await connection.execute(self._insert(_attempts).on_conflict_do_nothing(), new)
                won = await self._won(connection, new)
            if changed:
                await connection.execute(_UPDATE, [_bound(values) for values in changed.values()])
        return won

    async def _won(self, connection: AsyncConnection, new: Sequence[Mapping[str, Any]]) -> set[tuple[str, int, str]]:
        """Return who stands in the places that were claimed: row key, attempt, owner."""
        keys = list({_identity(values) for values in new})
        won: set[tuple[str, int, str]] = set()
        for start in range(0, len(keys), _KEYS):
            query = select(_attempts.c.row_key, _attempts.c.attempt, _attempts.c.owner).where(
                _attempts.c.batch == self.batch,
                tuple_(_attempts.c.row_key, _attempts.c.attempt).in_(keys[start : start + _KEYS]),
            )
            won.update((key, attempt, owner) for key, attempt, owner in (await connection.execute(query)).all())
        return won

    def _insert(self, table: Table) -> Any:
        dialects: dict[str, Any] = {"sqlite": sqlite, "postgresql": postgresql}
        dialect = dialects.get(self._engine.dialect.name)
        if dialect is None:
            raise LedgerError("only SQLite and PostgreSQL can keep a ledger.", ledger=self.address)
        return dialect.insert(table)

    @asynccontextmanager
    async def _reading(self) -> AsyncGenerator[AsyncConnection]:
        try:
            async with self._engine.connect() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(f"cannot be read: {_short(error)}.", ledger=self.address) from error

    @asynccontextmanager
    async def _writing(self) -> AsyncGenerator[AsyncConnection]:
        try:
            async with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(f"cannot be written: {_short(error)}.", ledger=self.address) from error


_CHANGING = ("phase", "state", "kickoff_id", "owner", "record")
_UPDATE = (
    update(_attempts)
    .where(
        _attempts.c.batch == bindparam("b_batch"),
        _attempts.c.row_key == bindparam("b_row_key"),
        _attempts.c.attempt == bindparam("b_attempt"),
    )
    .values({name: bindparam(f"b_{name}") for name in _CHANGING})
)


def _bound(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"b_{name}": value for name, value in values.items()}


def _sqlite(url: str) -> AsyncEngine:
    engine = create_async_engine(url)

    def prepare(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        # A commit is on disk when it returns, which is what makes a claim a claim; readers do not wait for it.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA busy_timeout=30000")
        cursor.close()

    event.listen(engine.sync_engine, "connect", prepare)
    return engine


def _identity(values: Mapping[str, Any]) -> tuple[str, int]:
    return values["row_key"], values["attempt"]


def _record(text: str) -> RunRecord:
    return RunRecord.model_validate_json(text)


def _short(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0][:300]
