"""Run records in Prefect Variables: found again from any machine that shares the Prefect server or workspace.

A Variable's name is unique on the server, so creating one is an atomic claim; its value holds 5,000 bytes of JSON and
is replaced, not compared; nobody's clean-up of flow runs or artifacts removes it (read in Prefect 3.9.1's source and
measured: 20 racers, one winner). The attempt's number is part of the name, so that buying again is a claim as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError
from pydantic_core import to_json

from prefect_crew.api.errors import CrewError
from prefect_crew.asked_notes import forget_notes
from prefect_crew.impatience import busy, request_soon
from prefect_crew.logs import run_logger
from prefect_crew.records import RECORD_VERSION, RecordPhase, RunRecord, SentReview
from prefect_crew.run_keys import normal_run_key
from prefect_crew.turns import Rank

__all__ = ["SUSPENDED", "PrefectRecords", "record_name", "suspended_prefix"]

TAG = "prefect-crew"
VALUE_LIMIT = 4900
"""Bytes of JSON; Prefect refuses more than 5,000."""
PAGE = 200
BUSY_FOR = 10.0
"""Seconds for which a claim is repeated by us while the Prefect API is busy."""
CLIENTS_OWN = (408, 429, 502, 503)
"""Answers after which Prefect's client sends a request again by itself."""
SAVE_FOR = 300.0
"""Seconds for which saving a record outlasts a Prefect API that is away."""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def record_name(run_key: str, attempt: int) -> str:
    """Return the name of the Variable that holds an attempt at a run key."""
    return f"crew_run_{_digest(run_key)}_{attempt}"


_NOTE = "crew_wait_"


def _waiter_prefix(record: RunRecord) -> str:
    return f"{_NOTE}{_digest(record.run_key)}_{record.attempt}_"


SUSPENDED = "crew_suspended_"
"""What the names of all notes begin with that a suspended flow run waits for a run."""


def suspended_prefix(run_key: str, attempt: int) -> str:
    """Return what the names of those notes about one attempt begin with."""
    return f"{SUSPENDED}{_digest(run_key)}_{attempt}_"


_SHORTER = {"result": None, "step": 100, "error": 200, "reason": 200, "crew": 100}
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


def _tags(record: RunRecord) -> list[str]:
    tags = [TAG, f"phase:{record.phase}"]
    if record.kickoff_id is not None:
        tags.append(f"kickoff:{_digest(record.kickoff_id)}")
    return tags


