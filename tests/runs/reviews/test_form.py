"""A person answers in Prefect's own form: on the page of the flow run that waits, one question at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from prefect import flow
from prefect.runtime import flow_run as this_flow_run

from prefect_crew import CrewTimeoutError, DeployedCrew, Review, WaitPolicy, arun_crew
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.reviews import form
from prefect_crew.testing import CrewServerFactory
from support.chromium import Chromium
from support.links import answers_of
from support.prefect_server import PrefectServer
from support.proxy import Proxy
from support.review_page import answer_on_page
from support.scripts import script
from support.seen import Seen
from support.waiting import wait_until

DRAFT = "# On {{ topic }}\n\nDraft *number {{ round }}* <b>for you</b>. {{ feedback }}"
SCRIPT = script(
    {"name": "draft", "agent": "Writer", "human": True, "output": DRAFT},
    {"name": "print", "agent": "Printer", "output": "Printed: {{ tasks.draft.output }}"},
    inputs=["topic"],
)
pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "LOOK_EVERY", 0.2)


@pytest.fixture
def server(crew_server: CrewServerFactory) -> CrewServer:
    return crew_server(SCRIPT)


class FlowRun:
    """A flow run in a thread of its own, in which a coroutine function is called, and its page.

    The page is read and filled in as Prefect's own does.
    """

    def __init__(self, seen: Seen, work: Callable[[], Any], **options: Any) -> None:
        self.id = ""
        self.key: str | None = None
        self._seen, self._outcome = seen, Future[Any]()

        @flow(**options)
        async def reviewed() -> Any:
            self.id = str(this_flow_run.id)
            return await work()

        def run() -> None:
            try:
                self._outcome.set_result(asyncio.run(reviewed()))
            except BaseException as error:
                self._outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    @property
    def state(self) -> dict[str, Any]:
        return self._seen.flow_run(self.id)["state"] if self.id else {"type": None}

    def form(self) -> FlowRun:
        """Wait until a form is up, another one than before."""

        def is_up() -> bool:
            state = self.state
            if state["type"] != "PAUSED" or state["state_details"]["pause_key"] == self.key:
                return False
            # A form is there once its fields are stored, a moment after the pause.
            return state["state_details"]["run_input_keyset"]["description"] in self.inputs()

        wait_until(is_up, "a form")
        self.key = self.state["state_details"]["pause_key"]
        return self

    def _stored(self, part: str) -> Any:
        name = self.state["state_details"]["run_input_keyset"][part]
        return self._seen.get(f"/flow_runs/{self.id}/input/{name}")

    def description(self) -> str:
        return self._stored("description")

    def question(self) -> str:
        """Return the name of what the form is about, as a page that shows it submits it."""
        return self._stored("schema")["properties"]["question"]["default"]

    def inputs(self) -> list[str]:
        """Return the names of all that is stored of its forms."""
        body = {"prefix": "crew-review-", "limit": 20, "exclude_keys": []}
        return sorted(one["key"] for one in self._seen.post(f"/flow_runs/{self.id}/input/filter", body))

    def fill_in(self, **fields: Any) -> str:
        """Submit the form as Prefect's page does, by default to approve; return the status of its answer."""
        body = {"run_input": {"decision": "approve", **fields}}
        return self._seen.post(f"/flow_runs/{self.id}/resume", body)["status"]

    def result(self) -> Any:
        result = self._outcome.result(90)
        assert self.state["type"] == "COMPLETED"
        return result


@pytest.fixture
def asking(server: CrewServer, seen: Seen) -> Callable[..., FlowRun]:
    """Provide a function that runs the crew, whose questions stand in a form, in a flow run."""

    def run(crew: DeployedCrew | None = None, topic: str = "tea", **options: Any) -> FlowRun:
        crew, flow_options = crew or server.crew(), options.pop("flow", {})
        return FlowRun(seen, lambda: arun_crew(crew, {"topic": topic}, review="form", **options), **flow_options)

    return run


def test_the_form_takes_each_answer_once(server: CrewServer, asking: Any, seen: Seen, key: str) -> None:
    run = asking(idempotency_key=key).form()
    assert "Draft *number 1* <\u2060b>for you" in run.description(), "a tag is text"
    assert "question 1" in run.description()
    assert run.fill_in(decision="maybe") == "REJECT"
    kickoff_id = server.runs[0].id
    assert kickoff_id in run.question()
    assert run.fill_in(question=f"draft, question 7, run {kickoff_id}") == "REJECT", "from a page that is out of date"
    assert run.fill_in(decision="reject", feedback=" ") == "ACCEPT"
    assert "Draft *number 1*" in run.form().description(), "a rejection without feedback is asked again"
    assert run.fill_in(decision="reject", feedback="Warmer.", name="Grace | <b>") == "ACCEPT"
    assert "Draft *number 2*" in run.form().description()
    assert run.fill_in(name="Ada", question=run.question()) == "ACCEPT"
    assert "Warmer." in run.result().output
    assert server.requests["resume"] == 2

    async def answers() -> list[tuple[Any, ...]]:
        return [(one.round, one.approve, one.by, one.feedback) for one in await answers_of(key)]

    assert asyncio.run(answers()) == [(1, False, "Grace | <b>", "Warmer."), (2, True, "Ada", "")]
    # The last page of the key: an earlier test's crew may have had the same port.
    page = seen.artifacts(artifact_key(server.crew().label))[-1]
    assert "### Answers" in page["data"]
    assert "| draft | 1 | rejected | Grace \\| &lt;b&gt; |" in page["data"]
    assert "| draft | 2 | approved | Ada |" in page["data"]


