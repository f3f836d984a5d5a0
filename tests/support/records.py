"""Records as runs leave them on the Prefect server."""

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import pytest
from prefect_crew.records import prune as prune_module
from prefect_crew.records import store as store_module
from prefect_crew.records import variables as variables_module
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.variables import Variable

from prefect_crew.blocks import CrewRun
from prefect_crew.devserver import CrewServer

CLAIMED, UNCERTAIN, NOT_STARTED = RecordPhase.CLAIMED, RecordPhase.UNCERTAIN, RecordPhase.NOT_STARTED
STARTED, ENDED = RecordPhase.STARTED, RecordPhase.ENDED
LONG_AGO = -1000.0
"""As what a claim or permit is good for: it is over, however little time has passed."""


def new_record(idempotency_key: str | None = None, **facts: Any) -> RunRecord:
    """Return the first attempt at a key, one of its own if none is given."""
    known: dict[str, Any] = {
        "idempotency_key": idempotency_key or f"key {uuid.uuid4()}",
        "attempt": 1,
        "crew": "travel",
        "crew_url": "https://travel.test",
        "inputs_digest": "d" * 32,
        "owner": str(uuid.uuid4()),
        "claimed_at": utcnow(),
    }
    return RunRecord(**known | facts)


def key() -> str:
    return f"kickoff {uuid.uuid4()}"


async def start(server: CrewServer, idempotency_key: str, inputs: Any = None, **options: Any) -> CrewRun:
    """Find the run of a key with the inputs (text: a), or start it, for a caller that does not wait."""
    inputs = {"text": "a"} if inputs is None else inputs
    return await server.crew().atrigger(inputs, idempotency_key=idempotency_key, **options)


async def attempts(idempotency_key: str) -> list[RunRecord]:
    """Return the attempts at a key, as the record store reads them."""
    return [*await PrefectRecords().attempts(idempotency_key)]


async def phases(idempotency_key: str) -> list[RecordPhase]:
    return [record.phase for record in await attempts(idempotency_key)]


async def record_of(kickoff_id: str) -> RunRecord:
    """Return the record of a run that has one."""
    record = await PrefectRecords().of_kickoff(kickoff_id)
    assert record is not None
    return record


def stored_records(variables: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the attempts that Variables hold, as the record store reads them; `entries` is their number."""
    found = [
        Variable(one["id"], one["name"], one["value"], 0.0, 0.0, utcnow())
        for one in variables
        if store_module.later_version(one["value"]) is None
    ]
    return [
        {**record.model_dump(mode="json", exclude_none=True), "entries": record.entries}
        for record in store_module.records_in(found)
    ]


async def read_named(prefix: str) -> list[Variable]:
    """Return the Variables whose names begin with a text, in the order of their names."""
    # `_` is a wildcard of LIKE, and the server looks anywhere in the name.
    pages = variables_module.read_pages({"name": {"like_": prefix + "%"}})
    return [one async for page in pages for one in page if one.name.startswith(prefix)]


def let_pass(patch: pytest.MonkeyPatch, idempotency_key: str, days: float) -> None:
    """Let the Prefect server say of a run's record, and of all flow runs, until `patch` is undone, that nobody has
    changed them for days."""
    found, read = variables_module.variables_in, prune_module.read_by_id

    def later(response: httpx.Response) -> list[Variable]:
        variables: list[Variable] = []
        for one in found(response):
            theirs = isinstance(one.value, dict) and one.value.get("idempotency_key") == idempotency_key
            variables.append(one._replace(idle=one.idle + days * 86400) if theirs else one)
        return variables

    async def later_read(*asked: Any) -> dict[str | None, dict[str, Any]]:
        return {
            id_: {**one, "unchanged_for": one["unchanged_for"] + days * 86400}
            for id_, one in (await read(*asked)).items()
        }

    patch.setattr(variables_module, "variables_in", later)
    patch.setattr(prune_module, "read_by_id", later_read)


async def put(record: RunRecord, store: RecordStore | None = None, *, permit: float | None = None) -> RunRecord:
    """Write a record down as its run does: the claim, a permit of it, and what became of that; or the end.

    `store` is the Prefect server's, unless another one is given.
    """
    store, phase = store or PrefectRecords(), record.phase
    record.phase = CLAIMED
    assert await store.claim(record)
    if permit is not None or phase in (UNCERTAIN, STARTED):
        assert await store.permit(record, LONG_AGO if permit is None else permit)
    record.phase = phase
    if phase is STARTED:
        assert await store.save_started(record) is None
    elif phase is ENDED:
        end = {name: value for name, value in record.outcome().items() if name in record.model_fields_set - {"phase"}}
        assert await store.end(record, **end)
        await store.unlist(record)
    elif phase is not CLAIMED:
        await store.save(record)
    return record
