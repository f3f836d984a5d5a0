"""A store whose file, server, process or callers meet bad luck."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import tempfile
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from prefect_crew.exceptions import ConfigurationError, StoreError
from prefect_crew.store import database
from prefect_crew.store.attempts import begin, ended, look, of_key, started
from prefect_crew.store.database import Store, Transaction, mount_kind, transaction
from prefect_crew.store.decision import AttemptState, Step
from prefect_crew.store.schema import METADATA, attempts
from support.crew_database import begun, in_flight, request
from support.postgres import Postgres
from support.waiting import LIMIT, soon, until


class Fork(multiprocessing.get_context("fork").Process):
    """A forked process that keeps the text of its error, since pytest shows nothing of it.

    It ends without Python's hooks: those of Prefect, if an earlier test has used it, fail in a child on Python 3.11.
    """

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        super().__init__(target=target, args=args)
        self._error = Path(tempfile.mkdtemp()) / "error"
        self._error.touch(mode=0o666)
        self._error.parent.chmod(0o755)

    def run(self) -> None:
        try:
            super().run()
        except BaseException:
            self._error.write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)

    @property
    def outcome(self) -> tuple[int | None, str]:
        """Its exit code, and the text of its error."""
        self.join()
        return self.exitcode, self._error.read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file of `file_store` is."""
    return tmp_path / "folder" / "crew.db"


@pytest.fixture
def file_store(path: Path) -> Iterator[Store]:
    """A store in a file, which does not exist yet."""
    store = Store(f"sqlite:///{path}")
    yield store
    store.close()


# The address


@pytest.mark.parametrize(
    "url", ["crew.db", "sqlite://", "sqlite:///:memory:", "mysql://host/x", "postgresql://u:p@ss@h/x"]
)
def test_what_is_no_address_is_refused_without_its_password(url: str):
    with pytest.raises(ConfigurationError, match=r"The URL of the crew database (is no|has a second)") as error:
        Store(url)
    assert "p@ss" not in str(error.value)
    assert "ss@h" not in str(error.value)


def test_the_address_for_people_has_no_password():
    store = Store("postgresql+asyncpg://crew:s3cret@db.test:5433/crews?ssl=require")
    assert store.where == "postgresql://db.test:5433/crews"
    assert "s3cret" not in repr(vars(store))


