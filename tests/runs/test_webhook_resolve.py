"""Uncertain kickoffs, resolved by the webhooks of the runs that they did start."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from prefect_crew import DeployedCrew, KickoffUncertainError, arun_crew
from prefect_crew.blocks import find_crew, load_crew
from prefect_crew.crew import Crew
from prefect_crew.devserver import CrewScript, CrewServer
from prefect_crew.receiver import forward
from prefect_crew.receiver.app import create_receiver
from prefect_crew.records.model import SPARE, RecordPhase, RunRecord, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.webhook_resolve import Resolution, resolve_from_webhook
from prefect_crew.webhooks import claim_of, hook_urls
from support.records import LONG_AGO, put
from support.webhooks import SECRET, events_of, served

pytestmark = pytest.mark.usefixtures("prefect_api")

SCRIPT = CrewScript.model_validate(
    {"name": "slow", "inputs": [], "tasks": [{"name": "work", "agent": "A", "seconds": 0.3, "output": "done"}]}
)
RECORDS = PrefectRecords()
resolve = partial(resolve_from_webhook, load=find_crew)


@pytest.fixture(scope="module")
def server() -> Iterator[CrewServer]:
    with CrewServer(SCRIPT) as server:
        yield server


@pytest.fixture
async def crew(server: CrewServer) -> DeployedCrew:
    """The server's crew, stored as a block."""
    crew = server.crew()
    await crew.asave(f"resolved-{uuid.uuid4().hex[:8]}")
    return crew


def uncertain(crew: DeployedCrew, /, **fields: Any) -> RunRecord:
    now = utcnow()
    known = {
        "idempotency_key": f"resolve/{uuid.uuid4()}",
        "attempt": 1,
        "phase": RecordPhase.UNCERTAIN,
        "crew": crew.label,
        "crew_url": crew.url,
        "inputs_digest": "d",
        "owner": "o",
        "claimed_at": now,
    }
    return RunRecord.model_validate(known | fields)


async def started(crew: DeployedCrew) -> str:
    async with crew.client() as client:
        return await client.kickoff({})


async def test_the_first_webhook_resolves_an_uncertain_kickoff(crew: DeployedCrew):
    record, kickoff_id = uncertain(crew), await started(crew)
    await put(record)
    said = {"attempt": 1, "said_key": record.idempotency_key}
    assert await resolve(record.idempotency_key, kickoff_id, RECORDS, **said) is Resolution.RESOLVED
    (resolved,) = await RECORDS.attempts(record.idempotency_key)
    assert (resolved.phase, resolved.kickoff_id, resolved.reason) == (RecordPhase.STARTED, kickoff_id, None)
    # The second one finds nothing to do, whatever it says.
    assert await resolve(record.idempotency_key, "another", RECORDS, **said) is Resolution.NOT_NEEDED


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        pytest.param(
            {"phase": RecordPhase.CLAIMED, "permit": LONG_AGO}, Resolution.RESOLVED, id="a-claim-whose-time-is-over"
        ),
        pytest.param({"phase": RecordPhase.CLAIMED, "permit": 60.0}, Resolution.TOO_EARLY, id="a-fresh-claim"),
        pytest.param(
            {"phase": RecordPhase.CLAIMED, "permit": 60.0, "flow_run_id": str(uuid.uuid4())},
            Resolution.TOO_EARLY,
            id="a-fresh-claim-of-a-flow-run-that-is-gone",
        ),
        pytest.param(
            {"phase": RecordPhase.CLAIMED, "good_for": LONG_AGO}, Resolution.REFUSED, id="a-claim-that-sent-nothing"
        ),
        pytest.param({"phase": RecordPhase.NOT_STARTED}, Resolution.NOT_NEEDED, id="said-never-to-have-started"),
        pytest.param({"phase": RecordPhase.STARTED, "kickoff_id": "k"}, Resolution.NOT_NEEDED, id="started"),
        pytest.param({"phase": RecordPhase.ENDED, "kickoff_id": "k"}, Resolution.NOT_NEEDED, id="ended"),
        pytest.param({"crew": "no-such-block"}, Resolution.NO_CREW, id="no-block"),
        pytest.param({"crew": "127.0.0.1:8000/travel"}, Resolution.NO_CREW, id="a-crew-that-was-never-stored"),
        pytest.param({"crew_url": "https://another.example.com"}, Resolution.NO_CREW, id="a-block-of-another-crew"),
    ],
)
async def test_which_records_are_resolved(fields: dict[str, Any], outcome: Resolution, crew: DeployedCrew):
    permit = fields.get("permit")
    record, kickoff_id = uncertain(crew, **fields), await started(crew)
    record.permit = 0
    await put(record, permit=permit)
    assert await resolve(record.idempotency_key, kickoff_id, RECORDS, attempt=1) is outcome
    (now,) = await RECORDS.attempts(record.idempotency_key)
    assert (now.kickoff_id == kickoff_id) is (outcome is Resolution.RESOLVED)
    if outcome is not Resolution.RESOLVED:
        assert now.phase is record.phase


