"""A batch by its name: its status, its failed rows, its export, and the arguments to call it again."""

from __future__ import annotations

import asyncio
import shlex
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from prefect_crew.batches.database import LedgerAddress, ledger_address
from prefect_crew.batches.dataset import whole_address
from prefect_crew.batches.ledger import BatchEntry, Ledger, LedgerRow
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.outcomes import STOPPED_WITH_BATCH, RowState, state_of
from prefect_crew.batches.output import open_output
from prefect_crew.batches.ownership import TAG, BatchLock, check_bound, read_binding
from prefect_crew.batches.rows import BadRow
from prefect_crew.exceptions import ConfigurationError, CrewError, LedgerMissingError
from prefect_crew.records.decision import latest_start
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.variables import read_pages
from prefect_crew.runs.reviews.answer import ASKS


@dataclass(frozen=True)
class BatchStatus:
    """The status of a batch in its ledger: counts of rows. `total` includes the `bad_count` rows that cannot be run.

    `failed` includes the `stopped` rows, which include the `owed` rows. An `owed` row was stopped because the batch was
    cancelled, and the next call of the batch runs it again. `in_flight` includes the rows `waiting` for a person at
    their last poll; `left` rows were not kicked off. `median` and `longest` are the seconds of runs that have ended.
    `running`: a process runs the batch now. `why_not` is the reason why its name alone is not enough to continue it.
    """

    name: str
    total: int
    completed: int
    failed: int
    stopped: int
    owed: int
    uncertain: int
    in_flight: int
    waiting: int
    left: int
    kickoffs: int
    states: Mapping[str, int]
    median: float | None
    longest: float | None
    export: str | None
    ledger: str
    running: bool
    why_not: str | None
    bad_count: int
    bad: Sequence[BadRow]
    bad_export: str | None


@dataclass(frozen=True)
class StoredBatch:
    """A batch whose ledger is open, with its `entry` there."""

    name: str
    address: LedgerAddress
    ledger: Ledger
    entry: BatchEntry

    @property
    def _call(self) -> Mapping[str, Any]:
        return self.entry.call or {"why_not": "its call is not on record"}

    @property
    def flow_run_id(self) -> str | None:
        """The flow run that runs the batch, or ran it last."""
        return self._call.get("flow_run_id")

    async def status(self) -> BatchStatus:
        """Return its status."""
        ledger, entry, bad = self.ledger, self.entry, self.entry.bad
        counts = Counter(await ledger.counts())
        if counts[RowState.CLAIMED]:
            expired = sum(run.phase is RecordPhase.CLAIMED and not run.open_for for run in await ledger.unresolved())
            expired = min(expired, counts[RowState.CLAIMED])
            counts.update({RowState.UNCERTAIN: expired, RowState.CLAIMED: -expired})
        _, median, longest = await ledger.run_times()
        stopped = ledger.rows_in([RowState.STOPPED])
        return BatchStatus(
            name=self.name,
            total=entry.total + bad.count,
            completed=counts[RowState.COMPLETED],
            failed=sum(count for state, count in counts.items() if state.is_failed),
            stopped=counts[RowState.STOPPED],
            owed=sum([row.record is not None and row.record.reason == STOPPED_WITH_BATCH async for row in stopped]),
            uncertain=counts[RowState.UNCERTAIN],
            in_flight=counts[RowState.STARTED],
            waiting=len([record async for record in ledger.may_ask()]),
            left=max(0, entry.total - counts.total()) + counts[RowState.PENDING],
            kickoffs=await ledger.kickoffs(),
            states={str(state): count for state, count in counts.items() if count},
            median=median,
            longest=longest,
            export=self._call.get("export"),
            ledger=ledger.address,
            running=await BatchLock(ledger.database, self.name).is_taken(),
            why_not=self._call.get("why_not"),
            bad_count=bad.count,
            bad=bad.rows,
            bad_export=bad.export,
        )

    async def failures(self, limit: int | None = None) -> AsyncIterator[LedgerRow]:
        """Yield the rows that failed or are uncertain, up to `limit` of them."""
        states = [RowState.UNCERTAIN, RowState.CLAIMED, *(state for state in RowState if state.is_failed)]
        count = 0
        async for row in self.ledger.rows_in(states):
            if row.state is RowState.CLAIMED and row.record is not None and row.record.open_for:
                continue
            if count == limit:
                return
            count += 1
            yield row

    async def check_failed(self, keys: Collection[str]) -> None:
        """Make sure that each row has an attempt, and is not claimed, uncertain or completed.

        Raises ConfigurationError.
        """
        for key in keys:
            attempts = await self.ledger.attempts(self.ledger.idempotency_key(key))
            if not attempts:
                raise ConfigurationError(
                    f"Batch {self.name!r} has no run of a row {key!r}. Check the key or resume the batch."
                )
            state = state_of(latest_start(attempts) or attempts[-1])
            if state in (RowState.UNCERTAIN, RowState.CLAIMED):
                raise ConfigurationError(
                    f"Row {key!r} of batch {self.name!r} is uncertain. Resolve it first: prefect-crew runs resolve "
                    f"{shlex.quote(self.ledger.idempotency_key(key))} --kickoff-id ID, or --never-started."
                )
            if state is RowState.COMPLETED:
                raise ConfigurationError(f"Row {key!r} of batch {self.name!r} has completed.")

    def call(self, **more: Any) -> dict[str, Any]:
        """Return the arguments for `arun_batch` to continue it. `more` replaces options of its last call.

        Raises ConfigurationError if its last call had an argument that cannot be stored, such as a function.
        """
        call = self._call
        if why_not := call.get("why_not"):
            raise ConfigurationError(
                f"Batch {self.name!r} cannot be run by its name alone, because {why_not}. Make the same call again, "
                "with the same name, which continues where the batch stopped."
            )
        arguments = {name: call[name] for name in ("crew", "dataset", "export", "format", "encoding", "delimiter")}
        return {**arguments, "name": self.name, "ledger": self.address.full, **call["options"], **more}

    async def export(self, file: str | None = None, *, overwrite: bool = False) -> tuple[str, int]:
        """Write the batch's lines, also while it runs. Return the lines' address for people, and their number.

        Without `file`, the lines go to the export with which the batch last ran. A file that is not from this batch is
        replaced only with `overwrite`. Raises ConfigurationError, ExportError.
        """
        address = file or self._call.get("export")
        if address is None:
            raise ConfigurationError(
                f"The export of batch {self.name!r} is not on record: {self._call.get('why_not')}. Name a file for it."
            )
        options = BatchOptions(**self._call.get("options", {}))
        target, whole = open_output(address, output_type=options.output_type), whole_address(address)
        is_new = whole not in (await self.ledger.exported()).get("exports", ())
        await target.open()
        words = {"remedy": "replace it with overwrite=True (--overwrite)", "consequence": "Nothing was written."}
        await asyncio.to_thread(target.check, self.name, is_new=is_new and not overwrite, **words)
        await self.ledger.note_export(whole)
        while True:
            before = await self.ledger.exported()
            count = await target.write(self.ledger)
            # If the batch has exported since then, it may have written more lines, which these have replaced.
            if await self.ledger.exported() == before:
                return target.name, count


