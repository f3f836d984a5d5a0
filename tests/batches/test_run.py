"""`run_batch` on a real Prefect server and a real crew server: rows in, lines out, and a second call that goes on."""

import asyncio
import gzip
import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any, cast

import fsspec
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.runtime import flow_run
from pydantic import BaseModel, SecretStr, create_model, field_serializer, model_validator

import prefect_crew as pc
from prefect_crew.batches.batch import find_batch
from prefect_crew.client.redaction import MASK
from prefect_crew.devserver import CrewServer
from prefect_crew.devserver._scripts import load_program
from prefect_crew.testing import CrewServerFactory
from support.batches import CREW, Batches, topics
from support.held import Held
from support.scripts import PICKY, script
from support.waiting import until


async def test_a_row_is_a_run_and_a_line(batch: Batches, crew_server: CrewServerFactory):
    task = {"output": "on {{ topic }}", "fail": "{{ 'no ' + topic if 'bad' in topic }}"}
    spec = script(task, inputs=["topic"], usage={"total_tokens": 5})
    server, rows = crew_server(spec, response_format="live"), [*topics(20), {"topic": "bad one"}]
    report = await batch(server.crew(price=0.5), rows, name="leads")
    assert report.total == 21
    assert report.completed == 20
    assert report.failed == 1
    assert report.uncertain == 0
    assert report.skipped == 0
    assert report.kickoffs == 21
    assert report.cost == 10.5
    assert report.stopped is None
    assert report.usage == pc.TokenUsage(total_tokens=105)
    assert [*server.kickoffs_by_key.values()] == [1] * 21
    lines = [(line["state"], line["output"], line["error"]) for line in batch.lines().values()]
    completed = [("completed", f"on topic {number}", None) for number in range(20)]
    assert lines == [*completed, ("failed", None, "no bad one")]
    assert str(report).startswith("Batch leads: 20 of 21 rows completed, 1 failed in ")
    # A second call starts only the failed row.
    requests = dict(server.requests)
    again = await batch(server.crew(price=0.5, max_attempts=1), rows, name="leads")
    assert (again.completed, again.failed, again.kickoffs, again.cost) == (20, 1, 0, 10.5)
    beforehand = {"inputs": 0, "inspect": 0}
    assert {**server.requests, **beforehand} == {**requests, **beforehand}
    again = await batch(server.crew(price=0.5), rows, name="leads")
    assert (again.completed, again.failed, again.kickoffs, again.cost) == (20, 1, 1, 11.0)
    with pytest.raises(
        pc.BatchFailedError, match=r"20 of 21 rows completed, 1 failed.*starts failed ones again"
    ) as caught:
        again.raise_for_failures()
    assert caught.value.report is again
    assert json.dumps(again.as_dict())


async def test_rows_are_matched_by_their_keys(batch: Batches, crew_server: CrewServerFactory):
    first, second = crew_server(PICKY), crew_server(PICKY)
    await batch(first.crew(), topics(5), name="growing")
    with pytest.raises(pc.ConfigurationError, match=f"{first.url}, not {second.url}"):
        await batch(second.crew(), topics(5), name="growing")
    report = await batch(first.crew(), topics(6), name="growing")
    assert (report.completed, report.kickoffs, len(batch.lines())) == (6, 1, 6)
    # Rows that have left the data set have no line, and are not counted.
    for _ in range(2):
        report = await batch(first.crew(), topics(7)[3:], name="growing")
        assert (report.total, report.completed, report.ok) == (4, 4, True)
        assert len(batch.lines()) == 4
    stored = await (await find_batch("growing")).report()
    assert (stored.total, stored.completed, stored.skipped) == (4, 4, 0)
    # They stay on record.
    report = await batch(first.crew(), topics(7), name="growing")
    assert (report.completed, report.kickoffs, first.kickoffs, second.kickoffs) == (7, 0, 7, 0)


async def test_another_deployment_is_said_in_one_line(
    batch: Batches, echo: CrewServer, caplog: pytest.LogCaptureFixture
):
    await batch(echo.crew(), topics(2), name="deployed")
    (before,) = {line["crew_version"] for line in batch.lines().values()}
    echo.program = load_program(PICKY)
    await batch(echo.crew(), topics(3), name="deployed")
    versions = {key: line["crew_version"] for key, line in batch.lines().items()}
    assert sorted(versions.values()).count(before) == 2
    assert len(set(versions.values())) == 2
    assert caplog.text.count("its crew was deployed anew") == 1
    assert echo.kickoffs == 3


