"""A person answers in Prefect's own form: on the page of the flow run that waits, one question at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as this_flow_run
from prefect.states import Running

from prefect_crew import CrewTimeoutError, DeployedCrew, Review, WaitPolicy, arun_crew, resume_crew
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.devserver import CrewServer
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews import form
from support.asking import AskingServer
from support.chromium import Chromium
from support.prefect_server import PrefectServer
from support.proxy import Proxy
from support.review_page import answer_on_page
from support.scripts import script
from support.seen import Seen
from support.waiting import wait_until
from support.webhooks import served

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
def server() -> Iterator[CrewServer]:
    with CrewServer(SCRIPT, response_format="union") as server:
        yield server


class FlowRun:
    """A flow run in a thread of its own, in which a coroutine function is called, and its page.

    The page is read and filled in as Prefect's own does.
    """

    def __init__(self, work: Callable[[], Any], **options: Any) -> None:
        self.id: Any = None
        self._outcome: Any = None

        @flow(**options)
        async def reviewed() -> Any:
            self.id = this_flow_run.id
            return await work()

        def run() -> None:
            try:
                self._outcome = asyncio.run(reviewed())
            except BaseException as error:
                self._outcome = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def state(self) -> State[Any] | None:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(self.id).state if self.id else None

    def form(self, *, not_key: str | None = None) -> str:
        """Wait until a form is up, another one than that of the key, and return its key."""

        def up() -> str | None:
            state = self.state
            if state is None or not state.is_paused() or state.state_details.pause_key == not_key:
                return None
            # A form is there once its fields are stored, a moment after the pause.
            keyset: Any = state.state_details.run_input_keyset
            return state.state_details.pause_key if keyset["description"] in self.inputs() else None

        return wait_until(up, seconds=60, what="a form")

    def _stored(self, part: str) -> Any:
        state = self.state
        assert state is not None
        keyset: Any = state.state_details.run_input_keyset
        path = {"id": self.id, "key": keyset[part]}
        with get_client(sync_client=True) as client:
            return client.request("GET", "/flow_runs/{id}/input/{key}", path_params=path).json()

    def description(self) -> str:
        return self._stored("description")

    def question(self) -> str:
        """Return the name of what the form is about, as a page that shows it submits it."""
        return self._stored("schema")["properties"]["question"]["default"]

    def inputs(self) -> list[str]:
        """Return the names of all that is stored of its forms."""
        body = {"prefix": "crew-review-", "limit": 20, "exclude_keys": []}
        with get_client(sync_client=True) as client:
            found = client.request("POST", "/flow_runs/{id}/input/filter", path_params={"id": self.id}, json=body)
        return sorted(one["key"] for one in found.json())

    def fill_in(self, **fields: Any) -> Any:
        """Submit the form as Prefect's page does, and return its answer."""
        with get_client(sync_client=True) as client:
            return client.request(
                "POST", "/flow_runs/{id}/resume", path_params={"id": self.id}, json={"run_input": fields}
            ).json()

    def result(self) -> Any:
        self._thread.join(90)
        assert not self._thread.is_alive(), self.state
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self.state is not None
        assert self.state.is_completed()
        return self._outcome


async def test_a_repeated_question_gets_its_own_form() -> None:
    asking = AskingServer(rounds=2, between=False)
    async with served(asking.app()) as url:
        crew = DeployedCrew(url=url, token="secret-token", wait=WaitPolicy(next_round_after=1.0))  # type: ignore[arg-type]
        run = FlowRun(lambda: arun_crew(crew, {}, review="form"))
        first = await asyncio.to_thread(run.form)
        await asyncio.to_thread(run.fill_in, decision="reject", feedback="Warmer.")
        await asyncio.to_thread(run.form, not_key=first)
        await asyncio.to_thread(run.fill_in, decision="approve")
        assert (await asyncio.to_thread(run.result)).output == "done"
        assert [one["is_approve"] for one in asking.resumes] == [False, True]


