"""Resolving an uncertain kickoff, on a real Prefect server: what is accepted, what is refused, and what then stands."""

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
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import Crew
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.receiver import forward
from prefect_crew.receiver.app import create_receiver
from prefect_crew.records.model import SPARE, RunRecord, claim_of, utcnow
from prefect_crew.records.resolve import Resolution, resolve_from_webhook, resolve_started, unresolved
from prefect_crew.records.store import PrefectRecords
from prefect_crew.states import CrewState
from prefect_crew.webhooks import Hook, hook_urls
from support.records import CLAIMED, ENDED, LONG_AGO, NOT_STARTED, STARTED, UNCERTAIN, new_record, put, record_of
from support.scripts import script
from support.webhooks import SECRET, events_of, served

pytestmark = pytest.mark.usefixtures("prefect_api")

RECORDS = PrefectRecords()
SCRIPT = script({"name": "work", "agent": "A", "seconds": 0.3, "output": "done"})


def unknown(**facts: Any) -> RunRecord:
    known = {"phase": UNCERTAIN, "claimed_at": utcnow() - timedelta(minutes=5), "reason": "it broke"}
    return new_record(**known | facts)


def look(state: CrewState) -> Any:
    async def look(kickoff_id: str) -> CrewStatus:
        return CrewStatus(kickoff_id=kickoff_id, state=state)

    return look


async def resolve_as(record: RunRecord, kickoff_id: str, **options: Any) -> CrewState | None:
    """Do what a person does who knows the run of an uncertain kickoff."""
    return await resolve_started(await unresolved(record.idempotency_key, RECORDS), kickoff_id, RECORDS, **options)


async def latest(record: RunRecord) -> RunRecord:
    return (await RECORDS.attempts(record.idempotency_key))[-1]


async def test_a_run_that_the_crew_knows_is_started():
    record, kickoff_id = await put(unknown()), f"k-{uuid.uuid4()}"
    assert await resolve_as(record, kickoff_id, look=look(CrewState.PENDING)) is CrewState.PENDING
    resolved = await latest(record)
    assert resolved.phase == STARTED
    assert resolved.kickoff_id == kickoff_id
    assert resolved.reason is None
    assert resolved.kicked_off_at == record.claimed_at
    assert (await record_of(kickoff_id)).idempotency_key == record.idempotency_key


async def test_an_id_of_another_run_changes_nothing():
    holder = await put(unknown(phase=STARTED, kickoff_id=f"k-{uuid.uuid4()}"))
    sent, unsent = await put(unknown()), await put(unknown(phase=CLAIMED, good_for=LONG_AGO))
    its_key = f"is attempt 1 at the idempotency key '{holder.idempotency_key}'"
    refusals = (
        (sent, "k9", CrewState.UNKNOWN, "does not know run k9"),
        (sent, str(holder.kickoff_id), CrewState.RUNNING, its_key),
        (unsent, "k1", CrewState.RUNNING, "the process that claimed this run ended before sending"),
    )
    for record, kickoff_id, state, message in refusals:
        with pytest.raises(ConfigurationError, match=message):
            await resolve_as(record, kickoff_id, look=look(state))
        assert (await latest(record)).phase is record.phase


@pytest.mark.parametrize("session", [None, "customer-42"])
async def test_only_a_session_has_an_attempt_before_the_latest_resolved(session: str | None):
    earlier = await put(unknown(good_for=LONG_AGO, session=session))
    later = {"phase": STARTED, "kickoff_id": f"k-{uuid.uuid4()}", "kicked_off_at": utcnow()}
    await put(new_record(earlier.idempotency_key, attempt=2, **later))
    if session is None:
        with pytest.raises(CrewError, match="There is nothing to resolve"):
            await unresolved(earlier.idempotency_key, RECORDS)
    else:
        assert (await unresolved(earlier.idempotency_key, RECORDS)).attempt == 1


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        pytest.param({"phase": STARTED, "kickoff_id": "k1"}, "run k1 is started", id="started"),
        pytest.param({"phase": ENDED, "kickoff_id": "k1", "state": "failed"}, "run k1 is failed", id="ended"),
        pytest.param({"phase": NOT_STARTED}, "it is not-started", id="not-started"),
    ],
)
async def test_there_is_nothing_to_resolve(facts: dict[str, Any], message: str):
    record = await put(unknown(**facts))
    with pytest.raises(CrewError, match=message):
        await unresolved(record.idempotency_key, RECORDS)


# By the webhooks of the runs that kickoffs did start


resolve = partial(resolve_from_webhook, load=find_crew)


@pytest.fixture(scope="module")
def server() -> Iterator[CrewServer]:
    with CrewServer(SCRIPT) as server:
        yield server


async def saved_crew(server: CrewServer) -> DeployedCrew:
    """Return the server's crew, stored as a block."""
    crew = server.crew()
    await crew.asave(f"resolved-{uuid.uuid4().hex[:8]}")
    return crew


@pytest.fixture
async def crew(server: CrewServer) -> DeployedCrew:
    return await saved_crew(server)


def uncertain(crew: DeployedCrew, /, **fields: Any) -> RunRecord:
    return unknown(**{"crew": crew.label, "crew_url": crew.url, "reason": None, **fields})