async def test_failed_rows_are_started_with_their_new_inputs_and_completed_ones_not(
    batch: Batches, crew_server: CrewServerFactory
):
    server = crew_server(PICKY)
    options: dict[str, Any] = {"name": "corrected", "key": "id"}
    rows = [{"id": "a", "topic": "bad tea"}, {"id": "b", "topic": "milk"}, {"id": "c", "topic": "bad rye"}]
    assert (await batch(server.crew(max_attempts=2), rows, **options)).failed == 2
    rows = [{"id": "a", "topic": "tea"}, {"id": "b", "topic": "cream"}, {"id": "c", "topic": "bad rice"}]
    report = await batch(server.crew(max_attempts=2), rows, **options)
    assert (report.completed, report.failed, report.conflicts, report.kickoffs) == (1, 2, 1, 2)
    assert dict(report.errors) == {"IdempotencyConflictError": 1, "CrewFailedError": 1}
    report = await batch(server.crew(max_attempts=2), rows, **options)
    assert (report.kickoffs, report.failed) == (0, 2), "max_attempts is reached"
    report = await batch(server.crew(max_attempts=3), rows, **options)
    assert (report.completed, report.conflicts, report.kickoffs) == (1, 1, 1)
    lines = [(line["state"], line["inputs"]["topic"], line["output"]) for line in batch.lines().values()]
    assert lines == [("completed", "tea", "on tea"), ("conflict", "milk", None), ("failed", "bad rice", None)]
    assert "has completed with other inputs" in batch.lines()["b"]["error"]
    rows[1]["topic"] = "milk"  # the completed run is back with its inputs
    report = await batch(server.crew(max_attempts=3), rows, **options)
    assert (report.completed, report.conflicts, report.kickoffs) == (2, 0, 0)
    assert batch.lines()["b"]["output"] == "on milk"
    assert server.kickoffs == 6


@pytest.mark.parametrize("place", ["{folder}/out.csv", "memory://lost/out.jsonl"], ids=["here", "elsewhere"])
async def test_an_output_that_is_gone_is_written_again(batch: Batches, echo: CrewServer, place: str):
    output, files = place.format(folder=batch.folder), cast("Any", fsspec)
    options = {"name": f"gone {batch.folder.name}", "export": output}
    await batch(echo.crew(), topics(3), **options)
    filesystem, path = files.core.url_to_fs(output)
    before = filesystem.cat_file(path)
    filesystem.rm(path)
    report = await batch(echo.crew(), topics(3), **options)
    assert report.completed == 3
    assert echo.kickoffs == 3
    assert filesystem.cat_file(path) == before


async def test_two_ways_to_write_a_path_are_one_export(batch: Batches, echo: CrewServer, tmp_path: Path):
    (tmp_path / "here").symlink_to(tmp_path)
    for export in (tmp_path / "a" / ".." / "out.jsonl", batch.output, tmp_path / "here" / "out.jsonl"):
        report = await batch(echo.crew(), topics(2), name="one export", export=str(export))
        assert report.completed == 2
    assert len(batch.lines()) == 2
    assert [*tmp_path.glob("**/*.jsonl")] == [batch.output]


async def test_an_export_that_cannot_be_written_starts_no_row(batch: Batches, echo: CrewServer, tmp_path: Path):
    for name in (f"{'long' * 60}.jsonl", "none/out.jsonl"):
        (tmp_path / "none").touch()
        with pytest.raises(pc.CrewError, match=r"The export .* cannot be written: .*Nothing was started"):
            await batch(echo.crew(), topics(2), export=str(tmp_path / name))
    assert echo.kickoffs == 0
    assert [*tmp_path.glob("*.new"), *tmp_path.glob("*long*")] == []