def test_the_form_takes_each_answer_once(server: CrewServer, seen: Seen) -> None:
    crew = server.crew()
    run = FlowRun(lambda: arun_crew(crew, {"topic": "tea"}, review="form"))
    first = run.form()
    text = run.description()
    assert "Draft *number 1* <\u2060b>for you" in text, "a tag is text"
    assert "question 1" in text
    assert run.fill_in(decision="maybe")["status"] == "REJECT"
    kickoff_id = next(iter(server.runs)).id
    another = f"draft, question 7, run {kickoff_id}"
    assert kickoff_id in run.question()
    assert run.fill_in(decision="approve", question=another)["status"] == "REJECT", "from a page that is out of date"
    assert run.fill_in(decision="reject", feedback="Warmer.", name="Grace | <b>")["status"] == "ACCEPT"
    run.form(not_key=first)
    assert "Draft *number 2*" in run.description()
    assert run.fill_in(decision="approve", name="Ada", question=run.question())["status"] == "ACCEPT"
    result = run.result()
    assert "Warmer." in result.output
    assert server.requests["resume"] == 2

    async def answers() -> list[tuple[Any, ...]]:
        record = await PrefectRecords().of_kickoff(result.kickoff_id)
        assert record is not None
        return [(one.round, one.approve, one.by, one.feedback) for one in await PrefectRecords().reviews(record)]

    assert asyncio.run(answers()) == [(1, False, "Grace | <b>", "Warmer."), (2, True, "Ada", "")]
    # The last page of the key: an earlier test's crew may have had the same port.
    page = seen.artifacts(artifact_key(crew.label))[-1]
    assert "### Answers" in page["data"]
    assert "| draft | 1 | rejected | Grace \\| &lt;b&gt; |" in page["data"]
    assert "| draft | 2 | approved | Ada |" in page["data"]


def test_a_form_that_could_not_be_stored_is_stored_later(
    server: CrewServer, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.refuse, proxy.answer = "POST .*/input$", "503"
    run = FlowRun(lambda: arun_crew(server.crew(), {"topic": "tea"}, review="form"))
    wait_until(lambda: "is not on its page yet" in caplog.text, seconds=60, what="a warning")
    assert run.state is not None
    assert run.state.is_paused()
    proxy.refuse = None
    run.form()
    assert run.fill_in(decision="approve", question=run.question())["status"] == "ACCEPT"
    assert run.result().output.startswith("Printed")


def test_two_questions_of_a_flow_run_stand_in_line(server: CrewServer) -> None:
    crew = server.crew()
    ended: list[str] = []

    async def one(topic: str, review: Any) -> str:
        output = (await arun_crew(crew, {"topic": topic}, review=review)).output
        ended.append(topic)
        return output

    async def work() -> list[str]:
        return await asyncio.gather(
            one("tea", "form"), one("coffee", "form"), one("milk", lambda _: Review(approve=True))
        )

    run = FlowRun(work)
    first = run.form()
    wait_until(lambda: "milk" in ended, seconds=60, what="the run that needs nobody")
    asked = [run.description()]
    run.fill_in(decision="approve")
    second = run.form(not_key=first)
    assert second != first
    asked.append(run.description())
    run.fill_in(decision="approve")
    assert len(run.result()) == 3
    assert {"tea" in text for text in asked} == {True, False}
    assert server.requests["resume"] == 3


def test_an_answer_from_elsewhere_ends_the_form(server: CrewServer) -> None:
    crew = server.crew()
    run = FlowRun(lambda: arun_crew(crew, {"topic": "tea"}, review="form", idempotency_key=f"elsewhere {server.url}"))
    run.form()

    async def answer() -> None:
        record = (await PrefectRecords().attempts(f"elsewhere {server.url}"))[-1]
        await resume_crew(crew, str(record.kickoff_id), approve=True)

    asyncio.run(answer())
    assert run.result().output.startswith("Printed")
    assert server.requests["resume"] == 1


@pytest.mark.parametrize(("response_format", "seconds"), [("union", 0), ("documented", 2)])
def test_an_old_forms_answer_is_not_for_the_next(response_format: Any, seconds: float) -> None:
    """Where no state is seen in between, as with the first of these servers, the texts tell them apart."""
    draft = {"name": "draft", "human": True, "seconds": seconds, "output": "Draft number {{ round }}."}
    with CrewServer(script(draft, inputs=["topic"]), response_format=response_format) as server:
        crew = server.crew()
        run = FlowRun(lambda: arun_crew(crew, {"topic": "tea"}, review="form"))
        first, page = run.form(), run.question()

        async def reject() -> None:
            async with crew.client() as client:
                await client.resume(server.runs[0].id, "draft", "Colder.", False)

        asyncio.run(reject())
        run.form(not_key=first)
        assert run.fill_in(decision="approve", name="Ada", question=page)["status"] == "REJECT"
        assert server.requests["resume"] == 1
        assert run.fill_in(decision="approve", name="Ada", question=run.question())["status"] == "ACCEPT"
        assert run.result().output == "Draft number 2."


def test_one_of_two_flow_runs_answers(server: CrewServer) -> None:
    crew, key = server.crew(), f"both {server.url}"

    async def ask() -> str:
        return (await arun_crew(crew, {"topic": "tea"}, review="form", idempotency_key=key)).output

    runs = [FlowRun(ask) for _ in range(2)]
    for run in runs:
        run.form()
    with ThreadPoolExecutor() as people:
        # Prefect may accept both before one is read.
        list(people.map(lambda run: run.fill_in(decision="approve"), runs))
    outputs = {run.result() for run in runs}
    assert len(outputs) == 1
    assert next(iter(outputs)).startswith("Printed")
    assert [server.requests["resume"], server.kickoffs] == [1, 1]
    assert [run.inputs() for run in runs] == [[], []]


def test_a_form_without_an_answer_comes_back(server: CrewServer) -> None:
    crew = server.crew()
    run = FlowRun(lambda: arun_crew(crew, {"topic": "tea"}, review="form"))
    first = run.form()
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Running(), force=True)
    run.form(not_key=first)
    run.fill_in(decision="approve")
    assert run.result().output.startswith("Printed")


