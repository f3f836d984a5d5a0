"""Run records in Prefect Variables. Any machine that shares the Prefect server or workspace finds them.

A Variable's name is unique on the server, so the creation of a Variable is an atomic claim (measured: 20 racers, one
winner). Its value holds 5,000 bytes of JSON. The server replaces a value, and does not compare it with the old one.
No clean-up of flow runs or artifacts removes a Variable.

- `crew_run_KEY_ATTEMPT` is the claim. If the call that made it gives it back without a permit, the call deletes or
  changes it. After that only its tag changes, by which lists find open runs.
- `crew_run_KEY_ATTEMPT_CLAIM_NUMBER` is an entry in the log of that claim (`model.Entry`): a permit, a resolution, or
  the end. Numbers have no gap. The creator of a permit or a resolution changes it, and waiting callers write to it
  whether a person has to answer. Nobody changes an end.
- `crew_kickoff_ID` holds the claim whose run has this kickoff id. If two records were given one id, the record whose
  caller creates this Variable keeps the id.
- `crew_answer_RUN_NUMBER` is a person's answer.

Callers can compute every name, and the server has an index of names, of ids and of the time of the last change. So a
start, a second call and a resolution read exact names. Costs and pruning read by the time of the last change, from one
end. `LIKE` and tags make the server read all its Variables: only a list that a person asked for does that. An open
claim has no tag, since a server finds Variables without tags ten times as fast as Variables with a tag.

`model.fold` combines a claim and its entries. A change addresses a Variable by its id: under the same name, somebody
may have created another Variable since.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, TypeVar, cast
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError
from pydantic_core import to_json

from prefect_crew._internal.prefect_api import BUSY_FOR, Urgency, is_busy, request_soon, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.client.models import Review
from prefect_crew.exceptions import (
    CrewError,
    TooManyAttemptsError,
    UnreadableRecordError,
)
from prefect_crew.records.keys import normalize_key
from prefect_crew.records.model import (
    RECORD_VERSION,
    Entry,
    Lease,
    RecordPhase,
    RunRecord,
    digest,
    fold,
    resolution,
)
from prefect_crew.records.notes import forget_notes
from prefect_crew.records.results import forget_result, keep_result
from prefect_crew.records.variables import (
    PAGE,
    Variable,
    create_variable,
    delete_variable,
    pages_by_change,
    patch_variable,
    read_exact,
    read_pages,
)

TAG = "prefect-crew"
ENTRY_TAG = "prefect-crew-entry"
KICKOFF_TAG = "prefect-crew-kickoff"
VALUE_LIMIT = 4900
"""Bytes of JSON; Prefect refuses more than 5,000."""
MOST_ATTEMPTS = 64
"""The most attempts of one idempotency key on record: one request reads them all. When a key has half as many, a new
claim first deletes the last attempts that did not start."""
RESOLUTION_STANDS = 3600.0
"""Seconds for which an attempt that somebody other than its owner declared as not started stays on record at least."""
TRIES = 5
"""Attempts to create the Variable of a kickoff id, or the end of a run, while others change the same names."""
UNLIST_FOR = 5.0
"""Seconds for which the request for a tag is repeated while the Prefect API is busy."""
LEAST, MOST = PAGE // MOST_ATTEMPTS, 20
"""Entries of a claim that the first request asks for, at least and at most. The log of a usual run has two: a permit
and the end. One request is enough for all attempts at a key. For a claim with more entries, further requests ask for
`PAGE` each: a crew's server that answers 429 for ten minutes causes about 130 entries."""
ANSWERS = 50
"""Answers to a run that one request asks for."""
_OPEN = (RecordPhase.CLAIMED, RecordPhase.UNCERTAIN, RecordPhase.STARTED)
"""The phases in which a claim has no tag. The claim of an ended run may lack it too, if the process that ended the run
died before it set the tag."""
_WITHOUT_TAG: dict[str, Any] = {"name": {"like_": "crew_run_"}, "tags": {"is_null_": True}}
_NAME = re.compile(r"(crew_run_[0-9a-f]{32}_\d+)(?:_([0-9a-f]{32})_(\d+))?")
_KICKOFF_NAME = re.compile(r"crew_kickoff_[0-9a-f]{32}")
_SHORTER = {"result": None, "step": 100, "error": 200, "reason": 200, "crew": 100}
"""The fields of a too large record that are dropped (None) or cut to so many characters, in this order."""
_Model = TypeVar("_Model", RunRecord, Entry)


