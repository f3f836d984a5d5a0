"""Budgets over a real Prefect server: what is counted, when a start is refused, and what is given back."""

import asyncio
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from prefect import flow, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse

import prefect_crew as pc
from prefect_crew._internal.prefect_api import read_all
from prefect_crew.batches.ledger import Ledger
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import TokenUsage
from prefect_crew.devserver import CrewServer
from prefect_crew.prices import Price
from prefect_crew.records import budgets as counters
from prefect_crew.records.prune import prune
from prefect_crew.records.resolve import resolve_never_started
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import kickoff
from prefect_crew.runs.run import close_run
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches
from support.prefect_server import PrefectServer
from support.proxy import Proxy
from support.records import CLAIMED, ENDED, STARTED, new_record, put, record_of
from support.scripts import Held, script
from support.waiting import until
from support.ways import WAYS

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

RECORDS = PrefectRecords()
Budgeted = Callable[..., tuple[CrewServer, pc.DeployedCrew]]


@pytest.fixture
def name() -> str:
    return f"b-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def budgeted(crew_server: CrewServerFactory, name: str) -> Budgeted:
    """Give a function that starts a server and returns it with its crew, which has one budget for the day."""

    def start(program: str = "echo", *, faults: Sequence[str] = (), price: Any = None, **budget: Any) -> Any:
        reports: dict[str, Any] = {} if program == "echo" else {"response_format": "live"}
        server = crew_server(program, faults=faults, **reports)
        return server, server.crew(budgets=[pc.Budget(per="day", name=name, **budget)], price=price)

    return start


def using(tokens: int, seconds: float = 0.0) -> str:
    """Return a crew that reports how many tokens it used."""
    usage = {"total_tokens": tokens, "prompt_tokens": tokens - 10, "completion_tokens": 10}
    return script({"output": "done", "seconds": seconds}, usage=usage)


async def counters_of(name: str) -> list[GlobalConcurrencyLimitResponse]:
    async with get_client() as client:
        limits = await read_all(client.read_global_concurrency_limits)
    return [limit for limit in limits if f".{name}." in limit.name]


async def counted(name: str) -> int:
    return sum(counter.active_slots for counter in await counters_of(name))


# What is refused


async def test_a_start_beyond_the_budget_is_refused(budgeted: Budgeted, name: str):
    server, crew = budgeted(max_kickoffs=2)
    for text in "aba":  # a run that is found again does not count again
        await pc.arun_crew(crew, {"text": text}, idempotency_key=f"{name}-{text}")
    with pytest.raises(pc.BudgetExceededError):
        await pc.arun_crew(crew, {"text": "c"})
    with pytest.raises(pc.BudgetExceededError, match="no room for another run") as raised:
        await pc.arun_crew(crew, {"text": "d"}, idempotency_key=f"{name}-d")
    error = raised.value
    facts = {"budget": name, "measure": "kickoffs", "used": 2, "limit": 2, "estimate": 1}
    assert {fact: getattr(error, fact) for fact in facts} == facts
    assert error.resets_at is not None
    assert f"{error.resets_at:%Y-%m-%d %H:%M} UTC" in str(error)
    assert server.kickoffs == 2
    assert await counted(name) == 2
    assert await RECORDS.attempts(f"{name}-d") == [], "no refusal takes up a number of its key"
    wanted = {"event": {"name": ["prefect-crew.budget.exceeded"]}, "resource": {"id": [error.counter]}}

    async def events() -> list[dict[str, Any]]:
        async with get_client() as client:
            answer = await client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50})  # pyright: ignore[reportArgumentType]
        return answer.json()["events"]

    (event,) = await until(events, "the only event")
    assert event["payload"] | facts == event["payload"]


@pytest.mark.parametrize("way", ["run_crew", "tasks", "trigger", "pipeline"])
async def test_a_budget_holds_for_every_way_to_start(budgeted: Budgeted, name: str, way: str):
    server, crew = budgeted(max_kickoffs=1)
    await WAYS[way](crew, "a")
    with pytest.raises((pc.BudgetExceededError, pc.PipelineFailedError)) as raised:
        await WAYS[way](crew, "b")
    errors: dict[str, Exception] = getattr(raised.value, "errors", {"only": raised.value})
    assert isinstance(errors["only"], pc.BudgetExceededError)
    assert server.kickoffs == 1
    assert await counted(name) == 1


