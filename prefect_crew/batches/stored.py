"""A batch by its name: its status, failures, uncertain rows, and how it is called again."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

from prefect.client.orchestration import get_client

from prefect_crew.batches.database import LedgerPlace, ledger_place
from prefect_crew.batches.ledger import BatchEntry, Ledger
from prefect_crew.batches.options import options_from
from prefect_crew.batches.outcomes import FAILED, standing_word
from prefect_crew.batches.ownership import ASKS, TAG, BatchLock, check_age, read_binding
from prefect_crew.batches.rows import BadRow
from prefect_crew.exceptions import ConfigurationError, CrewError, LedgerMissingError
from prefect_crew.records.model import RecordPhase, RunRecord, latest_start
from prefect_crew.states import CrewState

_PAGE = 200
_NO_CALL = {"why_not": "its call is not on record"}


@dataclass(frozen=True)
class BatchStanding:
    """How a batch stands, as its ledger knows it.

    Attributes:
        name: The batch.
        total: Its rows, also those that were set aside.
        set_aside: Rows that cannot be run. `set_aside_rows`: the first 1,000 of them, `set_aside_output`: the file that
            all of them are in.
        completed, failed, uncertain, in_flight: How they stand; in flight is what had not ended at the last look.
            Failed are also those that no call has brought to an end so far: lost, over their time, refused.
        people: Those in flight that waited for a person then.
        left: Rows of which nothing was bought yet.
        kickoffs: How many were, or may have been, bought in all.
        states: The same by the words of the ledger.
        median, slowest: Seconds of the runs that have ended, None where there is none. Of many runs the median is that
            of a sample.
        running: Whether a process runs it at this moment; None where nobody can tell.
        why_not: Why it cannot be gone on with by its name alone; None if it can.
        output, ledger: Where they are; `output` is None where the call is not on record.
    """

    name: str
    total: int
    completed: int
    failed: int
    uncertain: int
    in_flight: int
    people: int
    left: int
    kickoffs: int
    states: Mapping[str, int]
    median: float | None
    slowest: float | None
    output: str | None
    ledger: str
    running: bool | None = None
    why_not: str | None = None
    set_aside: int = 0
    set_aside_rows: Sequence[BadRow] = ()
    set_aside_output: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "states": dict(self.states)}


@dataclass(frozen=True)
class KnownBatch:
    """A batch whose ledger is open. `entry` is what that knows of it as a whole."""

    name: str
    place: LedgerPlace
    ledger: Ledger
    entry: BatchEntry

    async def standing(self) -> BatchStanding:
        """Return how it stands."""
        counts, aside = await self.ledger.counts(), await self.ledger.set_aside()
        if counts.get(str(RecordPhase.CLAIMED)):
            # What its sender must know of by now, and has not written down, is uncertain: the next call says so too.
            claimed = RecordPhase.CLAIMED
            old = sum(one.phase is claimed and not one.open_for for one in await self.ledger.unresolved())
            lost = min(old, counts[str(claimed)])
            counts[str(claimed)] -= lost
            counts[str(RecordPhase.UNCERTAIN)] = counts.get(str(RecordPhase.UNCERTAIN), 0) + lost
        times = await self.ledger.run_times()
        return BatchStanding(
            name=self.name,
            total=self.entry.total + aside.count,
            completed=counts.get(str(CrewState.COMPLETED), 0),
            failed=sum(counts.get(word, 0) for word in FAILED),
            uncertain=counts.get(str(RecordPhase.UNCERTAIN), 0),
            in_flight=counts.get(str(RecordPhase.STARTED), 0),
            people=len([record async for record in self.ledger.may_ask()]),
            left=max(0, self.entry.total - sum(counts.values()) + counts.get(str(RecordPhase.NOT_STARTED), 0)),
            kickoffs=await self.ledger.bought(),
            states={word: count for word, count in counts.items() if count},
            median=statistics.median(times.sample) if times.sample else None,
            slowest=times.slowest[0][0] if times.slowest else None,
            output=None if self.entry.call is None else self.entry.call.get("output"),
            ledger=self.ledger.address,
            running=await BatchLock(self.ledger.database, self.name).is_taken(),
            why_not=(self.entry.call or _NO_CALL).get("why_not"),
            set_aside=aside.count,
            set_aside_rows=aside.rows,
            set_aside_output=aside.output,
        )

    async def failures(self) -> AsyncIterator[tuple[str, RunRecord]]:
        """Yield row key and record of each row that failed or is uncertain, in the order of the keys."""
        async for key, record in self.ledger.standing_attempts():
            failed = standing_word(record) in FAILED
            lost = record.phase is RecordPhase.CLAIMED and not record.open_for
            if failed or lost or record.phase is RecordPhase.UNCERTAIN:
                yield key, record

    async def check_failed(self, keys: Collection[str]) -> None:
        """Make sure that rows can be bought again.

        Raises:
            ConfigurationError: One of them is unknown, or has not failed.
        """
        found = await self.ledger.attempts_of(list(keys))
        for key in keys:
            if key not in found:
                raise ConfigurationError(f"Batch {self.name!r} has bought nothing for a row {key!r}.")
            last = latest_start(found[key]) or found[key][-1]
            if last.phase in (RecordPhase.UNCERTAIN, RecordPhase.CLAIMED):
                raise ConfigurationError(
                    f"Row {key!r} of batch {self.name!r} is uncertain. Resolve it first: prefect-crew batch resolve "
                    f"{shlex.quote(self.name)} {shlex.quote(key)} --kickoff-id ID, or --never-started."
                )
            if last.state is CrewState.COMPLETED and last.error is None:
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
                "same name; it goes on where it stopped."
            )
        options = options_from(cast("Mapping[str, Any]", call["options"]), **more)
        return {
            "crew": call["crew"],
            "dataset": call["dataset"],
            "name": self.name,
            "output": call["output"],
            # A URL with its password only where nothing stored stands for it.
            "ledger": self.place.told if self.place.open_to_all else self.place.ledger,
            "format": call["format"],
            "encoding": call["encoding"],
            **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)},
        }


@asynccontextmanager
async def known_batch(name: str, ledger: str | None = None) -> AsyncGenerator[KnownBatch]:
    """Open the ledger of a batch.

    Args:
        name: The batch.
        ledger: Where its ledger is, if what the Prefect server knows does not do, such as a URL without its password.

    Raises:
        ConfigurationError: There is no such batch.
        LedgerMissingError: Its ledger is not the one here, or not on this machine.
        LedgerError: Its ledger cannot be opened, or is an older copy.
    """
    bound = await read_binding(name)
    if bound is None:
        raise ConfigurationError(f"The Prefect server knows no batch {name!r}. prefect-crew batch list shows all.")
    told = str(bound.get("ledger"))
    place = await ledger_place(ledger or told, "")
    # Opening it would make the file.
    if place.local and not place.exists:
        raise LedgerMissingError(name=name, ledger=told)
    async with Ledger(place.ledger, name) as opened:
        entry = await opened.entry()
        if entry is None or entry.ledger_id != bound.get("ledger_id"):
            raise LedgerMissingError(name=name, ledger=told)
        check_age(entry, bound.get("generation"), ledger=opened.address)
        yield KnownBatch(name, place, opened, entry)


@asynccontextmanager
async def asking_batches(crew_url: str | None = None) -> AsyncGenerator[tuple[list[KnownBatch], list[str]]]:
    """Open the ledgers of all batches of which rows wait for people, or of those with a crew.

    Yields:
        The batches, and for each whose ledger cannot be opened here a sentence that says so.
    """
    opened: list[KnownBatch] = []
    missed: list[str] = []
    async with AsyncExitStack() as stack:
        for name, ledger in await all_batches(ASKS, crew_url=crew_url):
            try:
                opened.append(await stack.enter_async_context(known_batch(name)))
            except CrewError:
                missed.append(f"Rows of batch {name!r} wait for people, and its ledger cannot be had here: {ledger}.")
        yield opened, missed


async def all_batches(*tags: str, crew_url: str | None = None) -> list[tuple[str, str]]:
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
            found += [
                (str(value["batch"]), str(value["ledger"]))
                for value in values
                if crew_url is None or value.get("crew_url", crew_url) == crew_url
            ]
            if len(page) < _PAGE:
                return sorted(found)
