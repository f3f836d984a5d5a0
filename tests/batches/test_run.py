"""`run_batch` on a real Prefect server and a real crew server: rows in, lines out, and a second call that goes on."""

import asyncio
import gzip
import itertools
import json
import os
import stat
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, cast

import fsspec
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.runtime import flow_run
from pydantic import AfterValidator, BaseModel, Field, SecretStr, create_model, field_serializer, model_validator

import prefect_crew as pc
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.outcomes import MISFIT_WITHOUT_REASONS, RowState
from prefect_crew.batches.rows import RowPlan
from prefect_crew.batches.stored import open_stored_batch
from prefect_crew.client.redaction import MASK
from prefect_crew.devserver import CrewServer
from prefect_crew.devserver._scripts import load_program
from prefect_crew.runs.run import WITHHELD
from prefect_crew.testing import CrewServerFactory
from support.batches import CREW, Batches, attempts_read_in_scans, topics
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
    # A second call starts nothing, and reports the same.
    before, requests = batch.output.read_bytes(), dict(server.requests)
    again = await batch(server.crew(price=0.5), rows, name="leads")
    assert again.completed == 20
    assert again.failed == 1
    assert again.kickoffs == 0
    assert again.cost == 10.5
    assert batch.output.read_bytes() == before
    beforehand = {"inputs": 0, "inspect": 0}
    assert {**server.requests, **beforehand} == {**requests, **beforehand}
    with pytest.raises(pc.BatchFailedError, match=r"20 of 21 rows completed, 1 failed.*retry_failed=True") as caught:
        again.raise_for_failures()
    assert caught.value.report is again
    assert json.dumps(again.as_dict())


async def test_a_changed_batch_asks_for_a_decision(batch: Batches, crew_server: CrewServerFactory):
    first, second = crew_server(PICKY), crew_server(PICKY)
    await batch(first.crew(), topics(5), name="growing")
    with pytest.raises(pc.BatchChangedError, match=r"5 rows, not these 6.*on_change='continue'"):
        await batch(first.crew(), topics(6), name="growing")
    with pytest.raises(pc.BatchChangedError, match=f"crew {first.url}, not {second.url}"):
        await batch(second.crew(), topics(5), name="growing")
    report = await batch(second.crew(), topics(6), name="growing", on_change="continue")
    assert report.completed == 6
    assert report.kickoffs == 1
    assert first.kickoffs == 5
    assert second.kickoffs == 1
    assert len(batch.lines()) == 6
    # Rows that have left the data set have no line, and are not counted.
    for _ in range(2):
        report = await batch(second.crew(), topics(7)[3:], name="growing", on_change="continue")
        assert report.total == 4
        assert report.completed == 4
        assert len(batch.lines()) == 4
    assert first.kickoffs == 5
    assert second.kickoffs == 2


async def test_another_deployment_asks_for_a_decision(batch: Batches, echo: CrewServer):
    await batch(echo.crew(), topics(2), name="deployed")
    (before,) = {line["crew_version"] for line in batch.lines().values()}
    echo.crew_runs.program = load_program(PICKY)
    with pytest.raises(pc.BatchChangedError, match=rf"version {before} of the crew, not \w+\. Nothing"):
        await batch(echo.crew(), topics(3), name="deployed")
    await batch(echo.crew(), topics(3), name="deployed", on_change="continue")
    versions = {key: line["crew_version"] for key, line in batch.lines().items()}
    assert sorted(versions.values()).count(before) == 2
    assert len(set(versions.values())) == 2
    assert echo.kickoffs == 3


@pytest.mark.parametrize("answer", ["none", "another each time"])
async def test_an_unknown_version_is_no_change(
    batch: Batches, echo: CrewServer, monkeypatch: pytest.MonkeyPatch, answer: str
):
    looks = itertools.count()
    if answer == "another each time":
        echo.crew_runs.program.definition = lambda: {"uptime": next(looks)}  # type: ignore[attr-defined]
    await batch(echo.crew(), topics(2), name=answer, max_kickoffs=1)
    with monkeypatch.context() as patch:
        if answer == "none":
            patch.setattr(pc.CrewClient, "version", lambda self: asyncio.sleep(0))
        assert (await batch(echo.crew(), topics(2), name=answer)).ok
    echo.crew_runs.program = load_program(PICKY)
    assert (await batch(echo.crew(), topics(2), name=answer)).ok, "no row is left to start"
    assert next(looks) == (4 if answer == "another each time" else 0)


