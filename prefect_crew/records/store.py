"""Run records in Prefect Variables: found again from any machine that shares the Prefect server or workspace.

A Variable's name is unique on the server, so creating one is an atomic claim; its value holds 5,000 bytes of JSON and
is replaced, not compared; nobody's clean-up of flow runs or artifacts removes it (read in Prefect 3.9.1's source and
measured: 20 racers, one winner). The attempt's number is part of the name, so that starting again is a claim as well.

- `crew_run_KEY_ATTEMPT` is the claim. The call that made it changes it if it gives it back without a permit; after that
  only whoever sees the run's end does.
- `crew_run_KEY_ATTEMPT_CLAIM_NUMBER` is a permit of that claim. Whoever created it changes it: the claim's owner, or
  somebody who resolved it. Whoever waits for the run notes there whose turn it is; it stays its creator's.

`records.folded` says what they mean together. Changes go by the Variable's id: by its name they could reach another one
that was created under it since.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError
from pydantic_core import to_json

from prefect_crew._internal.prefect_api import Rank, busy, request_soon, run_logger
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.keys import normalize_key
from prefect_crew.records.model import (
    RECORD_VERSION,
    Permit,
    RecordPhase,
    RunRecord,
    SentReview,
    folded,
    resolved,
    utcnow,
)
from prefect_crew.records.notes import forget_notes
from prefect_crew.states import CrewState

TAG = "prefect-crew"
PERMIT_TAG = "prefect-crew-permit"
VALUE_LIMIT = 4900
"""Bytes of JSON; Prefect refuses more than 5,000."""
PAGE = 200
BUSY_FOR = 10.0
"""Seconds for which a claim is repeated by us while the Prefect API is busy."""
CLIENTS_OWN = (408, 429, 502, 503)
"""Answers after which Prefect's client sends a request again by itself."""
SAVE_FOR = 300.0
"""Seconds for which saving a record outlasts a Prefect API that is away."""
USUAL = 3
"""Permits of a claim that are looked for by their names where many records are read; those with more are read whole."""
_OWN_TAG = {
    RecordPhase.CLAIMED: ("phase:claimed",),
    RecordPhase.UNCERTAIN: ("phase:claimed",),
    RecordPhase.STARTED: ("phase:claimed",),
}
"""How records of a phase are tagged themselves: only their permits tell more than the claim. Others are of any tag."""
_NAME = re.compile(r"(crew_run_[0-9a-f]{32}_\d+)(?:_([0-9a-f]{32})_(\d+))?")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def record_name(idempotency_key: str, attempt: int) -> str:
    """Return the name of the Variable that holds an attempt at an idempotency key."""
    return f"crew_run_{_digest(idempotency_key)}_{attempt}"


_NOTE = "crew_wait_"


def _waiter_prefix(record: RunRecord) -> str:
    return f"{_NOTE}{_digest(record.idempotency_key)}_{record.attempt}_"


_SHORTER = {"input_marks": None, "result": None, "step": 100, "error": 200, "reason": 200, "crew": 100}
"""What gives way in a record that is too large, in this order: dropped, or cut to so many characters."""


def _answer_prefix(record: RunRecord) -> str:
    # By the run and not by its key: also whoever finds no record of it, or cannot read it, finds its answers.
    return f"crew_answer_{_digest(f'{record.crew_url} {record.kickoff_id}')}_"


def _value(record: RunRecord) -> dict[str, Any]:
    """Return the record as JSON values that fit: the result is kept whole or not at all."""
    value = record.model_dump(mode="json", exclude_none=True)
    for name, most in _SHORTER.items():
        if len(to_json(value)) <= VALUE_LIMIT:
            break
        if most is None:
            value.pop(name, None)
        elif name in value:
            value[name] = value[name][:most]
    return value


def _tags(record: RunRecord | Permit) -> list[str]:
    tags = [TAG if isinstance(record, RunRecord) else PERMIT_TAG, f"phase:{record.phase}"]
    if record.kickoff_id is not None:
        tags.append(_kickoff_tag(record.kickoff_id))
    return tags