async def test_an_output_with_other_lines_is_written_again(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(PICKY)

    async def shown(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        await batch(server.crew(), rows, name="same", **options)
        return [line["inputs"]["topic"] for line in batch.lines().values()]

    assert await shown(topics(3)) == ["topic 0", "topic 1", "topic 2"]
    assert await shown(topics(4)[1:]) == ["topic 1", "topic 2", "topic 3"]
    assert await shown(topics(4)[:0:-1]) == ["topic 3", "topic 2", "topic 1"]
    assert server.kickoffs == 4
    batch.output.unlink()
    await batch(server.crew(), [{"topic": "bad one"}], name="bad")
    [before] = batch.lines().values()
    await batch(server.crew(), [{"topic": "bad one"}], name="bad")
    [after] = batch.lines().values()
    assert before["state"] == after["state"] == "failed"
    assert before["kickoff_id"] != after["kickoff_id"]


async def test_a_batch_that_runs_is_busy_before_its_rows_are_read(batch: Batches, echo: CrewServer):
    echo.faults.add("status:500")
    first = asyncio.ensure_future(batch(echo.crew(), topics(5), name="read"))
    await until(lambda: echo.kickoffs, "a kickoff")

    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the data set was read")

    with pytest.raises(pc.BatchBusyError, match="Batch 'read' is being run by another process"):
        await batch(echo.crew(), Unread(topics(5)), name="read")
    echo.faults.clear()
    assert (await first).ok
    assert echo.kickoffs == 5


async def test_bad_rows_are_in_every_report(batch: Batches, echo: CrewServer, tmp_path: Path):
    dirty, options = tmp_path / "dirty.csv", {"name": "dirty", "key": "id"}
    dirty.write_text("id,topic\n1,tea\n2,\n3,milk,x\n4,rye\n")
    bad = [(3, "has no value for topic"), (4, "has 3 fields, the header has 2")]
    with pytest.raises(pc.DatasetError, match=r"2 rows cannot be run: ") as caught:
        await batch(echo.crew(), dirty, **options)
    assert [(row.line, row.reason) for row in caught.value.rows] == bad
    assert echo.kickoffs == 0
    assert batch.output.exists() is False
    for number in (1, 2):
        report = await batch(echo.crew(), dirty, on_bad_row="skip", **options)
        assert report.total == 4
        assert report.completed == 2
        assert report.bad_count == 2
        assert report.skipped == 2
        assert report.ok is False
        assert [(row.line, row.reason) for row in report.bad] == bad
        assert "2 of 4 rows completed, 2 bad in " in str(report)
        assert len(pages := await batch.pages("dirty")) == number, "each flow run has its own"
        table = "| 3 | has no value for topic |\n| 4 | has 3 fields, the header has 2 |"
        for part in ("2 of 4 (50.0%)", "| Bad | 2 |", table):
            assert part in pages[-1]
    assert echo.kickoffs == 2
    stored = await (await find_batch("dirty")).report()
    assert (stored.total, stored.completed, stored.bad_count, stored.skipped) == (4, 2, 2, 2)
    assert [(row.line, row.reason) for row in stored.bad] == bad
    # Once the file is repaired nothing is left of it.
    dirty.write_text("id,topic\n1,tea\n")
    report = await batch(echo.crew(), dirty, **options)
    assert report.total == 1
    assert report.bad_count == 0
    assert report.ok is True
    assert (await (await find_batch("dirty")).report()).bad_count == 0


@pytest.mark.parametrize("faults", [("inputs:500@1", "inputs:drop@2"), ("inputs:429@1", "inputs:503@2")])
async def test_a_moment_without_inputs_changes_no_row(batch: Batches, echo: CrewServer, faults: tuple[str, str]):
    echo.faults.add(*faults)
    assert (await batch(echo.crew(), topics(2, note="no input"))).ok
    assert all(set(line["inputs"]) == {"topic"} for line in batch.lines().values())


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("429=0.1", "429"),
        ("502", "502"),
        ("html", r"is not the URL of a crew.*Nothing was started"),
        ("redirect", r"is not the URL of a crew.*Nothing was started"),
    ],
)
async def test_a_server_without_inputs_starts_nothing(batch: Batches, echo: CrewServer, fault: str, problem: str):
    echo.faults.add(f"inputs:{fault}")
    with pytest.raises((pc.CrewAPIError, pc.ConfigurationError), match=problem):
        await batch(echo.crew(), topics(2, note="no input"))
    assert echo.requests["kickoff"] == 0
    echo.faults.clear()
    echo.faults.add("inputs:404")
    assert (await batch(echo.crew(allow_extra_inputs=True), topics(2))).ok


async def test_a_server_that_is_away_leaves_no_files(batch: Batches, echo: CrewServer):
    echo.stop()
    with pytest.raises(pc.CrewConnectionError):
        await batch(echo.crew(), topics(2))
    assert list(batch.folder.glob("out*")) == []


