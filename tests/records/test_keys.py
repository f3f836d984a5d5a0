"""Idempotency keys: what tells two runs apart, and what a retry finds again."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow, get_client, task, unmapped
from prefect.flow_engine import run_flow_async
from prefect.flows import Flow
from prefect.runtime import flow_run
from prefect.states import Scheduled

from prefect_crew import CrewStep, aget_result, arun_crew, arun_pipeline, kickoff_crew
from prefect_crew.artifacts.run import MarkdownArtifact
from prefect_crew.blocks import crew_of
from prefect_crew.exceptions import ConfigurationError, CrewError, RunNotFoundError
from prefect_crew.records import keys as keys_module
from prefect_crew.records.keys import render_key
from prefect_crew.records.model import MAX_KEY
from prefect_crew.testing import CrewServerFactory

START = datetime(2026, 5, 1, 23, 30, 5, tzinfo=UTC)


# Templates


@pytest.mark.parametrize(
    ("template", "key"),
    [
        ("daily", "daily"),
        ("daily-{scheduled_start:%Y-%m-%d}", "daily-2026-05-01"),
        ("{scheduled_start:%Y-%m-%d}", "2026-05-01"),
        ("{ scheduled_start:%H:%M } and {scheduled_start:%d.%m.}", "23:30 and 01.05."),
        ("at {scheduled_start}", "at 2026-05-01T23:30:05"),
        ("(not a placeholder) %Y", "(not a placeholder) %Y"),
    ],
)
def test_a_template_over_the_scheduled_time(template: str, key: str):
    assert render_key(template, START) == key


def test_a_template_is_in_utc():
    tokyo = START.astimezone(timezone(timedelta(hours=9)))
    assert render_key("{scheduled_start:%Y-%m-%d}", tokyo) == "2026-05-01"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        pytest.param("daily-{date}", r"'\{date\}' is not known", id="another name"),
        pytest.param("daily-{scheduled_start | date}", "is not known", id="a filter"),
        pytest.param("daily-{scheduled_start:YYYY-MM-DD}", "'YYYY-MM-DD' is not a format of strftime", id="moment.js"),
        pytest.param("daily-{scheduled_start:}", "is not a format", id="an empty format"),
        pytest.param("daily-{scheduled_start", "has no partner", id="not closed"),
        pytest.param("daily-scheduled_start}", "has no partner", id="not opened"),
        pytest.param("daily-{{ scheduled_start:%Y-%m-%d }}", "or is doubled", id="double braces"),
        pytest.param("daily-{}", "is not known", id="nothing"),
    ],
)
def test_a_bad_template_is_refused(template: str, says: str):
    with pytest.raises(ConfigurationError, match=says) as caught:
        render_key(template, START)
    assert "Use {scheduled_start:%Y-%m-%d}" in str(caught.value)


# Keys of real runs


@pytest.fixture
def server(crew_server: CrewServerFactory, prefect_api: object, instant_polling: None) -> Any:
    """A crew server; its `kickoffs_by_key` says what was started."""
    return crew_server("echo")


def keys(server: Any) -> list[str]:
    assert all(count == 1 for count in server.kickoffs_by_key.values())
    return list(server.kickoffs_by_key)


def fails_once() -> Callable[[], None]:
    """Return a function that raises the first time it is called."""
    left = [RuntimeError("the first time")]

    def fail() -> None:
        if left:
            raise left.pop()

    return fail


async def test_a_flow_retry_reattaches_to_each_call(server: Any):
    crew, fail = server.crew(), fails_once()

    @flow(retries=1)
    async def trips() -> list[str]:
        results = [await arun_crew(crew, {"text": text}) for text in ("a", "b", "a")]
        fail()
        return [result.kickoff_id for result in results]

    ids = await trips()
    assert server.kickoffs == 3
    assert len(set(ids)) == 3
    assert sorted(key.rpartition("/")[2] for key in keys(server)) == ["1", "1", "2"]


async def test_a_retried_users_task_reattaches(server: Any):
    crew, fail = server.crew(), fails_once()

    async def start(text: str) -> str:
        return (await arun_crew(crew, {"text": text})).kickoff_id

    research = task(start, name="research")

    @task(retries=1)
    async def plan() -> list[str]:
        found = [*[await start("same") for _ in range(2)], *await asyncio.gather(research("a"), research("a"))]
        found += [(await crew.atrigger({"text": "same"})).kickoff_id for _ in range(2)]
        fail()
        return found

    @flow
    async def trip() -> list[str]:
        return [*await plan(), await start("same")]

    assert len(set(await trip())) == 7
    assert server.kickoffs == 7


async def test_a_retried_kickoff_task_reattaches(server: Any, monkeypatch: pytest.MonkeyPatch):
    crew, fail = server.crew(), fails_once()

    async def show(*_: Any) -> None:
        fail()

    monkeypatch.setattr(MarkdownArtifact, "keep", show)  # after the kickoff
    kickoff = kickoff_crew.with_options(retries=1, retry_delay_seconds=0, retry_condition_fn=lambda *_: True)

    @flow
    async def trip() -> list[str]:
        return [await kickoff(crew, {"text": "same"}) for _ in range(2)]

    assert len(set(await trip())) == 2
    assert server.kickoffs == 2


async def test_a_retried_task_without_a_flow_reattaches(server: Any):
    crew, fail = server.crew(), fails_once()

    @task(retries=1)
    async def research() -> str:
        result = await arun_crew(crew, {"text": "a"})
        fail()
        return result.output

    assert await research() == "a"
    assert server.kickoffs == 1
    await research()
    assert server.kickoffs == 2, "another run of the task starts another run"


def test_submitted_and_mapped_kickoffs_reattach(server: Any):
    crew, fail = server.crew(), fails_once()

    @flow(retries=1)
    def trips() -> list[str]:
        submitted = [kickoff_crew.submit(crew, {"text": "same"}) for _ in range(3)]
        mapped = kickoff_crew.map(unmapped(crew), [{"text": text} for text in "abc"])
        ids = [future.result() for future in [*submitted, *mapped]]
        fail()
        return ids

    assert len(set(trips())) == 6
    assert server.kickoffs == 6


async def test_a_subflow_of_a_retried_flow_reattaches(server: Any):
    crew, fail = server.crew(), fails_once()
    subflow_runs: set[str] = set()

    @flow
    async def city(name: str) -> str:
        subflow_runs.add(flow_run.id)
        return (await arun_crew(crew, {"text": name})).kickoff_id

    @flow
    async def middle(name: str) -> str:
        return await city(name)

    @flow(retries=1)
    async def trips() -> list[str]:
        ids = [await city("Lisbon"), await city("Lisbon"), await middle("Lisbon")]
        fail()
        return ids

    ids = await trips()
    assert server.kickoffs == 3
    assert len(set(ids)) == 3
    assert len(subflow_runs) >= 3


async def test_a_subflow_of_a_retried_task_reattaches(server: Any):
    crew, fail = server.crew(), fails_once()

    @flow
    async def city() -> str:
        return (await arun_crew(crew, {"text": "Lisbon"})).output

    @task(retries=1)
    async def research() -> str:
        output = await city()
        fail()
        return output

    @flow
    async def trip() -> str:
        return await research()

    assert await trip() == "Lisbon"
    assert server.kickoffs == 1


async def test_a_long_step_name_is_cut_and_unique(server: Any):
    crew, long = server.crew(), "n" * 1000

    @flow
    async def trip() -> None:
        for name in ("research", "check", f"{long}a", f"{long}b"):
            await arun_crew(crew, {"text": "a"}, name=name)
        await arun_crew(crew_of(crew).called("travel"), {"text": "a"})
        await arun_crew(crew_of(crew).called("travel"), {"text": "a"}, name="research")

    await trip()
    research, check, *cut, travel, other = [key.split("/")[1] for key in keys(server)]
    assert (research[:9], check[:6], travel, other[:9]) == ("research~", "check~", "travel", "research~")
    assert other != research, "of two crews under one name each has keys of its own, in whatever order they come"
    assert all(key.endswith("/1") for key in keys(server))
    assert len(set(cut)) == 2
    assert all(len(key) <= MAX_KEY for key in keys(server))


async def test_a_long_path_of_subflows_is_cut_and_unique(server: Any):
    crew = server.crew()

    @flow(name="a-subflow-with-a-name-of-fifty-characters-and-more", retries=1)
    async def down(left: int, text: str = "a") -> None:
        if left:
            await down(left - 1, text)
            return
        await arun_crew(crew, {"text": text})

    for depth in (4, 8, 9):
        await down(depth)
    assert len({*keys(server)}) == server.kickoffs == 3
    assert all(len(key) <= MAX_KEY for key in keys(server))
    assert ["~" in key for key in keys(server)] == [False, True, True]


async def test_a_plain_call_starts_a_new_run_each_time(server: Any):
    for _ in range(2):
        await arun_crew(server.crew(), {"text": "a"})
        await server.crew().atrigger({"text": "a"})
    assert len(keys(server)) == 4


UNUSABLE: dict[str, tuple[Any, str, type[CrewError], str]] = {
    # the key, what a start says, and what a read of its result raises and says
    "empty": ("  ", "must not be empty", RunNotFoundError, "No run has the key"),
    "long": ("k" * (MAX_KEY + 1), "has 501 characters, the limit is 500", RunNotFoundError, "No run has the key"),
    "surrogate": ("half a \ud800", "half a character", ConfigurationError, "half a character"),
    "number": (7, "idempotency_key", ConfigurationError, "idempotency_key"),
}


@pytest.mark.parametrize("call", ["run_crew", "trigger", "pipeline"])
@pytest.mark.parametrize("case", UNUSABLE)
async def test_a_key_that_cannot_be_used_starts_nothing(server: Any, call: str, case: str):
    crew, (idempotency_key, says, *_) = server.crew(), UNUSABLE[case]
    calls: dict[str, Callable[[], Any]] = {
        "run_crew": lambda: arun_crew(crew, {"text": "a"}, idempotency_key=idempotency_key),
        "trigger": lambda: crew.atrigger({"text": "a"}, idempotency_key=idempotency_key),
        "pipeline": lambda: arun_pipeline([CrewStep("a", crew, {"text": "a"})], idempotency_key=idempotency_key),
    }
    with pytest.raises(ConfigurationError, match=says):
        await calls[call]()
    assert server.kickoffs == 0


@pytest.mark.parametrize("case", UNUSABLE)
async def test_a_key_that_cannot_be_used_has_no_result(prefect_api: object, case: str):
    idempotency_key, _, error, says = UNUSABLE[case]
    with pytest.raises(error, match=says) as raised:
        await aget_result(idempotency_key)
    assert type(raised.value) is error


@pytest.mark.parametrize("where", ["alone", "in a flow", "with a key", "in a deployed flow"])
async def test_runs_that_nobody_finds_again_are_announced(server: Any, where: str, caplog: pytest.LogCaptureFixture):
    crew = server.crew()
    keys_module._announce_no_key.cache_clear()

    @flow
    async def trip() -> None:
        for text in ("a", "b"):
            key = str(uuid.uuid4()) if where == "with a key" else None
            await arun_crew(crew, {"text": text}, idempotency_key=key)

    with caplog.at_level("INFO"):
        if where == "in a deployed flow":
            async with get_client() as client:
                deployment = await client.create_deployment(await client.create_flow(trip), name=str(uuid.uuid4()))
                await run_flow_async(trip, flow_run=await client.create_flow_run_from_deployment(deployment))
        elif where == "alone":
            await trip.fn()
        else:
            await trip()
    expected = 1 if where in ("alone", "in a flow") else 0
    assert caplog.text.count("If the script is started again, it starts another run") == expected


async def scheduled(function: Flow[Any, Any], at: datetime) -> uuid.UUID:
    """Make a flow run that was scheduled for some time."""
    async with get_client() as client:
        return (await client.create_flow_run(function, state=Scheduled(scheduled_time=at))).id


async def test_the_scheduled_time_survives_retries(server: Any):
    crew, fail = server.crew(), fails_once()
    seen: list[str] = []

    @flow
    async def child() -> None:
        seen.append((await arun_crew(crew, {"text": "a"}, idempotency_key="daily-{scheduled_start:%Y-%m-%d}")).output)

    @flow(retries=1, retry_delay_seconds=1)
    async def daily() -> None:
        await child()
        fail()

    for day in (1, 2, 2):
        async with get_client() as client:
            planned = await client.read_flow_run(await scheduled(daily, datetime(2026, 5, day, 6, tzinfo=UTC)))
        await run_flow_async(daily, flow_run=planned, parameters={})
    assert keys(server) == ["daily-2026-05-01", "daily-2026-05-02"]
    assert len(seen) == 4, "the first of the three was retried"


async def test_numbers_of_old_flow_runs_are_forgotten(server: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys_module, "_KEPT", 2)
    crew = server.crew()

    @flow
    async def trip() -> None:
        await arun_crew(crew, {"text": "a"})

    for _ in range(4):
        await trip()
    assert len(keys_module._flow_runs) <= 2


@pytest.mark.parametrize("how", ["called", "submitted"])
async def test_a_flow_run_keeps_its_numbers(server: Any, monkeypatch: pytest.MonkeyPatch, how: str):
    monkeypatch.setattr(keys_module, "_KEPT", 2)
    crew = server.crew()
    begun, others_done = asyncio.Event(), asyncio.Event()

    async def start() -> None:
        if how == "called":
            await arun_crew(crew, {"text": "a"})
        else:
            await asyncio.to_thread(kickoff_crew.submit(crew, {"text": "a"}).wait)

    @flow
    async def long() -> None:
        await start()
        begun.set()
        await others_done.wait()
        await start()

    @flow
    async def other() -> None:
        await start()

    running = asyncio.create_task(long())
    await begun.wait()
    for _ in range(3):
        await other()
    others_done.set()
    await running
    assert len(keys(server)) == 5, "the long one has started two runs"


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("café {} ", id="a blank after it"),
        pytest.param("\n\tcafé {}\u00a0", id="other blanks around it"),
        pytest.param("cafe\u0301 {}", id="another way to write the accent"),
    ],
)
async def test_keys_that_look_the_same_are_one(server: Any, other: str):
    number = uuid.uuid4()
    mine, theirs = f"café {number}", other.format(number)
    first = await server.crew().atrigger({"text": "a"}, idempotency_key=mine)
    second = await server.crew().atrigger({"text": "a"}, idempotency_key=theirs)
    assert first.kickoff_id == second.kickoff_id
    await second.await_for_completion()
    assert (await aget_result(theirs)).kickoff_id == first.kickoff_id
    assert server.kickoffs == 1


async def test_a_slash_in_a_step_name_is_no_subflow(server: Any):
    crew = server.crew()

    @flow
    async def child() -> None:
        await arun_crew(crew, {"text": "a"}, name="b")

    @flow
    async def trip() -> None:
        await child()
        await arun_crew(crew, {"text": "a"}, name="child-0/b")
        await arun_crew(crew, {"text": "a"}, name="child-0%2Fb")

    await trip()
    assert server.kickoffs == 3
    parts = [[part.partition("~")[0] for part in key.split("/")[1:-2]] for key in keys(server)]
    assert sorted(parts) == [["child-0", "b"], ["child-0%252Fb"], ["child-0%2Fb"]]


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_keys_of_different_parts_differ(one: list[str], other: list[str]):
    first, second = ("/".join(map(keys_module.escape_name, names)) for names in (one, other))
    assert (first == second) == (one == other)