def test_nobody_answers_in_time(server: CrewServer, seen: Seen) -> None:
    crew, policy = server.crew(), WaitPolicy(human_timeout=1.5)
    run = FlowRun(lambda: arun_crew(crew, {"topic": "tea"}, review="form", wait=policy))
    with pytest.raises(CrewTimeoutError, match=r"human time limit of 1\.5 s"):
        run.result()
    states = [state["type"] for state in seen.get(f"/flow_run_states/?flow_run_id={run.id}")]
    assert states == ["PENDING", "RUNNING", "PAUSED", "RUNNING", "FAILED"]
    assert run.inputs() == []
    assert server.requests["resume"] == server.requests["stop"] == 0


def test_an_answer_in_time_counts_when_read_late(server: CrewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "LOOK_EVERY", 17.0)
    crew = server.crew()
    policy = WaitPolicy(human_timeout=15, on_human_timeout="reject")
    run = FlowRun(lambda: arun_crew(crew, {"topic": "tea"}, review="form", wait=policy))
    run.form()
    run.fill_in(decision="approve")
    assert run.result().output.startswith("Printed")
    assert server.requests["resume"] == 1


def test_an_unsent_answer_is_kept_for_the_retry(server: CrewServer) -> None:
    crew = server.crew()
    server.faults.add("resume:401-before-accept@1")
    # Two, since Prefect counts the form as one of them.
    run = FlowRun(lambda: arun_crew(crew, {"topic": "tea"}, review="form"), retries=2, retry_delay_seconds=1)
    run.form()
    run.fill_in(decision="approve")
    assert run.result().output.startswith("Printed")
    assert server.requests["resume"] == 2, "the first of them was refused"
    assert server.kickoffs == 1


@pytest.mark.parametrize("fields", [{"secret_inputs": ["topic"]}, {"show": "summary"}], ids=["secret", "summary"])
def test_what_may_not_be_shown_is_not_in_the_form(server: CrewServer, fields: dict[str, Any]) -> None:
    crew = server.crew(**fields)
    run = FlowRun(lambda: arun_crew(crew, {"topic": "correct horse"}, review="form"))
    run.form()
    text = run.description()
    assert "correct horse" not in text
    assert ("Draft *number 1*" in text) is ("show" not in fields)
    run.fill_in(decision="approve")
    run.result()


@pytest.mark.slow
@pytest.mark.parametrize("ui", ["v1", "v2"], ids=["older-interface", "newer-interface"])
def test_a_person_answers_on_the_page(
    prefect_server: PrefectServer,
    server: CrewServer,
    chromium: Chromium,
    ui: Literal["v1", "v2"],
    tmp_path: Path,
) -> None:
    crew = server.crew()
    run = FlowRun(lambda: arun_crew(crew, {"topic": "tea"}, review="form"), name="reviewed-report")
    first = run.form()
    with chromium.page(height=1100) as page:
        where = page, prefect_server.ui_url, run.id, ui
        answer_on_page(*where, "reject", "Warmer, please.", tmp_path / f"{ui}-rejecting.png", round=1)
        run.form(not_key=first)
        answer_on_page(*where, "approve", "", tmp_path / f"{ui}-approving.png", round=2)
    assert "Warmer, please." in run.result().output
    assert server.requests["resume"] == 2
