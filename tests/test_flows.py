"""`run_crew` wherever it is called, what Prefect stores of it, and results that are read from anywhere."""

import asyncio
import json
import traceback
import uuid
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any, cast

import pytest
from prefect import flow, get_client, task
from prefect.blocks.system import Secret
from prefect.cache_policies import INPUTS
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.schedules import CronSchedule
from prefect.flow_engine import run_flow_async
from prefect.runtime import flow_run
from prefect.states import Scheduled
from pydantic import BaseModel, SecretStr

import prefect_crew as pc
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import CrewResult
from prefect_crew.client.redaction import MASK
from prefect_crew.runs import run as run_module
from prefect_crew.store.decision import AttemptState
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import acall_in_flow, call_in_flow
from support.frames import locals_of
from support.past import aput, key, new_attempt
from support.proxy import Proxy
from support.scripts import FAILS, PICKY, script, slow
from support.seen import Seen
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

FLOW = "deployed-crew"
TOO_LARGE = "(too large to be stored with the flow run)"


def new_name() -> str:
    return f"crew-{uuid.uuid4().hex[:8]}"


# Options of Prefect for its two tasks


def test_each_task_has_its_options_of_prefect(crew_server: CrewServerFactory, seen: Seen):
    crew = crew_server("echo").crew()
    options: Any = {"kickoff_options": {"retries": 7, "tags": ["night"]}, "wait_options": {"retries": 1}}
    flow_run_id, result = call_in_flow(lambda: pc.arun_crew(crew, {"text": "a"}, **options))
    assert result.output == "a"
    kickoff, wait = sorted(seen.task_runs(flow_run_id, count=2), key=lambda run: run["name"])
    assert kickoff["tags"] == ["night"]
    assert kickoff["empirical_policy"]["retries"] == 7
    assert wait["tags"] == []
    assert wait["empirical_policy"]["retries"] == 1


def test_a_task_run_name_is_filled_with_arguments(crew_server: CrewServerFactory, seen: Seen):
    crew, ids, run_key = crew_server("echo").crew(), list[Any](), key()

    @task
    def city() -> str:
        return "Lisbon"

    @flow
    def trip() -> None:
        ids.append(flow_run.id)
        named: Any = {"task_run_name": "call {name} {idempotency_key}"}
        pc.run_crew(crew, {"text": "a"}, name="a", idempotency_key=run_key, kickoff_options=named, wait_options=named)
        pc.run_crew(crew, {"text": cast("Any", city.submit())})

    trip()
    names = [run["name"] for run in seen.task_runs(ids[0], count=5)]
    assert names.count(f"call a {run_key}") == 2
    assert len([name for name in names if name.endswith("Lisbon")]) == 2, names


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kickoff_options": {"cache_policy": INPUTS}}, "cannot have 'cache_policy': only the crew database"),
        ({"kickoff_options": {"persist_result": True}}, "cannot have 'persist_result'"),
        ({"kickoff_options": {"result_storage": "local-file-system/x"}}, "cannot have 'result_storage'"),
        ({"kickoff_options": {"retry_condition_fn": print}}, "cannot have 'retry_condition_fn'"),
        ({"kickoff_options": {"retry": 3}}, "An option of a task cannot be used: .* 'retry'"),
        ({"wait_options": {"retrys": 3}}, "An option of a task cannot be used: .* 'retrys'"),
        ({"wait_options": {"timeout_seconds": "soon"}}, "An option of a task cannot be used"),
        ({"wait_options": 3}, "wait_options has to be a mapping"),
        ({"meta": "text"}, "meta has to be"),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], says: str, crew_server: CrewServerFactory):
    server = crew_server("echo")
    run: Any = partial(pc.run_crew, server.crew(), {"text": "a"}, idempotency_key=key())
    with pytest.raises(pc.ConfigurationError, match=rf"{says}.*Nothing was started"):
        run(**options)
    assert not server.requests
    assert run().output == "a", "the key is not used up"


# Where it is called