# Names and values


def record_name(idempotency_key: str, attempt: int) -> str:
    """Return the name of the Variable that holds an attempt at an idempotency key."""
    return f"crew_run_{digest(idempotency_key)}_{attempt}"


def _answer_name(record: RunRecord, number: int) -> str:
    # By the run and not by its key: a caller that has no record of the run, or cannot read it, still finds the answers.
    return f"crew_answer_{digest(f'{record.crew_url} {record.kickoff_id}')}_{number:04}"


def _attempt_names(idempotency_key: str) -> list[str]:
    return [record_name(idempotency_key, number + 1) for number in range(MOST_ATTEMPTS)]


def _entry_name(record: RunRecord, number: int) -> str:
    claim = str(record.ref).replace("-", "")
    return f"{record_name(record.idempotency_key, record.attempt)}_{claim}_{number}"


def _kickoff_name(kickoff_id: str) -> str:
    return f"crew_kickoff_{digest(kickoff_id)}"


def _body(record: RunRecord | Entry) -> dict[str, Any]:
    """Return value and tags of a Variable. This cuts the value until it fits; a result stays whole or is left out."""
    value = record.model_dump(mode="json", exclude_none=True)
    for name, most in _SHORTER.items():
        if len(to_json(value)) <= VALUE_LIMIT:
            break
        if most is None:
            value.pop(name, None)
        elif name in value:
            value[name] = value[name][:most]
    if isinstance(record, Entry):
        return {"value": value, "tags": [ENTRY_TAG]}
    return {"value": value, "tags": [] if record.phase in _OPEN else [TAG]}


def records_in(variables: Sequence[Variable]) -> list[RunRecord]:
    """Return the records among some Variables, each combined with its entries among them, by the number of the attempt.

    Clocks give no order: a server's clock may be set back, or differ from the clock of another replica.

    Raises:
        CrewError: A later version wrote one of the records.
    """
    entries: dict[tuple[str, str], dict[int, Entry]] = {}
    claims: list[tuple[str, Variable, RunRecord]] = []
    for variable in variables:
        parts = _NAME.fullmatch(variable.name)
        if parts is None:
            continue
        name, claim, number = parts.groups()
        if claim is None:
            if (record := _parse(variable.value, RunRecord)) is not None:
                claims.append((name, variable, record))
        elif (entry := entry_in(variable)) is not None:
            entries.setdefault((name, claim), {})[int(number)] = entry
    records: list[RunRecord] = []
    for name, variable, record in sorted(claims, key=lambda claim: claim[2].attempt):
        theirs = entries.get((name, variable.id.replace("-", "")), {})
        idle = min([variable.idle, *(entry.idle for entry in theirs.values())])
        record = record.model_copy(update={"ref": variable.id, "idle": idle})
        records.append(fold(record, [theirs[number] for number in sorted(theirs)], age=variable.age))
    return records


def entry_in(variable: Variable) -> Entry | None:
    """Return the entry that a Variable holds, or None. Raises the errors of `_parse`."""
    name = _NAME.fullmatch(variable.name)
    if name is None or name[2] is None or (entry := _parse(variable.value, Entry)) is None:
        return None
    facts = {"ref": variable.id, "claim": str(UUID(name[2])), "age": variable.age, "idle": variable.idle}
    return entry.model_copy(update=facts)


def _parse(value: Any, model: type[_Model]) -> _Model | None:
    """Return the value of a Variable as a model, None if it is something else: other software may use our names.

    Raises:
        CrewError: A later version wrote the value. This version does not know its fields, and decides nothing.
    """
    if (problem := later_version(value)) is not None:
        raise problem
    try:
        return model.model_validate(value)
    except ValidationError:
        return None


def later_version(value: Any) -> CrewError | None:
    """Return the error about a record that a later version wrote, None for any other."""
    version = cast("dict[str, Any]", value).get("version") if isinstance(value, dict) else None
    if not isinstance(version, int) or version <= RECORD_VERSION:
        return None
    return UnreadableRecordError(
        f"The record of run {cast('dict[str, Any]', value).get('idempotency_key')!r} was written by a later version of "
        f"prefect-crew (record version {version}, this one reads up to {RECORD_VERSION}). Nothing was started. "
        "Upgrade prefect-crew here, then run again with the same key."
    )


