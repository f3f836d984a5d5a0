"""Batches in a simulated world: their rows are turns of its session, and each has a ledger in a SQLite file.

The ledger, its locks and its SQL are real. A transaction takes no simulated time, and the process may die before its
commit, or before it knows of that.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from pydantic_core import from_json
from sqlalchemy import event

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.batches import run as run_module
from prefect_crew.batches.database import LedgerAddress
from prefect_crew.batches.dataset import open_dataset
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.ownership import BatchLock
from prefect_crew.batches.report import BatchReport
from prefect_crew.batches.run import BatchJob
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import RunRecord
from prefect_crew.records.resolve import resolve_never_started, resolve_started
from prefect_crew.records.sessions import note_given_up, note_over
from proof.sim.loop import current_process
from proof.sim.scenario import Call

if TYPE_CHECKING:
    from proof.sim.world import World

__all__ = ["Batches", "releasing"]

JULIAN_EPOCH = 2440587.5
"""The Julian day of 1970."""


class Batches:
    """The batches of one world, by their numbers."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._folder: str | None = None

    def path(self, number: int) -> Path:
        """Return the path of the ledger of a batch."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="proof-")
            weakref.finalize(self, shutil.rmtree, self._folder)
        return Path(self._folder) / f"{number}.db"

    async def run(self, call: Call, session: str | None) -> BatchReport:
        """Do what `run_batch` does inside of its flow."""
        name, path = f"b{call.key}", str(self.path(call.key))
        first = call.leaves if self.states(call.key) else 0
        rows = [{"id": f"r{row}", "topic": f"{name} r{row}", "who": session} for row in range(first, call.rows)]
        changes: Any = {"on_change": "continue"} if call.leaves else {}
        options = BatchOptions(key="id", session="who", max_in_flight=call.max_in_flight, breaker=None, **changes)
        address = LedgerAddress(path, path)
        job = BatchJob(self._world.crew, open_dataset(rows), options, name, f"{path}.jsonl", address)
        return await run_module._run_job(job, None)

    def attempts(self, idempotency_key: str) -> list[dict[str, Any]]:
        """Return the attempts at a row, as its ledger has them."""
        _, name, row = idempotency_key.split("/")
        query = "SELECT record, phase FROM crew_attempts WHERE row_key = ? ORDER BY attempt"
        return [{**from_json(record), "phase": phase} for record, phase in self._read(int(name[1:]), query, row)]

    def states(self, number: int) -> dict[str, str]:
        """Return the state of each row that a batch has reached, by its key."""
        return dict(self._read(number, "SELECT row_key, state FROM crew_rows"))

    def _read(self, number: int, query: str, *parameters: str) -> list[Any]:
        if not (path := self.path(number)).exists():
            return []
        with closing(sqlite3.connect(path)) as connection:
            try:
                return connection.execute(query, parameters).fetchall()
            except sqlite3.OperationalError:  # its process died before it made the tables
                return []

    async def resolve(self, number: int) -> None:
        """Resolve the uncertain rows of a batch that nobody runs, by what the crew's page shows, as far as allowed."""
        if not self._read(number, "SELECT 1 FROM crew_attempts WHERE phase IN ('claimed', 'uncertain') LIMIT 1"):
            return
        path, name = str(self.path(number)), f"b{number}"
        async with Ledger(path, name) as ledger, BatchLock(ledger.database, name) as lock:
            if not await lock.take():
                return
            ledger.is_exclusive = True
            for record in await ledger.unresolved():
                try:
                    await self._resolve(record, ledger)
                except CrewError:  # it is too early
                    continue
                with suppress(*PREFECT_ERRORS):
                    await note_over([record])
                    await note_given_up([record], ledger)
                self._world.resolved.append(record.idempotency_key)

    async def _resolve(self, record: RunRecord, ledger: Ledger) -> None:
        place = (record.idempotency_key, record.attempt)
        metas = {run.id: (run.meta["idempotency_key"], run.meta["run_attempt"]) for run in self._world.site.runs}
        if ids := [id_ for id_, meta in metas.items() if meta == place]:
            await resolve_started(record, ids[-1], ledger)
        else:
            await resolve_never_started(record, ledger)

    # In the place of parts of the package.

    def engine(self, make: Callable[[str], sa.Engine]) -> Callable[[str], sa.Engine]:
        """Return `make`, for ledgers whose clock is the world's and that need not survive a power cut."""

        def made(path: str) -> sa.Engine:
            engine = make(path)

            def prepare(connection: Any, _: Any) -> None:
                connection.execute("PRAGMA synchronous=OFF").close()
                connection.create_function("julianday", 1, lambda _: JULIAN_EPOCH + self._world.loop.wall() / 86400)

            event.listen(engine, "connect", prepare)
            return engine

        return made


def releasing(take: Callable[[BatchLock, Path], bool]) -> Callable[[BatchLock, Path], bool]:
    """Return `BatchLock._take_file`, for locks that are free once their process is dead."""

    def taken(lock: Any, path: Path) -> bool:
        is_taken, process = take(lock, path), current_process()

        def release() -> None:
            if lock._file is not None:
                os.close(lock._file)
                lock._file = None

        if is_taken and process is not None:
            process.at_death.append(release)
        return is_taken

    return taken