def _parse(variable: Mapping[str, Any]) -> RunRecord | None:
    """Return the record in a Variable, None if it holds none: somebody else may use our tag.

    Raises:
        CrewError: A later version wrote it. What its fields mean is not known here, so nothing is decided by them.
    """
    value = variable["value"]
    version = cast("dict[str, Any]", value).get("version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > RECORD_VERSION:
        raise CrewError(
            f"The record of run {cast('dict[str, Any]', value).get('run_key')!r} was written by a later version of "
            f"prefect-crew (record version {version}, this one reads up to {RECORD_VERSION}). Nothing was started. "
            "Upgrade prefect-crew here, then run again with the same key."
        )
    try:
        return RunRecord.model_validate(value)
    except ValidationError:
        return None


async def _created(client: PrefectClient, variable: dict[str, Any]) -> bool:
    """Create a Variable; False if there is one of its name.

    While the server is busy it has done nothing, and is asked again soon. All else is for Prefect's client to repeat,
    which does not tell whether the conflict is with its own first attempt.
    """
    try:
        try:
            # No turn: the server reads nothing before it writes this, so that a locked database makes it wait instead.
            await request_soon(client, "POST", "/variables/", json=variable, patience=BUSY_FOR, rank=None, again=busy)
        except (PrefectHTTPStatusError, httpx.TransportError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code not in CLIENTS_OWN:
                raise
            await client.request("POST", "/variables/", json=variable)
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 409:
            raise
        return False
    return True


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
        name = record_name(record.run_key, record.attempt)
        async with get_client() as client:
            if await _created(client, {"name": name, "value": _value(record), "tags": _tags(record)}):
                return True
            # Prefect's client sends a request again after a read timeout or a 502: the conflict may be our own claim.
            variable = await client.read_variable_by_name(name)
        if variable is None:  # deleted meanwhile
            return False
        standing = _parse({"value": variable.value})
        if standing is None:
            raise CrewError(
                f"The Variable {name} stands where the record of run {record.run_key!r} belongs, and holds none that "
                "this version can read. Nothing was started. Upgrade prefect-crew if a later version wrote it; else "
                "delete the Variable."
            )
        # One that somebody has settled since is a claim no more, whoever made it.
        return standing.owner == record.owner and standing.phase is record.phase

    async def save(self, record: RunRecord) -> None:
        """Replace the attempt's Variable, again and again for five minutes while the Prefect API is away."""
        value = _value(record)
        try:
            await self._patch(record, value)
        except PrefectHTTPStatusError as error:
            if not _unacceptable(error) or value.pop("result", None) is None:
                raise
            # Numbers beyond 64 bits, too deep a nesting: what Prefect cannot hold is read elsewhere.
            await self._patch(record, value)

    async def _patch(self, record: RunRecord, value: Mapping[str, Any]) -> None:
        async with get_client() as client:
            await request_soon(
                client,
                "PATCH",
                f"/variables/name/{record_name(record.run_key, record.attempt)}",
                json={"value": value, "tags": _tags(record)},
                patience=SAVE_FOR,
                rank=Rank.END if record.phase is RecordPhase.ENDED else Rank.RECORD,
            )

    async def attempts(self, run_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key, the first one first."""
        run_key = normal_run_key(run_key)
        # `_` is a wildcard of LIKE; the digest around it makes a chance match impossible.
        found = [record async for record in self._filter({"name": {"like_": f"crew_run_{_digest(run_key)}_%"}})]
        return sorted((r for r in found if r.run_key == run_key), key=lambda record: record.attempt)

    async def of_kickoff(self, kickoff_id: str) -> RunRecord | None:
        """Return the record that holds a kickoff id, if any."""
        tag = f"kickoff:{_digest(kickoff_id)}"
        async for record in self._filter({"tags": {"all_": [TAG, tag]}}):
            if record.kickoff_id == kickoff_id:
                return record
        return None

    async def all(self, phase: RecordPhase | None = None) -> AsyncIterator[RunRecord]:
        """Yield every record that this version can read, or those in one phase, in no promised order."""
        tags = [TAG, *([f"phase:{phase}"] if phase else [])]
        later: CrewError | None = None
        async for variable in self._values({"tags": {"all_": tags}}):
            try:
                record = _parse(variable)
            except CrewError as error:
                later = error
                continue
            if record is not None:
                yield record
        if later is not None:
            run_logger().warning("Left out of this list: %s", later)

    def may_ask(self) -> AsyncIterator[RunRecord]:
        """Yield the runs in flight: any of them may wait for a person."""
        return self.all(RecordPhase.STARTED)

    async def delete(self, record: RunRecord) -> None:
        """Forget an attempt, what people answered, and who is suspended for it.

        A later call with its key is then a new purchase.
        """
        beside = [
            str(value["name"])
            for prefix in (_answer_prefix(record), suspended_prefix(record.run_key, record.attempt))
            async for value in self.notes(prefix)
        ]
        if record.hooked:
            await forget_notes(record)
        for name in (*beside, record_name(record.run_key, record.attempt)):
            await self.delete_note(name)

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

    async def notes(self, prefix: str) -> AsyncIterator[dict[str, Any]]:
        """Yield what stands beside the records under names that begin so, as `name` and `value`."""
        async for value in self._values({"name": {"like_": prefix + "%"}}):
            if str(value["name"]).startswith(prefix):  # `_` is a wildcard of LIKE
                yield value

    async def put_note(self, name: str, value: Mapping[str, Any]) -> None:
        """Write something down beside a record, in place of what stands under that name."""
        async with get_client() as client:
            try:
                await client.request("POST", "/variables/", json={"name": name, "value": dict(value), "tags": []})
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 409:
                    raise
                await request_soon(
                    client, "PATCH", f"/variables/name/{name}", json={"value": dict(value)}, patience=SAVE_FOR
                )

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
            return await _created(client, {"name": self._answer_name(record, number), "value": value, "tags": []})

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

    async def _filter(self, variables: Mapping[str, Any]) -> AsyncIterator[RunRecord]:
        async for variable in self._values(variables):
            record = _parse(variable)
            if record is not None:
                yield record

    async def _values(self, variables: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        offset = 0
        while True:
            async with get_client() as client:
                response = await client.request(
                    "POST",
                    "/variables/filter",
                    json={"variables": variables, "limit": PAGE, "offset": offset, "sort": "NAME_ASC"},
                )
            page: list[dict[str, Any]] = response.json()
            for variable in page:
                yield variable
            if len(page) < PAGE:
                return
            offset += PAGE
