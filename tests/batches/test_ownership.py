"""One ledger has one owner, whatever name it is reached by, and whoever has lost it gets an error."""

from __future__ import annotations

import errno
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.batches.database import Database
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.ownership import BatchLock
from prefect_crew.exceptions import LedgerError


def held(database: Database) -> BatchLock:
    """Return a lock of batch b."""
    return BatchLock(database, "b")


# Names of one ledger


@pytest.mark.parametrize("linked", ["file", "folder"])
async def test_a_symlink_is_the_ledger_that_it_names(tmp_path: Path, linked: str):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "ledger.db", tmp_path / "link"
    link.symlink_to(real if linked == "file" else real.parent)
    named = link if linked == "file" else link / "ledger.db"
    async with Database(str(real)) as one, Database(str(named)) as two, held(one) as first, held(two) as second:
        assert await first.take()
        assert not await second.take()


async def test_a_ledger_with_a_second_name_is_refused(tmp_path: Path):
    path, other = tmp_path / "ledger.db", tmp_path / "other.db"
    async with Ledger(str(path), "b") as ledger:
        await ledger.enter(crew_url="u", fingerprint="f", total=3)
    os.link(path, other)
    for name in (path, other):
        with pytest.raises(LedgerError, match=r"has 2 names \(hard links\)"):
            async with Ledger(str(name), "b"):
                pass


async def test_a_ledger_that_is_mounted_as_a_single_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "ledger.db"
    monkeypatch.setattr("os.path.ismount", lambda one: one == path)  # as Docker does it with -v FILE:FILE
    with pytest.raises(LedgerError, match="is mounted as a single file"):
        async with Database(str(path)):
            pass


# Locks that are lost


async def test_a_lock_whose_file_was_removed_is_taken_anew_and_is_lost_if_somebody_else_has_it(tmp_path: Path):
    path = str(tmp_path / "ledger.db")
    async with Database(path) as one, Database(path) as two, held(one) as first, held(two) as second:
        assert await first.take()
        (file,) = tmp_path.glob("*.lock")
        file.unlink()
        assert await first.still_held(), "nobody else has taken it"
        assert not await second.take()
        file.unlink()
        assert await second.take()
        assert not await first.still_held()
        assert await second.still_held()


async def test_whoever_has_lost_a_lock_does_not_remove_the_file_of_another(tmp_path: Path):
    path = str(tmp_path / "ledger.db")
    async with Database(path) as one, Database(path) as two, held(two) as second:
        async with held(one) as first:
            assert await first.take()
            (file,) = tmp_path.glob("*.lock")
            file.unlink()
            assert await second.take()
        assert file.exists()
        assert await second.still_held()
    assert not file.exists()


@pytest.mark.parametrize("change", ["removed", "replaced"])
async def test_a_ledger_whose_file_is_another_is_held_no_more(tmp_path: Path, change: str):
    path = tmp_path / "ledger.db"
    async with Database(str(path)) as database, held(database) as lock:
        assert await lock.take()
        assert await lock.still_held()
        path.rename(tmp_path / "moved.db")
        if change == "replaced":
            path.write_bytes((tmp_path / "moved.db").read_bytes())
        assert not await lock.still_held()


# Where there are no locks


async def test_where_no_lock_can_be_had_it_is_said_and_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    async with Database(str(tmp_path / "ledger.db")) as database, held(database) as lock:
        with caplog.at_level(logging.WARNING):
            assert await lock.take()
        assert not lock.proves
        assert await lock.still_held()
    assert "cannot be locked here" in caplog.text


class Windows(types.ModuleType):
    """The part of Windows' `msvcrt` that locks are made with, over files that this process has open."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, file: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        stat = os.fstat(file)
        holder = self.held.setdefault((stat.st_dev, stat.st_ino), file)
        if holder != file:
            raise PermissionError(errno.EACCES, "Permission denied")


async def test_windows_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", Windows())
    path = str(tmp_path / "ledger.db")
    async with Database(path) as one, Database(path) as two, held(one) as first, held(two) as second:
        assert await first.take()
        assert first.proves
        assert not await second.take()


# PostgreSQL


CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


async def cut(database: Database) -> None:
    await database.run(lambda connection: connection.exec_driver_sql(CUT).close())


async def test_a_lost_connection_is_made_again_if_nobody_else_has_run_the_batch(postgres_address: str):
    async with Ledger(postgres_address, "b") as one, Ledger(postgres_address, "b") as two:
        await one.enter(crew_url="u", fingerprint="f", total=3)
        async with held(one.database) as first:
            assert await first.take()
            first.generation = await one.advance()
            await cut(two.database)
            assert await first.still_held()
            await cut(two.database)
            async with held(two.database) as second:
                assert await second.take()
                assert not await first.still_held()
        async with held(one.database) as first:
            assert await first.take()
            first.generation = await one.advance()
            await cut(two.database)
            async with held(two.database) as second:
                assert await second.take()
                await two.advance()
            assert not await first.still_held(), "somebody has run it, and has ended since"


class Pooled:
    """A connection of a pool that others use in between: PostgreSQL takes its users for one session."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    async def execution_options(self, **_: Any) -> Pooled:
        return self

    async def invalidate(self) -> None:
        return None

    async def close(self) -> None:
        return None


async def test_a_pooler_that_shares_sessions_is_refused(postgres_address: str, monkeypatch: pytest.MonkeyPatch):
    async with (
        Database(postgres_address) as one,
        Database(postgres_address) as two,
        Database(postgres_address) as other,
    ):
        connections = [await database.server.connect() for database in (one, other)]
        shared, elsewhere = [
            Pooled(await connection.execution_options(isolation_level="AUTOCOMMIT")) for connection in connections
        ]

        async def connect() -> Pooled:
            return shared

        for database in (one, two):
            monkeypatch.setattr(database, "server", types.SimpleNamespace(connect=connect, dispose=one.server.dispose))
        async with held(one) as first, held(two) as second:
            assert await first.take()
            with pytest.raises(LedgerError, match="pooler"):
                await second.take()
            assert await first.still_held()
            shared.connection, elsewhere.connection = elsewhere.connection, shared.connection
            assert not await first.still_held(), "it is asked of another session"
            shared.connection, elsewhere.connection = elsewhere.connection, shared.connection
        for connection in connections:
            await connection.close()
