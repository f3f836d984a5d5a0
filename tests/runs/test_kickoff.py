"""Opening a run: what is checked, what is sent and how often, and what stands on record afterwards."""

import asyncio
import logging
import uuid
from contextlib import suppress
from typing import Any

import pytest
from prefect import flow
from prefect.runtime import flow_run as this_flow_run
from pydantic import SecretStr

import prefect_crew as pc
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.crew import Crew
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import kickoff
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.records import attempts, phases, start
from support.scripts import FAILS, script

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

RECORDS = PrefectRecords()
TRIP = script({"output": "{{ city }}"}, inputs=["city"])
TONED = script({"output": "{{ city }}"}, inputs=["city", {"name": "tone", "required": False, "default": "dry"}])


# The log


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        ("echo", ["found run {run}, which has completed. Its result is used and nothing is started"]),
        (
            FAILS,
            [
                "the last run of this key gave no result, and another run is being started",
                "found run {run}, which has failed. Nothing is started",
            ],
        ),
    ],
    ids=["completed", "failed"],
)
async def test_the_log_says_what_a_call_does(crew_server: Any, key: str, caplog: Any, spec: str, ends: list[str]):
    crew, expected = crew_server(spec).crew(max_attempts=2), list[str]()
    in_flight = "found run {run}, which is in flight. This call waits for it and starts nothing"
    for step in ("a run is being started", in_flight, *ends):
        run = await crew.atrigger({"text": "a"} if spec == "echo" else {}, idempotency_key=key)
        expected.append(f"Crew {crew.label}: {step.format(run=run.kickoff_id)}. (key {key})")
        if len(expected) > 1:
            with suppress(pc.CrewFailedError):
                await run.await_for_completion()
    assert [one.getMessage() for one in caplog.records if f"(key {key})" in one.getMessage()] == expected


# Inputs


@pytest.mark.parametrize(
    ("inputs", "missing", "unknown", "problem"),
    [
        (
            {"days": 3},
            ["city"],
            ["days"],
            "Missing inputs: city. A Flow needs none of its inputs: save it with --flow, or DeployedCrew(flow=True). "
            "Unknown inputs: days.",
        ),
        (
            {"city": "Lisbon", "tones": 1, "size": 3},
            *([], ["tones", "size"]),
            "Unknown inputs: tones (did you mean tone?), size.",
        ),
    ],
)
async def test_refused_inputs_may_be_corrected(
    crew_server: CrewServerFactory, key: str, inputs: Any, missing: list[str], unknown: list[str], problem: str
):
    server = crew_server(TONED)
    with pytest.raises(pc.InvalidInputsError) as caught:
        await start(server, key, inputs)
    error = caught.value
    assert error.missing_inputs == missing
    assert error.unknown_inputs == unknown
    assert error.known_inputs == ["city", "tone"]
    assert error.before_kickoff
    assert str(error) == (
        f"{problem} The crew takes: city, tone. Nothing was started. To list the crew's inputs, run: prefect-crew "
        "inputs CREW. To send the unknown inputs anyway, set allow_extra_inputs=True on the block, or give "
        "--allow-extra. "
        f"Crew {server.crew().label}, idempotency key {key!r}."
    )
    assert server.requests["kickoff"] == 0
    await start(server, key, {"city": "Lisbon", "tone": "dry"})
    assert await phases(key) == [RecordPhase.STARTED]


@pytest.mark.parametrize(
    ("spec", "allow", "given"),
    [
        (TRIP, True, {"city": "Lisbon", "color": "red", "size": "3"}),
        (TRIP, False, {"city": "x", "crewai_trigger_payload": "{}", "id": str(uuid.UUID(int=7))}),
        (script({"output": "x"}), False, {"anything": "goes"}),
    ],
    ids=["where the block allows them", "injected", "of a crew that names none"],
)
async def test_extra_inputs_are_sent_without_a_word(crew_server: Any, caplog: Any, spec: str, allow: bool, given: Any):
    server = crew_server(spec)
    crew = server.crew(allow_extra_inputs=allow)
    run = await crew.atrigger(given)
    assert server.run(run.kickoff_id).inputs == given
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    if allow:
        with pytest.raises(
            pc.InvalidInputsError, match=r"Missing inputs: city\. A Flow needs none.* Nothing was started"
        ):
            await crew.atrigger({"color": "red"})


