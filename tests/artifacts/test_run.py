"""The artifact of a run on a real server: one, from its kickoff to its end."""

import asyncio
import shlex
import uuid
from dataclasses import replace
from typing import Any

import pytest
from markdown_it import MarkdownIt
from prefect.runtime import flow_run

import prefect_crew as pc
from prefect_crew.artifacts import run as run_module
from prefect_crew.artifacts.run import MarkdownArtifact, RunView, artifact_key, render_run
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import Crew
from prefect_crew.runs import wait as wait_module
from prefect_crew.runs.database import find_store
from prefect_crew.runs.request import RunOptions, RunRequest
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.start import open_run
from prefect_crew.runs.stop import stop_run
from prefect_crew.states import CrewState
from prefect_crew.store.attempts import result_of
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import acall_in_flow, call_in_flow
from support.past import stored
from support.proxy import Proxy
from support.scripts import ASKS, script, slow
from support.seen import Seen
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.fixture
def name() -> str:
    """A crew's name, and so an artifact key, of the test's own."""
    return f"crew {uuid.uuid4().hex[:8]}"


def kicked_off(crew: Crew, inputs: dict[str, Any] | None = None, **options: Any) -> pc.CrewRun:
    """Do what `DeployedCrew.trigger` does, for a crew that is named and not stored."""
    run = asyncio.run(open_run(RunRequest.of(crew, Inputs.of(inputs), RunOptions(**options))))
    return pc.CrewRun(run.crew, run.kickoff_id, idempotency_key=run.idempotency_key, live=run)


def shown(seen: Seen, name: str) -> str:
    """Return the text of the only artifact of a crew."""
    (artifact,) = seen.artifacts(artifact_key(name))
    return artifact["data"]


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ("travel", "crew-travel"),
        ("My Crew (v2)", "crew-my-crew-v2"),
        ("127.0.0.1:8000/travel", "crew-127-0-0-1-8000-travel"),
        ("מטיילים", "crew-run"),
    ],
)
def test_a_key_is_what_prefect_takes(label: str, key: str):
    assert artifact_key(label) == key


def test_an_artifact_shows_kickoff_and_end(crew_server: CrewServerFactory, seen: Seen, name: str):
    crew = crew_of(crew_server(script({"output": "# Lisbon\n\nby tram"}, inputs=["city"])).crew()).called(name)

    async def trip() -> str:
        kickoff_id = await pc.kickoff_crew(crew, {"city": "Lisbon"}, idempotency_key=name)
        at_kickoff = await asyncio.to_thread(shown, seen, name)
        await pc.wait_for_crew(crew, kickoff_id)
        return at_kickoff

    flow_run_id, at_kickoff = call_in_flow(trip)
    assert "○ pending" in at_kickoff
    assert "| **city** | Lisbon |" in at_kickoff
    (artifact,) = seen.artifacts(artifact_key(name))
    assert artifact["type"] == "markdown"
    assert artifact["flow_run_id"] == flow_run_id
    assert artifact["task_run_id"]
    for part in ("✓ completed", "# Lisbon\n\nby tram", "| **city** | Lisbon |", "| task\\_1 |"):
        assert part in artifact["data"]


def test_inputs_stay_shown():
    known = RunView("travel", "r1", None, CrewState.PENDING, inputs={"city": "Lisbon"})
    unknown = replace(known, state=CrewState.RUNNING, inputs=None)
    assert "| **city** | Lisbon |" in render_run(unknown, render_run(unknown, render_run(known)))
    assert "Lisbon" not in render_run(replace(unknown, show="summary"), render_run(known))
    error = "### Inputs\n\n[a link](https://evil.test)"
    status = CrewStatus(kickoff_id="r1", state=CrewState.FAILED, error=error)
    failed = replace(unknown, state=CrewState.FAILED, status=status)
    assert "evil" not in render_run(unknown, render_run(failed))


