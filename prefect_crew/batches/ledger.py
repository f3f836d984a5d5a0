"""The ledger of a batch: its rows, and all attempts at them."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar, cast
from uuid import uuid4

import sqlalchemy as sa
from pydantic_core import from_json, to_json
from sqlalchemy.exc import SQLAlchemyError

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.batches.attempts import Attempt, Write
from prefect_crew.batches.database import Database, GroupWriter, answers, attempts, batches, rows, seconds_left, short
from prefect_crew.batches.outcomes import CONFLICT_REASON, CORRECTABLE, SENDER_ENDED, RowState, state_of
from prefect_crew.batches.rows import BadRow, BadRows, RowJob
from prefect_crew.client.models import Review, TokenUsage
from prefect_crew.crew import Crew
from prefect_crew.exceptions import CrewError, LedgerError, RunNotFoundError
from prefect_crew.prices import Spending
from prefect_crew.records.keys import escape_name
from prefect_crew.records.model import SPARE, Lease, RecordPhase, RunRecord, digest, resolution
from prefect_crew.runs.kickoff import ClaimLostError

T = TypeVar("T")
LEDGER_VERSION = 2
PAGE = 400
"""Rows that are read or written at once."""


@dataclass(frozen=True)
class BatchEntry:
    """The entry of a batch in its ledger.

    Attributes:
        fingerprint: A digest of the keys and inputs of its rows.
        call: The arguments of its last call as plain values, and the flow run of that call.
        line_options: The settings that change the lines of its export: `output_type` and the secret inputs.
        bad: The rows that its last call could not run.
        exported: The settings, the counts and the result of the check (`Checked`) of its last export, and the addresses
            of all its exports.
        generation: The number of calls that had rows to start. The Prefect server stores it as well.
    """

    name: str
    version: int
    ledger_id: str
    crew_url: str
    fingerprint: str
    total: int
    call: Mapping[str, Any] | None = None
    bad: BadRows = field(default_factory=BadRows)
    line_options: Mapping[str, Any] | None = None
    exported: Mapping[str, Any] | None = None
    generation: int = 0


@dataclass(frozen=True)
class LedgerRow:
    """A row in the ledger: its inputs, secret ones masked, and the record of the attempt that counts, if any."""

    key: str
    inputs: Mapping[str, Any]
    state: RowState
    record: RunRecord | None

    @property
    def error(self) -> str | None:
        """The reason why the row has no result, for people."""
        if self.state is RowState.CONFLICT:
            return CONFLICT_REASON
        return None if self.record is None else self.record.error or self.record.reason


class Ledger:
    """The ledger of one batch, as an async context manager; one event loop, any number of processes.

    The class implements the record protocol. A record's idempotency key is `batch/NAME/ROW KEY`, with NAME's own
    slashes escaped. `is_exclusive`: this process holds the batch's lock, so senders of other claims are gone.
    """

    def __init__(self, ledger: str, batch: str) -> None:
        self.database = Database(ledger)
        self.batch = batch
        self.address = self.database.address
        self.writer = GroupWriter(self.database, batch)
        self.is_exclusive = False
        self._left = seconds_left(self.database)
        self._own_claims: set[str] = set()

    async def __aenter__(self) -> Ledger:
        await self.database.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.writer.close()
        await self.database.__aexit__()

    def idempotency_key(self, row_key: str) -> str:
        """Return the idempotency key of a row. No other row of any batch has the same."""
        return f"batch/{escape_name(self.batch)}/{row_key}"

    def row_key(self, idempotency_key: str) -> str:
        """Return the row's key in an idempotency key."""
        return idempotency_key.removeprefix(self.idempotency_key(""))

    # The batch as a whole.

    async def entry(self) -> BatchEntry | None:
        """Return the entry of the batch, None if the batch is new here. Raises LedgerError."""
        entries = await self._rows(sa.select(batches).where(batches.c.name == self.batch))
        if not entries:
            return None
        values: dict[str, Any] = dict(zip(batches.c.keys(), entries[0], strict=True))
        if values["version"] > LEDGER_VERSION:
            advice = "No row starts without the ledger. Upgrade prefect-crew here, then run the batch again."
            raise LedgerError("was written by a later version of prefect-crew.", ledger=self.address, advice=advice)
        bad: dict[str, Any] = values.pop("bad") or {}
        bad_rows = [BadRow(**row) for row in bad.pop("rows", ())]
        return BatchEntry(**values, bad=BadRows(**bad, rows=bad_rows))

    async def enter(self, *, crew_url: str, fingerprint: str, total: int, **more: Any) -> BatchEntry:
        """Write the entry of the batch, or change it, and return it. `more` are its `call` and `line_options`."""
        values: dict[str, Any] = {"crew_url": crew_url, "fingerprint": fingerprint, "total": total, "call": None}
        values |= {"version": LEDGER_VERSION, "line_options": None, **more}
        insert = self.database.insert(batches).values(name=self.batch, ledger_id=str(uuid4()), **values)
        await self._execute(insert.on_conflict_do_update(index_elements=["name"], set_=values))
        entry = await self.entry()
        assert entry is not None  # noqa: S101  it was just written
        return entry

    async def advance(self) -> int:
        """Begin the next generation of the batch, and return its number."""
        next_one = sa.update(batches).where(batches.c.name == self.batch).values(generation=batches.c.generation + 1)
        statement = next_one.returning(batches.c.generation)
        return await self._run(lambda connection: connection.execute(statement).scalar_one(), "written", once=True)

    async def note(self, **values: Any) -> None:
        """Write `call` or `bad` of the entry, as JSON values."""
        await self._execute(sa.update(batches).where(batches.c.name == self.batch).values(values))

    async def exported(self) -> Mapping[str, Any]:
        """Return the facts of the batch's exports."""
        entry = await self.entry()
        return {} if entry is None else entry.exported or {}

    async def note_export(self, address: str, exported: Mapping[str, Any] | None = None) -> None:
        """Add an address to the batch's exports. `exported` replaces the facts of the last export; None keeps them."""
        ours = batches.c.name == self.batch

        def write(connection: sa.Connection) -> None:
            # The process that runs the batch and a command may both write an export.
            before: dict[str, Any] = connection.execute(sa.select(batches.c.exported).where(ours)).scalar() or {}
            exports = sorted({*before.get("exports", ()), address})
            values = {**(before if exported is None else exported), "exports": exports}
            connection.execute(sa.update(batches).where(ours).values(exported=values)).close()

        await self._run(write, "written")

    # Its rows.

    async def enter_rows(
        self,
        jobs: Sequence[RowJob],
        crew: Crew,
        *,
        anew: bool = False,
        is_retried: Callable[[str], bool] = lambda _: False,
    ) -> dict[str, RowState]:
        """Write the rows of `jobs` that are new or have changed, and return the states of all rows of `jobs` by key.

        `crew` names the secret inputs. `anew`: these names have changed, so write all rows. `is_retried` returns
        whether the row of a key starts again after a failure; such a row may have other inputs than before.
        """

        def write(connection: sa.Connection) -> dict[str, RowState]:
            columns = (rows.c.row_key, rows.c.number, rows.c.digest, rows.c.state)
            query = sa.select(*columns).where(rows.c.batch == self.batch, rows.c.row_key.in_([job.key for job in jobs]))
            stored: Any = connection.execute(query)
            before = {key: (number, digest, RowState(state)) for key, number, digest, state in stored}
            conflicts = [key for key, (*_, state) in before.items() if state is RowState.CONFLICT]
            latest = self.writer.latest(connection, conflicts) if conflicts else {}
            states: dict[str, RowState] = {}
            changed: list[dict[str, Any]] = []
            for job in jobs:
                _, digest, state = before.get(job.key, (None, job.inputs.digest, RowState.PENDING))
                if job.key in latest:  # the conflict may be gone: decide by the state without it
                    state = latest[job.key].state
                is_corrected = state in CORRECTABLE and is_retried(job.key)
                if digest == job.inputs.digest or state in (RowState.PENDING, RowState.NOT_STARTED) or is_corrected:
                    digest = job.inputs.digest
                else:
                    state = RowState.CONFLICT
                states[job.key] = state
                if anew or before.get(job.key) != (job.number, digest, state):
                    values = {"batch": self.batch, "row_key": job.key, "number": job.number, "digest": digest}
                    changed.append({**values, "inputs": _masked(job, crew), "state": str(state), "attempt": 0})
            if changed:
                insert = self.database.insert(rows)
                new = {name: insert.excluded[name] for name in ("number", "digest", "inputs", "state")}
                insert = insert.on_conflict_do_update(index_elements=["batch", "row_key"], set_=new)
                connection.execute(insert, changed).close()
            return states

        return await self._run(write, "written")

    async def keys(self) -> AsyncIterator[list[str]]:
        """Yield pages of the keys of the rows that are in the data set."""
        query = sa.select(rows.c.row_key).where(rows.c.batch == self.batch, rows.c.number.is_not(None)).limit(PAGE)
        last = ""
        while page := await self._rows(query.where(rows.c.row_key > last).order_by(rows.c.row_key)):
            yield [key for (key,) in page]
            (last,) = page[-1]

    async def enter_changed(self, jobs: Iterator[RowJob], crew: Crew) -> None:
        """Number all rows again after the data set has changed. Rows that left it are neither counted nor exported."""
        await self._execute(sa.update(rows).where(rows.c.batch == self.batch).values(number=None))
        while page := list(islice(jobs, PAGE)):
            await self.enter_rows(page, crew)

    async def note_conflict(self, row_key: str) -> None:
        """Write that a row's key was kicked off before with other inputs, or for another crew."""
        this = (rows.c.batch == self.batch, rows.c.row_key == row_key)
        await self._execute(sa.update(rows).where(*this).values(state=str(RowState.CONFLICT)))

    async def counts(self) -> dict[RowState, int]:
        """Return the number of rows in each state, without the rows that the batch has not reached."""
        ours = (rows.c.batch == self.batch, rows.c.number.is_not(None))
        groups = await self._rows(sa.select(rows.c.state, sa.func.count()).where(*ours).group_by(rows.c.state))
        return {RowState(state): int(count) for state, count in groups}

    async def rows_in(self, states: Collection[RowState], *, limit: int | None = None) -> AsyncIterator[LedgerRow]:
        """Yield the rows that are in some states, one state after the other."""
        count = 0
        for state in states:
            async for page in self._pages(self._left, state=state):
                for key, inputs, _, record, seconds in page:
                    if count == limit:
                        return
                    count += 1
                    yield LedgerRow(key, from_json(inputs), state, None if record is None else _record(record, seconds))

    def lines(self) -> AsyncIterator[list[tuple[str, str, str, str | None, float | None]]]:
        """Yield pages of the rows that the batch has reached, in the order of the data set.

        A row is its key, inputs (JSON), state, the record of the attempt that counts (JSON), and the run's seconds.
        """
        return self._pages(attempts.c.seconds)

    async def _pages(self, more: sa.ColumnElement[Any], *, state: RowState | None = None) -> AsyncIterator[list[Any]]:
        attempt = (attempts.c.batch == rows.c.batch, attempts.c.row_key == rows.c.row_key)
        joined = rows.outerjoin(attempts, sa.and_(*attempt, attempts.c.attempt == rows.c.attempt))
        columns = (rows.c.number, rows.c.row_key, rows.c.inputs, rows.c.state, attempts.c.record, more)
        query = sa.select(*columns).select_from(joined).where(rows.c.batch == self.batch).limit(PAGE)
        # While a changed data set is entered, two rows may have one number: then the key decides. The index of states
        # has no keys: with the key in the order, SQLite would read all rows of the batch.
        order = (rows.c.number, rows.c.row_key) if state is None else (rows.c.number,)
        if state is not None:
            query = query.where(rows.c.state == str(state))
        last: Sequence[Any] = (-1, "")
        while page := await self._rows(
            query.where(sa.tuple_(*order) > sa.tuple_(*map(sa.literal, last[: len(order)]))).order_by(*order)
        ):
            last = page[-1]
            yield [row[1:] for row in page]

    async def kickoffs(self) -> int:
        """Return the number of kickoffs that all calls of this batch have sent, or may have sent."""
        counts = attempts.c.phase != str(RecordPhase.NOT_STARTED)
        return int((await self._rows(sa.select(sa.func.count()).where(attempts.c.batch == self.batch, counts)))[0][0])

    async def is_empty(self) -> bool:
        """Return whether the batch has reached no row yet."""
        return not await self._rows(sa.select(rows.c.row_key).where(rows.c.batch == self.batch).limit(1))

    async def run_times(self) -> tuple[float | None, float | None, float | None]:
        """Return the mean, the median and the longest duration of ended runs, in seconds; None if no run has ended.

        A duration is from the kickoff to the moment when we saw the end.
        """
        ended = (attempts.c.batch == self.batch, attempts.c.seconds.is_not(None))
        figures = (sa.func.count(), sa.func.avg(attempts.c.seconds), sa.func.max(attempts.c.seconds))
        ((count, mean, longest),) = await self._rows(sa.select(*figures).where(*ended))
        if not count:
            return None, None, None
        ordered = sa.select(attempts.c.seconds).where(*ended).order_by(attempts.c.seconds).limit(1)
        median = (await self._rows(ordered.offset((count - 1) // 2)))[0][0]
        return float(mean), float(median), float(longest)

    async def spending(self) -> Spending:
        """Return the usage and cost of all runs that have ended."""
        (sums,) = await self._rows(sa.select(*_SPENT).where(*self._in(RecordPhase.ENDED)))
        return _spending(sums)

    async def spending_by_day(self) -> list[tuple[str, str | None, Spending]]:
        """Return usage and cost by the day when runs ended (UTC, YYYY-MM-DD) and the flow run that started them."""
        # The first match is the record's own field: before it are only texts, whose quotes are escaped. PostgreSQL's
        # functions for JSON refuse a record that holds a NUL.
        find = sa.func.strpos if self.database.path is None else sa.func.instr
        text = attempts.c.record

        def after(key: str, length: int) -> sa.ColumnElement[str]:
            at, begin = find(text, f'"{key}":"'), len(key) + 4
            return sa.case((at > 0, sa.func.substr(text, at + begin, length)))

        day, flow_run = after("ended_at", 10), after("flow_run_id", 36)
        ended = self._in(RecordPhase.ENDED)
        query = sa.select(day, flow_run, *_SPENT).where(*ended).group_by(day, flow_run).order_by(day)
        return [(str(on), by, _spending(sums)) for on, by, *sums in await self._rows(query)]

    async def label(self) -> str | None:
        """Return the crew's name for people; None before the first run."""
        records = await self._records(attempts.c.batch == self.batch, limit=1)
        return records[0].crew if records else None

    # The record protocol.

    async def claim(self, record: RunRecord, lease: Lease | None = None) -> bool:
        """Write a new attempt, whose kickoff the caller sends within `record.good_for` seconds.

        Return False if the attempt exists already. `lease`, if any, begins before the write.
        """
        self._own_claims.add(record.owner)
        record.open_for = record.good_for + record.post_deadline + SPARE
        if lease is not None:
            lease.begin()  # the counters of budgets, which come first, may take long
        claimed = await self.writer.put(self._write_of(record, is_claim=True))
        record.entries += claimed
        return claimed

    async def withdraw(self, record: RunRecord) -> None:
        """Write that an attempt was not started. Its claim is its permit as well."""
        await self.save(record)

    async def confirm(self, record: RunRecord, earlier: Sequence[RunRecord]) -> bool:
        """Return True, since one process at a time works on a batch, and nobody prunes its ledger."""
        return True

    async def permit(
        self, record: RunRecord, good_for: float, *, before: Lease | None = None, lease: Lease | None = None
    ) -> bool:
        """Take the right to send the kickoff of a claim once more. Return False if somebody has resolved the claim."""
        record.open_for = good_for + record.post_deadline + SPARE  # `entries` stays 1, as in `_record`
        with suppress(ClaimLostError):
            await self.save(record)
            return True
        return False

    async def resolve(self, record: RunRecord, phase: RecordPhase, **facts: Any) -> bool:
        """Write the resolution of an attempt; False if it has changed since, or its kickoff may still be sent."""
        changes = resolution(record, phase, **facts)
        resolved = record.model_copy(update=changes)
        rule = {"by_owner": False, "expected": record.phase, "is_first": phase is RecordPhase.STARTED}
        if not await self.writer.put(self._write_of(resolved, **rule)):
            return False
        for name, value in changes.items():
            setattr(record, name, value)
        return True

    async def end(self, record: RunRecord, **end: Any) -> bool:
        """Write the end of a run; False if the ledger has an end already, which is then copied to the record."""
        mine = record.owner in self._own_claims
        ended = record.model_copy(update=resolution(record, RecordPhase.ENDED, **end))
        is_closed = await self._write(ended, is_first=True)
        attempts = () if is_closed else await self.attempts(record.idempotency_key)
        stands = next((attempt for attempt in attempts if attempt.attempt == record.attempt and attempt.is_final), None)
        if not is_closed and stands is None:
            await self._raise_unsaved(ended, mine)
        for name, value in (stands or ended).outcome().items():
            setattr(record, name, value)
        return is_closed

    async def unlist(self, record: RunRecord) -> None:
        """Do nothing, since a ledger finds rows by their state."""

    async def save(self, record: RunRecord) -> None:
        """Write the current state of an attempt, unless the ledger knows more already.

        Raises ClaimLostError if somebody has resolved our claim, CrewError if another caller's attempt has changed.
        """
        mine = record.owner in self._own_claims
        if not await self._write(record):
            await self._raise_unsaved(record, mine)

    async def save_started(self, record: RunRecord) -> str | None:
        """Write the kickoff id of a claim. Return the key of another attempt that holds this id, else None."""
        mine = record.owner in self._own_claims
        if await self._write(record, is_first=True):
            return None
        try:
            for held in await self._records(attempts.c.kickoff == digest(str(record.kickoff_id), 64)):
                if (held.idempotency_key, held.attempt) != (record.idempotency_key, record.attempt):
                    self._own_claims.add(record.owner)  # it is still our claim, and its end has to be written
                    return held.idempotency_key
            await self._raise_unsaved(record, mine)
        except CrewError:
            self._log_unsaved(record, "the ledger did not take that. Look at the run on the crew's page.")
            raise
        return None

    async def other_holder(self, record: RunRecord) -> str | None:
        """Return None, because the ledger writes no id that another attempt holds."""
        return None

    async def _write(self, record: RunRecord, *, is_first: bool = False) -> bool:
        """Store the state of an attempt; return whether the ledger took it (`may_follow`). `is_first`: see `Write`."""
        try:
            # Nothing is sent because of an end, so its write need not hurry.
            urgent = record.phase is not RecordPhase.ENDED
            return await self.writer.put(self._write_of(record, is_first=is_first), urgent=urgent)
        except LedgerError:
            if is_first:  # else the ledger has the id already
                key, kickoff_id = shlex.quote(record.idempotency_key), shlex.quote(str(record.kickoff_id))
                command = f"prefect-crew runs resolve {key} --kickoff-id {kickoff_id}"
                self._log_unsaved(record, f"that could not be recorded. Once the ledger is back: {command}")
            raise
        finally:
            if record.phase is not RecordPhase.CLAIMED:
                self._own_claims.discard(record.owner)

    async def _raise_unsaved(self, record: RunRecord, mine: bool) -> None:
        if record.phase is RecordPhase.CLAIMED and mine:
            raise ClaimLostError
        records = await self._records(*self._attempt(attempts, record))
        place = f"row {self.row_key(record.idempotency_key)!r} of batch {self.batch!r}"
        if not records:
            raise RunNotFoundError(
                name=record.idempotency_key,
                advice=f"The ledger {self.address} does not hold attempt {record.attempt} at {place}.",
            )
        stored = records[0]
        state = f"{stored.phase}{f', run {stored.kickoff_id}' if stored.kickoff_id else ''}"
        if not mine:
            raise CrewError(f"{place[:1].upper()}{place[1:]} is {state} in the ledger. Nothing was changed.")
        if record.kickoff_id in (None, stored.kickoff_id):
            text = "The ledger says that %s is %s, and keeps that: the state %s of this call was not written.%s"
            advice = "" if stored.is_unresolved else " Nothing has to be done."
            run_logger().warning(text, place, state, record.phase, advice)
        else:
            look = f"The ledger keeps that. Look at run {record.kickoff_id} on the crew's page."
            self._log_unsaved(record, f"the ledger already says that the row is {state}. {look}")

    def _log_unsaved(self, record: RunRecord, why: str) -> None:
        """Log the id of a run that is in no ledger, since nobody else knows the id."""
        if record.kickoff_id is not None and record.phase is RecordPhase.STARTED:
            row = self.row_key(record.idempotency_key)
            text = "Row %r of batch %s has the run %s on the crew's server, and %s"
            run_logger().error(text, row, self.batch, record.kickoff_id, why)

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a row, the first one first; none for a key of no row of this batch."""
        if not idempotency_key.startswith(self.idempotency_key("")):
            return []
        key = self.row_key(idempotency_key)
        return (await self.attempts_of([key])).get(key, [])

    async def attempts_of(self, row_keys: Sequence[str]) -> dict[str, list[RunRecord]]:
        """Return the attempts at up to `PAGE` rows by row key; rows without an attempt are left out."""
        records = await self._records(attempts.c.batch == self.batch, attempts.c.row_key.in_(row_keys))
        by_row: dict[str, list[RunRecord]] = {}
        for record in sorted(records, key=lambda record: record.attempt):
            by_row.setdefault(self.row_key(record.idempotency_key), []).append(record)
        return by_row

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the attempt of any batch that holds a kickoff id, or None."""
        return next(iter(await self._records(attempts.c.kickoff == digest(kickoff_id, 64))), None)

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return whether the owner of a claim is surely gone. If False, only the age of the claim decides."""
        return self.is_exclusive and record.owner not in self._own_claims

    async def unresolved(self) -> list[RunRecord]:
        """Return the claims and the uncertain attempts."""
        return await self._records(*self._in(RecordPhase.UNCERTAIN, RecordPhase.CLAIMED))

    async def note_orphaned(self) -> None:
        """Turn the claims of dead processes into uncertain attempts. Only the holder of the batch's lock may do so."""
        for record in await self.unresolved():
            if record.phase is RecordPhase.CLAIMED and await self.owner_ended(record):
                record.phase, record.reason = RecordPhase.UNCERTAIN, SENDER_ENDED
                await self.writer.put(self._write_of(record, by_owner=True))

    # People's answers to rows.

    async def in_flight(self) -> list[RunRecord]:
        """Return the runs in flight, also of rows that have left the data set or have other inputs now."""
        return await self._records(*self._in(RecordPhase.STARTED))

    async def left_out(self, crew_url: str) -> list[RunRecord]:
        """Return the turns in flight on a crew's server whose rows have left the data set or have other inputs now."""
        own_row = (rows.c.batch == attempts.c.batch, rows.c.row_key == attempts.c.row_key)
        is_out = sa.or_(rows.c.number.is_(None), rows.c.state == str(RowState.CONFLICT))
        records = await self._records(*self._in(RecordPhase.STARTED), *own_row, is_out)
        return [record for record in records if record.session is not None and record.crew_url == crew_url]

    async def may_ask(self) -> AsyncIterator[RunRecord]:
        """Yield the runs in flight that waited for a person at their last poll."""
        for record in await self.in_flight():
            if record.human_since is not None:
                yield record

    async def reviews(self, record: RunRecord) -> list[Review]:
        """Return the answers of people to a run, in order."""
        query = sa.select(answers.c.review).where(*self._attempt(answers, record)).order_by(answers.c.number)
        return [Review.model_validate_json(text) for (text,) in await self._rows(query)]

    async def add_review(self, record: RunRecord, number: int, review: Review) -> bool:
        """Write an answer that is about to be sent; False if another answer has this number."""
        place = {"batch": self.batch, "row_key": self.row_key(record.idempotency_key), "attempt": record.attempt}
        values = {**place, "number": number, "review": review.model_dump_json()}
        statement = self.database.insert(answers).values(values).on_conflict_do_nothing()
        return await self._run(lambda connection: connection.execute(statement).rowcount == 1, "written", once=True)

    async def save_review(self, record: RunRecord, number: int, review: Review) -> None:
        """Replace the run's answer `number` by `review`, whose `outcome` or `moved_on` has changed."""
        where = (*self._attempt(answers, record), answers.c.number == number)
        await self._execute(sa.update(answers).where(*where).values(review=review.model_dump_json()))

    async def remove_review(self, record: RunRecord, number: int, review: Review) -> None:
        """Remove an answer that the crew's server refused."""
        where = (*self._attempt(answers, record), answers.c.number == number)
        await self._execute(sa.delete(answers).where(*where, answers.c.review == review.model_dump_json()))

    def _attempt(self, table: sa.Table, record: RunRecord) -> tuple[sa.ColumnElement[bool], ...]:
        row = table.c.row_key == self.row_key(record.idempotency_key)
        return table.c.batch == self.batch, row, table.c.attempt == record.attempt

    def _in(self, *phases: RecordPhase) -> tuple[sa.ColumnElement[bool], ...]:
        """Return the conditions that an attempt is of this batch and in one of these phases."""
        return attempts.c.batch == self.batch, attempts.c.phase.in_([str(phase) for phase in phases])

    async def _records(self, *where: sa.ColumnElement[bool], limit: int | None = None) -> list[RunRecord]:
        """Return the attempts that fulfil these conditions, in any order."""
        query = sa.select(attempts.c.record, self._left).where(*where).limit(limit)
        return [_record(*row) for row in await self._rows(query)]

    async def _rows(self, query: Any) -> list[Any]:
        return await self._run(lambda connection: list(cast("Any", connection.execute(query))), "read")

    async def _execute(self, statement: Any) -> None:
        await self._run(lambda connection: connection.execute(statement).close(), "written")

    async def _run(self, work: Callable[[sa.Connection], T], purpose: str, *, once: bool = False) -> T:
        """Run `work`, and repeat it while the database cannot be reached, unless `work` may run only `once`."""

        def locked(connection: sa.Connection) -> T:
            self.database.lock(connection, self.batch)
            return work(connection)

        work_now = locked if purpose == "written" else work
        try:
            return await (self.database.run(work_now) if once else self.writer.keep_trying(work_now, purpose))
        except (SQLAlchemyError, OSError) as error:
            raise LedgerError(f"cannot be {purpose}: {short(error)}.", ledger=self.address) from error

    def _write_of(self, record: RunRecord, **rule: Any) -> Write:
        """Return the write of a record. `rule` has attributes of `Write`.

        By default, `by_owner` is true for our claims.
        """
        seconds = usage = None
        if record.phase is RecordPhase.ENDED and record.kicked_off_at is not None and record.ended_at is not None:
            seconds = (record.ended_at - record.kicked_off_at).total_seconds()
        if (reported := record.usage or (record.result and record.result.usage)) is not None:
            usage = reported.model_dump(exclude_none=True)
        if record.cost is not None:
            usage = {**(usage or {}), "cost": record.cost}
        attempt = Attempt(
            batch=self.batch,
            row_key=self.row_key(record.idempotency_key),
            attempt=record.attempt,
            phase=record.phase,
            state=state_of(record),
            kickoff=None if record.kickoff_id is None else digest(record.kickoff_id, 64),
            owner=record.owner,
            record=record.model_dump_json(exclude_none=True),
            seconds=seconds,
            usage=usage,
        )
        rule.setdefault("by_owner", record.owner in self._own_claims)
        return Write(attempt, record.open_for, **rule)


def _count(name: str) -> sa.ColumnElement[int]:
    return attempts.c.usage[name].as_string().cast(sa.BigInteger)


_COST = attempts.c.usage["cost"].as_string().cast(sa.Double)
_SPENT = (
    sa.func.count(),
    sa.func.count(_count("total_tokens")),
    sa.func.count(_COST),
    sa.func.sum(_COST),
    *(sa.func.sum(_count(name)) for name in TokenUsage.model_fields),
)


def _spending(row: Sequence[Any]) -> Spending:
    runs, reported, priced, cost, *counts = row
    usage = {name: int(count) for name, count in zip(TokenUsage.model_fields, counts, strict=True) if count is not None}
    return Spending(runs, reported, priced, TokenUsage(**usage) if usage else None, cost)


def _masked(job: RowJob, crew: Crew) -> str:
    """Return the inputs of a row as JSON, with secrets masked, also where another input repeats one."""
    inputs = job.inputs.shown(crew.redactor(job.inputs)) if job.inputs.secret_names else job.inputs.encoded
    return to_json(inputs, inf_nan_mode="null", serialize_unknown=True).decode()


def _record(text: str, seconds: float | None) -> RunRecord:
    # In a ledger a claim is its permit as well, which saves a write for each row.
    return RunRecord.model_validate_json(text).model_copy(
        update={"entries": 1, "open_for": max(0.0, float(seconds or 0))}
    )
