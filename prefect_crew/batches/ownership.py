"""A batch belongs to one ledger and one process: its name on the Prefect server, and its lock."""

from __future__ import annotations

import hashlib
import importlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from prefect_crew._internal.prefect_api import request_soon, run_logger
from prefect_crew.batches.database import Database, batches, short
from prefect_crew.batches.ledger import BatchEntry, Ledger
from prefect_crew.exceptions import LedgerError, LedgerMissingError
from prefect_crew.runs.reviews.answer import ASKS

TAG = "prefect-crew-batch"
VERSION = 1


def binding_name(batch: str) -> str:
    """Return the name of the Variable that binds a batch."""
    return f"crew_batch_{hashlib.sha256(batch.encode()).hexdigest()[:32]}"


async def read_entry(ledger: Ledger) -> BatchEntry | None:
    """Return what the ledger at hand knows of the batch, None if it is new. Raises LedgerMissingError, LedgerError."""
    entry, binding = await ledger.entry(), await read_binding(ledger.batch)
    if binding is not None:
        if entry is None or binding.get("ledger_id") != entry.ledger_id:
            raise LedgerMissingError(name=ledger.batch, ledger=str(binding.get("ledger")))
        check_age(entry, binding.get("generation"), ledger=ledger.address)
    return entry


async def bind(entry: BatchEntry, public: str) -> None:
    """Bind a batch to its ledger, whose address without a password is `public`, unless it is bound to it already.

    Raises:
        LedgerMissingError: It is bound to another ledger.
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
    bound = await read_binding(entry.name)
    if bound is None or bound.get("ledger_id") != entry.ledger_id:
        raise LedgerMissingError(name=entry.name, ledger=str((bound or {}).get("ledger")))


def check_age(entry: BatchEntry, known: Any, *, ledger: str) -> None:
    """Make sure that a ledger is not older than the generation that is `known` elsewhere, None for none.

    Raises LedgerError, with the address `ledger`.
    """
    generation, here = known if isinstance(known, int) else 0, entry.generation
    if here < generation:
        raise LedgerError(
            f"is an older copy: it has generation {here} of batch {entry.name!r}, and the Prefect server knows "
            f"{generation}. Rows that were started since are not in it, so nothing was started.",
            ledger=ledger,
            advice=(
                "Use the newer ledger. If that is lost, and its rows may be started again: prefect variable unset "
                f"{binding_name(entry.name)}, then run the batch with this one."
            ),
        )


async def begin_generation(ledger: Ledger, public: str, *, give_up_after: float) -> int:
    """Begin the next generation of a batch that is bound, in its ledger and then on the Prefect server; return it.

    `public` is as for `bind`; a Prefect API that is away or busy is asked again for `give_up_after` seconds.

    Raises:
        LedgerError: The ledger cannot be written.
        LedgerMissingError: The batch is bound to another ledger by now.
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    generation = await ledger.advance()
    entry = await ledger.entry()
    if entry is None:
        raise LedgerError("does not have the batch any more.", ledger=ledger.address)
    async with get_client() as client:
        variable = await client.read_variable_by_name(binding_name(ledger.batch))
        if variable is None:
            await bind(entry, public)
            return generation
        value = variable.value if isinstance(variable.value, dict) else {}
        if value.get("ledger_id") != entry.ledger_id:
            raise LedgerMissingError(name=ledger.batch, ledger=str(value.get("ledger")))
        body = {"value": {**value, "crew_url": entry.crew_url, "generation": generation}}
        # By its id: one that was made anew under the name is not this one.
        await request_soon(client, "PATCH", f"/variables/{variable.id}", json=body, give_up_after=give_up_after)
    return generation


async def read_binding(batch: str) -> dict[str, Any] | None:
    """Return what the Prefect server knows of a batch: `ledger`, where its ledger is, and `ledger_id`; None if nothing.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    async with get_client() as client:
        variable = await client.read_variable_by_name(binding_name(batch))
    if variable is None:
        return None
    value: Any = variable.value
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


async def note_waiting_for_people(batch: str, waits: bool) -> None:
    """Note on the Prefect server whether rows of a batch wait for people, so that not every ledger has to be opened.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    name = binding_name(batch)
    async with get_client() as client:
        variable = await client.read_variable_by_name(name)
        if variable is None or waits is (ASKS in variable.tags):
            return
        tags = [TAG, ASKS] if waits else [TAG]
        await client.request("PATCH", "/variables/name/{name}", path_params={"name": name}, json={"tags": tags})