def test_a_run_that_just_began_is_shown_as_stopped(crew_server: CrewServerFactory, seen: Seen, name: str):
    run = kicked_off(crew_of(crew_server(slow(60)).crew()).called(name))
    assert "○ pending" in shown(seen, name)
    asyncio.run(stop_run(LiveRun(run._crew, run.kickoff_id)))
    assert "■ stopped" in shown(seen, name)


async def test_an_artifact_belongs_to_the_starting_flow_run(crew_server: CrewServerFactory, seen: Seen, name: str):
    other = str(uuid.uuid4())

    async def trip() -> None:
        for owner in (None, str(flow_run.id), other):
            await MarkdownArtifact(artifact_key(name), f"for {owner}", flow_run_id=owner).keep("text")

    flow_run_id, _ = await acall_in_flow(trip)
    made = await asyncio.to_thread(seen.artifacts, artifact_key(name))
    assert [artifact["flow_run_id"] for artifact in made] == [flow_run_id, flow_run_id, other]


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "does not answer"])
def test_a_lasting_run_is_shown_while_it_runs(
    crew_server: CrewServerFactory, seen: Seen, name: str, monkeypatch: pytest.MonkeyPatch, answers: bool
):
    monkeypatch.setattr(wait_module, "SHOW_EVERY", 0.3)
    server = crew_server(slow(60), faults=[] if answers else ["status:500"])
    crew = crew_of(server.crew(wait=pc.WaitPolicy(error_timeout=600))).called(name)

    async def is_shown() -> bool:
        pages = await asyncio.to_thread(seen.artifacts, artifact_key(name))
        return any(("● running" if answers else "○ pending") in page["data"] for page in pages)

    async def trip() -> None:
        running = asyncio.ensure_future(pc.arun_crew(crew))
        await until(is_shown, "its page")
        running.cancel()
        await asyncio.wait({running})

    call_in_flow(trip)


def test_a_silent_server_is_shown(crew_server: CrewServerFactory, seen: Seen, name: str):
    server = crew_server(slow(60), faults=["status:500"])
    crew = crew_of(server.crew(wait=pc.WaitPolicy(error_timeout=0.2))).called(name)
    with pytest.raises(pc.CrewAPIError):
        asyncio.run(pc.arun_crew(crew))
    assert "Nothing is started then." in shown(seen, name)


def test_an_artifact_links_page_and_result(crew_server: CrewServerFactory, seen: Seen, name: str):
    server, key = crew_server(script({"output": "x" * 70_000})), f"{name}'s key"
    crew = replace(crew_of(server.crew(page_url="https://crews.example/travel")), label=name, block=name)
    assert len(pc.run_crew(crew, idempotency_key=key).output) == 70_000
    (artifact,) = seen.artifacts(artifact_key(name))
    flow_run_id = artifact["flow_run_id"]
    for part in (
        f"| Flow run | [{flow_run_id[:8]}](../../runs/flow-run/{flow_run_id}) |",
        f"| Crew | [{name}](https://crews.example/travel) |",
        "The first 60,000 of 70,000 characters. The whole text:\n\n```bash\n"
        f"prefect-crew result {shlex.quote(key)}\n```",
    ):
        assert part in artifact["data"]


def test_a_question_stands_first_with_commands(crew_server: CrewServerFactory, seen: Seen, name: str):
    crew = crew_of(crew_server(ASKS).crew()).called(name)
    with pytest.raises(pc.CrewTimeoutError):
        pc.run_crew(crew, wait=pc.WaitPolicy(initial=0.05, human_timeout=0.5))
    kickoff_id = seen.artifacts(artifact_key(name))[0]["description"].split()[1]
    text = shown(seen, name)
    head, _, rest = text.partition("```bash\n")
    assert "waits for a person: task" in head
    assert "prefect-crew reviews inspect" in head
    commands, _, facts = rest.partition("\n```")
    assert commands.splitlines() == [
        f"prefect-crew reviews approve {kickoff_id} --crew {crew.url}",
        f"prefect-crew reviews reject {kickoff_id} --crew {crew.url} --feedback TEXT",
    ]
    assert "| Run |" in facts


