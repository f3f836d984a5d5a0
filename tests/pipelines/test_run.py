"""Pipelines, with real crews and a real Prefect server: the order of steps, what is started, what failures leave."""

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
from prefect_crew.devserver import CrewServer
from prefect_crew.pipelines import artifact as pages
from prefect_crew.runs import wait
from prefect_crew.runs.database import in_store
from prefect_crew.store.attempts import of_key
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import call_in_flow
from support.held import FailsFirst, Held
from support.past import key
from support.prefect_server import PrefectServer, stored_texts
from support.scripts import JOURNAL, script
from support.seen import Seen
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

FAILS_ON = script({"fail": "{{ 'no ' ~ text if text == 'bad' else '' }}", "output": "{{ text }}"}, inputs=["text"])
"""Gives back its text, unless that is "bad"."""


@pytest.fixture
def echo(crew_server: CrewServerFactory) -> CrewServer:
    return crew_server("echo")


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
    assert [run.inputs["text"] for run in echo.runs][2:] == ["on tea & tea costs", "ON TEA & TEA COSTS", "bye"]
    assert echo.requests["inputs"] == 1, "a crew is asked once, however many steps it has"
    assert (await pc.aget_result(f"{idempotency_key}/write")).output == "on tea & tea costs"
    assert [attempt.step for attempt in await in_store(of_key, f"{idempotency_key}/write")] == ["write"]
    with pytest.raises(pc.PipelineFailedError) as raised:  # other inputs under the key
        await pc.arun_pipeline(steps, {"topic": "cocoa"}, idempotency_key=idempotency_key)
    assert isinstance(raised.value.errors["research"], pc.IdempotencyConflictError)
    assert echo.kickoffs_by_key == {f"{idempotency_key}/{step.name}": 1 for step in steps}


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


async def test_each_step_has_its_crew_and_token(crew_server: CrewServerFactory):
    first = crew_server("echo", token="first-token", faults=["inputs:404"])  # which is no obstacle
    other = crew_server("echo", token="other-token")
    await other.crew().asave(name := f"other-{uuid.uuid4().hex[:8]}")
    old = await pc.DeployedCrew.aload(name)
    old.token = SecretStr("of-last-year")  # it was rotated since
    steps = [
        pc.CrewStep("a", first.crew(), {"text": "a"}),
        pc.CrewStep("b", name, {"text": "{{ a.output }}b"}),
        pc.CrewStep("c", old, {"text": "{{ b.output }}c"}),
    ]
    assert (await pc.arun_pipeline(steps))["c"].output == "abc"
    assert first.kickoffs == 1
    assert other.kickoffs == 2


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
        pc.CrewStep("b", "no-such-block", {}),
        pc.CrewStep("c", refused, {}),
        pc.CrewStep("d", pc.DeployedCrew(url=server.url, token="two words"), {}),
    ]
    with pytest.raises(pc.ConfigurationError) as raised:
        await pc.arun_pipeline(steps, {"topic": "tea"})
    for part in (
        *("nothing was started", "'topik' is no step, and no input that has a value", "no-such-block", "401"),
        *("step 'a' lacks the inputs tone of its crew", "blanks or letters that no HTTP header can carry"),
    ):
        assert part in str(raised.value), part
    assert server.kickoffs == 0


