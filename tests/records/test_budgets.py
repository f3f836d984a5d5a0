"""Budgets over a real Prefect server: what is counted, when a start is refused, and what is given back."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections import Counter
from datetime import timedelta
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.settings import PREFECT_API_URL

import prefect_crew as pc
from prefect_crew.batches.ledger import Ledger
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import TokenUsage
from prefect_crew.prices import Price
from prefect_crew.records import budgets as counters
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.prune import prune
from prefect_crew.records.resolve import resolve_never_started
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import kickoff
from prefect_crew.runs.run import close_run
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches
from support.prefect_server import PrefectServer
from support.records import new_record, put, record_of
from support.scripts import Held, script
from support.waiting import until
from support.ways import WAYS

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


def used(tokens: int, seconds: float = 0.0) -> str:
    """Return a crew that says how many tokens it used."""
    usage = {"total_tokens": tokens, "prompt_tokens": tokens - 10, "completion_tokens": 10}
    return script({"output": "done", "seconds": seconds}, usage=usage)


@pytest.fixture
def name() -> str:
    return f"b-{uuid.uuid4().hex[:8]}"


async def limits_of(name: str) -> list[GlobalConcurrencyLimitResponse]:
    found: list[GlobalConcurrencyLimitResponse] = []
    async with get_client() as client:
        while page := await client.read_global_concurrency_limits(limit=200, offset=len(found)):
            found += page
    return [limit for limit in found if f".{name}." in limit.name]


async def counted(name: str) -> int:
    return sum(limit.active_slots for limit in await limits_of(name))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this process asks the Prefect server, without logs, which Prefect sends by the clock.

    A request that is repeated since the server was busy (503: SQLite takes one writer at a time) is there once.
    """
    found: list[str] = []
    send = httpx.AsyncClient.send

    async def note(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        response = await send(self, request, **options)
        is_taken = response.status_code != httpx.codes.SERVICE_UNAVAILABLE
        if is_taken and str(request.url).startswith(PREFECT_API_URL.value()):
            path = re.sub("[0-9a-f]{8}-[0-9a-f-]{27}", "ID", request.url.path.removeprefix("/api"))
            if path != "/logs/":
                found.append(f"{request.method} {path}")
        return response

    monkeypatch.setattr(httpx.AsyncClient, "send", note)
    return found


# What is refused


async def test_a_start_beyond_the_budget_is_refused(crew_server: CrewServerFactory, name: str):
    server = crew_server("echo")
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=2, per="day", name=name)])
    for number in range(2):
        await pc.arun_crew(crew, {"text": f"{number}"}, idempotency_key=f"{name}-{number}")
    with pytest.raises(pc.BudgetExceededError, match="no room for another run") as raised:
        await pc.arun_crew(crew, {"text": "2"}, idempotency_key=f"{name}-2")
    error = raised.value
    assert (error.budget, error.measure, error.used, error.limit, error.estimate) == (name, "kickoffs", 2, 2, 1)
    assert error.resets_at is not None
    assert f"{error.resets_at:%Y-%m-%d %H:%M} UTC" in str(error)
    assert (server.kickoffs, await counted(name)) == (2, 2)
    assert await PrefectRecords().attempts(f"{name}-2") == [], "no refusal takes up a number of its key"


@pytest.mark.parametrize("inside", [True, False], ids=["in a flow", "in a script"])
@pytest.mark.parametrize("way", ["run_crew", "tasks", "trigger", "pipeline"])
async def test_a_budget_holds_for_every_way_to_start(crew_server: CrewServerFactory, name: str, way: str, inside: bool):
    server = crew_server("echo")
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=1, per="month", name=name)])

    async def twice() -> None:
        for text in "ab":
            await WAYS[way](crew, text)

    with pytest.raises((pc.BudgetExceededError, pc.PipelineFailedError)) as raised:
        await (flow(twice)() if inside else twice())
    errors: dict[str, Exception] = getattr(raised.value, "errors", {"only": raised.value})
    assert isinstance(errors["only"], pc.BudgetExceededError)
    assert server.kickoffs == 1
    assert await counted(name) == 1