def _note(record: RunRecord, facts: Mapping[str, Any]) -> None:
    """Set in a record the facts that the server now stores. From here on nobody sends a kickoff for it."""
    for name, value in {**facts, "open_for": 0.0}.items():
        setattr(record, name, value)


def claims_named_in(variables: Iterable[Variable]) -> dict[str, str]:
    """Return the ids of Variables that belong to a claim, each with the id of that claim."""
    claims = dict[str, str]()
    for variable in variables:
        if (entry := _NAME.fullmatch(variable.name)) is not None and entry[2]:
            claims[variable.id] = str(UUID(entry[2]))
        elif _KICKOFF_NAME.fullmatch(variable.name) and isinstance(claim := variable.fields.get("claim"), str):
            with suppress(ValueError):  # other software may use our names
                claims[variable.id] = str(UUID(claim))
    return claims


def _warn_of(problem: CrewError | None) -> None:
    if problem is not None:
        run_logger().warning("At least one run is left out of this list. %s", problem)


def _is_unused(record: RunRecord) -> bool:
    """Return whether an attempt did not start, and its owner can send no kickoff even if its Variables are deleted.

    Either the owner itself wrote that the attempt did not start, or somebody else did so long ago. The entry of
    somebody else prevents that a living owner takes a permit, so it has to stay for some time.
    """
    is_given_back = record.strongest is None or record.strongest.owner == record.owner
    return record.phase is RecordPhase.NOT_STARTED and (is_given_back or record.idle > RESOLUTION_STANDS)


def _is_gone(error: Exception) -> bool:
    return isinstance(error, PrefectHTTPStatusError) and error.response.status_code == 404


# Requests


async def _read_existing(name: str, model: type[_Model], idempotency_key: str) -> _Model | None:
    """Return the record or entry in the Variable `name`, with its `ref`; None if the Variable is gone.

    The record may be the caller's own, since Prefect's client repeats a request after a read timeout or a 502.

    Raises:
        CrewError: This version of the package cannot read the Variable.
    """
    async with get_client() as client:
        variable = await client.read_variable_by_name(name)
    if variable is None:
        return None
    if (parsed := _parse(variable.value, model)) is None:
        raise UnreadableRecordError(
            f"The Variable {name} should hold the record of run {idempotency_key!r}, or an entry of that record, and "
            "this version cannot read it. Nothing was started. Upgrade prefect-crew if a later version wrote it. Else, "
            "once the crew's page shows no run in flight, delete the Variable: the next call with this key may then "
            "start a run."
        )
    return parsed.model_copy(update={"ref": str(variable.id)})