async def test_a_corrected_row_is_started_where_asked(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(PICKY)
    options: dict[str, Any] = {"name": "corrected", "key": "id", "on_change": "continue"}
    rows = [{"id": "a", "topic": "bad tea"}, {"id": "b", "topic": "milk"}, {"id": "c", "topic": "bad rye"}]
    assert (await batch(server.crew(), rows, **options)).failed == 2
    rows = [{"id": "a", "topic": "tea"}, {"id": "b", "topic": "cream"}, {"id": "c", "topic": "bad rice"}]
    report = await batch(server.crew(), rows, **options)
    assert report.failed == 3
    assert report.conflicts == 3
    assert report.kickoffs == 0, "nobody has asked for it"
    for number in range(2):
        report = await batch(server.crew(), rows, retry_failed=["a"], **options)
        assert report.completed == 1
        assert report.conflicts == 2
        assert report.kickoffs == 1 - number
    report = await batch(server.crew(), rows, retry_failed=True, retries=1, **options)
    assert report.completed == 1
    assert report.failed == 2
    assert report.conflicts == 1
    assert report.kickoffs == 2
    lines = [(line["state"], line["inputs"]["topic"], line["output"]) for line in batch.lines().values()]
    assert lines == [("completed", "tea", "on tea"), ("conflict", "cream", None), ("failed", "bad rice", None)]
    assert "kicked off before with other inputs" in batch.lines()["b"]["error"]
    async with Ledger(f"{batch.output}.ledger.db", "corrected") as ledger:
        assert [record.attempt for record in await ledger.attempts(ledger.idempotency_key("c"))] == [1, 2, 3]
    rows[1]["topic"] = "milk"  # the completed run is back with its inputs
    report = await batch(server.crew(), rows, **options)
    assert report.completed == 2
    assert report.conflicts == 0
    assert server.kickoffs == 6
    assert batch.lines()["b"]["output"] == "on milk"


async def test_the_ledger_of_another_machine_is_missed(batch: Batches, echo: CrewServer, tmp_path: Path):
    await batch(echo.crew(), topics(3), name="here")
    (elsewhere := tmp_path / "elsewhere" / "out.jsonl").parent.mkdir()
    with pytest.raises(pc.LedgerMissingError, match=r"uses another ledger, .*out\.jsonl\.ledger\.db.*nothing was st"):
        await batch(echo.crew(), topics(3), name="here", export=str(elsewhere))
    assert echo.kickoffs == 3
    report = await batch(echo.crew(), topics(3), name="here", export=str(elsewhere), ledger=f"{batch.output}.ledger.db")
    assert report.completed == 3
    assert echo.kickoffs == 3
    assert len(batch.lines(elsewhere)) == 3


@pytest.mark.parametrize("place", ["{folder}/out.parquet", "memory://lost/out.jsonl"], ids=["here", "elsewhere"])
async def test_an_output_that_is_gone_is_written_again(batch: Batches, echo: CrewServer, place: str):
    output, files = place.format(folder=batch.folder), cast("Any", fsspec)
    options = {"name": f"gone {batch.folder.name}", "export": output, "ledger": str(batch.folder / "ledger.db")}
    await batch(echo.crew(), topics(3), **options)
    filesystem, path = files.core.url_to_fs(output)
    before = filesystem.cat_file(path)
    filesystem.rm(path)
    report = await batch(echo.crew(), topics(3), **options)
    assert report.completed == 3
    assert echo.kickoffs == 3
    assert filesystem.cat_file(path) == before


async def test_an_output_with_other_lines_is_written_again(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(PICKY)

    async def shown(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        await batch(server.crew(), rows, name="same", **options)
        return [line["inputs"]["topic"] for line in batch.lines().values()]

    assert await shown(topics(3)) == ["topic 0", "topic 1", "topic 2"]
    assert await shown(topics(4)[1:], on_change="continue") == ["topic 1", "topic 2", "topic 3"]
    assert await shown(topics(4)[:0:-1]) == ["topic 3", "topic 2", "topic 1"]
    assert server.kickoffs == 4
    batch.output.unlink()
    await batch(server.crew(), [{"topic": "bad one"}], name="bad")
    [before] = batch.lines().values()
    await batch(server.crew(), [{"topic": "bad one"}], name="bad", retry_failed=True)
    [after] = batch.lines().values()
    assert before["state"] == after["state"] == "failed"
    assert before["kickoff_id"] != after["kickoff_id"]


async def test_the_second_call_reads_no_data_set(batch: Batches, echo: CrewServer):
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
    assert not list(batch.folder.glob("*.lock"))


async def test_a_write_reads_no_other_attempts(batch: Batches, echo: CrewServer, postgres_address: str):
    count = 1500
    report = await batch(echo.crew(), topics(count), name="large", ledger=postgres_address, max_in_flight=50)
    assert report.completed == count
    # What counts all rows at the end may read them all. Writes that did came to 200 times as many.
    assert await attempts_read_in_scans(postgres_address) <= 3 * count


async def test_an_unchanged_file_is_not_checked_again(
    batch: Batches, echo: CrewServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "rows.csv"
    path.write_text("topic\ntea\nmilk\n")
    first = await batch(echo.crew(), path, name="as before")
    with monkeypatch.context() as patch:
        patch.setattr(RowPlan, "check", pytest.fail)
        again = await batch(echo.crew(), path, name="as before")
        assert (again.completed, again.kickoffs) == (first.completed, 0) == (2, 0)
    path.write_text("topic\ntea\nrye\n")
    with pytest.raises(pc.BatchChangedError, match="the same number of rows, 2, with"):
        await batch(echo.crew(), path, name="as before")
    path.write_text("topic\ntea\nmilk\n")
    with pytest.raises(pc.BatchChangedError):
        await batch(echo.crew(), path, name="as before", inputs={"topic": "{{ topic }}!"})
    # In another order they are the same rows.
    path.write_text("topic\nmilk\ntea\n")
    assert (await batch(echo.crew(), path, name="as before")).completed == 2
    assert echo.kickoffs == 2


async def test_bad_rows_are_in_every_report(batch: Batches, echo: CrewServer, tmp_path: Path):
    dirty, options = tmp_path / "dirty.csv", {"name": "dirty", "key": "id"}
    dirty.write_text("id,topic\n1,tea\n2,\n3,milk,x\n4,rye\n")
    bad = [(3, "has no value for topic"), (4, "has 3 fields, the header has 2")]
    with pytest.raises(pc.BadRowsError, match=r"2 rows cannot be run: ") as caught:
        await batch(echo.crew(), dirty, **options)
    assert [(row.line, row.reason) for row in caught.value.rows] == bad
    assert echo.kickoffs == 0
    assert batch.output.exists() is False
    rejected = Path(f"{batch.output}.rejected.jsonl")
    for number in (1, 2):
        report = await batch(echo.crew(), dirty, on_bad_row="skip", **options)
        assert report.total == 4
        assert report.completed == 2
        assert report.bad_count == 2
        assert report.skipped == 2
        assert report.ok is False
        assert [(row.line, row.reason) for row in report.bad] == bad
        assert "2 of 4 rows completed, 2 bad in " in str(report)
        assert str(report).endswith(f"Bad rows: {rejected}")
        written = [json.loads(line) for line in rejected.read_text().splitlines()]
        assert [(line["line"], line["reason"]) for line in written] == bad
        assert [line["row"] for line in written] == [{"id": "2", "topic": ""}, ["3", "milk", "x"]]
        assert len(pages := await batch.pages("dirty")) == number, "each flow run has its own"
        table = "| 3 | has no value for topic |\n| 4 | has 3 fields, the header has 2 |"
        for part in ("2 of 4 (50.0%)", "| Bad | 2 |", table, str(rejected)):
            assert part in pages[-1]
    assert echo.kickoffs == 2
    async with open_stored_batch("dirty") as stored:
        status = await stored.status()
    assert status.total == 4
    assert status.completed == 2
    assert status.bad_count == 2
    assert status.left == 0
    assert [(row.line, row.reason) for row in status.bad] == bad
    assert status.bad_export == str(rejected)
    # Once the file is repaired nothing is left of it.
    dirty.write_text("id,topic\n1,tea\n")
    report = await batch(echo.crew(), dirty, on_change="continue", **options)
    assert report.total == 1
    assert report.bad_count == 0
    assert report.ok is True
    assert rejected.exists() is False
    async with open_stored_batch("dirty") as stored:
        assert (await stored.status()).bad_count == 0


async def test_a_bad_row_shows_no_secret(batch: Batches, crew_server: CrewServerFactory, tmp_path: Path):
    server = crew_server(script({"output": "paid"}, inputs=["topic", "iban"]))
    (tmp_path / "rows.csv").write_text("topic,account\ntea,PT50\n,PT51\nmilk,PT52,x\n")
    inputs = {"topic": "topic", "iban": "{{ account }}"}
    await batch(server.crew(secret_inputs=["iban"]), tmp_path / "rows.csv", inputs=inputs, on_bad_row="skip")
    text = Path(f"{batch.output}.rejected.jsonl").read_text()
    assert "PT5" not in text
    assert [json.loads(line)["row"] for line in text.splitlines()] == [{"topic": "", "account": "********"}, None]


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
    with pytest.raises((pc.RateLimitedError, pc.ServerError, pc.ConfigurationError), match=problem):
        await batch(echo.crew(), topics(2, note="no input"))
    assert echo.requests["kickoff"] == 0
    echo.faults.clear()
    echo.faults.add("inputs:404")
    assert (await batch(echo.crew(allow_extra_inputs=True), topics(2))).ok


async def test_names_of_inputs_that_are_gone_start_no_row_again(batch: Batches, echo: CrewServer):
    server, rows = echo, topics(2, note="no input")
    server.faults.add("inputs:404@2", "inputs:404@3")
    crew = server.crew(allow_extra_inputs=True)
    await batch(crew, rows, name="named")
    with pytest.raises(pc.ConfigurationError, match=r"the rows of batch 'named' took.*Nothing was started"):
        await batch(crew, rows, name="named", on_change="continue")
    for options in ({"inputs": {"topic": "topic"}}, {}):
        report = await batch(crew, rows, name="named", on_change="continue", **options)
        assert report.completed == 2
        assert report.kickoffs == 0
        assert server.kickoffs == 2
    server.crew_runs.program = load_program(script({"output": "x"}))
    with pytest.raises(pc.ConfigurationError, match="names no inputs now"):
        await batch(crew, rows, name="named", on_change="continue")


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
        async with Ledger(f"{batch.output}.ledger.db", "typed") as ledger:
            assert await ledger.counts() == {"completed": 1, "invalid-output": 1}
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
    # The same type by its name, before and after it was edited.
    loose.__qualname__ = lead.__qualname__
    assert (await lines_of(lead))[0]["data"]["score"] == 7
    assert (await lines_of(loose))[0]["data"]["score"] == "high"


async def test_a_result_is_judged_before_its_secrets_are_masked(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(script({"output": '{"year": {{ pin }}}'}, inputs=["topic", "pin"]))
    rows = [{"topic": "tea", "pin": "1985"}]
    options = {"name": "masked", "key": "topic", "retries": 1}
    for kind in (create_model("Lead", year=(int, ...)), create_model("Wider", year=(int, ...), note=(str, ""))):
        report = await batch(server.crew(secret_inputs=["pin"]), rows, output_type=kind, **options)
        assert report.completed == 1
        assert report.failed == 0
        assert server.kickoffs == 1
        assert batch.lines()["tea"]["output"] == f'{{"year": {MASK}}}'


def unknown(pin: str) -> str:
    raise ValueError(f"unknown customer {pin.lower()}")


@pytest.mark.parametrize(
    "pin",
    [
        pytest.param(Annotated[str, Field(max_length=len(MASK))], id="the mask would fit"),
        pytest.param(Annotated[str, AfterValidator(unknown)], id="an error quotes the secret in other words"),
    ],
)
async def test_a_misfit_stays_one_and_shows_no_secret(batch: Batches, crew_server: CrewServerFactory, pin: Any):
    kind: Any = create_model("Customer", pin=(pin, ...))
    server = crew_server(script({"output": '{"pin": "{{ pin }}"}'}, inputs=["topic", "pin"]))
    crew, rows = server.crew(secret_inputs=["pin"], max_attempts=1), [{"topic": "tea", "pin": "PIN-OF-ANN"}]
    for retry_failed in (False, True):
        options: dict[str, Any] = {"name": f"misfit {batch.folder.name}", "key": "topic", "retry_failed": retry_failed}
        report = await batch(crew, rows, output_type=kind, **options)
        assert report.completed == 0
        assert report.failed == 1
        assert server.kickoffs == 1
        assert batch.lines()["tea"]["error"] == MISFIT_WITHOUT_REASONS
    everything = b"".join(path.read_bytes() for path in batch.folder.rglob("*") if path.is_file())
    assert b"pin-of-ann" not in everything


class Strict(BaseModel):
    name: str

    @model_validator(mode="before")
    @classmethod
    def _of_report(cls, data: Any) -> Any:
        return data["report"]  # a KeyError, which pydantic does not make a ValidationError of

    @field_serializer("name")
    def _shown(self, name: str) -> str:
        raise LookupError(name)


async def test_a_raising_validator_fails_its_row_alone(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    # A kill between an end and a judgement that is written later would leave a failure as a result.
    monkeypatch.setattr(Ledger, "save", pytest.fail)
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


async def test_an_output_is_exported_while_the_batch_runs(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server, early = crew_server(LATE), str(batch.folder / "early.jsonl")
    running = asyncio.ensure_future(batch(server.crew(), [{"topic": "slow"}, *topics(2)], name="exported"))
    await until(lambda: server.kickoffs == 3, "all rows are in flight")
    async with open_stored_batch("exported") as stored:

        async def are_completed() -> bool:
            return (await stored.ledger.counts()).get(RowState.COMPLETED) == 2

        await until(are_completed, "two rows have completed")
        for place in (early, early, str(batch.output)):  # the second time it is of this batch
            assert await stored.export(place) == (place, 2)
        with pytest.raises(pc.ConfigurationError, match="is not on record: its crew is not a stored block"):
            await stored.export()
        lines = stored.ledger.lines

        async def lines_until_the_batch_ends() -> AsyncIterator[Any]:
            async for page in lines():
                yield page
            await running

        monkeypatch.setattr(stored.ledger, "lines", lines_until_the_batch_ends)
        assert await stored.export(str(batch.output)) == (str(batch.output), 3)
    assert len(batch.lines()) == 3
    assert not list(batch.folder.glob(".*.new"))


async def test_a_file_that_another_batch_wrote_meanwhile_is_kept(batch: Batches, crew_server: CrewServerFactory):
    server, slow = crew_server(LATE), [{"topic": "slow"}]
    late = asyncio.ensure_future(batch(server.crew(), slow, name="late"))
    await until(lambda: server.kickoffs, "a kickoff")
    await batch(server.crew(), topics(2), name="early")
    with pytest.raises(pc.ExportError, match=r"is not from this batch: move that file. All results are in the ledger"):
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
    assert pc.plan_batch(echo.crew(), topics(4), name="sync").done == 3, "the ledger is found by the batch's name"


@pytest.mark.usefixtures("prefect_api")
async def test_names_that_no_ledger_could_keep_are_refused():
    for name in ("", " ", "x" * 201, "a\nb", "a\0b"):
        with pytest.raises(pc.ConfigurationError, match="printable name of 1 to 200"):
            await pc.arun_batch(CREW, topics(1), name=name, export="out.jsonl")


async def test_webhooks_without_a_secret_are_refused(batch: Batches, echo: CrewServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", "https://hooks.example.com")
    with pytest.raises(pc.ConfigurationError, match="WEBHOOK_SECRET"):
        await batch(echo.crew(), topics(1))
    assert echo.kickoffs == 0


@pytest.mark.parametrize("is_rotated", [True, False])
async def test_a_rotated_secret_is_withheld(batch: Batches, crew_server: CrewServerFactory, is_rotated: bool):
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
    assert line["output"] == (WITHHELD if is_rotated else f"paid with {MASK}")
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
    assert lines["tea"]["output"] == lines["tea"]["tasks"][0]["output"] == f"paid with tea{MASK}{MASK}{MASK}"
    assert lines["bad"]["error"] == f"no {MASK}"
    files = [path for path in batch.folder.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert {stat.filemode(path.stat().st_mode) for path in files} == {"-rw-------"}, "for their owner only"
    everything = b"".join((gzip.open if path.suffix == ".gz" else open)(path, "rb").read() for path in files)
    assert [way for way, secret in secrets.items() if secret.encode() in everything] == []
