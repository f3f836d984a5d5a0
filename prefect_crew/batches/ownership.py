"""A batch belongs to one ledger and one process: its name on the Prefect server, and its lock."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from prefect_crew._internal.prefect_api import request_soon
from prefect_crew.batches.database import ANSWER_WITHIN, KEEPALIVES, Database, batches, lock_key, short
from prefect_crew.batches.ledger import BatchEntry, Ledger
from prefect_crew.exceptions import LedgerError, LedgerMissingError
from prefect_crew.records.model import digest
from prefect_crew.runs.reviews.answer import ASKS

TAG = "prefect-crew-batch"
VERSION = 1
BEGIN_FOR = 60.0
"""Seconds for which a call tries to reach a Prefect API that does not answer or is busy, before its first row."""


def binding_name(batch: str) -> str:
    """Return the name of the Variable that binds a batch."""
    return f"crew_batch_{digest(batch)}"


async def read_binding(batch: str) -> dict[str, Any] | None:
    """Return the value of the Variable that binds a batch, with the address of its `ledger`; None without one."""
    async with get_client() as client:
        variable = await client.read_variable_by_name(binding_name(batch))
    if variable is None:
        return None
    return variable.value if isinstance(variable.value, dict) else {}


def check_bound(entry: BatchEntry | None, binding: dict[str, Any] | None, ledger: Ledger) -> None:
    """Make sure that a batch is bound to this ledger, and that the ledger is no older copy.

    Raises LedgerMissingError, LedgerError.
    """
    if binding is None:
        return
    if entry is None or binding.get("ledger_id") != entry.ledger_id:
        raise LedgerMissingError(name=ledger.batch, ledger=str(binding.get("ledger")))
    generation = binding.get("generation")
    if isinstance(generation, int) and entry.generation < generation:
        raise LedgerError(
            f"is an older copy: it has generation {entry.generation} of batch {entry.name!r}, and the Prefect server "
            f"knows {generation}. The copy lacks rows that were started since, so nothing was started.",
            ledger=ledger.address,
            advice=(
                "Use the newer ledger. If the newer ledger is lost, and its rows may start again, run: prefect "
                f"variable unset {binding_name(entry.name)}. Then run the batch with this ledger."
            ),
        )


async def bind(entry: BatchEntry, ledger: Ledger, public: str) -> None:
    """Bind a batch to its ledger, whose address without a password is `public`, unless it is bound already.

    Raises LedgerMissingError if the batch is bound to another ledger.
    """
    value: dict[str, Any] = {"version": VERSION, "batch": entry.name, "ledger_id": entry.ledger_id, "ledger": public}
    value |= {"crew_url": entry.crew_url, "generation": entry.generation}
    body = {"name": binding_name(entry.name), "value": value, "tags": [TAG]}
    async with get_client() as client:
        try:
            await client.request("POST", "/variables/", json=body)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 409:
                raise
    check_bound(entry, await read_binding(entry.name) or {}, ledger)


async def begin_generation(ledger: Ledger, public: str) -> int:
    """Begin and return the next generation of a bound batch, in its ledger and then on the Prefect server.

    A call begins one generation before it starts its first row. So later calls recognize an older copy of the ledger,
    but not a copy that is made during the call.

    Raises:
        LedgerError: The ledger cannot be written.
        LedgerMissingError: The batch is bound to another ledger by now.
        PREFECT_ERRORS: The Prefect API cannot be reached.
    """
    generation = await ledger.advance()
    entry = await ledger.entry()
    assert entry is not None  # noqa: S101  it was just written
    async with get_client() as client:
        variable = await client.read_variable_by_name(binding_name(ledger.batch))
        if variable is None:
            await bind(entry, ledger, public)
            return generation
        value = variable.value if isinstance(variable.value, dict) else {}
        if value.get("ledger_id") != entry.ledger_id:
            raise LedgerMissingError(name=ledger.batch, ledger=str(value.get("ledger")))
        body = {"value": {**value, "crew_url": entry.crew_url, "generation": generation}}
        # By its id: a new Variable with the same name is another one.
        await request_soon(client, "PATCH", f"/variables/{variable.id}", json=body, give_up_after=BEGIN_FOR)
    return generation


async def note_waiting_for_people(batch: str, waits: bool) -> None:
    """Tag the Variable of a batch if its rows wait for people, else untag it. `reviews ls` reads only tagged ones."""
    path = {"name": binding_name(batch)}
    async with get_client() as client:
        tags = [TAG, ASKS] if waits else [TAG]
        await client.request("PATCH", "/variables/name/{name}", path_params=path, json={"tags": tags})


class BatchLock:
    """The lock of one batch, as an async context manager: only its holder works on the batch.

    `generation` is the generation that the holder has begun; None before.
    """

    def __init__(self, database: Database, batch: str) -> None:
        self._database = database
        self._batch = batch
        self.generation: int | None = None
        # With SQLite it is a file next to the ledger, with PostgreSQL an advisory lock.
        ledger, name = database.path or Path(), digest(batch, 8)
        self._path = ledger.with_name(f"{ledger.name}.{name}.lock") if database.path else None
        self._file: int | None = None
        self._connection: Any = None

    async def __aenter__(self) -> BatchLock:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._file is not None and self._path is not None:
            if _is_at(self._file, self._path):
                with suppress(PermissionError):  # Windows removes no file that is open
                    self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
        await self._disconnect()

    async def take(self, *, after: float = 0.0) -> bool:
        """Wait `after` seconds and take the lock; False if it is held. Raises LedgerError if locks do not work here."""
        await asyncio.sleep(after)
        try:
            return await self._take_on_server() if self._path is None else self._take_file(self._path)
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(
                f"cannot be locked: {short(error)}.",
                ledger=self._database.address,
                advice="Put the ledger on a file system with locks, or use PostgreSQL.",
            ) from error

    async def is_taken(self) -> bool:
        """Return whether a process works on the batch, by taking its lock for a moment. Raises LedgerError."""
        async with BatchLock(self._database, self._batch) as probe:
            return not await probe.take()

    async def still_held(self) -> bool:
        """Return False if the lock was lost, and another process has taken over since, or may have done so."""
        if self._path is not None:
            return self._file is not None and _is_at(self._file, self._path) and self._database.is_in_place
        if self._connection is not None:
            with suppress(SQLAlchemyError, OSError):
                async with asyncio.timeout(ANSWER_WITHIN):
                    await self._connection.execute(text("SELECT 1"))
                return True
        return await self._take_again()

    async def _take_again(self) -> bool:
        """Take the lock again after its connection was lost; False if another process has run the batch since."""
        await self._disconnect()
        query = select(batches.c.generation).where(batches.c.name == self._batch)
        try:
            is_ours = await self._take_on_server()
            generation = (await self._connection.execute(query)).scalar()
        except (SQLAlchemyError, OSError):
            await self._disconnect()  # while the database cannot be reached, nobody claims a row either
            return True
        return is_ours and self.generation in (None, generation)

    def _take_file(self, path: Path) -> bool:
        while self._file is None:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _lock(file)
            except (BlockingIOError, PermissionError):
                os.close(file)
                return False
            if _is_at(file, path):
                self._file = file
            else:
                os.close(file)  # the holder before has removed it in between
        return True

    async def _take_on_server(self) -> bool:
        """Take an advisory lock in an open transaction, so that the lock stays ours, even through a pooler."""
        if self._connection is None:
            connection = await self._database.server.connect()
            self._connection = await connection.execution_options(isolation_level="READ COMMITTED")
            for setting, value in _SETTINGS.items():
                await self._connection.execute(text(f"SET LOCAL {setting} = {value}"))
        key = lock_key(f"prefect-crew/batch/{self._batch}\n")
        return bool((await self._connection.execute(text(_TRY_LOCK), {"key": key})).scalar())

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError, OSError):
                await connection.close()


_TRY_LOCK = "SELECT pg_try_advisory_xact_lock(:key)"
_SETTINGS = {**KEEPALIVES, "idle_in_transaction_session_timeout": 0}  # a process that works must not lose its lock


def _lock(file: int) -> None:
    """Lock an open file. Raises OSError; if another process has the lock, BlockingIOError or PermissionError."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the file at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False