async def _read_entries(records: Sequence[RunRecord]) -> list[Variable]:
    """Read the entries of claims by their names. Numbers have no gap: a caller creates entry N + 1 after entry N."""
    entries: list[Variable] = []
    for start in range(0, len(records), PAGE // LEAST):
        some = records[start : start + PAGE // LEAST]
        first = min(MOST, PAGE // len(some))
        entries += await read_exact([_entry_name(record, number + 1) for record in some for number in range(first)])
        names = {entry.name for entry in entries}
        for record in some:
            number = first
            while _entry_name(record, number) in names:
                more = await read_exact([_entry_name(record, number + 1 + further) for further in range(PAGE)])
                entries += more
                names |= {entry.name for entry in more}
                number += PAGE
    return entries


class PrefectRecords:
    """The record store on the Prefect server. Its methods may be called from any event loop.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached or refuses. `save` and `end` try for five minutes.
    """

    async def claim(self, record: RunRecord, lease: Lease | None = None) -> bool:
        """Create the attempt's Variable. Return False if another caller's Variable has its name.

        Also return False if this call deleted attempts to make room, or if somebody has resolved this claim since.

        Raises:
            CrewError: This version cannot read the Variable that has the name.
            TooManyAttemptsError: The key has as many attempts on record as it may have.
        """
        if record.attempt > MOST_ATTEMPTS // 2 and await self._make_room(record.idempotency_key):
            return False  # the caller reads the attempts again, and takes a lower number
        if record.attempt > MOST_ATTEMPTS:
            raise TooManyAttemptsError(idempotency_key=record.idempotency_key, attempts=MOST_ATTEMPTS)
        name = record_name(record.idempotency_key, record.attempt)
        record.ref = await create_variable({"name": name, **_body(record)}, urgency=Urgency.BEGIN, lease=lease)
        if record.ref is not None:
            return True
        existing = await _read_existing(name, RunRecord, record.idempotency_key)
        # An earlier claim of the same caller has another time. The caller has given it back, and the request that
        # deletes it may still arrive.
        own = (record.owner, record.claimed_at)
        if existing is None or (existing.owner, existing.claimed_at) != own:
            return False
        record.ref = existing.ref
        # Somebody may have resolved or voided the claim since: its entries show that.
        current = await self._current(record)
        return current is not None and (current.phase, current.entries) == (RecordPhase.CLAIMED, 0)

    async def _make_room(self, idempotency_key: str) -> bool:
        """Delete the last attempts at a key that surely did not start. Return False if there are none.

        It deletes from the highest number down to the first attempt that must stay, so the next claim has a higher
        number than each attempt that may have started. `confirm` refuses a caller that decided by a deleted attempt.
        """
        unused: list[RunRecord] = []
        for record in reversed(await self.attempts(idempotency_key)):
            if not _is_unused(record):
                break
            unused.append(record)
        entries = await _read_entries(unused)
        for gone in (*(str(record.ref) for record in unused), *(entry.id for entry in entries)):
            await delete_variable(gone)
        return bool(unused)

    async def withdraw(self, record: RunRecord) -> None:
        """Delete a claim for which nobody has asked a permit. Its number is then free again.

        The DELETE request is repeated while the server is busy, and by a caller whose event loop ended before the
        answer. If its answer is lost, the request may still arrive later. It names this claim by its id, and nobody
        sends a kickoff for this claim any more. Until then the claim says that nothing started.
        """
        try:
            async with get_client() as client:
                await request_soon(
                    client, "DELETE", f"/variables/{record.ref}", json=None, give_up_after=BUSY_FOR, again=is_busy
                )
        except PREFECT_ERRORS as unanswered:
            if _is_gone(unanswered):
                return
            try:
                await self.save(record)
            except PrefectHTTPStatusError as error:
                if not _is_gone(error):
                    raise

    async def confirm(self, record: RunRecord, earlier: Sequence[RunRecord]) -> bool:
        """Return whether the key has exactly these attempts: this claim, and the earlier ones that the caller read.

        An attempt that is gone, or a new one of a caller that did not see this claim, may belong to a run. This
        compares ids, not numbers, since a caller, even the same one, may have claimed a free number again.
        """
        attempts = {attempt.ref for attempt in records_in(await read_exact(_attempt_names(record.idempotency_key)))}
        return attempts == {record.ref, *(attempt.ref for attempt in earlier)}

    async def permit(
        self, record: RunRecord, good_for: float, *, before: Lease | None = None, lease: Lease | None = None
    ) -> bool:
        """Create the next permit of a claim, with its `lease`. Return False if another entry has its number.

        If the earlier lease `before` is over, also return False if somebody has resolved the claim, or if it is gone.
        """
        about = record.model_dump(include={"idempotency_key", "attempt", "owner", "estimates", "turn"})
        if not await self._add_entry(record, Entry(good_for=good_for, **about), partial(create_variable, lease=lease)):
            return False
        # After the request and not before it: a process may sleep between the two.
        if before is None or not before.is_over:
            return True
        # Others may have resolved and pruned the record since, and its entries with it: so read it again.
        current = await self._current(record)
        return current is not None and current.phase is RecordPhase.CLAIMED and current.entries == record.entries

    async def resolve(self, record: RunRecord, phase: RecordPhase, **facts: Any) -> bool:
        """Create the next entry of a record, with its outcome. Return False if another entry has its number."""
        outcome = resolution(record, phase, **facts)
        about = record.model_dump(include={"idempotency_key", "attempt"})
        if not await self._add_entry(record, Entry(owner=str(uuid4()), **about, **outcome), create_variable):
            return False
        if phase is RecordPhase.STARTED and await self._name_kickoff(record.model_copy(update=outcome)) is not None:
            # Another record got this kickoff id at the same moment: this one is as uncertain as before.
            entry = cast("Entry", record.strongest)
            before = {**record.outcome(), "phase": RecordPhase.UNCERTAIN}
            await patch_variable(str(entry.ref), _body(entry.model_copy(update=before)))
            return False
        _note(record, outcome)
        return True

    async def _add_entry(
        self, record: RunRecord, entry: Entry, create: Callable[[dict[str, Any]], Awaitable[str | None]]
    ) -> bool:
        """Create the next entry of a record and set it in the record. Return False if its number is taken."""
        number = record.entries + 1
        name = _entry_name(record, number)
        ref = await create({"name": name, **_body(entry)})
        if ref is None:
            existing = await _read_existing(name, Entry, record.idempotency_key)
            if existing is None or (existing.owner, existing.phase) != (entry.owner, entry.phase):
                return False
            ref = existing.ref
        record.entries, record.strongest = number, entry.model_copy(update={"ref": ref})
        return True

    async def end(self, record: RunRecord, **end: Any) -> bool:
        """Create the end in a run's log. Repeat the request for five minutes while the Prefect API does not answer.

        Return False if the log has an end: the record then gets that end. No later entry undoes an end. If another
        entry has its number, the end gets the next number, also after a person's resolution that the run is lost. A
        result that is too large for the end is stored first, as an artifact whose id the end holds.
        """
        about = record.model_dump(include={"idempotency_key", "attempt", "crew", "crew_url", "flow_run_id"})
        entry = Entry(owner=str(uuid4()), **about, **resolution(record, RecordPhase.ENDED, **end))
        if entry.result is not None and "result" not in _body(entry)["value"]:
            entry.result_id = await keep_result(entry.result)
        current: RunRecord | None = record
        create = partial(create_variable, urgency=Urgency.FINISH, is_patient=True)
        for _ in range(TRIES):
            try:
                is_added = await self._add_entry(current, entry, create)
            except PrefectHTTPStatusError as error:
                if error.response.status_code not in (400, 413, 422) or not (entry.result or entry.usage):
                    raise
                # Prefect refuses numbers beyond 64 bits and too deep nesting: an artifact holds them as text.
                if entry.result is not None and entry.result_id is None:
                    entry.result_id = await keep_result(entry.result)
                entry.result = entry.usage = None
                continue
            if is_added:
                _note(record, {**entry.outcome(), "entries": current.entries, "strongest": current.strongest})
                return True
            current = await self._current(record)
            if current is None:
                break
            if current.is_final:
                _note(record, {**current.outcome(), "entries": current.entries, "strongest": current.strongest})
                break
        with suppress(*PREFECT_ERRORS):
            await forget_result(entry.result_id)
        return False

    async def unlist(self, record: RunRecord) -> None:
        """Give a claim its tag: lists of open runs look for claims without a tag, and then read their logs."""
        with suppress(*PREFECT_ERRORS):  # a list reads the log of each claim that it finds
            await patch_variable(str(record.ref), {"tags": [TAG]}, urgency=Urgency.SHOW, give_up_after=UNLIST_FOR)

    async def save(self, record: RunRecord) -> None:
        """Write the outcome of a run. Repeat the request for five minutes while the Prefect API does not answer.

        This writes to the strongest entry, or to the claim itself if that has no entry and its owner gives it back.
        """
        strongest = record.strongest
        changed = record if strongest is None else strongest.model_copy(update=record.outcome())
        await patch_variable(str(changed.ref), _body(changed))

    async def save_started(self, record: RunRecord) -> str | None:
        """Write the kickoff id of a claim, then create the Variable `crew_kickoff_ID`.

        Return the key of another record that holds this id, else None. If there is one, the caller takes the id back.
        """
        await self.save(record)
        return await self._name_kickoff(record)

    async def other_holder(self, record: RunRecord) -> str | None:
        """Return the key of another record that holds this record's kickoff id, or None.

        It creates the Variable `crew_kickoff_ID` if that is missing: the owner may have written the id and not yet
        created that Variable, or have died before.
        """
        for pointer in await read_exact([_kickoff_name(str(record.kickoff_id))]):
            if pointer.fields.get("claim") == record.ref:
                return None
        return await self._name_kickoff(record)

    async def _name_kickoff(self, record: RunRecord) -> str | None:
        """Create the Variable `crew_kickoff_ID`, by which a record is found from its kickoff id.

        If two records were given one id, only one of them gets this Variable. Return None if `record` gets it, else the
        idempotency key of the other record. A Variable whose record was pruned, or does not hold the id any more, is
        replaced.
        """
        kickoff_id = str(record.kickoff_id)
        value = {"idempotency_key": record.idempotency_key, "claim": record.ref}
        name = _kickoff_name(kickoff_id)
        variable = {"name": name, "value": value, "tags": [KICKOFF_TAG]}
        try:
            for _ in range(TRIES):
                if await create_variable(variable, urgency=Urgency.FINISH) is not None:
                    return None
                for pointer in await read_exact([name]):
                    if pointer.value == value:  # Prefect's client sends a request again after a read timeout or a 502
                        return None
                    if (holder := await self._holder(pointer, kickoff_id)) is not None:
                        return holder.idempotency_key
                    await delete_variable(pointer.id)
        except (*PREFECT_ERRORS, CrewError) as error:
            # The caller has to wait for the run also if the Prefect API fails here.
            run_logger().warning(
                "Commands find run %s by its key only, because a Variable was not stored: %s", kickoff_id, error
            )
        return None

    async def _holder(self, pointer: Variable, kickoff_id: str) -> RunRecord | None:
        """Return the record that a Variable `crew_kickoff_ID` names, None if the record does not hold that id."""
        value = pointer.fields
        attempts = await self.attempts(str(value.get("idempotency_key", "")))
        return next(
            (attempt for attempt in attempts if (attempt.ref, attempt.kickoff_id) == (value.get("claim"), kickoff_id)),
            None,
        )

    async def _current(self, record: RunRecord) -> RunRecord | None:
        """Read a claim again, None if it is gone."""
        return next(
            (attempt for attempt in await self.attempts(record.idempotency_key) if attempt.ref == record.ref), None
        )

    # Reading

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key, the first one first. One request reads the claims, a second one the entries."""
        return await self._with_entries(await read_exact(_attempt_names(normalize_key(idempotency_key))))

    async def _with_entries(self, claims: Sequence[Variable]) -> list[RunRecord]:
        """Return the records of claims, combined with their entries.

        A claim that its owner gave back has no entries that count. Entries are read after the claims, so they may be
        newer.
        """
        records = records_in(claims)
        entries = await _read_entries([record for record in records if record.phase is RecordPhase.CLAIMED])
        return records_in([*claims, *entries]) if entries else records

    async def unresolved_among(self, runs: Iterable[tuple[str, int | None]]) -> set[tuple[str, int | None]]:
        """Return the attempts of these keys and numbers of which nobody knows whether their kickoff started a run."""
        names = [record_name(key, attempt) for key, attempt in runs if attempt is not None]
        pages = read_pages({"name": {"any_": names}})
        claims = [variable async for page in pages for variable in page if later_version(variable.value) is None]
        records = await self._with_entries(claims)
        return {(record.idempotency_key, record.attempt) for record in records if record.is_unresolved}

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the record that holds a kickoff id, if any."""
        for pointer in await read_exact([_kickoff_name(kickoff_id)]):
            return await self._holder(pointer, kickoff_id)
        return None

    async def all(self, *phases: RecordPhase) -> AsyncIterator[RunRecord]:
        """Yield every record that this version can read, or only records in some phases. The order is not promised.

        The server reads all its Variables for each page of the answer, so only lists that a person asks for use this.
        """
        # Open runs first: a run that ends between the two reads is then read twice, not missed.
        pages = [read_pages(_WITHOUT_TAG, sort="CREATED_DESC")]
        if not phases or not {*phases} <= {*_OPEN}:
            pages.append(read_pages({"tags": {"all_": [TAG]}}))
        problem: CrewError | None = None
        refs = set[str | None]()
        for some in pages:
            async for page in some:
                records, unreadable = await self.readable(page)
                problem = unreadable or problem
                for record in records:
                    if record.ref not in refs and (not phases or record.phase in phases):
                        refs.add(record.ref)
                        yield record
        _warn_of(problem)

    async def ended_since(self, moment: datetime) -> AsyncIterator[Entry]:
        """Yield the ends of runs since a moment by the server's clock, the latest first, one for each run.

        The server reads only Variables that were changed since then.
        """
        problem, claims = None, set[str | None]()
        async for page in pages_by_change(moment):
            for variable in page:
                if (unreadable := later_version(variable.value)) is not None:
                    problem = unreadable
                elif (end := entry_in(variable)) and end.phase is RecordPhase.ENDED and end.claim not in claims:
                    claims.add(end.claim)
                    yield end
        _warn_of(problem)

    async def readable(self, variables: Sequence[Variable]) -> tuple[list[RunRecord], CrewError | None]:
        """Return the records whose claims are among Variables, and the error about an unreadable record, if any."""
        claims = [
            variable
            for variable in variables
            if (parts := _NAME.fullmatch(variable.name)) is not None and parts[2] is None
        ]
        problems = [error for variable in claims if (error := later_version(variable.value)) is not None]
        claims = [variable for variable in claims if later_version(variable.value) is None]
        records = records_in(claims)
        entries = await _read_entries([record for record in records if record.phase is RecordPhase.CLAIMED])
        unknown = [entry for entry in entries if later_version(entry.value) is not None]
        problems += [error for entry in unknown if (error := later_version(entry.value)) is not None]
        # If this version cannot read an entry of a claim, it does not know the state of the run.
        left_out = {parts[2] for entry in unknown if (parts := _NAME.fullmatch(entry.name)) is not None}
        read = [claim for claim in claims if claim.id.replace("-", "") not in left_out]
        if entries:
            records = records_in([*read, *(entry for entry in entries if entry not in unknown)])
        return records, next(iter(problems), None)

    def may_ask(self) -> AsyncIterator[RunRecord]:
        """Yield the runs in flight: any of them may wait for a person."""
        return self.all(RecordPhase.STARTED)

    # Deleting

    async def delete(self, record: RunRecord) -> list[Variable]:
        """Delete an attempt and people's answers to it. Return the deleted Variables. A later call with its key then
        starts a run."""
        claim = record_name(record.idempotency_key, record.attempt)
        pointers = [_kickoff_name(record.kickoff_id)] if record.kickoff_id else []
        variables = await read_exact([claim, *pointers])
        notes = await self._answers(record)
        await forget_notes(record, len(notes))
        await forget_result(record.result_id)
        notes += [item for item in variables if item.name in pointers and item.fields.get("claim") == record.ref]
        claims = [item for item in variables if item.id == record.ref]
        entries = await _read_entries([record])
        # By id: somebody may have created a new claim under the name. The claim before its entries: without them it
        # would seem to have no permit.
        gone = [*notes, *claims, *entries]
        for variable in gone:
            await delete_variable(variable.id)
        return gone

    # The flow run that claimed a record

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return whether the owner's flow run has ended or is deleted; False if the owner had no flow run."""
        return record.flow_run_id is not None and not await _is_alive(record.flow_run_id)

    # People's answers. They have Variables of their own: a waiting caller may write the record at the same moment, and
    # the server replaces a value without comparing it.

    async def reviews(self, record: RunRecord) -> list[Review]:
        """Return people's answers to the questions of a run, in order."""
        return [Review.model_validate(note.value) for note in await self._answers(record)]

    async def _answers(self, record: RunRecord) -> list[Variable]:
        answers: list[Variable] = []
        first, names = 1, [""]
        while first == 1 or names[-1] in {answer.name for answer in answers}:
            names = [_answer_name(record, first + further) for further in range(ANSWERS)]
            answers += await read_exact(names)
            first += ANSWERS
        return sorted(answers, key=lambda answer: answer.name)

    async def add_review(self, record: RunRecord, number: int, review: Review) -> bool:
        """Write an answer before it is sent. Return False if an answer with another nonce has this number."""
        name, nonce = _answer_name(record, number), review.nonce or str(uuid4())
        value = {**review.model_dump(mode="json"), "nonce": nonce}
        if await create_variable({"name": name, "value": value, "tags": []}) is not None:
            return True
        # Prefect's client repeats a request whose answer was lost, and then meets its own Variable: the nonce shows it.
        async with get_client() as client:
            stands: Any = await client.read_variable_by_name(name)
        return stands is not None and stands.value.get("nonce") == nonce

    async def save_review(self, record: RunRecord, number: int, review: Review) -> None:
        """Replace the run's answer `number` by `review`, whose `outcome` or `moved_on` has changed."""
        await patch_variable(f"name/{_answer_name(record, number)}", {"value": review.model_dump(mode="json")})

    async def remove_review(self, record: RunRecord, number: int, review: Review) -> None:
        """Take back an answer that the crew's server refused."""
        # By id: Prefect's client may repeat the request after somebody else's answer has the number.
        for answer in await read_exact([_answer_name(record, number)]):
            if answer.fields.get("nonce") == review.nonce:
                await delete_variable(answer.id)


async def _is_alive(flow_run_id: str) -> bool:
    async with get_client() as client:
        try:
            flow_run = await client.read_flow_run(UUID(flow_run_id))
        except ObjectNotFound:
            return False
    state = flow_run.state
    return state is not None and not state.is_final() and not state.is_cancelling()
