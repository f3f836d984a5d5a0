"""What people see of a batch: the plan, the artifact, the report; and what nobody sees: tokens and secret inputs."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from prefect_crew import aplan_batch
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.batches.report import BatchProgress
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches
from support.prefect_server import PrefectServer, drain
from support.scripts import script, slow

PICKY = script(
    {"output": "on {{ topic }}", "fail": "{{ 'no | *' + topic if 'bad' in topic }}"},
    inputs=["topic"],
    usage={"total_tokens": 5},
)


async def artifacts(name: str) -> list[str]:
    """Return the artifacts of a batch, one for each flow run that ran it."""
    key = ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key(name, prefix="batch")]))
    async with get_client() as client:
        return [str(one.data) for one in await client.read_artifacts(artifact_filter=key)]


async def test_a_batch_has_one_artifact(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(PICKY, response_format="union", faults=["kickoff:drop-after-accept@2"])
    rows = [{"topic": topic} for topic in ("tea", "milk", "bad `row`", "rye")]
    await batch(server.crew(price=0.25), rows, name="shown leads", key="topic", max_in_flight=1)
    [page] = await artifacts("shown leads")
    for part in (
        "4 of 4 (100.0%)",
        "then resolve each: `milk`",
        "no \\| \\*bad \\`row\\`",
        *(
            "| Completed | 2 |",
            "| total tokens | 15 |",
            "| Cost of all calls | 0.750 |",
            "| Kickoffs of this call | 4 |",
        ),
    ):
        assert part in page


async def test_the_artifact_shows_rows_that_were_set_aside_and_each_flow_run_has_its_own(
    batch: Batches, crew_server: CrewServerFactory
):
    rows = [{"topic": "tea"}, {"topic": ""}, "milk"]
    for _ in range(2):
        await batch(crew_server(PICKY).crew(), rows, name="aside", on_bad_row="set-aside", on_change="continue")
    pages = await artifacts("aside")
    assert len(pages) == 2
    for part in (
        *("1 of 3 (33.3%)", "| Set aside | 2 |", "| 2 | lacks topic |"),
        *("| 3 | holds a str, not an object with inputs |", f"{batch.output}.rejected.jsonl"),
    ):
        assert part in pages[-1]


async def test_progress_moves_while_rows_run(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("prefect_crew.batches.cancel.TICK", 0.1)
    monkeypatch.setattr("prefect_crew.batches.report.SHOW_EVERY", 0.1)
    seen: list[tuple[str, int, int]] = []

    def see(progress: BatchProgress) -> None:
        seen.append((progress.phase, progress.done, progress.in_flight))

    rows = [{"topic": str(number)} for number in range(24)]
    running = asyncio.ensure_future(
        batch(crew_server(slow(1.0)).crew(), rows, name="watched", max_in_flight=3, on_progress=see)
    )
    pages: set[str] = set()
    while not running.done():
        await asyncio.sleep(0.1)
        pages.update(await artifacts("watched"))
    await running
    assert len(pages) > 1
    assert any("| In flight | 3 |" in page for page in pages)
    assert [phase for phase, *_ in seen][-2:] == ["finishing", "done"]
    assert any(0 < done < 24 and 0 < in_flight <= 3 for _, done, in_flight in seen)
    assert (seen[0], seen[-1]) == (("checking", 0, 0), ("done", 24, 0))


def test_the_chart_shows_the_throughput_of_a_call_in_few_columns(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = BatchProgress("leads", started=now)
    assert progress.chart() is None
    for second in range(2000):
        now += 1.0
        progress.ended_here += 10 if second < 1000 else 0
        progress.tick()
        if second == 1:
            assert progress.chart() is None, "two points are no curve"
    chart = str(progress.chart())
    assert chart.endswith(" up to 10.0 rows/s, over 33 min 20 s")
    columns = chart.split("`")[1]
    assert 20 < len(columns) <= 60
    assert re.fullmatch("█+[▂▃▄▅▆▇]?▁+", columns)
    assert abs(columns.count("█") - columns.count("▁")) < 3


async def test_the_page_says_why_it_stopped_first_and_how_to_go_on(
    batch: Batches, crew_server: CrewServerFactory, prefect_api: PrefectServer
):
    crew = crew_server(PICKY).crew(page_url="https://crews.example/travel")
    rows = [{"topic": topic} for topic in ("bad", "tea", "milk")]
    await batch(crew, rows, name="it's bad", on_failure="stop", max_in_flight=1)
    [page] = await artifacts("it's bad")
    head, _, figures = page.partition("| Done |")
    assert head.startswith("## Batch it's bad · ")
    assert ": 1 failed\n\n### Stopped\n" in head
    assert "(https://crews.example/travel) |" in figures
    assert re.search(r"\| Flow run \| \[\w{8}\]\(\.\./\.\./runs/flow-run/[\w-]{36}\) \|", figures)
    quoted = "'it'\"'\"'s bad'"
    assert f"```bash\nprefect-crew batch failures {quoted}\nprefect-crew batch retry {quoted}\n```" in page


async def test_a_plan_says_how_many_how_long_and_how_much(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(slow(0.2))
    rows = [{"topic": str(number)} for number in range(10)]
    crew = server.crew(price=0.5)
    plan = await aplan_batch(crew, rows, seconds_per_run=60, max_in_flight=4)
    assert (plan.rows, plan.done, plan.seconds, plan.price) == (10, 0, 180, 5.0)
    assert str(plan) == (
        "Batch plan: 10 rows, 10 to run, 4 at a time.\nIt takes about 3 min 00 s.\nIt costs about 5.00."
    )
    assert server.kickoffs == 0
    assert list(batch.folder.glob("*.db")) == []
    await batch(crew, rows[:4], name="planned")
    plan = await aplan_batch(crew, rows, name="planned", output=str(batch.output), max_in_flight=1)
    assert (plan.rows, plan.done, plan.price) == (10, 4, 3.0)
    assert plan.seconds is not None
    assert 6 * 0.2 <= plan.seconds < 60
    assert (await aplan_batch(crew, rows, kickoffs_per_second=2)).seconds == 5


async def test_a_plan_lists_what_cannot_be_run(crew_server: CrewServerFactory, prefect_api: PrefectServer):
    del prefect_api
    rows = [{"topic": "tea"}, {"topic": ""}]
    plan = await aplan_batch(crew_server(PICKY).crew(), rows)
    assert (plan.rows, plan.bad_count) == (1, 1)
    assert "Line 2 cannot be run: lacks topic." in str(plan)
    assert plan.as_dict()["bad"] == [{"line": 2, "reason": "lacks topic"}]


async def test_neither_token_nor_secret_inputs_are_seen(
    batch: Batches, crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, prefect_api: PrefectServer
):
    secret = f"iban-{uuid.uuid4().hex}"
    spec = script({"output": "paid", "fail": "{{ 'no account ' + iban if 'bad' in topic }}"}, inputs=["topic", "iban"])
    server = crew_server(spec, faults=["status:500@1", "kickoff:400@3"])
    rows = [{"topic": topic, "iban": secret} for topic in ("tea", "bad", "milk", "rye")]
    with caplog.at_level(logging.DEBUG):
        report = await batch(server.crew(secret_inputs=["iban"]), rows, name="secret", max_in_flight=1)
    assert (report.completed, report.failed) == (2, 2)
    assert any("no account ********" in str(line["error"]) for line in batch.lines().values())
    await asyncio.to_thread(drain)
    places: dict[str, str] = {
        "log": caplog.text,
        "output": batch.output.read_text(),
        "report": repr(report),
        "artifacts": str(await artifacts("secret")),
        "ledger": dump(Path(f"{batch.output}.ledger.db")),
        "prefect": dump(prefect_api.database),
    }
    for hidden in (server.token, secret):
        assert [place for place, text in places.items() if hidden in text] == []


def dump(database: Path | None) -> str:
    assert database is not None
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return "".join(repr(connection.execute(f'SELECT * FROM "{table}"').fetchall()) for table in tables)
    finally:
        connection.close()


async def test_with_show_none_the_failures_show_no_word_of_the_crews(batch: Batches, crew_server: CrewServerFactory):
    await batch(crew_server(PICKY).crew(show="none"), [{"topic": "bad"}], name="quiet")
    [failures] = await artifacts("quiet")
    assert "| failed | not shown |" in failures
    assert "no |" not in failures
    assert "\\*bad" not in failures


# The crew's shared limit


async def limit(name: str, size: int) -> str:
    async with get_client() as client:
        await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=size))
    return name


async def test_the_crews_shared_limit_is_held_while_the_batch_runs(batch: Batches, crew_server: CrewServerFactory):
    name = await limit(f"crew-{uuid.uuid4().hex[:8]}", 3)
    server = crew_server(slow(0.3))
    rows = [{"topic": str(number)} for number in range(9)]
    running = asyncio.ensure_future(batch(server.crew(concurrency_limit=name), rows))
    most = 0
    while not running.done():
        most = max(most, sum(str(run.state) == "running" for run in server.runs))
        await asyncio.sleep(0.02)
    assert (await running).completed == 9
    assert most == 3
    async with get_client() as client:
        assert (await client.read_global_concurrency_limit_by_name(name)).active_slots == 0


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        pytest.param(None, {}, "which does not exist", id="no such limit"),
        pytest.param(3, {"max_in_flight": 5}, "Give max_in_flight=3 or less", id="more than the limit"),
    ],
)
async def test_a_limit_that_cannot_be_kept_is_said(
    batch: Batches, crew_server: CrewServerFactory, size: int | None, options: dict[str, Any], message: str
):
    name = f"crew-{uuid.uuid4().hex[:8]}"
    if size is not None:
        await limit(name, size)
    server = crew_server(PICKY)
    with pytest.raises(ConfigurationError, match=message):
        await batch(server.crew(concurrency_limit=name), [{"topic": "tea"}], **options)
    assert server.kickoffs == 0
