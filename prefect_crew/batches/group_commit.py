"""Writes of attempts in groups: what comes in while one commit is under way goes into the next one together.

What stands in the ledger never goes backwards. A write is made only where it follows from what stands there, in the
statement that makes it: it may land late, after others have written, and nobody can call it back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic_core import to_json
from sqlalchemy import ColumnElement, Connection, TextClause, literal_column, select, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.batches.database import Database, attempts, short
from prefect_crew.exceptions import LedgerError

T = TypeVar("T")
KEYS_AT_ONCE = 400
"""Row keys a query: an SQLite of old takes 999 bound values."""
SOON = 0.05
"""Seconds that a write which nobody hurries may wait for company."""
LINGER = 40.0
"""Seconds for which a cancelled writer waits for more: longer than a kickoff that is cancelled is seen to its end."""


@dataclass(slots=True, eq=False)
class _Write:
    """One write that waits for its commit.

    `values` are those of a row of the table, and besides `good_for`, for how many more seconds a claim may be posted,
    `mine`, whether whoever writes has claimed it, and `was`, the phase that alone it may replace, None for any.
    """

    values: dict[str, Any]
    new: bool
    done: asyncio.Future[bool] = field(repr=False)


class GroupWriter:
    """Writes attempts of one batch; one event loop.

    Attributes:
        patience: Seconds for which a database that is away is tried again, before LedgerError.
        commits, writes: How many there were. `seconds`: how long the commits took, in all.
    """

    def __init__(self, database: Database, batch: str) -> None:
        self._database = database
        self._batch = batch
        self.patience = 120.0
        self.commits = 0
        self.writes = 0
        self.seconds = 0.0
        self._pending: list[_Write] = []
        self._wake = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._cancelled = False

    def start(self) -> None:
        """Begin to write, on the running loop."""
        self._task = asyncio.create_task(self._write_on())

    async def close(self) -> None:
        """Write what is left, and end."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    async def put(self, values: dict[str, Any], *, new: bool, urgent: bool = True) -> bool:
        """Write a row of the table, and return once it is on disk whether it was written.

        It is not where somebody else's claim stands in its place, or what stands there is later than it.

        Args:
            values: All columns but `posts_until`; `good_for`, `mine` and `was`.
            new: Whether it claims its place; else it replaces what stands there.
            urgent: Whether a commit is begun for it; else it goes with the next one, or with one of its own soon.

        Raises:
            LedgerError: It could not be written for `patience` seconds, or nobody writes any more.
        """
        if self._task is None or self._task.done():
            raise LedgerError("is closed.", ledger=self._database.address)
        write = _Write(values, new, asyncio.get_running_loop().create_future())
        self._pending.append(write)
        if urgent:
            self._wake.set()
        elif self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(SOON, self._wake.set)
        # Whoever is cancelled here leaves the write to its commit: only the answer is not waited for any more.
        return await write.done

    async def _write_on(self) -> None:
        """Write until `close`, also when this task is cancelled with all others, as at the end of a process.

        What is to be written then matters most: the ids of kickoffs whose POST was just answered.
        """
        while not self._closing or self._pending:
            if not await self._something_to_write():
                return
            group, self._pending = self._pending, []
            if group:
                await self._written(group)

    async def _something_to_write(self) -> bool:
        """Wait for a write, or for `close`; False if this task was cancelled and nobody has come for long."""
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
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        return True

    async def _written(self, group: Sequence[_Write]) -> None:
        started = time.monotonic()
        while True:
            try:
                refused = await self._commit_or_try_again(group)
                break
            except asyncio.CancelledError:
                self._cancelled = True  # nobody knows whether it was committed: it can be made again
            except (SQLAlchemyError, OSError) as error:
                failure = LedgerError(f"cannot be written: {short(error)}.", ledger=self._database.address)
                for write in group:
                    if not write.done.done():
                        write.done.set_exception(failure)
                        write.done.exception()  # whoever was cancelled does not read it
                return
        self.commits += 1
        self.writes += len(group)
        self.seconds += time.monotonic() - started
        for write in group:
            if not write.done.done():
                write.done.set_result(write not in refused)

    async def _commit_or_try_again(self, group: Sequence[_Write]) -> set[_Write]:
        """Commit a group and return the writes of it that were not made, also over a database that is away.

        A commit of which nobody knows whether it took place can be made again: a claim that stands is known by its
        owner, and an update follows from itself.
        """
        return await self.keep_trying(lambda connection: self._commit(connection, group), "written")

    async def keep_trying(self, work: Callable[[Connection], T], what: str) -> T:
        """Do something in the database that can be done twice, and try again while it is away.

        Args:
            work: What is done, in a transaction of its own.
            what: What cannot be done meanwhile, for the log: "read" or "written".

        Raises:
            SQLAlchemyError, OSError: It could not be done for `patience` seconds, or never can.
        """
        loop = asyncio.get_running_loop()
        until, delay, told = loop.time() + self.patience, 0.5, False
        while True:
            try:
                return await self._database.run(work)
            except (DBAPIError, OSError) as error:
                if not _may_pass(error) or loop.time() + delay > until:
                    raise
                if not told:
                    told = True
                    run_logger().warning(
                        "The ledger %s cannot be %s (%s). The batch stands still; it is tried again for %.0f s.",
                        *(self._database.address, what, short(error), self.patience),
                    )
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    def _commit(self, connection: Connection, group: Sequence[_Write]) -> set[_Write]:
        insert, update = _IN_FILE if self._database.path is not None else _ON_SERVER
        new = [write for write in group if write.new]
        refused = self._made(connection, insert, new, ("owner", "phase")) if new else set[_Write]()
        for turn in _turns(write for write in group if not write.new):
            refused |= self._made(connection, update, turn, ("record",))
        return refused

    def _made(
        self, connection: Connection, statement: TextClause, writes: Sequence[_Write], same: Sequence[str]
    ) -> set[_Write]:
        """Make some writes, and return those in whose places something else stands, by the columns `same`."""
        rows = to_json([[write.values[name] for name in _GIVEN] for write in writes]).decode()
        if connection.execute(statement, {"rows": rows}).rowcount == len(writes):  # nearly always
            return set()
        keys = [write.values["row_key"] for write in writes]
        found: dict[tuple[str, int], tuple[Any, ...]] = {}
        for start in range(0, len(keys), KEYS_AT_ONCE):
            query = select(attempts.c.row_key, attempts.c.attempt, *(attempts.c[name] for name in same)).where(
                attempts.c.batch == self._batch, attempts.c.row_key.in_(keys[start : start + KEYS_AT_ONCE])
            )
            rows_found: Any = connection.execute(query)
            for key, attempt, *standing in rows_found:
                found[key, attempt] = tuple(standing)
        return {
            write
            for write in writes
            if found.get(_identity(write.values)) != tuple(write.values[name] for name in same)
        }