async def test_budgets_of_flow_pipeline_and_block_all_hold(crew_server: CrewServerFactory, name: str):
    server = crew_server("echo")
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=4, per="day", name=name)])

    @flow(name=f"flow-{name}")
    async def each() -> None:
        for text in "ab":
            await pc.arun_crew(crew, {"text": text}, budgets=[pc.Budget(max_kickoffs=1)])

    with pytest.raises(
        pc.BudgetExceededError, match=f"Budget 'flow-{name}' .*Raise max_kickoffs and make the same call again"
    ):
        await each()
    assert await counted(name) == 1, "the estimate of the refused one was taken off the block's budget"
    steps = [pc.CrewStep(step, crew, {"text": step}) for step in "abc"]
    with pytest.raises(pc.PipelineFailedError) as raised:
        await pc.arun_pipeline(steps, name=f"pipe-{name}", budgets=[pc.Budget(max_kickoffs=2)])
    assert [getattr(error, "budget", None) for error in raised.value.errors.values()] == [f"pipe-{name}"]
    assert await counted(name) == 3


async def test_a_budget_holds_across_flow_retries(crew_server: CrewServerFactory, name: str):
    server, attempts = crew_server("echo"), 0
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=1, per="day", name=name)])

    @flow(retries=2)
    async def fails_once() -> str:
        nonlocal attempts
        attempts += 1
        result = await pc.arun_crew(crew, {"text": "a"})
        if attempts == 1:
            raise RuntimeError("after the run")
        # The next start of this attempt has no room.
        with pytest.raises(pc.BudgetExceededError):
            await pc.arun_crew(crew, {"text": "b"})
        return result.output

    assert await fails_once()
    assert (server.kickoffs, await counted(name), attempts) == (1, 1, 2)


# What is given back


async def test_a_run_that_did_not_start_is_given_back(crew_server: CrewServerFactory, name: str):
    server = crew_server("echo", faults=["kickoff:422-before-accept@1"])
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=5, per="day", name=name)])
    with pytest.raises(pc.InvalidInputsError):
        await pc.arun_crew(crew, {"wrong": "a"}, idempotency_key=f"{name}-1")
    assert await counted(name) == 0
    with pytest.raises(pc.InvalidInputsError):
        await pc.arun_crew(crew, {"text": "a"}, idempotency_key=f"{name}-2")
    assert await counted(name) == 0
    await pc.arun_crew(crew, {"text": "a"}, idempotency_key=f"{name}-2")
    assert await counted(name) == 1


async def test_an_uncertain_kickoff_keeps_its_estimate(crew_server: CrewServerFactory, name: str):
    server = crew_server("echo", faults=["kickoff:500-before-accept@1"])
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=1, per="day", name=name)])
    with pytest.raises(pc.KickoffUncertainError):
        await pc.arun_crew(crew, {"text": "a"}, idempotency_key=name)
    assert await counted(name) == 1
    with pytest.raises(pc.BudgetExceededError):
        await pc.arun_crew(crew, {"text": "b"})
    (record,) = await PrefectRecords().attempts(name)
    record.open_for = 0.0  # as after half a minute
    await resolve_never_started(record, PrefectRecords())
    assert await counted(name) == 0
    await pc.arun_crew(crew, {"text": "a"}, idempotency_key=name)
    assert (server.kickoffs, await counted(name)) == (1, 1)


async def test_resolving_gives_an_unwritten_start_back(
    crew_server: CrewServerFactory, name: str, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server("echo", faults=["kickoff:422-before-accept@2"])
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=5, per="day", name=name)])
    await pc.arun_crew(crew, {"text": "a"})

    async def away(*_: Any) -> None:
        raise httpx.ConnectError("the Prefect API is away")

    monkeypatch.setattr(PrefectRecords, "save", away)
    with pytest.raises(pc.InvalidInputsError):
        await pc.arun_crew(crew, {"text": "b"}, idempotency_key=name)
    (record,) = await PrefectRecords().attempts(name)
    assert (record.phase, await counted(name)) == (RecordPhase.CLAIMED, 2)
    record.open_for = 0.0  # as after half a minute
    await resolve_never_started(record, PrefectRecords())
    assert await counted(name) == 1


