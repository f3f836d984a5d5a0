"""Who works on a batch at this moment: one process for the whole of it, or a parent and its shards.

A lock goes with its holder: that of a file when the process ends, that of PostgreSQL when its connection breaks. So it
tells the dead from the living, and a claim in the ledger whose owner is dead need not be waited for.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from prefect_crew.api.errors import CrewError
from prefect_crew.batches.database import Database, LedgerError, short

__all__ = ["PARENT", "WHOLE", "BatchBusyError", "BatchLock"]

WHOLE = ""
"""The part that a process holds for the whole batch, and a parent and its shards share."""
PARENT = "parent"
"""The part of whoever watches over shards."""


class BatchBusyError(CrewError):
    """Another process works on the batch at this moment. Attributes: name."""

    def __init__(self, *, name: str, what: str = "") -> None:
        self.name = name
        super().__init__(
            f"{what or f'Batch {name!r}'} is being run by another process at this moment. Nothing was started here. "
            "Wait for it, or end it; the same name then goes on."
        )


class BatchLock:
    """The lock of one batch, as an async context manager: all that it holds is given back at its end."""

    def __init__(self, database: Database, batch: str) -> None:
        self._database = database
        self._batch = batch
        self._file: int | None = None
        self._path = Path()
        self._connection: Any = None
        self._held: dict[str, bool] = {}

    async def __aenter__(self) -> BatchLock:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close_file()
        if self._connection is not None:
            # Its locks go with it; back in the pool it would keep them.
            await self._connection.invalidate()
            await self._connection.close()
            self._connection = None

    async def take(self, part: str = WHOLE, *, shared: bool = False) -> bool:
        """Take the lock of a part of the batch, at once or not at all.

        Args:
            part: Any text; WHOLE is the batch itself, and the only one that a ledger in SQLite knows.
            shared: Whether others may share it, who take it shared too.

        Raises:
            LedgerError: The database cannot be reached.
        """
        if self._database.path is not None:
            return self._take_file(self._database.path)
        try:
            taken = await self._take_on_server(part, shared)
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(f"cannot be locked: {short(error)}.", ledger=self._database.address) from error
        if taken:
            self._held[part] = shared
        return taken

    async def give_back(self, part: str = WHOLE) -> None:
        """Give back the lock of one part. Only for PostgreSQL."""
        shared = self._held.pop(part, None)
        if shared is not None:
            await self._connection.execute(text(_function("unlock", shared)), {"key": self._key(part)})

    async def is_held(self, part: str) -> bool:
        """Return whether anybody holds a part, without taking it. Only for PostgreSQL.

        Raises:
            LedgerError: The database cannot be reached.
        """
        # A key of 64 bits stands there in two halves (PostgreSQL's documentation of pg_locks).
        query = text(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1 "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
            "AND ((classid::bigint << 32) | objid::bigint) = :key"
        )
        try:
            async with self._database.server.connect() as connection:
                return bool((await connection.execute(query, {"key": self._key(part)})).scalar())
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(f"cannot be read: {short(error)}.", ledger=self._database.address) from error

    async def still_held(self) -> bool:
        """Return False if a connection was lost, and somebody else has taken over meanwhile."""
        if self._connection is None:
            return True
        try:
            await self._connection.execute(text("SELECT 1"))
        except (SQLAlchemyError, OSError):
            held, self._held, self._connection = dict(self._held), {}, None
            try:
                taken = [await self._take_on_server(part, shared) for part, shared in held.items()]
            except (SQLAlchemyError, OSError):
                self._held, self._connection = held, _Gone()  # nobody else can take it either
                return True
            self._held = held
            return all(taken)
        return True

    # SQLite: a file beside the ledger.

    def _take_file(self, ledger: Path) -> bool:
        if self._file is not None:
            return True
        try:
            import fcntl
        except ImportError:  # Windows: nobody is kept out
            return True
        digest = hashlib.sha256(self._batch.encode()).hexdigest()[:8]
        path = ledger.with_name(f"{ledger.name}.{digest}.lock")
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                return False
            # Whoever held it before may have removed the file in between: then this lock is on nothing.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                self._file, self._path = file, path
                return True
            os.close(file)

    def _close_file(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    # PostgreSQL: advisory locks of a session of our own.

    async def _take_on_server(self, part: str, shared: bool) -> bool:
        if self._connection is None:
            connection = await self._database.server.connect()
            self._connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            # A machine that vanishes must not hold its locks for hours.
            for setting, seconds in (("idle", 30), ("interval", 10), ("count", 3)):
                await self._connection.execute(text(f"SET tcp_keepalives_{setting} = {seconds}"))
        answer = await self._connection.execute(text(_function("try", shared)), {"key": self._key(part)})
        return bool(answer.scalar())

    def _key(self, part: str) -> int:
        digest = hashlib.sha256(f"prefect-crew/batch/{self._batch}\n{part}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)


class _Gone:
    """Stands for a connection that was lost and could not be made again yet."""

    async def execute(self, *_: object) -> None:
        raise OSError("the connection is gone")

    async def invalidate(self) -> None:
        return None

    async def close(self) -> None:
        return None


def _function(verb: str, shared: bool) -> str:
    name = "pg_try_advisory_lock" if verb == "try" else "pg_advisory_unlock"
    return f"SELECT {name}{'_shared' if shared else ''}(:key)"