async def test_an_id_that_the_crew_does_not_know_resolves_nothing(crew: DeployedCrew):
    record = uncertain(crew)
    await put(record)
    assert await resolve(record.idempotency_key, "made-up", RECORDS) is Resolution.NOT_KNOWN
    assert (await RECORDS.attempts(record.idempotency_key))[0].phase is RecordPhase.UNCERTAIN


async def test_an_id_that_another_record_holds_resolves_nothing(crew: DeployedCrew):
    record, kickoff_id = uncertain(crew), await started(crew)
    await put(record)
    await put(uncertain(crew, phase=RecordPhase.STARTED, kickoff_id=kickoff_id))
    assert await resolve(record.idempotency_key, kickoff_id, RECORDS) is Resolution.REFUSED
    assert (await RECORDS.attempts(record.idempotency_key))[0].phase is RecordPhase.UNCERTAIN


async def test_a_webhook_that_names_another_idempotency_key_resolves_nothing(crew: DeployedCrew):
    record, kickoff_id = uncertain(crew), await started(crew)
    await put(record)
    outcome = await resolve(record.idempotency_key, kickoff_id, RECORDS, said_key="another")
    assert outcome is Resolution.REFUSED


async def test_a_late_webhook_of_the_attempt_before_does_not_resolve_this_one(crew: DeployedCrew):
    first = uncertain(crew, phase=RecordPhase.NOT_STARTED)
    second = uncertain(crew, idempotency_key=first.idempotency_key, attempt=2)
    for record in (first, second):
        await put(record)
    kickoff_id = await started(crew)
    assert await resolve(first.idempotency_key, kickoff_id, RECORDS, attempt=1) is Resolution.NOT_NEEDED
    assert (await RECORDS.attempts(first.idempotency_key))[1].phase is RecordPhase.UNCERTAIN
    assert await resolve(first.idempotency_key, kickoff_id, RECORDS, attempt=2) is Resolution.RESOLVED


async def test_a_crew_that_does_not_answer_resolves_nothing():
    with CrewServer(SCRIPT) as server:
        crew = server.crew()
        await crew.asave(f"resolved-{uuid.uuid4().hex[:8]}")
    record = uncertain(crew)
    await put(record)
    assert await resolve(record.idempotency_key, str(uuid.uuid4()), RECORDS) is Resolution.NO_ANSWER


async def test_a_token_that_was_rotated_is_looked_up_anew(server: CrewServer, crew: DeployedCrew):
    record, kickoff_id = uncertain(crew), await started(crew)
    await put(record)

    async def stale(record: RunRecord) -> Crew:
        return replace(await load_crew(record.crew), token=SecretStr("the-token-of-yesterday"))

    assert await resolve(record.idempotency_key, kickoff_id, RECORDS, load=stale) is Resolution.RESOLVED


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.setattr(forward, "RESOLVE_PAUSES", (0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0))
    async with served(create_receiver(SECRET)) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
        yield url


@pytest.mark.parametrize("generation", ["first", "later"])
async def test_a_run_whose_kickoff_got_no_answer_goes_on_by_itself(generation: Any, receiver: str):
    # The answer to the kickoff is lost, a webhook of the run resolves it, the next call with the key gets its result.
    with CrewServer(SCRIPT, generation=generation, faults=["kickoff:drop-after-accept@1"]) as server:
        crew = server.crew()
        await crew.asave(f"resolved-{uuid.uuid4().hex[:8]}")
        key = f"resolve/{uuid.uuid4()}"
        with pytest.raises(KickoffUncertainError):
            await arun_crew(crew, {}, idempotency_key=key)
        names: list[str] = []
        while "crew.resolved" not in names:
            names = [event["event"] for event in await events_of(key, at_least=len(names) + 1)]
        result = await arun_crew(crew, {}, idempotency_key=key)
        assert (result.output, server.kickoffs) == ("done", 1)
        assert names.count("crew.resolved") == 1


async def test_a_webhook_that_comes_before_its_time_resolves_later(receiver: str, crew: DeployedCrew):
    record = await put(uncertain(crew, phase=RecordPhase.CLAIMED), permit=1.5 - SPARE)
    kickoff_id = await started(crew)
    hooks = hook_urls(receiver, SECRET, record.idempotency_key, expires=utcnow() + timedelta(hours=1), attempt=1)
    async with httpx.AsyncClient() as client:
        assert (await client.post(str(hooks.crew), json={"kickoff_id": kickoff_id, "result": "done"})).is_success
    events = await events_of(record.idempotency_key, at_least=2)
    assert [event["event"] for event in events] == ["crew.webhook.crew", "crew.resolved"]
    assert events[1]["payload"]["kickoff_id"] == kickoff_id


async def test_a_webhook_of_another_claim_of_the_same_key_resolves_nothing(crew: DeployedCrew):
    """A record that was deleted, or stood on another Prefect server, had the same key and attempt."""
    record = uncertain(crew)
    await RECORDS.claim(record)
    kickoff_id = await started(crew)
    for owner, outcome in (("another", Resolution.REFUSED), (record.owner, Resolution.RESOLVED)):
        claim = claim_of(owner)
        assert await resolve(record.idempotency_key, kickoff_id, RECORDS, attempt=1, claim=claim) is outcome
