"""What people see of a batch: the plan, the artifact, the report; and what nobody sees: tokens and secret inputs."""

import asyncio
import re
from typing import Any

import pytest

from prefect_crew import BatchReport, aplan_batch
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches, topics
from support.scripts import script, slow

TASK = {"output": "on {{ topic }}", "fail": "{{ 'no | *' + topic if 'bad' in topic }}"}
PICKY = script(TASK, inputs=["topic"], usage={"total_tokens": 5})


async def test_page_of_a_stopped_batch(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(PICKY, response_format="live", faults=["kickoff:drop-after-accept@2"])
    crew = server.crew(price=0.25, page_url="https://crews.example/travel")
    rows = [{"topic": topic} for topic in ("tea", "milk", "bad `row`", "rye")]
    await batch(crew, rows, name="it's bad", key="topic", max_in_flight=1, on_failure=2)
    [page] = await batch.pages("it's bad")
    host, quoted = server.url.removeprefix("http://"), "'it'\"'\"'s bad'"
    for part in (
        f"## Batch it's bad · {host}: 1 failed, 1 uncertain\n\n### Stopped\n\n```text\n2 rows failed",
        *(" 3 of 4 (75.0%) |", "| Completed | 1 |", "| Not run | 1 |", "| Kickoffs of this call | 3 |"),
        *(
            "| total tokens | 10 |",
            "| Cost of all calls | 0.500 |",
            f"| Crew | [{host}](https://crews.example/travel) |",
        ),
        *("then resolve each: `milk`", "no \\| \\*bad \\`row\\`"),
        "The first 1 of 1. The same call starts failed ones again, up to max_attempts of the crew. To list all:",
        f"```bash\nprefect-crew batch failures {quoted}\n```",
    ):
        assert part in page
    assert "batch resume" not in page, "it refuses, since the crew is not stored"
    assert re.search(r"\| Flow run \| \[\w{8}\]\(\.\./\.\./runs/flow-run/[\w-]{36}\) \|", page)


async def test_progress_moves_with_rows(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("prefect_crew.batches.runner.TICK", 0.1)
    monkeypatch.setattr("prefect_crew.batches.report.SHOW_EVERY", 0.1)
    seen, pages = list[tuple[str, int, int]](), set[str]()

    def see(progress: BatchReport) -> None:
        seen.append((progress.phase, progress.done, progress.in_flight))

    options: dict[str, Any] = {"name": "watched", "max_in_flight": 3, "on_progress": see}
    running = asyncio.ensure_future(batch(crew_server(slow(0.5)).crew(), topics(30), **options))
    while not running.done():
        await asyncio.sleep(0.1)
        pages.update(await batch.pages("watched"))
    await running
    assert len(pages) > 1
    assert any("| In flight | 3 |" in page for page in pages)
    assert [phase for phase, *_ in seen][-2:] == ["finishing", "done"]
    assert any(0 < done < 30 and 0 < in_flight <= 3 for _, done, in_flight in seen)
    assert seen[0] == ("checking", 0, 0)
    assert seen[-1] == ("done", 30, 0)


async def test_a_plan_says_how_many_how_long_and_how_much(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(slow(0.2))
    rows, crew = topics(10), server.crew(price=0.5)
    plan = await aplan_batch(crew, rows, seconds_per_run=60, max_in_flight=4)
    assert plan.rows == 10
    assert plan.done == 0
    assert plan.seconds == 180
    assert plan.price == 5.0
    assert str(plan).splitlines()[0] == "Batch plan: 10 rows, 10 to run, 4 at a time."
    assert str(plan).splitlines()[1:] == ["It takes about 3 min 00 s.", "It costs about 5.00."]
    assert server.kickoffs == 0
    await batch(crew, rows[:4], name="planned")
    plan = await aplan_batch(crew, rows, name="planned", export=str(batch.output), max_in_flight=1)
    assert plan.rows == 10
    assert plan.done == 4
    assert plan.price == 3.0
    assert plan.seconds is not None
    assert 6 * 0.2 <= plan.seconds < 60
    plan = await aplan_batch(crew_server(PICKY).crew(), [{"topic": "tea"}, {"topic": ""}])
    assert plan.rows == 1
    assert plan.bad_count == 1
    assert "Line 2 cannot be run: has no value for topic." in str(plan)
    assert plan.as_dict()["bad"] == [{"line": 2, "reason": "has no value for topic"}]


async def test_with_show_none_failures_show_no_words(batch: Batches, crew_server: CrewServerFactory):
    await batch(crew_server(PICKY).crew(show="none"), [{"topic": "bad"}], name="quiet")
    [failures] = await batch.pages("quiet")
    assert "| failed | not shown |" in failures
    assert "\\*bad" not in failures