@asynccontextmanager
async def open_stored_batch(name: str, ledger: str | None = None) -> AsyncGenerator[StoredBatch]:
    """Open the ledger of a batch, by the address on the Prefect server, or by `ledger`, which may have a password.

    Raises:
        ConfigurationError: There is no such batch.
        LedgerMissingError: Its ledger is not on this machine, or another ledger is there.
        LedgerError: Its ledger cannot be opened, or is an older copy.
    """
    binding = await read_binding(name)
    if binding is None:
        raise ConfigurationError(f"There is no batch {name!r}. To list all batches, run: prefect-crew batch ls.")
    place = str(binding.get("ledger"))
    address = await ledger_address(ledger or place, "")
    # To open it would create the file.
    if address.is_missing:
        raise LedgerMissingError(name=name, ledger=place)
    async with Ledger(address.full, name) as opened:
        entry = await opened.entry()
        check_bound(entry, binding, opened)
        assert entry is not None  # noqa: S101  it is bound
        yield StoredBatch(name, address, opened, entry)


@asynccontextmanager
async def batches_waiting_for_people() -> AsyncGenerator[tuple[list[StoredBatch], list[str]]]:
    """Open the ledgers of all batches with rows that wait for people.

    Yields:
        The batches, and a sentence for each ledger that cannot be opened here.
    """
    opened: list[StoredBatch] = []
    missed: list[str] = []
    async with AsyncExitStack() as stack:
        for name, ledger in await list_batches(ASKS):
            try:
                opened.append(await stack.enter_async_context(open_stored_batch(name)))
            except CrewError:
                missed.append(
                    f"Rows of batch {name!r} wait for people, but its ledger cannot be opened here: {ledger}."
                )
        yield opened, missed


async def list_batches(*tags: str) -> list[tuple[str, str]]:
    """Return the name and ledger of every batch on the Prefect server that has all these tags, ordered by name."""
    batches: list[tuple[str, str]] = []
    async for page in read_pages({"tags": {"all_": [TAG, *tags]}}, sort="CREATED_DESC"):
        values = [cast("dict[str, Any]", variable.value) for variable in page]
        batches += [(str(value["batch"]), str(value["ledger"])) for value in values]
    return sorted(batches)