async def test_a_flow_that_refuses_its_id_has_started_nothing(crew_server: CrewServerFactory, key: str):
    server = crew_server(script({"output": "{{ city }}"}, inputs=["city"], flow=True))
    says = r"'inputs\.id' must be a valid UUID\. Nothing was started\."
    with pytest.raises(pc.InvalidInputsError, match=says) as caught:
        await start(server, key, {"city": "Lisbon", "id": "42"})
    assert caught.value.missing_inputs == []
    assert "Give every required input" not in str(caught.value)
    assert server.kickoffs == 0
    assert await phases(key) == [RecordPhase.NOT_STARTED]


async def test_inputs_that_stay_unchecked_stop_no_run(server: CrewServer, key: str, caplog: Any):
    server.faults.add("inputs:500")
    await start(server, key)
    assert server.kickoffs == 1
    assert "could not be checked before the kickoff" in caplog.text


async def test_a_kickoff_carries_key_meta_and_webhooks(crew_server: CrewServerFactory, key: str):
    server, inputs = crew_server(TRIP), {"city": ["Lisbon", "Porto"], "days": 3}
    given: dict[str, Any] = {"meta": {"order": 7, "idempotency_key": "not this one"}}
    given["webhooks"] = pc.Webhooks(crew="http://127.0.0.1:9/crew")
    for as_json, expected in ((False, {"city": '["Lisbon","Porto"]', "days": "3"}), (True, inputs)):
        crew, this_key = server.crew(flow=as_json, allow_extra_inputs=True), f"{key} {as_json}"
        sent = server.run((await crew.atrigger(inputs, idempotency_key=this_key, **given)).kickoff_id)
        assert sent.inputs == expected
        assert sent.meta == {"order": 7, "idempotency_key": this_key, "run_attempt": 1}
        assert sent.targets.crew == "http://127.0.0.1:9/crew"


# Tokens