async def test_a_crew_that_is_away_blocks_only_a_step_whose_inputs_it_would_name(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server(FAILS_ON, faults=["inputs:500"]), key()
    crew = server.crew()
    steps = [pc.CrewStep("a", crew, {"text": "a"}), pc.CrewStep("b", crew, {"text": "{{ a.output }}b"})]
    with pytest.raises(pc.ConfigurationError, match=r"'c' gives no inputs.*crew .* cannot be asked for its inputs"):
        await pc.arun_pipeline([*steps, pc.CrewStep("c", crew)], {"text": "c"}, idempotency_key=idempotency_key)
    assert server.kickoffs == 0
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
    shown = ("research: crew travel", "write: crew travel, after research", "send: crew travel, after write")
    shown = (*shown, "tell: crew travel, after send")
    assert str(plan) == "\n\n".join(f"{step}\n  text = ********\n  password = ********" for step in shown)
    assert server.kickoffs == 0


async def test_a_step_without_a_result_that_its_template_needs_fails(crew_server: CrewServerFactory):
    server = crew_server(FAILS_ON)
    texts = {"a": "tea", "b": "on {{ a.data }}", "c": "on {{ a.data or a.output }}"}
    steps = [pc.CrewStep(name, server.crew(), {"text": text}) for name, text in texts.items()]
    with pytest.raises(pc.PipelineFailedError) as raised:
        await pc.arun_pipeline(steps, idempotency_key=key())
    assert raised.value.failed == ["b"]
    assert "The template 'on {{ a.data }}' cannot be filled: a value in it is null" in str(raised.value)
    assert [run.inputs["text"] for run in server.runs] == ["tea", "on tea"]


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
        pc.CrewStep(
            "hidden", server.crew(budgets=[pc.Budget(max_cost=1, name="nobody-made-it")], show="none"), {"text": "x"}
        ),
    ]
    with pytest.raises(pc.PipelineFailedError) as raised:
        await pc.arun_pipeline(steps, {"first": "bad"}, name="failing", idempotency_key=idempotency_key)
    error = raised.value
    assert error.failed == ["bad", "function", "hidden"]
    assert error.skipped == ["needs it", "needs that"]
    outputs = {name: result.output for name, result in error.results.items()}
    assert outputs == {"alone": "alone", "after alone": "alone too"}
    assert isinstance(error.errors["bad"], pc.CrewFailedError)
    assert "a function gave no input: KeyError: 'nothing'" in str(error.errors["function"])
    assert "nobody-made-it" in str(error.errors["hidden"])
    assert "no bad" in str(error)
    assert "Not run because of this: needs it, needs that." in str(error)
    assert server.kickoffs == 3
    shown = await asyncio.to_thread(artifact, seen, "failing", idempotency_key)
    assert shown.count("✗ failed") == 3
    assert "\nConfigurationError\n" in shown, "the error of a crew that shows nothing"
    assert "nobody-made-it" not in shown
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
    assert echo.kickoffs == 2
    assert fails_first.kickoffs == 1
    result = await pc.arun_pipeline(chain(echo, fails_first), name="repaired", idempotency_key=idempotency_key)
    assert result["c"].output == "abc"
    again = await pc.arun_pipeline(chain(echo, fails_first), name="repaired", idempotency_key=idempotency_key)
    assert again["c"].output == "abc"
    assert echo.kickoffs_by_key == {f"{idempotency_key}/{step}": 1 for step in "acd"}
    assert fails_first.kickoffs_by_key == {f"{idempotency_key}/b": 2}
    pages = await asyncio.to_thread(seen.artifacts, "pipeline-repaired")
    assert len([page for page in pages if idempotency_key in page["description"]]) == 3, "one for each call"


async def test_a_flow_retry_repeats_only_what_failed(crew_server: CrewServerFactory, echo: CrewServer):
    fails_first = crew_server(FailsFirst())

    @flow(retries=1)
    async def trip() -> list[pc.PipelineResult]:
        return [await pc.arun_pipeline(chain(echo, fails_first)) for _ in range(2)]

    first, second = await trip()
    assert first["c"].output == second["c"].output == "abc"
    assert first.idempotency_key != second.idempotency_key
    assert echo.kickoffs == 6
    assert fails_first.kickoffs == 3


@pytest.mark.parametrize(
    ("secret", "inputs"),
    [
        ("pin", None),
        ("code", {"text": "{{ topic }}", "pin": "{{ code }}"}),
        ("pin", {"text": "{{ topic }}", "pin": lambda context: context.inputs["pin"].decode()}),
    ],
    ids=["by its name", "by a template", "as bytes, by a function"],
)
async def test_a_retry_with_a_new_secret_reattaches(crew_server: CrewServerFactory, secret: str, inputs: Any):
    server = crew_server(script({"output": "{{ text }}"}, inputs=["text", "pin"]))
    crew, attempts = server.crew(secret_inputs=["pin"], allow_extra_inputs=True), list[str]()

    @flow(retries=1)
    async def trip() -> None:
        value = f"fresh-{uuid.uuid4()}"
        given = {"topic": "tea", "text": "tea", secret: value.encode() if inputs and secret == "pin" else value}
        attempts.append((await pc.arun_pipeline([pc.CrewStep("a", crew, inputs)], given)).idempotency_key)
        if len(attempts) == 1:
            raise RuntimeError("after the first attempt")

    await trip()
    assert server.kickoffs == 1
    assert len(set(attempts)) == 1


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
    assert again["repeats"].output == "token-4711 1"
    assert repeats.kickoffs == 2
    assert server.kickoffs == 3