MOUNTS = """
22 1 259:1 / / rw,relatime - ext4 /dev/root rw
30 22 0:40 / /srv rw,relatime shared:1 - nfs4 server:/export rw
31 30 0:41 / /srv/local rw - ext4 /dev/sdb rw
32 22 0:42 / /with\\040blank rw - fuse.sshfs someone@host: rw
33 22 0:43 / /twice rw - ext4 /dev/sdc rw
34 22 0:44 / /twice rw master:2 - virtiofs share rw
not a line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/crew.db", "ext4"),
        ("/srv/crew.db", "nfs4"),
        ("/srvs/crew.db", "ext4"),
        ("/srv/local/crew.db", "ext4"),
        ("/with blank/crew.db", "fuse.sshfs"),
        ("/twice/crew.db", "virtiofs"),
    ],
)
def test_the_mount_of_a_file_is_the_longest_and_last(path: str, kind: str):
    assert mount_kind(path, MOUNTS) == kind
    assert mount_kind(path, "") == ""


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "9p", "fuse.sshfs"])
async def test_a_network_mount_is_refused(file_store: Store, path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr(database, "mount_kind", lambda *_: kind)
    with pytest.raises(StoreError, match=re.escape(f"is on a network mount ({kind})")):
        await file_store.run(look, request())
    assert not path.exists()


async def test_a_shared_mount_is_warned_of_once(
    file_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(database, "mount_kind", lambda *_: "virtiofs")
    for key in "ab":
        await file_store.run(begin, request(key))
    assert len([record for record in caplog.records if "virtiofs" in record.message]) == 1


# The file


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777], ids=oct)
async def test_only_its_owner_reads_the_files(file_store: Store, path: Path, umask: int):
    path.parent.mkdir()
    before = os.umask(umask)
    try:
        await file_store.run(begin, request())
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"crew.db": 0o600, "crew.db-wal": 0o600, "crew.db-shm": 0o600}


@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_a_file_that_is_gone_takes_no_more_records(file_store: Store, path: Path, how: str):
    await file_store.run(begin, request())
    path.unlink()
    if how == "replaced":
        path.write_bytes(b"")
    with pytest.raises(StoreError, match=r"was removed or replaced .* Nothing was started\.") as error:
        await file_store.run(begin, request("other"))
    assert (error.value.operation, error.value.started) == ("begin", "no")
    assert how == "replaced" or not path.exists()


async def test_a_file_of_something_else_is_left_alone(file_store: Store, path: Path):
    path.parent.mkdir()
    path.write_text("dear diary " * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        await file_store.run(look, request())
    assert path.read_text().startswith("dear diary")


async def test_a_file_with_two_names_is_refused(file_store: Store, path: Path):
    path.parent.mkdir()
    path.touch()
    (path.parent / "other.db").hardlink_to(path)
    with pytest.raises(StoreError, match="has two names"):
        await file_store.run(look, request())


def use_as_nobody(path: str) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    store = Store(f"sqlite:///{path}")
    with pytest.raises(StoreError, match=r"cannot be used .*(readonly|denied|Permission)"):
        asyncio.run(store.run(begin, request()))
    store.close()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_place_that_cannot_be_written_is_an_error_in_a_sentence(what: str):
    folder = Path(tempfile.mkdtemp())
    path = folder / "crew.db"
    try:
        if what == "file":
            store = Store(f"sqlite:///{path}")
            asyncio.run(store.run(begin, request()))
            store.close()
            path.chmod(0o444)
        folder.chmod(0o555)
        process = Fork(use_as_nobody, str(path))
        process.start()
        assert process.outcome == (0, "")
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


async def test_a_locked_file_is_waited_for_and_then_given_up(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(database, "LOCK_WITHIN", 1.0)
    store = Store(f"sqlite:///{path}")
    attempt = await in_flight(store, request(), "id")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match=r"was locked by another process for 1 s\. The run was started") as error:
        await store.run(ended, attempt, "id", AttemptState.COMPLETED)
    assert error.value.started == "yes"
    assert (await store.run(look, request())).step is Step.REATTACH  # readers do not wait
    task = asyncio.create_task(store.run(ended, attempt, "id", AttemptState.COMPLETED))
    await asyncio.sleep(0.3)
    other.execute("COMMIT")
    other.close()
    assert await task
    store.close()


async def test_a_full_disk_is_an_error_in_a_sentence_and_takes_records_again(file_store: Store):
    pages: list[int] = []

    @sa.event.listens_for(file_store._engine, "connect")
    def limit(connection: sqlite3.Connection, _: object) -> None:
        connection.execute(f"PRAGMA max_page_count={pages[-1] if pages else 2**30}").close()

    attempt = await in_flight(file_store, request(), "id")
    pages.append(1)  # as many as there are
    file_store.close()
    result = "x" * 1_000_000
    with pytest.raises(StoreError, match=r"disk is full\)\. The run was started and goes on\.") as error:
        await file_store.run(ended, attempt, "id", AttemptState.COMPLETED, result=result)
    assert error.value.started == "yes"
    with pytest.raises(StoreError, match=r"disk is full\)\. Nothing was started\."):
        await asyncio.gather(*(file_store.run(begin, request(f"{number}")) for number in range(100)))
    assert (await file_store.run(look, request())).step is Step.REATTACH
    pages.append(2**30)
    assert await file_store.run(ended, attempt, "id", AttemptState.COMPLETED, result=result)


# Both databases


@contextmanager
def raw(url: str) -> Iterator[sa.Connection]:
    """A connection of somebody else."""
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        yield connection


async def test_tables_of_another_version_are_refused(database_url: str):
    store = Store(database_url)
    await store.registration()
    store.close()
    with raw(database_url) as connection:
        connection.exec_driver_sql("UPDATE crew_store SET version = version + 1")
    later = Store(database_url)
    try:
        for _ in range(2):
            with pytest.raises(StoreError, match=r"has version 3 of its tables, and this prefect-crew knows version 2"):
                await later.run(begin, request())
    finally:
        later.close()
        with raw(database_url) as connection:
            connection.exec_driver_sql("UPDATE crew_store SET version = version - 1")


async def test_eight_stores_open_a_new_database_at_once(database_url: str):
    if database_url.startswith("postgresql"):
        with raw(database_url) as connection:
            METADATA.drop_all(connection)
    stores = [Store(database_url) for _ in range(8)]
    registrations = await asyncio.gather(*(store.registration() for store in stores))
    assert len({one.id for one in registrations}) == 1
    for store in stores:
        store.close()


async def test_of_transactions_that_are_committed_together_each_fails_for_itself(timed_store: Store):
    @transaction("write")
    def fail(transaction: Transaction) -> None:
        transaction.lock()
        transaction.connection.execute(sa.update(attempts).values(crew="changed"))
        raise ValueError("of its own")

    @transaction("write")
    def violate(transaction: Transaction) -> None:
        transaction.lock()
        transaction.connection.execute(sa.update(attempts).values(crew="changed"))
        transaction.connection.execute(sa.insert(attempts).values(id="no key"))

    await begun(timed_store, request("first"))
    works = [timed_store.run(begin, request(f"{number}")) for number in range(30)]
    works[10:10] = [timed_store.run(fail), timed_store.run(violate)]
    answers = await asyncio.gather(*works, return_exceptions=True)
    assert [type(one).__name__ for one in answers[10:12]] == ["ValueError", "StoreError"]
    assert all(getattr(one, "step", None) is Step.START for one in [*answers[:10], *answers[12:]])
    assert {one.crew for number in range(30) for one in await timed_store.run(of_key, f"{number}")} == {"travel"}


def test_one_store_serves_two_event_loops_and_threads(timed_store: Store):
    async def run(name: str) -> None:
        await asyncio.gather(*(in_flight(timed_store, request(f"{name} {number}")) for number in range(10)))

    threads = [threading.Thread(target=lambda name=name: asyncio.run(run(name))) for name in "abc"]
    for thread in threads:
        thread.start()
    asyncio.run(run("d"))
    for thread in threads:
        thread.join()
    steps = [asyncio.run(timed_store.run(look, request(f"{name} 9"))).step for name in "abcd"]
    assert steps == [Step.REATTACH] * 4


def test_an_event_loop_that_is_closed_does_not_hurt_the_store(timed_store: Store):
    free = threading.Event()

    @transaction("write")
    def wait(transaction: Transaction) -> None:
        transaction.lock()
        free.wait(LIMIT)

    async def leave() -> None:
        task = asyncio.create_task(timed_store.run(wait))
        await asyncio.sleep(0.1)
        assert not task.done()

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    loop.run_until_complete(leave())
    loop.close()
    free.set()
    assert asyncio.run(timed_store.run(look, request())).step is Step.START


def test_parent_and_child_of_a_fork_write_to_one_database(timed_store: Store):
    asyncio.run(timed_store.run(begin, request("before")))

    def write() -> None:
        asyncio.run(timed_store.run(begin, request("child")))
        allowed.wait(LIMIT)
        asyncio.run(timed_store.run(begin, request("child, after the parent has closed")))
        timed_store.close()

    allowed = multiprocessing.get_context("fork").Event()
    process = Fork(write)
    process.start()
    asyncio.run(timed_store.run(begin, request("parent")))
    timed_store.close()
    allowed.set()
    assert process.outcome == (0, "")
    for key in ("before", "child", "child, after the parent has closed", "parent"):
        assert len(asyncio.run(timed_store.run(of_key, key))) == 1, key


def die_in_transaction(url: str) -> None:
    @transaction("write")
    def die(transaction: Transaction) -> None:
        assert begin(transaction, request()).step is Step.START
        os._exit(9)

    asyncio.run(Store(url).run(die))


def test_a_process_that_dies_in_its_transaction_leaves_nothing_and_holds_up_nobody(database_url: str):
    process = Fork(die_in_transaction, database_url)
    process.start()
    assert process.outcome == (9, "")
    store = Store(database_url)
    assert asyncio.run(store.run(begin, request())).step is Step.START
    store.close()


# PostgreSQL


async def test_a_server_that_is_away_is_an_error_in_a_sentence():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = Store(f"postgresql://crew:s3cret@127.0.0.1:{port}/crews")
    with pytest.raises(StoreError, match=r"The crew database postgresql://127.* cannot be used \(.*refused") as error:
        await store.run(begin, request())
    assert (error.value.started, "s3cret" in str(error.value)) == ("no", False)
    store.close()


@pytest.mark.postgres
async def test_a_password_that_the_server_repeats_is_masked(empty_postgres: Callable[[], str]):
    url = re.sub(r":[^:@/]*@(.*)/crews$", r":s3%2Fcret@\1/s3%2Fcret", empty_postgres())
    store = Store(url)
    with pytest.raises(StoreError, match=r'database "\*\*\*" does not exist') as error:
        await store.run(begin, request())
    assert error.value.__cause__ is None
    store.close()


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("role", "problem"),
    [("wrong", "password authentication failed"), ("many", 'too many connections for role "many"')],
)
async def test_a_server_that_refuses_is_an_error_in_a_sentence(
    empty_postgres: Callable[[], str], role: str, problem: str
):
    url = empty_postgres()
    with raw(url) as connection:
        connection.exec_driver_sql(f"DROP ROLE IF EXISTS {role}")
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'another' CONNECTION LIMIT 0")
        rules = Path(str(connection.exec_driver_sql("SHOW hba_file").scalar_one()))
        if role == "wrong" and "all wrong " not in rules.read_text():
            rules.write_text(f"host all wrong 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
    store = Store(re.sub("//.*@", f"//{role}:s3cret@", url))
    with pytest.raises(StoreError, match=rf"cannot be used \(.*{problem}.*\)\. Nothing was started\.$") as error:
        await store.run(begin, request())
    assert (error.value.operation, error.value.started, "s3cret" in str(error.value)) == ("begin", "no", False)
    store.close()


@pytest.mark.postgres
async def test_a_server_that_stops_starts_nothing_and_is_used_again(postgres: Postgres):
    with Postgres(postgres.programs) as server:
        store = Store(server.create_database("crews").replace("+asyncpg", ""))
        attempt = await in_flight(store, request(), "id")
        server.process.stop(signal.SIGINT)
        with pytest.raises(StoreError, match=r"cannot be used \(.*\)\. Nothing was started\."):
            await store.run(begin, request("other"))
        with pytest.raises(StoreError, match=r"cannot be used \(.*\)\. The run was started and goes on\."):
            await store.run(ended, attempt, "id", AttemptState.COMPLETED)
        server.serve()
        assert (await store.run(look, request("other"))).step is Step.START
        assert await store.run(ended, attempt, "id", AttemptState.COMPLETED)
        server.process.stop(signal.SIGINT)
        server.serve()
        assert (await store.run(look, request())).step is Step.RETURN, "a connection of before is replaced"
        store.close()


@pytest.mark.postgres
async def test_an_unused_connection_is_closed(empty_postgres: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(database, "IDLE", 0.2)
    url = empty_postgres()
    store = Store(url)
    for key in "abc":
        await in_flight(store, request(key))

    def connections() -> int:
        with raw(url) as connection:
            count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'prefect-crew'"
            return connection.exec_driver_sql(count).scalar_one()

    await until(lambda: not connections(), "each is closed")
    assert (await store.run(look, request("other"))).step is Step.START
    store.close()


@asynccontextmanager
async def held_key(url: str) -> AsyncIterator[None]:
    """Hold the lock of the key `daily` in another store of the same database."""
    other, free, holds = Store(url), threading.Event(), threading.Event()

    @transaction("write")
    def hold(transaction: Transaction) -> None:
        transaction.lock("key:daily")
        holds.set()
        free.wait(LIMIT)

    holder = asyncio.create_task(other.run(hold))
    await asyncio.to_thread(holds.wait)
    yield
    free.set()
    await holder
    other.close()


@pytest.mark.postgres
async def test_a_key_whose_lock_is_held_elsewhere_holds_up_no_other_key(empty_postgres: Callable[[], str]):
    url = empty_postgres()
    store = Store(url)
    attempts_ = [await begun(store, request(f"begun {number}")) for number in range(31)]
    async with held_key(url):
        calls = [request() if number == 10 else request(f"{number}") for number in range(32)]
        begins = [asyncio.create_task(store.run(begin, call)) for call in calls]
        writes = [store.run(started, attempt, attempt.key, 1.0) for attempt in attempts_]
        stuck = begins.pop(10)
        await soon(asyncio.gather(*begins, *writes))
        assert not stuck.done()
    assert [(await task).step for task in [*begins, stuck]] == [Step.START] * 32
    store.close()


@pytest.mark.postgres
async def test_callers_that_wait_for_a_lock_do_not_hold_up_others(empty_postgres: Callable[[], str]):
    url = empty_postgres()
    store = Store(url)
    attempt = await begun(store, request("other"))
    async with held_key(url):
        waiting = [asyncio.create_task(store.run(begin, request())) for _ in range(20)]
        await asyncio.sleep(0.2)
        assert (await soon(store.run(started, attempt, "id", 1.0))).attempt is not None
        assert not any(task.done() for task in waiting)
    assert sorted({str((await task).step) for task in waiting}) == ["busy", "start"]
    store.close()
