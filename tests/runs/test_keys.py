"""Idempotency keys: what tells two runs apart, and what a retry finds again."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from prefect import flow, get_client, task, unmapped
from prefect.flow_engine import run_flow_async
from prefect.states import Scheduled

from prefect_crew import CrewStep, aget_result, arun_crew, arun_pipeline, kickoff_crew
from prefect_crew.artifacts.run import MarkdownArtifact
from prefect_crew.blocks import crew_of
from prefect_crew.exceptions import ConfigurationError, CrewError, NoResultError
from prefect_crew.runs import keys as keys_module
from prefect_crew.runs.keys import MAX_KEY, render_key
from prefect_crew.testing import CrewServerFactory

START = datetime(2026, 5, 1, 23, 30, 5, tzinfo=UTC)
TOKYO = timezone(timedelta(hours=9))


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
    assert render_key(template, START.astimezone(TOKYO)) == key, "in UTC"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        pytest.param("daily-{date}", r"'\{date\}' is not known", id="another name"),
        pytest.param("daily-{scheduled_start:YYYY-MM-DD}", "'YYYY-MM-DD' is not a format of strftime", id="moment.js"),
        pytest.param("daily-{scheduled_start:}", "is not a format", id="an empty format"),
        pytest.param("daily-{scheduled_start", "has no partner", id="not closed"),
        pytest.param("daily-scheduled_start}", "has no partner", id="not opened"),
        pytest.param("daily-{{ scheduled_start:%Y-%m-%d }}", "or is doubled", id="double braces"),
    ],
)
def test_a_bad_template_is_refused(template: str, says: str):
    with pytest.raises(ConfigurationError, match=says) as caught:
        render_key(template, START)
    assert "Use {scheduled_start:%Y-%m-%d}" in str(caught.value)


# Keys of real runs


@pytest.fixture
def server(crew_server: CrewServerFactory, prefect_api: object, instant_polling: None) -> Any:
    return crew_server("echo")


def keys(server: Any) -> list[str]:
    """Return the key of each run that was started, after a check that no key has two."""
    assert all(count == 1 for count in server.kickoffs_by_key.values())
    return list(server.kickoffs_by_key)


Start = Callable[..., Awaitable[str]]
Fail = Callable[[], None]


@pytest.fixture
def start(server: Any) -> Start:
    """Give a function that runs the crew and returns the kickoff id."""

    async def start(text: str = "a", **options: Any) -> str:
        return (await arun_crew(server.crew(), {"text": text}, **options)).kickoff_id

    return start


@pytest.fixture
def fail() -> Fail:
    """Give a function that raises the first time it is called."""
    left = [RuntimeError("the first time")]

    def fail() -> None:
        if left:
            raise left.pop()

    return fail


async def test_a_flow_retry_reattaches_to_each_call(server: Any, start: Start, fail: Fail):
    city = flow(start, name="city")

    @flow
    async def middle() -> str:
        return await city("Lisbon")

    @flow(retries=1)
    async def trips() -> list[str]:
        ids = [await start(text) for text in ("a", "b", "a")]
        ids += [await city("Lisbon"), await city("Lisbon"), await middle()]
        fail()
        return ids

    assert len(set(await trips())) == server.kickoffs == 6
    assert sorted(key.rpartition("/")[2] for key in keys(server)) == [*["1"] * 5, "2"]


async def test_a_retried_users_task_reattaches(server: Any, start: Start, fail: Fail):
    crew, research, city = server.crew(), task(start, name="research"), flow(start, name="city")

    @task(retries=1)
    async def plan() -> list[str]:
        ids = [*[await start() for _ in range(2)], *await asyncio.gather(research("b"), research("b"))]
        ids += [(await crew.atrigger({"text": "a"})).kickoff_id for _ in range(2)]
        ids.append(await city("Lisbon"))
        fail()
        return ids

    @flow
    async def trip() -> list[str]:
        return [*await plan(), await start()]

    assert len(set(await trip())) == server.kickoffs == 8


async def test_a_retried_kickoff_task_reattaches(server: Any, fail: Fail, monkeypatch: pytest.MonkeyPatch):
    async def show(*_: Any) -> None:
        fail()

    monkeypatch.setattr(MarkdownArtifact, "keep", show)  # after the kickoff
    kickoff = kickoff_crew.with_options(retries=1, retry_delay_seconds=0, retry_condition_fn=lambda *_: True)

    @flow
    async def trip() -> list[str]:
        return [await kickoff(server.crew(), {"text": "same"}) for _ in range(2)]

    assert len(set(await trip())) == server.kickoffs == 2


async def test_a_retried_task_without_a_flow_reattaches(server: Any, start: Start, fail: Fail):
    @task(retries=1)
    async def research() -> None:
        await start()
        fail()

    await research()
    assert server.kickoffs == 1
    await research()
    assert server.kickoffs == 2, "another run of the task starts another run"


def test_submitted_and_mapped_kickoffs_reattach(server: Any, fail: Fail):
    crew = server.crew()

    @flow(retries=1)
    def trips() -> list[str]:
        submitted = [kickoff_crew.submit(crew, {"text": "same"}) for _ in range(3)]
        mapped = kickoff_crew.map(unmapped(crew), [{"text": text} for text in "abc"])
        ids = [future.result() for future in [*submitted, *mapped]]
        fail()
        return ids

    assert len(set(trips())) == server.kickoffs == 6


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
    assert research[:9] == "research~"
    assert check[:6] == "check~"
    assert travel == "travel"
    assert other[:9] == "research~"
    assert other != research, "of two crews under one name each has keys of its own, in whatever order they come"
    assert all(key.endswith("/1") for key in keys(server))
    assert len(set(cut)) == 2
    assert all(len(key) <= MAX_KEY for key in keys(server))


async def test_a_long_path_of_subflows_is_cut_and_unique(server: Any, start: Start):
    @flow(name="a-subflow-with-a-name-of-fifty-characters-and-more", retries=1)
    async def down(left: int) -> None:
        await (down(left - 1) if left else start())

    for depth in (4, 8, 9):
        await down(depth)
    assert len({*keys(server)}) == server.kickoffs == 3
    assert all(len(key) <= MAX_KEY for key in keys(server))
    assert ["~" in key for key in keys(server)] == [False, True, True]


UNUSABLE: dict[str, tuple[Any, str, type[CrewError], str]] = {
    # the key, what a start says, and what a read of its result raises and says
    "empty": ("  ", "must not be empty", NoResultError, "No run has the key"),
    "long": ("k" * (MAX_KEY + 1), "has 501 characters, the limit is 500", NoResultError, "No run has the key"),
    "surrogate": ("half a \ud800", "half a character", ConfigurationError, "half a character"),
    "number": (7, "idempotency_key", ConfigurationError, "idempotency_key"),
}


@pytest.mark.parametrize("case", UNUSABLE)
async def test_a_key_that_cannot_be_used_starts_nothing(server: Any, case: str):
    crew, (key, message, error, answer) = server.crew(), UNUSABLE[case]
    calls: list[Callable[[], Any]] = [
        lambda: arun_crew(crew, {"text": "a"}, idempotency_key=key),
        lambda: crew.atrigger({"text": "a"}, idempotency_key=key),
        lambda: arun_pipeline([CrewStep("a", crew, {"text": "a"})], idempotency_key=key),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match=message):
            await call()
    assert server.kickoffs == 0
    with pytest.raises(error, match=answer) as raised:
        await aget_result(key)
    assert type(raised.value) is error


@pytest.mark.parametrize(
    ("where", "count"), [("alone", 1), ("in a flow", 1), ("with a key", 0), ("in a deployed flow", 0)]
)
async def test_runs_that_nobody_finds_again_are_announced(
    start: Start, where: str, count: int, caplog: pytest.LogCaptureFixture
):
    keys_module._announce_no_key.cache_clear()

    @flow
    async def trip() -> None:
        for text in ("a", "b"):
            await start(text, idempotency_key=str(uuid.uuid4()) if where == "with a key" else None)

    with caplog.at_level("INFO"):
        if where == "in a deployed flow":
            async with get_client() as client:
                deployment = await client.create_deployment(await client.create_flow(trip), name=str(uuid.uuid4()))
                await run_flow_async(trip, flow_run=await client.create_flow_run_from_deployment(deployment))
        else:
            await (trip.fn() if where == "alone" else trip())
    assert caplog.text.count("If the script is started again, it starts another run") == count


async def test_the_scheduled_time_survives_retries(server: Any, start: Start, fail: Fail):
    seen: list[str] = []

    @flow
    async def child() -> None:
        seen.append(await start(idempotency_key="daily-{scheduled_start:%Y-%m-%d}"))

    @flow(retries=1, retry_delay_seconds=1)
    async def daily() -> None:
        await child()
        fail()

    for day in (1, 2, 2):
        planned_for = Scheduled(scheduled_time=datetime(2026, 5, day, 6, tzinfo=UTC))
        async with get_client() as client:
            planned = await client.create_flow_run(daily, state=planned_for)
        await run_flow_async(daily, flow_run=planned, parameters={})
    assert keys(server) == ["daily-2026-05-01", "daily-2026-05-02"]
    assert len(seen) == 4, "the first of the three was retried"


@pytest.mark.parametrize("how", ["called", "submitted"])
async def test_a_flow_run_keeps_its_numbers(server: Any, start: Start, monkeypatch: pytest.MonkeyPatch, how: str):
    monkeypatch.setattr(keys_module, "_KEPT", 2)
    begun, others_done = asyncio.Event(), asyncio.Event()

    async def begin() -> None:
        if how == "called":
            await start()
        else:
            await asyncio.to_thread(kickoff_crew.submit(server.crew(), {"text": "a"}).wait)

    @flow
    async def long() -> None:
        await begin()
        begun.set()
        await others_done.wait()
        await begin()

    other = flow(begin, name="other")
    running = asyncio.create_task(long())
    await begun.wait()
    for _ in range(3):
        await other()
    others_done.set()
    await running
    assert len(keys(server)) == 5, "the long one has started two runs"
    assert len(keys_module._flow_runs) <= 3, "the others are forgotten"


async def test_keys_that_look_the_same_are_one(server: Any):
    number = uuid.uuid4()
    run = await server.crew().atrigger({"text": "a"}, idempotency_key=f"café {number}")
    await run.await_for_completion()
    blanks, accent = (f"café {number} ", f"\n\tcafé {number}\u00a0"), f"cafe\u0301 {number}"
    for key in (*blanks, accent):
        assert (await server.crew().atrigger({"text": "a"}, idempotency_key=key)).kickoff_id == run.kickoff_id
        assert (await aget_result(key)).kickoff_id == run.kickoff_id


async def test_a_slash_in_a_step_name_is_no_subflow(server: Any, start: Start):
    @flow
    async def child() -> None:
        await start(name="b")

    @flow
    async def trip() -> None:
        await child()
        await start(name="child-0/b")
        await start(name="child-0%2Fb")

    await trip()
    assert server.kickoffs == 3
    parts = [[part.partition("~")[0] for part in key.split("/")[1:-2]] for key in keys(server)]
    assert sorted(parts) == [["child-0", "b"], ["child-0%252Fb"], ["child-0%2Fb"]]
