"""The tasks, alone in anyone's flow."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from prefect import flow, task, unmapped
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run

import prefect_crew as pc
from prefect_crew.blocks import crew_of
from prefect_crew.tasks import CrewTask, discover_inputs, kickoff_crew, resume_crew, stop_crew, wait_for_crew
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import acall_in_flow, call_in_flow
from support.frames import locals_of
from support.prefect_server import free_port
from support.proxy import Proxy
from support.scripts import slow
from support.seen import Seen

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

TEXT = {"text": "a"}


def unreachable() -> pc.DeployedCrew:
    return pc.DeployedCrew(url=f"http://127.0.0.1:{free_port()}", token="t")  # pyright: ignore[reportArgumentType]


# Calls


def test_a_task_calls_the_tasks(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()

    @task
    def run(text: str) -> str:
        return wait_for_crew(crew, kickoff_crew(crew, {"text": text})).output

    @task
    async def arun(text: str) -> str:
        return (await wait_for_crew(crew, await kickoff_crew(crew, {"text": text}))).output

    @flow
    async def trip() -> list[str]:
        return [run("a"), await arun("b")]

    assert asyncio.run(trip()) == ["a", "b"]


def test_tasks_are_submitted_and_mapped_with_futures(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()

    @task
    def returned(value: Any) -> Any:
        return value

    @flow
    def trip() -> list[str]:
        which, text = returned.submit(crew), returned.submit("z")
        first = wait_for_crew.submit(which, kickoff_crew.submit(which, {"text": text}))
        more = kickoff_crew.map(unmapped(crew), [{"text": text} for text in "abc"])
        results = [first, *wait_for_crew.map(unmapped(crew), more)]
        return [future.result().output for future in results]

    assert trip() == ["z", "a", "b", "c"]


# Names, tags, options


def test_task_runs_are_named_after_crew_and_run(crew_server: CrewServerFactory, seen: Seen):
    crew = crew_of(crew_server("echo").crew()).called("travel")

    async def trip() -> str:
        await discover_inputs(crew)
        kickoff_id = await kickoff_crew(crew, {"text": "a"}, name="research")
        await wait_for_crew(crew, kickoff_id)
        return kickoff_id

    flow_run_id, kickoff_id = call_in_flow(trip)
    runs = seen.task_runs(flow_run_id, count=3)
    assert {run["name"] for run in runs} == {"inputs travel", "kickoff research", f"wait travel {kickoff_id[:8]}"}
    assert not any(run["tags"] for run in runs), "for each tag Prefect looks for a concurrency limit"


def test_a_kickoff_is_named_after_its_first_input(crew_server: CrewServerFactory):
    called: Any = kickoff_crew.task_run_name
    crew = crew_of(crew_server("echo").crew(secret_inputs=["pin"])).called("travel")
    given: dict[str, Any] = {"crew": crew, "inputs": {"cities": ["x"], "pin": "4711", "city": " Lis\nbon "}}
    assert called(parameters=given) == "kickoff travel · Lis bon"
    assert called(parameters={**given, "idempotency_key": "lisbon"}) == "kickoff travel · lisbon"
    assert called(parameters={**given, "idempotency_key": "{scheduled_start}"}) == "kickoff travel · Lis bon"
    assert called(parameters={**given, "name": "write"}) == "kickoff write"
    assert called(parameters={**given, "inputs": {"a": "with 4711", "pin": "4711"}}) == "kickoff travel · with ********"
    assert called(parameters={**given, "crew": replace(crew, show="summary")}) == "kickoff travel"
    assert called(parameters={**given, "inputs": "no mapping"}) == "kickoff travel"
    assert len(called(parameters={"crew": "c" * 300})) == 200


def test_a_reattached_run_is_named_so(crew_server: CrewServerFactory, seen: Seen, proxy: Proxy):
    server, key = crew_server(slow(0.5)), f"run {uuid.uuid4()}"

    async def trip() -> None:
        await kickoff_crew(server.crew(), idempotency_key=key)
        await pc.arun_crew(server.crew(), name="same", idempotency_key=key)
        await pc.arun_crew(server.crew(), name="ended", idempotency_key=key)
        await pc.arun_crew(server.crew(), name="new")

    flow_run_id, _ = call_in_flow(trip)
    runs = seen.task_runs(flow_run_id, count=7)
    assert {"wait new", "wait same (reattached)", "wait ended (from record)"} <= {run["name"] for run in runs}
    assert not any(run["tags"] for run in runs), "for each tag Prefect asks its server for a slot"
    assert proxy.count("/concurrency_limits") == 0
    assert server.kickoffs == 2


async def test_equal_calls_in_one_flow_are_not_one(crew_server: CrewServerFactory):
    server = crew_server("echo")

    @flow(persist_result=True)
    async def trip() -> list[str]:
        return [await kickoff_crew(server.crew(), {"text": "a"}) for _ in range(2)]

    assert len({*await trip()}) == 2, "no cache takes one for the other"


async def test_a_call_takes_its_inputs_when_it_is_made(crew_server: CrewServerFactory):
    server = crew_server("echo")

    @flow
    async def trip() -> None:
        inputs, calls = dict[str, str](), list[Any]()
        for text in "abc":
            inputs["text"] = text
            calls.append(kickoff_crew(server.crew(), inputs))
        await asyncio.gather(*calls)

    await trip()
    assert sorted(run.inputs["text"] for run in server.runs) == ["a", "b", "c"]


# Retries


@pytest.mark.parametrize("retries", [2, 0])
async def test_an_unstarted_kickoff_is_retried_as_asked(retries: int):
    counts: list[int] = []

    def count(task: Any, task_run: Any, state: Any) -> None:
        counts.append(task_run.run_count)

    kickoff = kickoff_crew.with_options(retries=retries, retry_delay_seconds=0, on_running=[count])
    with pytest.raises(pc.CrewConnectionError):
        await acall_in_flow(lambda: kickoff(unreachable(), TEXT))
    assert len(counts) == retries + 1


async def test_a_users_condition_repeats_no_kickoff(crew_server: CrewServerFactory):
    server = crew_server("echo", faults=["kickoff:500"])
    eager = kickoff_crew.with_options(retries=3, retry_delay_seconds=0, retry_condition_fn=lambda *_: True)
    with pytest.raises(pc.KickoffUncertainError):
        await acall_in_flow(lambda: eager(server.crew(), TEXT))
    assert server.requests["kickoff"] == 1


async def test_a_question_for_inputs_is_repeated(crew_server: CrewServerFactory):
    server = crew_server("echo", faults=["inputs:500@1"])
    discover = discover_inputs.with_options(retry_delay_seconds=0)
    _, inputs = await acall_in_flow(lambda: discover(server.crew()))
    assert [item.name for item in inputs] == ["text"]


# Secret inputs


once = kickoff_crew.with_options(retries=0)
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "a call": once,
    "a call by keywords": lambda crew, given: once(crew=crew, inputs=given),
    "a future": lambda crew, given: once.submit(crew, given).result(),
    "a map": lambda crew, given: once.map(unmapped(crew), [given]).result(),
    "a map to one": lambda crew, given: once.map([crew], unmapped(given)).result(),
    "a deferred call": lambda crew, given: kickoff_crew.delay(crew, given),
    "a deferred map": lambda crew, given: kickoff_crew.map([crew], unmapped(given), deferred=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_frame_of_a_failed_task_shows_inputs(way: str):
    crew = replace(crew_of(unreachable()), secret_inputs=("text", "list"))

    @flow
    def trip() -> Any:
        try:
            WAYS[way](crew, {"text": "pass-1234", "list": [{"of": "pass-1234"}]})
        except pc.CrewError as error:
            return locals_of(error, but=__file__)

    shown = trip()
    assert "_crew" in shown
    assert not [line for line in shown.splitlines() if "pass-1234" in line]


async def test_no_frame_of_a_cancelled_task_shows_inputs():
    began = asyncio.ensure_future(kickoff_crew("some-block", {"text": "pass-1234"}))
    began.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await began
    assert "pass-1234" not in locals_of(caught.value, but=__file__)


# As tasks of Prefect: every keyword of Prefect's own calls, wherever they are called

TASKS: list[CrewTask] = [discover_inputs, kickoff_crew, wait_for_crew, resume_crew, stop_crew]
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


@task
def before() -> str:
    return "done"


@task
def failing() -> str:
    raise OSError("this one fails")


async def calls_of_all(crew: pc.DeployedCrew) -> list[Call]:
    """Return each task with the arguments of a call for a run that has ended, which /stop and /resume refuse."""
    kickoff_id = await kickoff_crew.acall(crew, TEXT)
    await wait_for_crew.acall(crew, kickoff_id)
    rest: dict[Any, tuple[Any, ...]] = {discover_inputs: (), kickoff_crew: (TEXT,)}
    more = {resume_crew: {"approve": True}}
    return [(one, (crew, *rest.get(one, (kickoff_id,))), more.get(one, {})) for one in TASKS]


def check(states: list[State[Any]]) -> None:
    """Each call came back as a state; answering for a person is the one that an ended run refuses."""
    for one, state in zip(TASKS, states, strict=True):
        assert isinstance(state, State), one.name
        assert state.is_failed() if one is resume_crew else state.is_completed(), (one.name, state)


async def test_an_async_flow_passes_each_keyword(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()

    @flow
    async def trip() -> list[State[Any]]:
        options: dict[str, Any] = {"return_state": True, "wait_for": [before.submit()]}
        return [await one(*given, **more, **options) for one, given, more in await calls_of_all(crew)]

    states = await trip()
    check(states)
    assert (await states[TASKS.index(wait_for_crew)].aresult()).output == "a"


@pytest.mark.parametrize("inside", [True, False], ids=["in a flow", "in a script"])
def test_sync_code_passes_each_keyword(crew_server: CrewServerFactory, inside: bool):
    calls = asyncio.run(calls_of_all(crew_server("echo").crew()))

    def trip() -> list[State[Any]]:
        options: dict[str, Any] = {"return_state": True, "wait_for": [before(return_state=True)]}
        return [one(*given, **more, **options) for one, given, more in calls]

    check(flow(trip)() if inside else trip())


async def test_submit_and_map_pass_each_keyword(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()

    @flow
    async def trip() -> list[list[State[Any]]]:
        first, columns = before.submit(), list[list[State[Any]]]()
        for one, (_, *rest), more in await calls_of_all(crew):
            options: dict[str, Any] = {**more, "wait_for": [first]}
            future: PrefectFuture[Any] = one.submit(crew, *rest, **options)
            future.wait()
            submitted = one.submit(crew, *rest, **options, return_state=True)
            mapped = one.map([crew, crew], *map(unmapped, rest), **options, return_state=True)
            columns.append([future.state, submitted, *mapped])
        return [[*row] for row in zip(*columns, strict=True)]

    rows = await trip()
    assert len(rows) == 4
    for states in rows:
        check(states)


async def test_tasks_do_nothing_after_a_failed_wait_for(crew_server: CrewServerFactory):
    server = crew_server("echo")
    calls = await calls_of_all(server.crew())
    before_it = dict(server.requests)

    @flow
    async def trip() -> list[tuple[str, str]]:
        options: dict[str, Any] = {"wait_for": [failing.submit()], "return_state": True}
        states = [await one(*given, **more, **options) for one, given, more in calls]
        return [(state.name, state.type.value) for state in states]

    assert await trip() == [("NotReady", "PENDING")] * len(TASKS)
    assert dict(server.requests) == before_it


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda crew: kickoff_crew(crew, {}, return_state=True), pc.InvalidInputsError),
        (lambda crew: wait_for_crew(crew, "r", wait=3, return_state=True), pc.ConfigurationError),
        (lambda crew: wait_for_crew("no-such-block", "r", return_state=True), pc.ConfigurationError),
    ],
)
async def test_an_error_of_a_call_is_in_its_state(
    call: Callable[[pc.DeployedCrew], Awaitable[State[Any]]], error: type[Exception], crew_server: CrewServerFactory
):
    crew = crew_server("echo").crew()

    @flow
    async def trip() -> Any:
        state = await call(crew)
        return state.is_failed(), await state.aresult(raise_on_failure=False)

    failed, raised = await trip()
    assert failed
    assert isinstance(raised, error)


# The functions themselves


async def test_a_tasks_function_is_called_alone(crew_server: CrewServerFactory):
    """As Prefect's page on tests tells people to."""
    server = crew_server("echo")
    crew = server.crew()
    alone = await kickoff_crew.fn(crew, TEXT)

    @flow(retries=1)
    async def trip() -> str:
        kickoff_id = await kickoff_crew.fn(crew, TEXT)
        if flow_run.run_count == 1:
            raise RuntimeError("after the kickoff")
        return str(kickoff_id)

    @task
    async def users_task() -> str:
        return str(await kickoff_crew.fn(crew, TEXT))

    inside, in_a_task = await trip(), await users_task()
    assert len({str(alone), inside, in_a_task}) == server.kickoffs == 3, "a retry finds its run"
    with pytest.raises(pc.NotWaitingError, match="does not wait for a person"):
        await resume_crew.fn(crew, inside, approve=True)


async def test_a_run_of_another_crew_is_not_waited_for(crew_server: CrewServerFactory):
    echo, travel = crew_server("echo").crew(), crew_server("echo").crew()
    kickoff_id = str(await kickoff_crew.fn(travel, TEXT))
    with pytest.raises(pc.ConfigurationError, match=f"Run {kickoff_id} is of crew .* not of crew"):
        await wait_for_crew.fn(echo, kickoff_id)
