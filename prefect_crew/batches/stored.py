"""A batch by its name: its status, its failed rows, and how it is called again."""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

from prefect.client.orchestration import get_client

from prefect_crew.batches.database import LedgerAddress, ledger_address
from prefect_crew.batches.ledger import BatchEntry, Ledger, LedgerRow
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.outcomes import RowState, state_of
from prefect_crew.batches.output import Output
from prefect_crew.batches.ownership import TAG, BatchLock, check_age, read_binding
from prefect_crew.batches.rows import BadRow
from prefect_crew.exceptions import ConfigurationError, CrewError, LedgerMissingError
from prefect_crew.records.decision import latest_start
from prefect_crew.records.model import RecordPhase
from prefect_crew.runs.reviews.answer import ASKS

_PAGE = 200
_NO_CALL: Mapping[str, Any] = {"why_not": "its call is not on record"}


@dataclass(frozen=True)
class BatchStatus:
    """How a batch stands, as its ledger knows it.

    Attributes:
        total: Its rows, also those that were set aside.
        completed, failed, uncertain: How many rows stand so.
        in_flight: Rows whose run had not ended at the last look. `waiting`: those that waited for a person then.
        left: Rows that were not kicked off yet.
        kickoffs: How many were, or may have been, sent in all.
        states: Rows by their state.
        median, longest: Seconds of the runs that have ended, None where there is none.
        output, ledger: Where they are; `output` is None where the call is not on record.
        running: Whether a process runs it at this moment; None where nobody can tell.
        why_not: Why it cannot be gone on with by its name alone; None if it can.
        set_aside: Rows that cannot be run, the first 1,000 of them, and the file that all of them are in.
    """

    name: str
    total: int
    completed: int
    failed: int
    uncertain: int
    in_flight: int
    waiting: int
    left: int
    kickoffs: int
    states: Mapping[str, int]
    median: float | None
    longest: float | None
    output: str | None
    ledger: str
    running: bool | None = None
    why_not: str | None = None
    set_aside: int = 0
    set_aside_rows: Sequence[BadRow] = ()
    set_aside_output: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class StoredBatch:
    """A batch whose ledger is open. `entry` is what that knows of it as a whole."""

    name: str
    address: LedgerAddress
    ledger: Ledger
    entry: BatchEntry

    async def status(self) -> BatchStatus:
        """Return how it stands."""
        ledger, entry, call = self.ledger, self.entry, self.entry.call or _NO_CALL
        counts = await ledger.counts()
        if counts.get(RowState.CLAIMED):
            orphaned = sum(one.phase is RecordPhase.CLAIMED and not one.open_for for one in await ledger.unresolved())
            orphaned = min(orphaned, counts[RowState.CLAIMED])
            counts[RowState.CLAIMED] -= orphaned
            counts[RowState.UNCERTAIN] = counts.get(RowState.UNCERTAIN, 0) + orphaned
        times = await ledger.run_times()
        unreached = entry.total - sum(counts.values())
        return BatchStatus(
            name=self.name,
            total=entry.total + entry.set_aside.count,
            completed=counts.get(RowState.COMPLETED, 0),
            failed=sum(count for state, count in counts.items() if state.is_failed),
            uncertain=counts.get(RowState.UNCERTAIN, 0),
            in_flight=counts.get(RowState.STARTED, 0),
            waiting=len([record async for record in ledger.may_ask()]),
            left=max(0, unreached) + counts.get(RowState.PENDING, 0),
            kickoffs=await ledger.kickoffs(),
            states={str(state): count for state, count in counts.items() if count},
            median=times.median,
            longest=times.longest,
            output=call.get("output"),
            ledger=ledger.address,
            running=await BatchLock(ledger.database, self.name).is_taken(),
            why_not=call.get("why_not"),
            set_aside=entry.set_aside.count,
            set_aside_rows=entry.set_aside.rows,
            set_aside_output=entry.set_aside.output,
        )

    async def failures(self, limit: int | None = None) -> AsyncIterator[LedgerRow]:
        """Yield the rows that failed or are uncertain, up to `limit` of them."""
        states = [RowState.UNCERTAIN, RowState.CLAIMED, *(state for state in RowState if state.is_failed)]
        count = 0
        async for row in self.ledger.rows_in(states):
            if row.state is RowState.CLAIMED and row.record is not None and row.record.open_for:
                continue
            count += 1
            yield row
            if count == limit:
                return

    async def check_failed(self, keys: Collection[str]) -> None:
        """Make sure that rows can be started again. Raises ConfigurationError."""
        for key in keys:
            attempts = await self.ledger.attempts(self.ledger.idempotency_key(key))
            if not attempts:
                raise ConfigurationError(f"Batch {self.name!r} has started no run for a row {key!r}.")
            state = state_of(latest_start(attempts) or attempts[-1])
            if state in (RowState.UNCERTAIN, RowState.CLAIMED):
                raise ConfigurationError(
                    f"Row {key!r} of batch {self.name!r} is uncertain. Resolve it first: prefect-crew runs resolve "
                    f"{shlex.quote(self.ledger.idempotency_key(key))} --kickoff-id ID, or --never-started."
                )
            if state is RowState.COMPLETED:
                raise ConfigurationError(f"Row {key!r} of batch {self.name!r} has completed.")

    def call(self, **more: Any) -> dict[str, Any]:
        """Return what `arun_batch` is called with to go on with it. `more` are options over those of its last call.

        Raises:
            ConfigurationError: Its last call had what cannot be written down, such as a function.
        """
        call = self.entry.call or _NO_CALL
        if why_not := call.get("why_not"):
            raise ConfigurationError(
                f"Batch {self.name!r} cannot be run by its name alone: {why_not}. Make the same call again, with the "
                "same name; it continues where it stopped."
            )
        # A URL with its password only where nothing stored stands for it.
        ledger = self.address.public if self.address.is_public else self.address.full
        given = {name: call[name] for name in ("crew", "dataset", "output", "format", "encoding")}
        return {**given, "name": self.name, "ledger": ledger, **call["options"], **more}

    async def export(self, output: str | None = None) -> tuple[str, int]:
        """Write its lines, also while it runs; return where they are, for people, and how many.

        Without `output` it is that of its last call. Raises ConfigurationError, OutputError.
        """
        call = self.entry.call or _NO_CALL
        address = output or call.get("output")
        if address is None:
            raise ConfigurationError(
                f"The output file of batch {self.name!r} is not on record: {call.get('why_not')}. Give a file."
            )
        options = BatchOptions(**call.get("options", {}))
        target = Output(address, output_type=options.output_type)
        return target.name, await target.write(self.ledger)