async def test_typed_results_are_data_and_misfits_have_reasons(batch: Batches, crew_server: CrewServerFactory):
    kinds = {"Lead": int, "Loose": str}
    lead, loose = (create_model(title, name=(str, ...), score=(kind, ...)) for title, kind in kinds.items())
    text = '{"name": "{{ topic }}", "score": {{ "7" if topic == "topic 0" else \'"high"\' }}}'
    server = crew_server(script({"output": text}, inputs=["topic"]))

    async def lines_of(kind: Any) -> list[dict[str, Any]]:
        report = await batch(server.crew(), topics(2), name="typed", output_type=kind)
        assert report.completed == 1
        assert report.failed == 1
        assert server.kickoffs == 2, "repairing the type starts nothing"
        return sorted(batch.lines().values(), key=lambda line: line["state"])

    fitting, misfit = await lines_of(lead)
    assert fitting["state"] == "completed"
    assert fitting["data"] == {"name": "topic 0", "score": 7}
    assert misfit["state"] == "invalid-output"
    assert misfit["data"] is None
    assert "score" in misfit["error"]
    assert '"high"' in misfit["output"], "what the crew wrote is kept"
    fitting, misfit = await lines_of(loose)
    assert fitting["data"]["score"] == "high"
    assert misfit["state"] == "invalid-output"


class Strict(BaseModel):
    name: str

    @model_validator(mode="before")
    @classmethod
    def _of_report(cls, data: Any) -> Any:
        return data["report"]  # a KeyError, which pydantic does not make a ValidationError of

    @field_serializer("name")
    def _shown(self, name: str) -> str:
        raise LookupError(name)