def _kickoff_tag(kickoff_id: str) -> str:
    return f"kickoff:{_digest(kickoff_id)}"


def _permit_name(record: RunRecord, number: int) -> str:
    return f"{record_name(record.idempotency_key, record.attempt)}_{str(record.ref).replace('-', '')}_{number}"


class _Found(NamedTuple):
    """A Variable as it was read; its age, and for how long nobody has changed it, in seconds by the server's clock."""

    id: str
    name: str
    value: Any
    age: float
    idle: float


def _found(response: httpx.Response) -> list[_Found]:
    """Return the Variables in an answer, with their ages by the clock of the server that gave it."""
    told = response.headers.get("Date")
    # A proxy that takes it away leaves our own clock: without any, a claim of somebody who died would never grow old.
    now = utcnow() if told is None else parsedate_to_datetime(told)

    def since(moment: str) -> float:
        return max(0.0, (now - datetime.fromisoformat(moment)).total_seconds())

    return [
        _Found(one["id"], one["name"], one["value"], since(one["created"]), since(one["updated"]))
        for one in response.json()
    ]


def _folded(variables: Sequence[_Found]) -> list[RunRecord]:
    """Return the records among some Variables, each with what its permits among them say, the first attempt first."""
    permits: dict[tuple[str, str], dict[int, Permit]] = {}
    claims: list[tuple[str, _Found, RunRecord]] = []
    for variable in variables:
        parts = _NAME.fullmatch(variable.name)
        if parts is None:
            continue
        name, claim, number = parts.groups()
        if claim is None:
            record = _parse(variable.value, RunRecord)
            if record is not None:
                claims.append((name, variable, record))
        elif (permit := _parse(variable.value, Permit)) is not None:
            permit = permit.model_copy(update={"ref": variable.id, "age": variable.age, "idle": variable.idle})
            permits.setdefault((name, claim), {})[int(number)] = permit
    records: list[RunRecord] = []
    for name, variable, record in claims:
        theirs = permits.get((name, variable.id.replace("-", "")), {})
        idle = min([variable.idle, *(permit.idle for permit in theirs.values())])
        record = record.model_copy(update={"ref": variable.id, "idle": idle})
        records.append(folded(record, [theirs[number] for number in sorted(theirs)], age=variable.age))
    return sorted(records, key=lambda record: record.attempt)


_Model = TypeVar("_Model", RunRecord, Permit)


def _parse(value: Any, model: type[_Model]) -> _Model | None:
    """Return what a Variable holds, None if it is not this: somebody else may use our names.

    Raises:
        CrewError: A later version wrote it. What its fields mean is not known here, so nothing is decided by them.
    """
    later = _later(value)
    if later is not None:
        raise later
    try:
        return model.model_validate(value)
    except ValidationError:
        return None


def _later(value: Any) -> CrewError | None:
    """Return the error about a record that a later version wrote, None for any other."""
    version = cast("dict[str, Any]", value).get("version") if isinstance(value, dict) else None
    if not isinstance(version, int) or version <= RECORD_VERSION:
        return None
    return CrewError(
        f"The record of run {cast('dict[str, Any]', value).get('idempotency_key')!r} was written by a later version of "
        f"prefect-crew (record version {version}, this one reads up to {RECORD_VERSION}). Nothing was started. "
        "Upgrade prefect-crew here, then run again with the same key."
    )


def _unreadable(name: str, record: RunRecord) -> CrewError:
    return CrewError(
        f"The Variable {name} stands where the record of run {record.idempotency_key!r} belongs, and holds none that "
        f"this "
        "version can read. Nothing was started. Upgrade prefect-crew if a later version wrote it; else delete the "
        "Variable."
    )