async def test_a_void_claim_is_given_back_once(
    crew_server: CrewServerFactory, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Somebody voids a claim whose owner is asleep: the owner gives nothing back when it wakes up."""
    server = crew_server("echo")
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=5, per="day", name=name)])
    monkeypatch.setattr(kickoff, "CLAIM_GOOD_FOR", -60.0)
    asleep, wake_up = asyncio.Event(), asyncio.Event()

    permit = PrefectRecords.permit

    async def sleep(*args: Any, **options: Any) -> bool:
        if not asleep.is_set():
            asleep.set()
            await wake_up.wait()
        return await permit(*args, **options)

    monkeypatch.setattr(PrefectRecords, "permit", sleep)
    first = asyncio.ensure_future(crew.atrigger({"text": "a"}, idempotency_key=name))
    await asleep.wait()
    assert await counted(name) == 1
    second = await crew.atrigger({"text": "a"}, idempotency_key=name)
    wake_up.set()
    assert (await first).kickoff_id == second.kickoff_id
    assert (server.kickoffs, await counted(name)) == (1, 1)


# What runs use


async def test_an_end_adds_the_difference(crew_server: CrewServerFactory, name: str):
    server = crew_server(used(700), response_format="union")
    crew = server.crew(budgets=[pc.Budget(max_tokens=2000, estimate_tokens=650, per="day", name=name)])
    for before in (0, 700):
        run = await crew.atrigger({})
        assert await counted(name) == before + 650
        await run.await_for_completion()
        assert await counted(name) == before + 700
    with pytest.raises(pc.BudgetExceededError, match="takes about 650: 1,400 of 2,000 tokens"):
        await crew.atrigger({})


async def test_more_use_than_room_fills_the_counter(crew_server: CrewServerFactory, name: str):
    server = crew_server(used(900), response_format="union")
    crew = server.crew(budgets=[pc.Budget(max_tokens=1000, estimate_tokens=50, per="day", name=name)])
    runs = [await crew.atrigger({}) for _ in range(2)]
    for run in runs:
        await run.await_for_completion()
    assert await counted(name) == 1000


async def test_a_run_without_usage_counts_as_its_estimate(crew_server: CrewServerFactory, name: str):
    crew = crew_server("echo").crew(budgets=[pc.Budget(max_tokens=1000, estimate_tokens=50, per="day", name=name)])
    await pc.arun_crew(crew, {"text": "a"})
    assert await counted(name) == 50


@pytest.mark.parametrize(
    ("budget", "price", "proposal"),
    [
        pytest.param({"max_tokens": 5000}, None, r"Give the budget estimate_tokens=110, the mean", id="tokens"),
        pytest.param(
            {"max_cost": 5},
            Price(per_1k_input=1, per_1k_output=1),
            r"Give the budget estimate_cost=0\.11, the mean of .* or give the crew a price for each run",
            id="cost",
        ),
        pytest.param({"max_cost": 5}, None, r"estimate_cost=0\.11", id="cost without a price"),
    ],
)
async def test_a_missing_estimate_proposes_the_mean(
    crew_server: CrewServerFactory, name: str, prefect_server: PrefectServer, budget: Any, price: Any, proposal: str
):
    prefect_server.forget_records()  # a port may have been that of the crew of an earlier test
    server = crew_server("echo")
    crew = server.crew(budgets=[pc.Budget(per="day", name=name, **budget)], price=price)
    with pytest.raises(pc.ConfigurationError, match=r"no run of crew .* has reported its use of late"):
        await pc.arun_crew(crew, {"text": "a"})
    for tokens in (*[9000] * 3, *[100, 120] * 10):
        facts: dict[str, Any] = {"phase": RecordPhase.ENDED, "usage": TokenUsage(total_tokens=tokens)}
        await put(new_record(crew_url=server.url, cost=tokens / 1000, **facts))
    with pytest.raises(pc.ConfigurationError, match=f"Budget '{name}' limits .* {proposal}") as raised:
        await pc.arun_crew(crew, {"text": "a"}, idempotency_key=name)
    assert "the last 20 runs" in str(raised.value)
    assert (server.kickoffs, await counted(name), await PrefectRecords().attempts(name)) == (0, 0, [])


async def test_the_cost_follows_the_price(crew_server: CrewServerFactory, name: str):
    server = crew_server(used(1010), response_format="union")
    budgets = [pc.Budget(max_cost=1, estimate_cost=0.05, per="day", name=name)]
    crew = server.crew(budgets=budgets, price=Price(per_1k_input=0.3, per_1k_output=1))
    run = await crew.atrigger({})
    assert await counted(name) == 500
    await run.await_for_completion()
    assert await counted(name) == 3100
    fixed = server.crew(budgets=budgets, price=0.2)
    for _ in range(3):
        await pc.arun_crew(fixed, {})
    assert await counted(name) == 9100
    with pytest.raises(pc.BudgetExceededError, match=r"takes about 0\.2: 0\.91 of 1 cost"):
        await pc.arun_crew(fixed, {})
    await pc.arun_crew(server.crew(budgets=budgets), {})
    assert await counted(name) == 9600, "without a price a run counts as its estimate"
    assert server.kickoffs == 5


async def test_waits_at_the_same_moment_settle_once(crew_server: CrewServerFactory, name: str):
    server = crew_server(used(100, seconds=0.3), response_format="union")
    crew = server.crew(budgets=[pc.Budget(max_tokens=1_000_000, estimate_tokens=1000, per="month", name=name)])
    for number in range(1, 4):
        await asyncio.gather(*(pc.arun_crew(crew, {}, idempotency_key=f"{name}-{number}") for _ in range(4)))
        assert await counted(name) == 100 * number


async def test_an_end_seen_twice_leaves_a_full_counter(crew_server: CrewServerFactory, name: str):
    """The second one finds no room for what the run used beyond its estimate: it gives back no more than it took."""
    crew = crew_server("echo").crew(budgets=[pc.Budget(max_tokens=1000, estimate_tokens=50, per="day", name=name)])
    record = await record_of((await crew.atrigger({"text": "a"})).kickoff_id)
    end = {"state": CrewState.COMPLETED, "usage": TokenUsage(total_tokens=900)}
    for seen in (record, record.model_copy()):
        await close_run(seen, PrefectRecords(), end)
        assert await counted(name) == 900


async def test_who_reattaches_settles_what_the_record_says(crew_server: CrewServerFactory, name: str):
    server = crew_server(used(700), response_format="union")
    budget = pc.Budget(max_tokens=2000, estimate_tokens=100, per="day", name=name)
    run = await server.crew(budgets=[budget]).atrigger({})
    await pc.wait_for_crew(server.crew(), str(run.kickoff_id))
    assert await counted(name) == 700


async def test_a_changed_budget_holds_at_once(crew_server: CrewServerFactory, name: str):
    server = crew_server("echo")

    async def starts(most: int) -> bool:
        try:
            await pc.arun_crew(server.crew(budgets=[pc.Budget(max_kickoffs=most, per="day", name=name)]), {"text": "a"})
        except pc.BudgetExceededError:
            return False
        return True

    assert [await starts(most) for most in (1, 1, 2, 2, 5, 3, 3)] == [True, False, True, False, True, False, False]
    (limit,) = await limits_of(name)
    assert (limit.active_slots, limit.limit) == (3, 3)


async def test_two_starts_may_meet_a_changed_budget(
    crew_server: CrewServerFactory, name: str, monkeypatch: pytest.MonkeyPatch
):
    """One is refused by the old limit, and the other has set the new one before the first reads it."""
    server = crew_server("echo")
    await pc.arun_crew(server.crew(budgets=[pc.Budget(max_kickoffs=1, per="day", name=name)]), {"text": "a"})
    read = PrefectClient.read_global_concurrency_limit_by_name

    async def read_late(client: PrefectClient, limit: str) -> Any:
        await client.update_global_concurrency_limit(limit, GlobalConcurrencyLimitUpdate(limit=9))
        return await read(client, limit)

    monkeypatch.setattr(PrefectClient, "read_global_concurrency_limit_by_name", read_late)
    await pc.arun_crew(server.crew(budgets=[pc.Budget(max_kickoffs=9, per="day", name=name)]), {"text": "b"})
    assert server.kickoffs == 2


async def test_a_run_counts_once_in_a_shared_counter(crew_server: CrewServerFactory, name: str):
    """A flow that is called as its crew has a budget of the crew's name."""
    server = crew_server("echo")
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=most, per="day", name=name) for most in (5, 2, 4)])
    for text in "ab":
        await pc.arun_crew(crew, {"text": text})
    with pytest.raises(pc.BudgetExceededError, match="2 of 2 kickoffs"):
        await pc.arun_crew(crew, {"text": "c"})
    assert await counted(name) == 2