class BatchLock:
    """The lock of one batch, as an async context manager: all that it holds is given back at its end.

    Attributes:
        proves: Whether holding it proves that nobody else works on the batch; False where there are no locks.
        generation: That of the batch, as its holder has last written it; None if the holder has written none.
    """

    def __init__(self, database: Database, batch: str) -> None:
        self._database = database
        self._batch = batch
        self.proves = True
        self.generation: int | None = None
        # Of SQLite: a file next to the ledger. Of PostgreSQL: an advisory lock of a session of our own.
        ledger, name = database.path or Path(), hashlib.sha256(batch.encode()).hexdigest()[:8]
        self._path = ledger.with_name(f"{ledger.name}.{name}.lock") if database.path else None
        self._file: int | None = None
        self._connection: Any = None
        self._session: int | None = None

    async def __aenter__(self) -> BatchLock:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close_file()
        if self._connection is not None:
            # Its locks go with it; back in the pool it would keep them.
            await self._connection.invalidate()
            await self._connection.close()
            self._connection = None

    async def take(self) -> bool:
        """Take the lock, at once or not at all. Raises LedgerError: the database cannot be reached."""
        try:
            return await self._take_on_server() if self._path is None else self._take_file(self._path)
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(f"cannot be locked: {short(error)}.", ledger=self._database.address) from error

    async def is_taken(self) -> bool | None:
        """Return whether anybody works on the batch, by taking its lock for a moment; None where nobody can tell.

        Raises:
            LedgerError: The database cannot be reached.
        """
        async with BatchLock(self._database, self._batch) as probe:
            taken = await probe.take()
            return not taken if probe.proves else None

    async def still_held(self) -> bool:
        """Return False if the lock was lost, and somebody else has, or may have, taken over since."""
        if self._path is not None:
            return self._file is not None and self._file_still_held(self._file, self._path)
        if self._session is None:
            return True
        if self._connection is not None:
            with suppress(SQLAlchemyError, OSError):
                return (await self._connection.execute(text(_SESSION))).scalar() == self._session
        return await self._take_again()

    async def _take_again(self) -> bool:
        """Take the lock of a connection that was lost once more; False if somebody has run the batch since."""
        self._connection = None
        query = select(batches.c.generation).where(batches.c.name == self._batch)
        try:
            taken = await self._take_on_server()
            generation = (await self._connection.execute(query)).scalar()
        except (SQLAlchemyError, OSError):
            self._connection = None  # nothing is claimed either while it is away
            return True
        return taken and self.generation in (None, generation)

    def _take_file(self, path: Path) -> bool:
        while self._file is None:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            locked = _try_lock(file)
            # Whoever held it before may have removed the file in between: then this lock is on nothing.
            if locked is not False and _is_at(file, path):
                self._file = file
                if locked is None:
                    self._warn()
                break
            os.close(file)
            if locked is False:
                return False
        return True

    def _warn(self) -> None:
        if self.proves:
            self.proves = False
            run_logger().warning(
                "The ledger %s cannot be locked here: this system, or its file system, has no locks. Make sure that no "
                "other process works on batch %s. A claim that another process made is waited for.",
                *(self._database.address, self._batch),
            )

    def _file_still_held(self, file: int, path: Path) -> bool:
        if not self._database.is_in_place:
            return False
        if _is_at(file, path):
            return True
        os.close(file)
        self._file = None
        with suppress(OSError):
            return self._take_file(path)
        return False

    def _close_file(self) -> None:
        if self._file is None or self._path is None:
            return
        if _is_at(self._file, self._path):
            with suppress(PermissionError):  # Windows removes no file that is open
                self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    async def _take_on_server(self) -> bool:
        if self._connection is None:
            connection = await self._database.server.connect()
            self._connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            # A machine that vanishes must not hold its locks for hours.
            for setting, seconds in (("idle", 30), ("interval", 10), ("count", 3)):
                await self._connection.execute(text(f"SET tcp_keepalives_{setting} = {seconds}"))
            # Two that are given one session, one after the other, would both be given its locks.
            if (await self._connection.execute(text(_HOLDER))).scalar():
                raise self._pooled()
            await self._connection.execute(text(_HOLD), {"holder": str(uuid4())})
            self._session = (await self._connection.execute(text(_SESSION))).scalar()
        answer = await self._connection.execute(text(_TRY_LOCK), {"key": self._key})
        taken, session = answer.one()
        if session != self._session:
            raise self._pooled()
        return bool(taken)

    def _pooled(self) -> LedgerError:
        return LedgerError(
            "is reached through a pooler that shares PostgreSQL's sessions, such as PgBouncer in transaction mode: a "
            "lock belongs to nobody there. Give the address of PostgreSQL itself, or of a pooler in session mode.",
            ledger=self._database.address,
        )

    @property
    def _key(self) -> int:
        digest = hashlib.sha256(f"prefect-crew/batch/{self._batch}\n".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)


_SESSION = "SELECT pg_backend_pid()"
_TRY_LOCK = "SELECT pg_try_advisory_lock(:key), pg_backend_pid()"
_HOLDER = "SELECT current_setting('prefect_crew.holder', true)"
_HOLD = "SELECT set_config('prefect_crew.holder', :holder, false)"


def _try_lock(file: int) -> bool | None:
    """Lock an open file; False if another process holds it, None where this system or its file system has no locks."""
    try:
        try:
            fcntl: Any = importlib.import_module("fcntl")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            msvcrt: Any = importlib.import_module("msvcrt")
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ImportError):
        return None
    return True


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False