async def started(crew: DeployedCrew) -> str:
    async with crew.client() as client:
        return await client.kickoff({})


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        pytest.param({"reason": None}, Resolution.RESOLVED, id="uncertain"),
        pytest.param({"kickoff": "made-up"}, Resolution.NOT_KNOWN, id="an-id-that-the-crew-does-not-know"),
        pytest.param({"phase": CLAIMED, "permit": LONG_AGO}, Resolution.RESOLVED, id="a-claim-whose-time-is-over"),
        pytest.param(
            {"phase": CLAIMED, "permit": 60.0, "flow_run_id": str(uuid.uuid4())},
            Resolution.TOO_EARLY,
            id="a-fresh-claim-of-a-flow-run-that-is-gone",
        ),
        pytest.param({"phase": CLAIMED, "good_for": LONG_AGO}, Resolution.REFUSED, id="a-claim-that-sent-nothing"),
        pytest.param({"phase": NOT_STARTED}, Resolution.NOT_NEEDED, id="said-never-to-have-started"),
        pytest.param({"phase": STARTED, "kickoff_id": "k"}, Resolution.NOT_NEEDED, id="started"),
        pytest.param({"phase": ENDED, "kickoff_id": "k"}, Resolution.NOT_NEEDED, id="ended"),
        pytest.param({"crew": "no-such-block"}, Resolution.NO_CREW, id="no-block"),
        pytest.param({"crew": "127.0.0.1:8000/travel"}, Resolution.NO_CREW, id="a-crew-that-was-never-stored"),
        pytest.param({"crew_url": "https://another.example.com"}, Resolution.NO_CREW, id="a-block-of-another-crew"),
    ],
)
async def test_which_records_are_resolved(fields: dict[str, Any], outcome: Resolution, crew: DeployedCrew):
    kickoff_id = fields.get("kickoff") or await started(crew)
    record = await put(uncertain(crew, **fields), permit=fields.get("permit"))
    assert await resolve(record.idempotency_key, kickoff_id, RECORDS, attempt=1) is outcome
    (now,) = await RECORDS.attempts(record.idempotency_key)
    if outcome is Resolution.RESOLVED:
        assert now.phase == STARTED
        assert now.kickoff_id == kickoff_id
        assert now.reason is None
        assert await resolve(record.idempotency_key, "another", RECORDS, attempt=1) is Resolution.NOT_NEEDED
    else:
        assert now.phase == record.phase
        assert now.kickoff_id == record.kickoff_id


async def test_a_webhook_of_the_attempt_before_resolves_nothing(crew: DeployedCrew):
    first = await put(uncertain(crew, phase=NOT_STARTED))
    await put(uncertain(crew, idempotency_key=first.idempotency_key, attempt=2))
    kickoff_id = await started(crew)
    assert await resolve(first.idempotency_key, kickoff_id, RECORDS, attempt=1) is Resolution.NOT_NEEDED
    assert (await RECORDS.attempts(first.idempotency_key))[1].phase is UNCERTAIN
    assert await resolve(first.idempotency_key, kickoff_id, RECORDS, attempt=2) is Resolution.RESOLVED


@pytest.mark.parametrize("named", ["said_key", "claim"])
async def test_a_webhook_of_another_run_resolves_nothing(named: str, crew: DeployedCrew):
    """A record that was deleted, or stood on another Prefect server, had the same key and attempt."""
    record, kickoff_id = await put(uncertain(crew)), await started(crew)
    own = {"said_key": record.idempotency_key, "claim": claim_of(record.owner)}
    another = {**own, named: claim_of("another")}
    assert await resolve(record.idempotency_key, kickoff_id, RECORDS, **another) is Resolution.REFUSED
    (now,) = await RECORDS.attempts(record.idempotency_key)
    assert now.phase == UNCERTAIN
    assert now.kickoff_id is None
    assert await resolve(record.idempotency_key, kickoff_id, RECORDS, **own) is Resolution.RESOLVED


async def test_a_silent_crew_resolves_nothing():
    with CrewServer(SCRIPT) as server:
        crew = await saved_crew(server)
    record = await put(uncertain(crew))
    assert await resolve(record.idempotency_key, str(uuid.uuid4()), RECORDS) is Resolution.NO_ANSWER


async def test_a_rotated_token_is_loaded_again(server: CrewServer, crew: DeployedCrew):
    record, kickoff_id = await put(uncertain(crew)), await started(crew)

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


async def test_a_webhook_resolves_a_lost_kickoff(receiver: str):
    # The answer to the kickoff is lost, a webhook of the run resolves it, the next call with the key gets its result.
    with CrewServer(SCRIPT, faults=["kickoff:drop-after-accept@1"]) as server:
        crew = await saved_crew(server)
        key = f"resolve/{uuid.uuid4()}"
        with pytest.raises(KickoffUncertainError):
            await arun_crew(crew, {}, idempotency_key=key)
        names: list[str] = []
        while "crew.resolved" not in names:
            names = [event["event"] for event in await events_of(key, at_least=len(names) + 1)]
        result = await arun_crew(crew, {}, idempotency_key=key)
        assert result.output == "done"
        assert server.kickoffs == 1
        assert names.count("crew.resolved") == 1


async def test_an_early_webhook_resolves_later(receiver: str, crew: DeployedCrew):
    record = await put(uncertain(crew, phase=CLAIMED), permit=1.5 - SPARE)
    kickoff_id = await started(crew)
    hooks = hook_urls(receiver, SECRET, Hook("crew", record.idempotency_key, utcnow() + timedelta(hours=1), 1))
    async with httpx.AsyncClient() as client:
        assert (await client.post(str(hooks.crew), json={"kickoff_id": kickoff_id, "result": "done"})).is_success
    events = await events_of(record.idempotency_key, at_least=2)
    assert [event["event"] for event in events] == ["crew.webhook.crew", "crew.resolved"]
    assert events[1]["payload"]["kickoff_id"] == kickoff_id