async def test_a_warning_and_a_refusing_limit_both_hold(
    crew_server: CrewServerFactory, name: str, caplog: pytest.LogCaptureFixture
):
    limits = ((1, "warn"), (2, "refuse"))
    budgets = [pc.Budget(max_kickoffs=most, per="day", name=name, on_limit=how) for most, how in limits]
    crew = crew_server("echo").crew(budgets=budgets)
    for text in "ab":
        await pc.arun_crew(crew, {"text": text})
    assert f"Budget {name!r} has no room" in caplog.text
    with pytest.raises(pc.BudgetExceededError, match="2 of 2 kickoffs"):
        await pc.arun_crew(crew, {"text": "c"})


async def test_a_budget_costs_one_request_a_start(crew_server: CrewServerFactory, name: str, asked: list[str]):
    server = crew_server("echo")
    found: dict[str, Counter[str]] = {}
    crews = {
        "none": server.crew(),
        "kickoffs": server.crew(budgets=[pc.Budget(max_kickoffs=9, per="day", name=name)]),
        "cost": server.crew(budgets=[pc.Budget(max_cost=9, per="day", name=name)], price=0.1),
        "tokens": server.crew(budgets=[pc.Budget(max_tokens=9000, estimate_tokens=100, per="day", name=name)]),
    }
    for what, crew in crews.items():
        seen: list[Counter[str]] = []
        for number in range(4):
            asked.clear()
            await pc.arun_crew(crew, {"text": f"{what} {number}"}, idempotency_key=f"{name}-{what}-{number}")
            seen.append(Counter(one for one in asked if "csrf" not in one and not one.startswith("GET /v2/")))
        # The first one creates the counter; Prefect itself asks for more now and then. What each asks for counts.
        found[what] = reduce(and_, seen[1:])
    one_more = found["none"] + Counter(["POST /v2/concurrency_limits/increment"])
    assert found["kickoffs"] == found["cost"] == found["tokens"] == one_more