async def test_a_step_may_start_from_a_state(echo: CrewServer):
    state = str(uuid.uuid4())
    first = pc.CrewStep("a", echo.crew(), {"text": "x"}, restore_from=state)
    await pc.arun_pipeline([first, pc.CrewStep("b", echo.crew(), {"text": "y"})], idempotency_key=key())
    assert {run.inputs["text"]: run.restore_from for run in echo.runs} == {"x": state, "y": None}


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


async def test_a_session_that_makes_no_sense_starts_no_step(crew_server: CrewServerFactory):
    journal, secret = crew_server(JOURNAL), SecretStr("tell-nobody")
    for session, inputs, problem in (
        ("{{ nobody }}", {}, "step 'a', session: 'nobody' is no step, and no input that has a value"),
        ("a{b", {}, "step 'a': session has to be a name of 1 to"),
        ("of {{ who }}", {"who": ""}, "'of {{ who }}' cannot be filled: a value in it is empty"),
        ("of {{ who }}", {"who": None}, "'of {{ who }}' cannot be filled: a value in it is null"),
        ("customer-{{ inputs.who }}", {"who": secret}, "step 'a': its session may tell a secret input"),
    ):
        steps = [pc.CrewStep("a", journal.crew(), {"note": "tea"}, session=session)]
        with pytest.raises((pc.ConfigurationError, pc.PipelineFailedError)) as caught:
            await pc.arun_pipeline(steps, inputs, idempotency_key=key())
        assert re.search(problem, str(caught.value))
        assert "tell-nobody" not in str(caught.value)
    assert journal.kickoffs == 0


@pytest.mark.parametrize("is_suspended", [False, True], ids=["cancelled", "suspended"])
async def test_an_interrupted_pipeline_goes_on_with_its_key(
    crew_server: CrewServerFactory, echo: CrewServer, seen: Seen, monkeypatch: pytest.MonkeyPatch, is_suspended: bool
):
    monkeypatch.setattr(wait, "SHOW_EVERY", 0.3)
    monkeypatch.setattr(pages, "SHOW_AFTER", 0.1)
    monkeypatch.setattr(pages, "SHOW_EVERY", 0.1)
    held, idempotency_key = Held(), key()
    long, calls = crew_server(held), list[asyncio.Task[Any]]()
    steps = [
        pc.CrewStep("a", echo.crew(), {"text": "a"}),
        pc.CrewStep("b", long.crew(), {}, after=["a"]),
        pc.CrewStep("c", echo.crew(), {"text": "{{ b.output }}c"}),
    ]

    @flow
    async def trip() -> Any:
        calls.append(asyncio.ensure_future(pc.arun_pipeline(steps, name="cut", idempotency_key=idempotency_key)))
        with contextlib.suppress(asyncio.CancelledError):
            return (await calls[-1])["c"].output

    async def is_linked() -> bool:
        pages = await asyncio.to_thread(seen.artifacts, "pipeline-cut")
        return any(idempotency_key in page["description"] and page["data"].count("../artifact/") == 2 for page in pages)

    async with get_client() as client:
        deployment = await client.create_deployment(await client.create_flow(trip), key())
        planned = await client.create_flow_run_from_deployment(deployment)
        running = asyncio.ensure_future(run_flow_async(trip, flow_run=await client.read_flow_run(planned.id)))
        await until(is_linked, "the page links to the second step, which runs")
        if is_suspended:
            await asuspend_flow_run(flow_run_id=planned.id)
            held.release()
            with pytest.raises(Pause):
                await running
        else:
            calls[0].cancel()
            assert await running is None
            assert str(long.runs[0].state) == "running"
            held.release()
        shown = await asyncio.to_thread(artifact, seen, "cut", idempotency_key)
        states = [row.split(" | ")[2] for row in shown.splitlines() if row.startswith("| **")]
        assert states == ["✓ completed", "■ interrupted", "– not run"]
        if is_suspended:
            await client.resume_flow_run(planned.id)
            assert await run_flow_async(trip, flow_run=await client.read_flow_run(planned.id)) == "donec"
        else:
            assert (await pc.arun_pipeline(steps, idempotency_key=idempotency_key))["c"].output == "donec"
    assert echo.kickoffs == 2
    assert long.kickoffs == 1


