"""Opening a run: what is checked, what is sent and how often, and what stands on record afterwards."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

import pytest
from prefect import flow
from prefect.runtime import flow_run as this_flow_run
from pydantic import SecretStr

from prefect_crew import DeployedCrew, Webhooks, arun_crew, kickoff_crew
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.crew import Crew
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewAPIError,
    CrewError,
    CrewFailedError,
    IdempotencyConflictError,
    InvalidInputsError,
    KickoffUncertainError,
    NotFoundError,
    RateLimitedError,
)
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import kickoff
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.records import attempts, key, phases
from support.scripts import FAILS, script

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

RECORDS = PrefectRecords()
TRIP = script({"output": "{{ city }}"}, inputs=["city"])
TONED = script({"output": "{{ city }}"}, inputs=["city", {"name": "tone", "required": False, "default": "dry"}])


# The log


@pytest.mark.parametrize(
    ("spec", "second"),
    [
        ("echo", "found run {run}, which has completed. Its result is used and nothing is started."),
        (FAILS, "found run {run}, which has failed. Nothing is started."),
    ],
    ids=["completed", "failed"],
)
async def test_the_log_says_what_a_retry_finds(
    crew_server: CrewServerFactory, spec: Any, second: str, caplog: pytest.LogCaptureFixture
):
    server = crew_server(spec)
    crew = crew_of(server.crew(max_attempts=1)).called("travel")

    @flow(retries=1)
    async def trip() -> None:
        await arun_crew(crew, {"text": "a"} if spec == "echo" else {})
        raise ConnectionError("the mail server is down")

    with caplog.at_level(logging.INFO), pytest.raises((ConnectionError, CrewFailedError)):
        await trip()
    (run,) = server.runs
    said = [one.getMessage() for one in caplog.records if one.getMessage().startswith("Crew travel: ")]
    assert [one.partition(" (key ")[0] for one in said] == [
        "Crew travel: a run is started.",
        f"Crew travel: {second.format(run=run.id)}",
    ]


async def test_the_log_says_that_a_call_waits_or_starts_another_run(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    server, idempotency_key = crew_server(FAILS), key()
    crew = server.crew()
    with caplog.at_level(logging.INFO):
        run = await crew.atrigger(idempotency_key=idempotency_key)
        await crew.atrigger(idempotency_key=idempotency_key)
        with pytest.raises(CrewFailedError):
            await run.await_for_completion()
        await crew.atrigger(idempotency_key=idempotency_key)
    said = [one.getMessage() for one in caplog.records if idempotency_key in one.getMessage()]
    start = f"Crew {crew.label}: "
    assert [one for one in said if one.startswith(start)] == [
        f"{start}a run is started. (key {idempotency_key})",
        f"{start}found run {run.kickoff_id}, which is in flight. This call waits for it and starts nothing. "
        f"(key {idempotency_key})",
        f"{start}the last run of this key gave no result, and another run is started. (key {idempotency_key})",
    ]


# Inputs


@pytest.mark.parametrize(
    ("given", "missing", "unknown", "said"),
    [
        ({"days": 3}, ["city"], ["days"], "Missing inputs: city. Unknown inputs: days. The crew takes: city, tone."),
        (
            *({"city": "Lisbon", "tones": "dry", "size": 3}, [], ["tones", "size"]),
            "Unknown inputs: tones (did you mean tone?), size. The crew takes: city, tone.",
        ),
    ],
)
async def test_missing_and_unknown_inputs_start_nothing_and_may_be_corrected_under_the_same_key(
    crew_server: CrewServerFactory, given: dict[str, Any], missing: list[str], unknown: list[str], said: str
):
    server, idempotency_key = crew_server(TONED), key()
    with pytest.raises(InvalidInputsError) as caught:
        await server.crew().atrigger(given, idempotency_key=idempotency_key)
    error = caught.value
    assert (error.missing_inputs, error.unknown_inputs, error.known_inputs) == (missing, unknown, ["city", "tone"])
    assert (error.before_kickoff, error.idempotency_key) == (True, idempotency_key)
    assert str(error).startswith(f"{said} Nothing was started.")
    assert "allow_extra_inputs=True" in str(error)
    assert str(error).endswith(f"Crew {server.crew().label}, idempotency key {idempotency_key!r}."), "there is no run"
    assert server.requests["kickoff"] == 0
    await server.crew().atrigger({"city": "Lisbon", "tone": "dry"}, idempotency_key=idempotency_key)
    assert await phases(idempotency_key) == [RecordPhase.STARTED]


@pytest.mark.parametrize(
    ("spec", "allow", "given"),
    [
        pytest.param(TRIP, True, {"city": "Lisbon", "color": "red", "size": "3"}, id="where the block allows them"),
        pytest.param(
            TRIP, False, {"city": "x", "crewai_trigger_payload": "{}", "id": str(uuid.UUID(int=7))}, id="injected"
        ),
        pytest.param(script({"output": "x"}), False, {"anything": "goes"}, id="of a crew that names none"),
    ],
)
async def test_extra_inputs_that_are_sent_without_a_word(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, spec: str, allow: bool, given: dict[str, str]
):
    server = crew_server(spec)
    crew: Any = server.crew(allow_extra_inputs=allow)
    run = await crew.atrigger(given)
    assert server.run(run.kickoff_id).inputs == given
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    if allow:
        with pytest.raises(InvalidInputsError, match=r"Missing inputs: city\. Nothing was started"):
            await crew.atrigger({"color": "red"})


async def test_a_flow_that_refuses_its_id_has_started_nothing_and_its_message_is_shown(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(script({"output": "{{ city }}"}, inputs=["city"], flow=True)), key()
    with pytest.raises(
        InvalidInputsError, match=r"'inputs\.id' must be a valid UUID\. Nothing was started\."
    ) as caught:
        await server.crew().atrigger({"city": "Lisbon", "id": "42"}, idempotency_key=idempotency_key)
    assert caught.value.missing_inputs == []
    assert "Give every required input" not in str(caught.value)
    assert (server.kickoffs, await phases(idempotency_key)) == (0, [RecordPhase.NOT_STARTED])


@pytest.mark.parametrize("fault", ["500", "drop"])
async def test_inputs_that_cannot_be_asked_for_do_not_stop_a_run(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, fault: str
):
    server = crew_server(TRIP, faults=[f"inputs:{fault}"])
    await server.crew().atrigger({"city": "Lisbon"})
    assert server.kickoffs == 1
    assert "could not be checked before the kickoff" in caplog.text


@pytest.mark.parametrize("fault", ["html", "redirect"])
async def test_a_web_page_in_place_of_the_inputs_starts_nothing(crew_server: CrewServerFactory, fault: str):
    """`/kickoff` would answer with the page as well, and nobody would know whether it started a run."""
    server, idempotency_key = crew_server(TRIP, faults=[f"inputs:{fault}@1"]), key()
    with pytest.raises(ConfigurationError, match=r"is not the URL of a crew.*Nothing was started"):
        await server.crew().atrigger({"city": "Lisbon"}, idempotency_key=idempotency_key)
    assert (server.requests["kickoff"], await phases(idempotency_key)) == (0, [])


@pytest.mark.parametrize("code", [401, 403])
async def test_a_refused_token_stops_a_run_before_its_kickoff(crew_server: CrewServerFactory, code: int):
    server, idempotency_key = crew_server(TRIP, faults=[f"inputs:{code}@1"]), key()
    with pytest.raises(AuthenticationError):
        await server.crew().atrigger({"city": "Lisbon"}, idempotency_key=idempotency_key)
    assert server.requests["kickoff"] == 0
    assert await phases(idempotency_key) == []
    await server.crew().atrigger({"city": "Lisbon"}, idempotency_key=idempotency_key)
    assert server.kickoffs == 1


@pytest.mark.parametrize(
    "inputs",
    [{"city": object()}, {"city": float("nan")}, {3: "x"}, ["city"]],
    ids=["no JSON", "not a number", "name", "list"],
)
async def test_inputs_that_cannot_be_sent_start_nothing(crew_server: CrewServerFactory, inputs: Any):
    server = crew_server(TRIP)
    with pytest.raises(ConfigurationError, match="Nothing was started"):
        await server.crew().atrigger(inputs)
    assert not server.requests


async def test_a_kickoff_carries_inputs_as_text_or_json_its_key_the_users_meta_and_webhooks(
    crew_server: CrewServerFactory,
):
    server, inputs = crew_server(TRIP), {"city": ["Lisbon", "Porto"], "days": 3}
    given: dict[str, Any] = {"meta": {"order": 7, "idempotency_key": "not this one"}}
    given["webhooks"] = Webhooks(crew="http://127.0.0.1:9/crew")
    for as_json, expected in ((False, {"city": '["Lisbon","Porto"]', "days": "3"}), (True, inputs)):
        crew, idempotency_key = server.crew(inputs_as_json=as_json, allow_extra_inputs=True), key()
        run = await crew.atrigger(inputs, idempotency_key=idempotency_key, **given)
        sent = server.run(run.kickoff_id)
        assert sent.inputs == expected
        assert sent.meta == {"order": 7, "idempotency_key": idempotency_key, "run_attempt": 1}
        assert sent.targets.crew == "http://127.0.0.1:9/crew"


# Tokens


async def test_a_token_that_is_rotated_between_the_check_and_the_kickoff_is_renewed_too(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server, name = crew_server(TRIP, faults=["kickoff:401-before-accept@1"]), f"rotated-{uuid.uuid4().hex[:8]}"
    crew, reloaded = server.crew(), Crew.reloaded
    await crew.asave(name)

    async def rotated(crew: Crew) -> Crew | None:
        server.token = "the-new-token"
        await server.crew().asave(name, overwrite=True)
        return await reloaded(crew)

    monkeypatch.setattr(Crew, "reloaded", rotated)
    await crew.atrigger({"city": "Lisbon"}, idempotency_key=(idempotency_key := key()))
    assert (server.requests["kickoff"], server.kickoffs) == (2, 1)
    assert await phases(idempotency_key) == [RecordPhase.STARTED]


async def test_only_the_token_of_a_block_that_was_stored_anew_is_taken_up(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture
):
    """The record says where a run is and how long its POST may take; its caller, what may be shown of it."""
    server, other = crew_server(TRIP), crew_server(TRIP)
    name = f"moved-{uuid.uuid4().hex[:8]}"
    await server.crew(request_timeout=20.0).asave(name)
    crew = await DeployedCrew.aload(name)
    crew.show = "none"
    server.token = other.token = "the-new-token"
    await other.crew(request_timeout=500.0).asave(name, overwrite=True)
    run = await crew.atrigger({"city": "Lisbon"}, idempotency_key=(idempotency_key := key()))
    assert (server.unauthorized, server.kickoffs, other.requests["kickoff"]) == (1, 1, 0)
    result = await run.afetch_result()
    assert result.output == "Lisbon"
    (record,) = await attempts(idempotency_key)
    assert (record.crew_url, record.post_deadline) == (server.url, 40.0)
    assert record.result is None, "show='none' was set on the object in use, and holds"
    assert "has a new token" in caplog.text


# Fates


# tests/proof/test_network.py has all faults.
@pytest.mark.parametrize("fault", ["drop-after-accept", "500-after-accept", "html-after-accept", "no-id", "timeout"])
async def test_what_may_have_started_is_uncertain_and_never_sent_again(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, fault: str
):
    server, idempotency_key = crew_server("echo", faults=[f"kickoff:{fault}@1"]), key()
    crew = server.crew(request_timeout=0.5)
    with pytest.raises(KickoffUncertainError, match="resolve") as caught:
        await crew.atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert caught.value.idempotency_key == idempotency_key
    assert caught.value.sent["crew"] == crew.label
    assert isinstance(caught.value.__cause__, CrewError)
    for _ in range(2):
        with pytest.raises(KickoffUncertainError):
            await crew.atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert (server.requests["kickoff"], server.requests["inputs"]) == (1, 1)
    (record,) = await attempts(idempotency_key)
    assert (record.phase, record.kickoff_id) == (RecordPhase.UNCERTAIN, None)
    assert record.reason
    assert server.token not in f"{record} {caught.value!r} {caught.value.__cause__!r} {caplog.text}"


@pytest.mark.parametrize(
    ("fault", "kind"), [("400", InvalidInputsError), ("403", AuthenticationError), ("404", NotFoundError)]
)
async def test_what_was_refused_did_not_start_and_is_raised_at_once(
    crew_server: CrewServerFactory, fault: str, kind: type[CrewAPIError]
):
    server, idempotency_key = crew_server("echo", faults=[f"kickoff:{fault}@1"]), key()
    with pytest.raises(kind) as caught:
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert caught.value.status_code == int(fault)
    assert server.requests["kickoff"] == 1
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED]
    await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert server.kickoffs == 1


@pytest.mark.parametrize("fault", ["429=0.2", "503=0.2"])
async def test_a_server_that_asks_to_come_back_is_come_back_to(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, fault: str
):
    server, idempotency_key = crew_server("echo", faults=[f"kickoff:{fault}@1-2"]), key()
    began = asyncio.get_running_loop().time()
    await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert asyncio.get_running_loop().time() - began >= 0.4
    assert (server.requests["kickoff"], server.kickoffs) == (3, 1)
    assert await phases(idempotency_key) == [RecordPhase.STARTED]
    assert caplog.text.count("The kickoff is sent again in") == 2


async def test_one_that_asks_for_no_time_is_asked_less_and_less(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff, "LIMITED_FOR", 1.0)
    server = crew_server("echo", faults=["kickoff:429=0"])
    with pytest.raises(RateLimitedError):
        await server.crew().atrigger({"text": "a"})
    assert server.requests["kickoff"] <= 5


async def test_a_server_that_asks_for_too_much_time_is_left_alone(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff, "LIMITED_FOR", 1.0)
    server, idempotency_key = crew_server("echo", faults=["kickoff:429=3600@1"]), key()
    with pytest.raises(RateLimitedError) as caught:
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert caught.value.retry_after == 3600
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED]


# Keys that hold across flow runs


async def test_a_completed_run_of_equal_inputs_is_returned_without_a_request_to_the_crew(
    crew_server: CrewServerFactory,
):
    server, idempotency_key, found = crew_server(TRIP), key(), list[tuple[Any, str]]()
    asked = 0
    # They are equal whatever their order and form.
    for as_json, inputs in ((False, {"city": "Lisbon", "days": 3}), (True, {"days": 3, "city": "Lisbon"})):
        crew = server.crew(inputs_as_json=as_json, allow_extra_inputs=True)
        run = await crew.atrigger(inputs, idempotency_key=idempotency_key)
        await run.await_for_completion()
        found.append((run.kickoff_id, (await run.afetch_result()).output))
        asked = asked if as_json else server.requests.total()
    assert found == [found[0]] * 2
    assert found[0][1] == "Lisbon"
    assert server.requests.total() == asked


async def test_a_failed_run_is_started_again_up_to_the_limit_and_then_raised_with_its_reason_and_what_to_do(
    crew_server: CrewServerFactory,
):
    server, idempotency_key = crew_server(FAILS), key()
    crew, errors = crew_of(server.crew(max_attempts=2)).called("travel"), list[str]()
    for _ in range(4):
        with pytest.raises(CrewFailedError, match="the search engine is down") as caught:
            await arun_crew(crew, idempotency_key=idempotency_key)
        errors.append(str(caught.value))
    assert server.kickoffs == 2
    assert [(record.attempt, record.state) for record in await attempts(idempotency_key)] == [
        (1, CrewState.FAILED),
        (2, CrewState.FAILED),
    ]
    assert "starts the crew again" in errors[0]
    assert "This was attempt 2 of at most 2" in errors[1]
    assert "starts the crew again" not in errors[1]
    for error in errors[2:]:
        assert "Nothing was started: crew travel allows 2 attempts at one idempotency key (max_attempts)" in error
    for error in errors[1:]:
        for place in ("block deployed-crew/travel", "parameter force_new", "force_new=True", "--force-new"):
            assert place in error


async def conflict(crew: Any, inputs: dict[str, Any], idempotency_key: str, **options: Any) -> str:
    with pytest.raises(IdempotencyConflictError, match="Nothing was started") as caught:
        await crew.atrigger(inputs, idempotency_key=idempotency_key, **options)
    assert caught.value.idempotency_key == idempotency_key
    return caught.value.difference


async def test_another_crew_or_other_inputs_under_a_key_are_a_conflict(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server("echo"), key()
    crew = server.crew(allow_extra_inputs=True, secret_inputs=["pin"])
    given = {"text": "a", "days": 3, "pin": "1234"}
    await crew.atrigger(given, idempotency_key=idempotency_key)
    differing = {**given, "text": "b"}
    for inputs, options in (
        (differing, {}),
        # What is secret in one of the two calls is no part of the digest there.
        ({**given, "text": SecretStr("a")}, {}),
        (given, {"restore_from": uuid.uuid4()}),
    ):
        said = await conflict(crew, inputs, idempotency_key, **options)
        assert said.startswith(
            f"its inputs differ: their digest is {Inputs.of({'text': 'a', 'days': '3'}).digest}, now"
        )
    other = crew_server("echo")
    assert "crew" in await conflict(other.crew(), given, idempotency_key)
    assert other.requests["kickoff"] == 0
    assert server.requests["kickoff"] == 1


async def test_calls_that_differ_in_nothing_but_a_secret_input_are_the_same_run(crew_server: CrewServerFactory):
    """A flow may fetch a token that holds for minutes on each attempt."""
    server, idempotency_key, tokens = crew_server("echo"), key(), iter(("1234", "5678"))
    crew, given = server.crew(allow_extra_inputs=True, secret_inputs=["pin"]), {"text": "a", "pin": "1234"}
    first = await crew.atrigger(given, idempotency_key=idempotency_key)
    for pin in ("9999", SecretStr("0000")):
        assert (
            await crew.atrigger({**given, "pin": pin}, idempotency_key=idempotency_key)
        ).kickoff_id == first.kickoff_id
    (record,) = await attempts(idempotency_key)
    assert record.inputs_digest == Inputs.of({"text": "a"}).digest

    @flow(retries=1)
    async def retried() -> str:
        result = await arun_crew(crew, {"text": "b", "pin": next(tokens), "key": SecretStr(uuid.uuid4().hex)})
        if this_flow_run.run_count == 1:
            raise RuntimeError("after the run")
        return result.kickoff_id

    await retried()
    assert server.kickoffs == 2


async def test_force_new_starts_again_whatever_the_record_says(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server("echo", faults=["kickoff:500@1"]), key()
    with pytest.raises(KickoffUncertainError):
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    forced = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key, force_new=True)
    await forced.await_for_completion()
    again = await server.crew().atrigger({"text": "b"}, idempotency_key=idempotency_key, force_new=True)
    assert again.kickoff_id != forced.kickoff_id
    assert [record.attempt for record in await attempts(idempotency_key)] == [1, 2, 3]
    found = await server.crew().atrigger({"text": "b"}, idempotency_key=idempotency_key)
    assert found.kickoff_id == again.kickoff_id


async def test_a_forced_kickoff_that_did_not_start_keeps_the_completed_run(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server("echo", faults=["kickoff:404@2"]), key()
    first = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    await first.await_for_completion()
    with pytest.raises(NotFoundError):
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key, force_new=True)
    assert (await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)).kickoff_id == first.kickoff_id
    assert server.kickoffs == 1


async def test_a_retry_of_a_flow_that_forced_a_run_means_that_run(crew_server: CrewServerFactory):
    server, idempotency_key, runs = crew_server("echo"), key(), list[str]()

    @flow(retries=2)
    async def trip() -> list[str]:
        ids = [
            await kickoff_crew(server.crew(), {"text": "a"}, idempotency_key=idempotency_key, force_new=True)
            for _ in range(2)
        ]
        runs.extend(ids)
        if len(runs) < 6:
            raise RuntimeError("again")
        return ids

    first = await trip()
    assert runs == first * 3
    assert len(set(first)) == server.kickoffs == 2
    await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key, force_new=True)
    assert server.kickoffs == 3


# What is reported


async def test_the_decision_is_one_line(crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture):
    server, idempotency_key = crew_server("echo"), key()
    for words in ("a run is started", "which is in flight"):
        caplog.clear()
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
        key_named = f"(key {idempotency_key})"
        (line,) = [record.getMessage() for record in caplog.records if key_named in record.getMessage()]
        assert line.startswith(f"Crew {server.crew().label}: ")
        assert words in line