async def test_a_corrected_end_costs_two_requests(crew_server: CrewServerFactory, name: str, asked: list[str]):
    budgets = [pc.Budget(max_tokens=20_000, estimate_tokens=1000, name=name)]
    run = await crew_server(used(700), response_format="union").crew(budgets=budgets).atrigger({})
    asked.clear()
    await run.await_for_completion()
    found = [one for one in asked if "v2/concurrency" in one or one == "POST /variables/"]
    assert found == ["POST /variables/", "POST /v2/concurrency_limits/decrement"]
    assert len([one for one in asked if one.startswith("PATCH /variables/")]) == 1, "the claim's tag"


@pytest.mark.parametrize("tokens", [20, 700], ids=["less than the estimate", "more than the estimate"])
async def test_a_death_at_the_end_leaves_the_counter_too_high(
    crew_server: CrewServerFactory, name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
):
    """Whoever sees the end after that counts what is missing once more: the counter is too high then, never too low."""
    budgets = [pc.Budget(max_tokens=2000, estimate_tokens=100, name=name)]
    crew = crew_server(used(tokens), response_format="union").crew(budgets=budgets)
    run = await crew.atrigger({})
    end = PrefectRecords.end

    class Died(BaseException):
        pass

    async def die(*_: Any, **__: Any) -> None:
        raise Died

    monkeypatch.setattr(PrefectRecords, "end", die)
    with pytest.raises(Died):
        await run.await_for_completion()
    assert await counted(name) == max(tokens, 100)
    monkeypatch.setattr(PrefectRecords, "end", end)
    await pc.wait_for_crew(crew, str(run.kickoff_id))
    assert await counted(name) == tokens + max(tokens - 100, 0)