def test_a_step_makes_two_tasks_that_show_its_needs(echo: CrewServer, seen: Seen):
    needs: dict[str, Any] = {"template": "{{ first.output }}", "mixed": "on {{ first.output }}", "after": "x"}
    needs["function"] = lambda context: context["first"].output.upper()
    steps = [pc.CrewStep("first", echo.crew(), {"text": "a"})]
    for name, text in needs.items():
        after = ["first"] if name in ("after", "function") else []
        steps.append(pc.CrewStep(name, echo.crew(), {"text": text}, after=after))
    flow_run_id, _ = call_in_flow(lambda: pc.arun_pipeline(steps))
    runs = {run["name"]: run for run in seen.task_runs(flow_run_id, count=10)}
    assert sorted(runs) == sorted(f"{verb} {step.name}" for verb in ("kickoff", "wait") for step in steps)
    assert seen.subflow_runs(flow_run_id) == []
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


# Secrets reach the crews that need them, and are stored and shown nowhere

LOGIN = script({"output": "logged in as {{ user }} with {{ password }}"}, inputs=["user", "password"])
REPEATS = script({"name": "say", "output": "{{ text }}"}, inputs=["text"])
REFUSES = script({"name": "say", "fail": "refused: {{ text }}"}, inputs=["text"])


async def test_a_secret_reaches_only_the_crew(crew_server: CrewServerFactory, prefect_api: PrefectServer, caplog: Any):
    first, second = crew_server(LOGIN), crew_server(REPEATS)
    plain, hiding, other = first.crew(), first.crew(secret_inputs=["password"]), second.crew()
    logs_in = {"user": "me", "password": "{{ login }}"}
    by_function = {"user": "me", "password": lambda context: context.inputs["login"]}

    def pipelines(secret: str) -> dict[str, tuple[list[pc.CrewStep], dict[str, Any]]]:
        to_both = [pc.CrewStep("a", hiding, logs_in), pc.CrewStep("b", other, {"text": "as {{ login }}"}, after="a")]
        repeated = {"text": "{{ a.output }} {{ login | upper }}"}
        own = pc.CrewStep("a", plain, {"user": "me", "password": SecretStr(secret)})
        return {
            "typed, by the name of the crew's input": ([pc.CrewStep("a", plain)], {"password": SecretStr(secret)}),
            "text, by a function": ([pc.CrewStep("a", hiding, by_function)], {"login": secret}),
            "text, to another crew as well": (to_both, {"login": secret}),
            "typed, in an output and changed by a template": (
                [pc.CrewStep("a", plain, logs_in), pc.CrewStep("b", other, repeated)],
                {"login": SecretStr(secret)},
            ),
            "typed, of the step itself": ([own], {}),
        }

    secrets = {way: f"hunter-{uuid.uuid4().hex}" for way in pipelines("")}
    with caplog.at_level(logging.DEBUG):
        for way, secret in secrets.items():
            steps, inputs = pipelines(secret)[way]
            result = await asyncio.to_thread(pc.run_pipeline, steps, {"user": "me", **inputs}, name=f"secret {way}")
            assert result["a"].output == f"logged in as me with {secret}"
            assert len(steps) == 1 or secret in second.runs[-1].inputs["text"]
    kept = await asyncio.to_thread(stored_texts, prefect_api)
    assert "secret typed, of the step itself" in kept
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
    assert "withheld: it may contain secret inputs" in str(raised.value.errors["a"])
    assert "cannot be made (ValueError, whose text may hold a secret input)" in str(raised.value.errors["c"])
    assert secret not in f"{raised.value} {raised.value.errors}" + caplog.text
    assert secret not in await asyncio.to_thread(stored_texts, prefect_api)