async def test_a_raising_validator_fails_its_row_alone(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(script({"output": '{"{{ topic }}": {"name": "x"}}'}, inputs=["topic"]))
    rows = [{"topic": topic} for topic in ("other", "report", "another")]
    for errors in ({"OutputTypeError": 2}, {}):
        report = await batch(server.crew(), rows, name="strict", output_type=Strict, key="topic")
        assert report.completed == 1
        assert report.failed == 2
        assert dict(report.errors) == errors
        lines = batch.lines()
        assert [line["state"] for line in lines.values()] == ["invalid-output", "completed", "invalid-output"]
        assert "KeyError: 'report'" in lines["other"]["error"]
        # What its own serializer refuses is there as the crew's server gave it.
        assert lines["other"]["data"] is None
        assert lines["report"]["output"] == '{"report": {"name": "x"}}'
        batch.output.unlink()
    assert server.kickoffs == 3


LATE = script({"seconds": "{{ 10 if 'slow' in topic else 0 }}", "output": "on {{ topic }}"}, inputs=["topic"])
"""A crew of which a run about what is slow ends last."""


async def test_an_output_is_exported_while_the_batch_runs(batch: Batches, crew_server: CrewServerFactory):
    server, early = crew_server(LATE), str(batch.folder / "early.csv")
    running = asyncio.ensure_future(batch(server.crew(), [{"topic": "slow"}, *topics(2)], name="exported"))
    await until(lambda: server.kickoffs == 3, "all rows are in flight")

    async def are_completed() -> bool:
        stored = await (await find_batch("exported")).report()
        return (stored.completed, stored.in_flight, stored.phase) == (2, 1, "running")

    await until(are_completed, "two rows have completed")
    for place in (early, early, str(batch.output)):  # the second time it is of this batch
        assert await (await find_batch("exported")).export(place) == (place, 2)
    with pytest.raises(pc.ConfigurationError, match=r"is not on record\. Name a file for it"):
        await (await find_batch("exported")).export()
    assert (await running).ok
    assert len(batch.lines()) == 3
    assert not list(batch.folder.glob(".*.new"))


async def test_a_file_that_another_batch_wrote_meanwhile_is_kept(batch: Batches, crew_server: CrewServerFactory):
    server, slow = crew_server(LATE), [{"topic": "slow"}]
    late = asyncio.ensure_future(batch(server.crew(), slow, name="late"))
    await until(lambda: server.kickoffs, "a kickoff")
    await batch(server.crew(), topics(2), name="early")
    with pytest.raises(
        pc.CrewError, match=r"is not from this batch: move it away. All results are in the crew database"
    ):
        await late
    assert [line["output"] for line in batch.lines().values()] == ["on topic 0", "on topic 1"]
    batch.output.unlink()
    await batch(server.crew(), slow, name="late")
    assert [line["output"] for line in batch.lines().values()] == ["on slow"]
    assert server.kickoffs == 3


async def test_a_flow_run_has_the_name_and_no_secret(batch: Batches, echo: CrewServer):
    name = f"leads {uuid.uuid4().hex[:6]}"
    await batch(echo.crew(), topics(2), name=name)
    async with get_client() as client:
        [run] = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
    assert set(run.parameters) == {"batch", "crew", "dataset", "export"}
    assert echo.token not in json.dumps(run.parameters)


async def test_a_scheduled_batch_is_named_by_its_time(batch: Batches, echo: CrewServer):
    name, export = "leads {scheduled_start:%Y-%m-%d %H:%M:%S}", str(batch.folder / "leads-{scheduled_start:%Y}.jsonl")

    @flow
    async def nightly() -> Any:
        return await batch(echo.crew(), topics(2), name=name, export=export), flow_run.scheduled_start_time

    report, moment = await nightly()
    assert report.name == f"leads {moment:%Y-%m-%d %H:%M:%S}"
    assert report.export.endswith(f"leads-{moment:%Y}.jsonl")


def test_sync_code_has_the_same(batch: Batches, echo: CrewServer):
    report = pc.run_batch(echo.crew(), topics(3), name="sync", export=str(batch.output))
    assert report.completed == 3
    plan = pc.plan_batch(echo.crew(), topics(4), name="sync", export=str(batch.output))
    assert plan.rows == 4
    assert plan.done == 3


@pytest.mark.usefixtures("prefect_api")
async def test_names_that_nobody_can_print_are_refused():
    for name in ("", " ", "x" * 201, "a\nb", "a\0b"):
        with pytest.raises(pc.ConfigurationError, match="printable name of 1 to 200"):
            await pc.arun_batch(CREW, topics(1), name=name, export="out.jsonl")


async def test_webhooks_without_a_secret_are_refused(batch: Batches, echo: CrewServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", "https://hooks.example.com")
    with pytest.raises(pc.ConfigurationError, match="WEBHOOK_SECRET"):
        await batch(echo.crew(), topics(1))
    assert echo.kickoffs == 0


@pytest.mark.parametrize("is_rotated", [True, False])
async def test_a_secret_of_an_earlier_call_is_withheld(
    batch: Batches, crew_server: CrewServerFactory, is_rotated: bool
):
    held, old = Held(), f"old-{uuid.uuid4().hex}"
    held.output = f"paid with {old}"
    server, new = crew_server(held), f"new-{uuid.uuid4().hex}" if is_rotated else old
    crew = server.crew(secret_inputs=["iban"])

    async def run(secret: str) -> pc.BatchReport:
        inputs = {"topic": "topic", "iban": lambda _: secret}
        return await batch(crew, topics(1), name=f"rotated {is_rotated}", inputs=inputs)

    running = asyncio.ensure_future(run(old))
    await until(lambda: server.requests["status"], "a poll")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    held.release()
    assert (await run(new)).completed == 1
    assert server.kickoffs == 1
    [line] = batch.lines().values()
    assert (line["output"], line["inputs"]["iban"]) == (None, MASK)
    assert "it may hold a secret" in line["error"]
    everything = b"".join(path.read_bytes() for path in batch.folder.rglob("*") if path.is_file())
    assert old.encode() not in everything


async def test_no_file_of_a_batch_has_a_secret_input(batch: Batches, crew_server: CrewServerFactory):
    task = {"output": "paid with {{ inputs.values() | join }}", "fail": "{{ 'no ' + iban if 'bad' in topic }}"}
    server = crew_server(script(task, inputs=["topic", "iban", "pin", "code"]))
    secrets = {way: f"{way}-{uuid.uuid4().hex}" for way in ("iban", "pin", "code")}
    ways: dict[str, Any] = {"iban": lambda row: secrets["iban"], "code": lambda row: SecretStr(secrets["code"])}
    options = {"key": "topic", "inputs": {"topic": "topic", "pin": SecretStr(secrets["pin"]), **ways}}
    crew, rows = server.crew(secret_inputs=["iban"]), [{"topic": "tea"}, {"topic": "bad"}]
    before = os.umask(0)
    try:
        for ending in ("jsonl.gz", "jsonl"):
            report = await batch(crew, rows, export=str(batch.folder / f"out.{ending}"), **options)
            assert report.completed == 1
            assert report.failed == 1
    finally:
        os.umask(before)
    assert all(run.inputs.items() >= secrets.items() for run in server.runs)
    lines = batch.lines()
    assert lines["tea"]["inputs"] == {"topic": "tea", **dict.fromkeys(secrets, MASK)}
    assert lines["tea"]["output"] is None
    assert "may hold a secret" in lines["tea"]["error"]
    assert lines["bad"]["error"] == "The reason is not kept here."
    files = [path for path in batch.folder.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert {stat.filemode(path.stat().st_mode) for path in files} == {"-rw-------"}, "for their owner only"
    everything = b"".join((gzip.open if path.suffix == ".gz" else open)(path, "rb").read() for path in files)
    assert [way for way, secret in secrets.items() if secret.encode() in everything] == []