async def test_budgets_of_flow_pipeline_and_block_all_hold(budgeted: Budgeted, name: str):
    _, crew = budgeted(max_kickoffs=4)

    @flow(name=f"flow-{name}")
    async def each() -> None:
        for text in "ab":
            await pc.arun_crew(crew, {"text": text}, budgets=[pc.Budget(max_kickoffs=1)])

    refusal = f"Budget 'flow-{name}' .*Raise max_kickoffs and make the same call again"
    with pytest.raises(pc.BudgetExceededError, match=refusal):
        await each()
    assert await counted(name) == 1, "the estimate of the refused one was taken off the block's budget"
    steps = [pc.CrewStep(step, crew, {"text": step}) for step in "abc"]
    with pytest.raises(pc.PipelineFailedError) as raised:
        await pc.arun_pipeline(steps, name=f"pipe-{name}", budgets=[pc.Budget(max_kickoffs=2)])
    assert [getattr(error, "budget", None) for error in raised.value.errors.values()] == [f"pipe-{name}"]
    assert await counted(name) == 3


async def test_budgets_of_one_name_share_a_counter(
    crew_server: CrewServerFactory, name: str, caplog: pytest.LogCaptureFixture
):
    """A flow that is called as its crew has budgets of the crew's name."""
    limits: Any = ((5, "refuse"), (3, "refuse"), (1, "warn"), (4, "refuse"))
    budgets = [pc.Budget(max_kickoffs=most, per="day", name=name, on_limit=how) for most, how in limits]
    crew = crew_server("echo").crew(budgets=budgets)
    with caplog.at_level(logging.WARNING):
        for text in "abc":
            await pc.arun_crew(crew, {"text": text})
    assert caplog.text.count(f"Budget {name!r} has no room") == 2
    assert caplog.text.count("starts anyway") == 2
    with pytest.raises(pc.BudgetExceededError, match="3 of 3 kickoffs"):
        await pc.arun_crew(crew, {"text": "d"})
    slots = sorted(counter.active_slots for counter in await counters_of(name))
    assert slots == [1, 3], "a run counts once in the counter that refuses, and once in the counter that warns"


# What is given back


async def test_a_run_that_did_not_start_is_given_back(budgeted: Budgeted, name: str):
    _, crew = budgeted(max_kickoffs=5, faults=["kickoff:422-before-accept@1"])
    for inputs in ({"wrong": "a"}, {"text": "a"}):
        with pytest.raises(pc.InvalidInputsError):
            await pc.arun_crew(crew, inputs, idempotency_key=name)
        assert await counted(name) == 0
    await pc.arun_crew(crew, {"text": "a"}, idempotency_key=name)
    assert await counted(name) == 1


async def test_an_uncertain_kickoff_keeps_its_estimate(budgeted: Budgeted, name: str):
    server, crew = budgeted(max_kickoffs=1, faults=["kickoff:500-before-accept@1"])
    with pytest.raises(pc.KickoffUncertainError):
        await pc.arun_crew(crew, {"text": "a"}, idempotency_key=name)
    assert await counted(name) == 1
    with pytest.raises(pc.BudgetExceededError):
        await pc.arun_crew(crew, {"text": "b"})
    (record,) = await RECORDS.attempts(name)
    record.open_for = 0.0  # as after half a minute
    await resolve_never_started(record, RECORDS)
    assert await counted(name) == 0
    await pc.arun_crew(crew, {"text": "a"}, idempotency_key=name)
    assert server.kickoffs == 1
    assert await counted(name) == 1


async def test_resolving_gives_an_unwritten_start_back(budgeted: Budgeted, name: str, monkeypatch: pytest.MonkeyPatch):
    _, crew = budgeted(max_kickoffs=5, faults=["kickoff:422-before-accept@2"])
    await pc.arun_crew(crew, {"text": "a"})

    async def away(*_: Any) -> None:
        raise httpx.ConnectError("the Prefect API is away")

    monkeypatch.setattr(PrefectRecords, "save", away)
    with pytest.raises(pc.InvalidInputsError):
        await pc.arun_crew(crew, {"text": "b"}, idempotency_key=name)
    (record,) = await RECORDS.attempts(name)
    assert record.phase is CLAIMED
    assert await counted(name) == 2
    record.open_for = 0.0  # as after half a minute
    await resolve_never_started(record, RECORDS)
    assert await counted(name) == 1


