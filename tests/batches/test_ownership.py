"""One ledger has one owner, whatever name it is reached by; an older copy of it is noticed."""

import errno
import os
import shutil
import sqlite3
import sys
import types
import uuid
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from prefect_crew._internal.flow_engine import HeldFlowRun
from prefect_crew._internal.prefect_api import held_flow_run
from prefect_crew.batches import ownership
from prefect_crew.batches.database import Database
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.ownership import BatchLock, binding_name, check_bound, read_binding
from prefect_crew.batches.stored import open_stored_batch
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import ConfigurationError, LedgerError
from support.batches import Batches, topics


def held(database: Database) -> BatchLock:
    return BatchLock(database, "b")


@pytest.mark.parametrize("linked", ["file", "folder"])
async def test_a_symlink_is_the_ledger_that_it_names(tmp_path: Path, linked: str):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "ledger.db", tmp_path / "link"
    link.symlink_to(real if linked == "file" else real.parent)
    named = link if linked == "file" else link / "ledger.db"
    async with Database(str(real)) as one, Database(str(named)) as two, held(one) as first, held(two) as second:
        assert await first.take()
        assert not await second.take()


async def test_a_ledger_of_two_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, other = tmp_path / "ledger.db", tmp_path / "other.db"
    async with Ledger(str(path), "b") as ledger:
        await ledger.enter(crew_url="u", fingerprint="f", total=3)
    os.link(path, other)
    for name in (path, other):
        with pytest.raises(LedgerError, match=r"has 2 names \(hard links\)"):
            async with Ledger(str(name), "b"):
                pass
    other.unlink()
    monkeypatch.setattr("os.path.ismount", lambda one: one == path)  # as Docker does it with -v FILE:FILE
    with pytest.raises(LedgerError, match="is mounted as a single file"):
        async with Database(str(path)):
            pass


async def test_a_lock_without_its_file_is_lost(tmp_path: Path):
    path = str(tmp_path / "ledger.db")
    async with Database(path) as one, Database(path) as two, held(two) as second:
        async with held(one) as first:
            assert await first.take()
            assert not await second.take()
            (file,) = tmp_path.glob("*.lock")
            file.unlink()
            assert await second.take()
            assert not await first.still_held()
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


async def test_where_no_lock_can_be_had_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    async with Database(str(tmp_path / "ledger.db")) as database, held(database) as lock:
        with pytest.raises(LedgerError, match=r"cannot be locked: .*No locks available.*use PostgreSQL"):
            await lock.take()


async def test_windows_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held_by: dict[tuple[int, int], int] = {}

    def locking(file: int, mode: int, count: int) -> None:
        assert mode == 2
        assert count == 1
        stat = os.fstat(file)
        if held_by.setdefault((stat.st_dev, stat.st_ino), file) != file:
            raise PermissionError(errno.EACCES, "Permission denied")

    path = str(tmp_path / "ledger.db")
    async with Database(path) as one, Database(path) as two, held(one) as first, held(two) as second:
        monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))  # type: ignore[arg-type]
        monkeypatch.setattr(sys, "platform", "win32")
        assert await first.take()
        assert not await second.take()
        monkeypatch.undo()


async def cut(database: Database) -> None:
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    end = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}"
    await database.run(lambda connection: connection.exec_driver_sql(end).close())


async def test_a_lost_connection_is_made_again(postgres_address: str):
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


async def test_a_lock_holds_for_its_transaction(postgres_address: str):
    async with Database(postgres_address) as one, Database(postgres_address) as two:
        async with held(one) as first, held(two) as second:
            assert await first.take()
            assert not await second.take()
            held_locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            assert await two.run(lambda connection: connection.exec_driver_sql(held_locks).scalar()) == 1
        async with held(two) as second:
            assert await second.take(), "it went with the transaction"


def copied(source: Path, target: Path) -> Path:
    """Copy a ledger as a snapshot does, also while it is in use."""
    with closing(sqlite3.connect(source)) as before, closing(sqlite3.connect(target)) as after:
        before.backup(after)
    return target


async def generation(name: str) -> int:
    bound = await read_binding(name)
    assert bound is not None
    return int(bound["generation"])