def _turns(writes: Iterable[_Write]) -> list[list[_Write]]:
    """Return writes in turns, so that those of one attempt are made in their order."""
    turns: list[dict[tuple[str, int], _Write]] = []
    for write in writes:
        identity = _identity(write.values)
        turn = next((turn for turn in turns if identity not in turn), None)
        if turn is None:
            turns.append(turn := dict[tuple[str, int], _Write]())
        turn[identity] = write
    return [list(turn.values()) for turn in turns]


def _may_pass(error: Exception) -> bool:
    """Return whether a database may be back in a while: one that restarts, is locked, or whose disk is full."""
    if isinstance(error, DBAPIError):
        if "no such" in str(error.orig):  # SQLite's word for a table or a column that is not there
            return False
        return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
    return isinstance(error, OSError)


_COLUMNS = ("batch", "row_key", "attempt", "phase", "state", "kickoff", "owner", "seconds", "usage", "record")
_GIVEN = (*_COLUMNS, "good_for", "mine", "was")
_NUMBERS = {"attempt": "integer", "seconds": "double precision", "good_for": "double precision", "mine": "integer"}
_CHANGING = ("phase", "state", "kickoff", "seconds", "usage", "record")

_FOLLOWS = """
    CASE stands.phase
        WHEN 'claimed' THEN now.mine = 1 OR (now.phase <> 'claimed' AND coalesce(stands.posts_until, 0) <= {clock})
        WHEN 'not-started' THEN now.phase IN ('not-started', 'started', 'ended')
        WHEN 'uncertain' THEN now.phase NOT IN ('claimed', 'not-started') OR
            (now.phase = 'not-started' AND coalesce(stands.posts_until, 0) <= {clock})
        ELSE now.phase IN (stands.phase, 'ended') AND coalesce(stands.kickoff, '') = coalesce(now.kickoff, '')
    END
"""
"""Whether `now` may follow what stands there. The age of a claim is told by the database's clock alone: a kickoff whose
sender knows it to be uncertain may be on its way as long as any other."""