async def test_a_void_claim_is_given_back_once(budgeted: Budgeted, name: str, monkeypatch: pytest.MonkeyPatch):
    """Somebody voids a claim whose owner is asleep. When the owner wakes up, it gives back its own estimate alone."""
    server, crew = budgeted(max_kickoffs=5)
    monkeypatch.setattr(kickoff, "CLAIM_GOOD_FOR", -60.0)
    asleep, wake_up, permit = asyncio.Event(), asyncio.Event(), PrefectRecords.permit

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
    assert server.kickoffs == 1
    assert await counted(name) == 1


# What runs use


@pytest.mark.parametrize(
    ("measure", "limit", "estimate", "price", "tokens", "counts", "refusal"),
    [
        ("tokens", 2000, 650, None, 700, (650, 700, 1350, 1400), "takes about 650: 1,400 of 2,000 tokens"),
        ("tokens", 1000, 50, None, 900, (50, 900, 950, 1000), "takes about 50: 1,000 of 1,000 tokens"),
        ("tokens", 1000, 50, None, None, (50, 50), None),
        ("cost", 1, 0.05, Price(per_1k_input=0.3, per_1k_output=1), 1010, (500, 3100), None),
        ("cost", 0.5, 0.05, 0.2, 1010, (2000, 2000, 4000, 4000), r"takes about 0\.2: 0\.4 of 0\.5 cost"),
        ("cost", 1, 0.05, None, 1010, (500, 500), None),
    ],
    ids=["the difference", "no more than the limit", "unknown use", "price of tokens", "price of a run", "no price"],
)
async def test_an_end_corrects_the_estimate(
    budgeted: Budgeted,
    name: str,
    measure: str,
    limit: float,
    estimate: float,
    price: Any,
    tokens: int | None,
    counts: tuple[int, ...],
    refusal: str | None,
):
    """`counts` are the slots of the counter after each start and each end."""
    program, inputs = ("echo", {"text": "a"}) if tokens is None else (using(tokens), {})
    server, crew = budgeted(program, price=price, **{f"max_{measure}": limit, f"estimate_{measure}": estimate})
    seen: list[int] = []
    while len(seen) < len(counts):
        run = await crew.atrigger(inputs)
        seen.append(await counted(name))
        # The waiter's crew has no budget: the record says what to correct.
        await pc.wait_for_crew(server.crew(price=price), run.kickoff_id)
        seen.append(await counted(name))
    assert tuple(seen) == counts
    if refusal is not None:
        with pytest.raises(pc.BudgetExceededError, match=refusal):
            await crew.atrigger(inputs)


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
    budgeted: Budgeted, name: str, prefect_server: PrefectServer, budget: Any, price: Any, proposal: str
):
    prefect_server.forget_records()  # a port may have been that of the crew of an earlier test
    server, crew = budgeted(price=price, **budget)
    with pytest.raises(pc.ConfigurationError, match=r"no run of crew .* has reported its use of late"):
        await pc.arun_crew(crew, {"text": "a"})
    for tokens in (*[9000] * 3, *[100, 120] * 10):
        usage = TokenUsage(total_tokens=tokens)
        await put(new_record(crew_url=server.url, phase=ENDED, cost=tokens / 1000, usage=usage))
    with pytest.raises(pc.ConfigurationError, match=f"Budget '{name}' limits .* {proposal}") as raised:
        await pc.arun_crew(crew, {"text": "a"}, idempotency_key=name)
    assert "the last 20 runs" in str(raised.value)
    assert server.kickoffs == 0
    assert await counted(name) == 0
    assert await RECORDS.attempts(name) == []