async def test_an_older_backup_is_refused(batch: Batches, echo: CrewServer, tmp_path: Path):
    server, name, ledger = echo, "restored", tmp_path / "out.jsonl.ledger.db"
    await batch(server.crew(), topics(6), name=name, max_kickoffs=2)
    backup = copied(ledger, tmp_path / "backup.db")
    assert (await batch(server.crew(), topics(6), name=name)).completed == 6
    at = await generation(name)
    assert (await batch(server.crew(), topics(6), name=name)).completed == 6
    assert await generation(name) == at, "a call that has nothing to start leaves it"
    newer = ledger.rename(tmp_path / "newer.db")
    shutil.copy(backup, ledger)
    with pytest.raises(LedgerError, match=r"out\.jsonl\.ledger\.db is an older copy: .*nothing was started") as refused:
        await batch(server.crew(), topics(6), name=name)
    assert f"prefect variable unset {binding_name(name)}" in str(refused.value)
    with pytest.raises(LedgerError, match="is an older copy"):
        async with open_stored_batch(name):
            pass
    assert server.kickoffs == 6
    # It may be anywhere; and the copy is the older one from then on.
    report = await batch(server.crew(), topics(7), name=name, ledger=str(newer), on_change="continue")
    assert report.completed == 7
    assert server.kickoffs == 7
    # A person who has read the warning takes the older one.
    async with get_client() as client:
        await client.delete_variable_by_name(binding_name(name))
    report = await batch(server.crew(), topics(6), name=name)
    assert report.completed == 6
    assert server.kickoffs == 11


class Killed(BaseException):
    """What is as sudden as SIGKILL."""


@pytest.mark.parametrize("point", ["before the ledger", "between ledger and server", "before the first row"])
async def test_a_dying_call_locks_nobody_out(
    batch: Batches, echo: CrewServer, monkeypatch: pytest.MonkeyPatch, point: str
):
    server, name = echo, f"dies {point}"
    await batch(server.crew(), topics(6), name=name, max_kickoffs=2)
    backup = copied(batch.folder / "out.jsonl.ledger.db", batch.folder / "backup.db")

    def dying(function: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        async def dies(*args: Any, **kwargs: Any) -> None:
            if after:
                await function(*args, **kwargs)
            raise Killed

        return dies

    with monkeypatch.context() as patch:
        if point == "before the first row":
            patch.setattr("prefect_crew.batches.run.begin_generation", dying(ownership.begin_generation, after=True))
        else:
            patch.setattr(Ledger, "advance", dying(Ledger.advance, after=point == "between ledger and server"))
        with pytest.raises(Killed):
            await batch(server.crew(), topics(6), name=name)
    assert server.kickoffs == 2
    async with Ledger(str(backup), name) as opened:
        refused = pytest.raises(LedgerError, match="is an older copy")
        with refused if point == "before the first row" else nullcontext():
            check_bound(await opened.entry(), await read_binding(name), opened)
    for _ in range(2):
        report = await batch(server.crew(), topics(6), name=name)
        assert report.completed == 6
        assert server.kickoffs == 6


async def test_a_new_ledger_in_a_file_is_refused_next_to_another_worker(batch: Batches, echo: CrewServer):
    pool, names = f"crews-{uuid.uuid4().hex[:8]}", [uuid.uuid4().hex for _ in range(2)]
    held_flow_run.set(HeldFlowRun(cast("Any", None), cast("Any", None), pool, "one"))
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name=pool, type="crew"))
        await client.send_worker_heartbeat(pool, "one", heartbeat_interval_seconds=300)
        await batch(echo.crew(), topics(1), name=names[0])
        await client.send_worker_heartbeat(pool, "two", heartbeat_interval_seconds=300)
    with pytest.raises(ConfigurationError, match=f"pool {pool} has a second worker, two, which could not continue"):
        await batch(echo.crew(), topics(1), name=names[1], export=str(batch.folder / "other.jsonl"))
    assert (await batch(echo.crew(), topics(1), name=names[0])).completed == 1, "it has found its ledger"
    assert echo.kickoffs == 1