async def _created(client: PrefectClient, variable: dict[str, Any]) -> str | None:
    """Create a Variable and return its id; None if there is one of its name.

    While the server is busy it has done nothing, and is asked again soon. All else is for Prefect's client to repeat,
    which does not tell whether the conflict is with its own first attempt.
    """
    try:
        try:
            # No turn: the server reads nothing before it writes this, so that a locked database makes it wait instead.
            answer = await request_soon(
                client, "POST", "/variables/", json=variable, patience=BUSY_FOR, rank=None, again=busy
            )
        except (PrefectHTTPStatusError, httpx.TransportError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code not in CLIENTS_OWN:
                raise
            answer = await client.request("POST", "/variables/", json=variable)
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 409:
            raise
        return None
    return str(answer.json()["id"])


def _unacceptable(error: Exception) -> bool:
    return isinstance(error, PrefectHTTPStatusError) and error.response.status_code in (400, 413, 422)


class PrefectRecords:
    """The record store on the Prefect server. Its methods may be called from any event loop.

    Raises:
        httpx.HTTPError: The Prefect API is away or refuses. `save` outlasts five minutes of absence.
    """

    async def claim(self, record: RunRecord) -> bool:
        """Create the attempt's Variable; False if another owner's stands there.

        Raises:
            CrewError: What stands there is no record that this version can read.
        """
        name = record_name(record.idempotency_key, record.attempt)
        async with get_client() as client:
            record.ref = await _created(client, {"name": name, "value": _value(record), "tags": _tags(record)})
            if record.ref is not None:
                return True
            # Prefect's client sends a request again after a read timeout or a 502: the conflict may be our own claim.
            variable = await client.read_variable_by_name(name)
        if variable is None:  # deleted meanwhile
            return False
        standing = _parse(variable.value, RunRecord)
        if standing is None:
            raise _unreadable(name, record)
        record.ref = str(variable.id)
        # One that was resolved or voided since is a claim no more, whoever made it: its permits tell.
        found = next((one for one in await self.attempts(record.idempotency_key) if one.ref == record.ref), None)
        return found is not None and (found.owner, found.phase, found.permit) == (record.owner, record.phase, 0)

    async def confirm(self, record: RunRecord, known: Sequence[RunRecord]) -> bool:
        """Return whether the attempts at the key are a claim and those that it was decided by, and no others.

        One that was pruned meanwhile, or that somebody claimed who did not see this one, may belong to a run.
        """
        found = await self.attempts(record.idempotency_key)
        others = [(one.attempt, one.owner) for one in found if one.ref != record.ref]
        return others == [(one.attempt, one.owner) for one in known] and len(found) > len(others)

    async def permit(self, record: RunRecord, good_for: float, *, late: bool) -> bool:
        """Create the next permit of a claim; False if somebody else did, or the record is gone or resolved."""
        number = record.permit + 1
        permit = Permit(
            idempotency_key=record.idempotency_key, attempt=record.attempt, owner=record.owner, good_for=good_for
        )
        ref = await self._create_permit(record, number, permit)
        if ref is None:
            return False
        record.permit, record.strongest = number, permit.model_copy(update={"ref": ref})
        if not late:
            return True
        # Others may have resolved and pruned the record since, and its permits with it: what stands there tells.
        found = next((one for one in await self.attempts(record.idempotency_key) if one.ref == record.ref), None)
        return found is not None and found.phase is RecordPhase.CLAIMED and found.permit == number

    async def resolve(
        self,
        record: RunRecord,
        phase: RecordPhase,
        *,
        kickoff_id: str | None = None,
        state: CrewState | None = None,
        reason: str | None = None,
    ) -> bool:
        """Create the next permit of a record as it was read, with what was found out; False if somebody else did."""
        found = resolved(record, phase, kickoff_id=kickoff_id, state=state, reason=reason).outcome()
        verdict = Permit(idempotency_key=record.idempotency_key, attempt=record.attempt, owner=str(uuid4()), **found)
        number = record.permit + 1
        ref = await self._create_permit(record, number, verdict)
        if ref is None:
            return False
        found |= {"permit": number, "strongest": verdict.model_copy(update={"ref": ref}), "open_for": 0.0}
        for name, value in found.items():
            setattr(record, name, value)
        return True

    async def _create_permit(self, record: RunRecord, number: int, permit: Permit) -> str | None:
        """Create a permit and return its id; None if another owner's of this number stands there, or a used one."""
        name = _permit_name(record, number)
        value = permit.model_dump(mode="json", exclude_none=True)
        async with get_client() as client:
            ref = await _created(client, {"name": name, "value": value, "tags": _tags(permit)})
            if ref is not None:
                return ref
            variable = await client.read_variable_by_name(name)
        if variable is None:
            return None
        standing = _parse(variable.value, Permit)
        if standing is None:
            raise _unreadable(name, record)
        ours = (standing.owner, standing.phase) == (permit.owner, permit.phase)
        return str(variable.id) if ours else None

    async def save(self, record: RunRecord) -> None:
        """Write down what became of a run, again and again for five minutes while the Prefect API is away.

        The end stands in the record itself; what comes before it, in the permit of whoever found it out.
        """
        if (strongest := record.strongest) is not None and record.phase is not RecordPhase.ENDED:
            permit = strongest.model_copy(update=record.outcome())
            value = permit.model_dump(mode="json", exclude_none=True)
            await self._patch(str(permit.ref), value, _tags(permit), Rank.RECORD)
            return
        ref = record.ref or await self._ref(record)
        value = _value(record)
        rank = Rank.END if record.phase is RecordPhase.ENDED else Rank.RECORD
        try:
            await self._patch(ref, value, _tags(record), rank)
        except PrefectHTTPStatusError as error:
            if not _unacceptable(error) or value.pop("result", None) is None:
                raise
            # Numbers beyond 64 bits, too deep a nesting: what Prefect cannot hold is read elsewhere.
            await self._patch(ref, value, _tags(record), rank)

    async def _ref(self, record: RunRecord) -> str:
        """Return the id of a record that was not read here.

        Raises:
            PrefectHTTPStatusError: It is gone.
        """
        name = record_name(record.idempotency_key, record.attempt)
        async with get_client() as client:
            response = await client.request("GET", "/variables/name/{name}", path_params={"name": name})
        return str(response.json()["id"])

    async def _patch(self, ref: str, value: Mapping[str, Any], tags: list[str], rank: Rank) -> None:
        async with get_client() as client:
            await request_soon(
                client, "PATCH", f"/variables/{ref}", json={"value": value, "tags": tags}, patience=SAVE_FOR, rank=rank
            )

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key, the first one first."""
        idempotency_key = normalize_key(idempotency_key)
        # `_` is a wildcard of LIKE; the digest around it makes a chance match impossible.
        like = {"name": {"like_": f"crew_run_{_digest(idempotency_key)}_%"}}
        found = [variable async for page in self._pages(like) for variable in page]
        return [record for record in _folded(found) if record.idempotency_key == idempotency_key]

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the record that holds a kickoff id, if any."""
        for idempotency_key, attempt in await self.holders(kickoff_id):
            for record in await self.attempts(idempotency_key):
                if record.attempt == attempt and record.kickoff_id == kickoff_id:
                    return record
        return None

    async def holders(self, kickoff_id: str) -> list[tuple[str, int]]:
        """Return the idempotency keys and attempts that a kickoff id is on record for, in no promised order."""
        holders: dict[tuple[str, int], None] = {}
        async for page in self._pages({"tags": {"all_": [_kickoff_tag(kickoff_id)]}}):
            for variable in page:
                held = _parse(variable.value, Permit)  # what it reads of a record is the same
                if held is not None and held.kickoff_id == kickoff_id:
                    holders[held.idempotency_key, held.attempt] = None
        return list(holders)

    async def all(self, phase: RecordPhase | None = None) -> AsyncIterator[RunRecord]:
        """Yield every record that this version can read, or those in one phase, in no promised order."""
        later: CrewError | None = None
        async for page in self._pages({"tags": {"all_": [TAG, *(_OWN_TAG.get(phase, ()) if phase else ())]}}):
            problems = {variable.id: problem for variable in page if (problem := _later(variable.value)) is not None}
            later = next(iter(problems.values()), later)
            for record in await self._with_permits([one for one in page if one.id not in problems]):
                if phase is None or record.phase is phase:
                    yield record
        if later is not None:
            run_logger().warning("Left out of this list: %s", later)

    async def _with_permits(self, variables: Sequence[_Found]) -> list[RunRecord]:
        """Return the records in Variables, with what their permits say: one request for sixty that have not ended."""
        alone = _folded(variables)
        open_ones = [record for record in alone if record.phase is RecordPhase.CLAIMED]
        permits: list[_Found] = []
        for start in range(0, len(open_ones), PAGE // USUAL):
            some = open_ones[start : start + PAGE // USUAL]
            names = [_permit_name(record, number + 1) for record in some for number in range(USUAL)]
            permits += [one async for page in self._pages({"name": {"any_": names}}) for one in page]
        records = {str(record.ref): record for record in _folded([*variables, *permits])} if permits else {}
        for record in open_ones:
            if (known := records.get(str(record.ref))) is not None and known.permit == USUAL:
                whole = [one for one in await self.attempts(record.idempotency_key) if one.ref == record.ref]
                records.update({str(one.ref): one for one in whole})
        return [records.get(str(record.ref), record) for record in alone]

    def may_ask(self) -> AsyncIterator[RunRecord]:
        """Yield the runs in flight: any of them may wait for a person."""
        return self.all(RecordPhase.STARTED)

    async def delete(self, record: RunRecord) -> None:
        """Forget an attempt, and what people answered. A later call with its key is then a new start."""
        answers = [
            name
            async for value in self._values({"name": {"like_": _answer_prefix(record) + "%"}})
            if (name := str(value["name"])).startswith(_answer_prefix(record))  # `_` is a wildcard of LIKE
        ]
        if record.hooked:
            await forget_notes(record)
        for name in answers:
            await self.delete_note(name)
        # By id: under the name somebody may have made a claim anew.
        try:
            ref, name = record.ref or await self._ref(record), record_name(record.idempotency_key, record.attempt)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 404:
                raise
            return
        permits = [one async for page in self._pages({"name": {"like_": f"{name}_%"}}) for one in page]
        ours = [one for one in permits if (parts := _NAME.fullmatch(one.name)) and parts[2] == ref.replace("-", "")]
        # The record first: without its permits it would seem to be claimed.
        for gone in (ref, *(one.id for one in ours)):
            await self._at(gone, "DELETE")

    async def permits(self) -> AsyncIterator[tuple[str, str]]:
        """Yield the `ref` of each permit's claim, and its own."""
        async for page in self._pages({"tags": {"all_": [PERMIT_TAG]}}):
            for variable in page:
                if (parts := _NAME.fullmatch(variable.name)) and parts[2] is not None:
                    yield str(UUID(parts[2])), variable.id

    async def delete_orphan(self, claim: str, permit: str) -> bool:
        """Take a permit away whose claim is gone, and return whether it is: whoever deleted it was killed over it."""
        if await self._at(claim, "GET"):
            return False
        await self._at(permit, "DELETE")
        return True

    async def _at(self, ref: str, method: Literal["GET", "DELETE"]) -> bool:
        """Read or delete a Variable by its id; False if it is gone."""
        async with get_client() as client:
            try:
                await client.request(method, "/variables/{id}", path_params={"id": ref})
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 404:
                    raise
                return False
        return True

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return whether the owner's flow run has ended or is gone; False where there is none to ask about."""
        if record.flow_run_id is None:
            return False
        return not await self._alive(record.flow_run_id)

    async def add_waiter(self, record: RunRecord, flow_run_id: str) -> None:
        """Note that a flow run other than the owner waits for the run. A second note of the same is no error."""
        name = _waiter_prefix(record) + flow_run_id.replace("-", "")
        async with get_client() as client:
            await _created(client, {"name": name, "value": {"flow_run_id": flow_run_id}, "tags": []})

    async def remove_waiter(self, record: RunRecord, flow_run_id: str) -> None:
        """Take that note away."""
        async with get_client() as client:
            try:
                await client.delete_variable_by_name(_waiter_prefix(record) + flow_run_id.replace("-", ""))
            except ObjectNotFound:
                return

    async def other_waiters(self, record: RunRecord, flow_run_id: str | None) -> list[str]:
        """Return the ids of other flow runs that wait for the run and have not ended, the owner's among them."""
        waiting = {record.flow_run_id} if record.flow_run_id else set[str]()
        async for value in self._values({"name": {"like_": _waiter_prefix(record) + "%"}}):
            waiting.add(str(value["value"]["flow_run_id"]))
        waiting.discard(flow_run_id or "")
        return [other for other in sorted(waiting) if await self._alive(other)]

    async def waiter_notes(self) -> AsyncIterator[str]:
        """Yield the names of all notes that some flow run waits for a run."""
        async for value in self._values({"name": {"like_": _NOTE + "%"}}):
            if str(value["name"]).startswith(_NOTE):  # `_` is a wildcard of LIKE
                yield str(value["name"])

    def notes_of(self, record: RunRecord) -> str:
        """Return what the names of a record's notes begin with."""
        return _waiter_prefix(record)

    async def delete_note(self, name: str) -> None:
        """Take a note away by its name."""
        async with get_client() as client:
            try:
                await client.delete_variable_by_name(name)
            except ObjectNotFound:
                return

    async def reviews(self, record: RunRecord) -> list[SentReview]:
        """Return what people have answered to a run, in order.

        It stands apart from the record, which whoever waits for the run writes at the same moment: a Variable is
        replaced, not compared.
        """
        found = [value async for value in self._values({"name": {"like_": _answer_prefix(record) + "%"}})]
        return [SentReview.model_validate(value["value"]) for value in sorted(found, key=lambda value: value["name"])]

    async def add_review(self, record: RunRecord, number: int, review: SentReview) -> bool:
        """Write down an answer that is about to be sent; False if somebody else's of this number stands there."""
        value = review.model_dump(mode="json")
        async with get_client() as client:
            answer: dict[str, Any] = {"name": self._answer_name(record, number), "value": value, "tags": []}
            return await _created(client, answer) is not None

    async def save_review(self, record: RunRecord, number: int, review: SentReview) -> None:
        """Write down what became of it."""
        path = f"/variables/name/{self._answer_name(record, number)}"
        value = review.model_dump(mode="json")
        async with get_client() as client:
            await request_soon(client, "PATCH", path, json={"value": value}, patience=SAVE_FOR)

    async def remove_review(self, record: RunRecord, number: int) -> None:
        """Take back an answer that the crew's server refused."""
        await self.delete_note(self._answer_name(record, number))

    def _answer_name(self, record: RunRecord, number: int) -> str:
        return f"{_answer_prefix(record)}{number:04}"

    async def _alive(self, flow_run_id: str) -> bool:
        async with get_client() as client:
            try:
                flow_run = await client.read_flow_run(UUID(flow_run_id))
            except ObjectNotFound:
                return False
        state = flow_run.state
        return state is not None and not state.is_final() and not state.is_cancelling()

    async def _values(self, variables: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async for page in self._pages(variables):
            for variable in page:
                yield {"name": variable.name, "value": variable.value}

    async def _pages(self, variables: Mapping[str, Any]) -> AsyncIterator[list[_Found]]:
        offset = 0
        while True:
            async with get_client() as client:
                response = await client.request(
                    "POST",
                    "/variables/filter",
                    json={"variables": variables, "limit": PAGE, "offset": offset, "sort": "NAME_ASC"},
                )
            page = _found(response)
            yield page
            if len(page) < PAGE:
                return
            offset += PAGE


OLDER_THAN = timedelta(days=90)
"""The age at which ended runs are removed if nobody says another: how long the never-twice promise holds for them."""
YOUNGEST = timedelta(hours=1)
"""What was changed within this time stays, whatever age is asked for: more than clocks may differ."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed, or with `dry_run` would have."""

    runs: int
    notes: int
    kept: int
    """Records that stay."""


class PrunableStore(Protocol):
    """What `prune` asks of a record store."""

    def all(self, phase: RecordPhase | None = None) -> AsyncIterator[RunRecord]:
        """Yield every record."""
        ...

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key."""
        ...

    async def delete(self, record: RunRecord) -> None:
        """Forget an attempt."""
        ...

    def permits(self) -> AsyncIterator[tuple[str, str]]:
        """Yield the `ref` of each permit's claim, and its own."""
        ...

    async def delete_orphan(self, claim: str, permit: str) -> bool:
        """Take a permit away whose claim is gone, and return whether it is."""
        ...

    def waiter_notes(self) -> AsyncIterator[str]:
        """Yield the names of all notes that some flow run waits for a run."""
        ...

    def notes_of(self, record: RunRecord) -> str:
        """Return what the names of a record's notes begin with."""
        ...

    async def delete_note(self, name: str) -> None:
        """Take a note away."""
        ...


def parse_age(text: str) -> timedelta:
    """Return an age such as `90d`, `12h` or `2w`; a bare number is days.

    Raises:
        ConfigurationError: It is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*", text)
    if match is None:
        raise ConfigurationError(f"{text!r} is no age: give a number and s, m, h, d or w, such as 90d.")
    return timedelta(seconds=float(match[1]) * _UNITS[match[2] or "d"])


def prunable(records: Iterable[RunRecord], older_than: timedelta) -> list[RunRecord]:
    """Return the records that may go: of keys whose every attempt has ended, or never started, so long ago. Pure.

    The first attempt at a key comes last: as long as it stands, nobody claims it anew before later ones that are left.
    """
    by_key: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_key[record.idempotency_key].append(record)
    return [
        attempt
        for attempts in by_key.values()
        if all(_old(attempt, older_than) for attempt in attempts)
        for attempt in sorted(attempts, key=lambda attempt: attempt.attempt, reverse=True)
    ]


def _old(record: RunRecord, older_than: timedelta) -> bool:
    over = record.phase in (RecordPhase.ENDED, RecordPhase.NOT_STARTED)
    least = max(older_than.total_seconds(), YOUNGEST.total_seconds() + record.good_for)
    return over and record.idle >= least


async def prune(store: PrunableStore, *, older_than: timedelta = OLDER_THAN, dry_run: bool = False) -> Pruned:
    """Remove the records of runs that ended longer ago than `older_than`, and what is left over of others.

    That are notes of who waits for what, and permits of records that are gone.

    Args:
        store: The record store.
        older_than: The age, counted from when a run's end was written down. An hour at least.
        dry_run: Only count.
    """
    # The notes first: a run that is claimed and joined meanwhile then has a record that we know of.
    notes = [name async for name in store.waiter_notes()]
    permits = [permit async for permit in store.permits()]
    records = [record async for record in store.all()]
    going = prunable(records, older_than)
    needed = tuple(store.notes_of(record) for record in records if record.phase is RecordPhase.STARTED)
    left_over = [name for name in notes if not name.startswith(needed)]
    if not dry_run:
        for idempotency_key in dict.fromkeys(record.idempotency_key for record in going):
            # Read again: since the list was made, the key may have been used. Whoever claims it from here on sees that
            # attempts are gone which it decided by, and decides again.
            for record in prunable(await store.attempts(idempotency_key), older_than):
                await store.delete(record)
        standing = {record.ref for record in records}
        for claim, permit in permits:
            if claim not in standing:
                await store.delete_orphan(claim, permit)
        for name in left_over:
            await store.delete_note(name)
    return Pruned(runs=len(going), notes=len(left_over), kept=len(records) - len(going))