async def test_an_end_seen_twice_leaves_a_full_counter(budgeted: Budgeted, name: str):
    """The second one finds no room for what the run used beyond its estimate: it gives back no more than it took."""
    _, crew = budgeted(max_tokens=1000, estimate_tokens=50)
    record = await record_of((await crew.atrigger({"text": "a"})).kickoff_id)
    end = {"state": CrewState.COMPLETED, "usage": TokenUsage(total_tokens=900)}
    for seen in (record, record.model_copy()):
        await close_run(seen, RECORDS, end)
        assert await counted(name) == 900


async def test_a_changed_budget_holds_at_once(crew_server: CrewServerFactory, name: str):
    server = crew_server("echo")

    async def starts(most: int) -> bool:
        try:
            await pc.arun_crew(server.crew(budgets=[pc.Budget(max_kickoffs=most, per="day", name=name)]), {"text": "a"})
        except pc.BudgetExceededError:
            return False
        return True

    assert [await starts(most) for most in (1, 1, 2, 2, 5, 3, 3)] == [True, False, True, False, True, False, False]
    (counter,) = await counters_of(name)
    assert counter.active_slots == 3
    assert counter.limit == 3


async def test_two_starts_may_meet_a_changed_budget(budgeted: Budgeted, monkeypatch: pytest.MonkeyPatch):
    """One is refused by the old limit, and the other has set the new one before the first reads it."""
    await pc.arun_crew(budgeted(max_kickoffs=1)[1], {"text": "a"})
    read = PrefectClient.read_global_concurrency_limit_by_name

    async def read_late(client: PrefectClient, limit: str) -> Any:
        await client.update_global_concurrency_limit(limit, GlobalConcurrencyLimitUpdate(limit=9))
        return await read(client, limit)

    monkeypatch.setattr(PrefectClient, "read_global_concurrency_limit_by_name", read_late)
    await pc.arun_crew(budgeted(max_kickoffs=9)[1], {"text": "b"})


async def test_a_budget_costs_one_request_a_step(budgeted: Budgeted, crew_server: CrewServerFactory, proxy: Proxy):
    plain, (_, crew) = (
        crew_server(using(700), response_format="live").crew(),
        budgeted(using(700), max_tokens=9000, estimate_tokens=1000),
    )
    requests: list[list[str]] = []
    for crew_of_run in (crew, plain, crew):  # the first one creates the counter
        proxy.requests.clear()
        await (await crew_of_run.atrigger({})).await_for_completion()
        lines = [line.replace("/api/", "") for line in proxy.requests if re.search("variables|v2/concurrency", line)]
        # SQLite makes the server answer 503 when two write at once; such a request is sent again.
        sent_once = [line for line, before in zip(lines, ["", *lines], strict=False) if line != before]
        requests.append(sorted(re.sub("/[0-9a-f-]{36}$", "/ID", line) for line in sent_once))
    steps = [f"POST v2/concurrency_limits/{step}" for step in ("decrement", "increment")]
    assert requests[2] == sorted([*requests[1], *steps])


@pytest.mark.parametrize("tokens", [20, 700], ids=["less than the estimate", "more than the estimate"])
async def test_a_death_at_the_end_leaves_the_counter_too_high(budgeted: Budgeted, name: str, tokens: int):
    """Whoever sees the end after that counts what is missing once more: the counter is too high then, never too low."""
    _, crew = budgeted(using(tokens), max_tokens=2000, estimate_tokens=100)
    run = await crew.atrigger({})

    class Died(BaseException):
        pass

    with mock.patch.object(PrefectRecords, "end", side_effect=Died), pytest.raises(Died):
        await run.await_for_completion()
    assert await counted(name) == max(tokens, 100)
    await pc.wait_for_crew(crew, run.kickoff_id)
    assert await counted(name) == tokens + max(tokens - 100, 0)


async def test_pruning_removes_the_counters_of_the_past(budgeted: Budgeted, name: str, monkeypatch: pytest.MonkeyPatch):
    await pc.arun_crew(budgeted(max_kickoffs=9)[1], {"text": "a"})
    await prune(RECORDS, older_than=timedelta(0))
    assert await counted(name) == 1, "it was used within a month"
    monkeypatch.setattr(counters, "KEEP", timedelta(0))
    await prune(RECORDS, older_than=timedelta(0))
    assert await counters_of(name) == []


# In a batch