def _statements(rows: str, clock: str) -> tuple[TextClause, TextClause]:
    """Return what claims and what changes attempts, for a database whose way to take rows, and whose clock, these are.

    A whole group is one value. In SQLite a statement a row would give Python's lock away and take it again for each,
    which costs a busy event loop more than the writing does.
    """
    until = f"CASE now.phase WHEN 'claimed' THEN {clock} + coalesce(now.good_for, 0)"
    insert = (
        f"INSERT INTO {attempts.name} ({', '.join(_COLUMNS)}, posts_until) "  # noqa: S608
        f"SELECT {', '.join(f'now.{name}' for name in _COLUMNS)}, {until} END FROM ({rows}) AS now WHERE true "
        "ON CONFLICT DO NOTHING"
    )
    update = (
        f"UPDATE {attempts.name} AS stands "  # noqa: S608
        f"SET {', '.join(f'{name} = now.{name}' for name in _CHANGING)}, "
        f"posts_until = {until} WHEN 'uncertain' THEN stands.posts_until END FROM ({rows}) AS now "
        "WHERE stands.batch = now.batch AND stands.row_key = now.row_key AND stands.attempt = now.attempt "
        "AND stands.owner = now.owner AND coalesce(now.was, stands.phase) = stands.phase "
        f"AND {_FOLLOWS.format(clock=clock)}"
    )
    return text(insert), text(update)


_CLOCK_IN_FILE = "((julianday('now') - 2440587.5) * 86400.0)"
_CLOCK_ON_SERVER = "extract(epoch FROM clock_timestamp())"
_TAKEN_IN_FILE = ", ".join(f"json_extract(value, '$[{at}]') AS {name}" for at, name in enumerate(_GIVEN))
_TAKEN_ON_SERVER = ", ".join(
    f"CAST(value ->> {at} AS {_NUMBERS.get(name, 'text')}) AS {name}" for at, name in enumerate(_GIVEN)
)
_IN_FILE = _statements(
    f"SELECT {_TAKEN_IN_FILE} FROM json_each(:rows)",  # noqa: S608
    clock=_CLOCK_IN_FILE,
)
_ON_SERVER = _statements(
    f"SELECT {_TAKEN_ON_SERVER} FROM json_array_elements(CAST(:rows AS json)) AS value",  # noqa: S608
    clock=_CLOCK_ON_SERVER,
)


def seconds_left(database: Database) -> ColumnElement[float]:
    """Return the column of for how many more seconds a kickoff may be sent or on its way, by the database's clock."""
    clock = _CLOCK_IN_FILE if database.path is not None else _CLOCK_ON_SERVER
    return attempts.c.posts_until - literal_column(clock)


def _identity(values: Mapping[str, Any]) -> tuple[str, int]:
    return values["row_key"], values["attempt"]
