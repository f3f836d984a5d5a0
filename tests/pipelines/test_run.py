"""Pipelines, with real crews and a real Prefect server: what runs when, what is started, what failures leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from datetime import timedelta
from typing import Any

import pytest
from prefect import flow, get_client, task
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow_async
from prefect.flow_runs import asuspend_flow_run
from pydantic import SecretStr

import prefect_crew as pc
from prefect_crew.blocks import crew_of
from prefect_crew.client.redaction import MASK
from prefect_crew.devserver import CrewServer
from prefect_crew.pipelines import artifact as pages
from prefect_crew.runs import wait
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import call_in_flow
from support.held import FailsFirst, Held
from support.prefect_server import PrefectServer, stored_texts
from support.records import key
from support.scripts import FAILS, JOURNAL, script
from support.seen import Seen
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

FAILS_ON = script({"fail": "{{ 'no ' ~ text if text == 'bad' else '' }}", "output": "{{ text }}"}, inputs=["text"])
"""Gives back its text, unless that is "bad"."""


@pytest.fixture
def echo(crew_server: CrewServerFactory) -> CrewServer:
    return crew_server("echo")


def texts(server: CrewServer) -> list[str]:
    return [run.inputs["text"] for run in server.runs]


def artifact(seen: Seen, name: str, idempotency_key: str) -> str:
    pages = [page for page in seen.artifacts(f"pipeline-{name}") if idempotency_key in page["description"]]
    assert len(pages) == 1, "one artifact a pipeline"
    return pages[0]["data"].replace("\u00a0", " ")


async def test_steps_feed_each_other(echo: CrewServer):
    crew, idempotency_key = echo.crew(), key()
    steps = [
        pc.CrewStep("review", crew, {"text": lambda context: context["write"].output.upper()}, after=["write"]),
        pc.CrewStep("write", crew, {"text": "{{ research.output }} & {{ steps['price list'].tasks[0].output }}"}),
        pc.CrewStep("research", crew, {"text": "on {{ topic }}"}),
        pc.CrewStep("price list", crew, {"text": "{{ inputs.topic }} costs"}),
        pc.CrewStep("last", crew, {"text": "bye"}, after=["review"]),
    ]
    result = await pc.arun_pipeline(steps, {"topic": "tea"}, idempotency_key=idempotency_key)
    assert result["review"].output == "ON TEA & TEA COSTS"
    assert set(result.results) == {"research", "price list", "write", "review", "last"}
    assert texts(echo)[2:] == ["on tea & tea costs", "ON TEA & TEA COSTS", "bye"]
    assert echo.requests["inputs"] == 1, "a crew is asked once, however many steps it has"
    assert echo.kickoffs_by_key == {f"{idempotency_key}/{step.name}": 1 for step in steps}
    assert (await pc.aget_result(f"{idempotency_key}/write")).output == "on tea & tea costs"


async def test_independent_steps_run_at_the_same_time(crew_server: CrewServerFactory, seen: Seen):
    held = Held(until=lambda _: server.kickoffs >= 2)  # neither "a" nor "b" ends before both have been started
    server, idempotency_key = crew_server(held), key()
    steps = [pc.CrewStep(name, server.crew(), {}) for name in ("a", "b")]
    steps.append(pc.CrewStep("c", server.crew(), {}, after=["a", "b"]))
    await pc.arun_pipeline(steps, name="concurrent", idempotency_key=idempotency_key)
    *both, last = sorted(server.runs, key=lambda run: run.created_at)
    assert all(last.created_at > run.created_at + timedelta(seconds=run.execution_time) for run in both)
    assert str(last.meta["idempotency_key"]).endswith("c")
    shown = await asyncio.to_thread(artifact, seen, "concurrent", idempotency_key)
    assert "3 of 3 steps completed" in shown


async def test_the_page_links_to_a_running_step(
    crew_server: CrewServerFactory, seen: Seen, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wait, "SHOW_EVERY", 0.3)
    monkeypatch.setattr(pages, "SHOW_AFTER", 0.1)
    monkeypatch.setattr(pages, "SHOW_EVERY", 0.1)
    held, idempotency_key = Held(), key()
    server = crew_server(held)
    call = pc.arun_pipeline([pc.CrewStep("long", server.crew(), {})], name="linked", idempotency_key=idempotency_key)
    running = asyncio.ensure_future(call)

    async def is_linked() -> bool:
        pages = await asyncio.to_thread(seen.artifacts, "pipeline-linked")
        return any(idempotency_key in page["description"] and "../artifact/" in page["data"] for page in pages)

    await until(is_linked, "the link to its page")
    held.release()
    await running


async def test_each_step_has_its_crew_and_token(crew_server: CrewServerFactory):
    one = crew_server("echo", token="one-token", faults=["inputs:404"])  # which is no obstacle
    other = crew_server("echo", token="other-token")
    await other.crew().asave(name := f"other-{uuid.uuid4().hex[:8]}")
    steps = [pc.CrewStep("a", one.crew(), {"text": "a"}), pc.CrewStep("b", name, {"text": "{{ a.output }}b"})]
    assert (await pc.arun_pipeline(steps))["b"].output == "ab"
    assert (one.kickoffs, other.kickoffs) == (1, 1)


def test_a_pipeline_runs_in_flow_task_and_script(echo: CrewServer):
    steps = [pc.CrewStep("a", echo.crew(), {"text": "{{ topic }}"})]

    @task
    def in_a_task() -> str:
        return pc.run_pipeline(steps, {"topic": "task"})["a"].output

    @flow
    def in_a_flow() -> list[str]:
        return [pc.run_pipeline(steps, {"topic": "flow"})["a"].output, in_a_task()]

    assert in_a_flow() == ["flow", "task"]
    assert pc.run_pipeline(steps, {"topic": "script"})["a"].output == "script"
    assert echo.kickoffs == 3


@pytest.mark.parametrize(
    ("show", "idempotency_key", "title"),
    [("full", None, " · tea"), ("full", "report x", " · report x"), ("summary", None, "")],
)
def test_a_flow_run_is_named_after_its_pipeline(
    crew_server: CrewServerFactory, seen: Seen, show: str, idempotency_key: str | None, title: str
):
    crew = crew_server(script({"output": "ok"}, inputs=["topic"])).crew(show=show)
    given = idempotency_key and f"{idempotency_key} {key()}"
    pc.run_pipeline([pc.CrewStep("a", crew)], {"topic": "tea"}, name=(name := key()), idempotency_key=given)
    (run,) = [one for one in seen.flow_runs("run-pipeline") if one["parameters"]["pipeline"] == name]
    assert run["name"].startswith(name + title)


async def test_all_mistakes_are_reported_at_once(crew_server: CrewServerFactory):
    server = crew_server(script({"output": "ok"}, inputs=["topic", "tone"]))
    refused = pc.DeployedCrew(url=server.url, token="wrong")
    steps = [
        pc.CrewStep("a", server.crew(), {"topic": "{{ topik }}"}),
        pc.CrewStep("b", server.crew(), {"topic": "x", "tone": "y"}, after=["c"]),
        pc.CrewStep("c", server.crew(), {"topic": "x", "tone": "y"}, after=["b", "nowhere"]),
        pc.CrewStep("d", "no-such-block", {}),
        pc.CrewStep("e", refused, {}),
        pc.CrewStep("f", pc.DeployedCrew(url=server.url, token="two words"), {}),
    ]
    with pytest.raises(pc.ConfigurationError) as raised:
        await pc.arun_pipeline(steps, {"topic": "tea"})
    for part in (
        *("nothing was started", "'topik' is no step, and no input that has a value", "no-such-block", "401"),
        *("step 'a' lacks the inputs tone of its crew", "depend on each other in a circle", "comes after 'nowhere'"),
        "blanks or letters that no HTTP header can carry",
    ):
        assert part in str(raised.value), part
    assert server.kickoffs == 0


async def test_a_rotated_token_is_no_problem(crew_server: CrewServerFactory):
    server = crew_server("echo")
    await server.crew().asave(name := f"rotated-{uuid.uuid4().hex[:8]}")
    old = await pc.DeployedCrew.aload(name)
    old.token = SecretStr("of-last-year")
    assert (await pc.arun_pipeline([pc.CrewStep("a", old, {"text": "a"})]))["a"].output == "a"


async def test_a_crew_that_is_away_blocks_only_a_first_start(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(FAILS_ON), key()
    crew = server.crew()
    steps = [pc.CrewStep("a", crew, {"text": "a"}), pc.CrewStep("b", crew, {"text": "{{ a.output }}b"})]
    server.faults.add("inputs:500@1")
    with pytest.raises(pc.ConfigurationError, match=r"nothing was started: crew .* cannot be asked for its inputs"):
        await pc.arun_pipeline(steps, idempotency_key=idempotency_key)
    assert server.kickoffs == 0
    await pc.arun_pipeline(steps, idempotency_key=idempotency_key)
    server.faults.add("inputs:500")
    assert (await pc.arun_pipeline(steps, idempotency_key=idempotency_key))["b"].output == "ab"
    assert server.kickoffs == 2


def test_a_plan_starts_nothing_and_shows_all(crew_server: CrewServerFactory):
    server = crew_server(script({"output": "ok"}, inputs=["text", "password"]))
    crew = crew_of(server.crew(secret_inputs=["password"])).called("travel")
    steps = [
        pc.CrewStep("write", crew, {"text": "{{ research.output }}", "password": "{{ code }}"}),
        pc.CrewStep("research", crew, {"text": "on {{ topic }}", "password": lambda _: "x"}),
        pc.CrewStep("send", crew, {"text": lambda _: "x", "password": "{{ code }}"}, after=["write"]),
    ]
    steps.append(pc.CrewStep("tell", crew, {"text": "as {{ pin }}: hunter23", "password": "{{ code }}"}, after="send"))
    plan = pc.plan_pipeline(steps, {"topic": "tea", "code": "hunter22", "pin": SecretStr("hunter23")})
    shown = {
        "research: crew travel": "on {{ topic }}",
        "write: crew travel, after research": "{{ research.output }}",
        "send: crew travel, after write": "from a function",
        "tell: crew travel, after send": "as {{ pin }}: ********",
    }
    assert str(plan) == "\n\n".join(f"{step}\n  text = {text}\n  password = ********" for step, text in shown.items())
    assert server.kickoffs == 0


async def test_a_failed_step_skips_those_that_need_it(crew_server: CrewServerFactory, seen: Seen):
    server, idempotency_key = crew_server(FAILS_ON), key()
    crew = server.crew()
    steps = [
        pc.CrewStep("bad", crew, {"text": "{{ first }}"}),
        pc.CrewStep("needs it", crew, {"text": "{{ bad.output }}"}),
        pc.CrewStep("needs that", crew, {"text": "x"}, after=["needs it"]),
        pc.CrewStep("alone", crew, {"text": "alone"}),
        pc.CrewStep("after alone", crew, {"text": "{{ alone.output }} too"}),
        pc.CrewStep("function", crew, {"text": lambda context: context.inputs["nothing"]}),
        pc.CrewStep("limited", server.crew(concurrency_limit="nobody-made-it"), {"text": "x"}),
    ]
    with pytest.raises(pc.PipelineFailedError) as raised:
        await pc.arun_pipeline(steps, {"first": "bad"}, name="failing", idempotency_key=idempotency_key)
    error = raised.value
    assert error.failed == ["bad", "function", "limited"]
    assert error.skipped == ["needs it", "needs that"]
    outputs = {name: result.output for name, result in error.results.items()}
    assert outputs == {"alone": "alone", "after alone": "alone too"}
    assert isinstance(error.errors["bad"], pc.CrewFailedError)
    assert "a function gave no input: KeyError: 'nothing'" in str(error.errors["function"])
    assert "nobody-made-it" in str(error.errors["limited"])
    assert "no bad" in str(error)
    assert "Not run because of this: needs it, needs that." in str(error)
    assert server.kickoffs == 3
    shown = await asyncio.to_thread(artifact, seen, "failing", idempotency_key)
    assert shown.count("✗ failed") == 3
    parts = ("### Step bad failed (attempt 1 of at most 3)", "no bad", "### Steps")
    assert [*parts] == sorted(parts, key=shown.index)
    assert shown.count("– not run") == 2


def chain(echo: CrewServer, fails_first: CrewServer) -> list[pc.CrewStep]:
    return [
        pc.CrewStep("a", echo.crew(), {"text": "a"}),
        pc.CrewStep("b", fails_first.crew(), {"text": "{{ a.output }}b"}),
        pc.CrewStep("c", echo.crew(), {"text": "{{ b.output }}c"}),
        pc.CrewStep("d", echo.crew(), {"text": "d"}),
    ]


async def test_the_same_key_repeats_only_what_failed(crew_server: CrewServerFactory, echo: CrewServer, seen: Seen):
    fails_first, idempotency_key = crew_server(FailsFirst()), key()
    with pytest.raises(pc.PipelineFailedError, match="out for lunch"):
        await pc.arun_pipeline(chain(echo, fails_first), name="repaired", idempotency_key=idempotency_key)
    assert (echo.kickoffs, fails_first.kickoffs) == (2, 1)
    result = await pc.arun_pipeline(chain(echo, fails_first), name="repaired", idempotency_key=idempotency_key)
    assert result["c"].output == "abc"
    again = await pc.arun_pipeline(chain(echo, fails_first), name="repaired", idempotency_key=idempotency_key)
    assert again["c"].output == "abc"
    assert echo.kickoffs_by_key == {f"{idempotency_key}/{step}": 1 for step in "acd"}
    assert fails_first.kickoffs_by_key == {f"{idempotency_key}/b": 2}
    pages = await asyncio.to_thread(seen.artifacts, "pipeline-repaired")
    pages = [one["data"] for one in pages if idempotency_key in one["description"]]
    assert [page.count("started earlier") for page in pages] == [0, 2, 4]


@pytest.mark.parametrize("given", [False, True], ids=["key-left-out", "key-given"])
def test_a_flow_retry_repeats_only_what_failed(crew_server: CrewServerFactory, echo: CrewServer, given: bool):
    fails_first, idempotency_key = crew_server(FailsFirst()), key() if given else None

    @flow(retries=1)
    async def trip() -> str:
        return (await pc.arun_pipeline(chain(echo, fails_first), idempotency_key=idempotency_key))["c"].output

    assert asyncio.run(trip()) == "abc"
    assert (echo.kickoffs, fails_first.kickoffs) == (3, 2)


@pytest.mark.parametrize(("secret", "inputs"), [("pin", None), ("code", {"text": "{{ topic }}", "pin": "{{ code }}"})])
async def test_a_retry_with_a_new_secret_reattaches(crew_server: CrewServerFactory, secret: str, inputs: Any):
    server = crew_server(script({"output": "{{ text }}"}, inputs=["text", "pin"]))
    crew, attempts = server.crew(secret_inputs=["pin"], allow_extra_inputs=True), list[str]()

    @flow(retries=1)
    async def trip() -> None:
        given = {"topic": "tea", "text": "tea", secret: f"fresh-{uuid.uuid4()}"}
        attempts.append((await pc.arun_pipeline([pc.CrewStep("a", crew, inputs)], given)).idempotency_key)
        if len(attempts) == 1:
            raise RuntimeError("after the first attempt")

    await trip()
    assert (server.kickoffs, len(set(attempts))) == (1, 1)


async def test_a_step_keeps_its_inputs_whatever_began_before(crew_server: CrewServerFactory):
    server = crew_server(script({"output": "{{ text }}", "seconds": "{{ text | int(0) }}"}, inputs=["text"]))
    repeats = crew_server(FailsFirst())
    steps = [
        pc.CrewStep("repeats", repeats.crew(), {"text": "{{ login.output }} {{ slow.output }}"}),
        pc.CrewStep("login", server.crew(), {"text": "token-4711"}),
        pc.CrewStep("slow", server.crew(), {"text": "1"}),
        pc.CrewStep("uses", server.crew(secret_inputs=["text"]), {"text": "{{ login.output }}"}),
    ]
    idempotency_key = key()
    with pytest.raises(pc.PipelineFailedError, match="repeats"):  # it began after `uses`, which has a secret input
        await pc.arun_pipeline(steps, idempotency_key=idempotency_key)
    again = await pc.arun_pipeline(steps, idempotency_key=idempotency_key)  # here it may begin before
    assert (again["repeats"].output, repeats.kickoffs, server.kickoffs) == ("token-4711 1", 2, 3)


async def test_a_step_may_decode_a_secret_that_is_no_text(crew_server: CrewServerFactory):
    server = crew_server(script({"output": "ok"}, inputs=["pin"]))
    step = pc.CrewStep("a", server.crew(secret_inputs=["pin"]), {"pin": lambda context: context.inputs["pin"].decode()})

    @flow
    async def trip() -> None:
        await pc.arun_pipeline([step], {"pin": b"hunter22"})

    await trip()
    assert server.kickoffs == 1


async def test_equal_pipelines_in_a_flow_differ_in_key(echo: CrewServer):
    steps = [pc.CrewStep("a", echo.crew(), {"text": "a"})]

    @flow
    async def trip() -> int:
        return len({(await pc.arun_pipeline(steps)).idempotency_key for _ in range(2)})

    assert await trip() == 2
    assert echo.kickoffs == 2


async def test_a_step_may_start_from_a_state(echo: CrewServer):
    state = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"
    first = pc.CrewStep("a", echo.crew(), {"text": "x"}, restore_from=state)
    await pc.arun_pipeline([first, pc.CrewStep("b", echo.crew(), {"text": "y"})], idempotency_key=key())
    assert {run.inputs["text"]: run.restore_from for run in echo.runs} == {"x": state, "y": None}
    with pytest.raises(pc.ConfigurationError, match="step 'a': restore_from is '42'"):
        await pc.arun_pipeline([pc.CrewStep("a", echo.crew(), {"text": "x"}, restore_from="42")])


async def test_steps_may_be_turns_of_a_session(crew_server: CrewServerFactory):
    journal = crew_server(JOURNAL)
    steps = [
        pc.CrewStep("a", journal.crew(), {"note": "tea"}, session="customer-{{ customer }}"),
        pc.CrewStep("b", journal.crew(), {"note": "rain"}, session="customer-{{ inputs.customer }}", after=["a"]),
        pc.CrewStep("c", journal.crew(), {"note": "{{ a.output }}"}),
    ]
    results = (await pc.arun_pipeline(steps, {"customer": 42}, idempotency_key=key())).results
    assert [results[name].output for name in "abc"] == ["1 tea", "2 rain after 1 tea", "1 1 tea"]
    assert (await pc.arun_crew(journal.crew(), {"note": "sun"}, session="customer-42")).output.startswith("3 sun")


async def test_a_pipeline_hides_the_error_of_a_crew_that_shows_nothing(crew_server: CrewServerFactory, seen: Seen):
    crew = crew_server(FAILS).crew(show="none")
    with pytest.raises(pc.PipelineFailedError):
        await asyncio.to_thread(pc.run_pipeline, [pc.CrewStep("a", crew)], name=(name := key()))
    (artifact,) = await asyncio.to_thread(seen.artifacts, pages.artifact_key(name, prefix="pipeline"))
    assert "CrewFailedError" in artifact["data"]
    assert "search engine" not in artifact["data"]


async def test_a_session_that_makes_no_sense_starts_no_step(crew_server: CrewServerFactory):
    journal, secret = crew_server(JOURNAL), SecretStr("tell-nobody")
    for session, inputs, problem in (
        ("{{ nobody }}", {}, "step 'a', session: 'nobody' is no step, and no input that has a value"),
        ("a\tb", {}, "step 'a': session is 'a.*it has to be a name of 1 to"),
        ("a{b", {}, "step 'a': session is 'a{b'; it has to be a name of 1 to"),
        ("of {{ who }}", {"who": ""}, "'of {{ who }}' cannot be filled: a value in it is empty"),
        ("of {{ who }}", {"who": None}, "'of {{ who }}' cannot be filled: a value in it is empty"),
        ("{{ who }}", {"who": secret}, "The session holds a secret input"),
        ("customer-{{ inputs.who }}", {"who": secret}, "The session holds a secret input"),
    ):
        steps = [pc.CrewStep("a", journal.crew(), {"note": "tea"}, session=session)]
        with pytest.raises((pc.ConfigurationError, pc.PipelineFailedError)) as caught:
            await pc.arun_pipeline(steps, inputs, idempotency_key=key())
        assert re.search(problem, str(caught.value))
        assert "tell-nobody" not in str(caught.value)
    assert journal.kickoffs == 0


async def test_other_inputs_under_a_key_start_nothing(echo: CrewServer):
    steps, idempotency_key = [pc.CrewStep("a", echo.crew(), {"text": "{{ topic }}"})], key()
    await pc.arun_pipeline(steps, {"topic": "tea"}, idempotency_key=idempotency_key)
    with pytest.raises(pc.PipelineFailedError, match="a: ") as raised:
        await pc.arun_pipeline(steps, {"topic": "cocoa"}, idempotency_key=idempotency_key)
    assert isinstance(raised.value.errors["a"], pc.IdempotencyConflictError)
    assert echo.kickoffs == 1


async def test_an_uncertain_step_stays_uncertain(crew_server: CrewServerFactory, echo: CrewServer):
    dropping, idempotency_key = crew_server("echo", faults=["kickoff:drop-after-accept@1"]), key()
    for _ in range(2):
        with pytest.raises(pc.PipelineFailedError) as raised:
            await pc.arun_pipeline(chain(echo, dropping), idempotency_key=idempotency_key)
        assert isinstance(raised.value.errors["b"], pc.KickoffUncertainError)
        assert raised.value.skipped == ["c"]
        assert sorted(raised.value.results) == ["a", "d"]
    assert (echo.kickoffs, dropping.kickoffs) == (2, 1)


async def test_a_cancelled_pipeline_goes_on_with_its_key(crew_server: CrewServerFactory, echo: CrewServer, seen: Seen):
    held, idempotency_key = Held(), key()
    held.output = "b"
    long = crew_server(held)
    steps = [
        pc.CrewStep("a", echo.crew(), {"text": "a"}),
        pc.CrewStep("b", long.crew(), {}, after=["a"]),
        pc.CrewStep("c", echo.crew(), {"text": "{{ b.output }}c"}),
    ]
    calls: list[asyncio.Task[Any]] = []

    @flow
    async def trip() -> None:
        calls.append(asyncio.ensure_future(pc.arun_pipeline(steps, name="cut", idempotency_key=idempotency_key)))
        with contextlib.suppress(asyncio.CancelledError):
            await calls[0]

    running = asyncio.ensure_future(trip())
    await until(lambda: long.requests["status"], "the second step is waited for")
    calls[0].cancel()
    await running
    assert str(long.runs[0].state) == "running"
    shown = await asyncio.to_thread(artifact, seen, "cut", idempotency_key)
    assert [mark for mark in ("✓ completed", "■ interrupted", "– not run") if mark not in shown] == []
    held.release()
    result = await pc.arun_pipeline(steps, idempotency_key=idempotency_key)
    assert result["c"].output == "bc"
    assert (echo.kickoffs, long.kickoffs) == (2, 1)


def test_events_tell_each_end_once_with_the_step(crew_server: CrewServerFactory, echo: CrewServer, seen: Seen):
    broken, idempotency_key = crew_server(FAILS), key()
    steps = [pc.CrewStep("good", echo.crew(), {"text": "a"}), pc.CrewStep("bad", broken.crew(), {})]
    for _ in range(2):
        with pytest.raises(pc.PipelineFailedError):
            pc.run_pipeline(steps, idempotency_key=idempotency_key)
    for server, step, kind in ((echo, "good", "crew.completed"), (broken, "bad", "crew.failed")):
        for run in server.runs:
            (event,) = [one for one in seen.events(run.id) if one["event"] in ("crew.completed", "crew.failed")]
            assert event["event"] == kind
            related = {one["prefect.resource.role"]: one["prefect.resource.id"] for one in event["related"]}
            assert related["step"] == f"prefect-crew.step.{step}"
            assert related["flow-run"].startswith("prefect.flow-run.")
            assert event["payload"]["idempotency_key"] == f"{idempotency_key}/{step}"


def test_a_step_makes_two_tasks_and_no_subflow(echo: CrewServer, seen: Seen):
    steps = [pc.CrewStep(str(n), echo.crew(), {"text": str(n)}) for n in range(3)]
    flow_run_id, _ = call_in_flow(lambda: pc.arun_pipeline(steps))
    assert seen.subflow_runs(flow_run_id) == []
    names = sorted(run["name"] for run in seen.task_runs(flow_run_id, count=6))
    assert names == [f"{verb} {n}" for verb in ("kickoff", "wait") for n in range(3)]


def test_prefects_graph_shows_what_a_step_needs(echo: CrewServer, seen: Seen):
    needs: dict[str, Any] = {"template": "{{ first.output }}", "mixed": "on {{ first.output }}", "after": "x"}
    needs["function"] = lambda context: context["first"].output.upper()
    steps = [pc.CrewStep("first", echo.crew(), {"text": "a"})]
    for name, text in needs.items():
        after = ["first"] if name in ("after", "function") else []
        steps.append(pc.CrewStep(name, echo.crew(), {"text": text}, after=after))
    flow_run_id, _ = call_in_flow(lambda: pc.arun_pipeline(steps))
    runs = {run["name"]: run for run in seen.task_runs(flow_run_id, count=10)}
    first = runs["wait first"]["id"]
    for name in needs:
        inputs = [source.get("id") for given in runs[f"kickoff {name}"]["task_inputs"].values() for source in given]
        assert first in inputs, name
    assert runs["kickoff first"]["task_inputs"].get("wait_for", []) == []


@pytest.mark.parametrize("inside", [True, False], ids=["in a flow", "in a script"])
async def test_an_input_that_cannot_be_sent_is_refused(echo: CrewServer, inside: bool):
    async def trip() -> None:
        await pc.arun_pipeline([pc.CrewStep("a", echo.crew(), {"text": lambda context: "a"})], {"o": object()})

    with pytest.raises(pc.ConfigurationError, match="Input 'o' holds a value of type object, which cannot be sent"):
        await (flow(trip)() if inside else trip())
    assert echo.kickoffs == 0


async def test_a_suspended_flow_run_goes_on(crew_server: CrewServerFactory, echo: CrewServer, seen: Seen):
    held, idempotency_key = Held(), key()
    server = crew_server(held)
    steps = [
        pc.CrewStep("held", server.crew(), {}),
        pc.CrewStep("next", echo.crew(), {"text": "{{ held.output }}"}),
        pc.CrewStep("last", echo.crew(), {"text": "{{ next.output }}"}),
    ]

    @flow
    async def trip() -> str:
        return (await pc.arun_pipeline(steps, name="suspended", idempotency_key=idempotency_key))["last"].output

    async with get_client() as client:
        deployment = await client.create_deployment(await client.create_flow(trip), f"suspended-{uuid.uuid4()}")
        planned = await client.create_flow_run_from_deployment(deployment)

        async def suspend() -> None:
            await until(lambda: server.requests["status"], "the first step is waited for")
            await asuspend_flow_run(flow_run_id=planned.id)
            held.release()

        suspending = asyncio.create_task(suspend())
        with pytest.raises(Pause):
            await run_flow_async(trip, flow_run=await client.read_flow_run(planned.id))
        await suspending
        shown = await asyncio.to_thread(artifact, seen, "suspended", idempotency_key)
        assert [row.split(" | ")[2] for row in shown.splitlines() if row.startswith("| **")] == [
            *("■ interrupted", "– not run", "– not run")
        ]
        await client.resume_flow_run(planned.id)
        assert await run_flow_async(trip, flow_run=await client.read_flow_run(planned.id)) == "done"
    assert [echo.kickoffs, server.kickoffs] == [2, 1]


# Secrets reach the crews that need them, and are stored and shown nowhere

LOGIN = script({"output": "logged in as {{ user }} with {{ password }}"}, inputs=["user", "password"])
REPEATS = script({"name": "say", "output": "{{ text }}"}, inputs=["text"])
REFUSES = script({"name": "say", "fail": "refused: {{ text }}"}, inputs=["text"])

LOGS_IN = {"user": "me", "password": "{{ login }}"}
TO_ANOTHER = [("a", LOGS_IN), ("b", {"text": "as {{ login }}"})]
REPEATED = [("a", LOGS_IN), ("b", {"text": "{{ a.output }} {{ login | upper }}"})]
BY_A_FUNCTION = {"user": "me", "password": lambda context: context.inputs["login"]}
WAYS: dict[str, tuple[list[tuple[str, Any]], str, bool]] = {
    # steps, the pipeline's input with the secret, and whether it is a plain text that only the crew calls secret
    "a SecretStr of the crew's name": ([("a", None)], "password", False),
    "a text that a function puts into a secret input": ([("a", BY_A_FUNCTION)], "login", True),
    "a text that goes to another crew as well": (TO_ANOTHER, "login", True),
    "an output that repeats it, and a template that changes it": (REPEATED, "login", False),
    "a secret of the step itself": ([("a", None)], "other", False),
}


async def test_a_secret_reaches_only_the_crew(crew_server: CrewServerFactory, prefect_api: PrefectServer, caplog: Any):
    secrets = {way: f"hunter-{uuid.uuid4().hex}" for way in WAYS}
    first, second = crew_server(LOGIN), crew_server(REPEATS)
    with caplog.at_level(logging.DEBUG):
        for way, (steps, name, is_plain) in WAYS.items():
            secret = secrets[way]
            crews = {"a": first.crew(secret_inputs=["password"] if is_plain else []), "b": second.crew()}
            made = [pc.CrewStep(step, crews[step], inputs, after="a" if step == "b" else []) for step, inputs in steps]
            if way == "a secret of the step itself":
                made = [pc.CrewStep("a", first.crew(), {"user": "me", "password": SecretStr(secret)})]
            given = {"user": "me", name: secret if is_plain else SecretStr(secret)}
            result = await asyncio.to_thread(pc.run_pipeline, made, given, name=f"secret {way}")
            assert result["a"].output == f"logged in as me with {secret}"
            assert len(steps) == 1 or secret in second.runs[-1].inputs["text"]
    kept = await asyncio.to_thread(stored_texts, prefect_api)
    assert "secret a SecretStr of the crew's name" in kept
    shown = caplog.text + kept
    assert [way for way, secret in secrets.items() if secret in shown or secret.upper() in shown] == []


async def test_no_error_tells_a_secret(crew_server: CrewServerFactory, prefect_api: PrefectServer, caplog: Any):
    secret = f"hunter-{uuid.uuid4().hex}"

    def breaks(context: pc.PipelineContext) -> Any:
        raise ValueError(f"no {context.inputs['login'].get_secret_value()}")

    steps = [
        pc.CrewStep("a", crew_server(REFUSES).crew(), {"text": "as {{ login }}"}),
        pc.CrewStep("b", crew_server(REPEATS).crew(), {"text": "{{ (login ~ 'x') + 1 }}"}),
        pc.CrewStep("c", crew_server(REPEATS).crew(), {"text": breaks}),
    ]
    with pytest.raises(pc.PipelineFailedError) as raised:
        await asyncio.to_thread(pc.run_pipeline, steps, {"login": SecretStr(secret)})
    assert sorted(raised.value.errors) == ["a", "b", "c"]
    assert f"refused: {MASK}" in str(raised.value.errors["a"])
    assert isinstance(raised.value.errors["c"], pc.ConfigurationError)
    assert f"no {MASK}" in str(raised.value.errors["c"])
    assert secret not in f"{raised.value} {raised.value.errors}" + caplog.text
    assert secret not in await asyncio.to_thread(stored_texts, prefect_api)
