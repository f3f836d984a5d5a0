"""A batch by its name: its report, its failed rows, its export, and the arguments to call it again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

from prefect_crew.batches.dataset import whole_address
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.output import PAGE, open_output
from prefect_crew.batches.report import BatchReport, Tally
from prefect_crew.batches.rows import BadRow, BadRows
from prefect_crew.blocks import load_crew
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.runs.database import in_store
from prefect_crew.runs.owners import process_is_gone
from prefect_crew.runs.run import LiveRun, StoredResult, read_status
from prefect_crew.runs.stop import stop_once
from prefect_crew.states import CrewState
from prefect_crew.store import attempts, batches
from prefect_crew.store.batches import CONFLICT, HELD_FOR, Batch, Row
from prefect_crew.store.decision import PREPARING, Attempt, AttemptState

S = AttemptState
STOPS_AT_ONCE = 50
"""Requests to stop a run, at a time."""
NEEDS_PERSON = (S.UNCERTAIN, *PREPARING, S.FAILED, S.STOPPED, S.LOST, S.NOT_STARTED)


async def find_batch(name: str) -> StoredBatch:
    """Return a batch by its name. Raises ConfigurationError if there is none."""
    entry = await in_store(batches.get_batch, name)
    if entry is None or entry.is_going:
        raise ConfigurationError(f"There is no batch {name!r}. To list all batches, run: prefect-crew batch ls.")
    return StoredBatch(entry)


def bad_rows_of(batch: Batch) -> BadRows:
    """Return the rows of a batch that cannot be run."""
    known: Mapping[str, Any] = batch.bad_rows or {}
    rows = [BadRow(**row) for row in known.get("rows", ())]
    return BadRows(known.get("count", 0), rows)


def since_pass(batch: Batch) -> int:
    """Return the first pass whose rows count: the last one that read its whole data set. Rows that have left the data
    set since do not."""
    call: Mapping[str, Any] = batch.call or {}
    return call.get("whole_pass", 0)


async def pages_of(batch: Batch, session: CrewSession | None) -> AsyncIterator[Sequence[Row]]:
    """Yield the rows of a batch with their results, a page at a time. An open `session` reads results that the crew
    database does not keep, such as those of a crew whose `show` is not "full"."""
    after, since = (-1, ""), since_pass(batch)
    while page := await in_store(batches.read_rows, batch.name, after=after, with_results=True, limit=PAGE):
        after = page[-1].position, page[-1].row_key
        rows = [row for row in page if row.passes >= since]
        yield rows if session is None else await asyncio.gather(*(_with_result(row, session) for row in rows))


async def _with_result(row: Row, session: CrewSession) -> Row:
    if row.state is not S.COMPLETED or row.result is not None or row.is_conflict:
        return row
    attempt = await in_store(attempts.get, str(row.attempt_id))
    run = LiveRun(session, str(row.kickoff_id), attempt)
    if attempt is None or attempt.crew_url != run.crew.url or run.is_blind:
        return row
    with suppress(CrewError), withholding(run.redact_text):
        status = await read_status(run)
        if status.state is CrewState.COMPLETED:
            result = StoredResult.of(run.redact_status(status).result())
            return replace(row, result=result.model_dump(mode="json"))
    return row


def state_of(row: Row) -> str:
    """Return the word for the state of a row that has ended or was tried."""
    return CONFLICT if row.is_conflict else str(row.state).replace("_", "-")


@dataclass(frozen=True)
class StoredBatch:
    """A batch of the crew database, with its `entry` there."""

    entry: Batch

    @property
    def name(self) -> str:
        """Its name."""
        return self.entry.name

    @property
    def call(self) -> Mapping[str, Any]:
        """Its last call, as far as it could be stored."""
        return self.entry.call or {}

    async def is_running(self) -> bool:
        """Return whether a process runs the batch now."""
        entry = self.entry
        if entry.owner is None or (entry.process is not None and process_is_gone(entry.process)):
            return False
        return entry.owner_seen > await in_store(attempts.time_now) - HELD_FOR

    async def report(self) -> BatchReport:
        """Return its report as the crew database knows it: `kickoffs` are those of all calls."""
        entry, bad, is_running = self.entry, bad_rows_of(self.entry), await self.is_running()
        counts = await in_store(batches.count_rows, self.name, since_pass=since_pass(entry))
        use = await in_store(batches.use_of_batch, self.name)
        return BatchReport.of(
            *(counts, Tally(), bad, use),
            name=self.name,
            total=entry.total + bad.count,
            kickoffs=use.runs,
            export=self.call.get("export", ""),
            stopped=None if is_running else entry.stopped_because,
            phase="running" if is_running else "done",
        )

    async def failures(self, limit: int | None = None) -> list[Row]:
        """Return the rows that failed, are uncertain or are conflicts, up to `limit` of them."""
        found, after, running = list[Row](), (-1, ""), await self.is_running()
        while page := await in_store(batches.read_rows, self.name, after=after, states=NEEDS_PERSON, or_conflicts=True):
            after = page[-1].position, page[-1].row_key
            found += [
                row
                for row in page
                if row.passes >= since_pass(self.entry)
                and not (running and row.state in PREPARING)
                and (row.state is not S.NOT_STARTED or row.error is not None)
            ]
            if limit is not None and len(found) >= limit:
                break
        return found[:limit]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for `arun_batch` to continue it. Raises ConfigurationError if its last call could not be
        stored."""
        call = self.call
        if "crew" not in call:
            raise ConfigurationError(
                f"Batch {self.name!r} cannot be run by its name alone: its crew is not stored, its data set has no "
                "path or address, or an option is a function, an object of Python or a secret. Make the same call "
                "again, with the same name, which continues where the batch stopped."
            )
        return {name: call[name] for name in ("crew", "dataset", "export")} | {"name": self.name, **call["options"]}

    async def export(self, file: str | None = None, *, overwrite: bool = False) -> tuple[str, int]:
        """Write the batch's lines, also while it runs. Return the lines' address for people, and their number.

        Without `file`, the lines go to the export with which the batch last ran. A file that is not from this batch is
        replaced only with `overwrite`. Raises ConfigurationError, CrewError.
        """
        address = file or self.call.get("export")
        if address is None:
            raise ConfigurationError(f"The export of batch {self.name!r} is not on record. Name a file for it.")
        options = BatchOptions(**self.call.get("options", {}))
        target, whole = open_output(address, self.name, output_type=options.output_type), whole_address(address)
        await target.open()
        is_new = whole not in (self.entry.exported or ()) and not overwrite
        advice = "choose another, or replace it with overwrite=True (--overwrite)"
        await asyncio.to_thread(target.check, is_new=is_new, advice=advice, consequence="Nothing was written.")
        await in_store(batches.note_export, self.name, whole)
        entry: Batch | None = self.entry
        async with await self._session() or nullcontext() as session:
            while True:
                before = entry or self.entry
                counts = await target.write(pages_of(before, session), lambda: None)
                entry = await in_store(batches.get_batch, self.name)
                # If the batch has ended since then, it may have written more lines, which these have replaced.
                if entry is None or (entry.owner, entry.passes) == (before.owner, before.passes):
                    return target.name, counts.total()

    async def _session(self) -> CrewSession | None:
        """Return a session with the crew if its block is stored, to read results that are not kept here."""
        with suppress(CrewError):
            return CrewSession(await load_crew(self.call["crew"])) if "crew" in self.call else None
        return None

    async def in_flight(self) -> list[Attempt]:
        """Return the attempts of its runs in flight."""
        return await in_store(
            attempts.list_attempts, states=[S.STARTED], batch=self.name, is_in_flight=True, limit=1_000_000
        )


async def stop_runs(session: CrewSession, in_flight: Sequence[Attempt]) -> tuple[int, list[str]]:
    """Ask a crew's server to stop runs that nobody waits for. Return how many it stops, and a sentence for each other
    one."""
    gate, problems = asyncio.Semaphore(STOPS_AT_ONCE), list[str]()

    async def stop(attempt: Attempt) -> bool:
        async with gate:
            try:
                return (await stop_once(LiveRun(session, str(attempt.first_id), attempt))).accepted
            except CrewError as error:
                problems.append(f"Run {attempt.first_id} was not stopped: {error}")
                return False

    async with session:
        return sum(await asyncio.gather(*map(stop, in_flight))), problems