async def test_pruning_keeps_an_end_for_an_hour(crew_server: CrewServerFactory, name: str):
    """Another wait may be about to see the same end, and would settle it once more."""
    budgets = [pc.Budget(max_tokens=2000, estimate_tokens=100, name=name)]
    crew = crew_server(used(700), response_format="union").crew(budgets=budgets)
    kickoff_id = (await pc.arun_crew(crew, {})).kickoff_id
    await prune(PrefectRecords(), older_than=timedelta(0))
    assert (await record_of(kickoff_id)).is_final


async def test_pruning_removes_the_counters_of_the_past(
    crew_server: CrewServerFactory, name: str, monkeypatch: pytest.MonkeyPatch
):
    await pc.arun_crew(crew_server("echo").crew(budgets=[pc.Budget(max_kickoffs=9, name=name)]), {"text": "a"})
    await prune(PrefectRecords(), older_than=timedelta(0))
    assert await counted(name) == 1, "it was used within a month"
    monkeypatch.setattr(counters, "KEEP", timedelta(0))
    await prune(PrefectRecords(), older_than=timedelta(0))
    assert await limits_of(name) == []


# What follows


async def test_a_warning_budget_starts_all_the_same(
    crew_server: CrewServerFactory, name: str, caplog: pytest.LogCaptureFixture
):
    server = crew_server("echo")
    crew = server.crew(budgets=[pc.Budget(max_kickoffs=1, per="day", name=name, on_limit="warn")])
    with caplog.at_level(logging.WARNING):
        for text in "abc":
            await pc.arun_crew(crew, {"text": text})
    assert caplog.text.count("starts anyway") == 2
    assert (server.kickoffs, await counted(name)) == (3, 1)


async def test_a_full_budget_is_one_event(crew_server: CrewServerFactory, name: str):
    crew = crew_server("echo").crew(budgets=[pc.Budget(max_kickoffs=1, per="day", name=name)])
    await pc.arun_crew(crew, {"text": "a"})
    for text in "bc":
        with pytest.raises(pc.BudgetExceededError) as raised:
            await pc.arun_crew(crew, {"text": text})
    wanted = {"event": {"name": ["prefect-crew.budget.exceeded"]}, "resource": {"id": [raised.value.counter]}}

    async def events() -> list[dict[str, Any]]:
        async with get_client() as client:
            answer = await client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50})  # pyright: ignore[reportArgumentType]
        return answer.json()["events"]

    (event,) = await until(events, "the event")
    assert event["payload"] | {"used": 1, "limit": 1, "budget": name, "measure": "kickoffs"} == event["payload"]


# In a batch


async def test_a_batch_leaves_rows_without_room(crew_server: CrewServerFactory, name: str, tmp_path: Path):
    server, batch = crew_server("echo"), Batches(tmp_path)
    rows = [{"text": f"{number}"} for number in range(10)]
    report = await batch(server.crew(), rows, name=name, key="text", budgets=[pc.Budget(max_kickoffs=4)])
    assert (report.completed, report.failed, report.skipped, server.kickoffs) == (4, 0, 6, 4)
    assert report.stopped is not None
    assert report.stopped.startswith(f"Budget '{name}' has no room for another run")
    report = await batch(server.crew(), rows, name=name, key="text", budgets=[pc.Budget(max_kickoffs=20)])
    assert (report.completed, report.skipped, report.stopped, server.kickoffs) == (10, 0, None, 10)
    assert await counted(name) == 10