@pytest.fixture
def batch(tmp_path: Path, name: str) -> Callable[..., Any]:
    """Give a function that runs a batch of rows with one budget."""

    def run(server: CrewServer, rows: Any, *, options: Mapping[str, Any] = {}, **budget: Any) -> Any:
        return Batches(tmp_path)(server.crew(), rows, name=name, budgets=[pc.Budget(**budget)], **options)

    return run


async def test_a_batch_leaves_rows_without_room(crew_server: CrewServerFactory, name: str, batch: Any):
    server, rows = crew_server("echo"), [{"text": f"{number}"} for number in range(10)]
    report = await batch(server, rows, max_kickoffs=4)
    assert report.completed == 4
    assert report.failed == 0
    assert report.skipped == 6
    assert server.kickoffs == 4
    assert report.stopped.startswith(f"Budget '{name}' has no room for another run")
    report = await batch(server, rows, max_kickoffs=20)
    assert report.completed == 10
    assert report.skipped == 0
    assert report.stopped is None
    assert server.kickoffs == 10
    assert await counted(name) == 10


async def test_a_batch_uses_what_runs_in_flight_leave(crew_server: CrewServerFactory, name: str, batch: Any):
    """The estimate of each row is 100, and it uses 20: more fit, one after another."""
    server = crew_server(using(20, seconds=0.1), response_format="live")
    report = await batch(server, [{"n": f"{n}"} for n in range(12)], max_tokens=250, estimate_tokens=100)
    assert report.completed == 8
    assert await counted(name) == 160
    assert report.stopped.startswith(f"Budget '{name}' has no room for another run, which takes about 100: 160 of 250 ")


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_500_rows_in_flight_stay_near_the_limit(
    crew_server: CrewServerFactory, name: str, batch: Any, notes: list[str]
):
    server, rows = crew_server(Held(500, tokens=800), response_format="live"), [{"text": str(n)} for n in range(520)]
    options: dict[str, Any] = {"max_in_flight": 510, "wait": pc.WaitPolicy(initial=5.0, max_interval=5.0)}
    report = await batch(server, rows, options=options, max_tokens=250_000, estimate_tokens=500)
    used_up = report.spending.tokens
    notes.append(f"budget of 250,000 tokens, 500 rows in flight: {server.kickoffs} runs used {used_up:,}")
    assert report.failed == 0
    assert report.completed == 500
    assert server.kickoffs == 500
    assert report.skipped == 20
    assert used_up == 250_000 + 500 * 300
    assert await counted(name) == 250_000


async def test_a_batch_without_an_estimate_is_refused(
    crew_server: CrewServerFactory, name: str, batch: Any, tmp_path: Path
):
    server = crew_server("echo")
    with pytest.raises(pc.ConfigurationError, match=f"Budget '{name}' limits tokens"):
        await batch(server, [{"text": "a"}, {"text": "b"}], max_tokens=600)
    assert server.kickoffs == 0
    assert await counted(name) == 0
    assert not [*tmp_path.glob("*.jsonl")]


async def test_a_rows_end_is_settled_once(budgeted: Budgeted, name: str, tmp_path: Path):
    crew = crew_of(budgeted(max_tokens=400, estimate_tokens=100)[1])
    async with Ledger(str(tmp_path / "ledger.db"), name) as ledger:
        waited = new_record(ledger.idempotency_key("a"), crew_url=crew.url)
        await counters.add_estimates(crew, waited)
        assert await ledger.claim(waited)
        waited.phase, waited.kickoff_id = STARTED, "k"
        await ledger.save(waited)
        stopped = await ledger.of_kickoff("k")
        assert stopped is not None
        end = {"state": CrewState.STOPPED, "usage": TokenUsage(total_tokens=20)}
        closed = await asyncio.gather(*(close_run(record, ledger, end) for record in (stopped, waited)))
        assert sorted(closed) == [False, True]
    assert await counted(name) == 20


async def test_a_row_refused_after_a_pause_is_given_back(crew_server: CrewServerFactory, name: str, batch: Any):
    server = crew_server("echo", faults=["kickoff:429-bare@1", "kickoff:422-before-accept@2"])
    report = await batch(server, [{"text": "a"}], max_kickoffs=9)
    assert report.failed == 1
    assert server.requests["kickoff"] == 2
    assert await counted(name) == 0