@asynccontextmanager
async def open_stored_batch(name: str, ledger: str | None = None) -> AsyncGenerator[StoredBatch]:
    """Open the ledger of a batch.

    Args:
        name: The batch.
        ledger: Where its ledger is, if what the Prefect server knows does not do, such as a URL without its password.

    Raises:
        ConfigurationError: There is no such batch.
        LedgerMissingError: Its ledger is not the one here, or not on this machine.
        LedgerError: Its ledger cannot be opened, or is an older copy.
    """
    binding = await read_binding(name)
    if binding is None:
        raise ConfigurationError(f"There is no batch {name!r}. To list all: prefect-crew batch ls.")
    known = str(binding.get("ledger"))
    address = await ledger_address(ledger or known, "")
    # Opening it would make the file.
    if address.is_missing:
        raise LedgerMissingError(name=name, ledger=known)
    async with Ledger(address.full, name) as opened:
        entry = await opened.entry()
        if entry is None or entry.ledger_id != binding.get("ledger_id"):
            raise LedgerMissingError(name=name, ledger=known)
        check_age(entry, binding.get("generation"), ledger=opened.address)
        yield StoredBatch(name, address, opened, entry)


@asynccontextmanager
async def batches_waiting_for_people(
    crew_url: str | None = None,
) -> AsyncGenerator[tuple[list[StoredBatch], list[str]]]:
    """Open the ledgers of all batches of which rows wait for people, or of those with a crew.

    Yields:
        The batches, and for each whose ledger cannot be opened here a sentence that says so.
    """
    opened: list[StoredBatch] = []
    missed: list[str] = []
    async with AsyncExitStack() as stack:
        for name, ledger in await list_batches(ASKS, crew_url=crew_url):
            try:
                opened.append(await stack.enter_async_context(open_stored_batch(name)))
            except CrewError:
                missed.append(
                    f"Rows of batch {name!r} wait for people, and its ledger cannot be opened here: {ledger}."
                )
        yield opened, missed


async def list_batches(*tags: str, crew_url: str | None = None) -> list[tuple[str, str]]:
    """Return name and ledger of every batch that the Prefect server knows, by name.

    Args:
        tags: Only those with all these tags.
        crew_url: Only those whose crew has this address, or is not known.
    """
    found: list[tuple[str, str]] = []
    offset = 0
    body: dict[str, Any] = {"variables": {"tags": {"all_": [TAG, *tags]}}, "limit": _PAGE, "sort": "NAME_ASC"}
    async with get_client() as client:
        while True:
            answer = await client.request("POST", "/variables/filter", json={**body, "offset": offset})
            page = cast("list[dict[str, Any]]", answer.json())
            offset += len(page)
            values = [one["value"] for one in page]
            found += [(str(value["batch"]), str(value["ledger"])) for value in values]
            if len(page) < _PAGE:
                return sorted(found)
