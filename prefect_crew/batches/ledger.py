"""The ledger of a batch: every attempt of every row."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from sqlalchemy import ColumnElement, Connection, Subquery, Table, case, delete, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.batches.database import Database, answers, attempts, batches, set_aside, short
from prefect_crew.batches.group_commit import KEYS_AT_ONCE, GroupWriter, seconds_left
from prefect_crew.batches.outcomes import standing_word
from prefect_crew.batches.rows import BadRow, SetAside
from prefect_crew.exceptions import CrewError, LedgerError
from prefect_crew.records.keys import escaped
from prefect_crew.records.model import SPARE, RecordPhase, RunRecord, SentReview, resolved
from prefect_crew.runs.kickoff import ClaimLostError
from prefect_crew.states import CrewState

_REFUSED = str(RecordPhase.NOT_STARTED)


class Place(NamedTuple):
    """Where one attempt stands: the words of the ledger's columns."""

    row_key: str
    attempt: int
    phase: str
    state: str | None

    @property
    def counts(self) -> bool:
        """Whether it is, or may be, a purchase."""
        return self.phase != _REFUSED

    @property
    def completed(self) -> bool:
        """Whether it has a result as it was asked for."""
        return self.state == str(CrewState.COMPLETED)


def latest(places: Sequence[Place]) -> dict[str, Place]:
    """Return the attempt that counts of each row, of attempts in order."""
    found: dict[str, Place] = {}
    for place in places:
        if place.counts or not (place.row_key in found and found[place.row_key].counts):
            found[place.row_key] = place
    return found


def places(batch: str, after: str) -> Any:
    """Return the query for where all attempts stand of rows whose keys come after one, in the order of the keys."""
    columns = (attempts.c.row_key, attempts.c.attempt, attempts.c.phase, attempts.c.state)
    query = select(*columns).where(attempts.c.batch == batch, attempts.c.row_key > after)
    return query.order_by(attempts.c.row_key, attempts.c.attempt)


def places_of_row(batch: str, row_key: str, *, after: int) -> Any:
    """Return the query for the attempts at one row that come after one."""
    columns = (attempts.c.row_key, attempts.c.attempt, attempts.c.phase, attempts.c.state)
    row = (attempts.c.batch == batch, attempts.c.row_key == row_key, attempts.c.attempt > after)
    return select(*columns).where(*row).order_by(attempts.c.attempt)


def standing_attempts(batch: str, *columns: Any) -> Subquery:
    """Return columns of all attempts of a batch, and `place`, which is 1 for that which counts of each row.

    Not by a look for a later attempt at each: PostgreSQL takes a table that grows for a small one until it is analyzed,
    and goes through all of it for every row (19 s for 2,300).
    """
    refused = case((attempts.c.phase == _REFUSED, 1), else_=0)
    place = func.row_number().over(partition_by=attempts.c.row_key, order_by=(refused, attempts.c.attempt.desc()))
    return select(*columns, place.label("place")).where(attempts.c.batch == batch).subquery()


T = TypeVar("T")
LEDGER_VERSION = 2
_PAGE = 1_000
SAMPLE = 10_000
"""Durations of runs that are read for a median and for percentiles."""
SLOWEST = 10


@dataclass(frozen=True)
class BatchEntry:
    """What a ledger knows of a batch as a whole. `fingerprint` is that of its rows' keys and inputs.

    `call` is how it was called, where that are plain values; `standing` how it stood at its last end. `generation`
    grows while rows are started.
    """

    name: str
    version: int
    ledger_id: str
    crew_url: str
    fingerprint: str
    total: int
    call: Mapping[str, Any] | None = None
    standing: Mapping[str, Any] | None = None
    halt: str | None = None
    generation: int | None = None


@dataclass(frozen=True)
class RunTimes:
    """How long the runs of a batch took, in seconds.

    Attributes:
        count, mean: Of all that have ended; `mean` is None where there is none.
        slowest: The longest first, each with the key of its row.
        sample: All of them, or about 10,000 chosen at random.
    """

    count: int = 0
    mean: float | None = None
    slowest: Sequence[tuple[float, str]] = ()
    sample: Sequence[float] = ()