def test_an_unstored_form_is_stored_later(asking: Any, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.refuse, proxy.answer = "POST .*/input$", "503"
    run = asking()
    wait_until(lambda: "is not on its page yet" in caplog.text, "a warning")
    assert run.state["type"] == "PAUSED"
    proxy.refuse = None
    assert run.form().fill_in(question=run.question()) == "ACCEPT"
    assert run.result().output.startswith("Printed")


def test_two_questions_of_a_flow_run_stand_in_line(server: CrewServer, seen: Seen) -> None:
    ended: list[str] = []

    async def one(topic: str, review: Any) -> None:
        await arun_crew(server.crew(), {"topic": topic}, review=review)
        ended.append(topic)

    reviews = {"tea": "form", "coffee": "form", "milk": lambda _: Review(approve=True)}
    run = FlowRun(seen, lambda: asyncio.gather(*(one(topic, review) for topic, review in reviews.items()))).form()
    wait_until(lambda: "milk" in ended, "the run that needs nobody")
    asked = [run.description()]
    run.fill_in()
    asked.append(run.form().description())
    run.fill_in()
    run.result()
    assert len(ended) == 3
    assert {"tea" in text for text in asked} == {True, False}
    assert server.requests["resume"] == 3


@pytest.mark.parametrize("seconds", [0, 2])
def test_an_old_answer_is_not_for_the_next(crew_server: Any, asking: Any, seconds: float) -> None:
    """Where no state is seen in between, as with the first of these servers, the texts tell them apart."""
    draft = {"name": "draft", "human": True, "seconds": seconds, "output": "Draft number {{ round }}."}
    server = crew_server(script(draft, inputs=["topic"]))
    run = asking(server.crew()).form()
    page = run.question()

    async def reject() -> None:
        async with server.crew().client() as client:
            await client.resume(server.runs[0].id, "draft", "Colder.", False)

    asyncio.run(reject())
    assert run.form().fill_in(name="Ada", question=page) == "REJECT"
    assert server.requests["resume"] == 1
    assert run.fill_in(name="Ada", question=run.question()) == "ACCEPT"
    assert run.result().output == "Draft number 2."


def test_one_of_two_flow_runs_answers(server: CrewServer, asking: Any, key: str) -> None:
    runs = [asking(idempotency_key=key) for _ in range(2)]
    for run in runs:
        run.form()
    with ThreadPoolExecutor() as people:
        # Prefect may accept both before one is read.
        list(people.map(FlowRun.fill_in, runs))
    (output,) = {run.result().output for run in runs}
    assert output.startswith("Printed")
    assert [server.requests["resume"], server.kickoffs] == [1, 1]
    assert [run.inputs() for run in runs] == [[], []]


def test_a_form_without_an_answer_comes_back(asking: Any, seen: Seen) -> None:
    run = asking().form()
    seen.set_state(run.id, "RUNNING")
    run.form().fill_in()
    assert run.result().output.startswith("Printed")


def test_nobody_answers_in_time(server: CrewServer, asking: Any, seen: Seen) -> None:
    run = asking(wait=WaitPolicy(human_timeout=1.5))
    with pytest.raises(CrewTimeoutError, match=r"human time limit of 1\.5 s"):
        run.result()
    states = [state["type"] for state in seen.get(f"/flow_run_states/?flow_run_id={run.id}")]
    assert states == ["PENDING", "RUNNING", "PAUSED", "RUNNING", "FAILED"]
    assert run.inputs() == []
    assert server.requests["resume"] == server.requests["stop"] == 0


def test_an_answer_that_is_read_late_counts(server: CrewServer, asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "LOOK_EVERY", 17.0)
    run = asking(wait=WaitPolicy(human_timeout=15, on_human_timeout="reject")).form()
    run.fill_in()
    assert run.result().output.startswith("Printed")
    assert server.requests["resume"] == 1


def test_an_unsent_answer_is_kept_for_the_retry(server: CrewServer, asking: Any) -> None:
    server.faults.add("resume:401-before-accept@1")
    # Two, since Prefect counts the form as one of them.
    run = asking(flow={"retries": 2, "retry_delay_seconds": 1}).form()
    run.fill_in()
    assert run.result().output.startswith("Printed")
    assert server.requests["resume"] == 2, "the first of them was refused"
    assert server.kickoffs == 1


@pytest.mark.parametrize("fields", [{"secret_inputs": ["topic"]}, {"show": "summary"}], ids=["secret", "summary"])
def test_what_may_not_be_shown_is_not_in_the_form(server: CrewServer, asking: Any, fields: dict[str, Any]) -> None:
    run = asking(server.crew(**fields), "correct horse").form()
    assert "correct horse" not in run.description()
    assert ("Draft *number 1*" in run.description()) is ("show" not in fields)
    run.fill_in()
    run.result()


@pytest.mark.slow
@pytest.mark.parametrize("ui", ["v1", "v2"], ids=["older-interface", "newer-interface"])
def test_a_person_answers_on_the_page(
    prefect_server: PrefectServer,
    server: CrewServer,
    asking: Any,
    chromium: Chromium,
    ui: Literal["v1", "v2"],
    tmp_path: Path,
) -> None:
    run = asking(flow={"name": "reviewed-report"}).form()
    with chromium.page(height=1100) as page:
        where = page, prefect_server.ui_url, run.id, ui
        answer_on_page(*where, "reject", "Warmer, please.", tmp_path / f"{ui}-rejecting.png", round=1)
        run.form()
        answer_on_page(*where, "approve", "", tmp_path / f"{ui}-approving.png", round=2)
    assert "Warmer, please." in run.result().output
    assert server.requests["resume"] == 2
