"""Writes of attempts in groups: what comes in while one commit is under way goes into the next one together.

What the ledger says of an attempt never goes backwards. A write is made only where it follows from what is there, in
the statement that makes it: it may land late, after others have written, and nobody can call it back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic_core import to_json
from sqlalchemy import ColumnElement, Connection, TextClause, literal_column, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.batches.database import Database, attempts, rows, short
from prefect_crew.exceptions import LedgerError

T = TypeVar("T")
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


class GroupWriter:
    """Writes attempts of one batch; one event loop.

    Attributes:
        retry_for: Seconds for which a database that is away is tried again, before LedgerError.
        commits, writes: How many there were. `seconds`: how long the commits took, in all.
    """

    def __init__(self, database: Database, batch: str) -> None:
        self._database = database
        self._batch = batch
        self._statements = _ON_SQLITE if database.path is not None else _ON_POSTGRESQL
        self.retry_for = 120.0
        self.commits = 0
        self.writes = 0
        self.seconds = 0.0
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
                any.
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
        started = time.monotonic()
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
        self.seconds += time.monotonic() - started
        for write in group:
            if not write.done.done():
                write.done.set_result(write in made)

    async def keep_trying(self, work: Callable[[Connection], T], what: str) -> T:
        """Do something in the database that can be done twice, and try again while it is away.

        Args:
            work: What is done, in a transaction of its own.
            what: What cannot be done until then, for the log: "read" or "written".

        Raises:
            SQLAlchemyError, OSError: It could not be done for `retry_for` seconds, or never can.
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
        for turn in _turns(group):
            for statement, is_claim in ((self._statements.claim, True), (self._statements.change, False)):
                writes = {write.identity: write for write in turn if write.is_claim is is_claim}
                if writes:
                    values = to_json([[write.values[name] for name in _GIVEN] for write in writes.values()]).decode()
                    done: Any = connection.execute(statement, {"writes": values})
                    made |= {writes[key, attempt] for key, attempt in done}
        if made:
            keys = to_json(sorted({write.values["row_key"] for write in made})).decode()
            connection.execute(self._statements.follow, {"batch": self._batch, "keys": keys}).close()
        return made

    def follow_rows(self, connection: Connection, keys: Sequence[str]) -> None:
        """Have some rows be in the state of the attempt that counts."""
        connection.execute(
            self._statements.follow, {"batch": self._batch, "keys": to_json(list(keys)).decode()}
        ).close()


def _turns(writes: Iterable[_Write]) -> list[list[_Write]]:
    """Return writes in turns, so that those of one attempt are made in their order."""
    turns: list[dict[tuple[str, int], _Write]] = []
    for write in writes:
        turn = next((turn for turn in turns if write.identity not in turn), None)
        if turn is None:
            turns.append(turn := dict[tuple[str, int], _Write]())
        turn[write.identity] = write
    return [list(turn.values()) for turn in turns]


def _is_transient(error: Exception) -> bool:
    """Return whether a database may be back in a while: one that restarts, is locked, or whose disk is full."""
    if isinstance(error, DBAPIError):
        if "no such" in str(error.orig):  # SQLite's word for a table or a column that is not there
            return False
        return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
    return isinstance(error, OSError)


_COLUMNS = ("batch", "row_key", "attempt", "phase", "state", "kickoff", "owner", "seconds", "usage", "record")
_GIVEN = (*_COLUMNS, "good_for", "mine", "was")
_TYPES = {
    "attempt": "integer",
    "seconds": "double precision",
    "usage": "json",
    "good_for": "double precision",
    "mine": "integer",
}
_CHANGING = ("phase", "state", "kickoff", "seconds", "usage", "record")

_FOLLOWS = """
    CASE a.phase
        WHEN 'claimed' THEN new_mine = 1 OR (new_phase <> 'claimed' AND coalesce(a.posts_until, 0) <= {clock})
        WHEN 'not-started' THEN new_phase IN ('not-started', 'started', 'ended')
        WHEN 'uncertain' THEN new_phase NOT IN ('claimed', 'not-started') OR
            (new_phase = 'not-started' AND coalesce(a.posts_until, 0) <= {clock})
        ELSE new_phase IN (a.phase, 'ended') AND coalesce(a.kickoff, '') = coalesce(new_kickoff, '')
    END
"""
"""Whether a write may follow what is there. The age of a claim is told by the database's clock alone: a kickoff whose
sender knows it to be uncertain may be on its way as long as any other."""


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
        RETURNING row_key, attempt
    """  # noqa: S608
    # The attempt that counts is the last one that is, or may be, a kickoff, and else the last one.
    follow = f"""
        UPDATE {rows.name} SET (attempt, state) = (
            SELECT a.attempt, a.state FROM {attempts.name} AS a
            WHERE a.batch = {rows.name}.batch AND a.row_key = {rows.name}.row_key
            ORDER BY CASE a.phase WHEN 'not-started' THEN 1 ELSE 0 END, a.attempt DESC LIMIT 1
        ) WHERE batch = :batch AND row_key IN ({keys})
    """  # noqa: S608
    return _Statements(text(claim), text(change), text(follow))


_SQLITE_CLOCK = "((julianday('now') - 2440587.5) * 86400.0)"
_POSTGRESQL_CLOCK = "extract(epoch FROM clock_timestamp())"


def _on_sqlite() -> _Statements:
    columns = ", ".join(f"json_extract(value, '$[{at}]') AS new_{name}" for at, name in enumerate(_GIVEN))
    return _statements(
        writes=f"SELECT {columns} FROM json_each(:writes)",  # noqa: S608
        keys="SELECT value FROM json_each(:keys)",
        clock=_SQLITE_CLOCK,
    )


def _on_postgresql() -> _Statements:
    values = [f"CAST(value ->> {at} AS {_TYPES.get(name, 'text')})" for at, name in enumerate(_GIVEN)]
    columns = ", ".join(f"{value} AS new_{name}" for value, name in zip(values, _GIVEN, strict=True))
    return _statements(
        writes=f"SELECT {columns} FROM json_array_elements(CAST(:writes AS json)) AS value",  # noqa: S608
        keys="SELECT json_array_elements_text(CAST(:keys AS json))",
        clock=_POSTGRESQL_CLOCK,
    )


_ON_SQLITE, _ON_POSTGRESQL = _on_sqlite(), _on_postgresql()


def seconds_left(database: Database) -> ColumnElement[float]:
    """Return the column of for how many more seconds a kickoff may be sent or on its way, by the database's clock."""
    clock = _SQLITE_CLOCK if database.path is not None else _POSTGRESQL_CLOCK
    return attempts.c.posts_until - literal_column(clock)