@pytest.mark.parametrize("owner", ["flow", "script"])
def test_who_reattaches_updates_the_artifact(crew_server: CrewServerFactory, seen: Seen, name: str, owner: str):
    crew = crew_of(crew_server(slow(1.0)).crew()).called(name)
    if owner == "flow":
        call_in_flow(lambda: pc.kickoff_crew(crew, idempotency_key=name))
    else:
        kicked_off(crew, idempotency_key=name)
    assert "○ pending" in shown(seen, name)
    assert pc.run_crew(crew, idempotency_key=name).output == "done"
    assert "✓ completed" in shown(seen, name)


def test_a_deleted_artifact_is_made_again(crew_server: CrewServerFactory, seen: Seen, name: str):
    run = kicked_off(crew_of(crew_server("echo").crew()).called(name), {"text": "a"})
    (artifact,) = seen.artifacts(artifact_key(name))
    seen.call("DELETE", f"/artifacts/{artifact['id']}")
    run.wait_for_completion()
    assert "✓ completed" in shown(seen, name)


@pytest.mark.parametrize(
    ("fields", "there", "not_there"),
    [
        ({"show": "full"}, ["Lisbon", "by tram", "hunter22"], []),
        ({"show": "full", "secret_inputs": ["password"]}, ["Lisbon", "by tram"], ["hunter22"]),
        ({"show": "summary"}, ["characters", "task\\_1"], ["Lisbon", "by tram", "hunter22"]),
        ({"show": "none"}, ["completed"], ["Lisbon", "by tram", "hunter22", "characters", "task"]),
    ],
    ids=str,
)
def test_show_and_secrets_decide_what_is_seen(
    crew_server: CrewServerFactory, seen: Seen, name: str, fields: Any, there: list[str], not_there: list[str]
):
    server = crew_server(script({"output": "{{ city }} by tram with {{ password }}"}, inputs=["city", "password"]))
    inputs = {"city": "Lisbon", "password": "hunter22"}
    result = pc.run_crew(crew_of(server.crew(**fields)).called(name), inputs)
    assert result.output == "Lisbon by tram with hunter22"
    assert all(part in shown(seen, name) for part in there)
    assert not any(part in shown(seen, name) for part in not_there)
    (attempt,) = stored(str(result.idempotency_key))
    kept = asyncio.run(find_store().run(result_of, attempt.id))
    assert (kept is not None) is (fields == {"show": "full"})


# Trouble


@pytest.mark.parametrize("by", ["server", "client"])
def test_refused_artifacts_fail_nothing(
    crew_server: CrewServerFactory, seen: Seen, proxy: Proxy, by: str, monkeypatch: pytest.MonkeyPatch
):
    if by == "server":
        proxy.refuse = "/artifacts"
    else:
        monkeypatch.setattr("prefect_crew.runs.run.artifact_key", str.upper)
    crew = crew_server("echo").crew()
    flow_run_id, result = call_in_flow(lambda: pc.arun_crew(crew, {"text": "a"}))
    assert result.output == "a"
    assert seen.logs(flow_run_id).count("could not be updated") == 1


def test_an_api_that_is_away_costs_little_time(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "SHOW_WITHIN", 1.0)
    artifact = MarkdownArtifact("crew-away", "a run")

    async def put() -> list[str | None]:
        first = await artifact.keep("before")
        proxy.cut()
        return [first, await artifact.keep("after")]

    assert asyncio.run(put()) == [None, "the Prefect API did not accept it within 1 s"]


def test_a_description_holds_no_markup():
    crew = crew_of(pc.DeployedCrew(url="https://crew.example", token="t")).called("travel")
    description = LiveRun(crew, "<img src=http://evil.test> ![x](http://evil.test)\n# big").artifact.description
    assert "\n" not in description
    tokens = MarkdownIt("commonmark").parse(description)
    assert {child.type for token in tokens for child in token.children or []} <= {"text", "text_special"}
    assert LiveRun(crew, "5f0c-1").artifact.description == "Run 5f0c-1 of crew travel"
