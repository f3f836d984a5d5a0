"""Writes of attempts in groups: what comes in while one commit is under way goes into the next one together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from sqlalchemy import Connection, bindparam, select, update
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from prefect_crew.batches.database import Database, LedgerError, attempts, short
from prefect_crew.logs import run_logger

__all__ = ["KEYS_AT_ONCE", "GroupWriter"]

KEYS_AT_ONCE = 400
"""Row keys a query: an SQLite of old takes 999 bound values."""
SOON = 0.05
"""Seconds that a write which nobody hurries may wait for company."""
LINGER = 40.0
"""Seconds for which a cancelled writer waits for more: longer than a kickoff that is cancelled is seen to its end."""


@dataclass(slots=True)
class _Write:
    """One write that waits for its commit. `values` are those of a row of the table."""

    values: dict[str, Any]
    new: bool
    done: asyncio.Future[bool] = field(repr=False)


class GroupWriter:
    """Writes attempts of one batch; one event loop.

    Attributes:
        patience: Seconds for which a database that is away is written to again, before LedgerError.
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
        """Write a row of the table and return once it is on disk.

        Args:
            values: All columns.
            new: Whether it claims its place; False is returned where another owner stands in it. Else it replaces what
                stands there.
            urgent: Whether a commit is begun for it; else it goes with the next one, or with one of its own soon.

        Raises:
            LedgerError: It could not be written for `patience` seconds.
        """
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
        except (TimeoutError, asyncio.TimeoutError):
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
                lost = await self._commit_or_try_again(group)
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
                write.done.set_result(not (write.new and _identity(write.values) in lost))

    async def _commit_or_try_again(self, group: Sequence[_Write]) -> set[tuple[str, int]]:
        """Commit a group and return which claims of it stand for somebody else, also over a database that is away.

        A commit of which nobody knows whether it took place can be made again: a claim that stands is known by its
        owner, and an update says the same twice.
        """
        loop = asyncio.get_running_loop()
        until, delay, told = loop.time() + self.patience, 0.5, False
        while True:
            try:
                return await self._database.run(lambda connection: self._commit(connection, group))
            except (DBAPIError, OSError) as error:
                if not _may_pass(error) or loop.time() + delay > until:
                    raise
                if not told:
                    told = True
                    run_logger().warning(
                        "The ledger %s cannot be written (%s). The batch stands still; it is tried again for %.0f s.",
                        self._database.address,
                        short(error),
                        self.patience,
                    )
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    def _commit(self, connection: Connection, group: Sequence[_Write]) -> set[tuple[str, int]]:
        new = [write.values for write in group if write.new]
        # The last write of an attempt is the one that counts: one caller owns it, and its writes are in order.
        changed = {_identity(write.values): write.values for write in group if not write.new}
        lost: set[tuple[str, int]] = set()
        in_file = self._database.path is not None
        if new:
            if in_file:
                inserted = connection.exec_driver_sql(_INSERT_IN_FILE, (_as_json(new),)).rowcount
            else:
                connection.execute(self._database.insert(attempts).on_conflict_do_nothing(), new)
                inserted = -1  # PostgreSQL's driver does not count them
            if inserted != len(new):  # nearly always all are new
                lost = self._lost(connection, new)
        if changed and in_file:
            connection.exec_driver_sql(_UPDATE_IN_FILE, (_as_json(changed.values()),))
        elif changed:
            connection.execute(_UPDATE, [_bound(values) for values in changed.values()])
        return lost

    def _lost(self, connection: Connection, new: Sequence[Mapping[str, Any]]) -> set[tuple[str, int]]:
        owners = {_identity(values): values["owner"] for values in new}
        keys = [key for key, _ in owners]
        lost: set[tuple[str, int]] = set()
        for start in range(0, len(keys), KEYS_AT_ONCE):
            query = select(attempts.c.row_key, attempts.c.attempt, attempts.c.owner).where(
                attempts.c.batch == self._batch, attempts.c.row_key.in_(keys[start : start + KEYS_AT_ONCE])
            )
            for key, attempt, owner in connection.execute(query):
                if owners.get((key, attempt), owner) != owner:
                    lost.add((key, attempt))
        return lost


def _may_pass(error: Exception) -> bool:
    """Return whether a database may be back in a while: one that restarts, is locked, or whose disk is full."""
    if isinstance(error, DBAPIError):
        return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
    return isinstance(error, OSError)


_CHANGING = ("phase", "state", "kickoff", "owner", "seconds", "usage", "record")
_UPDATE = (
    update(attempts)
    .where(
        attempts.c.batch == bindparam("b_batch"),
        attempts.c.row_key == bindparam("b_row_key"),
        attempts.c.attempt == bindparam("b_attempt"),
    )
    .values({name: bindparam(f"b_{name}") for name in _CHANGING})
)


# SQLite takes a whole group as one value. A statement a row would give Python's lock away and take it again for each,
# which costs a busy event loop more than the writing does.
_COLUMNS = tuple(column.name for column in attempts.columns)
_TAKEN = ", ".join(f"json_extract(value, '$[{number}]') AS {name}" for number, name in enumerate(_COLUMNS))
_INSERT_IN_FILE = (
    f"INSERT INTO {attempts.name} ({', '.join(_COLUMNS)}) SELECT {_TAKEN} FROM json_each(?) WHERE true "  # noqa: S608
    "ON CONFLICT DO NOTHING"
)
_UPDATE_IN_FILE = (
    f"UPDATE {attempts.name} SET {', '.join(f'{name} = now.{name}' for name in _CHANGING)} "  # noqa: S608
    f"FROM (SELECT {_TAKEN} FROM json_each(?)) AS now WHERE {attempts.name}.batch = now.batch "
    f"AND {attempts.name}.row_key = now.row_key AND {attempts.name}.attempt = now.attempt"
)


def _as_json(rows: Iterable[Mapping[str, Any]]) -> str:
    return to_json([[row[name] for name in _COLUMNS] for row in rows]).decode()


def _bound(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"b_{name}": value for name, value in values.items()}


def _identity(values: Mapping[str, Any]) -> tuple[str, int]:
    return values["row_key"], values["attempt"]