async def test_a_batch_uses_what_runs_in_flight_leave(crew_server: CrewServerFactory, name: str, tmp_path: Path):
    """The estimate of each row is 100, and it uses 20: more fit, one after another."""
    server, batch = crew_server(used(20, seconds=0.1), response_format="union"), Batches(tmp_path)
    rows = [{"n": f"{number}"} for number in range(12)]
    report = await batch(server.crew(), rows, name=name, budgets=[pc.Budget(max_tokens=250, estimate_tokens=100)])
    assert (report.completed, await counted(name)) == (8, 160)
    assert report.stopped is not None
    assert report.stopped.startswith(f"Budget '{name}' has no room for another run, which takes about 100: 160 of 250 ")


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_500_rows_in_flight_stay_near_the_limit(
    crew_server: CrewServerFactory, name: str, tmp_path: Path, notes: list[str]
):
    server, rows = crew_server(Held(500, tokens=800), response_format="union"), [{"text": str(n)} for n in range(520)]
    options: dict[str, Any] = {"max_in_flight": 510, "wait": pc.WaitPolicy(initial=5.0, max_interval=5.0)}
    budgets = [pc.Budget(max_tokens=250_000, estimate_tokens=500)]
    report = await Batches(tmp_path)(server.crew(), rows, name=name, budgets=budgets, **options)
    used_up = report.spending.tokens
    notes.append(f"budget of 250,000 tokens, 500 rows in flight: {server.kickoffs} runs used {used_up:,}")
    assert (report.failed, report.completed, server.kickoffs, report.skipped) == (0, 500, 500, 20)
    assert (used_up, await counted(name)) == (250_000 + 500 * 300, 250_000)


async def test_a_batch_without_an_estimate_is_refused(crew_server: CrewServerFactory, name: str, tmp_path: Path):
    server, batch = crew_server("echo"), Batches(tmp_path)
    with pytest.raises(pc.ConfigurationError, match=f"Budget '{name}' limits tokens"):
        await batch(server.crew(), [{"text": "a"}, {"text": "b"}], name=name, budgets=[pc.Budget(max_tokens=600)])
    assert (server.kickoffs, await counted(name), [*tmp_path.glob("*.jsonl")]) == (0, 0, [])


async def test_a_rows_end_is_settled_once(crew_server: CrewServerFactory, name: str, tmp_path: Path):
    crew = crew_of(
        crew_server("echo").crew(budgets=[pc.Budget(max_tokens=400, estimate_tokens=100, per="day", name=name)])
    )
    async with Ledger(str(tmp_path / "ledger.db"), name) as ledger:
        waited = new_record(ledger.idempotency_key("a"), crew_url=crew.url)
        await counters.add_estimates(crew, waited)
        assert await ledger.claim(waited)
        waited.phase, waited.kickoff_id = RecordPhase.STARTED, "k"
        await ledger.save(waited)
        stopped = await ledger.of_kickoff("k")
        assert stopped is not None
        end = {"state": CrewState.STOPPED, "usage": TokenUsage(total_tokens=20)}
        closed = await asyncio.gather(*(close_run(record, ledger, end) for record in (stopped, waited)))
        assert sorted(closed) == [False, True]
    assert await counted(name) == 20


async def test_a_row_refused_after_a_pause_is_given_back(crew_server: CrewServerFactory, name: str, tmp_path: Path):
    server = crew_server("echo", faults=["kickoff:429-bare@1", "kickoff:422-before-accept@2"])
    report = await Batches(tmp_path)(server.crew(), [{"text": "a"}], name=name, budgets=[pc.Budget(max_kickoffs=9)])
    assert (report.failed, server.requests["kickoff"], await counted(name)) == (1, 2, 0)