async def test_a_token_rotated_midway_is_renewed(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    name, reloaded = f"rotated-{uuid.uuid4().hex[:8]}", Crew.reloaded
    crew = server.crew()
    await crew.asave(name)

    async def rotated(crew: Crew) -> Crew | None:
        server.token = "the-new-token"
        await server.crew().asave(name, overwrite=True)
        return await reloaded(crew)

    monkeypatch.setattr(Crew, "reloaded", rotated)
    server.faults.add("kickoff:401-before-accept@1")
    await crew.atrigger({"text": "a"}, idempotency_key=key)
    assert server.requests["kickoff"] == 2
    assert server.kickoffs == 1
    assert await phases(key) == [RecordPhase.STARTED]


async def test_only_the_token_of_a_block_is_renewed(crew_server: Any, key: str, caplog: pytest.LogCaptureFixture):
    """The record says where a run is and how long its POST may take; its caller, what may be shown of it."""
    server, other = crew_server(TRIP), crew_server(TRIP)
    name = f"moved-{uuid.uuid4().hex[:8]}"
    await server.crew(request_timeout=20.0).asave(name)
    crew = await pc.DeployedCrew.aload(name)
    crew.show = "none"
    server.token = other.token = "the-new-token"
    await other.crew(request_timeout=500.0).asave(name, overwrite=True)
    run = await crew.atrigger({"city": "Lisbon"}, idempotency_key=key)
    assert server.unauthorized == 1
    assert server.kickoffs == 1
    assert other.requests["kickoff"] == 0
    result = await run.afetch_result()
    assert result.output == "Lisbon"
    (record,) = await attempts(key)
    assert record.crew_url == server.url
    assert record.post_deadline == 40.0
    assert record.result is None, "show='none' was set on the object in use, and holds"
    assert "has a new token" in caplog.text


# Fates


# tests/proof/test_network.py has all faults.
@pytest.mark.parametrize("fault", ["drop-after-accept", "500-after-accept", "empty-after-accept", "timeout"])
async def test_what_may_have_started_is_uncertain(server: CrewServer, key: str, caplog: Any, fault: str):
    server.faults.add(f"kickoff:{fault}@1")
    crew = server.crew(request_timeout=0.5)
    with pytest.raises(pc.KickoffUncertainError, match="resolve") as caught:
        await crew.atrigger({"text": "a"}, idempotency_key=key)
    assert caught.value.idempotency_key == key
    assert caught.value.sent["crew"] == crew.label
    assert isinstance(caught.value.__cause__, pc.CrewError)
    for _ in range(2):
        with pytest.raises(pc.KickoffUncertainError):
            await crew.atrigger({"text": "a"}, idempotency_key=key)
    assert server.requests["kickoff"] == 1
    assert server.requests["inputs"] == 1, "it is never sent again"
    (record,) = await attempts(key)
    assert record.phase == RecordPhase.UNCERTAIN
    assert record.kickoff_id is None
    assert record.reason
    assert server.token not in f"{record} {caught.value!r} {caught.value.__cause__!r} {caplog.text}"


async def test_a_busy_server_is_asked_again(server: CrewServer, key: str, caplog: Any):
    server.faults.add("kickoff:503=0.2@1-2")
    began = asyncio.get_running_loop().time()
    await start(server, key)
    assert asyncio.get_running_loop().time() - began >= 0.4
    assert server.requests["kickoff"] == 3
    assert server.kickoffs == 1
    assert caplog.text.count("The kickoff is sent again in") == 2


@pytest.mark.parametrize(("fault", "most"), [("429=0", 5), ("429=3600", 1)])
async def test_a_server_that_stays_busy_is_left(server: CrewServer, key: str, monkeypatch: Any, fault: str, most: int):
    monkeypatch.setattr(kickoff, "LIMITED_FOR", 1.0)
    server.faults.add(f"kickoff:{fault}")
    with pytest.raises(pc.RateLimitedError) as caught:
        await start(server, key)
    assert caught.value.retry_after == float(fault.partition("=")[2])
    assert server.requests["kickoff"] <= most
    assert await phases(key) == [RecordPhase.NOT_STARTED]


# Keys that hold across flow runs


async def test_a_completed_run_is_returned_without_a_request(crew_server: CrewServerFactory, key: str):
    server, found = crew_server(TRIP), list[tuple[Any, str]]()
    asked = 0
    # They are equal whatever their order and form.
    for as_json, inputs in ((False, {"city": "Lisbon", "days": 3}), (True, {"days": 3, "city": "Lisbon"})):
        run = await server.crew(flow=as_json, allow_extra_inputs=True).atrigger(inputs, idempotency_key=key)
        await run.await_for_completion()
        found.append((run.kickoff_id, (await run.afetch_result()).output))
        asked = asked or server.requests.total()
    assert found == [found[0]] * 2
    assert found[0][1] == "Lisbon"
    assert server.requests.total() == asked


async def test_a_failed_run_is_started_again_up_to_the_limit(crew_server: CrewServerFactory, key: str):
    server, errors = crew_server(FAILS), list[str]()
    crew = crew_of(server.crew(max_attempts=2)).called("travel")
    for _ in range(4):
        with pytest.raises(pc.CrewFailedError, match="the search engine is down") as caught:
            await pc.arun_crew(crew, idempotency_key=key)
        errors.append(str(caught.value))
    assert server.kickoffs == 2
    assert [record.state for record in await attempts(key)] == [CrewState.FAILED] * 2
    assert "starts the crew again" in errors[0]
    assert "This was attempt 2 of at most 2" in errors[1]
    assert "starts the crew again" not in errors[1]
    for error in errors[2:]:
        assert "Nothing was started: crew travel allows 2 attempts at one idempotency key (max_attempts)" in error
    for error in errors[1:]:
        for place in ("block deployed-crew/travel", "parameter force_new", "force_new=True", "--force-new"):
            assert place in error


async def test_another_crew_or_other_inputs_are_a_conflict(server: CrewServer, crew_server: Any, key: str):
    crew = server.crew(allow_extra_inputs=True, secret_inputs=["pin"])
    given = {"text": "a", "days": 3, "pin": "1234"}
    await crew.atrigger(given, idempotency_key=key)
    its_inputs = f"its inputs differ: their digest is {Inputs.of({'text': 'a', 'days': '3'}).digest}, now"
    other = crew_server("echo")
    for caller, inputs, options, says in (
        (crew, {**given, "text": "b"}, {}, its_inputs),
        # What is secret in one of the two calls is no part of the digest there.
        (crew, {**given, "text": SecretStr("a")}, {}, its_inputs),
        (crew, given, {"restore_from": str(uuid.uuid4())}, its_inputs),
        (other.crew(), given, {}, "it ran crew"),
    ):
        with pytest.raises(pc.IdempotencyConflictError, match="Nothing was started") as caught:
            await caller.atrigger(inputs, idempotency_key=key, **options)
        assert caught.value.idempotency_key == key
        assert caught.value.difference.startswith(says)
    assert other.requests["kickoff"] == 0
    assert server.requests["kickoff"] == 1


async def test_a_secret_input_makes_no_other_run(server: CrewServer, key: str):
    """A flow may fetch a token that holds for minutes on each attempt."""
    crew = server.crew(allow_extra_inputs=True, secret_inputs=["pin"])
    calls = [await crew.atrigger({"text": "a", "pin": pin}, idempotency_key=key) for pin in ("1", "2", SecretStr("3"))]
    assert len({run.kickoff_id for run in calls}) == 1
    (record,) = await attempts(key)
    assert record.inputs_digest == Inputs.of({"text": "a"}).digest

    @flow(retries=1)
    async def retried() -> str:
        pin = uuid.uuid4().hex
        result = await pc.arun_crew(crew, {"text": "b", "pin": pin, "key": SecretStr(pin)})
        if this_flow_run.run_count == 1:
            raise RuntimeError("after the run")
        return result.kickoff_id

    await retried()
    assert server.kickoffs == 2


async def test_force_new_starts_again_whatever_the_record_says(server: CrewServer, key: str):
    server.faults.add("kickoff:500@1")
    server.faults.add("kickoff:404@3")
    with pytest.raises(pc.KickoffUncertainError):
        await start(server, key)
    forced = await start(server, key, force_new=True)
    await forced.await_for_completion()
    with pytest.raises(pc.NotFoundError):
        await start(server, key, force_new=True)
    assert (await start(server, key)).kickoff_id == forced.kickoff_id, "what did not start hides no run"
    again = await start(server, key, {"text": "b"}, force_new=True)
    assert again.kickoff_id != forced.kickoff_id
    assert (await start(server, key, {"text": "b"})).kickoff_id == again.kickoff_id
    assert [record.attempt for record in await attempts(key)] == [1, 2, 3, 4]


async def test_a_retry_of_a_flow_that_forced_a_run_means_that_run(server: CrewServer, key: str):
    runs: list[str] = []

    @flow(retries=2)
    async def trip() -> list[str]:
        forced = {"idempotency_key": key, "force_new": True}
        ids = [await pc.kickoff_crew(server.crew(), {"text": "a"}, **forced) for _ in range(2)]
        runs.extend(ids)
        if len(runs) < 6:
            raise RuntimeError("again")
        return ids

    first = await trip()
    assert runs == first * 3
    assert len(set(first)) == server.kickoffs == 2
    await start(server, key, force_new=True)
    assert server.kickoffs == 3
