"""The tasks as tasks of Prefect: every keyword of Prefect's own calls, wherever they are called."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from prefect import Task, flow, task, unmapped
from prefect.cache_policies import INPUTS
from prefect.client.schemas.objects import State
from prefect.filesystems import LocalFileSystem
from prefect.futures import PrefectFuture

from prefect_crew import (
    ConfigurationError,
    CrewFailedError,
    DeployedCrew,
    InvalidInputsError,
    discover_inputs,
    kickoff_crew,
    resume_crew,
    stop_crew,
    wait_for_crew,
)
from prefect_crew.tasks import CrewTask
from prefect_crew.testing import CrewServerFactory
from support.scripts import FAILS

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

TASKS: dict[str, CrewTask[Any, Any]] = {
    "discover_inputs": discover_inputs,
    "kickoff_crew": kickoff_crew,
    "wait_for_crew": wait_for_crew,
    "resume_crew": resume_crew,
    "stop_crew": stop_crew,
}
CALLS = (Task.__call__, Task.submit, Task.map)
TEXT = {"text": "a"}


def keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name for one in parameters if one.kind is one.KEYWORD_ONLY or one.default is not one.empty}


def test_these_are_all_the_keywords_of_prefects_calls():
    assert keywords(Task.__call__) == {"return_state", "wait_for"}
    assert set().union(*map(keywords, CALLS)) == {"return_state", "wait_for", "deferred"}


@task
def before() -> str:
    return "done"


@task
def failing() -> str:
    raise OSError("this one fails")


async def ids_for_all(crew: DeployedCrew) -> dict[str, tuple[Any, ...]]:
    """Return what each of the tasks is called with: a run that has ended, which /stop and /resume refuse."""
    kickoff_id = await kickoff_crew.acall(crew, TEXT)
    await wait_for_crew.acall(crew, kickoff_id)
    return {
        "discover_inputs": (crew,),
        "kickoff_crew": (crew, TEXT),
        "wait_for_crew": (crew, kickoff_id),
        "resume_crew": (crew, kickoff_id),
        "stop_crew": (crew, kickoff_id),
    }


def further(name: str) -> dict[str, Any]:
    return {"approve": True} if name == "resume_crew" else {}


def check(name: str, state: Any) -> None:
    """Each comes back as a state; answering for a person is the one that an ended run refuses."""
    assert isinstance(state, State), name
    assert state.is_failed() if name == "resume_crew" else state.is_completed(), (name, state)


async def test_an_async_flow_gives_each_keyword_to_each_task(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()

    @flow
    async def trip() -> dict[str, State[Any]]:
        first = before.submit()
        given = await ids_for_all(crew)
        return {
            name: await one(*given[name], **further(name), return_state=True, wait_for=[first])
            for name, one in TASKS.items()
        }

    states = await trip()
    for name in TASKS:
        check(name, states[name])
    assert (await states["wait_for_crew"].aresult()).output == "a"


def test_a_sync_flow_gives_each_keyword_to_each_task(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()
    given = asyncio.run(ids_for_all(crew))

    @flow
    def trip() -> dict[str, State[Any]]:
        first = before.submit()
        return {
            name: one(*given[name], **further(name), return_state=True, wait_for=[first]) for name, one in TASKS.items()
        }

    for name, state in trip().items():
        check(name, state)


def test_a_script_gives_each_keyword_to_each_task(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()
    given = asyncio.run(ids_for_all(crew))
    done = before(return_state=True)

    async def asynchronously() -> dict[str, Any]:
        return {
            name: await one(*given[name], **further(name), return_state=True, wait_for=[done])
            for name, one in TASKS.items()
        }

    for name, one in TASKS.items():
        check(name, one(*given[name], **further(name), return_state=True, wait_for=[done]))
    for name, state in asyncio.run(asynchronously()).items():
        check(name, state)


async def test_each_is_submitted_and_mapped_with_each_keyword(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()

    @flow
    async def trip() -> list[tuple[str, Any]]:
        first = before.submit()
        given = await ids_for_all(crew)
        states: list[tuple[str, Any]] = []
        for name, one in TASKS.items():
            future: PrefectFuture[Any] = one.submit(*given[name], **further(name), wait_for=[first])
            future.wait()
            submitted: State[Any] = one.submit(*given[name], **further(name), return_state=True, wait_for=[first])
            crew_, *rest = given[name]
            mapped: list[State[Any]] = one.map(
                [crew_, crew_], *map(unmapped, rest), **further(name), return_state=True, wait_for=[first]
            )
            states += [(name, state) for state in (future.state, submitted, *mapped)]
        return states

    states = await trip()
    assert len(states) == 4 * len(TASKS)
    for name, state in states:
        check(name, state)


async def test_each_is_deferred_to_a_task_worker(crew_server: CrewServerFactory):
    name = f"deferred-{uuid.uuid4().hex[:8]}"
    server = crew_server("echo")
    await server.crew().asave(name)
    given = await ids_for_all(server.crew())
    before_it = dict(server.requests)
    for task_name, one in TASKS.items():
        rest = [unmapped(value) for value in given[task_name][1:]]
        for future in one.map([name], *rest, **further(task_name), deferred=True):
            state = future.state
            assert (state.name, state.state_details.deferred) == ("Scheduled", True)
    assert dict(server.requests) == before_it


@pytest.mark.parametrize("name", TASKS)
async def test_each_waits_for_what_it_is_told_to_and_does_nothing_after_a_failure(
    name: str, crew_server: CrewServerFactory
):
    server = crew_server("echo")
    given = await ids_for_all(server.crew())
    before_it = dict(server.requests)

    @flow
    async def trip() -> Any:
        failed = failing.submit()
        state = await TASKS[name](*given[name], **further(name), wait_for=[failed], return_state=True)
        return state.name, state.type.value

    assert await trip() == ("NotReady", "PENDING")
    assert dict(server.requests) == before_it


async def test_a_wait_takes_the_futures_of_a_crew_and_of_a_run(crew_server: CrewServerFactory):
    crew = crew_server("echo").crew()

    @task
    def chosen() -> DeployedCrew:
        return crew

    @flow
    async def trip() -> Any:
        which = chosen.submit()
        return (await wait_for_crew(which, kickoff_crew.submit(which, TEXT))).output

    assert await trip() == "a"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda crew: kickoff_crew(crew, {}, return_state=True), InvalidInputsError),
        (lambda crew: wait_for_crew(crew, "r", wait=3, return_state=True), ConfigurationError),
        (lambda crew: wait_for_crew("no-such-block", "r", return_state=True), ConfigurationError),
    ],
)
async def test_what_is_wrong_with_a_call_is_in_its_state(
    call: Callable[[DeployedCrew], Awaitable[State[Any]]], error: type[Exception], crew_server: CrewServerFactory
):
    crew = crew_server("echo").crew()

    @flow
    async def trip() -> Any:
        state = await call(crew)
        return state.is_failed(), await state.aresult(raise_on_failure=False)

    failed, raised = await trip()
    assert failed
    assert isinstance(raised, error)


async def test_a_failed_crew_is_a_failed_state(crew_server: CrewServerFactory):
    crew = crew_server(FAILS).crew()

    @flow
    async def trip() -> Any:
        state = await wait_for_crew(crew, await kickoff_crew(crew), return_state=True)
        return await state.aresult(raise_on_failure=False)

    assert isinstance(await trip(), CrewFailedError)


OPTIONS: dict[str, Any] = {
    "name": "mine",
    "description": "mine",
    "tags": ["mine"],
    "cache_policy": INPUTS,
    "cache_key_fn": lambda context, parameters: "key",
    "task_run_name": "mine",
    "cache_expiration": timedelta(seconds=1),
    "retries": 7,
    "retry_delay_seconds": 5,
    "retry_jitter_factor": 0.5,
    "persist_result": True,
    "result_storage": None,
    "result_serializer": "json",
    "result_storage_key": "mine",
    "cache_result_in_memory": False,
    "timeout_seconds": 5,
    "log_prints": True,
    "refresh_cache": True,
    "on_completion": [lambda task, run, state: None],
    "on_failure": [lambda task, run, state: None],
    "on_running": [lambda task, run, state: None],
    "retry_condition_fn": lambda task, run, state: True,
    "viz_return_value": "seen",
    "asset_deps": [],
}


def test_each_task_takes_each_option_and_stays_one_of_ours(tmp_path: Any):
    options = {**OPTIONS, "result_storage": LocalFileSystem(basepath=str(tmp_path))}
    assert set(options) == keywords(Task.with_options)
    for one in TASKS.values():
        for option, value in options.items():
            if option == "result_storage":
                value.save("mine", overwrite=True, _sync=True)
            # Prefect refuses a key function beside a policy of its own; ours have one.
            more = {"cache_policy": None} if option == "cache_key_fn" else {}
            copy = one.with_options(**{option: value, **more})
            assert type(copy) is type(one)
            assert copy.fn is one.fn
            plain = Task(fn=one.fn).with_options(**{option: value})
            known = {"retry_condition_fn", "cache_key_fn", "cache_policy", "result_storage"}
            for attribute, theirs in vars(plain).items():
                if attribute.removesuffix("_hooks") == option and option not in known:
                    assert getattr(copy, attribute) == theirs, (one.name, option)