def test_run_crew_in_sync_flows_tasks_and_subflows(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()

    @task
    def sync_task() -> str:
        return pc.run_crew(crew, {"text": "task"}).output

    @flow
    def subflow() -> str:
        return pc.run_crew(crew, {"text": "subflow"}).output

    @flow
    def trip() -> list[str]:
        return [pc.run_crew(crew, {"text": "flow"}).output, sync_task(), sync_task.submit().result(), subflow()]

    assert trip() == ["flow", "task", "task", "subflow"]


def test_run_crew_in_a_nested_sync_flow(crew_server: CrewServerFactory):
    """The outer event loop, which the sync flow occupies, goes on with its own work afterwards."""
    server, idempotency_key, beats = crew_server(slow(0.5)), key(), list[int]()
    crew = server.crew()

    @flow
    def inner() -> list[str]:
        run = crew.trigger({})
        run.wait_for_completion()
        outputs = [pc.run_crew(crew, idempotency_key=idempotency_key).output, pc.get_result(idempotency_key).output]
        return [*outputs, run.fetch_result().output]

    async def beat() -> None:
        while True:
            beats.append(1)
            await asyncio.sleep(0.01)

    @flow
    async def outer() -> list[str]:
        beating = asyncio.create_task(beat())
        await until(lambda: beats, "the first beat")
        outputs, before = inner(), len(beats)
        await until(lambda: len(beats) > before + 1, "more beats")
        beating.cancel()
        return outputs

    assert asyncio.run(outer()) == ["done"] * 3
    assert server.kickoffs == 2


async def test_a_running_loop_is_told_the_async_name(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()
    run = pc.CrewRun(crew, "nobody")
    twins = {
        "arun_crew": lambda: pc.run_crew(crew, {"text": "a"}),
        "aget_result": lambda: pc.get_result("a"),
        "atrigger": lambda: crew.trigger({"text": "a"}),
        "await_for_completion": run.wait_for_completion,
        "afetch_result": run.fetch_result,
        "astop": run.stop,
        "aresume": lambda: run.resume("fine", approve=True),
    }
    for name, call in twins.items():
        with pytest.raises(pc.ConfigurationError, match=rf"Write `await {name}\(\.\.\.\)` instead"):
            call()
    assert (await pc.arun_crew(crew, {"text": "a"})).output == "a"


def test_a_failed_state_says_why_in_one_line(crew_server: CrewServerFactory, seen: Seen):
    called = new_name()
    crew = crew_of(crew_server(FAILS).crew()).called("travel")
    with pytest.raises(pc.CrewFailedError):
        call_in_flow(lambda: pc.arun_crew(crew), name=called)
    (run,) = seen.flow_runs(called)
    message = run["state"]["message"]
    assert "of crew travel failed: the search engine is down." in message
    assert "\n" not in message


STATE = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"


async def test_a_state_to_restore_makes_another_run(crew_server: CrewServerFactory):
    server = crew_server("echo")
    run: Any = partial(pc.arun_crew, server.crew(), {"text": "a"}, idempotency_key=key())
    first = await run(restore_from=STATE)
    assert (await run(restore_from=str(uuid.UUID(STATE)))).kickoff_id == first.kickoff_id
    assert server.run(first.kickoff_id).restore_from == STATE
    for other in ({}, {"restore_from": str(uuid.uuid4())}):
        with pytest.raises(pc.IdempotencyConflictError):
            await run(**other)
    assert server.kickoffs == 1


async def test_a_state_to_restore_is_part_of_the_key(crew_server: CrewServerFactory):
    server = crew_server("echo")
    run: Any = partial(pc.arun_crew, server.crew(), {"text": "a"}, name="step")

    async def twice() -> list[CrewResult]:
        return [await run(restore_from=state) for state in (STATE, None)]

    _, results = await acall_in_flow(twice)
    assert [server.run(result.kickoff_id).restore_from for result in results] == [STATE, None]


# What Prefect stores of a flow of its own


class Login(BaseModel):
    user: str
    password: SecretStr


def stored(seen: Seen, crew: str) -> dict[str, Any]:
    """Return the flow run that a call outside of a flow has made for a crew of this name."""
    (run,) = [run for run in seen.flow_runs(FLOW) if run["parameters"].get("crew") == crew]
    return run


def test_an_own_flow_stores_plain_values(crew_server: CrewServerFactory, seen: Seen):
    called = new_name()
    server = crew_server(script({"output": "{{ inputs.when }} {{ inputs.pin }} {{ inputs.login }}"}))
    crew = crew_of(server.crew(secret_inputs=["pin"])).called(called)
    inputs = {
        "when": date(2026, 5, 1), "cities": ["Lisbon", "at hunter22"], "days": 3, "pin": 4711471, "none": None,
        "login": Login(user="me", password=SecretStr("hunter22")), "key": SecretStr("hidden-one"),
    }  # fmt: skip
    idempotency_key = key()
    result = pc.run_crew(crew, inputs, idempotency_key=idempotency_key, output_type=None)
    assert result.output == '2026-05-01 4711471 {"user":"me","password":"hunter22"}'
    run = stored(seen, called)
    assert run["name"] == f"{called} · {idempotency_key}"
    assert run["parameters"]["inputs"] == {
        "when": "2026-05-01", "cities": ["Lisbon", f"at {MASK}"], "days": 3, "pin": MASK, "login": MASK, "key": MASK,
    }  # fmt: skip
    everything = json.dumps(run)
    for secret in (server.token, "4711471", "hunter22", "hidden-one"):
        assert secret not in everything


def test_flow_runs_of_a_crew_have_own_names(crew_server: CrewServerFactory, seen: Seen):
    server, called, idempotency_key = crew_server(slow(0.1)), new_name(), key()
    server.crew().save(called)
    crew = crew_of(server.crew()).called(called)
    pc.run_crew(crew, {"city": "Porto {x}"})
    for _ in range(2):
        pc.run_crew(crew, {"city": "Lisbon"}, idempotency_key=idempotency_key)
    pc.run_crew(replace(crew, show="none"), {"city": "Lisbon"})
    asyncio.run(pc.run_deployed_crew(called, {"city": "Faro"}))
    with pytest.raises(pc.ConfigurationError):
        asyncio.run(pc.run_deployed_crew(f"no-{called}", {"city": "Faro"}))
    names = [run["name"] for run in seen.flow_runs(FLOW) if called in str(run["parameters"].get("crew"))]
    of_the_key = f"{called} · {idempotency_key}"
    assert names == [f"{called} · Porto {{x}}", of_the_key, of_the_key, called, f"{called} · Faro", f"no-{called}"]
    assert server.kickoffs == 4


def test_large_inputs_reach_the_crew(crew_server: CrewServerFactory, seen: Seen):
    called = new_name()
    crew = crew_of(crew_server(script({"output": "{{ inputs.book | length }}"})).crew()).called(called)
    assert pc.run_crew(crew, {"book": "語" * 300_000, "page": 3}).output == "300000"
    assert stored(seen, called)["parameters"]["inputs"] == {"book": TOO_LARGE, "page": TOO_LARGE}


def test_unsendable_inputs_make_no_flow_run(crew_server: CrewServerFactory, seen: Seen):
    called = new_name()
    with pytest.raises(pc.ConfigurationError, match="Input 'x' holds a value of type object"):
        pc.run_crew(crew_of(crew_server("echo").crew()).called(called), {"x": object()})
    assert called not in [run["parameters"].get("crew") for run in seen.flow_runs(FLOW)]


async def run_again(run: dict[str, Any]) -> Any:
    """Run a flow run with nothing but what stands in the database, as a retry by a worker does."""
    async with get_client() as client:
        planned = await client.read_flow_run(uuid.UUID(run["id"]))
    return await run_flow_async(pc.run_deployed_crew, flow_run=planned, parameters=planned.parameters)


@pytest.mark.parametrize("given", ["block", "name"])
async def test_a_flow_run_of_a_block_can_be_run_again(crew_server: CrewServerFactory, seen: Seen, given: str):
    server, block = crew_server("echo"), new_name()
    crew = server.crew()
    await crew.asave(block)
    options: Any = {"name": "step", "wait": pc.WaitPolicy(timeout=77), "restore_from": STATE}
    first = await pc.arun_crew(crew if given == "block" else block, {"text": "a"}, **options)
    run = await asyncio.to_thread(stored, seen, block)
    assert run["parameters"]["wait"]["timeout"] == 77
    assert run["parameters"]["restore_from"] == STATE
    async with get_client() as client:
        await client.set_flow_run_state(uuid.UUID(run["id"]), Scheduled(), force=True)
    again = await run_again(run)
    assert again.output == "a"
    assert again.kickoff_id == first.kickoff_id
    assert server.kickoffs == 1


DAY = {"start_time": "2024-02-28T00:00:00Z", "end_time": "2024-02-28T23:00:00Z", "max_runs": 1}


@pytest.mark.parametrize("force_new", [False, True])
async def test_one_key_for_all_times_is_refused_in_the_run(crew_server: CrewServerFactory, force_new: bool):
    """As of a deployment that Prefect has made of a file or a prefect.yaml, which checks no keys."""
    server, block = crew_server("echo"), new_name()
    await server.crew().asave(block)
    parameters = {"crew": block, "inputs": {"text": "a"}, "idempotency_key": key(), "force_new": force_new}
    schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 6 * * *"), parameters=parameters)
    async with get_client() as client:
        flow_id = await client.create_flow(pc.run_deployed_crew)
        deployment = await client.create_deployment(flow_id, new_name(), schedules=[schedule])
        await client.request("POST", f"/deployments/{deployment}/schedule", json=DAY)
        of_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        planned = (await client.read_flow_runs(deployment_filter=of_deployment))[0]
    assert planned.auto_scheduled
    run = run_flow_async(pc.run_deployed_crew, flow_run=planned, parameters=planned.parameters)
    if force_new:
        assert (await cast("Any", run)).output == "a"
    else:
        with pytest.raises(pc.ConfigurationError, match="is the same for every time of the schedule"):
            await cast("Any", run)
    assert server.kickoffs == force_new


async def test_a_name_under_which_no_crew_is_stored():
    with pytest.raises(pc.ConfigurationError, match="No crew is stored under the name 'nobody'") as raised:
        await pc.arun_crew("nobody", {})
    assert "ObjectNotFound" not in "".join(traceback.format_exception(raised.value)), "one traceback is enough"
    with pytest.raises(pc.ConfigurationError, match="No crew is stored under the name 'nobody'"):
        await pc.run_deployed_crew(crew="nobody", inputs={"text": "a"})


async def test_a_flow_run_with_secrets_cannot_run_again(crew_server: CrewServerFactory):
    block = new_name()
    server = crew_server(script({"output": "x"}))
    await server.crew(secret_inputs=["pin"]).asave(block)
    inputs = {"pin": MASK, "city": "Lisbon", "book": TOO_LARGE}
    with pytest.raises(pc.ConfigurationError, match="inputs pin, book, which are secret or too large"):
        await pc.run_deployed_crew(crew=block, inputs=inputs)
    assert not server.requests


async def test_a_deployed_secret_input_names_a_block(crew_server: CrewServerFactory):
    block, secret = new_name(), new_name()
    server = crew_server(script({"output": "x"}, inputs=["pin", {"name": "key", "required": False}]))
    await server.crew(secret_inputs=["pin", "key"]).asave(block)
    await cast("Any", Secret)(value={"code": 4711}).save(secret)
    await pc.run_deployed_crew(crew=block, inputs={"pin": secret, "key": None})  # as a form sends an empty field
    assert server.runs[0].inputs == {"pin": '{"code":4711}'}
    with pytest.raises(pc.ConfigurationError, match="'pin' is secret") as raised:
        await pc.run_deployed_crew(crew=block, inputs={"pin": "hunter22"})
    assert "hunter22" not in str(raised.value)


# Results from anywhere


class Trip(BaseModel):
    city: str


@pytest.mark.parametrize("words", [1, 9000], ids=["small", "large"])
async def test_a_result_needs_no_crew_server(crew_server: CrewServerFactory, words: int):
    output = f'{{"city": "{{{{ "שלום" * {words} }}}}"}}'
    server, idempotency_key = crew_server(script({"output": output})), key()
    first = await pc.arun_crew(server.crew(), idempotency_key=idempotency_key)
    server.stop()
    again = await pc.aget_result(idempotency_key)
    assert again == first.model_copy(update={"raw": None, "tasks": again.tasks})
    typed = await pc.aget_result(idempotency_key, output_type=Trip)
    assert typed.data == Trip(city="שלום" * words)
    with pytest.raises(pc.OutputTypeError):
        await pc.aget_result(idempotency_key, output_type=Login)
    assert (await pc.arun_crew(server.crew(), idempotency_key=idempotency_key)).output == first.output


async def test_a_too_large_result_is_read_at_the_crew(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "LARGEST_RESULT", 8000)
    server, idempotency_key, block = crew_server(script({"output": "{{ 'x' * 9000 }}"})), key(), new_name()
    await pc.arun_crew(crew_of(server.crew()).called(block), idempotency_key=idempotency_key)
    with pytest.raises(pc.CrewError, match=r"Give the crew: crew=…"):
        await pc.aget_result(idempotency_key)
    await crew_server("echo").crew().asave(block)
    with pytest.raises(pc.CrewError, match=f"not stored with the URL {server.url}"):
        await pc.aget_result(idempotency_key)
    await server.crew().asave(block, overwrite=True)
    assert len((await pc.aget_result(idempotency_key)).output) == 9000
    assert len((await pc.aget_result(idempotency_key, crew=server.crew())).output) == 9000
    server.faults.add("status:forgotten")
    with pytest.raises(pc.CrewLostError):
        await pc.aget_result(idempotency_key)


async def test_a_key_means_its_completed_attempt(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(PICKY), key()
    run: Any = partial(pc.arun_crew, server.crew(), idempotency_key=idempotency_key)
    await run({"topic": "tea"})
    with pytest.raises(pc.CrewFailedError):
        await run({"topic": "bad"}, force_new=True)
    completed, failed = (run.id for run in server.runs)
    for name in (idempotency_key, completed):
        result = await pc.aget_result(name)
        assert result.kickoff_id == completed
        assert result.idempotency_key == idempotency_key
        assert result.output == "on tea"
    with pytest.raises(pc.CrewFailedError):
        await pc.aget_result(failed)


# What it costs


@pytest.mark.parametrize("idempotency_key", [None, "given"])
def test_a_run_costs_two_requests_to_the_prefect_server(
    crew_server: CrewServerFactory, proxy: Proxy, idempotency_key: str | None
):
    server = crew_server(slow(0.4))

    async def trip() -> list[str]:
        await pc.arun_crew(server.crew(), idempotency_key=idempotency_key and key())
        before = len(proxy.requests)
        await pc.arun_crew(server.crew(), idempotency_key=idempotency_key and key())
        return proxy.requests[before:]

    _, counted = call_in_flow(trip)
    # Those of Prefect's own tasks, and of its client.
    prefects = ("/logs", "/events", "csrf", "/concurrency_limits", "/admin")
    others = [request for request in counted if not any(part in request for part in prefects)]
    # SQLite makes the server answer 503 when two write at once; such a request is sent again.
    others = [one for one, before in zip(others, ["", *others], strict=False) if one != before]
    assert [one.split()[0] for one in others if "/artifacts" in one] == ["POST", "PATCH"], "it is made at the start"
    assert len(others) == 2, others


# Calls that cannot be made


async def test_a_crew_that_was_not_awaited_is_named():
    """In a notebook `DeployedCrew.load()` returns one."""
    with pytest.raises(pc.ConfigurationError, match=r"await DeployedCrew\.aload"):
        await pc.arun_crew(pc.DeployedCrew.aload("travel"), {"text": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"wait": 5}, {"crew": "no-such-crew"}], ids=["options", "crew"])
def test_no_frame_of_a_refused_call_shows_inputs(options: dict[str, Any]):
    crew = options.pop("crew", None) or pc.DeployedCrew(url="https://travel.test", token="t", secret_inputs=["pin"])  # type: ignore[arg-type]
    with pytest.raises(pc.ConfigurationError) as caught:
        pc.run_crew(crew, {"pin": "hunter" + "22"}, **options)
    assert "hunter22" not in locals_of(caught.value, but=__file__)


async def test_a_refused_start_hides_no_failure(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(FAILS), key()
    with pytest.raises(pc.CrewFailedError):
        await pc.arun_crew(server.crew(), idempotency_key=idempotency_key)
    await aput(new_attempt(idempotency_key, number=2, state=AttemptState.NOT_STARTED))
    with pytest.raises(pc.CrewFailedError):
        await pc.aget_result(idempotency_key)