class Ledger:
    """The ledger of one batch, as an async context manager; one event loop, any number of processes.

    It implements the record protocol: a record's idempotency key is `batch/NAME/ROW KEY`, with NAME's own
    slashes escaped.

    Attributes:
        sole: Whether this process alone works on the batch, so that a claim that it does not hold has lost its owner.
        writer: Writes the attempts.
    """

    def __init__(self, ledger: str, batch: str) -> None:
        self.database = Database(ledger)
        self.batch = batch
        self.address = self.database.address
        self.writer = GroupWriter(self.database, batch)
        self._left = seconds_left(self.database)
        self.sole = False
        self._mine: set[str] = set()

    async def __aenter__(self) -> Ledger:
        await self.database.__aenter__()
        self.writer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.writer.close()
        await self.database.__aexit__()

    def idempotency_key(self, row_key: str) -> str:
        """Return the idempotency key of a row: no other of any batch has the same."""
        return f"batch/{escaped(self.batch)}/{row_key}"

    def row_key(self, idempotency_key: str) -> str:
        """Return the row of an idempotency key."""
        return idempotency_key.removeprefix(self.idempotency_key(""))

    # The batch as a whole.

    async def entry(self) -> BatchEntry | None:
        """Return what is known of the batch, None if it is new here.

        Raises:
            LedgerError: It cannot be read, or was written by a later version of this package.
        """

        def read(connection: Connection) -> dict[str, Any] | None:
            row = connection.execute(select(batches).where(batches.c.name == self.batch)).mappings().first()
            return None if row is None else {str(name): value for name, value in row.items()}

        values = await self._read(read)
        if values is None:
            return None
        for name in ("call", "standing"):
            values[name] = None if values[name] is None else json.loads(values[name])
        entry = BatchEntry(**values)
        if entry.version > LEDGER_VERSION:
            raise LedgerError("was written by a later version of prefect-crew: update this one.", ledger=self.address)
        return entry

    async def enter(
        self, *, crew_url: str, fingerprint: str, total: int, call: Mapping[str, Any] | None = None
    ) -> BatchEntry:
        """Write down a batch, or its changed rows, and return the entry that stands."""
        values = {
            "version": LEDGER_VERSION,
            "crew_url": crew_url,
            "fingerprint": fingerprint,
            "total": total,
            "call": None if call is None else json.dumps(call),
            "halt": None,
        }
        insert = self.database.insert(batches).values(name=self.batch, ledger_id=str(uuid4()), **values)
        statement = insert.on_conflict_do_update(index_elements=["name"], set_=values)
        await self._write(self.database.run(lambda connection: connection.execute(statement).close()))
        entry = await self.entry()
        if entry is None:
            raise LedgerError("lost what was just written.", ledger=self.address)
        return entry

    async def advance(self) -> int:
        """Begin the next generation of the batch, and return its number."""

        def write(connection: Connection) -> int:
            ours = batches.c.name == self.batch
            grown = func.coalesce(batches.c.generation, 0) + 1
            connection.execute(update(batches).where(ours).values(generation=grown)).close()
            return int(connection.execute(select(batches.c.generation).where(ours)).scalar_one())

        return await self._write(self.database.run(write))

    async def note_standing(self, standing: Mapping[str, Any]) -> None:
        """Write down how the batch stands at the end of a call."""
        statement = update(batches).where(batches.c.name == self.batch).values(standing=json.dumps(standing))
        await self._write(self.database.run(lambda connection: connection.execute(statement).close()))

    async def note_set_aside(self, found: SetAside) -> None:
        """Write down which rows of the batch cannot be run."""
        rows = json.dumps([[row.line, row.reason] for row in found.rows])
        values = {"count": found.count, "rows": rows, "output": found.output}
        insert = self.database.insert(set_aside).values(batch=self.batch, **values)
        statement = insert.on_conflict_do_update(index_elements=["batch"], set_=values)
        await self._write(self.database.run(lambda connection: connection.execute(statement).close()))

    async def set_aside(self) -> SetAside:
        """Return which rows of the batch cannot be run, as its last call found them."""
        columns = (set_aside.c.count, set_aside.c.rows, set_aside.c.output)
        found = await self._rows(select(*columns).where(set_aside.c.batch == self.batch))
        if not found:
            return SetAside()
        count, rows, output = found[0]
        return SetAside(int(count), [BadRow(line, reason) for line, reason in json.loads(rows)], output)

    async def names(self) -> list[str]:
        """Return the names of all batches in this ledger."""
        query = select(batches.c.name).order_by(batches.c.name)
        return await self._read(lambda connection: list(connection.execute(query).scalars()))

    # The record protocol.

    async def claim(self, record: RunRecord) -> bool:
        """Write a new attempt, with the permit to post it for `good_for` seconds; False if something else stands there.

        What stands there is somebody else's attempt, or our own that somebody has resolved.
        """
        self._mine.add(record.owner)
        record.open_for = record.good_for + record.post_deadline + SPARE
        claimed = await self.writer.put(self._values(record), new=True)
        record.permit += claimed
        return claimed

    async def confirm(self, record: RunRecord, known: Sequence[RunRecord]) -> bool:
        """Return True: one process at a time works on a batch, and nobody prunes its ledger."""
        return True

    async def permit(self, record: RunRecord, good_for: float, *, late: bool) -> bool:
        """Take the right to send the kickoff of a claim once more; False if somebody has resolved it."""
        record.permit += 1
        record.open_for = good_for + record.post_deadline + SPARE
        try:
            await self.save(record)
        except ClaimLostError:
            return False
        return True

    async def resolve(
        self,
        record: RunRecord,
        phase: RecordPhase,
        *,
        kickoff_id: str | None = None,
        state: CrewState | None = None,
        reason: str | None = None,
    ) -> bool:
        """Write down what was found out about an attempt as it was read.

        False if somebody else has changed it since, or whoever claimed it may still post it.
        """
        found = resolved(record, phase, kickoff_id=kickoff_id, state=state, reason=reason)
        values = {**self._values(found), "mine": 0, "was": str(record.phase)}
        if not await self.writer.put(values, new=False):
            return False
        for name, value in found.outcome().items():
            setattr(record, name, value)
        return True

    async def save(self, record: RunRecord) -> None:
        """Write down what is known of an attempt by now, unless the ledger knows more already.

        Raises:
            ClaimLostError: It is a claim that is to be kept, and somebody has resolved it.
            CrewError: This process did not claim the attempt, and somebody else was there before. Nothing was changed.
        """
        mine = record.owner in self._mine
        try:
            # Nothing is sent on the strength of an end, so it need not hurry.
            urgent = record.phase is not RecordPhase.ENDED
            saved = await self.writer.put(self._values(record), new=False, urgent=urgent)
        except LedgerError:
            self._say_unsaved(record, "that could not be written down. Once the ledger is back: ")
            raise
        finally:
            if record.phase is not RecordPhase.CLAIMED:
                self._mine.discard(record.owner)
        if not saved:
            await self._refused(record, mine)

    async def _refused(self, record: RunRecord, mine: bool) -> None:
        if record.phase is RecordPhase.CLAIMED and mine:
            raise ClaimLostError
        found = await self._rows(select(attempts.c.record).where(*self._attempt(attempts, record)))
        what = f"row {self.row_key(record.idempotency_key)!r} of batch {self.batch!r}"
        if not found:
            raise CrewError(f"Attempt {record.attempt} at {what} is not in the ledger {self.address}.")
        standing = _record(found[0][0])
        known = f"{standing.phase}{f', run {standing.kickoff_id}' if standing.kickoff_id else ''}"
        if not mine:
            raise CrewError(f"{what[:1].upper()}{what[1:]} is {known} in the ledger. Nothing was changed.")
        if record.kickoff_id is not None and record.kickoff_id != standing.kickoff_id:
            self._say_unsaved(record, f"the ledger says meanwhile that it is {known}. ")
        else:
            run_logger().warning("The ledger says meanwhile that %s is %s. That stays.", what, known)

    def _say_unsaved(self, record: RunRecord, why: str) -> None:
        """Tell the id of a run that is in no ledger: nobody else knows it."""
        if record.kickoff_id is not None and record.phase is RecordPhase.STARTED:
            run_logger().error(
                "Row %r of batch %s is run %s, and %sprefect-crew batch resolve %s %s --kickoff-id %s",
                *(self.row_key(record.idempotency_key), self.batch, record.kickoff_id, why),
                *map(shlex.quote, (self.batch, self.row_key(record.idempotency_key), record.kickoff_id)),
            )

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a row, the first one first; none for an idempotency key that is of no row of this
        batch."""
        if not idempotency_key.startswith(self.idempotency_key("")):
            return []
        key = self.row_key(idempotency_key)
        return (await self.attempts_of([key])).get(key, [])

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the attempt that holds a kickoff id, if any, of whichever batch."""
        query = select(attempts.c.record).where(attempts.c.kickoff == _digest(kickoff_id))
        found = await self._read(lambda connection: connection.execute(query).scalars().first())
        return None if found is None else _record(found)

    async def holders(self, kickoff_id: str) -> Sequence[tuple[str, int]]:
        """Return the idempotency keys and attempts that hold a kickoff id, of whichever batch."""
        query = select(attempts.c.record).where(attempts.c.kickoff == _digest(kickoff_id))
        held = [_record(text) for (text,) in await self._rows(query)]
        return [(record.idempotency_key, record.attempt) for record in held]

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return whether whoever claimed the record is surely gone; else its age alone tells."""
        return self.sole and record.owner not in self._mine

    # People's answers to rows.

    async def may_ask(self) -> AsyncIterator[RunRecord]:
        """Yield the runs in flight that waited for a person when they were last looked at."""
        phase = str(RecordPhase.STARTED)
        query = select(attempts.c.record).where(attempts.c.batch == self.batch, attempts.c.phase == phase)
        for (text,) in await self._rows(query):
            record = _record(text)
            if record.human_since is not None:
                yield record

    async def reviews(self, record: RunRecord) -> list[SentReview]:
        """Return what people have answered to a run, in order."""
        query = select(answers.c.review).where(*self._attempt(answers, record)).order_by(answers.c.number)
        return [SentReview.model_validate_json(text) for (text,) in await self._rows(query)]

    async def add_review(self, record: RunRecord, number: int, review: SentReview) -> bool:
        """Write down an answer that is about to be sent; False if somebody else's of this number stands there."""
        values = {
            "batch": self.batch,
            "row_key": self.row_key(record.idempotency_key),
            "attempt": record.attempt,
            "number": number,
            "review": review.model_dump_json(),
        }
        statement = self.database.insert(answers).values(values).on_conflict_do_nothing()

        def write(connection: Connection) -> bool:
            return connection.execute(statement).rowcount == 1

        return await self._write(self.database.run(write))

    async def save_review(self, record: RunRecord, number: int, review: SentReview) -> None:
        """Write down what became of it."""
        where = (*self._attempt(answers, record), answers.c.number == number)
        statement = update(answers).where(*where).values(review=review.model_dump_json())
        await self._write(self.database.run(lambda connection: connection.execute(statement).close()))

    async def remove_review(self, record: RunRecord, number: int) -> None:
        """Take back an answer that the crew's server refused."""
        statement = delete(answers).where(*self._attempt(answers, record), answers.c.number == number)
        await self._write(self.database.run(lambda connection: connection.execute(statement).close()))

    def _attempt(self, table: Table, record: RunRecord) -> tuple[ColumnElement[bool], ...]:
        row = table.c.row_key == self.row_key(record.idempotency_key)
        return table.c.batch == self.batch, row, table.c.attempt == record.attempt

    # Many rows at once.

    async def attempts_of(self, row_keys: Sequence[str]) -> dict[str, list[RunRecord]]:
        """Return the attempts at some rows by row key; a row without any is left out."""

        def read(connection: Connection) -> list[tuple[str, str, float | None]]:
            rows: list[tuple[str, str, float | None]] = []
            for start in range(0, len(row_keys), KEYS_AT_ONCE):
                query = (
                    select(attempts.c.row_key, attempts.c.record, self._left)
                    .where(
                        attempts.c.batch == self.batch, attempts.c.row_key.in_(row_keys[start : start + KEYS_AT_ONCE])
                    )
                    .order_by(attempts.c.attempt)
                )
                rows += [(key, text, left) for key, text, left in connection.execute(query)]
            return rows

        found: dict[str, list[RunRecord]] = {}
        for key, text, left in await self._read(read):
            found.setdefault(key, []).append(_record(text, left))
        return found

    async def standing_attempts(self, *, completed: bool = False) -> AsyncIterator[tuple[str, RunRecord]]:
        """Yield the attempt that counts of each row, in the order of the row keys; the completed ones only if asked."""
        after = ""
        while True:
            rows = await self._page(after)
            standing = {key: place for key, place in latest(rows).items() if completed or not place.completed}
            keys = list(standing)
            for start in range(0, len(keys), KEYS_AT_ONCE):
                found = await self.attempts_of(keys[start : start + KEYS_AT_ONCE])
                for key in keys[start : start + KEYS_AT_ONCE]:
                    yield key, next(one for one in found[key] if one.attempt == standing[key].attempt)
            if not rows:
                return
            after = rows[-1].row_key

    async def _page(self, after: str) -> list[Place]:
        """Return where the attempts at some rows stand, in the order of their keys; whole rows, empty at the end."""
        rows = [Place(*row) for row in await self._rows(places(self.batch, after).limit(_PAGE))]
        if len(rows) == _PAGE:  # then of the last row there may be more
            rest = places_of_row(self.batch, rows[-1].row_key, after=rows[-1].attempt)
            rows += [Place(*row) for row in await self._rows(rest)]
        return rows

    async def unresolved(self) -> list[RunRecord]:
        """Return the attempts of which nobody has written down what became of their kickoffs."""
        phases = (str(RecordPhase.UNCERTAIN), str(RecordPhase.CLAIMED))
        ours = (attempts.c.batch == self.batch, attempts.c.phase.in_(phases))
        return [_record(*row) for row in await self._rows(select(attempts.c.record, self._left).where(*ours))]

    async def counts(self) -> dict[str, int]:
        """Return how many rows stand in each state, or, where they have not ended, in each phase."""
        standing = standing_attempts(self.batch, attempts.c.state, attempts.c.phase)
        word = func.coalesce(standing.c.state, standing.c.phase)
        rows = await self._rows(select(word, func.count()).where(standing.c.place == 1).group_by(word))
        return {str(key): int(count) for key, count in rows}

    async def bought(self) -> int:
        """Return how many kickoffs were, or may have been, bought for this batch in all."""
        query = select(func.count()).where(
            attempts.c.batch == self.batch, attempts.c.phase != str(RecordPhase.NOT_STARTED)
        )
        return int((await self._rows(query))[0][0])

    async def known(self) -> bool:
        """Return whether there is any attempt of this batch at all."""
        return bool(await self._rows(select(attempts.c.row_key).where(attempts.c.batch == self.batch).limit(1)))

    async def run_times(self) -> RunTimes:
        """Return how long runs took that have ended, from their recorded kickoffs to the ends that were seen."""
        ended = (attempts.c.batch == self.batch, attempts.c.seconds.is_not(None))
        count, mean = (await self._rows(select(func.count(), func.avg(attempts.c.seconds)).where(*ended)))[0]
        if not count:
            return RunTimes()
        longest = select(attempts.c.seconds, attempts.c.row_key).where(*ended).order_by(attempts.c.seconds.desc())
        sample = select(attempts.c.seconds).where(*ended)
        if count > SAMPLE:
            # An owner is a random UUID, so its first digits choose a share of the attempts.
            sample = sample.where(func.substr(attempts.c.owner, 1, 4) < f"{0x10000 * SAMPLE // count:04x}")
        return RunTimes(
            int(count),
            float(mean),
            [(float(seconds), str(key)) for seconds, key in await self._rows(longest.limit(SLOWEST))],
            [float(seconds) for (seconds,) in await self._rows(sample.limit(2 * SAMPLE))],
        )

    async def usage(self) -> Mapping[str, int]:
        """Return the usage of all runs that reported one, added up."""
        query = select(attempts.c.usage).where(attempts.c.batch == self.batch, attempts.c.usage.is_not(None))

        def read(connection: Connection) -> Counter[str]:
            total = Counter[str]()
            for (usage,) in connection.execute(query, execution_options={"yield_per": _PAGE}):
                total.update(json.loads(usage))
            return total

        return await self._read(read)

    async def _rows(self, query: Any) -> list[Any]:
        def read(connection: Connection) -> list[Any]:
            found: Any = connection.execute(query)
            return list(found)

        return await self._read(read)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        try:
            return await self.writer.keep_trying(work, "read")
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(f"cannot be read: {short(error)}.", ledger=self.address) from error

    async def _write(self, writing: Awaitable[T]) -> T:
        try:
            return await writing
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(f"cannot be written: {short(error)}.", ledger=self.address) from error

    def _values(self, record: RunRecord) -> dict[str, Any]:
        seconds = usage = None
        if record.phase is RecordPhase.ENDED and record.kicked_off_at is not None and record.ended_at is not None:
            seconds = (record.ended_at - record.kicked_off_at).total_seconds()
        if record.result is not None and record.result.usage is not None:
            usage = record.result.usage.model_dump_json(exclude_none=True)
        return {
            "batch": self.batch,
            "row_key": self.row_key(record.idempotency_key),
            "attempt": record.attempt,
            "phase": str(record.phase),
            "state": standing_word(record),
            "kickoff": None if record.kickoff_id is None else _digest(record.kickoff_id),
            "owner": record.owner,
            "seconds": seconds,
            "usage": usage,
            "record": record.model_dump_json(exclude_none=True),
            "good_for": record.open_for,
            "mine": int(record.owner in self._mine),
            "was": None,
        }


def _digest(kickoff_id: str) -> str:
    return sha256(kickoff_id.encode("utf-8", "surrogatepass")).hexdigest()


def _record(text: str, left: float | None = None) -> RunRecord:
    # Here a claim is its permit as well: one write a row less.
    return RunRecord.model_validate_json(text).model_copy(update={"permit": 1, "open_for": max(0.0, float(left or 0))})
